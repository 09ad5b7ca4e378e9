"""The control sockets: a ROUTER that the daemon owns, a DEALER per client, both over ``ipc://``.

Neither ever blocks without a deadline. Two traps of libzmq's ipc listener shape the server. It unlinks whatever
path it binds, so it gets a listening socket that we made (ZMQ_USE_FD). And it aborts the whole process when
accept() meets EMFILE; so connections are counted through a socket monitor, and at the limit the path is renamed
away until they have fallen. Unbinding was rejected: it closes every connection that the listener accepted. The
guard cannot be outrun: libzmq waits when its monitor is full, and that holds a few hundred events.

The server waits in recv(), not in a poller, and takes two plain recv() calls, not recv_multipart: a round trip
is worth 45 us, a pass through a poller 10 to 40.
"""

from __future__ import annotations

import math
import os
import resource
import select
import socket
import struct
import time
from pathlib import Path

import zmq

from forebay.kvstore.errors import Busy
from forebay.transports import paths
from forebay.transports.messages import MESSAGE_BYTES_MAX
from forebay.transports.threads import BackgroundThread

CONNECTIONS_MAX = 4096
CONNECTIONS_MIN = 64

_BACKLOG = 64
# A full monitor holds its reader's high-water mark as of connecting plus the one set after, and lets its writer go
# on once (1000 + the latter) / 2 events have been read: the sum must be more than that half.
_MONITOR_HWM = (520, 1)
_LOOKAHEAD = sum(_MONITOR_HWM) + 1 + _BACKLOG + 1
_MONITOR_ADDRESS = "inproc://monitor"
_BELL_ADDRESS = "inproc://bell"
_BELL_JOIN_S = 1.0
_RECEIVE_HWM = 256
_SEND_HWM = 1024
_HANDSHAKE_MS = 1000
_RECONNECT_MS = 10
_RECONNECT_MAX_MS = 500
_MONITOR_EVENTS_PER_CALL = 4096
_MONITOR_EVENT = struct.Struct("=HI")
_MONITORED = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
_MORE = zmq.RCVMORE
_NOBLOCK = zmq.NOBLOCK
_SEND_IDENTITY = zmq.NOBLOCK | zmq.SNDMORE


