"""The hazard policy: what it learns and evicts, and that it never loses a block or a name."""

from __future__ import annotations

import hashlib
import sys
import time
import tracemalloc
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.eviction import BYPASS
from forebay.kvstore.eviction.hazard import LEASE_S, REFRESH_REQUESTS, REPEAT_S, STRIDE_MAX, HazardPolicy
from forebay.kvstore.eviction.lru import LruPolicy
from forebay.kvstore.eviction.pieces import GHOSTS_MIN, GHOSTS_PER_BLOCK
from forebay.kvstore.index import BlockIndex
from forebay.kvstore.outcome import StopReason


def names(label: str, length: int) -> list[bytes]:
    return [hashlib.sha256(f"{label}/{at}".encode()).digest() for at in range(length)]


class Cache:
    """An index and a policy over it, with room for so many blocks."""

    def __init__(self, blocks: int, **options: object) -> None:
        self.index = BlockIndex(1)
        columns = self.index.parents, self.index.depths
        columns = *columns, self.index.hashes, self.index.priorities
        self.policy = HazardPolicy(*columns, **{"refresh_requests": 4, **options})  # type: ignore[arg-type]
        self.blocks, self.now, self.leased = blocks, 0.0, set[int]()
        self.victims: list[bytes] = []

    def evictable(self, row: int) -> bool:
        return row not in self.leased and not self.index.holds[row] and not self.index.has_child(row)

    def ask(self, chain: list[bytes], now: float | None = None, priority: int = 0) -> int:
        """Look a chain up and store what is missing; returns how many blocks were there."""
        self.now = self.now + 1 if now is None else now
        rows = list(self.index.walk(chain))
        self.policy.request(chain, rows, self.now)
        above, fresh = rows[-1] if rows else -1, []
        self.policy.grow(chain, rows, -1, self.now)
        for name in chain[len(rows) :]:
            row = self.index.find(name)
            row = self.index.add(name, above) if row < 0 else row
            if self.index.is_in(row, 0):
                above = row
                continue
            self.index.holds[row] += 1
            room = self.index.resident_count() + len(fresh) < self.blocks or self.make_room(name)
            self.index.holds[row] -= 1
            if not room:
                self.index.forget_if_empty(row)
                break
            self.index.reserve(row, 0, 0, 0, 0)
            self.index.priorities[row] = priority
            fresh.append(row)
            above = row
        for row in fresh:
            self.index.commit(row, 0, 0)
        self.policy.insert(fresh, self.now)
        return len(rows)

    def make_room(self, newcomer: bytes | None = None) -> bool:
        row = self.policy.victim(self.evictable, newcomer)
        if row is None or row == BYPASS:
            return False
        assert self.evictable(row), "a victim that may not go"
        self.victims.append(self.index.hashes[row] or b"")
        self.remove(row)
        return True

    def remove(self, row: int) -> None:
        self.index.vacate(row, 0)
        self.policy.remove(row)
        self.index.forget_if_empty(row)

    def resident(self) -> list[int]:
        return [row for row in self.index.rows() if self.index.is_in(row, 0)]

    def check(self) -> None:
        assert list(self.policy.check(self.resident())) == []


ACTIONS = ("stopped", "ask", "ask", "ask", "acquire", "more", "evict", "remove", "lease", "done", "wait")


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_books_are_right_whatever_happens(data: st.DataObject) -> None:
    """Over random trees, leases, removals, hints and hostile names: every resident block is in one piece, at its depth;
    a leased block or a parent of a present one is never a victim."""
    cache = Cache(data.draw(st.integers(3, 12)), guarded=data.draw(st.booleans()))
    for _ in range(data.draw(st.integers(1, 40))):
        action = data.draw(st.sampled_from(ACTIONS))
        path = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=6))
        chain = [bytes(path[: at + 1]).ljust(16, b"-") for at in range(len(path))]
        rows = list(cache.index.walk(chain))
        if action == "ask":
            cache.ask(chain, priority=data.draw(st.sampled_from((0, 0, 1, 3))))
        elif action == "acquire":
            shuffled = data.draw(st.permutations(chain))
            cache.policy.request(shuffled, list(cache.index.walk(shuffled)), cache.now, opens=data.draw(st.booleans()))
        elif action == "more" and rows:
            cache.policy.grow([chain[-1] + b"+", *chain[:1]], [], rows[-1], cache.now)
        elif action == "evict":
            cache.make_room()
        elif action == "remove" and cache.resident():
            cache.remove(data.draw(st.sampled_from(cache.resident())))
            cache.leased &= set(cache.resident())
        elif action == "lease":
            cache.leased = set(rows)
        elif action == "stopped":
            cache.policy.stopped(chain, data.draw(st.sampled_from(StopReason)))
        elif action == "done":
            cache.policy.demote(rows[::-1])
        else:
            cache.now += data.draw(st.sampled_from((0.1, 30.0, 4000.0, 8000.0)))
        cache.check()
        assert sorted(cache.policy.coldest(99)) == sorted(cache.resident())


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=40))
def test_before_anything_is_learned_it_is_lru(paths: list[list[int]]) -> None:
    """The same victims in the same order as of the plain policy."""
    cache = Cache(6, refresh_requests=10_000)
    plain = Cache(6)
    plain.policy = LruPolicy(plain.index.parents, plain.index.depths)  # type: ignore[assignment]
    for path in paths:
        chain = [bytes(path[: at + 1]).ljust(16, b"-") for at in range(len(path))]
        assert cache.ask(chain) == plain.ask(chain)
    assert cache.victims == plain.victims


