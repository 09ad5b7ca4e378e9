"""A store that is not worth its place is declined, where nothing but memory would have kept it, and nowhere else."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.kvstore.eviction import EvictionPolicy
from forebay.kvstore.eviction.hazard import HazardPolicy
from forebay.kvstore.eviction.policies import Place
from forebay.kvstore.outcome import Outcome
from support.core import TwoTiers, World, chain, outcomes, spec


def learning(place: Place) -> EvictionPolicy:
    """Learns at every fourth request."""
    index = place.index
    return HazardPolicy(index.parents, index.depths, index.hashes, sole=place.sole, refresh_requests=4)


def converse(world: World, turns: int = 60) -> list[Outcome]:
    """A conversation that goes on every 10 s, and questions between that nobody repeats; outcomes of those."""
    found: list[Outcome] = []
    for turn in range(turns):
        for at_s, label, length in ((0, "talk", 3 + turn), *((1 + 2 * n, f"once {turn} {n}", 8) for n in range(3))):
            world.at(10.0 * turn + at_s)
            world.hits(chain(label, length))
            reserved = world.reserve(chain(label, length))
            if reserved.reservation_id:
                world.commit(reserved)
            found += outcomes(reserved) if label != "talk" else []
    return found


def test_what_is_not_worth_its_place_is_declined_and_costs_nobody_a_block() -> None:
    """All that follows in the request is declined with it; counted apart from what found no room."""
    world = World(slabs=1, slots=70, host_policy=learning)
    found = converse(world)
    counters = world.store.stats().counters
    assert counters.bypassed_blocks >= found.count(Outcome.BYPASSED) > 0
    assert counters.rejected_full_blocks == 0
    assert world.hits(chain("talk", 62)) >= 50
    world.check()


def test_lru_declines_nothing() -> None:
    world = World(slabs=1, slots=70)
    assert Outcome.BYPASSED not in converse(world)


def test_nothing_is_declined_above_a_drive() -> None:
    """It would keep the block."""
    world = TwoTiers(slabs=1, slots=70, drive_slabs=4, host_policy=learning)
    assert Outcome.BYPASSED not in converse(world, turns=30)


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_declined_of_a_block_of_several_ranks(rank: int) -> None:
    """The others may have stored their part."""
    world = World(slabs=1, slots=70, host_policy=learning)
    options: dict[str, Any] = {"shard_size": 2, "shard_rank": rank}
    world.ns = world.open(spec(**options))
    assert Outcome.BYPASSED not in converse(world, turns=30)