def raise_descriptor_limit() -> int:
    """Lift the soft limit on open files to the hard one; returns the limit now in force."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return 1 << 20 if limit == resource.RLIM_INFINITY else limit


def connections_within(descriptor_limit: int, reserved: int) -> int:
    """How many connections the control socket may hold when `reserved` descriptors are needed elsewhere.

    Leaves room for as many as libzmq may accept before the guard hears of them. Raises Busy when the limit is
    too low to be safe.
    """
    connections = descriptor_limit - reserved - _LOOKAHEAD
    if connections < CONNECTIONS_MIN:
        needed = reserved + _LOOKAHEAD + CONNECTIONS_MIN
        raise Busy(f"{descriptor_limit} open files are too few, {needed} are needed: raise the limit (ulimit -Hn)")
    return min(CONNECTIONS_MAX, connections)


class ControlServer:
    """The daemon's ROUTER; owned by one thread, which waits in `wait`.

    Call `watch` when `monitor_fd` is readable, or every second.

    Attributes:
        socket: the ROUTER.
        dropped: replies given up because their peer was gone or took nothing.
        connections: connections libzmq holds now, as far as its monitor has told.
        listening: whether newcomers find the path at present; those connected are served in any case.
    """

    def __init__(
        self,
        path: Path,
        *,
        message_bytes_max: int = MESSAGE_BYTES_MAX,
        connections_max: int = CONNECTIONS_MAX,
        mode: int = paths.SOCKET_MODE,
    ) -> None:
        """Listen at `path`; the caller holds the runtime directory's lock. Raises OSError, BadRequest."""
        self._path = path
        self._full_path = path.with_name(path.name + ".full")
        self._connections_max = connections_max
        self._connections_low = max(1, connections_max * 3 // 4)
        self._fds: set[int] = set()
        self._wait_ms = 1000
        self._bell: _Bell | None = None
        self._bell_identity = b""
        self.listening = True
        self.dropped = 0
        self._full_path.unlink(missing_ok=True)
        listener = paths.listen_at(path, socket.SOCK_STREAM, _BACKLOG, mode)
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._set_options(message_bytes_max)
        self._monitor = self._open_monitor()
        self.monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._recv = self.socket.recv
        self._send = super(zmq.Socket, self.socket).send  # without a wrapper for options that are not used here
        self._get = self.socket.getsockopt
        self.socket.setsockopt(zmq.USE_FD, listener.detach())  # libzmq's from here on
        self.socket.bind(f"ipc://{path}")
        self._read_monitor()  # its descriptor signals again only after a reader has found it empty

    @property
    def connections(self) -> int:
        return len(self._fds)

    def receive(self) -> tuple[bytes, bytes] | None:
        """The next request as (identity, payload), or None when there is none; never waits.

        A message of any other number of frames comes with an empty payload, which no codec accepts.
        """
        return self._receive(_NOBLOCK)

    def wait(self, timeout_ms: int) -> tuple[bytes, bytes] | None:
        """As `receive`, but waits up to `timeout_ms`, or until the bell of `ring_on` rings: then None.

        After None, look at everything else there is to do. A loop built on this answers 10 to 40 us a round trip
        sooner than one that finds the queue empty and then goes through a poller; the bell costs the rarer
        events one more thread's wake-up. Time-outs under 10 ms cost a timer interrupt per request.
        """
        if timeout_ms != self._wait_ms:
            self.socket.setsockopt(zmq.RCVTIMEO, timeout_ms)
            self._wait_ms = timeout_ms
        request = self._receive(0)
        if request is not None and request[0] == self._bell_identity:
            return None
        return request

    def ring_on(self, epoll_fd: int) -> None:
        """From here on end `wait` when something becomes ready in an epoll set of the caller's.

        Once per server. Rings once for what is new: after None the caller handles events of its set until a
        poll of it (with no time-out) finds none. The set must outlive the server.
        """
        self.socket.bind(_BELL_ADDRESS)
        self._bell = _Bell(self._context, epoll_fd)
        self._bell_identity = self._bell.identity

    def _receive(self, flags: int) -> tuple[bytes, bytes] | None:
        try:
            identity = self._recv(flags)
            payload = self._recv(_NOBLOCK)  # a message arrives whole
        except zmq.Again:
            return None
        if self._get(_MORE):
            while self._get(_MORE):
                self._recv(_NOBLOCK)
            payload = b""
        return identity, payload

    def send(self, identity: bytes, payload: bytes) -> bool:
        """Send a reply, never waiting; False (and counted) when the peer is gone or its queue is full."""
        try:
            self._send(identity, _SEND_IDENTITY)
            self._send(payload, _NOBLOCK)
        except zmq.ZMQError:  # EHOSTUNREACH: gone. EAGAIN: it does not read. Both lose this reply only
            self.dropped += 1
            return False
        return True

    def watch(self) -> None:
        """Count connections; hide the path at the limit, and show it again when they have fallen by a quarter."""
        self._read_monitor()
        try:
            if self.listening and len(self._fds) >= self._connections_max:
                self._path.rename(self._full_path)
                self.listening = False
            elif not self.listening and len(self._fds) <= self._connections_low:
                self._full_path.rename(self._path)
                self.listening = True
        except FileNotFoundError:
            return  # somebody unlinked the path: nobody new can connect, and those connected are served on

    def close(self) -> None:
        """Close at once, unsent replies included, and remove the path; idempotent."""
        if self.socket.closed:
            return
        (self._path if self.listening else self._full_path).unlink(missing_ok=True)
        if self._bell is not None:
            self._bell.close()
        self._read_monitor()  # its writer would wait for a full monitor, and closing waits for the writer
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)
        self._context.term()

    def _set_options(self, message_bytes_max: int) -> None:
        options = {
            zmq.LINGER: 0,
            zmq.RCVHWM: _RECEIVE_HWM,
            zmq.SNDHWM: _SEND_HWM,
            zmq.MAXMSGSIZE: message_bytes_max,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
            zmq.RCVTIMEO: self._wait_ms,
            zmq.ROUTER_MANDATORY: 1,  # so that a reply to nobody is an error to count, not a silence
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)

    def _open_monitor(self) -> zmq.Socket[bytes]:
        self.socket.monitor(_MONITOR_ADDRESS, _MONITORED)
        monitor: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        monitor.setsockopt(zmq.LINGER, 0)
        monitor.setsockopt(zmq.RCVHWM, _MONITOR_HWM[0])
        monitor.connect(_MONITOR_ADDRESS)
        monitor.setsockopt(zmq.RCVHWM, _MONITOR_HWM[1])
        return monitor

    def _read_monitor(self) -> None:
        for _ in range(_MONITOR_EVENTS_PER_CALL):
            try:
                event, value = _MONITOR_EVENT.unpack(self._monitor.recv(_NOBLOCK))
                self._monitor.recv(_NOBLOCK)
            except zmq.Again:
                return
            if event == zmq.EVENT_ACCEPTED:
                self._fds.add(value)
            else:
                self._fds.discard(value)


