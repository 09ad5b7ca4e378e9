"""Jobs of a cache tier that lives in an engine's scheduler: handed in, done on threads of their own, collected later.

The scheduler must not wait, so all that talks to the daemon happens on two lanes: one for lookups and loads, which
requests wait for, and one for stores, which nobody waits for. Both are bounded; what does not fit fails at once, which
is a miss for a lookup and a lost store for a store. Each call has the client's deadlines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from forebay.client import scattered
from forebay.client.namespaces import Namespace
from forebay.client.segments import SegmentTable
from forebay.client.sync import Client
from forebay.kvstore.errors import ForebayError, Timeout

_Find: TypeAlias = Callable[[Client, Namespace, Sequence[bytes]], list[bool]]

log = logging.getLogger(__name__)

QUEUE_JOBS_MAX = 256
LOOKUP_BLOCKS_MAX = 512
"""Blocks of one lookup job: a load waits for no more than that."""
DRAIN_S = 30.0
"""How long `drain` waits for queued jobs, and again for those being done after it has given up the queued ones."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A job's outcome: `right` says of each of its blocks whether it was copied; none was when it was given up."""

    job_id: int
    is_load: bool
    keys: tuple[bytes, ...]
    right: tuple[bool, ...]
    transfer_s: float

    @property
    def success(self) -> bool:
        return all(self.right)


