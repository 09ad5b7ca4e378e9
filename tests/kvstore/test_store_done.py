"""A conversation that is over goes first, and nobody else's blocks with it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from forebay.kvstore.eviction.policies import hazard, lru
from forebay.kvstore.groups import HOST
from forebay.kvstore.movement import NvmeConfig
from support.core import World, chain

POLICIES = pytest.mark.parametrize("policy", [lru, partial(hazard, equal_cost_tokens=0.0)], ids=["lru", "hazard"])


def done(world: World, names: list[bytes], keep: int = 0) -> int:
    return world.store.done(world.session, world.ns, names, keep)


def talk(label: str, length: int) -> list[bytes]:
    """What follows a prompt of two blocks that all talks share."""
    return chain("shared", 2) + chain(label, length)


def press(world: World, blocks: int, label: Any = "new") -> None:
    world.write(chain(str(label), blocks))


@POLICIES
def test_own_tail_goes_before_older_blocks_and_what_is_shared_stays(policy: Any) -> None:
    world = World(slabs=4, slots=4, host_policy=policy)
    press(world, 4, "old")
    for label in "ab":
        world.write(talk(label, 5))
    assert done(world, talk("b", 5)) == 5
    press(world, 5)
    assert len(world.present(chain("b", 5))) == 0
    assert world.hits(talk("a", 5)) == 7
    assert world.hits(chain("old", 4)) == 4


@POLICIES
def test_all_pieces_of_a_long_conversation_go(policy: Any) -> None:
    """Its turns were stored, and touched, one after the other."""
    world = World(slabs=4, slots=4, host_policy=policy)
    for turn in range(1, 5):
        world.at(float(turn))
        world.hits(chain("talk", 2 * turn))
        world.write(chain("talk", 2 * turn))
    world.hits(chain("talk", 3))
    press(world, 8, "other")
    assert done(world, chain("talk", 8)) == 8
    press(world, 8)
    assert world.present(chain("talk", 8)) == []
    assert world.hits(chain("other", 8)) == 8


@POLICIES
def test_a_conversation_that_somebody_continues_is_not_over(policy: Any) -> None:
    world = World(slabs=2, slots=4, host_policy=policy)
    world.write(chain("talk", 6))
    assert done(world, chain("talk", 4)) == 0


@POLICIES
def test_kept_blocks_stay_where_they_were(policy: Any) -> None:
    """The caller knows which part others begin with, before anybody has."""
    world = World(slabs=4, slots=4, host_policy=policy)
    press(world, 8, "old")
    world.write(chain("talk", 8))
    assert done(world, chain("talk", 8), keep=3) == 5
    press(world, 5)
    assert world.present(chain("talk", 8)) == chain("talk", 3)
    press(world, 8, "more")
    assert world.present(chain("talk", 8)) == chain("talk", 3)


@POLICIES
def test_who_asks_again_takes_the_hint_back(policy: Any) -> None:
    world = World(slabs=4, slots=4, host_policy=policy)
    press(world, 8, "old")
    world.write(chain("talk", 8))
    done(world, chain("talk", 8))
    assert world.hits(chain("talk", 8)) == 8
    press(world, 8)
    assert len(world.present(chain("talk", 8))) == 8
    assert len(world.present(chain("old", 8))) == 0


@POLICIES
def test_leased_blocks_go_first_once_they_are_released(policy: Any) -> None:
    world = World(slabs=4, slots=4, host_policy=policy)
    press(world, 8, "old")
    world.write(chain("talk", 8))
    lease, *_ = world.acquire(chain("talk", 8))
    done(world, chain("talk", 8))
    press(world, 2)
    assert len(world.present(chain("talk", 8))) == 8
    world.store.release(world.session, lease)
    press(world, 6, "more")
    assert len(world.present(chain("talk", 8))) == 2
    assert len(world.present(chain("old", 8))) == 6


@POLICIES
def test_blocks_that_are_still_being_written_go_first_when_they_are_there(policy: Any) -> None:
    world = World(slabs=4, slots=4, host_policy=policy)
    press(world, 8, "old")
    world.write(chain("talk", 4))
    reserved = world.reserve(chain("talk", 8))
    assert done(world, chain("talk", 8)) == 8
    world.commit(reserved)
    press(world, 8)
    assert world.present(chain("talk", 8)) == []
    assert len(world.present(chain("old", 8))) == 8


@POLICIES
def test_end_of_a_write_that_failed_is_forgotten(policy: Any) -> None:
    world = World(slabs=4, slots=4, host_policy=policy)
    reserved = world.reserve(chain("talk", 4))
    done(world, chain("talk", 4))
    world.store.abort(world.session, reserved.reservation_id)
    press(world, 4, "other")
    group = world.store.shard(world.session, world.ns).group
    assert not any(group.policies[HOST].is_over(row) for row in group.index.walk(chain("other", 4)))


@POLICIES
def test_hint_about_unknown_blocks_changes_nothing(policy: Any) -> None:
    world = World(slabs=2, slots=4, host_policy=policy)
    assert done(world, chain("none", 4)) == 0
    assert done(world, []) == 0
    world.check()


@POLICIES
def test_what_is_over_is_not_written_to_the_drive(policy: Any) -> None:
    """It is lost without being counted as something that should have been written."""
    nvme = NvmeConfig(slab_bytes=1 << 20, capacity_bytes=4 << 20)
    world = World(slabs=4, slots=4, host_policy=policy, nvme=nvme)
    world.store.restore_slabs([], 1)
    world.store.restore_done()
    world.write(chain("kept", 4))
    world.write(chain("talk", 4))
    done(world, chain("talk", 4))
    while world.store.flush(world.now) and (transfers := world.effects().transfers):
        for transfer in transfers:
            count = len(transfer.rows)
            world.store.transfer_done(transfer.transfer_id, [0] * count, [0] * count, world.now)
    assert world.store.counters.demoted_blocks == 4
    press(world, 12)
    assert world.store.counters.evicted_blocks == 4
    assert world.store.counters.evicted_unwritten_blocks == 0
