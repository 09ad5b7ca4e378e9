"""What an earlier life of the daemon left on the nvme tier, taken into the index as it is found.

Blocks come in any order, in batches, while the daemon serves: what was found is visible at once. A block on disk names
its parent and depth, so its place in the tree is known before its parent is (`BlockIndex.adopt`). Whatever contradicts
what is known, or was stored again meanwhile, is dropped: a cache may lose, and nothing on disk is trusted further than
the checks that every load makes anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Protocol

from forebay.kvstore.errors import Corrupt, ForebayError
from forebay.kvstore.groups import NVME, DriveSlabRetired, Effects, Group, Shard
from forebay.kvstore.index import NO_ROW, BlockIndex, FoundShard
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.slabs import QUARANTINED, RESERVED, Slab, TierSpace, slot_bytes_of
from forebay.kvstore.stats import Counters

FoundBlock = tuple[int, int, bytes, bytes, int, int]
"""(physical slab, slot, hash, parent hash or empty, depth, generation)."""


_AT_ONCE_ROWS = 1000

_Unreachable = tuple[int, bytes, int, bytes]
"""Row and hash of a block that nobody can reach, and those of its first ancestor, which was not found."""


class Owner(Protocol):
    """Whose a slab was, as its header says. The spec itself is not on disk: it holds a secret."""

    @property
    def uid(self) -> int: ...
    @property
    def group_fingerprint(self) -> bytes: ...
    @property
    def rank(self) -> int: ...
    @property
    def shard_size(self) -> int: ...
    @property
    def block_bytes(self) -> int: ...
    @property
    def slot_bytes(self) -> int: ...
    @property
    def hash_bytes(self) -> int: ...
    @property
    def block_tokens(self) -> int: ...
    @property
    def model(self) -> str: ...


def unopened_spec(owner: Owner) -> NamespaceSpec:
    """What is known of a namespace that nobody has opened in this life: enough to account for it, not to open it."""
    spec = NamespaceSpec(
        model=owner.model or "unknown",
        revision="",
        dtype="unknown",
        block_tokens=owner.block_tokens,
        segment_bytes=(owner.block_bytes,),
        shard_rank=owner.rank,
        shard_size=owner.shard_size,
        hash_bytes=owner.hash_bytes,
    )
    spec.validate()
    return spec


class Restoration:
    """Feeds the index from disk, once a start.

    Args:
        shard_of: the shard of (uid, group fingerprint), made of the spec when it is new; raises ForebayError.
    """

    def __init__(
        self,
        tier: TierSpace,
        effects: Effects,
        counters: Counters,
        shard_of: Callable[[int, bytes, NamespaceSpec], Shard],
    ) -> None:
        self._tier = tier
        self._effects = effects
        self._counters = counters
        self._shard_of = shard_of
        self._slabs: dict[int, tuple[Shard, Slab]] = {}
        self._below: dict[Group, list[_Unreachable]] = {}
        self._doomed: dict[Group, list[_Unreachable]] = {}
        self.warnings: tuple[str, ...] = ()
        """What was given up at the start, in sentences for an operator: one for each kind of reason."""

    def slabs(self, found: Iterable[tuple[int, Owner, int]]) -> None:
        """All slabs in use: (physical slab, owner, first generation). Those nobody can own here are free.

        A slot of the drive is the same whatever the host's slabs are. But a block that fits into none of them, because
        those were larger in the life that wrote it, could never be read: its slab is given up, and that is said.
        """
        given_up: dict[type[ForebayError], tuple[int, str]] = {}
        for physical, owner, _ in found:
            try:
                shard = self._owner_of(owner)
            except ForebayError as error:
                self._effects.drive_slabs.append(DriveSlabRetired(physical))
                count, reason = given_up.get(type(error), (0, str(error)))
                given_up[type(error)] = count + 1, reason
                continue
            if self._tier.claim(physical):
                self._slabs[physical] = (shard, shard.spaces[NVME].adopt_slab(physical, self._tier.first_generation))
        self.warnings = tuple(
            f"{count} slabs of the nvme tier were given up at the start with all blocks in them: {reason}"
            for count, reason in given_up.values()
        )
        self._effects.warnings += self.warnings

    def _owner_of(self, owner: Owner) -> Shard:
        """Raises ForebayError: why it can have no slab here."""
        if owner.slot_bytes != slot_bytes_of(owner.block_bytes):
            raise Corrupt(f"slots of {owner.slot_bytes} bytes for blocks of {owner.block_bytes}")
        shard = self._shard_of(owner.uid, owner.group_fingerprint, unopened_spec(owner))
        if shard.spaces[NVME].block_bytes != owner.block_bytes:
            raise Corrupt(f"blocks of {owner.block_bytes} bytes in a namespace of {shard.spaces[NVME].block_bytes}")
        return shard

    def blocks(self, found: Sequence[FoundBlock], now: float) -> None:
        """Blocks found in those slabs."""
        parts: dict[Shard, _Part] = {}
        for physical, of_slab in groupby(found, key=itemgetter(0)):
            known = self._slabs.get(physical)
            if known is None:
                continue
            shard, slab = known
            part = parts.get(shard)
            if part is None:
                part = parts[shard] = _Part(shard)
            self._mark(part, slab, of_slab)
        for part in parts.values():
            self._take_in(part, now)

    def _mark(self, part: _Part, slab: Slab, found: Iterable[FoundBlock]) -> None:
        """Note which slots of one slab hold blocks that may be taken in. Runs once a block: hence the local names."""
        states, slots, width, first = slab.states, part.slots, part.width, slab.serial * part.slots
        add_place, add_block = part.places.append, part.blocks.append
        for _, slot, name, parent, depth, generation in found:
            if slot < slots and len(name) == width and (not parent or len(parent) == width):
                if states[slot] == QUARANTINED:  # else it was told twice: the first stays
                    states[slot] = RESERVED
                    add_place((slab, slot, generation))
                    add_block((name, parent, depth, first + slot))
            else:
                self._drop(slab.physical, slot)

    def _take_in(self, part: _Part, now: float) -> None:
        shard, group = part.shard, part.shard.group
        rows, fresh = group.index.adopt_all(part.blocks, NVME, shard.rank)
        shard.spaces[NVME].adopt(part.places, rows)
        group.policies[NVME].insert(fresh, now)
        self._counters.restored_blocks += len(fresh)
        for (slab, slot, _), row in zip(part.places, rows, strict=True) if NO_ROW in rows else ():
            if row == NO_ROW:
                self._drop(slab.physical, slot)

    def _drop(self, physical: int, slot: int) -> None:
        self._effects.forgotten.append((physical, slot))
        self._counters.restored_dropped_blocks += 1

    def done(self) -> None:
        """Nothing more comes: slots in which no block was found are free, and blocks nobody can reach are dropped.

        With one of two drives gone those are millions, so `go_on` drops them bit by bit.
        """
        for shard, slab in self._slabs.values():
            shard.spaces[NVME].settle(slab)
        for group in {shard.group: None for shard, _ in self._slabs.values()}:
            self._look_below_loose(group)
        self._slabs.clear()
        self.go_on(_AT_ONCE_ROWS)

    def abandon(self, group: Group) -> None:
        """Nothing more of a namespace is taken in; its slots in which no block was found stay quarantined."""
        self.forget(group)
        self._look_below_loose(group)
        self.go_on(_AT_ONCE_ROWS)

    def take_no_more(self, group: Group) -> None:
        """What is still found of a namespace is not taken in; `abandon` is to follow."""
        self._slabs = {physical: found for physical, found in self._slabs.items() if found[0].group is not group}

    def forget(self, group: Group) -> None:
        """The namespace is no more."""
        self.take_no_more(group)
        self._below.pop(group, None)
        self._doomed.pop(group, None)

    def go_on(self, rows: int) -> None:
        """Look at, or drop, so many of the blocks that nobody can reach."""
        while rows > 0 and (self._below or self._doomed):
            found, act = (self._below, self._look_below) if self._below else (self._doomed, self._drop_unreachable)
            group, pending = next(iter(found.items()))
            while pending and rows > 0:
                rows -= 1
                act(group, pending.pop())
            if not pending:
                del found[group]

    def _look_below_loose(self, group: Group) -> None:
        index = group.index
        loose = [(row, name) for row in index.loose if (name := index.hashes[row]) is not None]
        self._below.setdefault(group, []).extend((row, name, row, name) for row, name in loose)
        index.loose.clear()

    def _look_below(self, group: Group, found: _Unreachable) -> None:
        row, _, top, top_name = found
        if not _is_unreachable(group.index, found):
            return
        self._doomed.setdefault(group, []).append(found)
        names = group.index.hashes
        self._below[group] += [(each, names[each] or b"", top, top_name) for each in group.index.children(row)]

    def _drop_unreachable(self, group: Group, found: _Unreachable) -> None:
        """Children come before their parents."""
        if _is_unreachable(group.index, found) and group.removable(found[0]):
            group.drop(found[0])
            self._counters.restored_dropped_blocks += 1


class _Part:
    """What was found of one shard."""

    __slots__ = ("blocks", "places", "shard", "slots", "width")

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.slots = shard.spaces[NVME].slots_per_slab
        self.width = shard.group.spec.hash_bytes
        self.blocks: list[FoundShard] = []
        self.places: list[tuple[Slab, int, int]] = []


def _is_unreachable(index: BlockIndex, found: _Unreachable) -> bool:
    """Its first ancestor was neither found nor stored meanwhile, so that it can never be asked for.

    Time may have passed since it was noted: both rows may be those of other blocks by now.
    """
    row, name, top, top_name = found
    if index.hashes[row] is not name or index.hashes[top] is not top_name:
        return False
    return index.parents[top] == NO_ROW and index.depths[top] > 0 and not (index.is_resident(top) or index.holds[top])
