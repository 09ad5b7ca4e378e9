"""The clients that are attached: greeting, slab descriptors, notices, and what their death sets off.

One SEQPACKET connection is one session of the store; its end of file ends the session. Owned by the owner thread,
which polls one epoll descriptor for the listener and all peers.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from forebay.daemon.control_link import CLIENT_NAME as TOOL_NAME
from forebay.daemon.live_slabs import LiveSlabs
from forebay.daemon.logging import fields
from forebay.kvstore.errors import Forbidden, ForebayError, NotLeased, PeerLost
from forebay.kvstore.groups import HOST, LeaseProgress, SlabRetired
from forebay.kvstore.store import Store
from forebay.transports.codec import request_id_of
from forebay.transports.packets import Hello, MapSlab, Ready, Release, Retired, SlabMap
from forebay.transports.session import SessionListener, SessionPeer

log = logging.getLogger(__name__)

_ACCEPTS_PER_TURN = 64
_PACKETS_PER_TURN = 16


@dataclass(slots=True)
class _Attached:
    peer: SessionPeer
    session_id: int = 0
    """0 until the client has greeted."""
    log_level: int = logging.INFO
    """Tools come and go, a health check every few seconds."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """What a client is told when it attaches."""

    boot_id: bytes
    message_bytes_max: int
    hashes_max: int


class Sessions:
    """Attached clients, by descriptor and by token.

    Args:
        carry_out: called after the store was told of a death, to publish what it freed.
    """

    def __init__(
        self,
        listener: SessionListener,
        store: Store,
        memory: LiveSlabs,
        greeting: Greeting,
        operator_uids: Iterable[int],
        carry_out: Callable[[], None],
    ) -> None:
        self.listener = listener
        self.epoll = select.epoll()
        self.epoll.register(listener.fileno(), select.EPOLLIN)
        self.refused: dict[str, int] = {}
        self._store = store
        self._memory = memory
        self._greeting = greeting
        self._operator_uids = frozenset(operator_uids)
        self._carry_out = carry_out
        self._by_fd: dict[int, _Attached] = {}
        self._by_token: dict[bytes, int] = {}
        self._peers: dict[int, SessionPeer] = {}
        self._next_id = 1

    def session_of(self, token: bytes) -> int:
        """The session a token names, 0 when none."""
        return self._by_token.get(token, 0)

    def serve(self, fd: int, events: int, now: float) -> None:
        """A descriptor of `epoll` is ready. Whatever goes wrong with one client costs that client alone."""
        attached = self._by_fd.get(fd)
        try:
            if fd == self.listener.fileno():
                self._accept(now)
            elif attached is not None:
                self._serve_peer(attached, events)
        except Exception:
            log.exception("a client could not be served", extra=fields(fd=fd))
            if attached is not None and self._by_fd.get(fd) is attached:
                self._count_refused("Internal")
                self._detach(attached, "an error of the daemon's")

    def expire_greetings(self, now: float) -> None:
        """Hang up on those who connected and said nothing."""
        late = [a for a in self._by_fd.values() if a.peer.hello_deadline is not None and a.peer.hello_deadline <= now]
        for attached in late:
            self._count_refused("NoGreeting")
            self._detach(attached, "no greeting")

    def tell_retired(self, retired: Iterable[SlabRetired]) -> None:
        """Tell everybody who may map these slabs to drop them."""
        for event in retired:
            for session_id in self._store.sessions_of(event.ns):
                peer = self._peers.get(session_id)
                if peer is not None:
                    self._send_notice(peer, Retired(event.ns, event.slab))

    def tell_progress(self, progress: Iterable[LeaseProgress]) -> None:
        """Tell readers how much of what they leased has come to memory."""
        for each in progress:
            peer = self._peers.get(each.session_id)
            if peer is not None:
                self._send_notice(peer, Ready(each.lease_id, each.ready, each.total))

    def close(self) -> None:
        """End every session and stop listening."""
        for attached in list(self._by_fd.values()):
            self._detach(attached, "the daemon stops")
        self.listener.close()
        self.epoll.close()

    def _accept(self, now: float) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            refused = self.listener.refused
            peer = self.listener.accept(now)
            if self.listener.refused > refused:
                self._count_refused("NotAccepted", self.listener.refused - refused)
            if peer is None:
                return
            self._by_fd[peer.fileno()] = _Attached(peer)
            self.epoll.register(peer.fileno(), select.EPOLLIN)

    def _serve_peer(self, attached: _Attached, events: int) -> None:
        try:
            if events & select.EPOLLOUT and attached.peer.flush():
                self.epoll.modify(attached.peer.fileno(), select.EPOLLIN)
            for _ in range(_PACKETS_PER_TURN):
                received = attached.peer.receive()
                if received is None:
                    break
                self._serve_packet(attached, *received)
        except PeerLost as error:
            self._detach(attached, str(error))
            return
        except ForebayError as error:
            self._count_refused(type(error).__name__)
            attached.peer.refuse(request_id_of(error), error)
            self._detach(attached, str(error))
            return
        self._watch_outbox(attached.peer)

    def _serve_packet(self, attached: _Attached, packet_id: int, packet: Hello | MapSlab | Release) -> None:
        if isinstance(packet, Hello):
            self._welcome(attached, packet_id, packet)
            return
        if isinstance(packet, Release):
            self._release(attached, packet)
            return
        try:
            self._send_slab(attached, packet_id, packet)
        except PeerLost:
            raise
        except ForebayError as error:
            attached.peer.refuse(packet_id, error)

    def _welcome(self, attached: _Attached, packet_id: int, hello: Hello) -> None:
        session_id, peer = self._next_id, attached.peer
        operator = peer.uid in self._operator_uids
        self._store.open_session(session_id, peer.uid, hello.client_group, operator=operator)
        self._next_id += 1
        attached.session_id = session_id
        self._peers[session_id] = peer
        greeting = self._greeting
        token = peer.welcome(greeting.boot_id, greeting.message_bytes_max, greeting.hashes_max, packet_id)
        self._by_token[token] = session_id
        attached.log_level = logging.DEBUG if hello.client_name == TOOL_NAME else logging.INFO
        named = fields(session=session_id, pid=peer.pid, uid=peer.uid, client=hello.client_name)
        log.log(attached.log_level, "client attached", extra=named)

    def _release(self, attached: _Attached, packet: Release) -> None:
        try:
            self._store.release(attached.session_id, packet.lease)
        except NotLeased as error:  # it ran out by the clock, which its holder will have noticed
            log.debug("late release", extra=fields(session=attached.session_id, error=error))

    def _send_slab(self, attached: _Attached, packet_id: int, packet: MapSlab) -> None:
        shard, slab = self._store.slab(attached.session_id, packet.ns, packet.slab)
        if shard.group.uid != attached.peer.uid:
            raise Forbidden(f"namespace {packet.ns} belongs to another user")
        shape = SlabMap(
            packet.ns,
            slab.serial,
            self._store.tiers[HOST].slab_bytes,
            shard.slots.slot_bytes,
            shard.slots.slots_per_slab,
            True,
        )
        attached.peer.send(packet_id, shape, self._memory.handles(packet.ns, packet.slab))

    def _send_notice(self, peer: SessionPeer, notice: Retired | Ready) -> None:
        try:
            peer.send(0, notice)
        except ForebayError as error:
            # Gone, or it left thousands of packets unread. The generations were bumped, so it fails safe meanwhile.
            self._detach(self._by_fd[peer.fileno()], str(error))
            return
        self._watch_outbox(peer)

    def _watch_outbox(self, peer: SessionPeer) -> None:
        if peer.wants_write and peer.fileno() in self._by_fd:
            self.epoll.modify(peer.fileno(), select.EPOLLOUT)  # until it has read, it is not read from

    def _detach(self, attached: _Attached, reason: str) -> None:
        peer, session_id = attached.peer, attached.session_id
        del self._by_fd[peer.fileno()]
        self.epoll.unregister(peer.fileno())
        self._by_token.pop(peer.token, None)
        peer.close()
        if session_id:
            del self._peers[session_id]
            self._store.close_session(session_id)
            self._carry_out()
            named = fields(session=session_id, pid=peer.pid, reason=reason)
            log.log(attached.log_level, "client detached", extra=named)

    def _count_refused(self, name: str, count: int = 1) -> None:
        self.refused[name] = self.refused.get(name, 0) + count
