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

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

from forebay.client.hints import NO_HINTS, STOPPED_NAMES, HintReader, Hints
from forebay.client.vllm_backlog import EngineBacklog, prefill_of
from forebay.client.vllm_layout import Geometry
from forebay.client.vllm_leases import Chain, LeaseDesk, Question
from forebay.client.vllm_work import Ending, Load, Part, StepWork, Store

NO_BLOCK = 0
"""What vLLM puts where a window has left its blocks behind."""


@dataclass(slots=True)
class _Tracked:
    """A request that has blocks.

    Attributes:
        block_ids: of each cache group, by position in the prompt; those that a window has left behind are others' now.
        offered: of each group, leading blocks that were given to the workers to store, or offered to them.
        hints: what its caller knows of it.
        stale: its preemptions when the caches were reset under it; until the next its blocks are of before, not stored.
    """

    request: Any
    hints: Hints
    block_ids: list[list[int]] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    stale: int = -1


@dataclass(slots=True)
class _Asked:
    """A request's question.

    Attributes:
        waited: a hook has waited for it; the next one does not.
    """

    question: Question
    waited: bool = False


class VllmScheduler:
    """For the scheduler's thread.

    Args:
        namespaces, geometries: of each cache group, in the engine's order; of a group those of all pipeline stages that
            have layers in it. Without any namespace everything is a miss.
        wait_s: the longest that the hooks of one step wait for the daemon's answers, taken together.
        give_up_s: a question unanswered for so long is a miss.
        loads, stores: whether this engine takes blocks from forebay, and gives it any.
    """

    def __init__(
        self,
        desk: LeaseDesk,
        namespaces: Sequence[Sequence[Any]],
        geometries: Sequence[Geometry],
        *,
        wait_s: float,
        give_up_s: float,
        loads: bool = True,
        stores: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._desk = desk
        self._namespaces = namespaces
        self._geometries = tuple(geometries)
        self._step_tokens = lcm(*(geometry.block_tokens for geometry in geometries))
        self._wait_s = self._wait_left_s = wait_s
        self._give_up_s = give_up_s
        self._loads_on = loads
        self._stores_on = stores
        self._clock = clock
        self._asked: dict[str, _Asked] = {}
        self._promised: dict[str, int] = {}
        self._local: dict[str, int] = {}
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Load] = []
        self._fresh: set[int] = set()
        self._reset = ""
        self._backlog = EngineBacklog()
        self._hints = HintReader()
        self._endings: list[Ending] = []
        self._counted = 0

    @property
    def open_leases(self) -> int:
        """Requests that hold a lease or wait for one."""
        return len(self._asked)

    @property
    def tracked(self) -> int:
        return len(self._tracked)

    @property
    def uncomputed(self) -> int:
        """Requests whose prompts are not computed yet."""
        return len(self._backlog)

    def arrived(self, request: Any) -> None:
        """vLLM's `on_new_request`."""
        self._backlog.waits(str(request.request_id), int(request.num_tokens))

    def matched(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """vLLM's `get_num_new_matched_tokens`. Blocking: what is left of the step's `wait_s`.

        A request is promised blocks once between two preemptions: one whose load has failed computes.
        """
        id_, step = str(request.request_id), self._step_tokens
        self._local[id_] = computed_tokens
        first, last = computed_tokens // step * step, (int(request.num_tokens) - 1) // step * step
        skipped = not self._loads_on or getattr(request, "skip_reading_prefix_cache", False)
        if skipped or last <= first or self._promised.get(id_) == request.num_preemptions:
            self._forget_question(id_)
            return 0, False
        asked = self._asked.get(id_)
        if asked is not None and (asked.question.first != first or self._desk.is_old(asked.question)):
            self._forget_question(id_)
            asked = None
        if asked is None:
            chains = self._chains(request, first, last)
            if not chains:
                return 0, False
            self._backlog.waits(id_, int(request.num_tokens) - computed_tokens)
            asked = self._asked[id_] = _Asked(self._desk.ask(chains, first, step, self._backlog.before(id_)))
        question = asked.question
        if not self._is_answered(asked):
            if self._clock() - question.asked_at < self._give_up_s:
                return None, False
            self._forget_question(id_)
            self._promised[id_] = request.num_preemptions
            return 0, False
        tokens = min(question.tokens, last) - first
        if tokens <= 0:
            self._forget_question(id_)
            return 0, False
        return tokens, True

    def _chains(self, request: Any, first: int, last: int) -> tuple[Chain, ...]:
        """Each group's, between those tokens; none where the engine has hashed nothing there."""
        chains = []
        for namespaces, geometry in zip(self._namespaces, self._geometries):
            size = geometry.block_tokens
            names = geometry.names_of(request.block_hashes, first // size, last // size)
            if not names:
                return ()
            chains.append(Chain(namespaces, geometry, names))
        return tuple(chains)

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

    def allocated(self, request: Any, block_ids: Sequence[Sequence[int]], external_tokens: int) -> None:
        """vLLM's `update_state_after_alloc`: with tokens to load it is now certain that they are wanted.

        Without any another connector may be about to load them, under vLLM's `MultiConnector`: whatever the engine has
        not computed itself may be overwritten from the next step on.
        """
        id_ = str(request.request_id)
        tracked = self._tracked.get(id_)
        if tracked is None:
            hints = self._hints.read(getattr(request, "kv_transfer_params", None))
            self._tracked[id_] = _Tracked(request, hints)
        else:
            tracked.request = request
        local = self._local.pop(id_, None)
        for geometry, ids in zip(self._geometries, block_ids if local is not None else ()):
            self._fresh.update(ids[(local or 0) // geometry.block_tokens :])
        asked = self._asked.get(id_)
        if not external_tokens:
            if asked is not None and self._promised.get(id_) != request.num_preemptions:
                self._forget_question(id_)
            return
        assert asked is not None, "tokens promised without a lease"
        self._backlog.waits(id_, int(request.num_tokens) - asked.question.first - external_tokens)
        self._promised[id_] = request.num_preemptions
        parts = tuple(_parts(asked.question, block_ids, asked.question.first + external_tokens))
        self._loads.append(Load(id_, parts))

    def step(self, output: Any) -> StepWork:
        """vLLM's `build_connector_meta`."""
        self._take_blocks(output)
        self._fresh.discard(NO_BLOCK)
        computed = _computed(output)
        self._take_progress(output.num_scheduled_tokens, computed)
        stores = self._stores(output.num_scheduled_tokens, computed) if self._stores_on else ()
        prefill = prefill_of(output.num_scheduled_tokens, computed)
        work = StepWork(
            tuple(self._loads), tuple(stores), frozenset(self._fresh), self._reset, prefill, tuple(self._endings)
        )
        self._loads, self._fresh, self._endings, self._wait_left_s = [], set(), [], self._wait_s
        return work

    def loaded(self, request_ids: Iterable[str]) -> None:
        """All workers have ended these loads, well or not."""
        for id_ in request_ids:
            self._forget_question(id_)

    def finished(self, request_id: str) -> None:
        """The request has ended or was aborted. A load of it goes on: the workers hold leases of their own."""
        self._forget_question(request_id)
        self._backlog.gone(request_id)
        self._local.pop(request_id, None)
        self._promised.pop(request_id, None)
        self._tracked.pop(request_id, None)

    def ending(self, request: Any) -> None:
        """A request is about to be `finished`: what is known of it goes to the workers, behind its last stores.

        Of one that was aborted no more is told than that: whoever asked may ask again.
        """
        tracked = self._tracked.get(str(request.request_id))
        status = _status(request)
        if tracked is None or status not in _STOP_REASONS:
            return
        hints = tracked.hints if status in _ANSWERED else NO_HINTS
        hints = replace(hints, stop_reason=hints.stop_reason or _STOP_REASONS[status])
        only_stop = not (hints.done or hints.expect_s)
        for group, geometry in enumerate(self._geometries):
            size = geometry.block_tokens
            names = geometry.names_of(request.block_hashes, 0, int(request.num_tokens) // size)
            names = names[geometry.needed_from(len(names) * size) // size :]
            names = names[-STOPPED_NAMES:] if only_stop else names
            if names:
                self._endings.append(Ending(group, tuple(names), hints, hints.keep_tokens // size))

    def take_counts(self) -> dict[str, float]:
        """What happened since it was last asked."""
        ignored = self._hints.ignored - self._counted
        self._counted += ignored
        return {"ignored_hints": ignored} if ignored else {}

    def adopt(self, namespaces: Sequence[Sequence[Any]]) -> None:
        """The workers have told what they hold, before any request."""
        self._namespaces = namespaces

    def reset(self, namespaces_of: Callable[[str], Sequence[Sequence[Any]]]) -> None:
        """Its weights may have changed: from now on this engine uses a namespace that no other has."""
        self._reset = secrets.token_hex(8)
        self._namespaces = namespaces_of(self._reset)
        self._endings = []
        for id_ in list(self._asked):
            self._forget_question(id_)
        for tracked in self._tracked.values():
            if _status(tracked.request) != "PREEMPTED":
                tracked.stale = int(tracked.request.num_preemptions)

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
            self._replace(str(new.req_id), new.block_ids, int(new.num_computed_tokens))
        cached = output.scheduled_cached_reqs
        for id_, ids, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            if id_ in cached.resumed_req_ids:
                self._replace(id_, ids or [[] for _ in self._geometries], int(computed))
            elif ids:
                tracked = self._tracked.get(id_)
                for group, more in enumerate(ids):
                    self._fresh.update(more)
                    if tracked is not None and tracked.block_ids:
                        tracked.block_ids[group].extend(more)

    def _replace(self, id_: str, block_ids: Sequence[Sequence[int]], computed_tokens: int) -> None:
        """Blocks below the computed tokens were hit or loaded; the rest will be written."""
        for geometry, ids in zip(self._geometries, block_ids, strict=True):
            self._fresh.update(ids[computed_tokens // geometry.block_tokens :])
        tracked = self._tracked.get(id_)
        if tracked is not None:
            tracked.block_ids, tracked.offered = [list(ids) for ids in block_ids], [0] * len(self._geometries)

    def _take_progress(self, scheduled: Mapping[str, int], computed: Mapping[str, int]) -> None:
        """What of the prompts is left after this step."""
        if not self._backlog:
            return
        for id_, tokens in scheduled.items():
            tracked = self._tracked.get(id_)
            if tracked is not None and id_ in computed:
                self._backlog.ran(id_, int(tracked.request.num_tokens) - computed[id_] - tokens)

    def _stores(self, scheduled: Mapping[str, int], computed: Mapping[str, int]) -> list[Store]:
        """The blocks that each scheduled request will have whole after this step and has not offered yet.

        The first offer begins at the start of the prompt, or of the window: what the engine had in its own cache may be
        absent here. Tokens that are only drafted have no hash, so blocks with such are not offered.
        """
        stores = []
        for id_, tokens in scheduled.items():
            tracked = self._tracked.get(id_)
            if tracked is None or id_ not in computed or tracked.stale == tracked.request.num_preemptions:
                continue
            for group in range(len(tracked.block_ids)):
                store = self._store(id_, tracked, group, computed[id_], computed[id_] + tokens)
                if store is not None:
                    stores.append(store)
        return stores

    def _store(self, id_: str, tracked: _Tracked, group: int, computed: int, whole: int) -> Store | None:
        """One group's. The engine has given away what its window left behind at `computed` tokens."""
        geometry, ids = self._geometries[group], tracked.block_ids[group]
        size = geometry.block_tokens
        first = max(tracked.offered[group], geometry.needed_from(computed) // size)
        last = min(whole // size, len(ids))
        if last <= first:
            return None
        names = geometry.names_of(tracked.request.block_hashes, max(first - 1, 0), last)
        parent, names = (names[0], names[1:]) if first and names else (b"", names)
        if not names:
            return None
        tracked.offered[group] = first + len(names)
        blocks = tuple(ids[first : first + len(names)])
        return Store(id_, group, parent, tuple(names), blocks, geometry.is_local, tracked.hints.priority)


def _status(request: Any) -> str:
    """The name of vLLM's status of it."""
    return str(getattr(getattr(request, "status", None), "name", ""))


def _computed(output: Any) -> dict[str, int]:
    """Tokens of each scheduled request that are there before the step."""
    computed = {str(new.req_id): int(new.num_computed_tokens) for new in output.scheduled_new_reqs}
    cached = output.scheduled_cached_reqs
    computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    return computed


_STOP_REASONS = {"FINISHED_STOPPED": "stop", "FINISHED_LENGTH_CAPPED": "length", "FINISHED_ABORTED": "abort"}
"""By the names of vLLM's statuses. Whether it stopped for a tool is not known here: that is parsed later."""
_ANSWERED = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED")


def _parts(question: Question, block_ids: Sequence[Sequence[int]], end: int) -> Iterable[Part]:
    """What each group has to load so that the engine can go on from `end` tokens."""
    for group, (chain, ids) in enumerate(zip(question.chains, block_ids, strict=True)):
        size = chain.geometry.block_tokens
        begin, last = max(question.first, chain.geometry.needed_from(end)) // size, end // size
        names = chain.names[begin - question.first // size : last - question.first // size]
        if names:
            yield Part(group, tuple(names), tuple(ids[begin:last]))
