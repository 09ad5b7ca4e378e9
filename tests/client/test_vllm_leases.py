"""What a question about several cache groups is answered, over a store that is a set of names for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from forebay.client.vllm_layout import Geometry
from forebay.client.vllm_leases import WINDOW_ROUNDS_MAX, Chain, LeaseDesk, Question, hold
from forebay.kvstore.errors import BadRequest
from forebay.kvstore.planner import Backlog
from support.live import eventually

BLOCK, BLOCKS = 16, 100
FULL = Geometry(("a",), (64,), BLOCK, 1, ("x",), False)
WINDOW = Geometry(("b",), (64,), BLOCK, 1, ("x",), False, window=3 * BLOCK)
CHUNK = Geometry(("b",), (64,), BLOCK, 1, ("x",), False, chunk=10 * BLOCK)
WIDE = Geometry(("c",), (64,), 2 * BLOCK, 2, ("x",), False)
NAMES = [bytes([i]) for i in range(BLOCKS)]


@dataclass(frozen=True)
class Told:
    worth_loading: int


class Store:
    """Blocks by namespace. Leases count themselves."""

    def __init__(self, **stored: range) -> None:
        self.stored = {ns: {NAMES[i] for i in blocks} for ns, blocks in stored.items()}
        self.held = 0
        self.asked: list[tuple[str, int]] = []
        self.backlogs: list[Backlog] = []
        self.fails_after = self.worth = BLOCKS

    def lookup(self, ns: Any, hashes: Sequence[bytes], backlog: Backlog) -> Told:
        self.backlogs.append(backlog)
        leading = next((i for i, name in enumerate(hashes) if name not in self.stored[ns]), len(hashes))
        return Told(min(leading, self.worth))

    def acquire(self, ns: Any, hashes: Sequence[bytes], ttl_ms: int = 0) -> Lease:
        self.asked.append((ns, len(hashes)))
        if len(self.asked) > self.fails_after:
            raise BadRequest("a bug")
        leading = next((i for i, name in enumerate(hashes) if name not in self.stored[ns]), len(hashes))
        return Lease(self, leading)


class Lease:
    def __init__(self, store: Store, blocks: int) -> None:
        self.store, self.blocks = store, blocks
        store.held += 1

    def __len__(self) -> int:
        return self.blocks

    def release(self) -> None:
        self.store.held -= 1


def question(first: int = 0, last: int = BLOCKS, step: int = 1, **groups: Geometry) -> Question:
    """About blocks `first` to `last` of BLOCK tokens; `a_b` is a group of two stages."""
    chains = []
    for ns, geometry in groups.items():
        size = geometry.block_tokens // BLOCK
        chains.append(Chain(ns.split("_"), geometry, geometry.names_of(NAMES, first // size, last // size)))
    return Question(tuple(chains), first * BLOCK, step * BLOCK, 0.0)


def blocks_of(store: Store, asked: Question) -> int:
    """The answer in blocks; as many leases are held as it came with."""
    tokens, leases = hold(store, asked)
    assert store.held == len(leases)
    for lease in leases:
        lease.release()
    return tokens // BLOCK


def test_full_attention_alone_takes_one_question() -> None:
    store = Store(a=range(70))
    assert blocks_of(store, question(a=FULL)) == 70
    assert store.asked == [("a", 70)]
    assert blocks_of(store, question(first=70, a=FULL)) == 70


def test_no_more_is_leased_than_the_plan_says_is_worth_loading() -> None:
    """In whole steps; and nothing at all where computing is faster."""
    store = Store(a=range(70), b=range(70))
    store.worth = 41
    assert blocks_of(store, question(a=FULL)) == 41
    assert store.asked == [("a", 41)]
    assert blocks_of(store, question(step=4, a=FULL)) == 40
    assert blocks_of(store, question(a=FULL, b=WINDOW)) == 41
    store.worth, store.asked = 0, []
    assert blocks_of(store, question(a=FULL, b=WINDOW)) == 0
    assert store.asked == []


def test_the_plan_is_told_what_waits_for_the_engine() -> None:
    store, backlog = Store(a=range(70)), Backlog(3, 4096)
    asked = question(a=FULL)
    asked.backlog = backlog
    assert blocks_of(store, asked) == 70
    assert store.backlogs == [backlog]


def test_block_counts_when_all_stages_of_a_pipeline_have_it() -> None:
    store = Store(a=range(70), b=range(50), c=range(40, 50), d=range(44, 48))
    assert blocks_of(store, question(a_b=FULL)) == 50
    assert store.asked == [("a", 50), ("b", 50)]
    assert blocks_of(store, question(b_a=FULL)) == 50
    assert blocks_of(store, question(a_b=FULL, c=WINDOW)) == 50
    assert blocks_of(store, question(a_b=FULL, c_d=WINDOW)) == 48
    store.fails_after = len(store.asked) + 1
    with pytest.raises(BadRequest):
        hold(store, question(a_b=FULL))
    assert store.held == 0


def test_window_is_asked_only_for_what_comes_before_the_answer() -> None:
    store = Store(a=range(70), b=range(67, 70))
    assert blocks_of(store, question(a=FULL, b=WINDOW)) == 70
    assert store.asked == [("a", 70), ("b", 3)]


def test_window_with_a_gap_shortens_the_answer_to_before_the_gap() -> None:
    assert blocks_of(Store(a=range(70), b=range(69)), question(a=FULL, b=WINDOW)) == 69
    assert blocks_of(Store(a=range(70), b=range(66)), question(a=FULL, b=WINDOW)) == 66
    assert blocks_of(Store(a=range(70), b=range(60)), question(a=FULL, b=WINDOW)) == 60
    assert blocks_of(Store(a=range(70), b=range(0)), question(a=FULL, b=WINDOW)) == 0


def test_chunk_is_asked_only_for_what_the_next_token_looks_at() -> None:
    store = Store(a=range(75), b=range(70, 73))
    assert blocks_of(store, question(a=FULL, b=CHUNK)) == 73
    assert store.asked == [("a", 75), ("b", 5), ("b", 3)]
    assert blocks_of(store, question(first=71, a=FULL, b=CHUNK)) == 73
    boundary = Store(a=range(70), b=range(0))
    assert blocks_of(boundary, question(a=FULL, b=CHUNK)) == 70
    assert boundary.asked == [("a", 70)]


def test_search_for_a_window_has_an_end() -> None:
    store = Store(a=range(70), b=range(5))
    assert blocks_of(store, question(a=FULL, b=WINDOW)) == 0
    assert len(store.asked) == 1 + WINDOW_ROUNDS_MAX


def test_window_reaches_back_into_what_the_engine_has() -> None:
    """It is not asked for that."""
    store = Store(a=range(50, 52), b=range(50, 52))
    assert blocks_of(store, question(first=50, a=FULL, b=WINDOW)) == 52
    assert store.asked == [("a", 2), ("b", 2)]


def test_every_window_must_be_there() -> None:
    store = Store(a=range(70), b=range(70), c=range(68))
    assert blocks_of(store, question(a=FULL, b=WINDOW, c=WINDOW)) == 68
    assert store.asked[-2:] == [("b", 3), ("c", 3)]


def test_answer_is_in_steps_of_the_widest_blocks() -> None:
    store = Store(a=range(69), c=range(BLOCKS))
    assert blocks_of(store, question(step=2, a=FULL, c=WIDE)) == 68
    assert blocks_of(store, question(step=2, last=41, a=FULL, c=WIDE)) == 40


@pytest.mark.parametrize("fails_after", [0, 1, 2])
def test_error_on_the_way_leaves_no_lease(fails_after: int) -> None:
    store = Store(a=range(70), b=range(70), c=range(70))
    store.fails_after = fails_after
    with pytest.raises(BadRequest):
        hold(store, question(a=FULL, b=WINDOW, c=WINDOW))
    assert store.held == 0


def test_desk_gives_back_what_comes_too_late_and_what_was_dropped() -> None:
    store = Store(a=range(70))
    desk = LeaseDesk(store)
    chains = question(a=FULL).chains
    kept = desk.ask(chains, 0, BLOCK)
    assert kept.answered.wait(5)
    assert (kept.tokens, store.held) == (70 * BLOCK, 1)
    late = desk.ask(chains, 0, BLOCK)
    desk.drop(late)
    assert late.answered.wait(5)
    for _ in range(2):
        desk.drop(kept)
    eventually(lambda: store.held == 0, "nothing is held")
    desk.close()


class BadLease(Lease):
    def release(self) -> None:
        super().release()
        raise RuntimeError("a bug")


def test_a_bug_is_one_miss_and_the_desk_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever kind of error: a desk that has ended would make every request wait until it gives up."""
    store = Store(a=range(70))
    desk, chains = LeaseDesk(store), question(a=FULL).chains
    store.stored.clear()
    lost = desk.ask(chains, 0, BLOCK)
    assert lost.answered.wait(5)
    assert (lost.tokens, store.held) == (0, 0)
    assert "a prompt was not looked up: KeyError" in caplog.text
    question_of_bad = desk.ask((), 0, BLOCK)
    question_of_bad.leases = [BadLease(store, 1), Lease(store, 1)]
    desk.drop(question_of_bad)
    eventually(lambda: store.held == 0, "both were released")
    store.stored["a"] = set(NAMES[:70])
    found = desk.ask(chains, 0, BLOCK)
    assert found.answered.wait(5)
    assert found.tokens == 70 * BLOCK
    desk.drop(found)
    desk.close()
    assert "a lease was not given back: RuntimeError: a bug" in caplog.text
