"""The only place that orders writes and syncs.

NBD promises that after FLUSH (or with FUA) everything acknowledged before survives a power cut.  Between
flushes guest data goes straight to the files, while changed grain tables stay in memory.  A commit is

1.  copy      all changed tables are copied in memory: what they name was written before this moment
2.  announce  the content ID is changed, and uncleanShutdown is set where a table was copied, in place
3.  sync      guest data, announcement and new, still empty tables become durable
4.  write     the copies of step 1, each table and its redundant twin
5.  sync      the tables become durable
6.  release   the blocks of grains that no durable table names any more go back to the file system, and
              their places to the allocator

so that no durable table entry ever names a grain whose bytes are not durable (step 1 comes before 3, and 3
before 4), the unclean flag is durable before the first table change (2, 3, 4), and a child made earlier can
notice the change before any write of this session counts as durable (2, 3).  Where no table has changed,
steps 4 to 6 fall away and a flush costs one fdatasync of each file that was written to.  Where all files are
in memory (tmpfs) that would do nothing, and it is left out, too, after the first.

Flushes from all connections share commits: a flush that comes while one is running waits, and then one
commit serves all that waited.  It must be a new one, because the running one may have copied the tables
before the latecomer's write.  One that fails serves nobody: whoever waited tries again, and has an error of
his own if that fails, too.

Errors: running out of space in step 4 is retryable, the tables stay dirty and the next flush writes them
again.  After a failed sync Linux may have dropped the dirty pages, so nothing can be promised any more: the
error latches, and every later write and flush fails until the image is opened again.  What goes wrong in
step 6 is only told: all is durable by then, and what was not released is space, no data.

What is not done here: a crash in step 4 may leave a table and its twin different; either one is right, as
all they name is durable.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from nbd_vmdk.errors import Latched, StorageError, VmdkError
from nbd_vmdk.pages import Changes, DirtyPage
from nbd_vmdk.storage.base import Storage
from nbd_vmdk.units import KIB, MIB

log = logging.getLogger("nbd_vmdk")

#: Table changes older than this are committed without being asked, which bounds what a crash can lose to
#: clients that never flush.
_MAX_AGE = 5.0
#: Bytes of dirty tables beyond which a writer commits before it goes on (they can't be evicted), for all
#: extents of the link together; an extent has its share, but at least a few tables.
MAX_PINNED = 16 * MIB
_MIN_SHARE = 64 * KIB


class Member(Protocol):
    """What a commit asks of an extent of the writable link.

    A ``lazy`` one is committed only when somebody asks: each commit costs it space for good.  ``holds_more``
    is set where ``held`` has grown, and cleared by who looks at that.
    """

    touched: bool
    lazy: bool
    holds_more: bool

    @property
    def storage(self) -> Storage:
        """The file that holds its bytes."""

    @property
    def tables(self) -> Sequence[Changes]:
        """All that may hold dirty pages, in the order in which they must be written."""

    def announce(self) -> None:
        """Write, once, what must be durable before the first table change."""

    @property
    def held(self) -> int:
        """Bytes of memory that only a commit gives back."""

    @property
    def freed(self) -> Sequence[int]:
        """Byte positions of grains that have been freed, until a commit takes them."""

    def take_freed(self) -> list[int]:
        """What is in ``freed``, which is then empty."""

    def release(self, positions: list[int]) -> None:
        """Give space back that no durable table entry names any more."""


class Committer:
    """Makes the writes to one link durable, in the right order, once for all who ask."""

    def __init__(self, members: Sequence[Member], announce: Callable[[], Storage | None]) -> None:
        """``announce`` changes the link's content ID, once, and returns the file that holds it."""
        self._members = members
        self._announce = announce
        #: Of all members, which have all they ever will.
        self._tables = [pages for member in members for pages in member.tables]
        self._share = max(MAX_PINNED // max(len(members), 1), _MIN_SHARE)
        self._freed: list[tuple[Member, list[int]]] = []  # not yet safe to release
        #: Grows before released space can be used again; see Disk.read_into.
        self.releases = 0
        #: How often something was made durable; grows only under the running commit.
        self.commits = 0
        self._described = False  # the content ID is changed, durably
        #: That is so, and no file of a member gets safer by a sync.
        self._instant = False
        self._turn = threading.Lock()  # held by the one commit that is running
        self._begun = 0  # commits, those that failed too
        self._done = 0  # the last of them that did not fail
        self._timing = threading.Lock()
        #: A write may begin: no sync has failed, and no member holds more than its share.
        self.admits = True
        self._latched: VmdkError | None = None
        #: A commit will be made before long.
        self.timed = False
        self._timer: threading.Timer | None = None
        self._closed = False

    def check(self) -> None:
        """Raise Latched if an earlier sync failed."""
        if self._latched is not None:
            raise Latched(self._latched.file, first=self._latched.message)

    def admit(self) -> None:
        """Let a write begin, after a commit if too much is held; raises what keeps it from being durable."""
        if not self.admits:
            self.flush()

    def wrote(self, member: Member) -> None:
        """Note that ``member`` was written to: before long it is committed, unless it is lazy."""
        if member.holds_more:
            member.holds_more = False
            if member.held > self._share:
                self.admits = False
        if not self.timed and not member.lazy:
            self.start_timer()

    def start_timer(self) -> None:
        """Have a commit made before long."""
        with self._timing:
            if self._timer is None and not self._closed:
                timer = threading.Timer(_MAX_AGE, self._on_timer)
                timer.daemon = True
                try:
                    timer.start()
                except RuntimeError:
                    return  # no thread to be had now; the next write tries again
                self._timer = timer
                self.timed = True

    def _on_timer(self) -> None:
        with self._timing:
            self._timer = None
            self.timed = False
        try:
            self.flush()
        except VmdkError as error:
            # Nobody waits for this commit; whoever flushes next meets the error himself.
            log.warning("%s", error)
            if self._latched is None:
                self.start_timer()

    def flush(self) -> None:
        """Return when all writes that ended before this call are durable; raise what went wrong."""
        if self._instant and self._is_settled():
            return
        begun = self._begun
        with self._turn:
            # Whoever has his turn first of those that waited has committed for all of them.
            if self._done > begun:
                return
            if self._latched is not None:
                self.check()
            self._begun += 1
            self._commit()
            self._done = self._begun

    def _is_settled(self) -> bool:
        """Whether a commit would find nothing but guest data, which needs none in a file in memory.

        Those who flush would else wait there for each other, one by one, for nothing.
        """
        for pages in self._tables:
            if pages.dirty:
                return False
        for member in self._members:
            if member.freed:
                return False
        # A commit that has taken changes holds its lock until they are written; one that failed is not done.
        return self.admits and not self._turn.locked() and self._done == self._begun

    def _commit(self) -> None:
        self.admits = True
        # A split disk has thousands of tables and members, and each flush looks at all of them.  Where there
        # is one, and guest data alone was written, that look is most of what a flush costs beside the sync.
        for pages in self._tables:
            if pages.dirty:
                self._commit_changes()
                return
        touched = []
        for member in self._members:
            if member.freed:
                self._commit_changes()
                return
            if member.touched:
                touched.append(member)
        if touched:
            self.commits += 1
            self._sync_data(touched)

    def _commit_changes(self) -> None:
        self.commits += 1
        # 1. copy; freed grains are listed first, so that each one's entry is among the copies
        for member in self._members:
            if freed := member.take_freed():
                self._freed.append((member, freed))
        releasing = len(self._freed)
        taken: list[tuple[Changes, list[DirtyPage]]] = []
        durable = False
        try:
            for member in self._members:
                if self._take(member, taken):
                    # 2. announce
                    member.announce()
            # 3. sync
            self._sync_data([member for member in self._members if member.touched])
            # 4. write
            written = [self._write_tables(pages, dirty) for pages, dirty in taken]
            # 5. sync
            self._sync(written)
            durable = True
        finally:
            for pages, dirty in taken:
                pages.settle(dirty, durable=durable)
            if not durable:
                too_much = any(member.held > self._share for member in self._members)
                self.admits = self._latched is None and not too_much
        # 6. release
        if releasing:
            self.releases += 1
        for member, freed in self._freed[:releasing]:
            try:
                member.release(freed)
            except StorageError as error:
                log.warning("%s (the space of a grain is not given back)", error)
        del self._freed[:releasing]

    def _take(self, member: Member, taken: list[tuple[Changes, list[DirtyPage]]]) -> bool:
        """Put copies of a member's changed tables into ``taken``; tell whether there are any."""
        found = False
        for pages in member.tables:
            if pages.dirty:
                # Listed before it is filled: what is copied when an error comes must be settled too.
                dirty: list[DirtyPage] = []
                taken.append((pages, dirty))
                pages.take_dirty(dirty)
                found = found or bool(dirty)
        return found

    def _sync_data(self, touched: list[Member]) -> None:
        """Make durable what was written to members, and the new content ID with the first of it."""
        storages = []
        # Where a failed write alone has left grains to be freed nothing has changed that a child must notice.
        if touched and not self._described and (described_in := self._announce()) is not None:
            storages.append(described_in)
        for member in touched:
            storages.append(member.storage)
            member.touched = False  # before the sync: a write during it sets it again
        try:
            self._sync(storages)
        except BaseException:
            for member in touched:
                member.touched = True
            raise
        if touched and not self._described:
            self._described = True
            storages = [member.storage for member in self._members]
            self._instant = all(storage.in_memory or storage.fleeting for storage in storages)

    def _write_tables(self, pages: Changes, dirty: list[DirtyPage]) -> Storage:
        """Write tables, and then their twins; what lies one behind the other goes into one call."""
        storage = pages.storage
        for copy in range(max((len(page.places) for page in dirty), default=0)):
            start = end = -1
            parts: list[bytes] = []
            for page in dirty:
                if copy >= len(page.places):
                    continue
                at = page.places[copy]
                if at != end:
                    if parts:
                        storage.write(parts[0] if len(parts) == 1 else b"".join(parts), start)
                    start, parts = at, []
                parts.append(page.data)
                end = at + len(page.data)
            storage.write(b"".join(parts), start)
        return storage

    def _sync(self, storages: Sequence[Storage]) -> None:
        for storage in dict.fromkeys(storages) if len(storages) > 1 else storages:
            try:
                storage.sync()
            except StorageError as error:
                self._latched = error
                self.admits = False
                raise

    def close(self) -> None:
        """Stop committing by time; the owner has flushed."""
        with self._timing:
            self._closed = True
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
            timer.join()
