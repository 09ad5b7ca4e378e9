"""The reference policies, on single blocks without parents: each gives up what its paper says."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forebay.kvstore.eviction.arc import ArcPolicy
from forebay.kvstore.eviction.fifo import FifoPolicy
from forebay.kvstore.eviction.flat import FlatPolicy
from forebay.kvstore.eviction.gdsf import GdsfPolicy
from forebay.kvstore.eviction.policies import Place
from forebay.kvstore.eviction.s3fifo import S3FifoPolicy
from forebay.kvstore.index import NO_ROW, BlockIndex

ALL = (FifoPolicy, S3FifoPolicy, ArcPolicy, GdsfPolicy)


class World:
    """Blocks by letter, a policy over them, and room for so many."""

    def __init__(self, make: Callable[[Place], FlatPolicy], blocks: int) -> None:
        self.index = BlockIndex(1)
        self.policy = make(Place(self.index, 512))
        self.blocks = blocks

    def ask(self, letters: str, parent: int = NO_ROW) -> None:
        for letter in letters:
            row = self.index.find(letter.encode())
            if row != NO_ROW:
                self.policy.request([], [row], 0.0)
                continue
            while len(self.policy.rows) >= self.blocks:
                self.evict()
            row = self.index.add(letter.encode(), parent)
            self.index.reserve(row, 0, 0, 0, 0)
            self.index.commit(row, 0, 0)
            self.policy.insert([row], 0.0)

    def evict(self) -> str:
        row = self.policy.victim(lambda row: not self.index.has_child(row))
        assert row is not None
        name = self.index.hashes[row] or b""
        self.index.vacate(row, 0)
        self.policy.remove(row)
        self.index.forget_if_empty(row)
        return name.decode()

    def drained(self) -> str:
        return "".join(self.evict() for _ in range(len(self.policy.rows)))


def test_fifo_forgets_in_the_order_of_coming() -> None:
    world = World(FifoPolicy, 9)
    world.ask("abcaab")
    assert world.drained() == "abc"


def test_s3fifo_passes_over_what_was_asked_for_again_and_remembers_what_left() -> None:
    world = World(S3FifoPolicy, 4)
    world.ask("abcd" + "aa" + "ef")
    assert world.index.find(b"a") in world.policy._main  # type: ignore[attr-defined]
    world.ask("c")
    assert world.index.find(b"c") in world.policy._main  # type: ignore[attr-defined]


def test_arc_keeps_what_was_asked_for_twice() -> None:
    world = World(ArcPolicy, 4)
    world.ask("abab" + "cdefgh")
    assert world.index.find(b"a") != NO_ROW
    assert world.index.find(b"b") != NO_ROW


def test_gdsf_gives_up_what_is_cheap_and_seldom() -> None:
    world = World(GdsfPolicy, 9)
    world.ask("ab")
    world.ask("c", parent=world.index.find(b"b"))
    world.ask("aa")
    assert world.drained() == "cba"


@pytest.mark.parametrize("make", ALL)
def test_parent_of_a_present_block_is_never_given_up(make: Callable[[Place], FlatPolicy]) -> None:
    world = World(make, 9)
    world.ask("a")
    world.ask("b", parent=world.index.find(b"a"))
    world.ask("c", parent=world.index.find(b"b"))
    world.ask("x")
    order = world.drained()
    assert order.index("c") < order.index("b") < order.index("a")


@pytest.mark.parametrize("make", ALL)
def test_asking_ends_when_nothing_may_go(make: Callable[[Place], FlatPolicy]) -> None:
    world = World(make, 9)
    world.ask("abcdabba")
    assert world.policy.victim(lambda row: False) is None
    assert list(world.policy.check(world.policy.rows)) == []
    assert list(world.policy.check([])) != []
    assert sorted(world.policy.coldest(2)) == sorted(world.policy.rows)[:2]
    assert len(world.drained()) == 4
    assert world.policy.oldest_touch() is None