class _Bell:
    """A thread that waits on an epoll set and turns its edges into messages to the ROUTER, in process."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], epoll_fd: int) -> None:
        self.identity = b"bell" + os.urandom(12)
        self._dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.LINGER, 0)
        self._dealer.setsockopt(zmq.ROUTING_ID, self.identity)
        self._dealer.connect(_BELL_ADDRESS)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        self._epoll.register(epoll_fd, select.EPOLLIN | select.EPOLLET)
        self._thread = BackgroundThread(self._run, name="forebay-bell")
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(_BELL_JOIN_S)
        self._epoll.close()
        os.close(self._stop_fd)

    def _run(self) -> None:
        while all(fd != self._stop_fd for fd, _ in self._epoll.poll()):
            try:
                self._dealer.send(b"", _NOBLOCK)
            except zmq.Again:
                continue  # as many rings wait as the queue holds: the owner will look
        self._dealer.close(linger=0)


class ControlClient:
    """A client's DEALER. Every wait has a deadline (`time.monotonic` seconds); for one thread at a time.

    Reconnects by itself. Requests are queued only to a connection that stands, so none is delivered late to a
    daemon started afterwards; what was under way at a disconnect is lost. A forked child must make its own.
    """

    def __init__(self, path: Path, *, message_bytes_max: int = MESSAGE_BYTES_MAX) -> None:
        """Begin to connect to the daemon at `path`, without waiting. Raises BadRequest for a path too long."""
        paths.check_socket_path(path)
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        options = {
            zmq.LINGER: 0,
            zmq.IMMEDIATE: 1,
            zmq.RCVHWM: _RECEIVE_HWM,
            zmq.SNDHWM: _RECEIVE_HWM,
            zmq.MAXMSGSIZE: message_bytes_max,
            zmq.HANDSHAKE_IVL: _HANDSHAKE_MS,
            zmq.RECONNECT_IVL: _RECONNECT_MS,
            zmq.RECONNECT_IVL_MAX: _RECONNECT_MAX_MS,
        }
        for option, value in options.items():
            self.socket.setsockopt(option, value)
        self._receive_ms = -1
        self._pid = os.getpid()
        self._recv = self.socket.recv
        self._send = super(zmq.Socket, self.socket).send  # without a wrapper for options that are not used here
        self._get = self.socket.getsockopt
        self.socket.connect(f"ipc://{path}")

    def fileno(self) -> int:
        """libzmq's signalling descriptor: when readable, call `receive_now` until None (also after each send)."""
        return int(self._get(zmq.FD))

    def send(self, payload: bytes, deadline: float | None = None) -> bool:
        """Hand a request to a standing connection; False when there is none by `deadline` (None: now)."""
        try:
            self._send(payload, _NOBLOCK)
        except zmq.Again:
            return deadline is not None and self._send_waiting(payload, deadline)
        return True

    def receive(self, deadline: float) -> bytes | None:
        """The next reply, or None when the deadline has passed. Resolution: 1 ms, rounded up.

        A frame too many in a message would come as a reply of its own, and match no request.
        """
        remaining_ms = math.ceil((deadline - time.monotonic()) * 1000)
        if remaining_ms <= 0:
            return self.receive_now()
        if remaining_ms != self._receive_ms:
            self.socket.setsockopt(zmq.RCVTIMEO, remaining_ms)
            self._receive_ms = remaining_ms
        try:
            return self._recv()
        except zmq.Again:
            return None

    def receive_now(self) -> bytes | None:
        """A reply that is there already, or None."""
        try:
            return self._recv(_NOBLOCK)
        except zmq.Again:
            return None

    def close(self) -> None:
        """Close at once, unsent requests included; idempotent; does nothing in a forked child."""
        if os.getpid() != self._pid or self.socket.closed:
            return
        self.socket.close(linger=0)
        self._context.term()

    def _send_waiting(self, payload: bytes, deadline: float) -> bool:
        remaining_ms = math.ceil((deadline - time.monotonic()) * 1000)
        if remaining_ms <= 0:
            return False
        self.socket.setsockopt(zmq.SNDTIMEO, remaining_ms)
        try:
            self._send(payload)
        except zmq.Again:
            return False
        return True
