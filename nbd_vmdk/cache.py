"""One byte-bounded cache for everything that can be read again: tables and inflated grains.

Two generations stand in for an LRU list: entries are put into the young one; when that holds half the
budget it becomes the old one and the old one is forgotten.  A hit in the old generation moves the entry
to the young one.  So a hit in the young generation, nearly every one, is a single dict lookup with no
bookkeeping and no lock, which the 4 KiB read path needs.

Whoever keeps something has a part of the cache to himself, with keys of his own.  The budget and the turn of
generations are common to all parts.

Values are immutable but for tables: one that is changed is held elsewhere, too, and is the same array here
until it is forgotten (see pages.py).
"""

import threading
from array import array
from typing import TypeAlias

#: What an entry costs beside its bytes: the dict slot, the key and the object's head, roughly.  (A part takes
#: 200 bytes for itself, and as many for the first entry's dict.)
_OVERHEAD = 200

Value: TypeAlias = "array[int] | bytes | bytearray"
Generation: TypeAlias = "dict[int, Value]"


class Part:
    """What one owner keeps in a cache."""

    __slots__ = ("_cache", "old", "young")

    def __init__(self, cache: "Cache") -> None:
        self._cache = cache
        #: Read directly on the hot path; replaced as a whole when a generation ends.
        self.young: Generation = cache.generation()
        self.old: Generation = {}

    def get(self, key: int) -> "Value | None":
        """The value kept under ``key``, or None."""
        return self._cache.get(self, key)

    def put(self, key: int, value: Value, *, shared: bool = False) -> None:
        """Keep ``value``; ``shared`` says that its bytes belong to nobody (an empty table)."""
        self._cache.put(self, key, value, shared=shared)

    def drop(self, key: int) -> None:
        """Forget ``key``."""
        self._cache.drop(self, key)


class Cache:
    """A cache of at most ``budget`` bytes, shared by all images that are opened together."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self._half = max(budget // 2, 1)
        self._young_bytes = 0
        #: The parts that have something in the young generation, and in the old one.
        self._young: set[Part] = set()
        self._old: set[Part] = set()
        #: Values whose bytes belong to nobody, by id(): they live as long as the process.
        self._shared: set[int] = set()
        self._lock = threading.Lock()

    def part(self) -> Part:
        """A part for a new owner."""
        return Part(self)

    def generation(self) -> Generation:
        """What a part's young generation begins as."""
        return {}

    def get(self, part: Part, key: int) -> "Value | None":
        """See Part."""
        value = part.young.get(key)
        if value is None and (value := part.old.get(key)) is not None:
            with self._lock:
                # It may have been dropped since, and a newer table may be in its place.
                if part.old.get(key) is value:
                    self._keep(part, key, value, self._cost(value))
        return value

    def put(self, part: Part, key: int, value: Value, *, shared: bool) -> None:
        """See Part."""
        if shared:
            self._shared.add(id(value))
        cost = self._cost(value)
        if cost > self._half:
            return  # it would push everything else out
        with self._lock:
            self._keep(part, key, value, cost)

    def _cost(self, value: Value) -> int:
        return _OVERHEAD if id(value) in self._shared else _OVERHEAD + _bytes_of(value)

    def _keep(self, part: Part, key: int, value: Value, cost: int) -> None:
        if key not in part.young:
            self._young_bytes += cost
        part.young[key] = value
        part.old.pop(key, None)
        self._young.add(part)
        if self._young_bytes > self._half:
            self._turn()

    def _turn(self) -> None:
        """End the young generation."""
        for part in self._old - self._young:
            part.old = {}
        for part in self._young:
            # In this order: a reader who looks meanwhile finds what he looks for in one of them.
            part.old = part.young
            part.young = self.generation()
        self._old, self._young = self._young, set()
        self._young_bytes = 0

    def drop(self, part: Part, key: int) -> None:
        """See Part."""
        with self._lock:
            part.young.pop(key, None)
            part.old.pop(key, None)


def _bytes_of(value: Value) -> int:
    return len(value) * value.itemsize if isinstance(value, array) else len(value)
