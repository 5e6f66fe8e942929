"""What nbdkit loads: it finds this installation, then hands over the callbacks of ``nbd_vmdk.plugin``.

nbdkit embeds the Python it was built with, which knows nothing of the virtual environment this package is
installed in.  So this file, run by path, puts that environment and the package first on ``sys.path``.
``plugin.py`` at the top of a checkout is a link to it; ``nbd-vmdk --plugin-path`` tells where it is.

It is run as ``nbdkit python plugin.py file=disk.vmdk``.  Without the word ``python`` nbdkit 1.32 takes what
has a slash in its name for a shared library.

``NBD_VMDK_SITE`` names the site-packages to use; ``nbd-vmdk serve`` sets it to its own.
"""

import os
import re
import sys


def _sites(root: str) -> list[str]:
    """The folders that may hold our dependencies, best first."""
    told = os.environ.get("NBD_VMDK_SITE")
    if told:
        return [told]
    try:
        versions = sorted(os.listdir(f"{root}/.venv/lib"))
    except OSError:
        return [root]
    own = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if own in versions:
        return [f"{root}/.venv/lib/{own}/site-packages"]
    return [f"{root}/.venv/lib/{version}/site-packages" for version in versions] or [root]


def _bootstrap() -> None:
    """Put this installation first on ``sys.path``; leave with one clean line if it is for another Python."""
    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    site = _sites(root)[0]
    made_for = re.search(r"/python(\d+\.\d+)/(?:site|dist)-packages/*$", site)
    embedded = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if made_for and made_for[1] != embedded:
        # Compiled modules of one Python do not load in another; this says so before the first one fails.
        sys.exit(
            f"error: nbdkit embeds Python {embedded}, but nbd-vmdk is installed for Python {made_for[1]} "
            f"({site})\n"
            f"hint: install it with python{embedded}; in a checkout: make clean setup"
        )
    for folder in (site, root):
        if folder in sys.path:
            sys.path.remove(folder)
        sys.path.insert(0, folder)


_bootstrap()

# nbdkit looks its callbacks up by name in the file it was given, which is this one.
from nbd_vmdk.plugin.callbacks import *  # noqa: E402, F403
