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

FoundShard = tuple[bytes, bytes, int, int]
"""(hash, parent hash or empty, depth, slot) of a shard on disk."""

DEPTH_MAX = (1 << 31) - 1
"""What a column of depths holds."""

_WALK_FIRST = 64


class BlockIndex:
    """Rows of one namespace group, whose blocks have `shard_size` shards in `tiers` tiers, fastest first.

    Columns read by others: ``hashes`` (None for a row not in use), ``parents``, ``depths``, ``holds`` (leases and
    writers), ``pinned``, ``priorities`` (0 but where a store of what is in the fastest tier gave another).
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
        self.priorities = bytearray()
        self._first_child = array("i")
        self._next_sibling = array("i")
        self._previous_sibling = array("i")
        self._missing = array("B" if shard_size < 256 else "H")
        self._slots = [[array("q") for _ in range(shard_size)] for _ in range(tiers)]
        self._generations = [array("Q") for _ in range(shard_size)]  # of the fastest tier: nobody compares others'
        self._unused: list[int] = []
        self.doubled = 0
        """Shards of blocks that lie in two tiers."""
        self.loose: list[int] = []
        """Rows that `adopt` made for parents it had not seen; some may have been found, or reused, since."""

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

    def deepest(self, hashes: Sequence[bytes]) -> int:
        """The row of the last of these blocks that has one, in any state, or NO_ROW."""
        return next((row for name in reversed(hashes) if (row := self.find(name)) != NO_ROW), NO_ROW)

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

    def adopt(self, name: bytes, parent: bytes, depth: int) -> int:
        """The row of a block found on disk, whose parent (empty for a root) may not have been found yet or ever.

        A parent not known becomes a tombstone. Returns NO_ROW for a block that contradicts what is known: no chain of
        prefix hashes has two parents, or a parent as deep as itself.
        """
        if bool(parent) != (depth > 0) or depth > DEPTH_MAX or name == parent:
            return NO_ROW
        above = self.find(parent) if parent else NO_ROW
        row = self.find(name)
        if parent and above == NO_ROW:
            if row != NO_ROW and (self.parents[row] != NO_ROW or self.depths[row] != depth):
                return NO_ROW
            above = self.add(parent, NO_ROW)
            self.depths[above] = depth - 1
            self.loose.append(above)
        elif parent and self.depths[above] != depth - 1:
            return NO_ROW
        if row == NO_ROW:
            return self.add(name, above)
        self.attach(row, above)
        return row if self.parents[row] == above and self.depths[row] == depth else NO_ROW

    def attach(self, row: int, parent: int) -> None:
        """Link a row that `adopt` made before its parent was known, now that it is."""
        if self.parents[row] == NO_ROW and parent >= 0 and self.depths[row] == self.depths[parent] + 1:
            self.parents[row] = parent
            self._link(row, parent)

    def adopt_all(self, found: Iterable[FoundShard], tier: int, rank: int) -> tuple[list[int], list[int]]:
        """Take in shards that an earlier life of the daemon had put in these slots of a slower tier.

        Returns the row of each, NO_ROW for what is not taken in; and those rows of which the tier had no part before.
        Most blocks come right after their parents and are new: those are appended column by column, at a third of the
        cost.
        """
        rows: list[int] = []
        fresh: list[int] = []
        complete, partial, hashes, depths = self.complete, self.partial, self.hashes, self.depths
        add_name, add_parent, add_depth = hashes.append, self.parents.append, depths.append
        row_of, enter = complete.get, complete.setdefault
        add_row, add_fresh = rows.append, fresh.append
        appended = array("q")
        add_slot = appended.append
        may_append = self.shard_size == 1 and not self._unused
        row, last = len(hashes), b""
        for name, parent, depth, slot in found:
            above = row - 1 if parent == last and last else row_of(parent, NO_ROW)
            if (
                may_append
                and (depths[above] + 1 == depth if above >= 0 else not parent and not depth)
                and name not in partial
                and enter(name, row) == row
            ):
                add_name(name)
                add_parent(above)
                add_depth(depth)
                add_slot(slot)
                add_fresh(row)
                add_row(row)
                row += 1
                last = name
            else:
                self._extend(appended, tier)
                other = self.adopt(name, parent, depth)
                if other != NO_ROW and not self._settle(other, tier, rank, slot, fresh):
                    other = NO_ROW
                add_row(other)
                row, last = len(hashes), b""
        self._extend(appended, tier)
        return rows, fresh

    def _extend(self, slots: array[int], tier: int) -> None:
        """Bring the other columns up to complete blocks of one shard, whose names, parents and depths were appended."""
        count = len(slots)
        if not count:
            return
        first = len(self.holds)
        self._extend_columns(count)
        self._slots[tier][0][first:] = slots
        parents, first_child = self.parents, self._first_child
        for row in range(first, first + count):
            parent = parents[row]
            if parent < 0:
                continue
            if first_child[parent] >= 0:
                self._link(row, parent)
            else:
                first_child[parent] = row
        del slots[:]

    def _settle(self, row: int, tier: int, rank: int, slot: int, fresh: list[int]) -> bool:
        """The shard lies in this slot; False where it is known to lie, or to be on its way to, another."""
        slots = self._slots[tier][rank]
        if slots[row] != NO_SLOT:
            return False
        if not self.is_in(row, tier):
            fresh.append(row)
        was_missing = self._is_missing(row, rank)
        slots[row] = slot
        self.holds[row] += 1  # as a writer's, which ends here
        self._found_shard(row, was_missing)
        return True

    def slot(self, row: int, tier: int, rank: int) -> int:
        """Slot of a committed shard, or NO_SLOT."""
        slot = self._slots[tier][rank][row]
        return slot if slot >= 0 else NO_SLOT

    def slots(self, rows: Sequence[int], tier: int, rank: int) -> array[int]:
        """Slots of blocks that are resident in `tier` or being brought there, in the order of `rows`."""
        found = list(map(self._slots[tier][rank].__getitem__, rows))
        if found and min(found) < 0:
            found = [slot if slot >= 0 else -2 - slot for slot in found]
        return array("Q", found)

    def generations(self, rows: Sequence[int], rank: int) -> array[int]:
        """Generations of their slots in the fastest tier, as they were when the slots were given."""
        return array("Q", map(self._generations[rank].__getitem__, rows))

    def reserved_slot(self, row: int, tier: int, rank: int) -> int:
        """Slot of a shard that is being written, or NO_SLOT."""
        slot = self._slots[tier][rank][row]
        return -2 - slot if slot <= -2 else NO_SLOT

    def count_by_tier(self, rows: Sequence[int]) -> list[int]:
        """How many of these complete blocks can be had whole from each tier or a faster one, slowest shard counting."""
        counts = [0] * len(self._slots)
        if len(counts) == 1 or not rows:
            counts[0] = len(rows)
            return counts
        if self.shard_size == 1:
            fastest = self._slots[0][0]
            slots = fastest[rows.start : rows.stop] if isinstance(rows, range) else [fastest[row] for row in rows]
            counts[0] = len(rows) if min(slots) >= 0 else sum(map(NO_SLOT.__lt__, slots))
            counts[1] = len(rows) - counts[0]
            return counts
        for row in rows:
            counts[max(self._fastest(row, rank) for rank in range(self.shard_size))] += 1
        return counts

    def reserve(self, row: int, tier: int, rank: int, slot: int, generation: int) -> None:
        """A writer has been given `slot` for this shard; the row is held until commit or abort."""
        self._slots[tier][rank][row] = -2 - slot
        if tier == 0:
            self._generations[rank][row] = generation
        self.holds[row] += 1

    def commit(self, row: int, tier: int, rank: int) -> bool:
        """The shard's reserved slot holds its bytes; True when the block has become complete by it."""
        slots = self._slots[tier][rank]
        was_missing = self._is_missing(row, rank)
        slots[row] = -2 - slots[row]
        return self._found_shard(row, was_missing)

    def _found_shard(self, row: int, was_missing: bool) -> bool:
        """A writer's shard has come to be there; True when the block has become complete by it."""
        self.holds[row] -= 1
        self._missing[row] -= was_missing
        if not was_missing:
            self.doubled += 1
            return False
        if self._missing[row]:
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
                missing = self._is_missing(row, rank)
                self._missing[row] += missing
                self.doubled -= not missing
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
            self.priorities[row] = 0
            self._unused.append(row)
            row = parent

    def resident_count(self) -> int:
        """Blocks of which at least one shard is committed, by the columns alone."""
        return len(self._missing) - self._missing.count(self.shard_size)

    def is_resident(self, row: int) -> bool:
        """At least one shard is committed."""
        return self._missing[row] < self.shard_size

    def is_in(self, row: int, tier: int) -> bool:
        """At least one shard is committed in this tier."""
        for slots in self._slots[tier]:  # noqa: SIM110  # a generator costs more than the question
            if slots[row] >= 0:
                return True
        return False

    def is_whole_in(self, row: int, tier: int) -> bool:
        """Every shard is committed in this tier."""
        for slots in self._slots[tier]:  # noqa: SIM110  # as above
            if slots[row] < 0:
                return False
        return True

    def is_coming_to(self, row: int, tier: int) -> bool:
        """A shard is being written to this tier."""
        return any(slots[row] < NO_SLOT for slots in self._slots[tier])

    def has_child(self, row: int) -> bool:
        return self._first_child[row] >= 0

    def children(self, row: int) -> Iterator[int]:
        child = self._first_child[row]
        while child >= 0:
            yield child
            child = self._next_sibling[child]

    def child_after(self, row: int, child: int) -> int:
        """The child of a row that comes after this one, the first after NO_ROW; NO_ROW where there is none.

        A new child comes before all others.
        """
        return self._first_child[row] if child == NO_ROW else self._next_sibling[child]

    def own_tail(self, row: int, first: int) -> list[int]:
        """The rows that lead to this one and to no other, the deepest first, down from the block `first` of the prompt.

        None where something continues the row itself.
        """
        tail: list[int] = []
        if row < 0 or self._first_child[row] >= 0:
            return tail
        parents, depths, after, before = self.parents, self.depths, self._next_sibling, self._previous_sibling
        while row >= 0 and depths[row] >= first:
            tail.append(row)
            if after[row] >= 0 or before[row] >= 0:
                break
            row = parents[row]
        return tail

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

    def topmost(self, rows: set[int]) -> list[int]:
        """Those of these rows that continue no other of them; linear in what leads to them."""
        known: dict[int, bool] = {}
        top = []
        for row in rows:
            way: list[int] = []
            above = self.parents[row]
            while above >= 0 and above not in rows and above not in known:
                way.append(above)
                above = self.parents[above]
            continues = above in rows or known.get(above, False)
            known.update(dict.fromkeys(way, continues))
            if not continues:
                top.append(row)
        return top

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
        self.parents.append(NO_ROW)
        self.depths.append(0)
        for column in (self._first_child, self._next_sibling, self._previous_sibling):
            column.append(NO_ROW)
        self.holds.append(0)
        self.pinned.append(0)
        self.priorities.append(0)
        self._missing.append(0)
        for tier in self._slots:
            for slots in tier:
                slots.append(NO_SLOT)
        for generations in self._generations:
            generations.append(0)
        return len(self.hashes) - 1

    def _extend_columns(self, count: int) -> None:
        """As `_grow`, for many rows, but for their names, parents and depths."""
        nothing = array("i", [NO_ROW]) * count
        for column in (self._first_child, self._next_sibling, self._previous_sibling):
            column.extend(nothing)
        self.holds.frombytes(bytes(count * self.holds.itemsize))
        self.pinned.extend(bytes(count))
        self.priorities.extend(bytes(count))
        self._missing.frombytes(bytes(count * self._missing.itemsize))
        nowhere = array("q", [NO_SLOT]) * count
        for tier in self._slots:
            for slots in tier:
                slots.extend(nowhere)
        for generations in self._generations:
            generations.frombytes(bytes(count * generations.itemsize))

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
