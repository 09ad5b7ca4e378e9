"""Slabs and slots: which piece of a tier belongs to which namespace shard. Arithmetic only, no memory.

A tier is cut into equal physical slabs. A slab is assigned whole to one namespace shard, which cuts it into
slots of its own block size. Slabs assigned to a shard carry a serial that is never used again, so a client
that still maps a slab that was taken back can never mistake it for a newer one.

``slot id = serial * slots_per_slab + slot in slab``
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

SLOT_ALIGN_BYTES = 4096

FREE, RESERVED, QUARANTINED, RESIDENT = range(4)
_STATES = ("free", "reserved", "quarantined", "resident")

NO_ROW = -1


def slot_bytes_of(block_bytes: int) -> int:
    """A block rounded up to whole pages."""
    return -(-block_bytes // SLOT_ALIGN_BYTES) * SLOT_ALIGN_BYTES


@dataclass(frozen=True, slots=True)
class SlabFormat:
    """How a tier's slabs are cut: a header in front of the slab and of each slot, both of which may be empty.

    With `checksums` the payload checksum of each slot's block is kept beside it, where it is known. Physical slab s
    lies on drive s mod `drives`.
    """

    slab_bytes: int
    slab_header_bytes: int = 0
    slot_header_bytes: int = 0
    checksums: bool = False
    drives: int = 1

    def slots_per_slab(self, slot_bytes: int) -> int:
        return (self.slab_bytes - self.slab_header_bytes) // (self.slot_header_bytes + slot_bytes)


class TierSpace:
    """The physical slabs of one tier; those not assigned wait in `free`."""

    def __init__(self, name: str, capacity_bytes: int, form: SlabFormat) -> None:
        self.name = name
        self.form = form
        self.slab_bytes = slab_bytes = form.slab_bytes
        self.first_generation = 1
        self.slabs_total = capacity_bytes // slab_bytes
        self.capacity_bytes = self.slabs_total * slab_bytes
        self.barred: frozenset[int] = frozenset()
        """Drives whose slabs are not to be given for now, because writes to them fail."""
        self._free = dict.fromkeys(range(self.slabs_total - 1, -1, -1))  # a stack from which any may be taken

    @property
    def slabs_free(self) -> int:
        return len(self._free)

    def take(self) -> int | None:
        """A physical slab index, lowest first, or None when all are assigned or barred."""
        physical = next((slab for slab in reversed(self._free) if self.is_open(slab)), None)
        if physical is not None:
            del self._free[physical]
        return physical

    def is_open(self, physical: int) -> bool:
        """Whether the slab's drive is not barred."""
        return not self.barred or physical % self.form.drives not in self.barred

    def claim(self, physical: int) -> bool:
        """Take this very slab; False when there is no such slab or it is assigned."""
        if physical not in self._free:
            return False
        del self._free[physical]
        return True

    def give_back(self, physical: int, generation: int = 0) -> None:
        """`generation`: one its slots never had, for a tier whose slabs keep their bytes when they change hands."""
        self._free[physical] = None
        self.first_generation = max(self.first_generation, generation)


class Slab:
    """One assigned slab: the state, the block row and the generation of each of its slots.

    `checksums` are 0 where not known, and empty in a tier that keeps none. No slot is given a generation below
    `generation_min`.
    """

    __slots__ = ("checksums", "generation_min", "generations", "physical", "rows", "serial", "states")

    def __init__(self, serial: int, physical: int, slots: int, generation: int, *, checksums: bool) -> None:
        self.serial = serial
        self.physical = physical
        self.generation_min = generation
        self.states = bytearray(slots)
        self.rows = array("i", [NO_ROW]) * slots
        self.generations = array("Q", [generation]) * slots
        self.checksums = array("Q", bytes(8 * slots if checksums else 0))

    def count(self, state: int) -> int:
        return self.states.count(state)


