"""What is kept clean when stores outrun the drive."""

from __future__ import annotations

from forebay.kvstore.groups import Transfer
from forebay.kvstore.movement import CLEAN_BLOCKS_MIN, PRESSED_S, NvmeConfig, Verdict
from support.core import World, chain

SLAB_BYTES = 1 << 20
SLABS, SLOTS = 4, 64
BURST = 64


class _Storm(World):
    """A full host tier of one namespace, and a drive as large as four of it."""

    def __init__(self) -> None:
        super().__init__(SLABS, SLOTS, nvme=NvmeConfig(64 * SLAB_BYTES, SLAB_BYTES))
        self.store.restore_slabs([], 1)
        self.chains = 0
        for _ in range(SLABS * SLOTS // BURST):
            self.burst()

    def burst(self) -> None:
        self.chains += 1
        self.now += 1e-3
        self.write(chain(f"burst {self.chains}", BURST))

    def plan(self) -> list[Transfer]:
        self.store.plan_writes(self.now)
        return self.effects().transfers

    def written(self, transfers: list[Transfer]) -> None:
        for each in transfers:
            count = len(each.rows)
            self.store.transfer_done(each.transfer_id, [Verdict.OK] * count, [1] * count, self.now)


def blocks(transfers: list[Transfer]) -> int:
    return sum(len(each.rows) for each in transfers)


def test_burst_that_outran_the_drive_is_prepared_for_the_next_time() -> None:
    """Else each burst would find as few clean blocks as the last, and the drive idle between them."""
    world = _Storm()
    world.effects()
    first = world.plan()
    assert blocks(first) == CLEAN_BLOCKS_MIN
    world.written(first)
    world.burst()
    world.effects()
    lost = world.store.counters.evicted_unwritten_blocks
    assert lost == BURST - CLEAN_BLOCKS_MIN
    second = world.plan()
    assert blocks(second) >= BURST
    world.written(second)
    world.burst()
    assert world.store.counters.evicted_unwritten_blocks - lost <= CLEAN_BLOCKS_MIN  # tails: heads are written first
    world.check()


def test_reserve_shrinks_again_when_bursts_are_over() -> None:
    """What is written ahead and asked for again was written for nothing."""
    world = _Storm()
    world.written(world.plan())
    world.burst()
    world.written(world.plan())
    world.now += 2 * PRESSED_S
    world.burst()
    world.written(world.plan())
    world.now += 2 * PRESSED_S
    world.plan()
    assert world.plan() == []
    world.check()
