"""A link: one session with one daemon's life, as blocking code sees it.

It is thrown away whole at the first doubt (an end of file, a missed deadline, another boot id), and the next call
makes a new one: nothing of a dead session can then be mistaken for a living one's. It is closed only when the
last operation on it has ended, because closing tells the daemon that nobody writes to its slots any more.

Threads that wait for notices take turns at the session socket: one watches it, for all, and the others wait to be
told. The watcher holds no lock while it sleeps, so others map slabs and send releases meanwhile; what they find
before their own answers they hand on, and an event descriptor wakes the watcher when that, or a fault, is for it.
"""

from __future__ import annotations

import os
import select
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from forebay.client.conversation import Conversation
from forebay.client.copier import Copier, CopyTimeout
from forebay.client.core import (
    Action,
    Attachment,
    Await,
    Compute,
    Copy,
    CopyAhead,
    Exchange,
    Map,
    Pause,
    Steps,
    expect,
    undo,
)
from forebay.client.device_copier import pinned_by
from forebay.client.loads import Loads, Progress
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

LINK_FDS = 24
"""More descriptors than a link needs: a dozen, most of them libzmq's."""


def attach(options: ClientOptions, wait_s: float) -> tuple[SessionClient, ControlClient]:
    """Greet the daemon within `wait_s`. Raises PeerLost, Timeout, Forbidden, or what the daemon refused with."""
    where = paths.find(options.runtime_dir)
    deadline = time.monotonic() + wait_s
    _check_descriptors()
    session = SessionClient.connect(where.session, options.name, options.client_group, deadline=deadline)
    try:
        return session, ControlClient(where.control, message_bytes_max=session.welcome.max_message_bytes)
    except BaseException:
        session.close()
        raise


