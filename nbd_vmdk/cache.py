"""One byte-bounded cache for everything that can be read again: tables and inflated grains.

Two generations stand in for an LRU list: entries are put into the young one; when that holds half the
budget it becomes the old one and the old one is forgotten.  A hit in the old generation moves the entry
to the young one.  So a hit in the young generation, nearly every one, is a single dict lookup with no
bookkeeping and no lock, which the 4 KiB read path needs.

Values are immutable for readers: whoever wants to change a table takes it out first (see pages.py).
"""

import itertools
import threading
from array import array

#: What an entry costs beside its bytes: the dict slot, the key and the object's head, roughly.
_OVERHEAD = 200
#: Keys of one owner are consecutive from its base; 2**48 of them are more than any table has.
_NAMESPACE_BITS = 48


class Cache:
    """A cache of at most ``budget`` bytes, shared by all images that are opened together."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._half = max(budget // 2, 1)
        #: Read directly on the hot path; replaced as a whole when a generation ends.
        self.young: dict[int, array[int] | bytes | bytearray] = {}
        self._old: dict[int, array[int] | bytes | bytearray] = {}
        self._young_bytes = 0
        self._lock = threading.Lock()
        self._namespaces = itertools.count(1)

    def namespace(self) -> int:
        """A base for the keys of one owner: its keys are base + 0, base + 1, ..."""
        return next(self._namespaces) << _NAMESPACE_BITS

    def get(self, key: int) -> "array[int] | bytes | bytearray | None":
        """The value kept under ``key``, or None."""
        value = self.young.get(key)
        if value is None and (value := self._old.get(key)) is not None:
            with self._lock:
                # It may have been dropped since, and a newer table may be in its place.
                if self._old.get(key) is value:
                    self._keep(key, value, _OVERHEAD + _bytes_of(value))
        return value

    def put(self, key: int, value: "array[int] | bytes | bytearray", *, shared: bool = False) -> None:
        """Keep ``value``; ``shared`` says that its bytes belong to nobody (an empty table)."""
        cost = _OVERHEAD if shared else _OVERHEAD + _bytes_of(value)
        if cost > self._half:
            return  # it would push everything else out
        with self._lock:
            self._keep(key, value, cost)

    def _keep(self, key: int, value: "array[int] | bytes | bytearray", cost: int) -> None:
        if key not in self.young:
            self._young_bytes += cost
        self.young[key] = value
        self._old.pop(key, None)
        if self._young_bytes > self._half:
            self._old = self.young
            self.young = {}
            self._young_bytes = 0

    def drop(self, key: int) -> None:
        """Forget ``key``."""
        with self._lock:
            self.young.pop(key, None)
            self._old.pop(key, None)


def _bytes_of(value: "array[int] | bytes | bytearray") -> int:
    return len(value) * value.itemsize if isinstance(value, array) else len(value)
