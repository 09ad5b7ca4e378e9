"""What `persist` answers while the drive cannot take the blocks yet: whether to ask again."""

from __future__ import annotations

from forebay.kvstore.movement import PAUSE_S, NvmeConfig, Verdict
from forebay.kvstore.store import Durability
from support.core import BLOCK_BYTES, World, chain

SLAB_BYTES = 1 << 20
BLOCKS = 4
FIRST, SECOND = chain("first", BLOCKS), chain("second", BLOCKS)


def _world(slabs: int = 4) -> World:
    """Two chains in memory only, and a window that one of them fills."""
    config = NvmeConfig(slabs * SLAB_BYTES, SLAB_BYTES, window_bytes=BLOCKS * BLOCK_BYTES)
    world = World(slots=16, nvme=config)
    world.write(FIRST)
    world.write(SECOND)
    return world


def _persist(world: World, hashes: list[bytes]) -> Durability:
    return world.store.persist(world.session, world.ns, hashes, world.now)


def test_blocks_wait_until_the_slabs_in_use_are_known() -> None:
    world = _world()
    assert _persist(world, FIRST) == Durability(0, BLOCKS)
    assert world.effects().transfers == []
    world.store.restore_slabs([], 1)
    assert _persist(world, FIRST) == Durability(0, BLOCKS)
    assert len(world.effects().transfers) == 1


def test_blocks_beyond_the_window_wait() -> None:
    world = _world()
    world.store.restore_slabs([], 1)
    assert _persist(world, FIRST) == Durability(0, BLOCKS)
    assert _persist(world, SECOND) == Durability(0, BLOCKS)
    [write] = world.effects().transfers
    world.store.transfer_done(write.transfer_id, [Verdict.OK] * BLOCKS, [1] * BLOCKS, world.now)
    assert _persist(world, FIRST) == Durability(BLOCKS, 0)
    assert _persist(world, SECOND) == Durability(0, BLOCKS)
    assert len(world.effects().transfers) == 1


def test_blocks_whose_write_failed_wait_for_the_pause_to_end() -> None:
    world = _world()
    world.store.restore_slabs([], 1)
    _persist(world, FIRST)
    [write] = world.effects().transfers
    world.store.transfer_done(write.transfer_id, [Verdict.FAILED] * BLOCKS, [0] * BLOCKS, world.now)
    assert _persist(world, FIRST) == Durability(0, BLOCKS)
    assert world.effects().transfers == []
    world.at(PAUSE_S)
    assert _persist(world, FIRST) == Durability(0, BLOCKS)
    assert len(world.effects().transfers) == 1


def test_nobody_waits_for_a_tier_that_is_down() -> None:
    assert _persist(_world(slabs=0), FIRST) == Durability(0, 0)
