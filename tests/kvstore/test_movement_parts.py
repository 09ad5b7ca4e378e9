"""A long lease is made in parts, and what was decided for one begins while the next is being decided."""

from __future__ import annotations

from forebay.kvstore.groups import Effects
from forebay.kvstore.movement import Verdict
from support.core import BLOCK_BYTES, TwoTiers, chain

BLOCKS, PART, SLOTS = 10, 4, 4
HASHES = chain("c", BLOCKS)


class _OnTheDrive(TwoTiers):
    """A chain on the drive only, and drives that are asked for `PART` blocks at a time."""

    def __init__(self, slabs: int = 4) -> None:
        super().__init__(slabs, nvme={"ahead_bytes": PART * BLOCK_BYTES})
        self.write(HASHES)
        while self.store.persist(self.session, self.ns, HASHES, self.now).pending:
            for transfer in self.step():
                self.finish(transfer)
        group = self.store.shard(self.session, self.ns).group
        for row in reversed(group.index.walk(HASHES)):
            group.evict(row, 0)
        self.step()
        self.handed: list[Effects] = []

    def hand_over(self) -> None:
        self.check()
        self.handed.append(self.store.drain_effects())

    def lease(self) -> tuple[int, int]:
        """Its number and how many blocks it has; all else that was decided is handed over."""
        got = self.store.acquire(self.session, self.ns, HASHES, 30.0, self.now, self.hand_over)
        self.hand_over()
        return got.lease_id, len(got.slots)

    def rows_begun(self) -> list[int]:
        return [len(transfer.rows) for effects in self.handed for transfer in effects.transfers]


def test_each_part_is_handed_over_before_the_next_is_decided() -> None:
    world = _OnTheDrive()
    _, blocks = world.lease()
    assert blocks == BLOCKS
    assert [[len(t.rows) for t in effects.transfers] for effects in world.handed] == [[4], [4], [2]]


def test_blocks_in_memory_are_not_handed_over() -> None:
    world = _OnTheDrive()
    world.lease()
    for transfer in [t for effects in world.handed for t in effects.transfers]:
        world.store.transfer_done(transfer.transfer_id, [Verdict.OK] * len(transfer.rows), [1] * 9, world.now)
    world.step()
    world.handed.clear()
    _, blocks = world.lease()
    assert blocks == BLOCKS
    assert len(world.handed) == 1, "there was nothing to begin early"


def test_part_without_memory_ends_the_lease_there() -> None:
    class NoMemory(_OnTheDrive):
        def hand_over(self) -> None:
            super().hand_over()
            if len(self.handed) == 2:
                [transfer] = self.handed[-1].transfers
                self.store.slab_failed(self.ns, transfer.host_slots[0] // SLOTS)
                self.check()

    world = NoMemory()
    lease, blocks = world.lease()
    assert blocks == PART, "the part without memory is not promised"
    assert sum(world.rows_begun()) == 2 * PART, "nothing is begun for what will not be read"
    world.store.release(world.session, lease)
    world.check()


def test_session_that_dies_meanwhile_leaves_nothing() -> None:
    class Dying(_OnTheDrive):
        def hand_over(self) -> None:
            super().hand_over()
            if len(self.handed) == 1:
                self.store.close_session(self.session)

    world = Dying()
    assert world.lease() == (0, 0)
    assert world.store.in_use == 0
    [begun] = [t for effects in world.handed for t in effects.transfers]
    assert [i for effects in world.handed for i in effects.cancelled] == [begun.transfer_id]
    world.store.transfer_done(begun.transfer_id, [Verdict.CANCELLED] * PART, [0] * PART, world.now)
    world.check()


def test_chain_that_does_not_fit_is_leased_as_far_as_it_does() -> None:
    world = _OnTheDrive(slabs=3)
    held = chain("held", 6)
    world.write(held)
    assert len(world.acquire(held)[1]) == 6
    _, blocks = world.lease()
    assert blocks == 3 * SLOTS - 6
    assert world.counters.promotions_full_blocks == BLOCKS - blocks