def _check_descriptors() -> None:
    """Raise PeerLost when the process has none to spare: libzmq would abort it."""
    fds: list[int] = []
    try:
        fds.extend(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC) for _ in range(LINK_FDS))
    except OSError as error:
        raise PeerLost(f"no descriptors for a session: {error.strerror}") from error
    finally:
        for fd in fds:
            os.close(fd)


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
        self.attachment.pinned = lambda: pinned_by(copier)
        self.fault: ForebayError | None = None
        self._copier = copier
        self._timeout_s = options.timeout_ms / 1000
        self._slice_s = options.budget_ms / 1000
        self._conversation = Conversation(welcome)
        self._arrived: dict[int, Reply | ForebayError] = {}
        self._epoll = select.epoll()  # unlike a poll object, any number of threads may ask it at once
        self._epoll.register(self._session.fileno(), select.EPOLLIN)
        self._alarm = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._close_alarm = weakref.finalize(self, os.close, self._alarm)  # a bare number, and not all links are closed
        self._watcher = 0
        """The thread that watches the session socket, 0 for none; guarded by the lock of `attachment.loads.changed`."""
        self._exchanging = threading.Lock()
        self._mapping = threading.Lock()
        self._counting = threading.Lock()
        self._users = 0
        self._abandoned = False
        self._closed = False

    # Life

    def enter(self) -> None:
        """Begin to use the link: it will not be closed before the matching `leave`."""
        with self._counting:
            self._users += 1

    def leave(self) -> None:
        with self._counting:
            self._users -= 1
        if self._abandoned:
            self._close_if_unused()

    def abandon(self, fault: ForebayError) -> None:
        """No new operation may begin; sockets close when the last one under way has ended. Idempotent."""
        self._fail(fault)
        with self._counting:
            self._abandoned = True
        self._close_if_unused()

    def disown(self) -> None:
        """In a forked child: the sockets and leases are the parent's; forget them without a word."""
        self.fault = PeerLost("this session belongs to the parent process")
        # The old ones may be held for ever by a thread that is not here.
        self._counting, self._exchanging, self._mapping = threading.Lock(), threading.Lock(), threading.Lock()
        self.attachment.loads, self._watcher = Loads(), 0
        self._users = 1 << 30

    def _fail(self, fault: ForebayError) -> None:
        """The session is of no use any more; the first reason counts. Ends every wait."""
        self.fault = self.fault or fault
        self._wake()

    def _wake(self) -> None:
        """Something changed for those who wait."""
        with self.attachment.loads.changed:
            self.attachment.loads.changed.notify_all()
            if self._watcher not in (0, threading.get_ident()):
                os.eventfd_write(self._alarm, 1)

    def _close_if_unused(self) -> None:
        with self._counting:
            if self._closed or self._users or not self._abandoned:
                return
            self._closed = True
        self._epoll.close()
        self._close_alarm()
        self._control.close()
        self._session.close()

    # Work

    def notice(self) -> None:
        """Take what the daemon has told meanwhile, without waiting. Raises PeerLost at its end of file."""
        if self.fault is not None:
            raise self.fault.with_traceback(None)  # or it would grow with each who asks
        if self._epoll.poll(0):
            self._take_notices(self._slice_s)

    def _take_notices(self, wait_s: float) -> None:
        """Hand on what the session socket has. Raises PeerLost at its end of file.

        Nothing is done when another thread, which then reads for all, does not let go of the socket for `wait_s`.
        """
        if not self._mapping.acquire(blocking=False) and not self._mapping.acquire(timeout=wait_s):
            return
        try:
            self._hand_on()
        finally:
            self._mapping.release()

    def _hand_on(self) -> None:
        """The caller holds `_mapping`."""
        try:
            while notices := self._session.poll_events():
                for notice in notices:
                    self.attachment.take(notice)
                self._wake()
        except PeerError as error:
            self._fail(error)
            raise

    def progress(self, lease: int) -> Progress:
        """How far a lease is that was not ready when it was granted; never waits. Raises what ended the session."""
        self.enter()
        try:
            self.notice()
            return self.attachment.loads.progress(lease)
        finally:
            self.leave()

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
            return self._copy(action)
        if isinstance(action, CopyAhead):
            return self._copy_ahead(action)
        if isinstance(action, Map):
            return self._map(action)
        if isinstance(action, Await):
            return self._await(action)
        if isinstance(action, Pause):
            return self._watch(nothing_told, time.monotonic() + action.seconds)
        if isinstance(action, Compute):
            return action.call()
        return self.post(action.request)

    def _await(self, action: Await) -> Progress | None:
        loads, lease = self.attachment.loads, action.lease
        now, until_s = time.monotonic(), float("inf") if action.until_s is None else action.until_s
        if now >= until_s:
            return None
        deadline = now + (self._timeout_s if action.timeout_s is None else action.timeout_s)
        progress = self._watch(lambda: loads.news(lease, action.ready), min(deadline, until_s))
        return loads.progress(lease) if progress is None and deadline <= until_s else progress

    def _watch(self, news: Callable[[], T | None], deadline: float) -> T | None:
        """Wait until notices make `news` say something; None when the deadline passes first.

        Raises what ended the session, as soon as it has.
        """
        changed = self.attachment.loads.changed
        while True:
            with changed:
                while (told := news()) is None and self.fault is None and self._watcher:
                    if not changed.wait(deadline - time.monotonic()):
                        return news()
                if told is not None:
                    return told
                if self.fault is not None:
                    raise self.fault
                if time.monotonic() >= deadline:
                    return None
                self._watcher = threading.get_ident()
            try:
                self._look(deadline)
            finally:
                with changed:
                    self._watcher = 0
                    changed.notify_all()  # another one may watch

    def _look(self, deadline: float) -> None:
        """Sleep until the session socket has something, which is handed on, or the alarm rings."""
        poller = select.poll()
        poller.register(self._session.fileno(), select.POLLIN)
        poller.register(self._alarm, select.POLLIN)
        ready = dict(poller.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self._alarm in ready:
            os.eventfd_read(self._alarm)
        if self._session.fileno() in ready:
            self._take_notices(max(0.0, deadline - time.monotonic()))

    def post(self, request: Request) -> bool:
        """Send a request whose reply nobody needs; False, without a word, when the session is known to be over.

        What gives slots back must arrive: if it cannot be sent the session ends, and gives back everything.
        """
        self.enter()  # or it might be closed by another thread at any point below
        try:
            if isinstance(request, ReleaseRequest) and self.attachment.loads.end(request.lease):
                self._wake()
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
                self._fail(error)
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
        return self._in_turn(lambda deadline: self._answers(self._ask(requests, deadline), deadline))

    def _copy_ahead(self, action: CopyAhead) -> tuple[Sequence[int], list[Reply | ForebayError]]:
        numbers = self._in_turn(lambda deadline: self._ask(action.requests, deadline))
        try:
            failed = self._copy(action.copy)
            return failed, self._in_turn(lambda deadline: self._answers(numbers, deadline))
        except BaseException:
            try:
                self._in_turn(lambda _: self._renounce(numbers))
            except ForebayError as error:
                self._fail(error)  # what these replies grant then ends with the session
            raise

    def _copy(self, action: Copy) -> Sequence[int]:
        try:
            return (self._copier.gather if action.to_slots else self._copier.scatter)(action.plan)
        except CopyTimeout:
            self.enter()
            held_open.append(self)
            raise

    def _in_turn(self, work: Callable[[float], T]) -> T:
        """Do something with the control socket, handing it the deadline; threads take turns."""
        if self.fault is not None:
            raise self.fault
        if not self._exchanging.acquire(blocking=False) and not self._exchanging.acquire(timeout=self._timeout_s):
            raise Timeout("other threads' requests were not answered")
        try:
            if self.fault is not None:
                raise self.fault
            return work(time.monotonic() + self._timeout_s)
        except (PeerError, UnknownSession) as error:
            self._fail(error)
            raise
        except ForebayError:
            raise
        except BaseException:  # a signal: replies that come later would have no taker
            self._fail(PeerLost("a call was interrupted"))
            raise
        finally:
            self._exchanging.release()

    def _ask(self, requests: Sequence[Request], deadline: float) -> list[int]:
        """Send requests; returns their numbers."""
        encoded = [self._conversation.encode(request) for request in requests]
        for _, payload in encoded:
            if not self._control.send(payload):
                self._send(payload, deadline)
        return [number for number, _ in encoded]

    def _answers(self, numbers: Sequence[int], deadline: float) -> list[Reply | ForebayError]:
        return [self._reply_to(number, deadline) for number in numbers]

    def _renounce(self, numbers: Sequence[int]) -> None:
        """Nobody will wait for these replies: what they grant is given back, now or when they come."""
        for number in numbers:
            arrived = self._arrived.pop(number, None)
            if arrived is None:
                self._conversation.abandon(number)
            else:
                self._give_back(undo(arrived))

    def _give_back(self, request: Request | None) -> None:
        if request is not None and not self._control.send(self._conversation.encode(request, expected=False)[1]):
            raise PeerLost("a request could not be sent")

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
                self._give_back(self._conversation.undo(payload))
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
            self._fail(error)
            raise
        finally:
            try:
                self._take_kept()
            finally:
                self._mapping.release()

    def _take_kept(self) -> None:
        """Notices that came before the answer to a map request do not show on the socket any more."""
        try:
            self._hand_on()
        except PeerError:
            return  # the fault is noted, and the next action raises it


held_open: list[object] = []
"""Links on which bytes may still be moving: the end of their session would give the slots to others.

They stay open as long as the process lives.
"""


def nothing_told() -> None:
    """What a thread that only lets time pass waits for."""
