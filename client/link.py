"""A link: one session with one daemon's life, as blocking code sees it.

It is thrown away whole at the first doubt (an end of file, a missed deadline, another boot id), and the next call
makes a new one: nothing of a dead session can then be mistaken for a living one's. It is closed only when the
last operation on it has ended, because closing tells the daemon that nobody writes to its slots any more.
"""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Sequence
from typing import Any, TypeVar

from forebay.client.conversation import Conversation
from forebay.client.copier import Copier
from forebay.client.core import Action, Attachment, Copy, Exchange, Map, Steps, expect
from forebay.client.options import ClientOptions
from forebay.client.places import SlabMapping
from forebay.kvstore.errors import (
    Corrupt,
    ForebayError,
    PeerError,
    PeerLost,
    Timeout,
    UnknownNamespace,
    UnknownSession,
)
from forebay.transports import paths
from forebay.transports.messages import REPLY_OF, ReleaseRequest, Reply, Request
from forebay.transports.session import SessionClient
from forebay.transports.zmq_sockets import ControlClient

T = TypeVar("T")


def attach(options: ClientOptions, wait_s: float) -> tuple[SessionClient, ControlClient]:
    """Greet the daemon within `wait_s`. Raises PeerLost, Timeout, Forbidden, or what the daemon refused with."""
    where = paths.find(options.runtime_dir)
    deadline = time.monotonic() + wait_s
    session = SessionClient.connect(where.session, options.name, options.client_group, deadline=deadline)
    try:
        return session, ControlClient(where.control, message_bytes_max=session.welcome.max_message_bytes)
    except BaseException:
        session.close()
        raise


def map_slab(session: SessionClient, ns: int, slab: int, deadline: float) -> SlabMapping:
    """Ask for a slab and map it. Raises PeerLost, Timeout, Corrupt, or the daemon's refusal."""
    received = session.map_slab(ns, slab, deadline)
    try:
        return SlabMapping.receive(received.shape, received.slab_fd, received.table_fd)
    except OSError as error:
        raise Corrupt(f"slab {slab} could not be mapped: {error.strerror}") from error
    finally:
        received.close_fds()


