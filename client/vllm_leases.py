"""Leases for the vLLM connector's scheduler, asked for and given back on a thread of their own.

A model's layers may be in several cache groups, each with blocks of its own: full attention needs all of a prompt's, a
sliding window or a chunk only the last few. A question is about all groups at once, and its answer a number of tokens
that every group can go on from, with leases of just the blocks which that takes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from forebay.client.vllm_layout import Geometry
from forebay.kvstore.planner import NO_BACKLOG, Backlog

LEASE_TTL_MS = 30_000
LEASE_USE_S = 10.0
"""A lease older than this is asked for anew before it is promised."""

CLOSE_S = 1.0
WINDOW_ROUNDS_MAX = 8
"""How often a shorter prefix is tried, where a window has a gap, until the answer is none."""

_log = logging.getLogger("forebay.client")


class HeldLease(Protocol):
    """What an `acquire` grants; its length is the number of blocks it holds."""

    def __len__(self) -> int: ...

    def release(self) -> None: ...


class Advice(Protocol):
    """What a `lookup` answers."""

    @property
    def worth_loading(self) -> int: ...


class LeaseClient(Protocol):
    """What this side asks of a client; `forebay.client.Client` is one."""

    def lookup(self, ns: Any, hashes: Sequence[bytes], backlog: Backlog) -> Advice: ...

    def acquire(self, ns: Any, hashes: Sequence[bytes], ttl_ms: int = 0) -> HeldLease: ...


@dataclass(frozen=True, slots=True)
class Chain:
    """A prompt's blocks in one cache group.

    Attributes:
        namespaces: of each pipeline stage that has layers in the group; a block counts when it is in all of them.
        names: those that continue what the engine has computed already.
    """

    namespaces: Sequence[Any]
    geometry: Geometry
    names: Sequence[bytes]


@dataclass(slots=True)
class Question:
    """One on its way. Whoever comes second, the answer or the end of the request, releases the leases.

    Attributes:
        chains: one a cache group, in the engine's order.
        first: tokens that the engine has; all chains begin there.
        step: tokens that an answer is a multiple of.
        backlog: what the engine had to compute beside this request when it was asked.
        tokens: the answer, `first` for nothing.
    """

    chains: tuple[Chain, ...]
    first: int
    step: int
    asked_at: float
    backlog: Backlog = NO_BACKLOG
    answered: threading.Event = field(default_factory=threading.Event)
    tokens: int = 0
    leases: Sequence[HeldLease] = ()
    dropped: bool = False


class LeaseDesk:
    """Answers questions, and gives leases back, one after the other."""

    def __init__(self, client: LeaseClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._client = client
        self._clock = clock
        self._lock = threading.Lock()
        self._work: queue.SimpleQueue[Question | Sequence[HeldLease] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="forebay-leases", daemon=True)
        self._thread.start()

    def ask(self, chains: tuple[Chain, ...], first: int, step: int, backlog: Backlog = NO_BACKLOG) -> Question:
        """Does not wait."""
        question = Question(chains, first, step, self._clock(), backlog, tokens=first)
        self._work.put(question)
        return question

    def drop(self, question: Question) -> None:
        """Nobody wants the answer any more: leases it brings, or brought, are released. Idempotent; does not wait."""
        with self._lock:
            question.dropped = True
            leases, question.leases = question.leases, ()
        if leases:
            self._work.put(leases)

    def is_old(self, question: Question) -> bool:
        return self._clock() - question.asked_at > LEASE_USE_S

    def close(self) -> None:
        """What was dropped before is released."""
        self._work.put(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if isinstance(work, Question):
                self._answer(work)
            else:
                _release(work)

    def _answer(self, question: Question) -> None:
        tokens, leases = question.first, ()  # type: int, Sequence[HeldLease]
        try:
            if not question.dropped:
                tokens, leases = hold(self._client, question)
        except Exception as error:  # noqa: BLE001  # a bug of ours, to the scheduler a miss: later ones are answered
            _log.warning("a prompt was not looked up: %s: %s", type(error).__name__, error)
        finally:
            with self._lock:
                if not question.dropped:
                    question.tokens, question.leases, leases = tokens, leases, ()
            question.answered.set()
            _release(leases)


def hold(client: LeaseClient, question: Question) -> tuple[int, Sequence[HeldLease]]:
    """The most tokens that all groups can go on from, and leases of the blocks which that takes.

    Full attention is asked first, for as much of the prompt as the daemon's plan finds worth loading. Then each window
    must be there right before those tokens; where it has a gap, what comes before the gap is tried.
    """
    held: list[HeldLease] = []
    windows: list[HeldLease] = []
    try:
        tokens = question.first + _longest(question)
        for chain in question.chains:
            if not chain.geometry.is_local and tokens > question.first:
                tokens = _worth_loading(client, question, chain, tokens)
            if not chain.geometry.is_local and tokens > question.first:
                tokens = min(tokens, _ask(client, question, chain, question.first, tokens, held))
        for _ in range(WINDOW_ROUNDS_MAX):
            found = tokens
            for chain in question.chains:
                if chain.geometry.is_local and found == tokens > question.first:
                    begin = max(question.first, chain.geometry.needed_from(tokens))
                    found = _ask(client, question, chain, begin, tokens, windows)
            if found == tokens:
                break
            tokens = found
            _release(windows)
            windows.clear()
        else:
            tokens = question.first
    except BaseException:
        _release([*held, *windows])
        raise
    if tokens <= question.first:
        _release([*held, *windows])
        return question.first, ()
    return tokens, (*held, *windows)


def _worth_loading(client: LeaseClient, question: Question, chain: Chain, end: int) -> int:
    """Up to which token blocks are there, and come sooner than they are computed, in whole steps of the question."""
    size = chain.geometry.block_tokens
    names = chain.names[: (end - question.first) // size]
    plans = [client.lookup(ns, names, question.backlog) for ns in chain.namespaces]
    worth = min([len(names), *(plan.worth_loading for plan in plans)]) * size
    return question.first + worth // question.step * question.step


def _ask(client: LeaseClient, question: Question, chain: Chain, begin: int, end: int, held: list[HeldLease]) -> int:
    """Up to which token blocks from `begin` to `end` are there, in whole steps of the question; adds the leases."""
    size = chain.geometry.block_tokens
    names = chain.names[(begin - question.first) // size : (end - question.first) // size]
    for ns in chain.namespaces if names else ():
        lease = client.acquire(ns, names, LEASE_TTL_MS)
        held.append(lease)
        names = names[: len(lease)]
    return max(question.first, (begin + len(names) * size) // question.step * question.step)


def _longest(question: Question) -> int:
    """Tokens that all chains have names for, in whole steps."""
    named = min(len(chain.names) * chain.geometry.block_tokens for chain in question.chains)
    return named // question.step * question.step


def _release(leases: Sequence[HeldLease]) -> None:
    """Of all, whatever happens to one; a lease that stays ends with its time to live."""
    for lease in leases:
        try:
            lease.release()
        except Exception as error:  # noqa: BLE001
            _log.warning("a lease was not given back: %s: %s", type(error).__name__, error)
