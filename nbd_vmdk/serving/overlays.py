"""Where clients' writes go when the images that are served must stay as they are."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from nbd_vmdk.errors import OptionError, VmdkError
from nbd_vmdk.options import OpenOptions
from nbd_vmdk.serving.scratch import ScratchFolder

Path = str | os.PathLike[str]


@dataclass(frozen=True, slots=True)
class Overlays:
    """Where writes go instead of into the images.

    scratch      thrown away at the end: into an overlay for each disk, in a private folder
    scratch_dir  where that folder is made; by default in $TMPDIR or /var/tmp
    kept         into this child link, new or made earlier so, of the only disk that is served
    """

    scratch: bool = False
    scratch_dir: Path | None = None
    kept: Path | None = None

    def __bool__(self) -> bool:
        return self.scratch or self.kept is not None

    def check(self, options: OpenOptions) -> None:
        """Raise OptionError for what does not go together."""
        if self.scratch and self.kept is not None:
            raise OptionError(None, why="writes are kept in an overlay or thrown away, not both")
        if self.scratch_dir is not None and not self.scratch:
            raise OptionError(None, why="a place for what is thrown away needs --scratch")
        if self and not options.writable:
            raise OptionError(None, why="an overlay takes writes, and read-only there are none")
        if self and options.parent is not None:
            raise OptionError(None, why="an overlay's parent is the image: --parent can't name another one")

    def make(
        self,
        paths: Sequence[str],
        options: OpenOptions,
        ending: ExitStack,
        *,
        snapshot: str | None = None,
        skip_broken: bool = False,
    ) -> tuple[list[str], list[str]]:
        """The overlay of each disk behind ``paths``, in order, and warnings; none if none are wanted.

        What is thrown away is removed by ``ending``.  A disk that is broken has the empty name for its
        overlay if such are passed over.  Raises what finding, opening and making raise.
        """
        if not self:
            return [], []
        from nbd_vmdk.ops.overlay import check_overlay, make_overlay, make_scratch
        from nbd_vmdk.vm import find_all

        found = find_all(
            paths, snapshot=snapshot, allow_dirs=options.allow_dirs, allow_devices=options.allow_devices
        )
        if self.kept is not None:
            top = os.path.abspath(self.kept)
            if len(found) > 1:
                hint = "name one of them, or use --scratch, which makes an overlay for each"
                raise OptionError(None, why=f"one overlay for {len(found)} disks", hint=hint)
            if not os.path.lexists(top):
                return [top], make_overlay(top, found[0], options)
            check_overlay(top)
            return [top], []
        folder = ending.enter_context(ScratchFolder(self.scratch_dir))
        tops = []
        for number, each in enumerate(found):
            top = os.path.join(folder.path, f"{number}.vmdk")
            try:
                make_scratch(top, each, options)
            except VmdkError:
                if not skip_broken:
                    raise
                top = ""  # opening it will say again why
            tops.append(top)
        return tops, []
