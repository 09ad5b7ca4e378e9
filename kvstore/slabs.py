"""Slabs and slots: which piece of a tier belongs to which namespace shard. Arithmetic only, no memory.

A tier is cut into equal physical slabs. A slab is assigned whole to one namespace shard, which cuts it into
slots of its own block size. Slabs assigned to a shard carry a serial that is never used again, so a client
that still maps a slab that was taken back can never mistake it for a newer one.

``slot id = serial * slots_per_slab + slot in slab``
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence

from forebay.kvstore.errors import LayoutError

SLOT_ALIGN_BYTES = 4096

FREE, RESERVED, QUARANTINED, RESIDENT = range(4)
_STATES = ("free", "reserved", "quarantined", "resident")

NO_ROW = -1


class TierSpace:
    """The physical slabs of one tier; those not assigned wait in `free`."""

    def __init__(self, name: str, capacity_bytes: int, slab_bytes: int) -> None:
        self.name = name
        self.slab_bytes = slab_bytes
        self.slabs_total = capacity_bytes // slab_bytes
        self.capacity_bytes = self.slabs_total * slab_bytes
        self._free = list(range(self.slabs_total - 1, -1, -1))

    @property
    def slabs_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A physical slab index, lowest first, or None when all are assigned."""
        return self._free.pop() if self._free else None

    def give_back(self, physical: int) -> None:
        self._free.append(physical)


class Slab:
    """One assigned slab: the state, the block row and the generation of each of its slots."""

    __slots__ = ("generations", "physical", "rows", "serial", "states")

    def __init__(self, serial: int, physical: int, slots: int) -> None:
        self.serial = serial
        self.physical = physical
        self.states = bytearray(slots)
        self.rows = array("i", [NO_ROW]) * slots
        self.generations = array("Q", [1]) * slots

    def count(self, state: int) -> int:
        return self.states.count(state)


class ShardSlots:
    """The slots of one namespace shard in one tier.

    Each slot is in exactly one state. A generation starts at 1 and is bumped when its slot stops holding a
    block or a half-written one, that is before the slot can be given to another.
    """

    def __init__(self, slab_bytes: int, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = -(-block_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES
        self.slots_per_slab = slab_bytes // self.slot_bytes
        if self.slots_per_slab == 0:
            raise LayoutError(f"a block of {block_bytes} bytes does not fit into a slab of {slab_bytes} bytes")
        self.slabs: dict[int, Slab] = {}
        self._free: list[int] = []
        self._next_serial = 0
        self._counts = [0, 0, 0, 0]

    def count(self, state: int) -> int:
        return self._counts[state]

    @property
    def slots_total(self) -> int:
        return len(self.slabs) * self.slots_per_slab

    def add_slab(self, physical: int) -> Slab:
        """Cut a physical slab into free slots; the lowest slot is handed out first."""
        slab = Slab(self._next_serial, physical, self.slots_per_slab)
        self._next_serial += 1
        self.slabs[slab.serial] = slab
        first = slab.serial * self.slots_per_slab
        self._free.extend(range(first + self.slots_per_slab - 1, first - 1, -1))
        self._counts[FREE] += self.slots_per_slab
        return slab

    def is_empty(self, slab: Slab) -> bool:
        return slab.count(FREE) == self.slots_per_slab

    def drop_slabs(self, slabs: Sequence[Slab]) -> None:
        """Forget slabs, all of whose slots are free. Together: each call walks the whole free list."""
        for slab in slabs:
            assert self.is_empty(slab), "a slab with slots in use was taken back"
            del self.slabs[slab.serial]
            self._counts[FREE] -= self.slots_per_slab
        dropped = {slab.serial for slab in slabs}
        self._free = [slot for slot in self._free if slot // self.slots_per_slab not in dropped]

    def has_free(self) -> bool:
        return bool(self._free)

    def reserve(self, row: int) -> tuple[int, int]:
        """Give a free slot to the block `row`; returns (slot id, generation)."""
        slot_id = self._free.pop()
        slab, slot = self._locate(slot_id)
        slab.states[slot] = RESERVED
        slab.rows[slot] = row
        self._counts[FREE] -= 1
        self._counts[RESERVED] += 1
        return slot_id, slab.generations[slot]

    def publish(self, slot_id: int) -> None:
        """A reserved slot now holds a committed block."""
        slab, slot = self._locate(slot_id)
        self._move(slab, slot, RESERVED, RESIDENT)

    def quarantine(self, slot_id: int) -> None:
        """A reserved slot whose writer is late: no block, but nobody else's either until the writer is done."""
        slab, slot = self._locate(slot_id)
        self._move(slab, slot, RESERVED, QUARANTINED)
        slab.rows[slot] = NO_ROW

    def free(self, slot_id: int) -> int:
        """Take a slot back from whatever held it; returns its new generation."""
        slab, slot = self._locate(slot_id)
        self._counts[slab.states[slot]] -= 1
        self._counts[FREE] += 1
        slab.states[slot] = FREE
        slab.rows[slot] = NO_ROW
        slab.generations[slot] += 1
        self._free.append(slot_id)
        return slab.generations[slot]

    def generation(self, slot_id: int) -> int:
        slab, slot = self._locate(slot_id)
        return slab.generations[slot]

    def check(self) -> Iterator[str]:
        """Yield each violated invariant."""
        counts = [sum(slab.count(state) for slab in self.slabs.values()) for state in range(4)]
        if counts != self._counts:
            yield f"slot counts {dict(zip(_STATES, self._counts, strict=True))} but the slabs hold {counts}"
        if sum(counts) != self.slots_total:
            yield f"{sum(counts)} slots in a state, {self.slots_total} slots in all"
        listed = set(self._free)
        if len(listed) != len(self._free) or len(listed) != counts[FREE]:
            yield f"{len(self._free)} slots in the free list, {len(listed)} distinct, {counts[FREE]} free"
        for slot_id in listed:
            slab = self.slabs.get(slot_id // self.slots_per_slab)
            if slab is None or slab.states[slot_id % self.slots_per_slab] != FREE:
                yield f"slot {slot_id} is in the free list but not free"

    def _locate(self, slot_id: int) -> tuple[Slab, int]:
        serial, slot = divmod(slot_id, self.slots_per_slab)
        return self.slabs[serial], slot

    def _move(self, slab: Slab, slot: int, old: int, new: int) -> None:
        assert slab.states[slot] == old, f"slot is {_STATES[slab.states[slot]]}, not {_STATES[old]}"
        slab.states[slot] = new
        self._counts[old] -= 1
        self._counts[new] += 1
