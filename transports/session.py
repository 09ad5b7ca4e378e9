"""The session socket: one SOCK_SEQPACKET connection per client, for what ZeroMQ cannot do.

It proves who the client is (SO_PEERCRED), hands over slabs as file descriptors, and its end of file is the
client's death, seen within a millisecond. Packets keep their borders, so there is no framing and no partial
read. The daemon's side never blocks: what a slow client does not take waits in a bounded outbox, and nothing
more is read from that client until it is empty. The client's side waits, always with a deadline.
"""

from __future__ import annotations

import array
import errno
import os
import secrets
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from forebay.kvstore.errors import (
    BadRequest,
    Busy,
    Forbidden,
    ForebayError,
    Internal,
    PeerLost,
    Timeout,
    VersionMismatch,
    from_code,
)
from forebay.transports import paths
from forebay.transports.codec import decode_packet, encode_packet
from forebay.transports.messages import PROTOCOL_VERSION, TEXT_CHARS_MAX, TOKEN_BYTES
from forebay.transports.packets import (
    FDS_MAX,
    PACKET_BYTES_MAX,
    Hello,
    MapSlab,
    Packet,
    Ready,
    Refusal,
    Release,
    Retired,
    SlabMap,
    Welcome,
)

HELLO_S = 2.0
OUTBOX_PACKETS_MAX = 4096

_BACKLOG = 128
_ACCEPTS_PER_CALL = 64
_CREDENTIALS = struct.Struct("3i")
_FDS_SPACE = socket.CMSG_SPACE(FDS_MAX * array.array("i").itemsize)
_OUT_OF_FDS = (errno.EMFILE, errno.ENFILE)
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL


# --- the daemon's side --------------------------------------------------------------------------------------


class SessionListener:
    """Accepts clients of the allowed user ids, at most `sessions_max` at a time; refuses the rest with a code.

    Non-blocking; owned by one thread. `fileno` is readable when `accept` has something to do.
    """

    def __init__(
        self,
        path: Path,
        *,
        sessions_max: int,
        allowed_uids: Collection[int] = (),
        hello_s: float = HELLO_S,
        mode: int = paths.SOCKET_MODE,
    ) -> None:
        """Listen at `path`; the caller holds the runtime directory's lock. Raises OSError, BadRequest."""
        self._socket = paths.listen_at(path, socket.SOCK_SEQPACKET, _BACKLOG, mode)
        self._path = path
        self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._allowed_uids = frozenset({os.geteuid(), *allowed_uids})
        self._sessions_max = sessions_max
        self._hello_s = hello_s
        self.sessions = 0
        self.refused = 0

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self, now: float) -> SessionPeer | None:
        """The next welcome peer, or None when nobody (more) waits; call until None. Refusals are counted."""
        for _ in range(_ACCEPTS_PER_CALL):
            connection = self._accept()
            if connection is None:
                return None
            pid, uid, gid = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            peer = SessionPeer(connection, pid, uid, gid, now + self._hello_s, self._forget)
            self.sessions += 1
            if uid not in self._allowed_uids:
                self._refuse(peer, Forbidden(f"uid {uid} may not use this daemon"))
            elif self.sessions > self._sessions_max:
                self._refuse(peer, Busy(f"{self._sessions_max} sessions are open, the configured limit"))
            else:
                return peer
        return None

    def close(self) -> None:
        """Stop listening and remove the path; peers stay. The caller still holds the lock. Idempotent."""
        if self._socket.fileno() >= 0:
            self._path.unlink(missing_ok=True)
        self._socket.close()
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1

    def _accept(self) -> socket.socket | None:
        try:
            connection, _ = self._socket.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return None
        except OSError as error:
            if error.errno not in _OUT_OF_FDS:
                raise
            self._shed()
            return None
        connection.setblocking(False)
        return connection

    def _shed(self) -> None:
        """Out of descriptors: hang up on one waiting client, so that the listener does not stay readable."""
        self.refused += 1
        if self._spare_fd >= 0:
            os.close(self._spare_fd)
            self._spare_fd = -1
        try:
            self._socket.accept()[0].close()
        except OSError:
            return  # somebody else took the descriptor; the next call tries again
        finally:
            try:
                self._spare_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                self._spare_fd = -1

    def _refuse(self, peer: SessionPeer, error: ForebayError) -> None:
        self.refused += 1
        peer.refuse(1, error)
        peer.close()

    def _forget(self) -> None:
        self.sessions -= 1


