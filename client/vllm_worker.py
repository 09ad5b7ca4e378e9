"""A worker's half of the vLLM connector: copies between the engine's blocks and forebay, on threads of its own.

A load goes straight into the blocks that vLLM assigned and keeps for it. What could not be loaded is told block by
block, for vLLM to compute; where the model has several cache groups vLLM takes a load only as a whole. A store copies
out of blocks that vLLM may give away at any time; it is told so before anything is overwritten (`StepWork.fresh`): what
was copied by then is published, all else is thrown away. That order needs no lock: a mark found unset after a copy says
that the copy had ended before any overwriting began.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from forebay.client.hints import HintClient, tell
from forebay.client.results import BlockOutcome, FetchResult, RemovalResult
from forebay.client.segments import SegmentTable
from forebay.client.vllm_ledger import Notice
from forebay.client.vllm_work import Ending, Load, Part, StepWork, Store
from forebay.kvstore.errors import Timeout
from forebay.transports.messages import EvictScope

LOAD_THREADS = 2
STORE_JOBS_MAX = 1024
STORE_PART_BLOCKS = 128
SPARE_S = 0.02
"""How long a step may wait for copies out of blocks that it is about to overwrite, so that they are not lost."""

DEVICE_S = 60.0
"""How long the engine's device may take for what it was given before a copy."""

POLL_S = 100e-6

CLOSE_S = 5.0
SLEEP_S = 30.0
BAD_MAX = 1024
NOTICES_MAX = 4096
"""Notices that the engine has not taken; beyond that the oldest are lost."""

LOST = frozenset(("miss", "stale", "corrupt", "failed", "peer_lost"))
"""Reasons of a load which say that the blocks are not there; after any other the daemon only did not answer."""

_log = logging.getLogger("forebay.client")


class BlockClient(HintClient, Protocol):
    """What this side asks of a client; `forebay.client.Client` is one."""

    def fetch(
        self,
        ns: Any,
        hashes: Sequence[bytes],
        destination: object,
        block_ids: Sequence[int],
        *,
        stream: int | None,
    ) -> FetchResult: ...

    def reserve(self, ns: Any, hashes: Sequence[bytes], parent: bytes = b"", *, priority: int = 0) -> Any: ...

    def evict(self, ns: Any, hashes: Sequence[bytes], scope: EvictScope) -> RemovalResult: ...


@dataclass(slots=True, eq=False)
class _StoreJob:
    """A store under way.

    Attributes:
        ready: waits for the engine's device to have written the blocks.
        revoked: its blocks are about to be overwritten.
        copied: nothing is read from its blocks any more.
    """

    store: Store
    ns: Any
    ready: Callable[[], object]
    blocks: frozenset[int]
    revoked: bool = False
    copied: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True, slots=True)
class _Told:
    """What is to be told once all that came before it is stored."""

    ending: Ending
    ns: Any


