"""The owner loop: one thread holds the store and serves everybody, and never waits for anything but the next event.

A turn takes one request, or else everything that is ready beside requests (session packets, questions of other
threads), then carries out what time has brought, and goes back to wait until the next deadline. It touches no KV byte
and does no disk I/O, so a turn is short whatever moves elsewhere.
"""

from __future__ import annotations

import logging
import os
import select
import time
from collections.abc import Callable, Sequence

import forebay
from forebay.daemon import status
from forebay.daemon.counters import RequestCounters
from forebay.daemon.live_slabs import LiveSlabs
from forebay.daemon.logging import fields
from forebay.daemon.mailbox import Mailbox
from forebay.daemon.mover import Mover
from forebay.daemon.sessions import Sessions
from forebay.daemon.status import NO_PRICES, DaemonSnapshot, LoopStats, Prices
from forebay.daemon.verbs import Verbs
from forebay.kvstore.errors import ForebayError, Internal, TierFull, UnknownSession
from forebay.kvstore.store import Store
from forebay.tiers.base import Describable
from forebay.transports.codec import Envelope, decode_request, encode_error, encode_reply, request_id_of
from forebay.transports.messages import REQUESTS, ClearRequest, EvictRequest, PingRequest, Reply, ReserveRequest
from forebay.transports.zmq_sockets import ControlServer

log = logging.getLogger(__name__)

_NAMES = {request: verb.name.lower() for verb, request in REQUESTS.items()}
_AFTER_RELEASES = (ReserveRequest, EvictRequest, ClearRequest)
_CATCH_UP_MAX = 512
_ROUNDS_MAX = 8
_TICK_S = 1.0
_TICK_MS = 1000
_STEP_MS = 10
_SETTLED_IDLE, _SETTLE_PAUSE = 8, 9
_LAST_REPLIES_S = 0.1


