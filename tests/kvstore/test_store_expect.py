"""Blocks that a client expects to ask for again stay, as long as it said and within their share."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from forebay.kvstore.eviction.policies import hazard, lru
from forebay.kvstore.outcome import Outcome
from support.core import World, chain, outcomes


def expect(world: World, names: list[bytes], within_s: float) -> int:
    return world.store.expect(world.session, world.ns, names, within_s, world.now)


@pytest.fixture(params=[lru, partial(hazard)], ids=["lru", "hazard"])
def full(request: pytest.FixtureRequest) -> World:
    """Sixteen blocks, eight chains of two; the oldest are 0."""
    made = World(slabs=4, slots=4, host_policy=request.param)
    for number in range(8):
        made.at(float(number))
        made.write(chain(str(number), 2))
    return made


def press(world: World, blocks: int, label: Any = "new") -> None:
    reserved = world.write(chain(str(label), blocks))
    assert outcomes(reserved) == [Outcome.WRITE] * blocks


def test_expected_blocks_outlive_younger_ones_until_their_time(full: World) -> None:
    assert expect(full, chain("0", 2), 30.0) == 2
    press(full, 6)
    assert full.hits(chain("0", 2)) == 2
    assert full.hits(chain("1", 2)) == 0
    assert full.store.next_deadline() == 37.0
    full.at(37.5)
    full.store.expire(full.now)
    assert full.store.next_deadline() is None
    press(full, 16, "all")
    assert full.hits(chain("0", 2)) == 0


def test_no_more_than_a_share_is_kept(full: World) -> None:
    """A quarter of sixteen, over all calls, the leading ones first."""
    press(full, 8)
    assert expect(full, chain("new", 8)[:3], 30.0) == 3
    assert expect(full, chain("new", 8), 30.0) == 4
    assert expect(full, chain("7", 2), 30.0) == 0


def test_the_longest_time_counts(full: World) -> None:
    expect(full, chain("0", 2), 60.0)
    expect(full, chain("0", 2), 1.0)
    full.at(20.0)
    full.store.expire(full.now)
    press(full, 10)
    assert full.hits(chain("0", 2)) == 2
    full.check()


def test_a_store_that_finds_no_other_room_takes_expected_blocks(full: World) -> None:
    """A hint is no pin."""
    assert expect(full, chain("0", 2), 3600.0) == 2
    press(full, 16, "all")
    assert full.hits(chain("0", 2)) == 0


def test_nothing_is_kept_of_what_is_not_there(full: World) -> None:
    assert expect(full, chain("none", 2), 10.0) == 0
    assert full.store.next_deadline() is None
