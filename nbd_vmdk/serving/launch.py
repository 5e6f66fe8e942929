"""Which nbdkit to run, with which words and in which environment."""

import os
import re
import shutil
import sysconfig
from collections.abc import Sequence

from nbd_vmdk.errors import ServerError

# Socket activation wants the socket as descriptor 3 and the process's own ID in its environment.  A shell
# that becomes nbdkit can do both; a subprocess can only be given standard descriptors and an environment
# made before its ID is known.
_LAUNCH = 'LISTEN_PID=$$ exec "$@" 3<&0 </dev/null'

#: What misleads the Python in nbdkit, and what a service manager says to us alone.
_NOT_PASSED = (
    "PYTHONHOME",
    "VIRTUAL_ENV",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)

#: What says in which characters programs talk; the first that is set does.
_LOCALE = ("LC_ALL", "LC_CTYPE", "LANG")


def find_nbdkit() -> str:
    """The nbdkit to run: the one that ``NBDKIT`` names, or the one on PATH.  ServerError if there is none."""
    found = shutil.which(os.environ.get("NBDKIT") or "nbdkit")
    if found is None:
        hint = "apt-get install nbdkit nbdkit-plugin-python; 'nbd-vmdk doctor' tells what else is missing"
        raise ServerError(None, why="nbdkit is not installed", hint=hint)
    return os.path.abspath(found)


def nbdkit_environment(nbdkit: str) -> dict[str, str]:
    """What nbdkit runs in.

    The Python that it embeds looks for its standard library beside the first ``python3`` on PATH.  That of
    the folder nbdkit is installed in is the likeliest to be the one it was built with; that of a virtual
    environment or of a version manager is not.
    """
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_PASSED}
    environment["PATH"] = os.path.dirname(nbdkit) + os.pathsep + environment.get("PATH", os.defpath)
    environment["NBD_VMDK_SITE"] = sysconfig.get_path("purelib")
    locale = next((environment[name] for name in _LOCALE if environment.get(name)), "")
    if not re.search("utf-?8", locale, re.IGNORECASE):
        # nbdkit gives its Python names as UTF-8, and that one opens files by names in the locale's encoding:
        # in "C" only those in ASCII.  It does not look at PYTHONUTF8, as the python3 program does.
        environment.pop("LC_ALL", None)
        environment["LC_CTYPE"] = "C.UTF-8"
    return environment


def nbdkit_command(nbdkit: str, options: Sequence[str], plugin: str, parameters: Sequence[str]) -> list[str]:
    """The words that start nbdkit on the listening socket that is its standard input.

    ``LISTEN_FDS=1`` in the environment goes with them.
    """
    serve = [nbdkit, "-f", "--exit-with-parent", *options, "python", plugin, *parameters]
    return ["/bin/sh", "-c", _LAUNCH, "sh", *serve]