class Owner:
    """Serves requests until stopped.

    Args:
        tick: called about once a second with the time, for what the service manager wants to hear.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        mailbox: Mailbox[DaemonSnapshot],
        store: Store,
        verbs: Verbs,
        server: ControlServer,
        sessions: Sessions,
        memory: LiveSlabs,
        tiers: Sequence[Describable],
        mover: Mover | None = None,
        boot_id: bytes,
        runtime_dir: str,
        message_bytes_max: int,
        tick: Callable[[float], None],
        prices: Prices = NO_PRICES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.mailbox = mailbox
        self.last_turn_s = clock()
        self._store = store
        self._verbs = verbs
        self._server = server
        self._sessions = sessions
        self._memory = memory
        self._tiers = tiers
        self._mover = mover
        self._boot_id = boot_id
        self._runtime_dir = runtime_dir
        self._message_bytes_max = message_bytes_max
        self._tick = tick
        self.prices = prices
        self._clock = clock
        self._counters = RequestCounters()
        self._started_s = self._next_tick_s = clock()
        self._stop_at: float | None = None
        self._flush_s = 0.0
        self._flush_until: float | None = None
        self._drained_at: float | None = None
        self._unserved = False
        self._turns = 0
        self._settle_at_s = 0.0
        self._busy_s = 0.0
        self._longest_turn_s = 0.0
        sessions.epoll.register(server.monitor_fd, select.EPOLLIN)
        sessions.epoll.register(self.mailbox.fileno(), select.EPOLLIN)
        server.ring_on(sessions.epoll.fileno())

    def run(self) -> None:
        """Serve until `stop` was called and what was under way has ended, or its time has."""
        while not self._stopped():
            message = self._server.wait(0 if self._unserved or self._has_more() else self._wait_ms())
            self.last_turn_s = started = self._clock()
            if message is not None:
                answer, verb, error = self._answer(message[1], started)
                self._server.send(message[0], answer)
                self._counters.observe(verb, self._clock() - started, error)  # who asked does not wait for it
            if message is None or self._unserved:
                self._serve_descriptors(started)
            self._keep_time(started)
            self._settle(idle=message is None)
            if self._mover is not None:
                self._store.plan_writes(started)
                self.carry_out()
                self._mover.go_on(started)
            took_s = self._clock() - started
            self._turns += 1
            self._busy_s += took_s
            if took_s > self._longest_turn_s:
                self._longest_turn_s = took_s

    def _settle(self, *, idle: bool) -> None:
        """What lookups leave to be counted: a request at a time, and a tenth of the time unless nobody asks."""
        physics = self._store.physics
        if not physics.pending:
            return
        begun = self._clock()
        if idle or begun >= self._settle_at_s:
            physics.settle(_SETTLED_IDLE if idle else 1)
            ended = self._clock()
            self._settle_at_s = ended + _SETTLE_PAUSE * (ended - begun)

    def stop(self, within_s: float, flush_s: float = 0.0) -> None:
        """Begin to drain: refuse new work, let leases and reservations end, at most for `within_s`. Idempotent.

        Then what is only in memory is written to the nvme tier, for at most `flush_s`.
        """
        if self._stop_at is None:
            self._stop_at = self._clock() + within_s
            self._flush_s = flush_s
            self._store.drain()

    def heartbeat_age_s(self) -> float:
        """How long ago the last turn began; an idle loop turns about once a second. For any thread."""
        return self._clock() - self.last_turn_s

    def snapshot(self) -> DaemonSnapshot:
        """The daemon at this instant; for the owner thread (others ask the mailbox)."""
        return DaemonSnapshot(
            version=forebay.__version__,
            pid=os.getpid(),
            boot_id=self._boot_id.hex(),
            uptime_s=self._clock() - self._started_s,
            state=status.DRAINING if self._store.draining else status.SERVING,
            runtime_dir=self._runtime_dir,
            store=self._store.stats(self._clock()),
            tiers=tuple(tier.describe() for tier in self._tiers),
            nvme=self._mover.detail() if self._mover is not None else None,
            refused_sessions=dict(self._sessions.refused),
            verbs=self._counters.freeze(),
            loop=LoopStats(self._turns, self._busy_s, self._longest_turn_s),
            process=status.measure_process(),
            prices=self.prices,
        )

    def carry_out(self) -> str:
        """Do what the store decided since the last call; returns why a slab could not be had, else nothing."""
        failure = ""
        if self._store.has_no_effects():
            return failure
        while effects := self._store.drain_effects():
            done = self._memory.carry_out(effects)
            if self._mover is not None:
                self._mover.carry_out(effects, done.freed, self.last_turn_s)
            for opened, error in done.failed:
                failure = error.strerror or str(error)
                log.error("no memory for a slab", extra=fields(ns=opened.ns, slab=opened.slab, error=error))
                self._store.slab_failed(opened.ns, opened.slab)
            self._sessions.tell_retired(done.retired)
            self._sessions.tell_progress(effects.progress)
            for warning in effects.warnings:
                log.warning(warning)
        return failure

    def hand_over(self) -> None:
        """In the middle of an answer: what was decided is carried out, and its first transfers begin."""
        self.carry_out()
        if self._mover is not None:
            self._mover.go_on(self.last_turn_s)

    def _has_more(self) -> bool:
        return self._mover is not None and self._mover.has_more

    def _stopped(self) -> bool:
        """Drained, and the last replies had time to be read (a closing socket takes them along), or out of time.

        Then flushed, or out of time for that.
        """
        if self._stop_at is None:
            return False
        now = self._clock()
        if self._drained_at is None and self._store.in_use == 0:
            self._drained_at = now
            self._stop_at = min(self._stop_at, now + _LAST_REPLIES_S)
        return now >= self._stop_at and self._flushed(now)

    def _flushed(self, now: float) -> bool:
        if self._mover is None:
            return True
        if self._flush_until is None:
            self._flush_until = now + self._flush_s
        busy = now < self._flush_until and self._store.flush(now)
        self.carry_out()
        self._mover.go_on(now)
        return not busy

    def _wait_ms(self) -> int:
        """Until the next deadline, at most a tick; in steps, because a new time-out costs the socket a call."""
        deadline = self._store.next_deadline()
        stop_at = self._stop_at if self._flush_until is None else self._flush_until
        if deadline is None:
            deadline = stop_at
        elif stop_at is not None:
            deadline = min(deadline, stop_at)
        if self._store.physics.pending:
            return _STEP_MS
        if deadline is None:
            return _TICK_MS
        wanted_ms = int((deadline - self._clock()) * 1000)
        return min(_TICK_MS, (max(0, wanted_ms) // _STEP_MS + 1) * _STEP_MS)

    def _keep_time(self, now: float) -> None:
        deadline = self._store.next_deadline()
        if deadline is not None and deadline <= now:
            self._store.expire(now)
            self.carry_out()
        if now >= self._next_tick_s:
            self._next_tick_s = now + _TICK_S
            self._sessions.expire_greetings(now)
            self._server.watch()
            self._store.sweep(now)
            self._tick(now)

    def _serve_descriptors(self, now: float) -> None:
        """Everything but requests, until nothing is ready: the bell rings once for what is new.

        Bounded, so that a client that floods its session cannot keep others' requests waiting, nor a tier that brings
        back what an earlier life left, a thousand blocks at a time: what is left is taken up again after the next
        request, or at once when none waits.
        """
        for _ in range(_ROUNDS_MAX):
            ready = self._sessions.epoll.poll(0)
            self._unserved = bool(ready)
            for fd, events in ready:
                self._serve(fd, events, now)
            if not ready or any(fd == self.mailbox.fileno() for fd, _ in ready):
                return

    def _serve(self, fd: int, events: int, now: float) -> None:
        if fd == self.mailbox.fileno():
            self.mailbox.answer(self.snapshot)
            self._collect(now)
        elif fd == self._server.monitor_fd:
            self._server.watch()
        else:
            self._sessions.serve(fd, events, now)

    def _collect(self, now: float) -> None:
        """The tier's threads ring the mailbox when they have something to tell."""
        if self._mover is not None:
            self._mover.collect(now)
            self.carry_out()

    def _catch_up(self, now: float) -> None:
        """What a client released before it asked for room is on the other socket: take it first, and it alone."""
        for _ in range(_CATCH_UP_MAX):
            ready = self._sessions.epoll.poll(0)
            self._unserved = bool(ready)
            said = [(fd, events) for fd, events in ready if fd != self.mailbox.fileno()]
            for fd, events in said:
                self._serve(fd, events, now)
            if not said:
                return

    def _answer(self, payload: bytes, now: float) -> tuple[bytes, str, str]:
        """The reply to one message, whatever it is; the verb and the error's name, for the counters."""
        try:
            envelope = decode_request(payload, self._message_bytes_max)
        except ForebayError as error:
            return encode_error(request_id_of(error), self._boot_id, error), "undecodable", type(error).__name__
        request_id, name = envelope.request_id, _NAMES[type(envelope.request)]
        try:
            return encode_reply(request_id, self._boot_id, self._decide(envelope, now)), name, ""
        except ForebayError as error:
            return encode_error(request_id, self._boot_id, error), name, type(error).__name__

    def _decide(self, envelope: Envelope, now: float) -> Reply:
        session_id = self._sessions.session_of(envelope.session_token)
        request = envelope.request
        if not session_id and (type(request) is not PingRequest or envelope.session_token):
            raise UnknownSession("the session has ended or was never opened")
        if isinstance(request, _AFTER_RELEASES):
            self._catch_up(now)
        try:
            reply = self._verbs.answer(session_id, request, now)
        except ForebayError:
            self.carry_out()
            raise
        except Exception as error:
            # A bug must cost its request, not the daemon: every other client's leases live here.
            log.exception("bug", extra=fields(verb=envelope.verb.name, request_id=envelope.request_id))
            self.carry_out()
            raise Internal(f"{type(error).__name__} while serving {envelope.verb.name}; see the log") from error
        failure = self.carry_out()
        if failure and isinstance(request, ReserveRequest):  # who reads keeps its lease of what is there
            raise TierFull(f"no memory for a slab: {failure}")
        return reply