class Counts:
    """What happened since it was last asked; may be used by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = {}

    def add(self, **values: float) -> None:
        with self._lock:
            for name, value in values.items():
                if value:
                    self._values[name] = self._values.get(name, 0) + value

    def take(self) -> dict[str, float]:
        with self._lock:
            values, self._values = self._values, {}
        return values


class VllmWorker:
    """For one rank. Methods are called by the engine's thread.

    Args:
        namespaces_of: each cache group's namespace after the reset of that name; empty: the first ones. None where this
            rank's pipeline stage has no layer of the group: its blocks are neither loaded nor stored here.
        block_bytes: of a block of each group.
        rank: for the notices.
        tells: whether it passes hints on, for all ranks of its pipeline stage.
    """

    def __init__(
        self,
        client: BlockClient,
        namespaces_of: Callable[[str], Sequence[Any]],
        block_bytes: Sequence[int],
        rank: int = 0,
        *,
        tells: bool = True,
    ) -> None:
        self._client = client
        self._namespaces_of = namespaces_of
        self._namespaces = namespaces_of("")
        self._reset = ""
        self._block_bytes = tuple(block_bytes)
        self._tables: Sequence[SegmentTable | None] = ()
        self._work = StepWork()
        self._lock = threading.Lock()
        self._jobs: set[_StoreJob] = set()
        self._loads: set[Future[int]] = set()
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        self._bad: dict[tuple[int, bytes], None] = {}
        self._rank = rank
        self._tells = tells
        self._notices: deque[Notice] = deque(maxlen=NOTICES_MAX)
        self._counts = Counts()
        self._late = threading.Event()
        self._loaders = ThreadPoolExecutor(LOAD_THREADS, "forebay-load")
        self._queue: queue.SimpleQueue[_StoreJob | _Told | None] = queue.SimpleQueue()
        self._storer = threading.Thread(target=self._run_stores, name="forebay-store", daemon=True)
        self._storer.start()
        self._closed = False

    def register(self, tables: Sequence[SegmentTable | None]) -> None:
        """Where each cache group's blocks lie; None for one without layers here.

        What may use them on a device is waited for by each job's `ready`.
        """
        self._tables = tables

    def unregister(self) -> None:
        """The engine is about to give its memory away: afterwards nothing is read from it or written to it.

        What was not stored by now is thrown away. Idempotent. Raises Timeout when a copy does not end.
        Blocking: until the copies under way have ended, `SLEEP_S` at most.
        """
        deadline = time.monotonic() + SLEEP_S
        with self._lock:
            jobs, loads = list(self._jobs), set(self._loads)
        for job in jobs:
            job.revoked = True
        ended = all(job.copied.wait(max(0.0, deadline - time.monotonic())) for job in jobs)
        if not ended or wait(loads, max(0.0, deadline - time.monotonic())).not_done:
            raise Timeout(f"copies of the engine's memory have not ended within {SLEEP_S:.0f} s")
        self._tables = ()

    # What a step calls, in order

    def begin(self, work: StepWork) -> None:
        """Before anything of the step runs. Blocking: `SPARE_S` at most, where copies out of its blocks are under way.

        Once a step: told the same work again it does nothing.
        """
        if work is self._work:
            return
        self._work = work
        if work.reset != self._reset:
            self._reset, self._namespaces = work.reset, self._namespaces_of(work.reset)
        self._queue_endings()
        if not work.fresh:
            return
        with self._lock:
            touched = [job for job in self._jobs if not job.blocks.isdisjoint(work.fresh)]
        deadline = time.monotonic() + SPARE_S
        for job in touched:
            if not job.copied.wait(max(0.0, deadline - time.monotonic())):
                job.revoked = True

    def _queue_endings(self) -> None:
        """One rank of a stage tells for all: the daemon knows the others' shards of its blocks."""
        if self._tells and self._queue.qsize() < STORE_JOBS_MAX and not self._closed:
            for ending in self._work.endings:
                if (namespace := self._namespaces[ending.group]) is not None:
                    self._queue.put(_Told(ending, namespace))

    def start_loads(self, ready: Callable[[], object]) -> None:
        """`ready` returns when the device has done what it was given so far: it may still use the loads' blocks."""
        for load in self._work.loads:
            future = self._loaders.submit(self._load, load, self._namespaces, ready)
            with self._lock:
                self._loads.add(future)
            future.add_done_callback(lambda done, load=load: self._ended(load, done))  # type: ignore[misc]

    def start_stores(self, ready: Callable[[], object]) -> None:
        """`ready` returns when the device has written the step's blocks; it is called on another thread."""
        for store in self._work.stores:
            if self._namespaces[store.group] is None:
                continue
            job = _StoreJob(store, self._namespaces[store.group], ready, frozenset(store.block_ids))
            with self._lock:
                if len(self._jobs) >= STORE_JOBS_MAX or self._closed:
                    self._counts.add(dropped_blocks=len(store.hashes))
                    continue
                self._jobs.add(job)
            self._queue.put(job)

    def take_loaded(self) -> set[str]:
        """Requests whose loads have ended, well or not, since the last call."""
        with self._lock:
            loaded, self._loaded = self._loaded, set()
        return loaded

    def take_failed_blocks(self) -> set[int]:
        """Blocks of those that are not what they should be; ask after `take_loaded`. None where groups are several."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        """Those whose load counts for nothing, where groups are several; ask after `take_loaded`."""
        with self._lock:
            failed, self._failed_requests = self._failed_requests, set()
        return failed

    def take_notices(self) -> list[Notice]:
        """What was found stored, and what was found missing, since the last call."""
        with self._lock:
            notices = list(self._notices)
            self._notices.clear()
        return notices

    def take_late(self) -> bool:
        """Whether, since the last call, a load was given up whose bytes may still come; ask before a step's kernels.

        They come before what the legacy default stream is given from then on: the engine's stream must come after it,
        or late bytes overwrite what is computed into those blocks.
        """
        late = self._late.is_set()
        self._late.clear()
        return late

    def take_counts(self) -> dict[str, float]:
        return self._counts.take()

    @property
    def open_stores(self) -> int:
        with self._lock:
            return len(self._jobs)

    def close(self) -> None:
        """Let what was given be stored, for `CLOSE_S` at most; then end. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._storer.join(CLOSE_S)
        with self._lock:
            for job in self._jobs:
                job.revoked = True
        self._loaders.shutdown(wait=False, cancel_futures=True)

    # Loading, on the loaders' threads

    def _load(self, load: Load, namespaces: Sequence[Any], ready: Callable[[], object]) -> int:
        """How many blocks are right, part after part, up to the first that is not."""
        begun = time.perf_counter()
        ready()
        right = 0
        for part in load.parts:
            blocks = self._load_part(part, namespaces[part.group])
            right += blocks
            if blocks < len(part.hashes):
                break
        self._counts.add(loads=1, load_seconds=time.perf_counter() - begun)
        return right

    def _load_part(self, part: Part, ns: Any) -> int:
        if ns is None:
            return len(part.hashes)
        assert self._tables, "loads before the caches were registered"
        result = self._client.fetch(ns, part.hashes, self._tables[part.group], part.block_ids, stream=None)
        if result.reason == "copy_timeout":
            self._late.set()
        if result.reason == "late":
            self._counts.add(late_loads=1)
        if result.reason == "corrupt":
            self._mark_bad(part.group, part.hashes[result.blocks])
        if result.blocks < len(part.hashes) and result.reason in LOST:
            self._tell(part.group, part.hashes[result.blocks :])
        self._counts.add(loaded_blocks=result.blocks, loaded_bytes=result.blocks * self._block_bytes[part.group])
        return result.blocks

    def _ended(self, load: Load, future: Future[int]) -> None:
        """However a load ended, its request is told of: vLLM would wait for it for ever."""
        right = 0
        if not future.cancelled():
            error = future.exception()
            if error is None:
                right = future.result()
            else:
                _log.warning("nothing was loaded for a request: %s: %s", type(error).__name__, error)
        ids = [block for part in load.parts for block in part.block_ids]
        failed = ids[right:]
        with self._lock:
            self._loads.discard(future)
            if failed and len(self._block_bytes) > 1:
                self._failed_requests.add(load.request_id)
                failed = ids
            else:
                self._failed_blocks.update(failed)
            self._loaded.add(load.request_id)
        self._counts.add(failed_blocks=len(failed))

    def _tell(self, group: int, hashes: Sequence[bytes], parent: bytes = b"", *, stored: bool = False) -> None:
        with self._lock:
            self._notices.append(Notice(self._rank, group, stored, parent, tuple(hashes)))

    def _mark_bad(self, group: int, name: bytes) -> None:
        with self._lock:
            self._bad[group, name] = None
            if len(self._bad) > BAD_MAX:
                del self._bad[next(iter(self._bad))]

    # Storing, on the storer's thread

    def _run_stores(self) -> None:
        while (job := self._queue.get()) is not None:
            if isinstance(job, _Told):
                self._tell_ending(job)
                continue
            begun = time.perf_counter()
            try:
                self._store(job)
            except Exception as error:  # noqa: BLE001  # also the device's own; later stores may go better
                _log.warning("%d blocks were not stored: %s: %s", len(job.store.hashes), type(error).__name__, error)
                self._counts.add(store_errors=1)
            finally:
                job.copied.set()
                with self._lock:
                    self._jobs.discard(job)
                self._counts.add(stores=1, store_seconds=time.perf_counter() - begun)

    def _tell_ending(self, told: _Told) -> None:
        ending = told.ending
        try:
            self._counts.add(told_hints=tell(self._client, told.ns, ending.hashes, ending.hints, ending.keep))
        except Exception as error:  # noqa: BLE001  # stores must go on
            _log.warning("a hint was not told: %s: %s", type(error).__name__, error)

    def _store(self, job: _StoreJob) -> None:
        if not job.revoked:
            job.ready()
        parent, hashes, ids = job.store.parent, job.store.hashes, job.store.block_ids
        self._remove_bad(job)
        for first in range(0, len(hashes), STORE_PART_BLOCKS):
            part = hashes[first : first + STORE_PART_BLOCKS]
            last = first + len(part) >= len(hashes)
            if not self._store_part(job, parent, part, ids[first : first + len(part)], last=last):
                return
            parent = part[-1]

    def _store_part(
        self, job: _StoreJob, parent: bytes, hashes: Sequence[bytes], ids: Sequence[int], *, last: bool
    ) -> bool:
        """Whether what follows has a place to go to."""
        assert self._tables, "stores before the caches were registered"
        group = job.store.group
        if job.revoked:
            self._counts.add(revoked_blocks=len(hashes))
            return False
        with self._reserve(job, hashes, parent) as reservation:
            codes = reservation.codes
            granted = [i for i, code in enumerate(codes) if code == BlockOutcome.STORED]
            failed: Sequence[int] = ()
            if granted:
                failed = reservation.gather(self._tables[group], [ids[i] for i in granted], stream=None)
            if job.revoked:
                self._counts.add(revoked_blocks=len(granted))
                return False
            if last:
                job.copied.set()
            whole = min([len(granted), *failed])
            stored = reservation.commit(range(whole, len(granted))) if granted else 0
        self._counts.add(
            stored_blocks=stored,
            stored_bytes=stored * self._block_bytes[group],
            present_blocks=len(codes) - len(granted) - _refused(codes),
            rejected_blocks=_refused(codes) + len(granted) - stored,
        )
        found = next((i for i, code in enumerate(codes) if code not in _FOUND), len(codes))
        if found and stored == len(granted):
            self._tell(group, hashes[:found], parent, stored=True)
        return not _refused(codes) and stored == len(granted)

    def _reserve(self, job: _StoreJob, hashes: Sequence[bytes], parent: bytes) -> Any:
        """A window's blocks are stored without the one before them, where nobody has that one any more."""
        priority = job.store.priority
        reservation = self._client.reserve(job.ns, hashes, parent, priority=priority)
        if job.store.orphans and parent and reservation.codes[:1] == bytes([BlockOutcome.ORPHAN]):
            reservation.abort()
            return self._client.reserve(job.ns, hashes, priority=priority)
        return reservation

    def _remove_bad(self, job: _StoreJob) -> None:
        """A block whose checksum was wrong goes, with what follows it, before its right bytes are offered."""
        with self._lock:
            bad = [name for name in job.store.hashes if (job.store.group, name) in self._bad]
        for name in bad[:1]:
            if not self._client.evict(job.ns, [name], EvictScope.PREFIX).kept:
                with self._lock:
                    self._bad.pop((job.store.group, name), None)


def wait_for(passed: Callable[[], bool]) -> None:
    """Until an event of the device has passed; by asking, for a wait in the driver has no deadline. Raises Timeout."""
    deadline, pause = time.monotonic() + DEVICE_S, threading.Event()
    while not passed():
        if time.monotonic() > deadline:
            raise Timeout(f"the engine's device has not done in {DEVICE_S:.0f} s what it was given")
        pause.wait(POLL_S)


_FOUND = (BlockOutcome.STORED, BlockOutcome.PRESENT, BlockOutcome.IN_FLIGHT)


def _refused(codes: bytes) -> int:
    return sum(code not in _FOUND for code in codes)
