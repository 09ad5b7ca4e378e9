"""A link as an event loop sees it: replies come by the control socket's descriptor, many operations at a time.

What rarely happens and may wait (greeting, mapping a slab) runs in the loop's thread pool with the blocking
code of `link`; copies run there too. `zmq.asyncio` was rejected: it doubles the round trip. libzmq's descriptor
is edge-triggered, so replies are drained after every send as well.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from forebay.client.conversation import Conversation
from forebay.client.copier import Copier, CopyTimeout
from forebay.client.core import Action, Attachment, Await, Compute, Copy, CopyAhead, Exchange, Map, Pause, Steps, undo
from forebay.client.device_copier import pinned_by
from forebay.client.link import attach, held_open, map_slab, nothing_told
from forebay.client.loads import Progress
from forebay.client.options import ClientOptions
from forebay.client.places import SlabMapping
from forebay.kvstore.errors import (
    ForebayError,
    PeerError,
    PeerLost,
    Timeout,
    UnknownNamespace,
    UnknownSession,
)
from forebay.transports.messages import PingRequest, ReleaseRequest, Reply, Request
from forebay.transports.session import SessionClient
from forebay.transports.zmq_sockets import ControlClient

T = TypeVar("T")


class AsyncLink:
    """Belongs to one event loop; make it with `open`."""

    def __init__(self, options: ClientOptions, copier: Copier, session: SessionClient, control: ControlClient) -> None:
        """Take over the sockets; call on the loop's thread."""
        self._session, self._control = session, control
        welcome = session.welcome
        self.attachment = Attachment(welcome.max_message_bytes, welcome.max_hashes)
        self.attachment.pinned = lambda: pinned_by(copier)
        self.fault: ForebayError | None = None
        self._copier = copier
        self._timeout_s = options.timeout_ms / 1000
        self._conversation = Conversation(welcome)
        self._waiting: dict[int, asyncio.Future[Reply | ForebayError]] = {}
        self._maps: dict[tuple[int, int], asyncio.Task[SlabMapping]] = {}
        self._reading_session = asyncio.Lock()
        self._users = 0
        self._abandoned = False
        self._loop = asyncio.get_running_loop()
        self._told: asyncio.Future[None] = self._loop.create_future()
        """Done at the next notice or fault; then there is a new one."""
        self._loop.add_reader(control.fileno(), self._drain)
        self._loop.add_reader(session.fileno(), self._listen)

    @classmethod
    async def open(cls, options: ClientOptions, copier: Copier, wait_s: float) -> AsyncLink:
        """Attach; raises what `attach` does. A cancelled caller does not leave a session behind."""
        loop = asyncio.get_running_loop()
        attaching = loop.run_in_executor(None, _attach, options, wait_s)
        try:
            session, control = await asyncio.shield(attaching)
        except asyncio.CancelledError:
            attaching.add_done_callback(_close_unwanted)
            raise
        return cls(options, copier, session, control)

    # Life

    def enter(self) -> None:
        """Begin to use the link: it will not be closed before the matching `leave`."""
        self._users += 1

    def leave(self) -> None:
        self._users -= 1
        if self._abandoned and self._users == 0:
            self._close()

    def abandon(self, fault: ForebayError) -> None:
        """No new operation may begin; sockets close when the last one under way has ended. Idempotent."""
        self._fail(fault)
        if not self._abandoned:
            self._abandoned = True
            if self._users == 0:
                self._close()

    def disown(self) -> None:
        """In a forked child: the sockets, leases and loop are the parent's; forget them without a word."""
        self.fault = PeerLost("this session belongs to the parent process")
        self._waiting.clear()
        self._users = 1 << 30

    def _close(self) -> None:
        self._control.close()
        self._session.close()

    def _fail(self, fault: ForebayError) -> None:
        if self.fault is not None:
            return
        self.fault = fault
        self._loop.remove_reader(self._control.fileno())
        self._loop.remove_reader(self._session.fileno())
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(fault)
        self._waiting.clear()
        self._wake()

    def _wake(self) -> None:
        """Something changed for those who wait for notices."""
        told, self._told = self._told, self._loop.create_future()
        told.set_result(None)

    # Events of the loop

    def _drain(self) -> None:
        try:
            while self.fault is None and (payload := self._control.receive_now()) is not None:
                self._take(payload)
        except (PeerError, UnknownSession) as error:
            self._fail(error)
        except ForebayError as error:
            self._fail(PeerLost(f"an unreadable reply: {error}"))

    def _take(self, payload: bytes) -> None:
        reply = self._conversation.decode(payload)
        if reply is None:
            request = self._conversation.undo(payload)
            if request is not None:
                self._send_unasked(request)
            return
        if isinstance(reply[1], UnknownNamespace):
            self.attachment.handles.clear()
        future = self._waiting.pop(reply[0], None)
        if future is not None and not future.done():
            future.set_result(reply[1])

    def _listen(self) -> None:
        try:
            while notices := self._session.poll_events():
                for notice in notices:
                    self.attachment.take(notice)
                self._wake()
        except PeerError as error:
            self._fail(error)

    # Work

    def progress(self, lease: int) -> Progress:
        """How far a lease is that was not ready when it was granted; never waits. Raises what ended the session."""
        if self.fault is None and not self._reading_session.locked():
            self._listen()
        if self.fault is not None:
            raise self.fault.with_traceback(None)  # or it would grow with each who asks
        return self.attachment.loads.progress(lease)

    async def drive(self, steps: Steps[T]) -> T:
        """Run an operation to its end; a cancelled one still gives back what it holds."""
        send: Any = steps.send
        value: Any = None
        while True:
            try:
                action = send(value)
            except StopIteration as stop:
                result: T = stop.value
                return result
            try:
                value, send = await self._perform(action), steps.send
            except BaseException as error:  # noqa: BLE001  # all of them: the operation gives back what it holds
                value, send = error, steps.throw

    async def _perform(self, action: Action) -> Any:
        if isinstance(action, Exchange):
            return await self._exchange(action.requests)
        if isinstance(action, Copy):
            return await self._copy(action)
        if isinstance(action, CopyAhead):
            return await self._exchange_around(action.requests, action.copy)
        if isinstance(action, Map):
            return await self._map(action)
        if isinstance(action, Await):
            return await self._await(action)
        if isinstance(action, Pause):
            return await self._watch(nothing_told, action.seconds)
        if isinstance(action, Compute):
            return await _to_the_end(action.call)
        return self.post(action.request)

    async def _await(self, action: Await) -> Progress | None:
        loads, lease = self.attachment.loads, action.lease
        wait_s = self._timeout_s if action.timeout_s is None else action.timeout_s
        left_s = float("inf") if action.until_s is None else action.until_s - time.monotonic()
        if left_s <= 0:
            return None
        progress = await self._watch(lambda: loads.news(lease, action.ready), min(wait_s, left_s))
        return loads.progress(lease) if progress is None and wait_s <= left_s else progress

    async def _watch(self, news: Callable[[], T | None], wait_s: float) -> T | None:
        """Wait until notices make `news` say something; None when the time passes first.

        Raises what ended the session, as soon as it has.
        """
        try:
            async with asyncio.timeout(wait_s):
                while (told := news()) is None:
                    if self.fault is not None:
                        raise self.fault
                    await asyncio.shield(self._told)
                return told
        except TimeoutError:
            return None

    def post(self, request: Request) -> bool:
        """Send a request whose reply nobody needs; False, without a word, when the session is known to be over."""
        if isinstance(request, ReleaseRequest) and self.attachment.loads.end(request.lease) and self.fault is None:
            self._wake()
        sent = self._send_unasked(request)
        self._drain()  # sending may have taken the signal of a reply, which then would show no more
        return sent and self.fault is None

    def _send_unasked(self, request: Request) -> bool:
        """Send what nobody waits for; the caller drains afterwards."""
        if self.fault is None and not self._control.send(self._conversation.encode(request, expected=False)[1]):
            if not isinstance(request, ReleaseRequest):  # a lease ends by itself; slots come back with the session
                self._fail(PeerLost("a request could not be sent"))
            return False
        return self.fault is None

    async def _exchange(self, requests: tuple[Request, ...]) -> list[Reply | ForebayError]:
        return (await self._exchange_around(requests, None))[1]

    async def _exchange_around(
        self, requests: tuple[Request, ...], copy: Copy | None
    ) -> tuple[Sequence[int], list[Reply | ForebayError]]:
        """Send the requests, copy while they travel, take the replies; a copy under way always ends first."""
        if self.fault is not None:
            raise self.fault
        encoded = [self._conversation.encode(request) for request in requests]
        futures = []
        for number, payload in encoded:
            futures.append(self._loop.create_future())
            self._waiting[number] = futures[-1]
            if not self._control.send(payload):
                self._fail(PeerLost("the connection to the daemon is gone"))
                break
        self._drain()
        try:
            failed = await self._copy(copy) if copy is not None else ()
            return failed, await self._answers(futures)
        except BaseException:  # a cancellation may strike after the reply was taken and before the task went on
            self._undo(futures)
            raise
        finally:
            for (number, _), future in zip(encoded, futures, strict=False):
                self._waiting.pop(number, None)
                self._conversation.abandon(number)
                if future.done() and not future.cancelled():
                    future.exception()  # several may carry the same fault; one was raised

    async def _answers(self, futures: Sequence[asyncio.Future[Reply | ForebayError]]) -> list[Reply | ForebayError]:
        try:
            async with asyncio.timeout(self._timeout_s):
                return [await future for future in futures]
        except TimeoutError:
            if all(future.done() and not future.cancelled() for future in futures):
                return [future.result() for future in futures]  # it was the loop that came late
            self._fail(Timeout(f"no answer within {self._timeout_s * 1000:.0f} ms"))
            raise Timeout(f"no answer within {self._timeout_s * 1000:.0f} ms") from None

    async def _copy(self, action: Copy) -> Sequence[int]:
        copy = self._copier.gather if action.to_slots else self._copier.scatter
        try:
            return await _to_the_end(lambda: copy(action.plan))
        except CopyTimeout:
            self.enter()
            held_open.append(self)
            raise

    def _undo(self, futures: Sequence[asyncio.Future[Reply | ForebayError]]) -> None:
        """Give back what replies granted that nobody will see."""
        for future in futures:
            if future.done() and not future.cancelled() and future.exception() is None:
                request = undo(future.result())
                if request is not None:
                    self.post(request)

    async def _map(self, action: Map) -> SlabMapping:
        """Map a slab once, however many tasks need it."""
        key = (action.ns, action.slab)
        mapping = self._maps.get(key)
        if mapping is None:
            mapping = self._maps[key] = self._loop.create_task(self._map_now(action))
            mapping.add_done_callback(lambda task: task.cancelled() or task.exception())  # seen, if nobody waits
        return await asyncio.shield(mapping)

    async def _map_now(self, action: Map) -> SlabMapping:
        self.enter()
        try:
            async with self._reading_session:
                return await self._map_in_thread(action)
        except PeerError as error:
            self._fail(error)
            raise
        finally:
            del self._maps[action.ns, action.slab]
            self.leave()

    async def _map_in_thread(self, action: Map) -> SlabMapping:
        """The loop looks away from the session meanwhile: both would wake up for the answer."""
        if self.fault is not None:
            raise self.fault
        self._loop.remove_reader(self._session.fileno())
        try:
            return await self._loop.run_in_executor(None, self._map_slab, action)
        finally:
            if self.fault is None:
                self._loop.add_reader(self._session.fileno(), self._listen)
                self._listen()  # notices that came before the answer do not show on the socket any more

    def _map_slab(self, action: Map) -> SlabMapping:
        """In a thread of the pool; its time begins when it has one."""
        return map_slab(self._session, action.ns, action.slab, time.monotonic() + self._timeout_s)


