"""Sizes as users write them, and as they are shown them."""

import pytest

from nbd_vmdk.units import GIB, KIB, MIB, TIB, format_size, parse_size


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1500, "1.46 KiB"),
        (12345 * KIB // 100, "123 KiB"),
        (999 * KIB + 100, "999 KiB"),
        (999 * KIB + 700, "1000 KiB"),
        (1000 * KIB + 500, "1000 KiB"),
        (1023 * KIB + 400, "1023 KiB"),
        (TIB - MIB, "1024 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (1300 * TIB, "1.27 PiB"),
        ((1 << 63) - 1, "8192 PiB"),
    ],
)
def test_sizes_for_people(size: int, shown: str) -> None:
    assert format_size(size) == shown


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("64M", 64 * MIB),
        ("1.5G", 3 * GIB // 2),
        (" 4096 ", 4096),
        ("8s", 4096),
        ("2 KiB", 2048),
        ("1tb", TIB),
    ],
)
def test_sizes_of_people(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "1.3", "12 apples", "1e3", "0x10", "1_000"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a"):
        parse_size(text)
