"""The store over host memory and a drive, with every byte simulated: whatever happens, nobody reads a wrong one.

The machine carries out effects as the daemon does, moves contents between a model of host memory and a model of the
drive as the tier does (at any time between a transfer's beginning and its end), crashes, and restores. What a block
ought to contain follows from its name, so a wrong byte shows wherever it lies. `pytest
tests/kvstore/test_movement_model.py --hypothesis-profile=long` searches for minutes instead of seconds.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.kvstore.errors import Busy, Draining, Expired, NotLeased, QuotaExceeded
from forebay.kvstore.groups import (
    HOST,
    NVME,
    Direction,
    DriveSlabAssigned,
    Effects,
    Group,
    Shard,
    SlabOpened,
    Transfer,
)
from forebay.kvstore.movement import PAUSE_S, WINDOW_SHARE, NvmeConfig, Verdict
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome, Scope
from forebay.kvstore.store import Acquired, Reserved, Store, StoreConfig

LONG = settings.get_current_profile_name() == "long"

PAGE = 4096
LIMITS = StoreConfig(
    6 * 4 * PAGE,
    4 * PAGE,
    ttl_max_s=50.0,
    reservation_ttl_s=20.0,
    pin_quota=0.3,
    slab_idle_s=30.0,
    sessions_max=4,
    namespaces_max=4,
    leases_max=6,
    reservations_max=6,
    nvme=NvmeConfig(
        7 * 9 * PAGE,
        9 * PAGE,
        window_bytes=4 * PAGE,
        chunk_bytes=2 * PAGE,
        prefetch_share=0.3,
        ahead_bytes=PAGE,
        drives=2,
    ),
)

Place = tuple[int, int]
Owner = tuple[int, bytes, int]
"""(user, fingerprint of the group, rank)."""

Content = tuple[str, Owner | int, bytes]
"""What a slot holds: ("block", whose, name), or ("noise", number, b"")."""


def name_of(path: tuple[int, ...]) -> bytes:
    return repr(path).encode().ljust(32, b".")[-32:]


def checksum_of(content: Content) -> int:
    return zlib.crc32(repr(content).encode()) + 1


@dataclass(frozen=True)
class Record:
    """What the drive's index says of a place."""

    name: bytes
    parent: bytes
    depth: int
    generation: int


@dataclass(frozen=True)
class Image:
    """What lies there: header and payload."""

    owner: Owner
    name: bytes
    generation: int
    content: Content


@dataclass(frozen=True)
class DriveOwner:
    """As the header of a slab names it."""

    uid: int
    group_fingerprint: bytes
    rank: int
    shard_size: int
    block_bytes: int
    slot_bytes: int
    hash_bytes: int = 32
    block_tokens: int = 16
    model: str = "m"


@dataclass
class DriveIndex:
    """Slabs and records; a slab's generation goes with its owner."""

    slabs: dict[int, tuple[DriveOwner, int]] = field(default_factory=dict)
    records: dict[Place, Record] = field(default_factory=dict)

    def copy(self) -> DriveIndex:
        return DriveIndex(dict(self.slabs), dict(self.records))

    def forget_slab(self, physical: int, below: int) -> None:
        for place in [p for p, r in self.records.items() if p[0] == physical and r.generation < below]:
            del self.records[place]


class Drive:
    """The drive: bytes that are there when they are written, and an index that a crash may cut short."""

    def __init__(self, rng: random.Random) -> None:
        self.media: dict[Place, Image] = {}
        self.bad: set[Place] = set()
        self.index = DriveIndex()
        self.epoch = 1
        self._rng = rng
        self._safe = DriveIndex()
        self._unsafe: list[Callable[[DriveIndex], object]] = []

    def change(self, operation: Callable[[DriveIndex], object]) -> None:
        """Of what was not synced, a crash keeps a beginning."""
        operation(self.index)
        self._unsafe.append(operation)

    def sync(self) -> None:
        self._safe = self.index.copy()
        self._unsafe.clear()

    def crash(self) -> None:
        for operation in self._unsafe[: self._rng.randint(0, len(self._unsafe))]:
            operation(self._safe)
        self._unsafe.clear()
        self.index = self._safe.copy()
        self.epoch += 1

    @property
    def first_generation(self) -> int:
        return self.epoch << 32 | 1

    def assign(self, physical: int, owner: DriveOwner, generation: int) -> None:
        assert physical not in self.index.slabs, "a slab of the drive was assigned twice"
        assert not [i for p, i in self.media.items() if p[0] == physical and i.generation >= generation], (
            "an image on the drive could be taken for the new owner's"
        )

        def assigned(index: DriveIndex) -> None:
            index.slabs[physical] = (owner, generation)
            index.forget_slab(physical, generation)

        self.change(assigned)

    def retire(self, physical: int) -> None:
        def retired(index: DriveIndex) -> None:
            index.slabs.pop(physical, None)
            index.forget_slab(physical, 1 << 64)

        self.change(retired)

    def forget(self, place: Place) -> None:
        self.change(lambda index: index.records.pop(place, None))

    def put(self, place: Place, record: Record) -> None:
        def stored(index: DriveIndex) -> None:
            index.records[place] = record

        self.change(stored)


