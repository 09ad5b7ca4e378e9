"""A daemon in a thread: the real protocol on real sockets, a plain dict behind it, and faults on request.

It has no policy (slots are handed out in order until they end) and records every request it answers. Tests change it
with `run`, which executes a function on its thread.
"""

from __future__ import annotations

import os
import queue
import secrets
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import zmq

from forebay.kvstore.errors import (
    BadRequest,
    ForebayError,
    NotLeased,
    PeerLost,
    UnknownNamespace,
    UnknownSession,
)
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.outcome import Outcome
from forebay.transports import messages as m
from forebay.transports import paths
from forebay.transports.codec import decode_request, encode_error, encode_reply
from forebay.transports.packets import Hello, MapSlab, Ready, Release, Retired, SlabMap
from forebay.transports.session import SessionListener, SessionPeer
from forebay.transports.shm import GenerationTable, create_memfd
from forebay.transports.zmq_sockets import ControlServer

T = TypeVar("T")
SLOTS_PER_SLAB = 4
POLL_MS = 5000
REMOVED_AT_ONCE = 2
"""Blocks of one EVICT; a client has to ask again for the others."""


@dataclass
class FakeSlab:
    fd: int
    table: GenerationTable


@dataclass
class FakeNamespace:
    ns: int
    spec: NamespaceSpec
    slot_bytes: int
    blocks: dict[bytes, int] = field(default_factory=dict)
    writing: dict[bytes, int] = field(default_factory=dict)
    pinned: set[bytes] = field(default_factory=set)
    slabs: dict[int, FakeSlab] = field(default_factory=dict)
    next_slot: int = 0

    def leading(self, hashes: list[bytes]) -> list[bytes]:
        present = []
        for name in hashes:
            if name not in self.blocks:
                break
            present.append(name)
        return present

    def generation(self, slot: int) -> int:
        return self.slabs[slot // SLOTS_PER_SLAB].table.get(slot % SLOTS_PER_SLAB)

    def read(self, slot: int) -> bytes:
        slab = self.slabs[slot // SLOTS_PER_SLAB]
        return os.pread(slab.fd, self.slot_bytes, slot % SLOTS_PER_SLAB * self.slot_bytes)

    def write(self, slot: int, data: bytes) -> None:
        slab = self.slabs[slot // SLOTS_PER_SLAB]
        os.pwrite(slab.fd, data, slot % SLOTS_PER_SLAB * self.slot_bytes)

    def bump(self, slot: int) -> None:
        self.slabs[slot // SLOTS_PER_SLAB].table.bump(slot % SLOTS_PER_SLAB)


@dataclass
class FakeLoad:
    """A lease whose blocks from `ready` on are not in memory: their bytes are kept here until they land."""

    lease: int
    space: FakeNamespace
    slots: list[int]
    away: dict[int, bytes]
    tokens: set[bytes]
    ready: int
    total: int


class FakeDaemon:
    """Attributes that tests read or set (through `run` while it serves):

    requests: every request answered, in order, with its session's token.
    fail: verb -> the error to answer instead.
    unmappable: slab serials that a map request is refused for.
    capacity: slots per namespace.
    ready_max: of a lease only so many blocks are in memory; the bytes of the others are taken away until `land`.
    early: progress (ready, total) told about each pending lease before its reply is sent.
    before_map: called before a map request is answered, and then forgotten.
    checksums: block hash -> what `acquire` tells of it; a commit that brings checksums writes them here.
    persists: what PERSIST answers, one after the other, the last for ever.
    hanging: answer nothing, though connections stay open.
    """

    def __init__(self, *, capacity: int = 64, max_hashes: int = m.HASHES_MAX) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forebay-fake-")
        self.runtime_dir = Path(self._folder.name) / "run"
        self.capacity = capacity
        self.max_hashes = max_hashes
        self.requests: list[tuple[bytes, m.Request]] = []
        self.fail: dict[m.Verb, ForebayError] = {}
        self.unmappable: set[int] = set()
        self.writable = True
        self.hanging = False
        self.ready_max = m.HASHES_MAX
        self.early: tuple[int, int] | None = None
        self.before_map: Callable[[], object] | None = None
        self.checksums: dict[bytes, int] = {}
        self.persists = [m.PersistReply(0, 0)]
        self.reports: list[m.ReportRequest] = []
        self.pinned: list[m.PinnedRequest] = []
        self.worth: int | None = None
        self.soft_us = 0
        self.backlogs: list[tuple[int, int]] = []
        """So many leading blocks are advised for loading at most."""
        self.sessions_seen = 0
        self._removals: dict[int, tuple[list[bytes], int, int]] = {}
        self._tasks: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    # Life

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.stop()
        self._folder.cleanup()

    def start(self) -> None:
        """Begin a life: new boot id, nothing stored."""
        self._boot_id = secrets.token_bytes(m.BOOT_ID_BYTES)
        self._namespaces: dict[int, FakeNamespace] = {}
        self._leases: dict[int, tuple[bytes, FakeNamespace, list[bytes]]] = {}
        self._reservations: dict[int, tuple[bytes, FakeNamespace, list[bytes]]] = {}
        self._loads: dict[int, FakeLoad] = {}
        self._by_fd: dict[int, SessionPeer] = {}
        self._next_id = 1
        places = paths.prepare(self.runtime_dir)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._server = ControlServer(places.control)
        self._listener = SessionListener(places.session, sessions_max=64)
        self._thread = threading.Thread(target=self._serve, name="fake-daemon")
        self._thread.start()

    def stop(self) -> None:
        """End as by SIGKILL: sockets close, nobody is told."""
        if self._thread.is_alive():
            self._tasks.put(None)
            os.eventfd_write(self._wake, 1)
            self._thread.join(POLL_MS / 1000)
            assert not self._thread.is_alive()
            os.close(self._wake)

    def restart(self) -> None:
        self.stop()
        self.hanging = False
        self.start()

    def run(self, task: Callable[[], T]) -> T:
        """Execute on the daemon's thread, between two requests, and return the result."""
        done: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._tasks.put(lambda: done.put(task()))
        os.eventfd_write(self._wake, 1)
        return done.get(timeout=POLL_MS / 1000)

    # Asking it, from tests

    def namespace(self) -> FakeNamespace:
        """The only namespace there is."""
        (only,) = self._namespaces.values()
        return only

    def held(self) -> tuple[int, int]:
        """Leases and reservations that are open; waits for what was sent before."""
        return self.run(lambda: (len(self._leases), len(self._reservations)))

    def sent(self, verb: m.Verb) -> int:
        """How many requests of a kind were answered."""
        return self.run(lambda: sum(request.verb == verb for _, request in self.requests))

    def retire(self, slab: int) -> None:
        """Take a slab back: its blocks are gone, every generation moves on, all sessions are told."""

        def task() -> None:
            space = self.namespace()
            space.slabs[slab].table.bump_all()
            gone = [name for name, slot in space.blocks.items() if slot // SLOTS_PER_SLAB == slab]
            for name in gone:
                del space.blocks[name]
            for peer in self._by_fd.values():
                peer.send(0, Retired(space.ns, slab))

        self.run(task)

    def loading(self) -> list[int]:
        """Leases that have not been read to their end, oldest first."""
        return self.run(lambda: list(self._loads))

    def land(self, ready: int, total: int | None = None, *, lease: int | None = None) -> None:
        """The leading `ready` blocks of a pending lease (the newest) are in memory; with `total` the rest is lost."""
        self.run(lambda: self._land(ready, total, lease))

    def _land(self, ready: int, total: int | None = None, lease: int | None = None) -> None:
        """`land`, on the daemon's own thread."""
        load = self._loads[max(self._loads) if lease is None else lease]
        load.ready, load.total = ready, load.total if total is None else total
        for slot in load.slots[:ready]:
            load.space.write(slot, load.away.pop(slot, b""))
        for slot in load.slots[load.total :]:
            load.space.bump(slot)
        if load.ready >= load.total:
            del self._loads[load.lease]
        self._tell(load)

    def _tell(self, load: FakeLoad) -> None:
        for peer in self._by_fd.values():
            if peer.token in load.tokens:
                peer.send(0, Ready(load.lease, load.ready, load.total))

    # Serving

    def _serve(self) -> None:
        try:
            while self._turn():
                pass
        finally:
            for peer in list(self._by_fd.values()):
                peer.close()
            self._by_fd.clear()
            self._listener.close()
            self._server.close()
            for space in self._namespaces.values():
                for slab in space.slabs.values():
                    slab.table.close()
                    os.close(slab.fd)

    def _turn(self) -> bool:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        if not self.hanging:
            poller.register(self._server.socket, zmq.POLLIN)
            for fd in (self._listener.fileno(), *self._by_fd):
                poller.register(fd, zmq.POLLIN)
        ready = dict(poller.poll(POLL_MS))
        if not self.hanging:
            self._serve_sessions(ready)
            while (message := self._server.receive()) is not None:
                self._server.send(message[0], self._reply(message[1]))
        return self._run_tasks() if self._wake in ready else True

    def _run_tasks(self) -> bool:
        os.eventfd_read(self._wake)
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is None:
                return False
            task()
        return True

    def _serve_sessions(self, ready: dict[Any, int]) -> None:
        while (peer := self._listener.accept(0.0)) is not None:
            self._by_fd[peer.fileno()] = peer
        for fd in [fd for fd in self._by_fd if fd in ready]:
            peer = self._by_fd[fd]
            try:
                while (packet := peer.receive()) is not None:
                    self._serve_packet(peer, *packet)
            except PeerLost:
                self._forget(self._by_fd.pop(fd))

    def _forget(self, peer: SessionPeer) -> None:
        for grants in (self._leases, self._reservations):
            for number in [number for number, grant in grants.items() if grant[0] == peer.token]:
                del grants[number]
                self._loads.pop(number, None)
        peer.close()

    def _serve_packet(self, peer: SessionPeer, packet_id: int, packet: Hello | MapSlab | Release) -> None:
        if isinstance(packet, Hello):
            peer.welcome(self._boot_id, m.MESSAGE_BYTES_MAX, self.max_hashes)
            self.sessions_seen += 1
            return
        if isinstance(packet, Release):
            self.requests.append((peer.token, m.ReleaseRequest(packet.lease)))
            self._leases.pop(packet.lease, None)
            self._loads.pop(packet.lease, None)
            return
        if self.before_map is not None:
            before, self.before_map = self.before_map, None
            before()
        space = self._namespaces.get(packet.ns)
        if space is None or packet.slab in self.unmappable or packet.slab not in space.slabs:
            peer.refuse(packet_id, BadRequest(f"no slab {packet.slab}"))
            return
        slab = space.slabs[packet.slab]
        slot = space.slot_bytes
        shape = SlabMap(packet.ns, packet.slab, SLOTS_PER_SLAB * slot, slot, SLOTS_PER_SLAB, self.writable)
        peer.send(packet_id, shape, (slab.fd, slab.table.fd))

    def _reply(self, payload: bytes) -> bytes:
        envelope = decode_request(payload)
        token = envelope.session_token
        self.requests.append((token, envelope.request))
        try:
            if envelope.verb in self.fail:
                raise self.fail[envelope.verb]
            known = any(peer.token == token for peer in self._by_fd.values())
            if not known and envelope.verb != m.Verb.PING:
                raise UnknownSession("no such session")
            answer: Callable[[bytes, Any], m.Reply] = getattr(self, f"_{envelope.verb.name.lower()}")
            return encode_reply(envelope.request_id, self._boot_id, answer(token, envelope.request))
        except ForebayError as error:
            return encode_error(envelope.request_id, self._boot_id, error)

    # Verbs

    def _hashes(self, request: Any) -> tuple[FakeNamespace, list[bytes]]:
        space = self._namespaces.get(request.ns)
        if space is None:
            raise UnknownNamespace(f"no namespace {request.ns}")
        return space, m.split_hashes(request.blob, space.spec.hash_bytes, self.max_hashes)

    def _new_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def _ping(self, token: bytes, request: m.PingRequest) -> m.Reply:
        return m.PingReply()

    def _open_namespace(self, token: bytes, request: m.OpenNamespaceRequest) -> m.Reply:
        for space in self._namespaces.values():
            if space.spec.merged() == request.spec.merged():
                return self._geometry(space, m.OpenNamespaceReply)
        slot_bytes = -(-request.spec.block_bytes // 4096) * 4096
        space = FakeNamespace(self._new_id(), request.spec, slot_bytes)
        self._namespaces[space.ns] = space
        return self._geometry(space, m.OpenNamespaceReply)

    def _find_namespace(self, token: bytes, request: m.FindNamespaceRequest) -> m.Reply:
        for space in self._namespaces.values():
            if space.spec.group_fingerprint().startswith(request.fingerprint_prefix):
                return self._geometry(space, m.FindNamespaceReply)
        raise UnknownNamespace("none begins like that")

    def _geometry(self, space: FakeNamespace, kind: type[m.OpenNamespaceReply]) -> m.Reply:
        spec = space.spec
        shape = (spec.block_bytes, space.slot_bytes, SLOTS_PER_SLAB, spec.hash_bytes, spec.block_tokens)
        return kind(space.ns, spec.group_fingerprint(), *shape)

    def _lookup(self, token: bytes, request: m.LookupRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        self.backlogs.append((request.waiting_requests, request.waiting_tokens))
        blocks = len(space.leading(hashes))
        worth = blocks if self.worth is None else min(blocks, self.worth)
        advice = ("load" if worth else "recompute") if blocks else ""
        return m.LookupReply(blocks, (("host", blocks),) if blocks else (), 0, advice, worth)

    def _slots(self, space: FakeNamespace, names: list[bytes], where: dict[bytes, int]) -> tuple[bytes, bytes]:
        slots = [where[name] for name in names]
        return m.join_u64(slots), m.join_u64(map(space.generation, slots))

    def _acquire(self, token: bytes, request: m.AcquireRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        names = space.leading(hashes)
        if not names:
            return m.AcquireReply(0, b"", b"", 0, b"")
        lease = self._new_id()
        self._leases[lease] = (token, space, names)
        load = self._load(lease, token, space, [space.blocks[name] for name in names])
        ready = load.ready
        if ready < load.total:
            self._loads[lease] = load
            if self.early is not None:
                self._land(*self.early, lease)
        return m.AcquireReply(lease, *self._slots(space, names, space.blocks), ready, self._sums(names), self.soft_us)

    def _load(self, lease: int, token: bytes, space: FakeNamespace, slots: list[int]) -> FakeLoad:
        """Take away the bytes of what is not to be ready."""
        ready = min(self.ready_max, len(slots))
        away = {slot: space.read(slot) for slot in slots[ready:]}
        for slot in away:
            space.write(slot, bytes(space.slot_bytes))
        return FakeLoad(lease, space, slots, away, {token}, ready, len(slots))

    def _sums(self, names: list[bytes]) -> bytes:
        """Checksums of the blocks, or nothing when none is known."""
        sums = [self.checksums.get(name, 0) for name in names]
        return m.join_u64(sums) if any(sums) else b""

    def _resolve(self, token: bytes, request: m.ResolveRequest) -> m.Reply:
        if request.lease not in self._leases:
            raise NotLeased("no such lease")
        _, space, names = self._leases[request.lease]
        load = self._loads.get(request.lease)
        if load is not None:
            load.tokens.add(token)
        ready = len(names) if load is None else load.ready
        return m.ResolveReply(*self._slots(space, names, space.blocks), ready, self._sums(names))

    def _release(self, token: bytes, request: m.ReleaseRequest) -> m.Reply:
        if self._leases.get(request.lease, (b"",))[0] != token:
            raise NotLeased("no such lease")
        del self._leases[request.lease]
        self._loads.pop(request.lease, None)
        return m.ReleaseReply()

    def _reserve(self, token: bytes, request: m.ReserveRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        outcomes, names = bytearray(), []
        above = not request.parent or request.parent in space.blocks or request.parent in space.writing
        for name in hashes:
            if not above:
                outcomes.append(Outcome.ORPHAN)
            elif name in space.blocks:
                outcomes.append(Outcome.PRESENT)
            elif name in space.writing:
                outcomes.append(Outcome.IN_FLIGHT)
            elif space.next_slot >= self.capacity:
                outcomes.append(Outcome.FULL)
            else:
                outcomes.append(Outcome.WRITE)
                names.append(name)
                space.writing[name] = self._next_slot(space)
        if not names:
            return m.ReserveReply(0, bytes(outcomes), b"", b"")
        reservation = self._new_id()
        self._reservations[reservation] = (token, space, names)
        return m.ReserveReply(reservation, bytes(outcomes), *self._slots(space, names, space.writing))

    def _next_slot(self, space: FakeNamespace) -> int:
        slot = space.next_slot
        space.next_slot += 1
        if slot // SLOTS_PER_SLAB not in space.slabs:
            fd = create_memfd("fake-slab", SLOTS_PER_SLAB * space.slot_bytes)
            space.slabs[slot // SLOTS_PER_SLAB] = FakeSlab(fd, GenerationTable(SLOTS_PER_SLAB))
        space.bump(slot)
        return slot

    def _commit(self, token: bytes, request: m.CommitRequest) -> m.Reply:
        if self._reservations.get(request.reservation, (b"",))[0] != token:
            raise NotLeased("no such reservation")
        _, space, names = self._reservations.pop(request.reservation)
        failed = set(m.split_u32(request.failed))
        for index, name in enumerate(names):
            slot = space.writing.pop(name)
            if index not in failed:
                space.blocks[name] = slot
        sums = m.split_u64(request.checksums)
        self.checksums |= {name: each for name, each in zip(names, sums, strict=bool(sums)) if each}
        return m.CommitReply(len(names) - len(failed))

    def _abort(self, token: bytes, request: m.AbortRequest) -> m.Reply:
        if self._reservations.get(request.reservation, (b"",))[0] != token:
            raise NotLeased("no such reservation")
        _, space, names = self._reservations.pop(request.reservation)
        for name in names:
            del space.writing[name]
        return m.AbortReply()

    def _pin(self, token: bytes, request: m.PinRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        names = space.leading(hashes)
        space.pinned.update(names)
        return m.PinReply(len(names))

    def _unpin(self, token: bytes, request: m.UnpinRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        names = space.pinned.intersection(hashes)
        space.pinned -= names
        return m.UnpinReply(len(names))

    def _evict(self, token: bytes, request: m.EvictRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        if request.resume:
            names, removed, kept = self._removals.pop(request.resume)
        else:
            wanted = list(space.blocks) if request.scope == m.EvictScope.NAMESPACE else hashes
            names, removed, kept = [name for name in dict.fromkeys(wanted) if name in space.blocks], 0, 0
        for name in names[:REMOVED_AT_ONCE]:
            removed, kept = removed + (name not in space.pinned), kept + (name in space.pinned)
            if name not in space.pinned and not request.dry_run:
                space.bump(space.blocks.pop(name))
        more = self._new_id() if len(names) > REMOVED_AT_ONCE else 0
        if more:
            self._removals[more] = names[REMOVED_AT_ONCE:], removed, kept
        return m.EvictReply(removed, kept, more)

    def _touch(self, token: bytes, request: m.TouchRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        return m.TouchReply(len(space.leading(hashes)))

    def _done(self, token: bytes, request: m.DoneRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        return m.DoneReply(len(space.leading(hashes)[request.keep :]))

    def _expect(self, token: bytes, request: m.ExpectRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        return m.ExpectReply(len(space.leading(hashes)))

    def _stopped(self, token: bytes, request: m.StoppedRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        return m.StoppedReply(len(space.leading(hashes)))

    def _prefetch(self, token: bytes, request: m.PrefetchRequest) -> m.Reply:
        space, hashes = self._hashes(request)
        return m.PrefetchReply(len(space.leading(hashes)), 0)

    def _status(self, token: bytes, request: m.StatusRequest) -> m.Reply:
        return m.StatusReply('{"ready": true}')

    def _check(self, token: bytes, request: m.CheckRequest) -> m.Reply:
        return m.CheckReply(())

    def _clear(self, token: bytes, request: m.ClearRequest) -> m.Reply:
        removed = sum(len(space.blocks) for space in self._namespaces.values())
        if not request.dry_run:
            for space in self._namespaces.values():
                space.blocks.clear()
        return m.ClearReply(removed, 0)

    def _pinned(self, token: bytes, request: m.PinnedRequest) -> m.Reply:
        self.pinned.append(request)
        return m.PinnedReply()

    def _report(self, token: bytes, request: m.ReportRequest) -> m.Reply:
        self.reports.append(request)
        return m.ReportReply()

    def _persist(self, token: bytes, request: m.PersistRequest) -> m.Reply:
        self._hashes(request)
        return self.persists.pop(0) if len(self.persists) > 1 else self.persists[0]
