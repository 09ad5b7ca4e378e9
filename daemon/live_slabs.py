"""The memory behind assigned slabs: carries out what the store decided, and hands out the descriptors.

The core counts slots and generations; this module gives a slab its memfd and its generation table, publishes bumped
generations, and takes both away again. Owned by the owner thread; no KV byte is touched.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from forebay.daemon.logging import fields
from forebay.kvstore.groups import Effects, SlabOpened, SlabRetired
from forebay.tiers.host import HostTier
from forebay.transports.shm import GenerationTable

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Live:
    physical: int
    table: GenerationTable
    memory: int


@dataclass(frozen=True, slots=True)
class CarriedOut:
    """What became of a batch of effects: slabs taken back, and slabs whose memory could not be had, with the reason.

    `freed` names the memory of the former.
    """

    retired: list[SlabRetired]
    failed: list[tuple[SlabOpened, OSError]]
    freed: list[int]


class LiveSlabs:
    """Live slabs by (ns, serial)."""

    def __init__(self, tier: HostTier) -> None:
        self._tier = tier
        self._live: dict[tuple[int, int], _Live] = {}
        self._physical: dict[int, int] = {}
        """By number of the memory."""
        self._slots_per_slab: dict[int, int] = {}
        self._slabs_of: dict[int, int] = {}

    def carry_out(self, effects: Effects) -> CarriedOut:
        """Do what the store decided, slabs before generations; to be called before the answer is sent."""
        done = CarriedOut([], [], [])
        for event in effects.slabs:
            if isinstance(event, SlabRetired):
                done.freed.extend(self._retire(event))
                done.retired.append(event)
                continue
            try:
                self._open(event)
            except OSError as error:
                done.failed.append((event, error))
        for ns, slot_id, generation in effects.generations:
            self._publish(ns, slot_id, generation)
        return done

    def handles(self, ns: int, slab: int) -> tuple[int, int]:
        """Descriptors of a live slab's memory and generation table; they stay ours."""
        live = self._live[ns, slab]
        return self._tier.slab_fd(live.physical), live.table.fd

    def memory(self, ns: int, slab: int) -> int | None:
        """The number of a live slab's memory; None where it could not be had."""
        live = self._live.get((ns, slab))
        return None if live is None else live.memory

    def memory_handle(self, number: int) -> tuple[int, int]:
        """Descriptor, which stays ours, and size in bytes of the memory of a live slab."""
        return self._tier.slab_fd(self._physical[number]), self._tier.slab_bytes

    def close(self) -> None:
        """Let go of every table; readers that are still copying fail."""
        for live in self._live.values():
            live.table.bump_all()
            live.table.close()
        self._live.clear()

    def _open(self, event: SlabOpened) -> None:
        self._tier.open_slab(event.physical)
        try:
            table = GenerationTable(event.slots)
        except OSError:
            self._tier.close_slab(event.physical)
            raise
        table.bump_all()  # generations start at 1, so that 0 is never a right answer
        memory = self._tier.memory_number(event.physical)
        self._physical[memory] = event.physical
        self._live[event.ns, event.slab] = _Live(event.physical, table, memory)
        self._slots_per_slab[event.ns] = event.slots
        self._slabs_of[event.ns] = self._slabs_of.get(event.ns, 0) + 1
        log.debug("slab assigned", extra=fields(ns=event.ns, slab=event.slab, physical=event.physical))

    def _retire(self, event: SlabRetired) -> list[int]:
        live = self._live.pop((event.ns, event.slab), None)
        if live is None:
            return []  # its memory could not be had, so it was never opened
        del self._physical[live.memory]
        live.table.bump_all()
        live.table.close()
        self._slabs_of[event.ns] -= 1
        if not self._slabs_of[event.ns]:
            del self._slabs_of[event.ns], self._slots_per_slab[event.ns]
        try:
            self._tier.close_slab(event.physical)
        except OSError as error:  # its memory stays taken; what else was decided must be carried out all the same
            log.error("a slab's memory was not given back", extra=fields(physical=event.physical, error=error))
        log.debug("slab retired", extra=fields(ns=event.ns, slab=event.slab, physical=event.physical))
        return [live.memory]

    def _publish(self, ns: int, slot_id: int, generation: int) -> None:
        slots = self._slots_per_slab.get(ns)
        if slots is None:
            return  # it has no live slab: all are retired, or their memory could not be had
        live = self._live.get((ns, slot_id // slots))
        if live is not None:
            live.table.set(slot_id % slots, generation)