async def _to_the_end(work: Callable[[], T]) -> T:
    """Run in a thread; if cancelled meanwhile, wait for the thread first: it may be writing to slots.

    That they may still be written to then goes before the cancellation, which comes at the task's next wait.
    """
    future = asyncio.get_running_loop().run_in_executor(None, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        while not future.done():
            try:
                await asyncio.wait([future])
            except asyncio.CancelledError:
                continue
        error = None if future.cancelled() else future.exception()
        if isinstance(error, CopyTimeout):
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
                task.cancel()
            raise error from None
        raise


def _attach(options: ClientOptions, wait_s: float) -> tuple[SessionClient, ControlClient]:
    """Attach and wait until the control connection stands; later sends then never wait."""
    deadline = time.monotonic() + wait_s
    session, control = attach(options, wait_s)
    try:
        _, ping = Conversation(session.welcome).encode(PingRequest(), expected=False)
        if not control.send(ping, deadline) or control.receive(deadline) is None:
            raise Timeout("the daemon greets but does not answer")
    except BaseException:
        control.close()
        session.close()
        raise
    return session, control


def _close_unwanted(attaching: asyncio.Future[tuple[SessionClient, ControlClient]]) -> None:
    if not attaching.cancelled() and attaching.exception() is None:
        for part in attaching.result():
            part.close()