class Link:
    """May be used by several threads: exchanges take turns, copies do not."""

    def __init__(self, options: ClientOptions, copier: Copier, wait_s: float) -> None:
        """Attach; raises what `attach` does."""
        self._session, self._control = attach(options, wait_s)
        welcome = self._session.welcome
        self.attachment = Attachment(welcome.max_message_bytes, welcome.max_hashes)
        self.fault: ForebayError | None = None
        self._copier = copier
        self._timeout_s = options.timeout_ms / 1000
        self._slice_s = options.budget_ms / 1000
        self._conversation = Conversation(welcome)
        self._arrived: dict[int, Reply | ForebayError] = {}
        self._watch = select.epoll()  # unlike a poll object, any number of threads may ask it at once
        self._watch.register(self._session.fileno(), select.EPOLLIN)
        self._exchanging = threading.Lock()
        self._mapping = threading.Lock()
        self._counting = threading.Lock()
        self._users = 0
        self._abandoned = False

    # Life

    def enter(self) -> None:
        """Begin to use the link: it will not be closed before the matching `leave`."""
        with self._counting:
            self._users += 1

    def leave(self) -> None:
        with self._counting:
            self._users -= 1
            closing = self._abandoned and self._users == 0
        if closing:
            self._close()

    def abandon(self, fault: ForebayError) -> None:
        """No new operation may begin; sockets close when the last one under way has ended. Idempotent."""
        self.fault = self.fault or fault
        with self._counting:
            closing = not self._abandoned and self._users == 0
            self._abandoned = True
        if closing:
            self._close()

    def disown(self) -> None:
        """In a forked child: the sockets and leases are the parent's; forget them without a word."""
        self.fault = PeerLost("this session belongs to the parent process")
        # The old ones may be held for ever by a thread that is not here.
        self._counting, self._exchanging, self._mapping = threading.Lock(), threading.Lock(), threading.Lock()
        self._users = 1 << 30

    def _close(self) -> None:
        self._watch.close()
        self._control.close()
        self._session.close()

    # Work

    def notice(self) -> None:
        """Take what the daemon has told meanwhile, without waiting. Raises PeerLost at its end of file."""
        if self.fault is not None:
            raise self.fault
        if not self._watch.poll(0):
            return
        if not self._mapping.acquire(blocking=False):
            return  # somebody is reading the session; the next call takes the notices
        try:
            for retired in self._session.poll_events():
                self.attachment.retire(retired.ns, retired.slab)
        except PeerError as error:
            self.fault = self.fault or error
            raise
        finally:
            self._mapping.release()

    def drive(self, steps: Steps[T]) -> T:
        """Run an operation to its end on this thread."""
        send: Any = steps.send
        value: Any = None
        while True:
            try:
                action = send(value)
            except StopIteration as stop:
                result: T = stop.value
                return result
            try:
                value, send = self._perform(action), steps.send
            except BaseException as error:  # noqa: BLE001  # all of them: the operation gives back what it holds
                value, send = error, steps.throw

    def _perform(self, action: Action) -> Any:
        if isinstance(action, Exchange):
            return self._exchange(action.requests)
        if isinstance(action, Copy):
            return (self._copier.gather if action.to_slots else self._copier.scatter)(action.plan)
        if isinstance(action, Map):
            return self._map(action)
        return self.post(action.request)

    def post(self, request: Request) -> bool:
        """Send a request whose reply nobody needs; False, without a word, when the session is known to be over.

        What gives slots back must arrive: if it cannot be sent the session ends, and gives back everything.
        """
        self.enter()  # or it might be closed by another thread at any point below
        try:
            self.notice()
            if isinstance(request, ReleaseRequest) and self._released(request.lease):
                return True
            if not self._exchanging.acquire(timeout=self._timeout_s):
                raise Timeout("other threads' requests were not answered")
            try:
                if self.fault is not None:
                    raise self.fault
                if not self._control.send(self._conversation.encode(request, expected=False)[1]):
                    raise PeerLost("a request could not be sent")
            finally:
                self._exchanging.release()
        except ForebayError as error:
            if not isinstance(request, ReleaseRequest):  # a lease ends by itself
                self.fault = self.fault or error
            return False
        finally:
            self.leave()
        return True

    def _released(self, lease: int) -> bool:
        """Tell it over the session, which is the cheaper way, unless another thread is using that."""
        if not self._mapping.acquire(blocking=False):
            return False
        try:
            return self._session.release(lease)
        finally:
            self._mapping.release()

    def ask(self, request: Request) -> Reply:
        """One request, one reply; raises what the daemon answered."""
        return expect(self._exchange((request,))[0], REPLY_OF[type(request)])

    def _exchange(self, requests: Sequence[Request]) -> list[Reply | ForebayError]:
        if self.fault is not None:
            raise self.fault
        if not self._exchanging.acquire(blocking=False) and not self._exchanging.acquire(timeout=self._timeout_s):
            raise Timeout("other threads' requests were not answered")
        deadline = time.monotonic() + self._timeout_s
        try:
            if self.fault is not None:
                raise self.fault
            encoded = [self._conversation.encode(request) for request in requests]
            try:
                for _, payload in encoded:
                    if not self._control.send(payload):
                        self._send(payload, deadline)
                return [self._reply_to(number, deadline) for number, _ in encoded]
            except (PeerError, UnknownSession) as error:
                self.fault = self.fault or error
                raise
            except BaseException:  # a signal: replies that come later would have no taker
                self.fault = self.fault or PeerLost("a call was interrupted")
                raise
        finally:
            self._exchanging.release()

    def _send(self, payload: bytes, deadline: float) -> None:
        while not self._control.send(payload, min(deadline, time.monotonic() + self._slice_s)):
            self._check_waiting(deadline)

    def _reply_to(self, number: int, deadline: float) -> Reply | ForebayError:
        """The reply to this request; those of requests that nobody waits for are passed over."""
        while True:
            arrived = self._arrived.pop(number, None)
            if arrived is not None:
                return arrived
            payload = self._control.receive(min(deadline, time.monotonic() + self._slice_s))
            if payload is None:
                self._check_waiting(deadline)
                continue
            reply = self._conversation.decode(payload)
            if reply is None:
                continue
            if isinstance(reply[1], UnknownNamespace):
                self.attachment.handles.clear()
            if reply[0] == number:
                return reply[1]
            self._arrived[reply[0]] = reply[1]

    def _check_waiting(self, deadline: float) -> None:
        """A daemon that died ends the wait at once, one that hangs at the deadline."""
        self.notice()
        if time.monotonic() >= deadline:
            raise Timeout(f"no answer within {self._timeout_s * 1000:.0f} ms")

    def _map(self, action: Map) -> SlabMapping:
        deadline = time.monotonic() + self._timeout_s
        if not self._mapping.acquire(timeout=self._timeout_s):
            raise Timeout("other threads' slabs were not handed out")
        try:
            known = self.attachment.slabs.get((action.ns, action.slab))  # mapped by another thread meanwhile
            return known or map_slab(self._session, action.ns, action.slab, deadline)
        except PeerError as error:
            self.fault = self.fault or error
            raise
        finally:
            self._mapping.release()