@dataclass
class Job:
    """A transfer as the tier has it: all names taken down when it began."""

    transfer: Transfer
    owner: Owner
    records: list[Record]
    places: list[Place]
    slots: list[Place]
    seen: list[Content | None]
    begun: bool = False
    cancelled: bool = False

    @property
    def is_load(self) -> bool:
        return self.transfer.direction == Direction.LOAD


@dataclass
class Reader:
    """What a session was told of a lease: places, generations, how many are ready, how many will be."""

    ns: int
    owner: Owner
    names: list[bytes]
    slots: list[int]
    generations: list[int]
    ready: int
    total: int


@dataclass
class Writer:
    session: int
    ns: int
    owner: Owner
    names: list[bytes]
    slots: list[int]


@dataclass(frozen=True)
class Kind:
    """A namespace group of the test."""

    label: str
    pages: int
    ranks: int

    def spec(self, rank: int) -> NamespaceSpec:
        return NamespaceSpec(self.label, "r", "f16", 16, (self.pages * PAGE,), shard_rank=rank, shard_size=self.ranks)


SINGLE, PAIR = Kind("a", 1, 1), Kind("b", 2, 2)
KINDS = (SINGLE, SINGLE, PAIR)
UID = 1


class TwoTiersMachine(RuleBasedStateMachine):
    """Each rule is one event; `settle` carries its effects out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 100.0
        self.next_session = 1
        self.acquiring = 0
        self.ids = itertools.count(1)

    @initialize(seed=st.integers(0, 1 << 30))
    def begin(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.drive = Drive(self.rng)
        self.boot()
        self.restore_all()

    def boot(self) -> None:
        """A new life of the daemon over what the drive has kept."""
        self.store = Store(LIMITS, lambda: next(self.ids))
        self.sessions: list[int] = []
        self.memory: dict[Place, Content] = {}
        self.slabs: dict[tuple[int, int], int] = {}
        self.generations: dict[Place, int] = {}
        self.jobs: list[Job] = []
        self.readers: dict[tuple[int, int], Reader] = {}
        self.ended: list[Reader] = []
        self.writers: dict[int, Writer] = {}
        self.draining = False
        self.found: list[tuple[int, int, bytes, bytes, int, int]] = []
        self.restoring = True
        self.open_session()
        self.open_session()

    # The daemon's part

    def settle(self) -> None:
        while effects := self.store.drain_effects():
            failed = self.carry_out_memory(effects)
            for place in effects.forgotten:
                self.drive.forget(place)
            for change in effects.drive_slabs:
                if isinstance(change, DriveSlabAssigned):
                    self.drive.assign(change.physical, owner_on_drive(change.shard), change.generation)
                else:
                    self.drive.retire(change.physical)
            for transfer in effects.transfers:
                self.begin_job(transfer)
            for transfer_id in effects.cancelled:
                for job in self.jobs:
                    job.cancelled |= job.transfer.transfer_id == transfer_id and job.is_load
            for ns, serial in failed:
                self.store.slab_failed(ns, serial)
            self.tell(effects)

    def carry_out_memory(self, effects: Effects) -> list[tuple[int, int]]:
        failed = []
        for ns, slot, generation in effects.generations:
            assert generation > self.generation((ns, slot)), "a generation did not grow"
            self.generations[ns, slot] = generation
        for event in effects.slabs:
            key = (event.ns, event.slab)
            if not isinstance(event, SlabOpened):
                if key not in self.slabs:
                    continue  # it never had memory
                first, slots = event.slab * self.slabs[key], self.slabs.pop(key)
                for place in ((event.ns, slot) for slot in range(first, first + slots)):
                    self.memory.pop(place, None)
                    self.generations[place] = self.generation(place) + (1 << 32)
            elif self.rng.random() < 0.03:
                failed.append(key)
            else:
                self.slabs[key] = event.slots
        return failed

    def generation(self, place: Place) -> int:
        return self.generations.get(place, 1)

    def begin_job(self, transfer: Transfer) -> None:
        shard, index = transfer.shard, transfer.shard.group.index
        slots = [(shard.ns, slot) for slot in transfer.host_slots]
        if any((shard.ns, slot // shard.slots.slots_per_slab) not in self.slabs for _, slot in slots):
            count = len(slots)
            self.store.transfer_done(transfer.transfer_id, [Verdict.CANCELLED] * count, [0] * count, self.now)
            return
        records = []
        for row, generation in zip(transfer.rows, transfer.generations, strict=True):
            above = index.parents[row]
            name, parent = index.hashes[row], index.hashes[above] if above >= 0 else b""
            assert name is not None
            assert parent is not None
            records.append(Record(name, parent, index.depths[row], generation))
        places = [shard.spaces[NVME].place(slot) for slot in transfer.nvme_slots]
        self.jobs.append(Job(transfer, owner_of(shard), records, places, slots, [None] * len(slots)))

    def tell(self, effects: Effects) -> None:
        for each in effects.progress:
            reader = self.readers.get((each.session_id, each.lease_id))
            if reader is None:
                known = each.session_id in self.sessions and each.session_id != self.acquiring
                assert not known, "told of a lease it does not hold"
                continue
            assert reader.ready <= each.ready <= each.total <= reader.total, "progress went backwards"
            reader.ready, reader.total = each.ready, each.total

    # The tier's part

    @rule(which=st.integers(0, 9))
    def advance_a_job(self, which: int) -> None:
        """Something of a transfer's bytes has moved, and not all."""
        if not self.jobs:
            return
        job = self.jobs[which % len(self.jobs)]
        job.begun = True
        for i, slot in enumerate(job.slots):
            if self.rng.random() < 0.5:
                continue
            if job.is_load:
                self.memory[slot] = ("noise", self.rng.randrange(1 << 30), b"")
            else:
                self.write_out(job, i)

    def write_out(self, job: Job, i: int) -> Content:
        """The host slot's content goes to the drive."""
        content, record, place = self.memory[job.slots[i]], job.records[i], job.places[i]
        assert job.seen[i] in (None, content), "a block changed while it was being written to the drive"
        job.seen[i] = content
        found = self.drive.media.get(place)
        assert found is None or found.generation != record.generation or found.content == content, (
            "two images under one generation"
        )
        assert record.generation >= self.drive.first_generation, "a generation of an earlier life"
        self.drive.media[place] = Image(job.owner, record.name, record.generation, content)
        self.drive.bad.discard(place)
        return content

    @rule(which=st.integers(0, 9), luck=st.sampled_from(("good", "good", "good", "mixed", "bad")))
    def finish_a_job(self, which: int, luck: str) -> None:
        if self.jobs:
            self.finish(self.jobs[which % len(self.jobs)], luck)

    @rule()
    def finish_all_jobs(self) -> None:
        """A drive that keeps up; otherwise little would ever be on it."""
        while self.jobs:
            self.finish(self.jobs[0], "good")

    def finish(self, job: Job, luck: str) -> None:
        self.jobs.remove(job)
        ill = {"good": 0.0, "mixed": 0.4, "bad": 1.0}[luck]
        ends = []
        for i in range(len(job.slots)):
            if not job.begun and (job.cancelled or self.rng.random() < ill / 2):
                ends.append((Verdict.CANCELLED, 0))
            else:
                ends.append((self.load if job.is_load else self.store_block)(job, i, self.rng.random() < ill))
        verdicts, checksums = zip(*ends, strict=True)
        self.store.transfer_done(job.transfer.transfer_id, verdicts, checksums, self.now)
        self.settle()

    def load(self, job: Job, i: int, ill: bool) -> tuple[Verdict, int]:
        image, record, slot = self.drive.media.get(job.places[i]), job.records[i], job.slots[i]
        if ill:
            self.memory[slot] = ("noise", self.rng.randrange(1 << 30), b"")
            return Verdict.FAILED, 0
        found = image and (image.owner, image.name, image.generation)
        if image is None or found != (job.owner, record.name, record.generation):
            return Verdict.STALE, 0
        if job.places[i] in self.drive.bad:
            self.memory[slot] = ("noise", self.rng.randrange(1 << 30), b"")
            return Verdict.CORRUPT, 0
        self.memory[slot] = image.content
        return Verdict.OK, checksum_of(image.content)

    def store_block(self, job: Job, i: int, ill: bool) -> tuple[Verdict, int]:
        content = self.write_out(job, i)
        if ill:
            self.drive.media.pop(job.places[i])
            return Verdict.FAILED, 0
        self.drive.put(job.places[i], job.records[i])
        self.drive.sync()
        return Verdict.OK, checksum_of(content)

    @rule(which=st.integers(0, 30))
    def rot(self, which: int) -> None:
        """A block on the drive goes bad."""
        places = sorted(self.drive.index.records)
        if which < len(places) and self.rng.random() < 0.3:
            self.drive.bad.add(places[which])

    # Lives

    @rule(gently=st.booleans(), really=st.integers(0, 3))
    def restart(self, gently: bool, really: int) -> None:
        if really != 3:
            return
        if gently:
            self.shut_down()
        for job in self.jobs:
            for i, place in enumerate(job.places):
                if not job.is_load and self.rng.random() < 0.5:
                    self.write_out(job, i)
                    if self.rng.random() < 0.5:
                        self.drive.put(place, job.records[i])
        self.drive.crash()
        self.boot()

    def shut_down(self) -> None:
        self.store.drain()
        for session in list(self.sessions):
            self.end_session(session)
        while self.store.flush(self.now):
            self.settle()
            if self.jobs:
                self.finish(self.jobs[0], "good")
            else:
                self.now += PAUSE_S  # a drive failed a moment ago
        self.settle()
        assert self.store.check() == []
        self.drive.sync()

    @precondition(lambda self: self.restoring)
    @rule()
    def restore_slabs(self) -> None:
        if self.store.movement is not None and self.store.movement.ready:
            return
        index = self.drive.index
        slabs = [(physical, owner, generation) for physical, (owner, generation) in index.slabs.items()]
        for physical, _, generation in slabs:
            index.forget_slab(physical, generation)
        self.found = [(*place, r.name, r.parent, r.depth, r.generation) for place, r in index.records.items()]
        if self.rng.random() < 0.2:
            self.forge()
        self.rng.shuffle(slabs)
        if self.rng.random() < 0.5:
            self.rng.shuffle(self.found)
        else:
            self.found.sort(key=lambda found: found[4])
        self.store.restore_slabs(slabs, self.drive.first_generation)
        self.settle()

    def forge(self) -> None:
        """Records that cannot be: other parents, other depths, places that hold nothing; and some told twice."""
        self.found += self.rng.sample(self.found, min(2, len(self.found)))
        for _ in range(4):
            place = self.rng.randrange(9), self.rng.randrange(6)
            if any(found[:2] == place for found in self.found):
                continue
            name, parent = (name_of(tuple(self.rng.choices((0, 1), k=self.rng.randint(1, 4)))) for _ in range(2))
            record = Record(name, self.rng.choice((parent, b"")), self.rng.choice((0, 1, 2, 3, 1 << 31)), 7)
            self.found.append((*place, record.name, record.parent, record.depth, record.generation))
            if place[0] in self.drive.index.slabs:
                self.drive.index.records[place] = record

    @precondition(lambda self: self.restoring)
    @rule(count=st.integers(1, 6))
    def restore_some(self, count: int) -> None:
        movement = self.store.movement
        assert movement is not None
        if not movement.ready:
            return
        part, self.found = self.found[:count], self.found[count:]
        self.store.restore_blocks(part, self.now)
        if not self.found:
            self.store.restore_done()
            self.restoring = False
        self.settle()

    @precondition(lambda self: self.restoring)
    @rule()
    def restore_all(self) -> None:
        self.restore_slabs()
        while self.restoring:
            self.restore_some(5)

    # Sessions and time

    def open_session(self) -> None:
        self.store.open_session(self.next_session, UID, b"g", operator=True)
        self.sessions.append(self.next_session)
        self.next_session += 1

    @rule(which=st.integers(0, 3))
    def die_and_come_back(self, which: int) -> None:
        session = self.sessions[which % len(self.sessions)]
        self.end_session(session)
        self.open_session()

    def end_session(self, session: int) -> None:
        for reservation_id in [i for i, writer in self.writers.items() if writer.session == session]:
            del self.writers[reservation_id]
        self.store.close_session(session)
        self.sessions.remove(session)
        self.settle()

    @rule(seconds=st.sampled_from((0.0, 0.5, 2.0, 10.0, 20.0, 45.0, 1000.0)))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.store.expire(self.now)
        self.settle()

    @rule()
    def plan(self) -> None:
        self.store.plan_writes(self.now)
        self.settle()

    @rule()
    def sweep(self) -> None:
        self.now += 2.5
        self.store.expire(self.now)
        self.store.sweep(self.now)
        self.settle()

    # Reading

    def place(self, data: st.DataObject) -> tuple[int, Shard]:
        kind = data.draw(st.sampled_from(KINDS))
        which, rank = data.draw(st.integers(0, 1)), data.draw(st.integers(0, kind.ranks - 1))
        try:
            return self.opened(self.sessions[which], kind, rank)
        except QuotaExceeded:
            for session in list(self.sessions):
                self.end_session(session)
                self.open_session()
            self.finish_all_jobs()
            return self.opened(self.sessions[which], kind, rank)

    def opened(self, session: int, kind: Kind, rank: int) -> tuple[int, Shard]:
        try:
            return session, [self.store.open_namespace(session, kind.spec(each)) for each in range(kind.ranks)][rank]
        finally:
            self.settle()

    def chain(self, data: st.DataObject) -> list[bytes]:
        deepest = data.draw(st.lists(st.integers(0, 1), min_size=1, max_size=7))
        return [name_of(tuple(deepest[: depth + 1])) for depth in range(len(deepest))]

    @rule(data=st.data(), hint=st.sampled_from(("lookup", "touch", "done", "prefetch", "persist")))
    def ask(self, data: st.DataObject, hint: str) -> None:
        session, shard = self.place(data)
        names = self.chain(data)
        if hint == "done":
            self.store.done(session, shard.ns, names)
        else:
            getattr(self.store, hint)(session, shard.ns, names, self.now)
        self.settle()

    @rule(data=st.data(), ttl_s=st.sampled_from((1.0, 15.0, 500.0)), twice=st.booleans())
    def acquire(self, data: st.DataObject, ttl_s: float, twice: bool) -> None:
        session, shard = self.place(data)
        names = self.chain(data)
        names += names[-1:] if twice else []
        self.lease(session, shard, names, ttl_s)

    def lease(self, session: int, shard: Shard, names: list[bytes], ttl_s: float) -> None:
        def hand_over() -> None:
            """The daemon's, in the middle of a lease; whoever cannot be told anything any more has died."""
            self.settle()
            if self.rng.random() < 0.05:
                self.end_session(session)
            assert self.store.check() == []

        self.acquiring = session
        try:
            got = self.store.acquire(session, shard.ns, names, ttl_s, self.now, hand_over)
        except (Busy, Draining):
            return
        finally:
            self.acquiring = 0
        if session not in self.sessions:
            assert not got.lease_id, "the dead were given a lease"
            self.open_session()
        elif got.lease_id:
            self.read(session, shard, names, got)
        self.settle()

    def read(self, session: int, shard: Shard, names: list[bytes], got: Acquired) -> None:
        count = len(got.slots)
        assert got.ready <= count <= len(names)
        assert len(got.checksums) in (0, count)
        owner, slots, generations = owner_of(shard), got.slots.tolist(), got.generations.tolist()
        for name, known in zip(names[: got.ready], got.checksums, strict=False):
            assert known in (0, checksum_of(("block", owner, name)))
        self.readers[session, got.lease_id] = Reader(
            shard.ns, owner, names[:count], slots, generations, got.ready, count
        )  # fmt: skip

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def resolve(self, data: st.DataObject) -> None:
        session, shard = self.place(data)
        lease_id = data.draw(st.sampled_from(sorted({lease_id for _, lease_id in self.readers})))
        try:
            got = self.store.resolve(session, shard.ns, lease_id)
        except NotLeased:
            return
        self.settle()
        lease = self.store._leases[lease_id]
        names = [lease.group.index.hashes[row] or b"" for row in lease.rows[: lease.total]]
        known = self.readers.get((session, lease_id))
        if known is None or known.ns == shard.ns:
            self.read(session, shard, names, got)

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), after=st.sampled_from(("nothing", "acquire", "prefetch")))
    def release(self, data: st.DataObject, after: str) -> None:
        """Some change their mind, perhaps before the tier has heard of it."""
        session, lease_id = data.draw(st.sampled_from(sorted(self.readers)))
        reader = self.readers[session, lease_id]
        if session not in self.sessions:
            return
        try:
            self.store.release(session, lease_id)
        except NotLeased:
            return
        self.settle()
        shard = self.store.shard(session, reader.ns)
        if after == "acquire":
            self.lease(session, shard, reader.names, 15.0)
        elif after == "prefetch":
            self.store.prefetch(session, shard.ns, reader.names, self.now)
            self.settle()

    # Writing

    @rule(data=st.data())
    def store_a_chain(self, data: st.DataObject) -> None:
        self.store_chain(data, self.chain(data))

    @rule(data=st.data())
    def store_another_chain(self, data: st.DataObject) -> None:
        """The same again, to be chosen more often."""
        self.store_chain(data, self.chain(data))

    def store_chain(self, data: st.DataObject, names: list[bytes]) -> None:
        """What most clients do; each rank in turn."""
        session, shard = self.place(data)
        for each in list(shard.group.shards.values()):
            if each.ns not in self.store._sessions[session].namespaces:
                continue
            reservation_id = self.reserve(session, each, names)
            if reservation_id:
                self.commit(reservation_id, [])

    @rule(data=st.data(), filler=st.integers(0, 2))
    def push_down(self, data: st.DataObject, filler: int) -> None:
        """A chain is written down and then crowded out of host memory; else little would ever be on the drive only."""
        names = self.chain(data)
        self.store_chain(data, names)
        session, shard = self.place(data)
        for _ in range(3):
            self.store.persist(session, shard.ns, names, self.now)
            self.settle()
            self.finish_all_jobs()
        others = [name_of((9, filler, depth)) for depth in range(self.rng.randint(4, 24))]
        for each in list(shard.group.shards.values()):
            reservation_id = 0
            if each.ns in self.store._sessions[session].namespaces:
                reservation_id = self.reserve(session, each, others)
            if reservation_id:
                self.commit(reservation_id, [])
        session, shard = self.place(data)
        if self.rng.random() < 0.3:
            self.store.prefetch(session, shard.ns, names, self.now)
            self.settle()
        if self.rng.random() < 0.7:
            self.lease(session, shard, names, self.rng.choice((1.0, 15.0, 500.0)))
        self.settle()

    @rule(data=st.data())
    def only_reserve(self, data: st.DataObject) -> None:
        session, shard = self.place(data)
        self.reserve(session, shard, self.chain(data))

    def reserve(self, session: int, shard: Shard, names: list[bytes]) -> int:
        try:
            got = self.store.reserve(session, shard.ns, b"", names, self.now)
        except Busy:
            return 0
        if got.reservation_id:
            self.take(session, shard, names, got)
        self.settle()
        if got.reservation_id not in self.store._reservations:
            self.writers.pop(got.reservation_id, None)  # its slab's memory could not be had
            return 0
        return got.reservation_id

    def take(self, session: int, shard: Shard, names: list[bytes], got: Reserved) -> None:
        written = [name for name, outcome in zip(names, got.outcomes, strict=True) if outcome == Outcome.WRITE]
        writer = Writer(session, shard.ns, owner_of(shard), written, got.slots.tolist())
        for slot in writer.slots:
            for other in self.writers.values():
                assert (other.ns, slot) != (writer.ns, slot) or slot not in other.slots, "a slot has two writers"
        self.writers[got.reservation_id] = writer

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), how=st.sampled_from(("commit", "commit", "fail", "abort", "scribble")))
    def go_on_writing(self, data: st.DataObject, how: str) -> None:
        reservation_id = data.draw(st.sampled_from(sorted(self.writers)))
        writer = self.writers[reservation_id]
        if how == "scribble":
            for slot in writer.slots:
                self.memory[writer.ns, slot] = ("noise", self.rng.randrange(1 << 30), b"")
        elif how == "abort":
            self.store.abort(writer.session, reservation_id)
            del self.writers[reservation_id]
            self.settle()
        else:
            self.commit(reservation_id, [0] if how == "fail" else [])

    def commit(self, reservation_id: int, failed: Sequence[int]) -> None:
        writer = self.writers.pop(reservation_id)
        contents: list[Content] = [("block", writer.owner, name) for name in writer.names]
        for slot, content in zip(writer.slots, contents, strict=True):
            self.memory[writer.ns, slot] = content
        known = [checksum_of(content) for content in contents] if self.rng.random() < 0.7 else []
        if known and self.rng.random() < 0.1:
            known[-1] = 0
        try:
            self.store.commit(writer.session, reservation_id, failed, self.now, known)
        except Expired:
            pass
        self.settle()

    # Keeping and removing

    @rule(data=st.data(), pinned=st.booleans())
    def pin(self, data: st.DataObject, pinned: bool) -> None:
        session, shard = self.place(data)
        try:
            (self.store.pin if pinned else self.store.unpin)(session, shard.ns, self.chain(data))
        except QuotaExceeded:
            pass
        self.settle()

    @rule(data=st.data(), scope=st.sampled_from(Scope))
    def evict(self, data: st.DataObject, scope: Scope) -> None:
        if scope == Scope.NAMESPACE and self.rng.random() < 0.7:
            return
        session, shard = self.place(data)
        self.store.evict(session, shard.ns, scope, self.chain(data)[-2:])
        self.settle()

    @rule(really=st.integers(0, 9))
    def clear(self, really: int) -> None:
        if really == 9:
            self.store.clear(self.sessions[0])
            self.settle()

    @rule(number=st.integers(0, 4))
    def open_others(self, number: int) -> None:
        """More namespaces than may be: the longest unused make way."""
        if self.rng.random() < 0.8:
            return
        try:
            self.store.open_namespace(self.sessions[0], Kind(f"other{number}", 1, 1).spec(0))
        except QuotaExceeded:
            pass
        self.settle()

    # After each step

    def live_shards(self) -> Iterator[tuple[Shard, Group]]:
        for shard in self.store._shards.values():
            yield shard, shard.group

    @invariant()
    def store_finds_nothing_wrong(self) -> None:
        assert self.store.check() == []

    @invariant()
    def nothing_is_ever_wrong_in_host_memory(self) -> None:
        for shard, group in self.live_shards():
            for row in group.index.rows():
                slot = group.index.slot(row, HOST, shard.rank)
                if slot >= 0:
                    expected = ("block", owner_of(shard), group.index.hashes[row])
                    assert self.memory[shard.ns, slot] == expected, "wrong bytes in host memory"
                    known = shard.slots.checksum(slot)
                    assert known in (0, checksum_of(expected)), "a wrong checksum is kept"

    @invariant()
    def readers_get_what_they_asked_for(self) -> None:
        """Live leases whole; ended ones wherever the generation still agrees."""
        for (session, lease_id), reader in list(self.readers.items()):
            lease = self.store._leases.get(lease_id)
            if lease is None or session not in self.sessions:
                self.ended.append(self.readers.pop((session, lease_id)))
                continue
            assert (reader.ready, reader.total) == (lease.ready, lease.total), "a reader was not told"
            for slot, generation in zip(reader.slots[: reader.total], reader.generations, strict=False):
                assert self.generation((reader.ns, slot)) == generation, "a leased slot was given away"
        for reader in itertools.chain(self.readers.values(), self.ended[-20:]):
            for i in range(reader.ready):
                place = (reader.ns, reader.slots[i])
                if self.generation(place) == reader.generations[i]:
                    assert self.memory[place] == ("block", reader.owner, reader.names[i]), "wrong bytes were read"

    @invariant()
    def what_is_durable_is_on_the_drive(self) -> None:
        index, seen = self.drive.index, set()
        for shard, group in self.live_shards():
            space = shard.spaces[NVME]
            for row in group.index.rows():
                slot = group.index.slot(row, NVME, shard.rank)
                if slot < 0:
                    continue
                place = space.place(slot)
                seen.add(place)
                record = index.records[place]
                assert (record.name, record.generation) == (group.index.hashes[row], space.generation(slot))
                image = self.drive.media.get(place)
                if image and (image.owner, image.name, image.generation) == (owner_of(shard), *named(record)):
                    assert image.content == ("block", owner_of(shard), record.name), "wrong bytes on the drive"
        if not self.restoring:
            assert index.records.keys() == seen, "the drive's index knows what the store has given up"
            assert len(index.slabs) == LIMITS_SLABS - self.store.tiers[NVME].slabs_free

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        if not self.jobs:
            for lease in self.store._leases.values():
                assert lease.ready == lease.total, "a lease waits, and nothing is under way"

    @invariant()
    def what_is_under_way_is_bounded(self) -> None:
        config = LIMITS.nvme
        assert config is not None
        movement = self.store.movement
        assert movement is not None
        sizes = {d: sum(bytes_of(job) for job in self.jobs if job.transfer.direction == d) for d in Direction}
        window = min(config.window_bytes, LIMITS.capacity_bytes // WINDOW_SHARE)
        assert sizes[Direction.WRITE] <= max(window, 2 * PAGE)
        waiting = list(movement._waiting.values())
        assert len(self.jobs) + len(waiting) == movement.in_flight, "a transfer nobody was asked for"
        kept = sum(bytes_of(job) for job in self.jobs if job.transfer.kept)
        kept += sum(len(each.rows) * each.shard.slots.block_bytes for each in waiting)
        assert kept == movement._prefetching_bytes <= config.prefetch_share * LIMITS.capacity_bytes

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for session in list(self.sessions):
            self.end_session(session)
        while self.jobs:
            self.finish(self.jobs[0], "good")
        for shard, group in self.live_shards():
            assert not any(group.index.holds[row] for row in group.index.rows())
            assert shard.slots.count(1) == shard.slots.count(2) == 0
        assert self.store.check() == []


LIMITS_SLABS = 7


def bytes_of(job: Job) -> int:
    return len(job.slots) * job.transfer.shard.slots.block_bytes


def named(record: Record) -> tuple[bytes, int]:
    return record.name, record.generation


def owner_of(shard: Shard) -> Owner:
    return shard.group.uid, shard.group.fingerprint, shard.rank


def owner_on_drive(shard: Shard) -> DriveOwner:
    space, group = shard.spaces[NVME], shard.group
    return DriveOwner(
        group.uid, group.fingerprint, shard.rank, group.index.shard_size, space.block_bytes, space.slot_bytes
    )


TestNobodyReadsAWrongByte = pytest.mark.timeout(1800)(TwoTiersMachine.TestCase)  # a failure is made small first
TestNobodyReadsAWrongByte.settings = settings(
    max_examples=5000 if LONG else 200,
    stateful_step_count=80,
    deadline=None,
    derandomize=not LONG,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)


# --- replaying -----------------------------------------------------------------------------------------------------

STEPS = 1500


def replay(seed: int) -> str:
    """A digest of every answer and effect of a run that a seed decides, over two lives of the store."""
    dice, log = random.Random(seed), hashlib.sha256()
    slabs: dict[int, tuple[DriveOwner, int]] = {}
    found: dict[Place, tuple[bytes, bytes, int, int]] = {}
    for life in (1, 2):
        ids, now = itertools.count(1), 0.0
        store = Store(LIMITS, lambda ids=ids: next(ids))  # type: ignore[misc]
        store.open_session(1, UID)
        shards = [store.open_namespace(1, kind.spec(rank)) for kind in (SINGLE, PAIR) for rank in range(kind.ranks)]
        store.restore_slabs([(physical, *known) for physical, known in slabs.items()], life << 32 | 1)
        store.restore_blocks([(*place, *block) for place, block in found.items()], now)
        store.restore_done()
        pending: list[Transfer] = []
        for _ in range(STEPS):
            now += dice.choice((0.0, 0.1, 5.0))
            log.update(repr(_replayed_step(store, dice, dice.choice(shards), pending, now)).encode())
            effects = store.drain_effects()
            pending += effects.transfers
            log.update(repr((effects.slabs, effects.generations, effects.forgotten, effects.progress)).encode())
            log.update(repr([(t.transfer_id, t.direction, t.rows, t.host_slots) for t in effects.transfers]).encode())
        slabs, found = _left_on_drive(shards)
        assert found, "nothing was written: this replays less than it should"
        assert store.check() == []
    return log.hexdigest()


def _replayed_step(store: Store, dice: random.Random, shard: Shard, pending: list[Transfer], now: float) -> object:
    path = [dice.randint(0, 2) for _ in range(dice.randint(1, 6))]
    names = [name_of(tuple(path[: depth + 1])) for depth in range(len(path))]
    action = dice.randint(0, 9)
    if action <= 2:
        got = store.reserve(1, shard.ns, b"", names, now)
        return got, got.reservation_id and store.commit(1, got.reservation_id, [], now)
    if action == 3 and len(store._leases) < LIMITS.leases_max:
        return store.acquire(1, shard.ns, names, 8.0, now)
    if action == 4:
        return store.persist(1, shard.ns, names, now)
    if action == 5:
        return store.prefetch(1, shard.ns, names, now)
    if action == 6:
        store.expire(now)
        store.plan_writes(now)
        store.sweep(now)
        return store.stats(now)
    if pending:
        transfer = pending.pop(dice.randrange(len(pending)))
        verdicts = dice.choices(tuple(Verdict), (20, 1, 1, 1, 1), k=len(transfer.rows))
        store.transfer_done(transfer.transfer_id, verdicts, [0] * len(verdicts), now)
    return store.lookup(1, shard.ns, names, now)


def _left_on_drive(
    shards: Sequence[Shard],
) -> tuple[dict[int, tuple[DriveOwner, int]], dict[Place, tuple[bytes, bytes, int, int]]]:
    slabs, found = {}, {}
    for shard in shards:
        index, space = shard.group.index, shard.spaces[NVME]
        for slab in space.slabs.values():
            slabs[slab.physical] = (owner_on_drive(shard), min(slab.generations))
        for row in index.rows():
            slot, above = index.slot(row, NVME, shard.rank), index.parents[row]
            if slot >= 0:
                parent = index.hashes[above] if above >= 0 else b""
                block = (index.hashes[row] or b"", parent or b"", index.depths[row], space.generation(slot))
                found[space.place(slot)] = block
    return slabs, found


def test_same_seed_has_the_same_outcomes_and_effects() -> None:
    """A fault found by a seed must be found again by it."""
    assert replay(3) == replay(3)
    assert replay(3) != replay(8)


def test_replay_does_not_depend_on_the_interpreters_hash_seed() -> None:
    """No decision may follow the order of a set or dictionary of bytes or of objects."""
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['replay'](3))"
    digests = set()
    for seed in ("1", "2"):
        command = [sys.executable, "-P", "-c", code, str(Path(__file__))]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": seed}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        digests.add(done.stdout)
    assert len(digests) == 1