class SessionPeer:
    """One client as the daemon sees it. Non-blocking; owned by the daemon's owner thread.

    Attributes:
        pid, uid, gid: the client's credentials when it connected, from the kernel.
        token: names the session in requests; empty until `welcome`.
        hello: the client's greeting, None before it came.
        hello_deadline: the time after which a peer without a greeting is to be closed; None once welcome.
    """

    __slots__ = (
        "_on_close",
        "_outbox",
        "_socket",
        "gid",
        "hello",
        "hello_deadline",
        "pid",
        "token",
        "uid",
    )

    def __init__(
        self,
        connection: socket.socket,
        pid: int,
        uid: int,
        gid: int,
        hello_deadline: float,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._socket = connection
        self._on_close = on_close
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self.pid = pid
        self.uid = uid
        self.gid = gid
        self.token = b""
        self.hello: Hello | None = None
        self.hello_deadline: float | None = hello_deadline

    def fileno(self) -> int:
        """The connection's descriptor; -1 after `close`."""
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether packets wait for the client to read; poll for writable then, and call `flush`."""
        return bool(self._outbox)

    def receive(self) -> tuple[int, Hello | MapSlab | Release] | None:
        """The next packet with its id, or None when there is none (or the client has not read its answers yet).

        Descriptors that a client sends are thrown away by the kernel. Raises PeerLost when the client is gone,
        BadRequest or VersionMismatch (`codec.request_id_of`) for what makes no sense; the session is then to be
        refused and closed.
        """
        if self._outbox:
            return None
        try:
            payload = self._socket.recv(PACKET_BYTES_MAX + 1)
        except (BlockingIOError, InterruptedError):
            return None
        except OSError as error:
            raise PeerLost(f"session of process {self.pid}: {error.strerror}") from error
        if not payload:
            raise PeerLost(f"session of process {self.pid} ended")
        packet_id, packet = decode_packet(payload)
        if isinstance(packet, Hello) and self.hello is None:
            if packet.protocol_version != PROTOCOL_VERSION:
                raise VersionMismatch(f"this daemon speaks protocol version {PROTOCOL_VERSION}")
            self.hello = packet
            return packet_id, packet
        if self.token and isinstance(packet, MapSlab if packet_id else Release):
            return packet_id, packet
        raise BadRequest(f"packet {packet.kind!r} is out of place")

    def welcome(self, boot_id: bytes, max_message_bytes: int, max_hashes: int, packet_id: int = 1) -> bytes:
        """Answer the greeting; returns the session's new token, 16 unguessable bytes."""
        token = secrets.token_bytes(TOKEN_BYTES)
        self.send(packet_id, Welcome(PROTOCOL_VERSION, token, boot_id, max_message_bytes, max_hashes))
        self.token = token
        self.hello_deadline = None
        return token

    def send(self, packet_id: int, packet: Packet, fds: Sequence[int] = ()) -> None:
        """Send, or keep for `flush`, a packet and duplicates of `fds`; the caller keeps its own descriptors.

        Raises PeerLost when the client is gone and Busy when too much waits for it, in packets or in descriptors.
        """
        payload = encode_packet(packet_id, packet)
        if not self._outbox and self._try_send(payload, fds):
            return
        if len(self._outbox) >= OUTBOX_PACKETS_MAX:
            raise Busy(f"process {self.pid} does not read its session socket")
        self._outbox.append((payload, _duplicate_all(fds)))

    def refuse(self, packet_id: int, error: ForebayError) -> None:
        """Send an error's code and text; never raises. When closing right after: only if the client can take it now."""
        text = str(error)[:TEXT_CHARS_MAX].encode("utf-8", "replace").decode()
        try:
            self.send(packet_id, Refusal(error.code or Internal.code, text))
        except (PeerLost, Busy):
            return  # it will not miss the answer

    def flush(self) -> bool:
        """Send what waits; True when nothing is left. Raises PeerLost."""
        while self._outbox:
            payload, fds = self._outbox[0]
            if not self._try_send(payload, fds):
                return False
            self._outbox.popleft()
            _close_all(fds)
        return True

    def close(self) -> None:
        """End the session; idempotent."""
        if self._socket.fileno() < 0:
            return
        self._socket.close()
        while self._outbox:
            _close_all(self._outbox.popleft()[1])
        if self._on_close is not None:
            self._on_close()

    def _try_send(self, payload: bytes, fds: Sequence[int]) -> bool:
        try:
            _send(self._socket, payload, fds, _SEND_FLAGS)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                return False
            if error.errno == errno.ETOOMANYREFS:  # the socket is writable all the while: waiting would be a spin
                raise Busy(f"process {self.pid} leaves too many descriptors unread") from error
            raise PeerLost(f"session of process {self.pid}: {error.strerror}") from error
        return True


# --- the client's side --------------------------------------------------------------------------------------


Notice: TypeAlias = Retired | Ready
"""What the daemon tells without being asked."""


@dataclass(frozen=True, slots=True)
class MappedSlab:
    """A slab's descriptors, owned by the receiver: map them, then `close_fds`."""

    shape: SlabMap
    slab_fd: int
    table_fd: int

    def close_fds(self) -> None:
        _close_all((self.slab_fd, self.table_fd))


class SessionClient:
    """A client's session. Every wait has a deadline (`time.monotonic` seconds); for one thread at a time.

    A forked child does not have the session: its copy of the descriptor is closed right after the fork, or the
    daemon would not see the parent's death while the child lives.
    """

    def __init__(self, connection: socket.socket) -> None:
        """Wrap a connected socket that has not greeted; use `connect`."""
        self._socket = connection
        self._notices: list[Notice] = []
        self._next_id = 2
        self._lost = False
        self.welcome = Welcome(0, bytes(TOKEN_BYTES), bytes(16), 1, 1)
        _live.add(self)

    @classmethod
    def connect(cls, path: Path, client_name: str, client_group: bytes = b"", *, deadline: float) -> SessionClient:
        """Connect and greet. Raises PeerLost when nobody listens, Timeout, or what the daemon refused with."""
        paths.check_socket_path(path)
        hello = encode_packet(1, Hello(PROTOCOL_VERSION, client_name, client_group))
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        session = cls(connection)
        try:
            connection.settimeout(_remaining(deadline))
            connection.connect(str(path))
            session._greet(hello, deadline)
        except BlockingIOError:
            session.close()
            raise Timeout(f"the daemon's queue at {path} is full") from None
        except TimeoutError:
            session.close()
            raise Timeout(f"no answer at {path}") from None
        except OSError as error:
            session.close()
            raise PeerLost(f"no daemon at {path}: {error.strerror}") from error
        except ForebayError:
            session.close()
            raise
        return session

    def fileno(self) -> int:
        """Readable when `poll_events` has something to tell; -1 when closed."""
        return self._socket.fileno()

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def map_slab(self, ns: int, slab: int, deadline: float) -> MappedSlab:
        """One slab's descriptors; the caller owns them. Raises PeerLost, Timeout, or the daemon's refusal."""
        packet_id = self._next_id
        self._next_id += 1
        self._send(encode_packet(packet_id, MapSlab(ns, slab)), deadline)
        while True:
            answered_id, packet, fds = self._receive(deadline)
            if answered_id != packet_id:
                _close_all(fds)
                self._keep(packet)
                continue
            if isinstance(packet, Refusal):
                _close_all(fds)
                raise from_code(packet.code, packet.text)
            if not isinstance(packet, SlabMap) or (packet.ns, packet.slab) != (ns, slab) or len(fds) != FDS_MAX:
                _close_all(fds)
                raise PeerLost("the daemon answered a map request with something else")
            return MappedSlab(packet, *fds)

    def release(self, lease: int) -> bool:
        """Tell that a lease is over, without waiting; False when that cannot be told this way now."""
        try:
            self._socket.settimeout(0)
            _send(self._socket, encode_packet(0, Release(lease)), (), socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def poll_events(self) -> list[Notice]:
        """Notices that came since the last call, in order; never waits. Raises PeerLost only after the last of them.

        `fileno` does not tell of those that came while `map_slab` waited: call this after it, too.
        """
        while not self._lost:
            try:
                _, packet, fds = self._receive(None)
            except Timeout:
                break
            except PeerLost:
                self._lost = True
            else:
                _close_all(fds)
                self._keep(packet)
        if self._lost and not self._notices:
            raise PeerLost("the daemon ended the session")
        notices, self._notices = self._notices, []
        return notices

    def close(self) -> None:
        """End the session; idempotent."""
        self._socket.close()
        _live.discard(self)

    def close_in_child(self) -> None:
        """Drop a forked child's copy of the descriptor; the parent's session goes on. Done by itself at fork."""
        self._socket.close()

    def _greet(self, hello: bytes, deadline: float) -> None:
        try:
            self._send(hello, deadline)
        except PeerLost:
            pass  # refused before it was read: the reason is waiting
        _, packet, fds = self._receive(deadline)
        _close_all(fds)
        if isinstance(packet, Refusal):
            raise from_code(packet.code, packet.text)
        if not isinstance(packet, Welcome) or packet.protocol_version != PROTOCOL_VERSION:
            raise VersionMismatch("the daemon speaks another protocol version")
        self.welcome = packet

    def _keep(self, packet: Packet) -> None:
        if isinstance(packet, Notice):
            self._notices.append(packet)  # anything else answers a request that ran out of time

    def _send(self, payload: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(_remaining(deadline))
            _send(self._socket, payload, (), socket.MSG_NOSIGNAL)
        except TimeoutError:
            raise Timeout("the daemon does not read the session socket") from None
        except OSError as error:
            raise PeerLost(f"session: {error.strerror}") from error

    def _receive(self, deadline: float | None) -> tuple[int, Packet, list[int]]:
        """The next packet; `deadline` None takes only what is there, and raises Timeout when nothing is."""
        fds: list[int] = []
        try:
            self._socket.settimeout(0 if deadline is None else _remaining(deadline))
            payload, fds = self._receive_once()
            if not payload:
                raise PeerLost("the daemon ended the session")
            return *decode_packet(payload), fds
        except (TimeoutError, BlockingIOError):
            raise Timeout("no answer on the session socket") from None
        except OSError as error:
            raise PeerLost(f"session: {error.strerror}") from error
        except BadRequest as error:
            _close_all(fds)
            raise PeerLost(f"an unreadable packet: {error}") from error

    def _receive_once(self) -> tuple[bytes, list[int]]:
        try:
            return _receive_with_fds(self._socket)
        except ConnectionResetError:  # told once when the daemon closed with something unread; its answer follows
            return _receive_with_fds(self._socket)


_live: weakref.WeakSet[SessionClient] = weakref.WeakSet()


def _close_in_child() -> None:
    for session in list(_live):
        session.close_in_child()
    _live.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _remaining(deadline: float) -> float:
    return max(1e-6, deadline - time.monotonic())


def _send(connection: socket.socket, payload: bytes, fds: Sequence[int], flags: int) -> None:
    beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    connection.sendmsg([payload], beside, flags)


def _receive_with_fds(connection: socket.socket) -> tuple[bytes, list[int]]:
    """One packet and its descriptors, close-on-exec (socket.recv_fds forgets its flags before Python 3.12)."""
    payload, beside, _, _ = connection.recvmsg(PACKET_BYTES_MAX + 1, _FDS_SPACE, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, data in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return payload, list(fds)


def _duplicate_all(fds: Sequence[int]) -> tuple[int, ...]:
    copies: list[int] = []
    try:
        copies.extend(map(os.dup, fds))
    except OSError as error:
        _close_all(copies)
        raise Busy(f"no descriptor to spare: {error.strerror}") from error
    return tuple(copies)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
