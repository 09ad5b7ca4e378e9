"""The scheduler's half of the vLLM connector: what to promise, what to load, what to store.

Leases are asked for and given back on a thread of their own. The scheduler is told "not known yet" until the answer is
there; it waits for it only where that is set, and in a step no longer than is set, however many requests there are.
Waiting was the default once: the thread that asks and the scheduler then wanted the interpreter at the same moment, and
the answer was hardly ever there in time. A request holds its lease from before anything is promised until its load has
ended, whichever way; leases that are lost on the way end with their time to live, or with the process.

Blocks are never kept from the engine for the sake of a store. The engine says each step which blocks it is about to
overwrite, these go along as `StepWork.fresh`, and a worker that still copies one of them throws the copy away. So
neither an abort nor a dead daemon can leave a block behind that nobody gives back.
"""

from __future__ import annotations

import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from forebay.client.vllm_layout import Geometry
from forebay.client.vllm_work import Load, StepWork, Store
from forebay.kvstore.errors import ForebayError

LEASE_TTL_MS = 30_000
LEASE_USE_S = 10.0
"""A lease older than this is asked for anew before it is promised."""

CLOSE_S = 1.0


class HeldLease(Protocol):
    """What an `acquire` grants; true when it holds any block."""

    def __len__(self) -> int: ...

    def release(self) -> None: ...


class LeaseClient(Protocol):
    """What this side asks of a client; `forebay.client.Client` is one."""

    def acquire(self, ns: Any, hashes: Sequence[bytes], ttl_ms: int = 0) -> HeldLease: ...


@dataclass(slots=True)
class _Question:
    """One `acquire` on its way. Whoever comes second, the answer or the end of the request, releases the lease."""

    ns: Any
    hashes: Sequence[bytes]
    asked_at: float
    answered: threading.Event = field(default_factory=threading.Event)
    lease: HeldLease | None = None
    dropped: bool = False


class LeaseDesk:
    """Asks for leases, and gives them back, on a thread of its own, one after the other."""

    def __init__(self, client: LeaseClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[_Question | HeldLease | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="forebay-leases", daemon=True)
        self._thread.start()

    def ask(self, ns: Any, hashes: Sequence[bytes]) -> _Question:
        """Does not wait."""
        question = _Question(ns, hashes, self._clock())
        self._work.put(question)
        return question

    def drop(self, question: _Question) -> None:
        """Nobody wants the answer any more: a lease it brings, or brought, is released. Idempotent; does not wait."""
        with self._lock:
            question.dropped = True
            lease, question.lease = question.lease, None
        if lease is not None:
            self._work.put(lease)

    def is_old(self, question: _Question) -> bool:
        return self._clock() - question.asked_at > LEASE_USE_S

    def close(self) -> None:
        """What was dropped before is released."""
        self._work.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, _Question):
                self._answer(work)
            else:
                work.release()

    def _answer(self, question: _Question) -> None:
        lease = None
        try:
            if not question.dropped:
                lease = self._client.acquire(question.ns, question.hashes, LEASE_TTL_MS)
        except ForebayError:  # a bug of ours, to the scheduler a miss: it goes on without us
            pass
        finally:
            with self._lock:
                if not question.dropped:
                    question.lease, lease = lease, None
            if lease is not None:
                lease.release()
            question.answered.set()


@dataclass(slots=True)
class _Tracked:
    """A request that has blocks.

    Attributes:
        offered: leading blocks that were given to the workers to store, or offered to them.
    """

    request: Any
    block_ids: list[int] = field(default_factory=list)
    offered: int = 0


@dataclass(slots=True)
class _Asked:
    """A request's question and what it is for.

    Attributes:
        waited: a hook has waited for it; the next one does not.
    """

    question: _Question
    first_block: int
    waited: bool = False


