"""``python -m nbd_vmdk`` is ``nbd-vmdk``."""

import sys


def main() -> int:
    """Run the command line that this process was given; the exit code.

    It ends as quietly at a Ctrl-C that comes while it is still being imported as at any later one.
    """
    try:
        from nbd_vmdk.cli import main as run

        return run()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