class Lane:
    """A thread and its bounded queue of tasks, done in order."""

    def __init__(self, name: str, tasks_max: int) -> None:
        self._tasks: deque[tuple[Callable[[], None], Callable[[], None]]] = deque()
        self._tasks_max = tasks_max
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, task: Callable[[], None], given_up: Callable[[], None]) -> bool:
        """Queue a task; `given_up` is called instead if it is discarded. False: no room, or closed."""
        with self._changed:
            if self._closed or len(self._tasks) >= self._tasks_max:
                return False
            self._tasks.append((task, given_up))
            self._changed.notify_all()
            return True

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is queued or being done; False when the time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._tasks and not self._busy, timeout_s)

    def discard(self) -> None:
        """Give up what is queued; what is being done goes on."""
        with self._changed:
            dropped = list(self._tasks)
            self._tasks.clear()
            self._changed.notify_all()
        for _, given_up in dropped:
            given_up()

    def close(self, timeout_s: float) -> bool:
        """Give up what is queued and end the thread; False when it is still at work after the time."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self.discard()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (task := self._next()) is not None:
            try:
                task()
            except Exception:
                log.exception("a task of %s met a bug; the next ones are done", threading.current_thread().name)

    def _next(self) -> Callable[[], None] | None:
        """Wait for the next task, which then is being done; None once the lane is closed and empty."""
        with self._changed:
            self._busy = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: bool(self._tasks) or self._closed)  # ends with `close`
            if not self._tasks:
                return None
            task, _ = self._tasks.popleft()
            self._busy = True
            return task


@dataclass(slots=True)
class _Request:
    """What one request asked: key -> to be loaded, or None while not known; and the block that its stores go on."""

    verdicts: dict[bytes, bool | None] = field(default_factory=dict)
    parent: bytes = b""


class TierJobs:
    """Lookups, loads and stores of one tier. Called by one thread at a time (the scheduler's); returns at once.

    Args:
        table: the engine's own memory, that loads write and stores read. The engine leaves a block alone until its
            job is finished.
        name_of: the hash in `ns` that stands for an engine's key; called on the lanes.
        chain_of: which chain of blocks a key belongs to, of which the engine loads the leading ones and computes the
            rest; empty for a key that it may want without those before it. Of a chain no more is told to be stored than
            the daemon's plan finds worth loading.
    """

    def __init__(
        self,
        client: Client,
        ns: Namespace,
        table: SegmentTable,
        name_of: Callable[[bytes], bytes],
        chain_of: Callable[[bytes], bytes],
    ) -> None:
        self._client = client
        self._ns = ns
        self._table: SegmentTable | None = table
        self._name_of = name_of
        self._chain_of = chain_of
        self._reading = Lane("forebay-tier-read", QUEUE_JOBS_MAX)
        self._writing = Lane("forebay-tier-write", QUEUE_JOBS_MAX)
        self._requests: dict[str, _Request] = {}
        self._askers: dict[bytes, dict[str, dict[bytes, bool | None]]] = {}
        """Key -> verdicts of each request that has one on it: what a job tells costs no walk over all requests."""
        self._unasked: dict[tuple[str, bytes], list[bytes]] = {}
        """Keys by request and chain, as the engine has asked for them."""
        self._finished: deque[Finished] = deque()
        self._answers: deque[tuple[str, Sequence[bytes], Sequence[bool]]] = deque()

    # Lookups

    def lookup(self, request_id: str, key: bytes) -> bool | None:
        """Whether to load a block; None: not known yet, ask again after the next `ask`."""
        if self._answers:
            self._take_answers()
        request = self._requests.get(request_id)
        if request is None:
            request = self._requests[request_id] = _Request()
        verdict = request.verdicts.get(key)
        if verdict:
            request.parent = key
        elif verdict is None and key not in request.verdicts:
            request.verdicts[key] = None
            self._askers.setdefault(key, {})[request_id] = request.verdicts
            self._unasked.setdefault((request_id, self._chain_of(key)), []).append(key)
        return verdict

    def ask(self) -> None:
        """Send what `lookup` was asked since the last time; when there is no room for it, those are misses."""
        self._take_answers()
        unasked, self._unasked = self._unasked, {}
        for (request_id, chain), keys in unasked.items():
            find = scattered.worth_loading if chain else scattered.stored
            for start in range(0, len(keys), LOOKUP_BLOCKS_MAX):
                part = keys[start : start + LOOKUP_BLOCKS_MAX]
                if not self._put_lookup(request_id, part, find):
                    self._requests[request_id].verdicts.update(dict.fromkeys(part, False))

    def forget(self, request_id: str) -> None:
        """The request ended; jobs of it may still be under way."""
        for asked in [asked for asked in self._unasked if asked[0] == request_id]:
            del self._unasked[asked]
        request = self._requests.pop(request_id, None)
        for key in request.verdicts if request else ():
            askers = self._askers[key]
            askers.pop(request_id, None)
            if not askers:
                del self._askers[key]

    def _put_lookup(self, request_id: str, keys: list[bytes], find: _Find) -> bool:
        def given_up() -> None:
            self._answers.append((request_id, keys, [False] * len(keys)))

        def task() -> None:
            found = [False] * len(keys)
            try:
                if self._client.options.plan != "never":
                    found = find(self._client, self._ns, self._names(keys))
            except ForebayError as error:
                log.warning("blocks were not looked up: %s: %s", type(error).__name__, error)
            finally:  # whatever happened: the engine asks until there is an answer
                self._answers.append((request_id, keys, found))

        return self._reading.put(task, given_up)

    def _take_answers(self) -> None:
        while self._answers:
            request_id, keys, found = self._answers.popleft()
            request = self._requests.get(request_id)
            if request is None:
                continue
            for key, present in zip(keys, found, strict=True):
                if request.verdicts.get(key, False) is None:  # a load that failed meanwhile knows better
                    request.verdicts[key] = present

    def _names(self, keys: Sequence[bytes]) -> list[bytes]:
        return list(map(self._name_of, keys))

    # Transfers

    def load(self, job_id: int, keys: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Copy stored blocks into the engine's memory."""

        def copy(table: SegmentTable) -> list[bool]:
            return scattered.fetch_each(self._client, self._ns, self._names(keys), table, block_ids)

        self._put(self._reading, job_id, tuple(keys), copy, is_load=True)

    def store(self, job_id: int, request_id: str, keys: Sequence[bytes], block_ids: Sequence[int]) -> None:
        """Copy blocks of the engine's memory to the daemon; they go on what the request found or stored last."""
        request = self._requests.setdefault(request_id, _Request())
        parent = request.parent
        if keys:
            request.parent = keys[-1]

        def copy(table: SegmentTable) -> list[bool]:
            before = self._name_of(parent) if parent else b""
            return scattered.store_chain(self._client, self._ns, self._names(keys), table, block_ids, before)

        self._put(self._writing, job_id, tuple(keys), copy, is_load=False)

    def touch(self, keys: Sequence[bytes]) -> None:
        """Hint that blocks are in use; dropped when the lane has no room."""
        self._writing.put(lambda: self._touch(keys), lambda: None)

    def _touch(self, keys: Sequence[bytes]) -> None:
        try:
            self._client.touch(self._ns, self._names(keys))
        except ForebayError:  # a hint: its loss costs nothing that could be told
            return

    def _put(
        self,
        lane: Lane,
        job_id: int,
        keys: tuple[bytes, ...],
        copy: Callable[[SegmentTable], list[bool]],
        *,
        is_load: bool,
    ) -> None:
        nothing = (False,) * len(keys)

        def given_up() -> None:
            self._finished.append(Finished(job_id, is_load, keys, nothing, 0.0))

        def task() -> None:
            begun, right, table = time.perf_counter(), nothing, self._table
            try:
                right = tuple(copy(table)) if table is not None else nothing
            except ForebayError as error:
                log.warning("job %d copied nothing: %s: %s", job_id, type(error).__name__, error)
            finally:
                self._finished.append(Finished(job_id, is_load, keys, right, time.perf_counter() - begun))

        if not lane.put(task, given_up):
            given_up()

    def finished(self) -> list[Finished]:
        """Jobs that ended since the last call. Verdicts follow: what was stored is there, what a load lacked is not."""
        done: list[Finished] = []
        while self._finished:
            job = self._finished.popleft()
            done.append(job)
            for key, right in zip(job.keys, job.right, strict=True):
                if right != job.is_load:
                    for verdicts in self._askers.get(key, {}).values():
                        verdicts[key] = right
        return done

    # Life

    def drain(self) -> None:
        """Wait until no job is queued or being done; their outcomes are then there to collect.

        After `DRAIN_S` the queued ones are given up. Raises Timeout when one is still being done `DRAIN_S` later.
        """
        for lane in (self._reading, self._writing):
            if not lane.wait_idle(DRAIN_S):
                lane.discard()
                if not lane.wait_idle(DRAIN_S):
                    raise Timeout("a copy of the forebay tier does not end")

    def close(self) -> None:
        """Give up what is queued, end the threads, let go of the engine's memory.

        Raises Timeout when a copy is still at work after `DRAIN_S`: the engine's memory must stay as long as that.
        """
        ended = [lane.close(DRAIN_S) for lane in (self._reading, self._writing)]
        self._client.close()
        if not all(ended):
            raise Timeout("a copy of the forebay tier does not end; the memory it works on must stay")
        self._table = None