class ShardSlots:
    """The slots of one namespace shard in one tier.

    Each slot is in exactly one state. A generation starts at its slab's first and is bumped when its slot stops
    holding a block or a half-written one, that is before the slot can be given to another.

    Free slots lie by drive. Slots of one drive are given until it has none: neighbours are written in one call.
    """

    def __init__(self, form: SlabFormat, block_bytes: int) -> None:
        self.block_bytes = block_bytes
        self.slot_bytes = slot_bytes_of(block_bytes)
        self.slots_per_slab = form.slots_per_slab(self.slot_bytes)
        """0 where a block does not fit into a slab: such a shard has no slab here."""
        self.slabs: dict[int, Slab] = {}
        self.knows_checksums = False
        self._form = form
        self._free: list[deque[int]] = [deque() for _ in range(form.drives)]  # given from the right
        self._drive = 0
        """The drive whose slots are being given."""
        self._next_serial = 0
        self._counts = [0, 0, 0, 0]

    def count(self, state: int) -> int:
        return self._counts[state]

    @property
    def slots_total(self) -> int:
        return len(self.slabs) * self.slots_per_slab

    def add_slab(self, physical: int, generation: int = 1) -> Slab:
        """Cut a physical slab into free slots; the lowest slot is handed out first."""
        slab = self._new_slab(physical, generation)
        first = slab.serial * self.slots_per_slab
        self._free_on(slab).extend(range(first + self.slots_per_slab - 1, first - 1, -1))
        self._counts[FREE] += self.slots_per_slab
        return slab

    def adopt_slab(self, physical: int, generation: int) -> Slab:
        """A slab of an earlier life: its slots are quarantined until `adopt` finds their blocks or `settle` ends it.

        `generation` is one of this life: an old image of a slot must never pass for what is written there from now on.
        """
        slab = self._new_slab(physical, generation)
        slab.states = bytearray([QUARANTINED]) * self.slots_per_slab
        self._counts[QUARANTINED] += self.slots_per_slab
        return slab

    def adopt(self, places: Sequence[tuple[Slab, int, int]], rows: Sequence[int]) -> None:
        """Slots (slab, slot, generation), marked as found, turn out to hold these blocks; NO_ROW: what is not kept."""
        adopted = 0
        for (slab, slot, generation), row in zip(places, rows, strict=True):
            if row == NO_ROW:
                slab.states[slot] = QUARANTINED
                continue
            slab.states[slot] = RESIDENT
            slab.rows[slot] = row
            slab.generations[slot] = generation
            adopted += 1
        self._counts[QUARANTINED] -= adopted
        self._counts[RESIDENT] += adopted

    def settle(self, slab: Slab) -> None:
        """Nothing more will be found in an adopted slab: its quarantined slots are free."""
        for slot_id in reversed(list(self._in_state(slab, QUARANTINED))):
            self.free(slot_id)

    def quarantined(self) -> Iterator[int]:
        """Slots that are nobody's for now."""
        some = (slab for slab in self.slabs.values() if slab.count(QUARANTINED))
        return (slot_id for slab in some for slot_id in self._in_state(slab, QUARANTINED))

    def _in_state(self, slab: Slab, state: int) -> Iterator[int]:
        first = slab.serial * self.slots_per_slab
        return (first + slot for slot, found in enumerate(slab.states) if found == state)

    def place(self, slot_id: int) -> tuple[int, int]:
        """Physical slab and slot in it."""
        slab, slot = self._locate(slot_id)
        return slab.physical, slot

    def _new_slab(self, physical: int, generation: int) -> Slab:
        slab = Slab(self._next_serial, physical, self.slots_per_slab, generation, checksums=self._form.checksums)
        self._next_serial += 1
        self.slabs[slab.serial] = slab
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
        per_slab = self.slots_per_slab
        self._free = [deque(slot for slot in free if slot // per_slab not in dropped) for free in self._free]

    def drop_all(self) -> list[Slab]:
        """Forget every slab, with whatever is in it; returns them."""
        slabs = list(self.slabs.values())
        self.slabs.clear()
        for free in self._free:
            free.clear()
        self._counts = [0, 0, 0, 0]
        return slabs

    def has_free(self, barred: frozenset[int] = frozenset()) -> bool:
        return self.free_beside(barred) > 0

    def free_beside(self, barred: frozenset[int]) -> int:
        """Free slots on drives that are not barred."""
        free = self._counts[FREE]
        return free - sum(len(self._free[drive]) for drive in barred) if barred else free

    def reserve(self, row: int, barred: frozenset[int] = frozenset()) -> tuple[int, int]:
        """Give a free slot, on a drive that is not barred, to the block `row`; returns (slot id, generation)."""
        assert self.has_free(barred), "a slot was taken where none is free"
        drives = len(self._free)
        while not self._free[self._drive] or self._drive in barred:
            self._drive = (self._drive + 1) % drives
        slot_id = self._free[self._drive].pop()
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
        """Nobody's slot for now: its writer is late and may still write, or what it held could not be read."""
        slab, slot = self._locate(slot_id)
        self._move(slab, slot, RESIDENT if slab.states[slot] == RESIDENT else RESERVED, QUARANTINED)
        slab.rows[slot] = NO_ROW

    def free(self, slot_id: int, *, last: bool = False) -> int:
        """Take a slot back from whatever held it; returns its new generation.

        With `last` it is given again after all others that are free now, on this drive and on the others.
        """
        slab, slot = self._locate(slot_id)
        self._counts[slab.states[slot]] -= 1
        self._counts[FREE] += 1
        slab.states[slot] = FREE
        slab.rows[slot] = NO_ROW
        generation = slab.generations[slot] + 1
        if generation < slab.generation_min:
            generation = slab.generation_min
        slab.generations[slot] = generation
        if slab.checksums:
            slab.checksums[slot] = 0
        if last:
            self._free_on(slab).appendleft(slot_id)
            self._drive = (slab.physical + 1) % len(self._free)
        else:
            self._free_on(slab).append(slot_id)
        return generation

    def _free_on(self, slab: Slab) -> deque[int]:
        return self._free[slab.physical % len(self._free)]

    def keep_checksum(self, slot_id: int, checksum: int) -> None:
        """The payload checksum of the block in a slot, until the slot is freed; 0: not known."""
        slab, slot = self._locate(slot_id)
        slab.checksums[slot] = checksum
        self.knows_checksums = self.knows_checksums or checksum != 0

    def checksum(self, slot_id: int) -> int:
        """0 where it is not known."""
        slab, slot = self._locate(slot_id)
        return slab.checksums[slot]

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
        count, listed = sum(map(len, self._free)), {slot_id for free in self._free for slot_id in free}
        if len(listed) != count or len(listed) != counts[FREE]:
            yield f"{count} slots in the free list, {len(listed)} distinct, {counts[FREE]} free"
        for slot_id in listed:
            slab = self.slabs.get(slot_id // self.slots_per_slab)
            if slab is None or slab.states[slot_id % self.slots_per_slab] != FREE:
                yield f"slot {slot_id} is in the free list but not free"
            elif slot_id not in self._free_on(slab):
                yield f"slot {slot_id} is in the free list of another drive"

    def _locate(self, slot_id: int) -> tuple[Slab, int]:
        serial, slot = divmod(slot_id, self.slots_per_slab)
        return self.slabs[serial], slot

    def _move(self, slab: Slab, slot: int, old: int, new: int) -> None:
        assert slab.states[slot] == old, f"slot is {_STATES[slab.states[slot]]}, not {_STATES[old]}"
        slab.states[slot] = new
        self._counts[old] -= 1
        self._counts[new] += 1