class VllmScheduler:
    """For the scheduler's thread.

    Args:
        wait_s: the longest that the hooks of one step wait for the daemon's answers, taken together.
        give_up_s: a question unanswered for so long is a miss.
        loads, stores: whether this engine takes blocks from forebay, and gives it any.
    """

    def __init__(
        self,
        desk: LeaseDesk,
        ns: Any,
        geometry: Geometry,
        *,
        wait_s: float,
        give_up_s: float,
        loads: bool = True,
        stores: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._ns = ns
        self._geometry = geometry
        self._wait_s = self._wait_left_s = wait_s
        self._give_up_s = give_up_s
        self._loads_on = loads
        self._stores_on = stores
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._promised: dict[str, int] = {}
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Load] = []
        self._fresh: set[int] = set()
        self._reset = ""

    @property
    def open_leases(self) -> int:
        """Requests that hold a lease or wait for one."""
        return len(self._asked)

    @property
    def tracked(self) -> int:
        return len(self._tracked)

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's `get_num_new_matched_tokens`. Blocking: what is left of the step's `wait_s`.

        A request is promised blocks once between two preemptions: one whose load has failed computes.
        """
        id_, tokens = str(request.request_id), self._geometry.block_tokens
        first, last = computed_tokens // tokens, (int(request.num_tokens) - 1) // tokens
        skipped = not self._loads_on or getattr(request, "skip_reading_prefix_cache", False)
        if skipped or last <= first or self._promised.get(id_) == request.num_preemptions:
            self._forget_question(id_)
            return 0, False
        asked = self._asked.get(id_)
        if asked is not None and (asked.first_block != first or self._desk.is_old(asked.question)):
            self._forget_question(id_)
            asked = None
        if asked is None:
            hashes = self._geometry.names_of(request.block_hashes, first, last)
            if not hashes:
                return 0, False
            asked = self._asked[id_] = _Asked(self._desk.ask(self._ns, hashes), first)
        question = asked.question
        if not self._is_answered(asked):
            if self._clock() - question.asked_at < self._give_up_s:
                return None, False
            self._forget_question(id_)
            self._promised[id_] = request.num_preemptions
            return 0, False
        blocks = 0 if question.lease is None else min(len(question.lease), last - first)
        if not blocks:
            self._forget_question(id_)
            return 0, False
        return blocks * tokens, True

    def _is_answered(self, asked: _Asked) -> bool:
        """Waits for it at most once."""
        question = asked.question
        if question.answered.is_set():
            return True
        if asked.waited or self._wait_left_s <= 0:
            return False
        asked.waited = True
        begun = self._clock()
        answered = question.answered.wait(self._wait_left_s)
        self._wait_left_s -= self._clock() - begun
        return answered

    def allocated(self, request: Any, block_ids: Sequence[int], external_tokens: int) -> None:
        """vLLM's `update_state_after_alloc`: with tokens to load it is now certain that they are wanted."""
        id_ = str(request.request_id)
        self._tracked.setdefault(id_, _Tracked(request)).request = request
        asked = self._asked.get(id_)
        if not external_tokens:
            if asked is not None and self._promised.get(id_) != request.num_preemptions:
                self._forget_question(id_)
            return
        assert asked is not None, "tokens promised without a lease"
        first, count = asked.first_block, external_tokens // self._geometry.block_tokens
        ids = tuple(block_ids[first : first + count])
        self._promised[id_] = request.num_preemptions
        self._loads.append(Load(id_, tuple(asked.question.hashes[:count]), ids))
        self._fresh.update(ids)

    def step(self, output: Any) -> StepWork:
        """vLLM's `build_connector_meta`."""
        self._take_blocks(output)
        stores = self._stores(output) if self._stores_on else ()
        work = StepWork(tuple(self._loads), tuple(stores), frozenset(self._fresh), self._reset)
        self._loads, self._fresh, self._wait_left_s = [], set(), self._wait_s
        return work

    def loaded(self, request_ids: Iterable[str]) -> None:
        """All workers have ended these loads, well or not."""
        for id_ in request_ids:
            self._forget_question(id_)

    def finished(self, request_id: str) -> None:
        """The request has ended or was aborted. A load of it goes on: the workers hold leases of their own."""
        self._forget_question(request_id)
        self._promised.pop(request_id, None)
        self._tracked.pop(request_id, None)

    def reset(self, ns_of: Callable[[str], Any]) -> None:
        """Its weights may have changed: from now on this engine uses a namespace that no other has."""
        self._reset = secrets.token_hex(8)
        self._ns = ns_of(self._reset)
        for id_ in list(self._asked):
            self._forget_question(id_)
        for tracked in self._tracked.values():
            tracked.offered = 0

    def close(self) -> None:
        for id_ in list(self._asked):
            self._forget_question(id_)
        self._desk.close()

    def _forget_question(self, id_: str) -> None:
        asked = self._asked.pop(id_, None)
        if asked is not None:
            self._desk.drop(asked.question)

    def _take_blocks(self, output: Any) -> None:
        """Which blocks each request has now, and which of them are new to it."""
        for new in output.scheduled_new_reqs:
            self._replace(str(new.req_id), list(new.block_ids[0]), int(new.num_computed_tokens))
        cached = output.scheduled_cached_reqs
        for id_, ids, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if id_ in cached.resumed_req_ids:
                self._replace(id_, list(ids[0]) if ids else [], int(computed))
            elif ids:
                self._fresh.update(ids[0])
                if id_ in self._tracked:
                    self._tracked[id_].block_ids.extend(ids[0])

    def _replace(self, id_: str, block_ids: list[int], computed_tokens: int) -> None:
        """Blocks below the computed tokens were hit or loaded; the rest will be written."""
        self._fresh.update(block_ids[computed_tokens // self._geometry.block_tokens :])
        tracked = self._tracked.get(id_)
        if tracked is not None:
            tracked.block_ids, tracked.offered = block_ids, 0

    def _stores(self, output: Any) -> list[Store]:
        """The blocks that each scheduled request will have whole after this step and has not offered yet.

        The first offer begins at the start of the prompt: what the engine had in its own cache may be absent here.
        Tokens that are only drafted have no hash, so blocks with such are not offered.
        """
        computed = {str(new.req_id): int(new.num_computed_tokens) for new in output.scheduled_new_reqs}
        cached = output.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        stores = []
        for id_, scheduled in output.num_scheduled_tokens.items():
            tracked = self._tracked.get(id_)
            if tracked is None or id_ not in computed:
                continue
            whole = (computed[id_] + scheduled) // self._geometry.block_tokens
            if whole <= tracked.offered:
                continue
            first, last = tracked.offered, min(whole, len(tracked.block_ids))
            names = self._geometry.names_of(tracked.request.block_hashes, max(first - 1, 0), last)
            parent, names = (names[0], names[1:]) if first and names else (b"", names)
            if names:
                ids = tuple(tracked.block_ids[first : first + len(names)])
                stores.append(Store(id_, parent, tuple(names), ids))
                tracked.offered = first + len(names)
        return stores
