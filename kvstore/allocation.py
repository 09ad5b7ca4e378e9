"""Room for a block: a free slot, a free slab, a colder namespace's slab, or a victim, in that order.

Room is made when it is needed and only as much as is needed, so a tier runs full. Slabs follow demand: a
shard without room takes one from the namespace whose blocks have gone longest without being asked for, if
that is clearly longer than its own, and otherwise evicts its own coldest block.

Of several drives one may take no writes for now. It is barred: room is made on the others, and blocks on it leave only
as the coldest do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from forebay.kvstore.groups import (
    HOST,
    DriveSlabAssigned,
    DriveSlabRetired,
    Effects,
    Group,
    Room,
    Shard,
    SlabOpened,
    SlabRetired,
)
from forebay.kvstore.slabs import FREE, QUARANTINED, RESERVED, RESIDENT, Slab, TierSpace
from forebay.kvstore.stats import Counters

_SLABS_TRIED_MAX = 4
_DONOR_CHECK_S = 1.0


class Allocator:
    """Assigns one tier's slabs to shards and takes them back."""

    def __init__(self, tier: TierSpace, level: int, effects: Effects, counters: Counters, slab_idle_s: float) -> None:
        self.tier = tier
        self._level = level
        self._effects = effects
        self._counters = counters
        self._slab_idle_s = slab_idle_s

    def ensure(
        self, shard: Shard, groups: Iterable[Group], now: float, wanted: int = 1, newcomers: Sequence[bytes] = ()
    ) -> Room:
        """Make sure the shard has a free slot on a drive that is not barred; NONE when nothing may be evicted for it.

        Where its own blocks have to go, `wanted` of them go together if they may: a chain's slots then come back as
        they lay, one after the other, and the next chain's copy is one run. With the hashes of those `newcomers`, which
        need not be stored, fewer may go, and the answer may be DECLINED.
        """
        if shard.spaces[self._level].has_free(self.tier.barred) or self._assign(shard):
            return Room.MADE
        donors = None
        if now >= shard.donor_check_s[self._level]:
            donors = self._coldest_first(groups, shard.group)
            if self._take_empty(donors) or self._look_around(shard, donors, now):
                return Room(self._assign(shard))
        made = self._evict_own(shard, wanted, newcomers)
        if made != Room.NONE:
            return made
        donors = self._coldest_first(groups, shard.group) if donors is None else donors
        taken = self._balance(shard) or any(self._take(d.shards.values()) for d in donors)
        return Room(taken and self._assign(shard))

    def retire(self, shard: Shard, slabs: Sequence[Slab]) -> None:
        """Take empty slabs back from their shard."""
        shard.spaces[self._level].drop_slabs(slabs)
        self._give_back(shard, slabs)

    def retire_all(self, shard: Shard) -> None:
        """Take all slabs of a shard back, with whatever is in them; a block costs nothing."""
        self._give_back(shard, shard.spaces[self._level].drop_all())

    def _give_back(self, shard: Shard, slabs: Sequence[Slab]) -> None:
        for slab in slabs:
            if self._level == HOST:
                self.tier.give_back(slab.physical)
                self._effects.slabs.append(SlabRetired(shard.ns, slab.serial, slab.physical))
            else:
                self.tier.give_back(slab.physical, max(slab.generations) + 1)
                self._effects.drive_slabs.append(DriveSlabRetired(slab.physical))
            self._counters.slabs_retired += 1

    def retire_empty(self, group: Group) -> None:
        """Take back every slab of the group that holds nothing."""
        for shard in group.shards.values():
            space = shard.spaces[self._level]
            self.retire(shard, [slab for slab in space.slabs.values() if space.is_empty(slab)])

    def _assign(self, shard: Shard) -> bool:
        physical = self.tier.take()
        if physical is None:
            return False
        generation = self.tier.first_generation
        space = shard.spaces[self._level]
        slab = space.add_slab(physical, generation)
        if self._level == HOST:
            self._effects.slabs.append(SlabOpened(shard.ns, slab.serial, physical, space.slots_per_slab))
        else:
            self._effects.drive_slabs.append(DriveSlabAssigned(shard, physical, generation))
        self._counters.slabs_assigned += 1
        return True

    def _take_empty(self, donors: Iterable[Group]) -> bool:
        """Retire a slab that holds nothing, whoever has it: that costs nobody a block."""
        for shard in (shard for donor in donors for shard in donor.shards.values()):
            space = shard.spaces[self._level]
            if space.count(FREE) < space.slots_per_slab:
                continue
            for slab in space.slabs.values():
                if space.is_empty(slab) and self.tier.is_open(slab.physical):
                    self.retire(shard, [slab])
                    return True
        return False

    def _look_around(self, shard: Shard, donors: Sequence[Group], now: float) -> bool:
        """Now and then: is a sibling rank richer, or another namespace clearly colder?"""
        shard.donor_check_s[self._level] = now + _DONOR_CHECK_S
        if self._balance(shard, _SLABS_TRIED_MAX):
            return True
        if not donors or not self._is_colder(donors[0], shard.group):
            return False
        return self._take(donors[0].shards.values(), _SLABS_TRIED_MAX)

    def _evict_own(self, shard: Shard, wanted: int, newcomers: Sequence[bytes]) -> Room:
        space, barred = shard.spaces[self._level], self.tier.barred
        # What lies on a barred drive gives no room: of it no more goes than what would be its share.
        tries = (wanted - space.free_beside(barred)) * self.tier.form.drives if barred else float("inf")
        made = Room.NONE
        while (free := space.free_beside(barred)) < wanted and tries > 0:
            tries -= 1
            # A shard that holds no block gains nothing from a victim: its sibling ranks' slots are not its own.
            if not space.count(RESIDENT):
                break
            made = shard.group.evict_one(self._level, newcomers[free] if newcomers else None)
            if made != Room.MADE:
                break
        if space.has_free(barred):
            return Room.MADE
        return Room.DECLINED if made == Room.DECLINED else Room.NONE

    def _balance(self, shard: Shard, slabs_tried_max: int | None = None) -> bool:
        """Take a slab from the rank that has most, if it has two more: a block needs all its ranks."""
        richest = max(shard.group.shards.values(), key=lambda s: len(s.spaces[self._level].slabs))
        if len(richest.spaces[self._level].slabs) < len(shard.spaces[self._level].slabs) + 2:
            return False
        return self._take([richest], slabs_tried_max)

    def _is_colder(self, donor: Group, taker: Group) -> bool:
        own, other = taker.policies[self._level].oldest_touch(), donor.policies[self._level].oldest_touch()
        return own is None or other is None or other + self._slab_idle_s < own

    def _take(self, shards: Iterable[Shard], slabs_tried_max: int | None = None) -> bool:
        """Empty and retire one slab of one group's shards; False when each one tried is in use."""
        for shard, slab in self._fullest_last(shards)[:slabs_tried_max]:
            doomed = self._doomed(shard.group, slab)
            if doomed is None:
                continue
            leaving, lost = doomed
            for row in leaving:
                shard.group.evict(row, self._level)
            for row in lost:
                shard.group.lose(row)
            self.retire(shard, [slab])
            return True
        return False

    def _coldest_first(self, groups: Iterable[Group], but: Group) -> list[Group]:
        """The groups that could give a slab, longest untouched first; one that holds nothing comes before all."""
        level = self._level
        donors = [g for g in groups if g is not but and any(s.spaces[level].slabs for s in g.shards.values())]
        return sorted(donors, key=lambda g: g.policies[level].oldest_touch() or float("-inf"))

    def _fullest_last(self, shards: Iterable[Shard]) -> list[tuple[Shard, Slab]]:
        """The fewest blocks lost first."""
        slabs = [
            (shard, slab)
            for shard in shards
            for slab in shard.spaces[self._level].slabs.values()
            if self.tier.is_open(slab.physical)
        ]
        slabs.sort(key=lambda item: -item[1].count(FREE))
        return slabs

    def _doomed(self, group: Group, slab: Slab) -> tuple[list[int], list[int]] | None:
        """What it takes to empty the slab: rows that leave it for another tier, and rows that are lost, children first.

        None if one of them may not go.
        """
        if slab.count(RESERVED) or slab.count(QUARANTINED):
            return None
        index = group.index
        rows = [row for row in slab.rows if row >= 0]
        if any(index.holds[row] or index.pinned[row] for row in rows):
            return None
        lost = index.subtrees(row for row in rows if not group.stays_without(row, self._level))
        if any(index.holds[row] or index.pinned[row] for row in lost):
            return None
        ordered = sorted(filter(index.is_resident, lost), key=lambda row: -index.depths[row])
        return [row for row in rows if row not in lost], ordered
