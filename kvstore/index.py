"""The block index of one namespace group: a tree of prefix hashes and where each block's shards lie.

A block is a *row*, a number into parallel columns. Objects would cost 160 bytes each and garbage-collector
pauses of 100 ms per million; columns cost 50 bytes and none. Complete blocks and all others are kept in two
dictionaries, so that the walk of a lookup is one C-level ``map`` over the first: a block is complete, or it is
a miss.

A row exists while the block is resident anywhere, is being written, or has children: a block removed from the
middle of a chain stays as a *tombstone*, so that storing it again makes its descendants reachable again.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence

NO_ROW = -1
NO_SLOT = -1

_WALK_FIRST = 64


class BlockIndex:
    """Rows of one namespace group, whose blocks have `shard_size` shards in `tiers` tiers, fastest first.

    Columns read by others: ``hashes`` (None for a row not in use), ``parents``, ``depths``, ``holds`` (leases and
    writers), ``pinned``.
    """

    def __init__(self, shard_size: int, tiers: int = 1) -> None:
        self.shard_size = shard_size
        self.complete: dict[bytes, int] = {}
        self.partial: dict[bytes, int] = {}
        self.hashes: list[bytes | None] = []
        self.parents = array("i")
        self.depths = array("i")
        self.holds = array("i")
        self.pinned = bytearray()
        self._first_child = array("i")
        self._next_sibling = array("i")
        self._previous_sibling = array("i")
        self._missing = array("H")
        self._slots = [[array("q") for _ in range(shard_size)] for _ in range(tiers)]
        self._generations = [[array("Q") for _ in range(shard_size)] for _ in range(tiers)]
        self._unused: list[int] = []

    def __len__(self) -> int:
        return len(self.complete) + len(self.partial)

    def walk(self, hashes: Sequence[bytes]) -> Sequence[int]:
        """Rows of the leading complete blocks, up to the first that is not; a range where they lie so.

        A chain stored in one go has rows one after the other, so its hashes are compared as runs of one column, in
        the order of memory. Only what does not lie so is looked up block by block, at three cache misses each.
        """
        run: range = range(0)
        rows: list[int] | None = None
        start, step = 0, _WALK_FIRST
        get = self.complete.get
        while start < len(hashes):
            part = list(hashes[start : start + step])
            found, whole = self._found(part, get(part[0], NO_ROW))
            if rows is None and isinstance(found, range) and (not run or found.start == run.stop):
                run = range(run.start if run else found.start, found.stop)
            else:
                rows = list(run) if rows is None else rows
                rows += found
            if not whole:
                break
            start, step = start + step, step * 4
        return run if rows is None else rows

    def _found(self, part: list[bytes], first: int) -> tuple[Sequence[int], bool]:
        """Rows of the leading complete blocks of `part`, whose first has row `first`; and whether that is all."""
        if first == NO_ROW:
            return (), False
        last = first + len(part)
        if self.hashes[first:last] == part:
            missing = self._missing[first:last].tobytes()
            if missing.count(0) == len(missing):
                return range(first, last), True
        found = list(map(self.complete.get, part))
        if None in found:
            return found[: found.index(None)], False  # type: ignore[return-value]
        return found, True  # type: ignore[return-value]

    def find(self, name: bytes) -> int:
        """The row of a block in any state, or NO_ROW."""
        row = self.complete.get(name)
        return self.partial.get(name, NO_ROW) if row is None else row

    def add(self, name: bytes, parent: int) -> int:
        """A new row without residence, child of `parent` (NO_ROW for a root)."""
        row = self._unused.pop() if self._unused else self._grow()
        self.hashes[row] = name
        self.partial[name] = row
        self.parents[row] = parent
        self.depths[row] = self.depths[parent] + 1 if parent >= 0 else 0
        self._missing[row] = self.shard_size
        if parent >= 0:
            self._link(row, parent)
        return row

    def slot(self, row: int, tier: int, rank: int) -> int:
        """Slot of a committed shard, or NO_SLOT."""
        slot = self._slots[tier][rank][row]
        return slot if slot >= 0 else NO_SLOT

    def slots(self, rows: Sequence[int], tier: int, rank: int) -> array[int]:
        """Slots of blocks that are resident in `tier`, in the order of `rows`."""
        return array("Q", map(self._slots[tier][rank].__getitem__, rows))

    def generations(self, rows: Sequence[int], tier: int, rank: int) -> array[int]:
        """Generations of the same slots, as they were when the blocks were written."""
        return array("Q", map(self._generations[tier][rank].__getitem__, rows))

    def reserved_slot(self, row: int, tier: int, rank: int) -> int:
        """Slot of a shard that is being written, or NO_SLOT."""
        slot = self._slots[tier][rank][row]
        return -2 - slot if slot <= -2 else NO_SLOT

    def count_by_tier(self, rows: Sequence[int]) -> list[int]:
        """How many of these complete blocks can be had whole from each tier or a faster one, slowest shard counting."""
        counts = [0] * len(self._slots)
        if len(counts) == 1:
            counts[0] = len(rows)
            return counts
        for row in rows:
            counts[max(self._fastest(row, rank) for rank in range(self.shard_size))] += 1
        return counts

    def reserve(self, row: int, tier: int, rank: int, slot: int, generation: int) -> None:
        """A writer has been given `slot` for this shard; the row is held until commit or abort."""
        self._slots[tier][rank][row] = -2 - slot
        self._generations[tier][rank][row] = generation
        self.holds[row] += 1

    def commit(self, row: int, tier: int, rank: int) -> bool:
        """The shard's reserved slot holds its bytes; True when the block has become complete by it."""
        slots = self._slots[tier][rank]
        was_missing = self._is_missing(row, rank)
        slots[row] = -2 - slots[row]
        self.holds[row] -= 1
        self._missing[row] -= was_missing
        if self._missing[row] or not was_missing:
            return False
        name = self._name(row)
        self.complete[name] = self.partial.pop(name)
        return True

    def abort(self, row: int, tier: int, rank: int) -> None:
        """The writer gave up; the row is forgotten if nothing is left of it."""
        self._slots[tier][rank][row] = NO_SLOT
        self.holds[row] -= 1
        self.forget_if_empty(row)

    def vacate(self, row: int, tier: int) -> list[tuple[int, int]]:
        """Drop every shard committed in `tier`; returns their (rank, slot). The row stays until `forget_if_empty`."""
        dropped = []
        for rank, slots in enumerate(self._slots[tier]):
            if slots[row] >= 0:
                dropped.append((rank, slots[row]))
                slots[row] = NO_SLOT
                self._missing[row] += self._is_missing(row, rank)
        name = self._name(row)
        if self._missing[row] and name in self.complete:
            self.partial[name] = self.complete.pop(name)
        return dropped

    def forget_if_empty(self, row: int) -> None:
        """Free the row if it has no residence, no writer and no child; then its parents, if they were tombstones."""
        while row >= 0 and self._is_empty(row):
            parent = self.parents[row]
            if parent >= 0:
                self._unlink(row, parent)
            del self.partial[self._name(row)]
            self.hashes[row] = None
            self.parents[row] = NO_ROW
            self.pinned[row] = 0
            self._unused.append(row)
            row = parent

    def is_resident(self, row: int) -> bool:
        """At least one shard is committed."""
        return self._missing[row] < self.shard_size

    def has_child(self, row: int) -> bool:
        return self._first_child[row] >= 0

    def children(self, row: int) -> Iterator[int]:
        child = self._first_child[row]
        while child >= 0:
            yield child
            child = self._next_sibling[child]

    def subtrees(self, roots: Iterable[int]) -> set[int]:
        """These rows and all that continues them; linear, though most roots may lie below one another."""
        known: set[int] = set()
        for root in roots:
            pending = [root]
            while pending:
                row = pending.pop()
                if row not in known:
                    known.add(row)
                    pending.extend(self.children(row))
        return known

    def rows(self) -> Iterator[int]:
        """All rows in use."""
        return (row for row, name in enumerate(self.hashes) if name is not None)

    def check(self) -> Iterator[str]:
        """Yield each violated invariant."""
        if self.complete.keys() & self.partial.keys():
            yield "a hash is both complete and partial"
        if sum(1 for _ in self.rows()) != len(self):
            yield "the columns and the dictionaries hold different numbers of blocks"
        for row in self.rows():
            yield from self._check_row(row)

    def _check_row(self, row: int) -> Iterator[str]:
        name = self._name(row)
        if self.find(name) != row:
            yield f"row {row} is not found under its hash"
        missing = sum(self._is_missing(row, rank) for rank in range(self.shard_size))
        if missing != self._missing[row] or (name in self.complete) != (missing == 0):
            yield f"row {row}: {missing} shards missing, column says {self._missing[row]}"
        if any(self.parents[child] != row for child in self.children(row)):
            yield f"row {row} has a child that names another parent"
        parent = self.parents[row]
        if parent >= 0 and (self.hashes[parent] is None or not self._is_linked(row, parent)):
            yield f"row {row} is not among the children of its parent"
        if self._is_empty(row):
            yield f"row {row} is kept without residence, writer or child"

    def _is_missing(self, row: int, rank: int) -> bool:
        for tier in self._slots:  # noqa: SIM110  # a generator costs more than the question
            if tier[rank][row] >= 0:
                return False
        return True

    def _fastest(self, row: int, rank: int) -> int:
        return next(level for level, tier in enumerate(self._slots) if tier[rank][row] >= 0)

    def _is_empty(self, row: int) -> bool:
        return not (self.is_resident(row) or self.holds[row] or self._first_child[row] >= 0)

    def _name(self, row: int) -> bytes:
        name = self.hashes[row]
        assert name is not None, f"row {row} is not in use"
        return name

    def _grow(self) -> int:
        self.hashes.append(None)
        for column in (self.parents, self._first_child, self._next_sibling, self._previous_sibling):
            column.append(NO_ROW)
        self.depths.append(0)
        self.holds.append(0)
        self.pinned.append(0)
        self._missing.append(0)
        for tier, generations_of_tier in zip(self._slots, self._generations, strict=True):
            for slots, generations in zip(tier, generations_of_tier, strict=True):
                slots.append(NO_SLOT)
                generations.append(0)
        return len(self.hashes) - 1

    def _link(self, row: int, parent: int) -> None:
        sibling = self._first_child[parent]
        self._next_sibling[row] = sibling
        self._previous_sibling[row] = NO_ROW
        if sibling >= 0:
            self._previous_sibling[sibling] = row
        self._first_child[parent] = row

    def _is_linked(self, row: int, parent: int) -> bool:
        """The row's own link of its parent's chain of children is whole; a walk would be quadratic in `check`."""
        before = self._previous_sibling[row]
        return (self._first_child[parent] if before < 0 else self._next_sibling[before]) == row

    def _unlink(self, row: int, parent: int) -> None:
        before, after = self._previous_sibling[row], self._next_sibling[row]
        if before >= 0:
            self._next_sibling[before] = after
        else:
            self._first_child[parent] = after
        if after >= 0:
            self._previous_sibling[after] = before
        self._next_sibling[row] = self._previous_sibling[row] = NO_ROW