def converse(cache: Cache, turns: int = 60) -> None:
    """One conversation that goes on every 10 s, between questions that nobody repeats."""
    for turn in range(turns):
        cache.ask(names("talk", 3 + turn), now=10.0 * turn)
        for once in range(3):
            cache.ask(names(f"once {turn} {once}", 8), now=10.0 * turn + 1 + 2 * once)


def test_conversation_stays_where_lru_would_have_lost_it() -> None:
    """What nobody repeats goes first, or is not stored at all."""
    cache = Cache(70)
    converse(cache)
    assert cache.ask(names("talk", 63), now=600.0) >= 50
    assert cache.ask(names("once 58 0", 8), now=601.0) == 0


def test_newcomer_that_is_worth_less_is_declined() -> None:
    """Only where that is allowed: what must be stored gets room."""
    cache = Cache(70)
    converse(cache)
    newcomer = names("another", 4)
    cache.policy.request(newcomer, [], 600.0)
    before = len(cache.victims)
    while cache.make_room(newcomer[0]):
        pass
    assert cache.policy.victim(cache.evictable, newcomer[0]) == BYPASS
    assert not {*names("talk", 62)} & {*cache.victims[before:]}
    assert cache.policy.victim(cache.evictable) not in (None, BYPASS)


def test_finished_conversation_goes_first() -> None:
    cache = Cache(70)
    converse(cache)
    rows = list(cache.index.walk(names("talk", 62)))
    cache.policy.demote(rows[::-1])
    assert cache.policy.victim(cache.evictable) == rows[-1]
    assert cache.policy.coldest(1) == [rows[-1]]
    explained = cache.policy.explain(names("talk", 1)[0], 600.0)
    assert explained is not None
    assert explained.kind == "finished"


def test_how_an_answer_stopped_makes_a_class_until_the_next_turn() -> None:
    cache = Cache(50)
    chain = names("a", 12)
    cache.ask(chain[:4])
    cache.ask(chain[:8])
    assert cache.policy.stopped([*chain[:8], b"not known"], StopReason.TOOL_CALL) == 8
    assert kind_of(cache, chain[0]) == "turn 1, after tool call"
    cache.check()
    cache.ask(chain)
    assert kind_of(cache, chain[0]) == "turn 2"
    cache.ask([*chain[:4], *names("b", 3)])
    assert cache.policy.stopped(chain[:4], StopReason.STOP) == 0, "others share these"
    assert cache.policy.stopped(names("none", 2), StopReason.STOP) == 0
    cache.check()


def kind_of(cache: Cache, name: bytes) -> str:
    explained = cache.policy.explain(name, cache.now)
    assert explained is not None
    return explained.kind


def test_a_place_pays_by_the_priority_of_what_is_in_it() -> None:
    """Of two questions that nobody repeats, alike but for that, the lesser one goes first."""
    for first, second in ((0, 1), (1, 0), (3, 1)):
        cache = Cache(1000)
        converse(cache)
        cache.ask(names("first", 2), priority=first)
        cache.ask(names("second", 2), now=cache.now, priority=second)
        values = [cache.policy.explain(names(label, 1)[0], cache.now).value_hz for label in ("first", "second")]  # type: ignore[union-attr]
        assert values[0] / values[1] == pytest.approx(4.0 ** (first - second))
        order = [cache.index.hashes[row] for row in cache.policy.coldest(1000)]
        tails = [order.index(names(label, 2)[1]) for label in ("first", "second")]
        assert (tails[0] < tails[1]) == (first < second)
        cache.check()


def test_lookup_and_acquire_of_one_request_are_one_use() -> None:
    """Otherwise each request would seem to come back at once."""
    cache = Cache(50)
    cache.ask(names("a", 10), now=0.0)
    for _ in range(5):
        cache.policy.request(names("a", 8), list(cache.index.walk(names("a", 8))), REPEAT_S / 2, opens=False)
        cache.policy.request(names("a", 10), list(cache.index.walk(names("a", 10))), REPEAT_S / 2)
    explained = cache.policy.explain(names("a", 1)[0], 1.0)
    assert explained is not None
    assert (explained.kind, explained.turn, explained.age_s) == ("turn 0", 0, 1.0)


def test_lease_that_nobody_looked_up_before_is_a_use() -> None:
    """Clients may fetch without asking first, and engines touch what they have themselves."""
    cache = Cache(50)
    cache.ask(names("a", 10), now=0.0)
    cache.policy.request(names("a", 10), list(cache.index.walk(names("a", 10))), LEASE_S + 1, opens=False)
    explained = cache.policy.explain(names("a", 1)[0], LEASE_S + 2)
    assert explained is not None
    assert (explained.turn, explained.age_s) == (1, 1.0)


