"""Blocks that a client expects to ask for again stay, as long as it said, while it is there, within their share."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from forebay.kvstore.eviction.policies import hazard, lru
from forebay.kvstore.groups import HOST
from forebay.kvstore.movement import PAGE_BYTES, NvmeConfig
from forebay.kvstore.outcome import Outcome
from support.core import BLOCK_BYTES, World, chain, outcomes, spec


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


def test_what_a_session_expects_ends_with_it(full: World) -> None:
    other = full.open_session(2)
    full.open(spec(), other)
    assert full.store.expect(other, full.ns, chain("0", 2), 3600.0, full.now) == 2
    assert expect(full, chain("1", 2), 3600.0) == 2
    full.store.close_session(other)
    press(full, 14)
    assert full.present(chain("0", 2)) == []
    assert full.present(chain("1", 2)) == chain("1", 2)


def test_blocks_on_the_drive_alone_stay_on_the_drive() -> None:
    """Room for eight blocks there, of which a quarter may be kept."""
    size = 8 * (BLOCK_BYTES + PAGE_BYTES) + PAGE_BYTES
    world = World(slabs=1, slots=4, nvme=NvmeConfig(slab_bytes=size, capacity_bytes=size))
    world.store.restore_slabs([], 1)
    world.store.restore_done()
    for number in range(4):
        world.at(float(number))
        to_the_drive(world, chain(str(number), 2))
    group = world.store.shard(world.session, world.ns).group
    rows = group.index.walk(chain("0", 2))
    assert [group.index.is_in(row, HOST) for row in rows] == [False, False]
    assert expect(world, chain("0", 2), 60.0) == 2
    for number in range(4, 8):
        world.at(float(number))
        to_the_drive(world, chain(str(number), 2))
    assert world.present(chain("0", 2)) == chain("0", 2)
    assert world.present(chain("1", 2)) == []
    world.at(100.0)
    for number in range(8, 12):
        world.at(100.0 + number)
        to_the_drive(world, chain(str(number), 2))
    assert world.present(chain("0", 2)) == []


def to_the_drive(world: World, names: list[bytes]) -> None:
    """Store blocks, and have them written at once."""
    world.write(names)
    for _ in names:
        world.store.persist(world.session, world.ns, names, world.now)
        for transfer in world.effects().transfers:
            nothing = [0] * len(transfer.rows)
            world.store.transfer_done(transfer.transfer_id, nothing, nothing, world.now)
    assert world.store.persist(world.session, world.ns, names, world.now).durable == len(names)
    world.check()


def test_nothing_is_kept_of_what_is_not_there(full: World) -> None:
    assert expect(full, chain("none", 2), 10.0) == 0
    assert full.store.next_deadline() is None
