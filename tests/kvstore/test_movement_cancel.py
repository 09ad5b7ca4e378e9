"""A load that is cancelled with its last lease, and asked for again before the tier has said so."""

from __future__ import annotations

from forebay.kvstore.movement import NvmeConfig, Verdict
from support.core import World, chain

SLAB_BYTES = 1 << 20
BLOCKS = 4
HASHES = chain("c", BLOCKS)


class _OnTheDrive(World):
    """A world whose chain is on the drive only."""

    def __init__(self) -> None:
        super().__init__(slots=16, nvme=NvmeConfig(4 * SLAB_BYTES, SLAB_BYTES))
        self.store.restore_slabs([], 1)
        self.write(HASHES)
        self.store.persist(self.session, self.ns, HASHES, self.now)
        [write] = self.effects().transfers
        self.store.transfer_done(write.transfer_id, [Verdict.OK] * BLOCKS, [1] * BLOCKS, self.now)
        group = self.store.shard(self.session, self.ns).group
        for row in reversed(group.index.walk(HASHES)):
            group.evict(row, 0)
        self.check()
        self.effects()


def test_blocks_of_a_cancelled_load_that_a_new_lease_waits_for_are_loaded_anew() -> None:
    world = _OnTheDrive()
    first, _, _ = world.acquire(HASHES)
    [load] = world.effects().transfers
    world.store.release(world.session, first)
    assert world.effects().cancelled == [load.transfer_id]
    second, slots, _ = world.acquire(HASHES)
    verdicts = [Verdict.OK] + [Verdict.CANCELLED] * (BLOCKS - 1)
    world.store.transfer_done(load.transfer_id, verdicts, [1, 0, 0, 0], world.now)
    world.check()
    effects = world.effects()
    [again] = effects.transfers
    assert again.host_slots == slots[1:]
    assert again.leases == {second}
    assert [(each.ready, each.total) for each in effects.progress] == [(1, BLOCKS)]
    world.store.transfer_done(again.transfer_id, [Verdict.OK] * (BLOCKS - 1), [1] * (BLOCKS - 1), world.now)
    assert [(each.ready, each.total) for each in world.effects().progress] == [(BLOCKS, BLOCKS)]
    world.store.release(world.session, second)
    world.check()


def test_tier_that_takes_nothing_is_not_asked_for_ever() -> None:
    """A load that the tier did not begin for reasons of its own ends as a miss."""
    world = _OnTheDrive()
    lease, _, _ = world.acquire(HASHES)
    [load] = world.effects().transfers
    world.store.transfer_done(load.transfer_id, [Verdict.CANCELLED] * BLOCKS, [0] * BLOCKS, world.now)
    effects = world.effects()
    assert effects.transfers == []
    assert [(each.ready, each.total) for each in effects.progress] == [(0, 0)]
    world.store.release(world.session, lease)
    world.check()
