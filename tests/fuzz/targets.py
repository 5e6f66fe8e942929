"""
What is fuzzed: each target takes bytes and returns, or raises because a rule was broken.

The rule of all of them: any input ends in a value, a disk or a VmdkError, within the bounds of limits.py.
Every other exception is a finding, an AssertionError (the engine's own or one of a target's) as well. Nothing
here needs atheris, so a finding is replayed by calling its target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.fuzz import case
from tests.fuzz.checks import fuzz_check
from tests.fuzz.images import fuzz_files, fuzz_image
from tests.fuzz.limits import MEMORY, limited
from tests.fuzz.machines import (
    WORDS,
    XML_WORDS,
    fuzz_dictionary,
    fuzz_envelope,
    fuzz_gunzip,
    fuzz_machine,
    mutate_machine,
    mutate_text,
)
from tests.fuzz.parsers import (
    Plain,
    fuzz_descriptor,
    fuzz_header,
    fuzz_stream,
    fuzz_tar,
    mutate_descriptor,
    mutate_tar,
)

KIB = 1 << 10


@dataclass(frozen=True)
class Target:
    """Something to fuzz. `mutate` changes an input in a way that keeps its form; `weight` shares out time."""

    name: str
    run: Callable[[bytes], None]
    max_len: int
    weight: int = 1
    mutate: Callable[[bytes, int, int, Plain], bytes] | None = None
    words: tuple[bytes, ...] = ()
    memory: int = MEMORY

    def __call__(self, data: bytes) -> None:
        """Run one input within bounds."""
        with limited(memory=self.memory):
            self.run(data)


def _words(words: tuple[str, ...]) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in words)


_DESCRIPTOR_WORDS = _words(case.WORDS)
_IMAGE_WORDS = (
    b"KDMV",
    b"COWD",
    b"\xbe\xba\xfe\xca\0\0\0\0",
    b"# Disk DescriptorFile\n",
    b"ustar",
    b"\xff" * 8,
)

TARGETS = {
    target.name: target
    for target in (
        Target("descriptor", fuzz_descriptor, 16 * KIB, 2, mutate_descriptor, _DESCRIPTOR_WORDS),
        Target("header", fuzz_header, 8 * KIB, 1, None, _IMAGE_WORDS),
        Target("stream", fuzz_stream, 16 * KIB),
        Target("tar", fuzz_tar, 64 * KIB, 1, mutate_tar),
        Target("dictionary", fuzz_dictionary, 8 * KIB, 1, mutate_text, _words(WORDS)),
        Target("envelope", fuzz_envelope, 16 * KIB, 1, mutate_text, _words(XML_WORDS)),
        Target("gunzip", fuzz_gunzip, 16 * KIB),
        Target("machine", fuzz_machine, 64 * KIB, 2, mutate_machine, _words(WORDS + XML_WORDS)),
        Target("image", fuzz_image, 64 * KIB, 3, None, _IMAGE_WORDS + _DESCRIPTOR_WORDS),
        Target("files", fuzz_files, 64 * KIB, 4, case.mutate),
        # Looking at a directory as a whole takes some arrays of its length, which may be millions of entries.
        Target("check", fuzz_check, 64 * KIB, 4, case.mutate, memory=4 * MEMORY),
    )
}
