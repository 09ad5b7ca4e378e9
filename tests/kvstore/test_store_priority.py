"""Blocks that were stored with a priority stay longer, within a share of memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from forebay.kvstore.eviction.policies import hazard, lru
from forebay.kvstore.groups import HOST
from forebay.kvstore.movement import NvmeConfig
from forebay.kvstore.outcome import Outcome
from support.core import World, chain, outcomes

POLICIES = pytest.mark.parametrize("policy", [lru, partial(hazard, equal_cost_tokens=0.0)], ids=["lru", "hazard"])


def write(world: World, names: list[bytes], priority: int = 0) -> None:
    reserved = world.store.reserve(world.session, world.ns, b"", names, world.now, priority=priority)
    assert outcomes(reserved) == [Outcome.WRITE] * len(names)
    world.commit(reserved)
    world.check()


def flow(world: World, first: int, last: int) -> None:
    """One block a second that nobody asks for again."""
    for second in range(first, last):
        world.at(float(second))
        write(world, chain(f"flow{second}", 1))


def preferred(world: World) -> int:
    return world.store.shard(world.session, world.ns).group.preferred_blocks


@POLICIES
def test_what_has_a_priority_stays_four_times_as_long(policy: Any) -> None:
    """Sixteen places and one newcomer a second: an ordinary block stays for about 16 s."""
    world = World(slabs=4, slots=4, host_policy=policy)
    write(world, chain("vip", 4), priority=1)
    flow(world, 0, 40)
    assert len(world.present(chain("vip", 4))) == 4
    flow(world, 40, 60)
    assert world.present(chain("vip", 4)) == []
    assert preferred(world) == 0


@POLICIES
def test_higher_ones_leave_later(policy: Any) -> None:
    world = World(slabs=4, slots=4, host_policy=policy)
    for priority in (3, 2, 1):
        write(world, chain(str(priority), 1), priority=priority)
    gone: dict[int, float] = {}
    for second in range(2000):
        flow(world, second, second + 1)
        for priority in (1, 2, 3):
            if not world.present(chain(str(priority), 1)):
                gone.setdefault(priority, second)
    assert 40 < gone[1] < 4.5 * 16
    assert 3 < gone[2] / gone[1] < 5
    assert 3 < gone[3] / gone[2] < 5


@POLICIES
def test_no_more_than_a_share_of_memory_has_any(policy: Any) -> None:
    """Whoever stores all with the highest has a quarter of the places for it; the rest is as others' are."""
    world = World(slabs=4, slots=4, host_policy=policy)
    write(world, chain("greedy", 12), priority=3)
    assert preferred(world) == 4
    assert world.store.counters.unpreferred_blocks == 8
    flow(world, 1, 16)
    assert len(world.present(chain("greedy", 12))) == 4
    write(world, chain("more", 2), priority=3)
    assert (preferred(world), world.store.counters.preferred_blocks) == (4, 4)


@POLICIES
def test_a_priority_ends_with_what_it_was_given_to(policy: Any) -> None:
    """An aborted write, a removed block, and a later store of the same block."""
    world = World(slabs=4, slots=4, host_policy=policy)
    reserved = world.store.reserve(world.session, world.ns, b"", chain("a", 2), 0.0, priority=2)
    assert preferred(world) == 2
    world.store.abort(world.session, reserved.reservation_id)
    assert preferred(world) == 0
    write(world, chain("a", 2))
    group = world.store.shard(world.session, world.ns).group
    assert [group.index.priorities[row] for row in group.index.walk(chain("a", 2))] == [0, 0]
    world.check()


@POLICIES
def test_parts_of_a_chain_may_differ(policy: Any) -> None:
    """A system prompt that is kept, under conversations that are not."""
    world = World(slabs=4, slots=4, host_policy=policy)
    write(world, chain("prompt", 2), priority=2)
    reserved = world.store.reserve(world.session, world.ns, b"", chain("prompt", 2) + chain("talk", 3), 0.0)
    world.commit(reserved)
    flow(world, 1, 40)
    assert world.present(chain("prompt", 2) + chain("talk", 3)) == chain("prompt", 2)
    world.check()


@POLICIES
def test_it_is_about_memory_and_not_about_the_drive(policy: Any) -> None:
    nvme = NvmeConfig(slab_bytes=1 << 20, capacity_bytes=4 << 20)
    world = World(slabs=4, slots=4, host_policy=policy, nvme=nvme)
    world.store.restore_slabs([], 1)
    world.store.restore_done()
    write(world, chain("vip", 2), priority=1)
    assert world.store.persist(world.session, world.ns, chain("vip", 2), 0.0).pending == 2
    for transfer in world.effects().transfers:
        world.store.transfer_done(transfer.transfer_id, [0, 0], [0, 0], 0.0)
    group = world.store.shard(world.session, world.ns).group
    rows = list(group.index.walk(chain("vip", 2)))
    for row in reversed(rows):
        group.evict(row, HOST)
    assert (preferred(world), len(world.present(chain("vip", 2)))) == (0, 2)
    world.check()
