"""Places: where blocks lie in mapped slabs, and whether they still do.

A slot id is ``slab serial * slots_per_slab + slot in slab``. The daemon bumps a slot's generation before it
gives the slot to another block, so bytes copied out are right exactly when the generation read *after* the copy
is the one that came with the slot.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from forebay.client.segments import Addresses
from forebay.kvstore.errors import Corrupt
from forebay.transports.packets import SlabMap
from forebay.transports.shm import map_received, table_bytes


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SlabMapping:
    """One slab mapped into this process; the memory stays mapped as long as anything refers to it.

    Attributes:
        data: uint8 (slab bytes,).
        generations: uint64 (slots,), written by the daemon, read-only here.
    """

    data: NDArray[np.uint8]
    generations: NDArray[np.uint64]
    slot_bytes: int
    slots: int
    writable: bool
    address: int

    @classmethod
    def of(
        cls, data: NDArray[np.uint8], generations: NDArray[np.uint64], slot_bytes: int, *, writable: bool
    ) -> SlabMapping:
        """A mapping over memory somebody else mapped. Raises Corrupt when it cannot hold its slots."""
        if slot_bytes < 1 or len(generations) * slot_bytes > len(data):
            raise Corrupt(f"{len(generations)} slots of {slot_bytes} bytes are more than a slab of {len(data)}")
        address = int(data.__array_interface__["data"][0])
        return cls(data, generations, slot_bytes, len(generations), writable, address)

    @classmethod
    def receive(cls, shape: SlabMap, slab_fd: int, table_fd: int) -> SlabMapping:
        """Map what the daemon handed out; the descriptors stay the caller's. Raises Corrupt, OSError."""
        slab = map_received(slab_fd, shape.slab_bytes, writable=shape.writable)
        table = map_received(table_fd, table_bytes(shape.slots), writable=False)
        generations = np.frombuffer(table, np.dtype("<u8"), count=shape.slots)
        return cls.of(np.frombuffer(slab, np.uint8), generations, shape.slot_bytes, writable=shape.writable)


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The slots of a list of blocks, in order.

    Attributes:
        mappings: the slab of each run of blocks that lie in one; a slab may come more than once.
        bounds: run r is blocks ``bounds[r]`` to ``bounds[r + 1] - 1``.
        indices: int64 (n,), slot in slab of each block.
        generations: uint64 (n,), as they were when the slots were handed out.
        addresses: int64 (n,), where each slot begins in this process.
    """

    mappings: tuple[SlabMapping, ...]
    bounds: tuple[int, ...]
    indices: Addresses
    generations: NDArray[np.uint64]
    addresses: Addresses
    block_bytes: int

    def __len__(self) -> int:
        return len(self.addresses)

    @classmethod
    def resolve(
        cls,
        mappings: Sequence[SlabMapping],
        bounds: Sequence[int],
        indices: Addresses,
        generations: NDArray[np.uint64],
        block_bytes: int,
    ) -> Places:
        """Raises Corrupt when a slot lies outside its slab."""
        addresses = np.empty(len(indices), np.int64)
        places = cls(tuple(mappings), tuple(bounds), indices, generations, addresses, block_bytes)
        for mapping, run in places.runs():
            mine = indices[run]
            if int(mine.max()) >= mapping.slots:
                raise Corrupt("the daemon named a slot outside its slab")
            addresses[run] = mine * mapping.slot_bytes + mapping.address
        return places

    def runs(self) -> Iterator[tuple[SlabMapping, slice]]:
        """Runs of blocks in one slab, in order."""
        return zip(self.mappings, itertools.starmap(slice, itertools.pairwise(self.bounds)), strict=True)

    def part(self, first: int, last: int) -> Places:
        """The places of blocks `first` to `last - 1`."""
        if (first, last) == (0, len(self)):
            return self
        runs = [(mapping, run) for mapping, run in self.runs() if run.start < last and run.stop > first]
        mappings = tuple(mapping for mapping, _ in runs)
        bounds = (0, *(min(run.stop, last) - first for _, run in runs))
        inside = slice(first, last)
        where = (self.indices[inside], self.generations[inside], self.addresses[inside])
        return Places(mappings, bounds, *where, self.block_bytes)

    def verified(self) -> int:
        """Leading blocks whose slots still hold them; call it after the copy."""
        for mapping, run in self.runs():
            holds = mapping.generations[self.indices[run]] == self.generations[run]
            if not holds.all():
                return int(run.start + np.argmin(holds))
        return len(self)

    def views(self, *, writable: bool) -> list[NDArray[np.uint8]]:
        """One uint8 array (block_bytes,) per block, in place. Each keeps its slab mapped, not its slot leased."""
        views = []
        for mapping, run in self.runs():
            for index in self.indices[run].tolist():
                view = mapping.data[index * mapping.slot_bytes :][: self.block_bytes]
                if not writable:
                    view = view.view()
                    view.flags.writeable = False
                views.append(view)
        return views

    def slots(self) -> list[int]:
        """Slot in slab of each block."""
        out: list[int] = self.indices.tolist()
        return out


def no_places(block_bytes: int) -> Places:
    """The places of no blocks at all."""
    none = np.zeros(0, np.int64)
    return Places((), (0,), none, np.zeros(0, np.uint64), none, block_bytes)
