"""Every real image of the corpus through nbdkit: whole and right, or refused with one clean line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import Any

import pytest

from tests.corpus import Entry, entries
from tests.images.content import MIB
from tests.plugin import PLUGIN, refusal

Unpack = Callable[[Entry], str]
#: Bytes of a request; larger ones are no faster.
STEP = 8 * MIB


@pytest.mark.parametrize("entry", entries("open"))
def test_image_reads_right(serve: Any, corpus: Unpack, entry: Entry) -> None:
    server = serve(corpus(entry), options=("-r",))
    connection = server.connect(context=False)
    assert connection.get_size() == entry["virtual_size"]
    digest = hashlib.sha256()
    for offset in range(0, entry["virtual_size"], STEP):
        digest.update(connection.pread(min(STEP, entry["virtual_size"] - offset), offset))
    assert digest.hexdigest() == entry["sha256"]


@pytest.mark.parametrize("options", [[], ["-r"]], ids=["writable", "read-only"])
@pytest.mark.parametrize("entry", entries("refuse"))
def test_image_is_refused(corpus: Unpack, entry: Entry, options: list[str]) -> None:
    path = corpus(entry)
    # The file that is to blame may be another one beside it.
    assert os.path.dirname(path) in refusal(*options, "python", PLUGIN, f"file={path}")
