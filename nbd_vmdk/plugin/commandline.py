"""What nbdkit was told on its command line, and does not tell its plugin in time."""

import os

#: nbdkit's options of one letter that take a value.
_VALUED = frozenset("DegipPtuU")


def nbdkit_is_read_only() -> bool:
    """Tell whether nbdkit was started with -r.

    Its Python plugin is only told when a client connects, which is too late: opening for writing takes locks
    and may be refused.  So the command line is looked at, as nbdkit itself reads it.
    """
    try:
        with open("/proc/self/cmdline", "rb") as file:
            words = iter([os.fsdecode(word) for word in file.read().split(b"\0")[1:-1]])
    except OSError:
        return False
    for word in words:
        if word == "--":
            break
        if word.startswith("--re"):  # --readonly and --read-only; nbdkit has no other
            return True
        if word.startswith("-") and not word.startswith("--"):
            # Letters may stand together, and a value with its letter or behind it: -frU, -U/tmp/r, -e -r.
            letters = word[1:]
            valued = next((at for at, letter in enumerate(letters) if letter in _VALUED), len(letters))
            if "r" in letters[:valued]:
                return True
            if valued == len(letters) - 1:
                next(words, None)
    return False