def test_prompts_in_quick_succession_are_uses_each() -> None:
    """What comes back within a second is learned of as well; the ranks of an engine, which ask at once, are one."""
    cache = Cache(50)
    for at in (0.0, REPEAT_S / 2, 0.3, 0.3 + REPEAT_S / 2, 0.6):
        cache.policy.request(names("a", 10), [], at)
    explained = cache.policy.explain(names("a", 1)[0], 1.0)
    assert explained is not None
    assert (explained.turn, explained.age_s) == (2, pytest.approx(0.4))


def test_classes_are_told_from_what_requests_do() -> None:
    """A longer chain is the next turn; one that leaves the path shares what it names; a ghost is known as well."""
    cache = Cache(50)
    cache.ask(names("s", 4) + names("a", 3), now=0.0)
    cache.ask(names("s", 4) + names("a", 6), now=20.0)
    cache.ask(names("s", 4) + names("b", 3), now=40.0)
    cache.ask(names("s", 4) + names("c", 3), now=60.0)

    def kind(name: bytes) -> str:
        explained = cache.policy.explain(name, 61.0)
        assert explained is not None
        return explained.kind

    assert [kind(names(*of)[-1]) for of in (("s", 4), ("a", 6), ("b", 3))] == [
        "shared by 2 or more",
        "turn 1",
        "turn 0",
    ]
    while cache.make_room():
        pass
    explained = cache.policy.explain(names("s", 1)[0], 61.0)
    assert explained is not None
    assert not explained.resident
    assert cache.policy.explain(b"nobody", 61.0) is None


def test_deep_blocks_count_more_where_cost_does() -> None:
    """Of two chains asked for alike the one that is cheaper to compute again goes."""
    for equal_depth, first in ((0.0, "deep"), (4.0, "flat")):
        cache = Cache(60, equal_depth=equal_depth, guarded=False)
        for turn in range(20):
            cache.ask(names("flat", 4), now=20.0 * turn)
            cache.ask(names("deep", 40), now=20.0 * turn + 1)
        victim = cache.policy.victim(cache.evictable)
        assert victim is not None
        assert cache.index.hashes[victim] == names(first, 40 if first == "deep" else 4)[-1]


def test_slower_tier_below_keeps_the_order_of_lru() -> None:
    """What goes next must be known early enough to be written first."""
    cache = Cache(70, sole=False)
    converse(cache)
    assert cache.policy.victim(cache.evictable) == cache.policy._lru.victim(cache.evictable)
    assert cache.policy.victim(cache.evictable, b"new") != BYPASS
    assert cache.policy.coldest(20) == cache.policy._lru.coldest(20)


def test_ghosts_are_bounded() -> None:
    """By what is resident; whoever asks for blocks that nobody has cannot fill memory."""
    cache = Cache(4)
    most = GHOSTS_MIN + 4 * GHOSTS_PER_BLOCK
    for number in range(3 * most // 50):
        cache.policy.request(names(f"n{number}", 50), [], float(number))
        assert cache.policy._pieces.ghosts <= most
    cache.ask(names("a", 4))
    cache.check()


def test_ghost_costs_under_200_bytes() -> None:
    """Measured by the allocator: names, dictionary and pieces of chains of 8 blocks (that of chat: 7.6)."""
    cache = Cache(1, refresh_requests=10_000_000)
    cache.policy._pieces._most_live = 1_000_000
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for number in range(5000):
        cache.policy.request(names(str(number), 8), [], float(number) / 100)
    spent = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    each = spent / cache.policy._pieces.ghosts
    print(f"{each:.0f} bytes a ghost")
    assert cache.policy._pieces.ghosts == 40_000
    assert each <= 200


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer is active, under which no time means anything")
def test_reference_costs_little() -> None:
    """Far below the 10 us of a quiet machine; this one may be busy, so CPU time is taken."""
    cache = Cache(2000, refresh_requests=200)
    chains = [names(f"{number % 400}", 20 + number % 30) for number in range(1500)]
    spent, references = 0.0, 0
    for number, chain in enumerate(chains):
        rows = list(cache.index.walk(chain))
        started = time.process_time()
        cache.policy.request(chain, rows, float(number))
        spent += time.process_time() - started
        references += len(chain)
        cache.ask(chain, now=float(number))
    each_us = spent / references * 1e6
    print(f"{each_us:.2f} us a reference")
    assert each_us <= 10


def test_a_request_counts_no_more_pieces_than_the_stride() -> None:
    """However many there are, no request pays for all; the indices come later then."""
    policy = HazardPolicy(array("i"), array("i"), [])
    pieces = policy._pieces
    for number in range(300 * STRIDE_MAX):
        pieces.extend(pieces.new(0, 5, 0.0), [b"%d" % number])
    for _ in range(REFRESH_REQUESTS):
        policy._learn()
    whole = pieces.unswept
    for _ in range(10):
        policy._learn()
    assert whole - pieces.unswept == 10 * STRIDE_MAX
