"""Fixtures for tests of every folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.corpus import Entry, unpack

# How long an example takes says nothing on a machine that is shared.  What runs before every change lands is
# to be the same for everybody; who runs the tests by hand looks at other examples each time.
settings.register_profile("project", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("project")


def pytest_configure() -> None:
    """Hear signals again that whoever started us, by nohup or ``&``, has told us to ignore.

    Programs inherit that, and those that the tests interrupt are to be interrupted.
    """
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
        (signal.SIGTERM, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Entry], str]:
    """Unpacks an entry of the corpus (see tests/corpus.py) and gives the path of the file to open.

    Tests share the files, so they are only to be read.
    """
    base = tmp_path_factory.getbasetemp()
    # xdist's processes have folders of their own in the one of the run.
    where = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "corpus"
    where.mkdir(exist_ok=True)
    return lambda entry: unpack(entry, str(where))
