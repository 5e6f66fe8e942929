"""When to start a server again that died."""

from dataclasses import dataclass

from nbd_vmdk.errors import OptionError


@dataclass(frozen=True, slots=True)
class Restart:
    """Start a server again when it fails: when it exits with an error, or is killed.

    The first time after ``delay`` seconds, then after twice as long each time, ``longest`` at most; not more
    than ``limit`` times (None: no limit) within ``within`` seconds.  A server that was told to end, or
    that could not be started in the first place, is not started again.
    """

    limit: int | None = 5
    within: float = 300.0
    delay: float = 0.5
    longest: float = 30.0

    def __post_init__(self) -> None:
        if (self.limit is not None and self.limit < 1) or min(self.within, self.delay, self.longest) < 0:
            raise OptionError(None, why="a restart policy has a limit of at least 1, and no negative times")

    def after(self, earlier: list[float], now: float) -> float | None:
        """Seconds to wait, restarts having been tried at ``earlier``; None to give up.

        Forgets in ``earlier`` what was long ago.
        """
        earlier[:] = [moment for moment in earlier if now - moment < self.within]
        if self.limit is not None and len(earlier) >= self.limit:
            return None
        # Beyond this power any delay is the longest, and a float would overflow.
        return min(self.delay * 2.0 ** min(len(earlier), 64), self.longest)
