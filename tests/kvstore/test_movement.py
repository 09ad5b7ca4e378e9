"""Between host memory and the drive: what is brought up, what is written down, and what becomes of it when it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from forebay.kvstore.errors import Draining
from forebay.kvstore.groups import HOST, NVME, Direction, DriveSlabAssigned, DriveSlabRetired, SlabOpened, Transfer
from forebay.kvstore.movement import FLUSH_TRIES, LOOK_AGAIN_S, PAGE_BYTES, PAUSE_S, Verdict
from forebay.kvstore.outcome import Outcome, Scope
from forebay.kvstore.slabs import QUARANTINED, RESIDENT
from support.core import BLOCK_BYTES, TwoTiers, chain, outcomes, spec

OK, CANCELLED, FAILED, CORRUPT, STALE = Verdict


def on_drive(length: int = 4, **world: object) -> TwoTiers:
    """A chain `a` that is on the drive only, in transfers of two blocks."""
    made = TwoTiers(**{"nvme": {"chunk_bytes": 2 * BLOCK_BYTES}, **world})  # type: ignore[arg-type]
    made.store_on_drive(chain("a", length))
    assert made.where(chain("a", length)) == "d" * length
    return made


def fill(world: TwoTiers, label: str = "full") -> list[bytes]:
    """As many blocks as there are free slots, in a chain."""
    tier = world.tier()
    names = chain(label, tier.slots_total - tier.slots_resident + (tier.slabs_total - tier.slabs_assigned) * 4)
    world.write(names)
    return names


# --- up ------------------------------------------------------------------------------------------------------------


def test_blocks_on_the_drive_are_leased_at_once_and_come_in_prefix_order() -> None:
    world = on_drive(4)
    got = world.store.acquire(1, world.ns, chain("a", 4), 30.0, world.now)
    assert (len(got.slots), got.ready) == (4, 0)
    first, second = world.step()
    assert (world.names_of(first), world.names_of(second)) == (chain("a", 4)[:2], chain("a", 4)[2:])
    assert {first.direction, second.direction} == {Direction.LOAD}
    world.finish(second)
    assert world.told() == []
    world.finish(first)
    assert world.told() == [(1, got.lease_id, 4, 4)]
    assert world.where(chain("a", 4)) == "bbbb"
    assert world.counters.promoted_blocks == 4


def test_resident_head_is_ready_at_once() -> None:
    world = on_drive(4)
    world.acquire(chain("a", 2))
    world.finish_all()
    got = world.store.acquire(1, world.ns, chain("a", 4), 30.0, world.now)
    assert got.ready == 2
    [load] = world.step()
    assert world.names_of(load) == chain("a", 4)[2:]


def test_lease_of_resident_blocks_needs_nothing() -> None:
    world = TwoTiers()
    world.write(chain("a", 3))
    assert world.store.acquire(1, world.ns, chain("a", 3), 30.0, 0.0).ready == 3
    assert world.step() == []


def test_loaded_block_has_the_checksum_that_the_drive_vouched_for() -> None:
    world = on_drive(2)
    world.acquire(chain("a", 2))
    world.finish_all(checksum=77)
    got = world.store.acquire(1, world.ns, chain("a", 2), 30.0, world.now)
    assert got.checksums.tolist() == [77, 77]


def test_second_lease_joins_the_load_of_the_first() -> None:
    """The blocks come once, and both are told."""
    world = on_drive(2)
    world.open_session(2)
    world.open(spec(), 2)
    one, slots, _ = world.acquire(chain("a", 2))
    [load] = world.step()
    two, same, _ = world.acquire(chain("a", 2), session=2)
    assert same == slots
    assert world.step() == []
    world.finish(load)
    assert sorted(world.told()) == [(1, one, 2, 2), (2, two, 2, 2)]


def test_block_named_twice_in_a_request_is_loaded_once() -> None:
    world = on_drive(1)
    lease, slots, _ = world.acquire(chain("a", 1) * 2)
    assert len(set(slots)) == 1
    [load] = world.step()
    assert len(load.rows) == 1
    world.finish(load)
    assert world.told() == [(1, lease, 2, 2)]


def end_by_release(world: TwoTiers, lease: int) -> None:
    world.store.release(1, lease)


def end_by_expiry(world: TwoTiers, lease: int) -> None:
    world.at(world.now + 30.0)


def end_by_death(world: TwoTiers, lease: int) -> None:
    world.store.close_session(1)


@pytest.mark.parametrize("end", [end_by_release, end_by_expiry, end_by_death])
def test_load_that_nobody_waits_for_is_cancelled(end: Callable[[TwoTiers, int], None]) -> None:
    """What it has not read stays on the drive, and nothing is held for it."""
    world = on_drive(2)
    group = world.store.shard(1, world.ns).group
    lease, _, _ = world.acquire(chain("a", 2))
    [load] = world.step()
    end(world, lease)
    world.step()
    assert world.drive.cancelled == [load.transfer_id]
    world.finish(load, CANCELLED)
    assert world.counters.promotions_cancelled_blocks == 2
    assert [group.index.is_in(row, HOST) for row in group.index.rows()] == [False, False]
    assert len(group.index.complete) == 2
    assert world.tier().slots_reserved == 0


def test_load_goes_on_while_another_lease_waits_for_it() -> None:
    world = on_drive(2)
    one, _, _ = world.acquire(chain("a", 2))
    two, _, _ = world.acquire(chain("a", 2))
    world.store.release(1, one)
    world.step()
    assert world.drive.cancelled == []
    world.finish_all()
    assert world.told() == [(1, two, 2, 2)]


def test_lease_that_got_nothing_leaves_no_load_behind() -> None:
    """Its first rank had room and its second had none."""
    world = TwoTiers(slabs=4)
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank)) for rank in range(2)]
    for ns in ranks:
        world.write(chain("p", 1), ns=ns)
    world.persist(chain("p", 1), ns=ranks[0])
    group = world.store.shard(1, ranks[0]).group
    group.evict(group.index.find(chain("p", 1)[0]), HOST)
    held = [world.write(chain("x", 4), ns=ns) for ns in ranks] + [world.write(chain("y", 8))]
    assert {o for reserved in held for o in outcomes(reserved)} == {Outcome.WRITE}
    world.acquire(chain("x", 3), ns=ranks[0])
    world.acquire(chain("y", 8))
    world.store.evict(1, ranks[0], Scope.BLOCKS, chain("x", 4)[3:])
    world.reserve(chain("x", 4), ns=ranks[1])
    assert world.acquire(chain("p", 1), ns=ranks[0]) == (0, [], [])
    loads = world.step()
    world.step()
    assert world.drive.cancelled == [load.transfer_id for load in loads]
    world.finish_all(CANCELLED)


def test_other_session_of_the_engine_is_told_of_the_blocks_it_resolved() -> None:
    world = TwoTiers()
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank)) for rank in range(2)]
    for session in (2, 3):
        world.open_session(session, group=b"engine")
        for rank in range(2):
            world.open(spec("pair", shard_size=2, shard_rank=rank), session)
    for ns in ranks:
        world.write(chain("p", 2), ns=ns)
    world.persist(chain("p", 2), ns=ranks[0])
    group = world.store.shard(1, ranks[0]).group
    for row in reversed(group.index.walk(chain("p", 2))):
        group.evict(row, HOST)
    lease, _, _ = world.acquire(chain("p", 2), ns=ranks[0], session=2)
    one, two = world.step()
    got = world.store.resolve(3, ranks[1], lease)
    assert (got.ready, got.slots.tolist()) == (0, two.host_slots)
    world.finish(one)
    assert world.told() == []  # half of each block
    world.finish(two)
    assert sorted(world.told()) == [(2, lease, 2, 2), (3, lease, 2, 2)]


@pytest.mark.parametrize(
    ("verdict", "counter", "quarantined"),
    [(FAILED, "promotions_failed_blocks", 1), (CORRUPT, "corrupt_blocks", 1), (STALE, "stale_blocks", 0)],
)
def test_block_that_could_not_be_read_is_a_miss(verdict: Verdict, counter: str, quarantined: int) -> None:
    """It is gone from the drive; its slot is nobody's, or free if another block lies in it; the lease is shorter."""
    world = on_drive(3)
    lease, _, _ = world.acquire(chain("a", 3))
    first, second = world.step()
    world.finish(first, OK, verdict)
    assert world.told() == [(1, lease, 1, 1)]
    world.finish(second)
    assert world.told() == []
    assert getattr(world.counters, counter) == 1
    assert world.drive_tier().slots_quarantined == quarantined
    assert world.drive.forgotten == [(0, 1)]
    assert world.hits(chain("a", 3)) == 1
    assert world.where(chain("a", 3)) == "b.b"
    world.store.release(1, lease)
    world.check()


def test_lost_tail_leaves_no_row_once_its_lease_has_ended() -> None:
    world = on_drive(2)
    lease, _, _ = world.acquire(chain("a", 2))
    world.finish_all(OK, CORRUPT)
    assert len(world.index) == 2
    world.store.release(1, lease)
    assert len(world.index) == 1
    world.check()


@pytest.mark.parametrize("order", [[0, 1, 1], [1, 0], [0, 0, 1, 0]])
def test_lost_blocks_named_twice_or_backwards_leave_no_row_either(order: list[int]) -> None:
    world = on_drive(2)
    names = chain("a", 2)
    lease, _, _ = world.acquire([names[at] for at in order])
    world.finish_all(CORRUPT)
    world.store.release(1, lease)
    assert len(world.index) == 0
    world.check()


def test_shortened_lease_can_be_resolved() -> None:
    world = on_drive(2)
    lease, slots, _ = world.acquire(chain("a", 2))
    world.finish_all(OK, FAILED)
    got = world.store.resolve(1, world.ns, lease)
    assert (got.slots.tolist(), got.ready) == (slots[:1], 1)


def test_pinned_block_that_could_not_be_read_is_not_pinned_any_more() -> None:
    world = on_drive(1)
    world.store.pin(1, world.ns, chain("a", 1))
    world.acquire(chain("a", 1))
    world.finish_all(CORRUPT)
    assert world.store.stats().pinned_blocks == 0


def test_failed_rank_takes_the_whole_block_from_the_drive() -> None:
    """What the other rank has read meanwhile is part of a block that is not complete: a miss, and storable again."""
    world = TwoTiers()
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank)) for rank in range(2)]
    for ns in ranks:
        world.write(chain("p", 1), ns=ns)
    world.persist(chain("p", 1), ns=ranks[0])
    group = world.store.shard(1, ranks[0]).group
    group.evict(group.index.find(chain("p", 1)[0]), HOST)
    world.acquire(chain("p", 1), ns=ranks[0])
    one, two = world.step()
    world.finish(one, STALE)
    world.finish(two)
    assert world.hits(chain("p", 1), ns=ranks[0]) == 0
    assert outcomes(world.write(chain("p", 1), ns=ranks[0])) == [Outcome.WRITE]
    assert outcomes(world.write(chain("p", 1), ns=ranks[1])) == [Outcome.PRESENT]
    assert world.hits(chain("p", 1), ns=ranks[0]) == 1


def test_lease_is_as_long_as_host_memory_has_room() -> None:
    world = on_drive(6, slabs=1)
    full = chain("b", 2)
    world.write(full)
    world.acquire(full)
    lease, slots, _ = world.acquire(chain("a", 6))
    assert len(slots) == 2
    assert world.counters.promotions_full_blocks == 4
    world.finish_all()
    assert world.told() == [(1, lease, 2, 2)]


def test_room_for_a_load_is_not_made_of_what_is_already_there() -> None:
    """A lease of eight blocks of which one has to come pushes one block out."""
    world = on_drive(8, slabs=4, slots=4)
    world.acquire(chain("a", 8)[:7])
    world.finish_all()
    fill(world)
    evicted = world.counters.evicted_blocks
    world.acquire(chain("a", 8))
    assert world.counters.evicted_blocks == evicted + 1


def test_load_into_a_slab_without_memory_is_given_up() -> None:
    world = on_drive(2)
    world.store.evict(1, world.ns, Scope.BLOCKS, [])
    group = world.store.shard(1, world.ns).group
    world.store._allocator.retire_empty(group)
    world.step()
    lease, _, _ = world.acquire(chain("a", 2))
    effects = world.effects()
    [opened], [load] = effects.slabs, effects.transfers
    assert isinstance(opened, SlabOpened)
    world.store.slab_failed(opened.ns, opened.slab)
    assert world.told() == [(1, lease, 0, 0)]
    assert world.tier().slabs_assigned == 0
    world.store.transfer_done(load.transfer_id, [CANCELLED] * 2, [0, 0], 0.0)
    assert world.where(chain("a", 2)) == "dd"
    world.check()


# --- prefetch ------------------------------------------------------------------------------------------------------


def test_prefetch_fills_a_share_of_host_memory_at_one_time() -> None:
    world = on_drive(8, nvme={"prefetch_share": 0.25})
    assert world.store.prefetch(1, world.ns, chain("a", 8), world.now) == (0, 4)
    assert world.store.prefetch(1, world.ns, chain("a", 8), world.now) == (0, 4)
    world.finish_all()
    assert world.store.prefetch(1, world.ns, chain("a", 8), world.now) == (4, 4)
    world.finish_all()
    assert world.where(chain("a", 8)) == "b" * 8


def test_prefetch_evicts_no_more_than_it_fills() -> None:
    world = on_drive(8, nvme={"prefetch_share": 0.125})
    fill(world)
    evicted = world.counters.evicted_blocks
    world.store.prefetch(1, world.ns, chain("a", 8), world.now)
    assert world.counters.evicted_blocks == evicted + 2


def test_prefetch_that_finds_no_room_does_not_use_its_share_up() -> None:
    world = on_drive(4, slabs=1)
    full = fill(world)
    lease, _, _ = world.acquire(full)
    for _ in range(10):
        assert world.store.prefetch(1, world.ns, chain("a", 4), world.now) == (0, 0)
    world.store.release(1, lease)
    assert world.store.prefetch(1, world.ns, chain("a", 4), world.now) == (0, 4)


def test_leases_do_not_wait_for_prefetches() -> None:
    """Of what is prefetched the drive is asked for a part; the rest follows as that ends, and a lease comes first."""
    world = on_drive(8, nvme={"chunk_bytes": 2 * BLOCK_BYTES, "ahead_bytes": 3 * BLOCK_BYTES})
    names = chain("a", 8)
    assert world.store.prefetch(1, world.ns, names[:6], world.now) == (0, 6)
    first, second = world.step()
    assert (world.names_of(first), world.names_of(second)) == (names[:2], names[2:4])
    got = world.store.acquire(1, world.ns, names, 30.0, world.now)
    assert (len(got.slots), got.ready) == (8, 0)
    third, leased = world.step()
    assert (world.names_of(third), world.names_of(leased)) == (names[4:6], names[6:])
    world.finish_all()
    assert world.told()[-1] == (1, got.lease_id, 8, 8)


def test_prefetches_that_wait_are_asked_for_as_others_end() -> None:
    world = on_drive(8, nvme={"chunk_bytes": 2 * BLOCK_BYTES, "ahead_bytes": BLOCK_BYTES})
    names = chain("a", 8)
    assert world.store.prefetch(1, world.ns, names, world.now) == (0, 8)
    for first in range(0, 8, 2):
        world.step()
        [load] = world.drive.pending
        assert world.names_of(load) == names[first : first + 2]
        world.finish(load, FAILED if first == 4 else OK)
    assert world.where(names) == "bbbb..bb"
    assert world.drive.pending == []


def test_prefetched_blocks_come_though_a_lease_on_them_has_ended() -> None:
    world = on_drive(2)
    world.store.prefetch(1, world.ns, chain("a", 2), world.now)
    lease, _, _ = world.acquire(chain("a", 2))
    world.store.release(1, lease)
    world.step()
    assert world.drive.cancelled == []
    world.finish_all()
    assert world.where(chain("a", 2)) == "bb"


def test_load_of_a_lease_that_is_prefetched_as_well_goes_on_without_it() -> None:
    world = on_drive(2)
    lease, _, _ = world.acquire(chain("a", 2))
    assert world.store.prefetch(1, world.ns, chain("a", 2), world.now) == (0, 2)
    world.store.release(1, lease)
    world.step()
    assert world.drive.cancelled == []


# --- down ----------------------------------------------------------------------------------------------------------


def test_coldest_blocks_are_written_before_their_slots_are_needed() -> None:
    """A store then waits for nothing, and nothing is lost."""
    world = TwoTiers(slabs=8, slots=4)
    world.write(chain("a", 32))
    for _ in range(2):  # the window is a quarter of host memory
        world.store.plan_writes(world.now)
        world.finish_all()
    assert world.where(chain("a", 32)) == "h" * 16 + "b" * 16
    world.at(1.0)
    assert set(outcomes(world.write(chain("b", 8)))) == {Outcome.WRITE}
    assert (world.counters.released_blocks, world.counters.evicted_unwritten_blocks) == (8, 0)
    assert world.hits(chain("a", 32)) == 32


def test_nothing_is_written_while_there_is_room() -> None:
    world = TwoTiers(slabs=16)
    world.write(chain("a", 8))
    world.store.plan_writes(world.now)
    assert world.step() == []


def test_block_lost_before_it_was_written_is_counted() -> None:
    world = TwoTiers(slabs=1)
    world.write(chain("a", 4))
    world.write(chain("b", 2))
    assert world.counters.evicted_unwritten_blocks == 2


def test_what_is_being_written_waits_in_its_place_and_others_go() -> None:
    """It will be the first to go once it is written: its use did not make it young."""
    world = TwoTiers(slabs=4)
    world.write(chain("old", 4))
    world.at(1.0)
    world.write(chain("young", 12))
    world.store.persist(1, world.ns, chain("old", 4), world.now)
    world.at(2.0)
    world.write(chain("b", 1))
    assert world.where(chain("old", 4)) == "hhhh"
    assert world.where(chain("young", 12)) == "h" * 11 + "."
    world.finish_all()
    world.at(3.0)
    world.write(chain("c", 4))
    assert world.where(chain("old", 4)) == "dddd"


def test_no_more_is_on_its_way_to_the_drive_than_the_window_holds() -> None:
    world = TwoTiers(slabs=8, nvme={"window_bytes": 3 * BLOCK_BYTES, "chunk_bytes": 2 * BLOCK_BYTES})
    world.write(chain("a", 32))
    world.store.plan_writes(world.now)
    transfers = world.step()
    assert [len(t.rows) for t in transfers] == [2, 1]
    world.store.plan_writes(world.now)
    assert world.step() == []
    world.finish(transfers[0])
    world.store.plan_writes(world.now)
    assert [len(t.rows) for t in world.step()] == [2]


def test_block_larger_than_the_window_is_written_alone() -> None:
    world = TwoTiers(slabs=2, nvme={"window_bytes": 1})
    world.write(chain("a", 2))
    world.store.persist(1, world.ns, chain("a", 2), world.now)
    assert [len(t.rows) for t in world.step()] == [1]


ON_DRIVE_BYTES = BLOCK_BYTES + PAGE_BYTES
"""What writing a block writes: the budget is of wear, so the header page counts."""


def test_small_budget_ends_the_writing() -> None:
    world = TwoTiers(nvme={"budget_bytes_per_day": 24 * 2 * ON_DRIVE_BYTES})
    world.write(chain("a", 4))
    world.persist(chain("a", 4))
    assert world.where(chain("a", 4)) == "bbhh"
    movement = world.store.stats(world.now).movement
    assert movement is not None
    assert movement.budget_left_bytes == 0
    world.at(3600.0)
    world.persist(chain("a", 4))
    assert world.where(chain("a", 4)) == "bbbb"


def test_writes_that_were_not_tried_cost_no_budget() -> None:
    world = TwoTiers(nvme={"budget_bytes_per_day": 24 * 4 * ON_DRIVE_BYTES})
    world.write(chain("a", 4))
    for turn in range(3):
        world.at(turn * 2 * PAUSE_S)
        world.store.persist(1, world.ns, chain("a", 4), world.now)
        world.finish_all(CANCELLED)
    world.at(10.0)
    world.persist(chain("a", 4))
    assert world.where(chain("a", 4)) == "bbbb"


def test_drive_that_takes_no_writes_is_left_alone_for_a_while() -> None:
    """Otherwise its refusals and new attempts would chase each other."""
    world = TwoTiers(slabs=4)
    world.write(chain("a", 16))
    world.store.plan_writes(world.now)
    world.finish_all(FAILED)
    assert world.counters.demotions_failed_blocks == 4
    for _ in range(3):
        world.now += PAUSE_S / 4
        world.store.plan_writes(world.now)
        assert world.step() == []
    world.now += PAUSE_S + LOOK_AGAIN_S
    world.store.plan_writes(world.now)
    world.finish_all()
    assert world.where(chain("a", 16)).count("b") == 4


def test_failed_write_leaves_the_block_where_it_was() -> None:
    world = TwoTiers()
    world.write(chain("a", 2))
    world.store.persist(1, world.ns, chain("a", 2), world.now)
    [write] = world.step()
    world.finish(write, OK, FAILED)
    assert world.where(chain("a", 2)) == "bh"
    assert world.drive.forgotten == [(0, 1)]
    assert world.drive_tier().slots_reserved == 0


def test_checksum_is_taken_from_the_writer_and_compared_when_the_block_is_written() -> None:
    """Bytes that are not what was stored reach no drive, and no later reader."""
    world = TwoTiers()
    reserved = world.reserve(chain("a", 3))
    world.store.commit(1, reserved.reservation_id, [], 0.0, [7, 8, 0])
    got = world.store.acquire(1, world.ns, chain("a", 3), 30.0, 0.0)
    assert got.checksums.tolist() == [7, 8, 0]
    world.store.release(1, got.lease_id)
    world.store.persist(1, world.ns, chain("a", 3), 0.0)
    world.finish_all(checksum=7)
    assert world.counters.corrupt_blocks == 1
    assert world.where(chain("a", 3)) == "b.b"
    assert world.drive_tier().slots_resident == 2
    assert world.store.acquire(1, world.ns, chain("a", 3), 30.0, 0.0).checksums.tolist() == [7]


def test_spoilt_block_that_is_leased_stays_for_its_readers() -> None:
    world = TwoTiers()
    reserved = world.reserve(chain("a", 1))
    world.store.commit(1, reserved.reservation_id, [], 0.0, [7])
    world.acquire(chain("a", 1))
    world.store.persist(1, world.ns, chain("a", 1), 0.0)
    world.finish_all(checksum=8)
    assert world.where(chain("a", 1)) == "h"


def test_checksum_of_a_block_does_not_outlive_it() -> None:
    world = TwoTiers(slabs=1, slots=1)
    reserved = world.reserve(chain("a", 1))
    world.store.commit(1, reserved.reservation_id, [], 0.0, [7])
    world.write(chain("b", 1))
    assert world.store.acquire(1, world.ns, chain("b", 1), 30.0, 0.0).checksums.tolist() == [0]


def test_persist_tells_what_is_durable_and_what_is_on_its_way_or_waits_for_its_turn() -> None:
    world = TwoTiers(nvme={"window_bytes": 2 * BLOCK_BYTES})
    world.write(chain("a", 5))
    told = []
    for _ in range(4):
        said = world.store.persist(1, world.ns, chain("a", 5), world.now)
        told.append((said.durable, said.pending))
        world.finish_all()
    assert told == [(0, 5), (2, 3), (4, 1), (5, 0)]


def test_what_a_client_has_asked_for_goes_on_to_the_drive_though_it_does_not_ask_again() -> None:
    world = TwoTiers(slabs=8, nvme={"window_bytes": 2 * BLOCK_BYTES})
    world.write(chain("a", 5))
    world.store.persist(1, world.ns, chain("a", 5), world.now)
    begun = []
    while writes := world.step():
        begun.append([name for write in writes for name in world.names_of(write)])
        world.finish_all()
        world.store.plan_writes(world.now)
    assert begun == [chain("a", 5)[:2], chain("a", 5)[2:4], chain("a", 5)[4:]]
    assert world.where(chain("a", 5)) == "bbbbb"


def test_what_a_client_has_asked_for_keeps_its_order_while_there_is_room_for_part_of_a_block() -> None:
    world = TwoTiers(slabs=8, nvme={"window_bytes": BLOCK_BYTES + 1})
    world.write(chain("a", 4))
    world.store.persist(1, world.ns, chain("a", 4), world.now)
    begun = []
    while writes := world.step():
        begun += [name for write in writes for name in world.names_of(write)]
        for _ in range(2):
            world.store.plan_writes(world.now)
        world.finish_all()
        world.store.plan_writes(world.now)
    assert begun == chain("a", 4)


def test_block_that_left_before_its_turn_came_is_not_written_nor_what_took_its_row() -> None:
    world = TwoTiers(slabs=8, nvme={"window_bytes": BLOCK_BYTES})
    world.write(chain("a", 2))
    world.store.persist(1, world.ns, chain("a", 2), world.now)
    row = world.index.find(chain("a", 2)[1])
    world.store.evict(1, world.ns, Scope.BLOCKS, chain("a", 2)[1:])
    world.write(chain("b", 1))
    assert world.index.find(chain("b", 1)[0]) == row
    world.finish_all()
    world.store.plan_writes(world.now)
    assert world.step() == []
    assert world.where(chain("b", 1)) == "h"


def test_before_the_drive_has_told_what_it_holds_blocks_wait_for_it() -> None:
    world = TwoTiers(restored=False)
    world.write(chain("a", 1))
    said = world.store.persist(1, world.ns, chain("a", 1), world.now)
    assert (said.durable, said.pending) == (0, 1)
    assert world.step() == []


def test_idle_daemon_writes_all_that_is_only_in_memory() -> None:
    world = TwoTiers(slabs=8, nvme={"idle_s": 2.0})
    world.write(chain("a", 8))
    world.store.sweep(world.now + 1.9)
    assert world.step() == []
    world.store.sweep(world.now + 2.0)
    world.finish_all()
    assert world.where(chain("a", 8)) == "b" * 8
    world.store.sweep(world.now + 4.0)
    assert world.step() == []


def test_sweep_goes_on_where_the_window_stopped_it() -> None:
    world = TwoTiers(slabs=8, nvme={"window_bytes": 3 * BLOCK_BYTES})
    world.write(chain("a", 8))
    for turn in range(3):
        world.store.sweep(world.now + 10.0 + turn)
        world.finish_all()
    assert world.where(chain("a", 8)) == "b" * 8


def test_shutdown_writes_what_was_last_asked_for_first() -> None:
    """Within the time there is, what is most likely to be asked for again survives; each block is written once."""
    world = TwoTiers(slabs=8, nvme={"window_bytes": 2 * BLOCK_BYTES})
    cold, other = chain("cold", 2), chain("other", 2)
    ns = world.open(spec("other"))
    world.write(cold)
    world.at(1.0)
    world.write(chain("hot", 3))
    world.at(2.0)
    world.write(other, ns=ns)
    world.store.drain()
    order = []
    while world.store.flush(world.now):
        for transfer in world.step():
            order += world.names_of(transfer)
        world.finish(world.drive.pending[0])
    assert order == [*other, *chain("hot", 3), *cold]
    assert not world.store.flush(world.now)


def test_shutdown_tries_a_failing_drive_a_few_times_and_no_more() -> None:
    world = TwoTiers()
    world.write(chain("a", 4))
    world.store.drain()
    tries = 0
    while world.store.flush(world.now):
        world.step()
        tries += bool(world.drive.pending)
        world.finish_all(FAILED)
        world.at(world.now + 1.0)
        assert tries <= FLUSH_TRIES
    assert tries == FLUSH_TRIES
    assert world.step() == []


def test_shutdown_writes_what_failed_at_first() -> None:
    world = TwoTiers()
    world.write(chain("a", 4))
    world.store.drain()
    assert world.store.flush(world.now)
    world.finish_all(FAILED)
    assert world.store.flush(world.now)
    world.at(world.now + 1.0)
    while world.store.flush(world.now):
        world.finish_all()
    assert world.store.persist(1, world.ns, chain("a", 4), world.now).durable == 4


def test_draining_store_lets_loads_end_and_begins_none() -> None:
    world = on_drive(4)
    lease, _, _ = world.acquire(chain("a", 2))
    world.step()
    world.store.drain()
    with pytest.raises(Draining):
        world.acquire(chain("a", 4))
    assert world.store.prefetch(1, world.ns, chain("a", 4), world.now) == (0, 0)
    world.finish_all()
    assert world.told() == [(1, lease, 2, 2)]
    assert world.store.prefetch(1, world.ns, chain("a", 4), world.now) == (2, 0)
    world.store.plan_writes(world.now)
    assert world.step() == []


# --- leaving -------------------------------------------------------------------------------------------------------


def test_drive_evicts_the_tail_of_the_coldest_chain_first() -> None:
    world = TwoTiers(slabs=4, drive_slabs=2)
    world.store_on_drive(chain("a", 4))
    world.at(1.0)
    world.store_on_drive(chain("b", 4))
    world.at(2.0)
    world.write(chain("c", 2))
    world.persist(chain("c", 2))
    assert (world.where(chain("a", 4)), world.where(chain("b", 4))) == ("dd..", "dddd")
    assert world.hits(chain("a", 4)) == 2


def test_full_drive_evicts_as_much_as_is_written_and_no_more() -> None:
    world = TwoTiers(slabs=8, drive_slabs=2, nvme={"window_bytes": 2 * BLOCK_BYTES})
    world.store_on_drive(chain("a", 2))
    world.write(chain("b", 10))
    world.persist(chain("b", 6))
    world.persist(chain("b", 6))
    world.persist(chain("b", 6))
    assert world.where(chain("a", 2)) == "dd"
    world.at(1.0)
    world.store.persist(1, world.ns, chain("b", 10), world.now)
    world.finish_all()
    assert world.drive_tier().slots_resident == 8


def test_block_that_leads_to_one_in_memory_stays_on_the_drive() -> None:
    """Its descendant could not be found without it."""
    world = TwoTiers(slabs=4, drive_slabs=1)
    world.store_on_drive(chain("a", 4))
    world.write(chain("a", 6))
    assert world.where(chain("a", 6)) == "ddddhh"
    world.write(chain("b", 2))
    world.persist(chain("b", 2))
    assert world.where(chain("b", 2)) == "hh"
    assert world.hits(chain("a", 6)) == 6


def test_block_in_both_tiers_may_leave_the_drive_whatever_continues_it() -> None:
    world = TwoTiers(slabs=4, drive_slabs=1)
    world.write(chain("a", 6))
    world.persist(chain("a", 4))
    world.at(1.0)
    world.write(chain("b", 2))
    world.persist(chain("b", 2))
    assert world.where(chain("b", 2)) == "bb"
    assert world.hits(chain("a", 6)) == 6


def broken(**nvme: object) -> TwoTiers:
    """Host memory is full of heads that are not on the drive, each continued by a tail that is only there."""
    world = TwoTiers(slabs=2, pin_quota=1.0, nvme=nvme)
    group = world.store.shard(1, world.ns).group
    for label in "abcdefg":
        names = chain(label, 2)
        world.write(names)
        world.persist(names)
        group.drop_from(group.index.find(names[0]), NVME)
        group.evict(group.index.find(names[1]), HOST)
        world.step()
        assert world.where(names) == "hd"
    world.write(chain("last", 1))
    world.store.pin(1, world.ns, chain("last", 1))
    assert world.tier().slots_free == 0
    return world


def test_host_memory_does_not_wedge_when_the_drive_takes_no_writes() -> None:
    """Heads whose continuation is on the drive go with it, rather than nothing at all."""
    world = broken()
    assert outcomes(world.write(chain("new", 3))) == [Outcome.WRITE] * 3
    assert world.where(chain("a", 2)) == ".."
    assert world.where(chain("g", 2)) == "hd"


@pytest.mark.parametrize("held", ["lease", "pin"])
def test_forced_eviction_spares_what_is_in_use_and_finds_the_rest(held: str) -> None:
    """However cold that is, and however much of it there is."""
    world = broken()
    for label in "abcdef":
        if held == "lease":
            world.acquire(chain(label, 1), ttl_s=300.0)
        else:
            world.store.pin(1, world.ns, chain(label, 1))
    assert outcomes(world.write(chain("new", 2))) == [Outcome.WRITE, Outcome.FULL]
    assert world.where(chain("a", 2)) == "hd"
    assert world.where(chain("g", 2)) == ".."


def test_forced_eviction_looks_beyond_the_coldest_blocks() -> None:
    """They are all pinned, and more than it looks at first."""
    world = TwoTiers(slabs=1, slots=101, pin_quota=1.0)
    group = world.store.shard(1, world.ns).group
    world.write(chain("pinned", 99))
    world.store.pin(1, world.ns, chain("pinned", 99))
    world.at(1.0)
    world.write(chain("a", 2))
    world.persist(chain("a", 2))
    group.drop_from(group.index.find(chain("a", 2)[0]), NVME)
    group.evict(group.index.find(chain("a", 2)[1]), HOST)
    world.write(chain("last", 1))
    world.store.pin(1, world.ns, chain("last", 1))
    assert outcomes(world.write(chain("new", 1))) == [Outcome.WRITE]


def test_store_refused_once_is_not_refused_for_ever() -> None:
    """The refused block itself had kept its parent, and with it what could have gone by force."""
    world = TwoTiers(slabs=1, slots=1)
    group = world.store.shard(1, world.ns).group
    world.write(chain("a", 1))
    world.persist(chain("a", 1))
    group.evict(group.index.find(chain("a", 1)[0]), HOST)
    world.write(chain("b", 1))
    assert outcomes(world.write(chain("b", 2)))[1] == Outcome.FULL
    assert outcomes(world.write(chain("c", 1))) == [Outcome.WRITE]


def test_drive_slab_is_assigned_before_it_is_written_and_retired_when_it_is_cleared() -> None:
    world = TwoTiers(slabs=4)
    world.write(chain("a", 4))
    world.persist(chain("a", 4))
    [assigned] = world.drive.slabs
    assert isinstance(assigned, DriveSlabAssigned)
    assert (assigned.physical, assigned.generation) == (0, 1 << 32 | 1)
    world.store.evict(1, world.ns, Scope.NAMESPACE, [])
    world.step()
    assert world.drive.slabs[1:] == [DriveSlabRetired(0)]
    assert world.drive_tier().slabs_assigned == 0


def test_drive_slab_changes_hands_under_generations_it_never_had() -> None:
    """Its bytes stay on the drive: an image of the last owner must not pass for one of the next."""
    world = TwoTiers(slabs=4, drive_slabs=1)
    other = world.open(spec("other"))
    for turn in range(3):
        world.write(chain(f"a{turn}", 2))
        world.persist(chain(f"a{turn}", 2))
        world.store.evict(1, world.ns, Scope.BLOCKS, chain(f"a{turn}", 2))
    used = {g for slab in world.store.shard(1, world.ns).spaces[NVME].slabs.values() for g in slab.generations}
    world.write(chain("b", 1), ns=other)
    world.persist(chain("b", 1), ns=other)
    last = world.drive.slabs[-1]
    assert isinstance(last, DriveSlabAssigned)
    assert last.shard.ns == other
    assert last.generation > max(used)


def test_quarantined_drive_slots_are_given_another_chance_when_the_namespace_is_cleared() -> None:
    world = on_drive(2)
    lease, _, _ = world.acquire(chain("a", 2))
    world.finish_all(CORRUPT)
    world.store.release(1, lease)
    assert world.drive_tier().slots_quarantined == 2
    world.store.evict(1, world.ns, Scope.NAMESPACE, [])
    world.step()
    assert world.drive_tier().slabs_assigned == 0


def test_namespace_with_quarantined_drive_slots_can_be_forgotten() -> None:
    world = on_drive(1, namespaces_max=1)
    lease, _, _ = world.acquire(chain("a", 1))
    world.finish_all(CORRUPT)
    world.store.close_session(1)
    world.open_session(2)
    world.open(spec("other"), 2)
    world.step()
    assert lease
    assert world.drive_tier().slabs_assigned == 0


def test_namespace_whose_blocks_are_under_way_is_not_forgotten() -> None:
    world = TwoTiers(namespaces_max=1)
    world.write(chain("a", 1))
    world.store.persist(1, world.ns, chain("a", 1), world.now)
    world.step()
    world.store.close_session(1)
    world.open_session(2)
    with pytest.raises(Exception, match="which is the limit"):
        world.open(spec("other"), 2)
    world.finish_all()
    world.open(spec("other"), 2)
    world.step()


def test_counts_of_what_is_under_way_are_told() -> None:
    world = on_drive(2)
    world.write(chain("b", 3))
    world.acquire(chain("a", 2))
    world.store.persist(1, world.ns, chain("b", 1), world.now)
    movement = world.store.stats(world.now).movement
    assert movement is not None
    assert (movement.loads, movement.loading_blocks) == (1, 2)
    assert (movement.writes, movement.writing_blocks, movement.writing_bytes) == (1, 1, BLOCK_BYTES)
    assert movement.dirty_blocks == 3
    shard = world.store.shard(1, world.ns)
    assert (shard.slots.count(RESIDENT), shard.spaces[NVME].count(QUARANTINED)) == (3, 0)


@pytest.mark.parametrize("how", ["sweep", "flush"])
def test_more_than_the_drive_holds_is_gone_over_once(how: str) -> None:
    """Each block that is written pushes another off a small drive, which is then only in memory again: it must end."""
    world = TwoTiers(slabs=4, drive_slabs=1, nvme={"window_bytes": 2 * BLOCK_BYTES})
    world.write(chain("a", 12))
    for turn in range(20):
        world.at(10.0 + turn)
        if how == "sweep":
            world.store.sweep(world.now)
        else:
            world.store.flush(world.now)
        world.finish_all()
    assert world.counters.demoted_blocks <= 12
    assert world.drive_tier().slots_resident == 4
    world.write(chain("b", 1))
    world.store.sweep(world.now + 100.0)
    assert world.step() != []


def test_sweep_tries_again_what_the_drive_did_not_take() -> None:
    world = TwoTiers()
    world.write(chain("a", 2))
    world.store.sweep(10.0)
    world.finish_all(FAILED)
    world.store.sweep(20.0)
    world.finish_all()
    world.store.sweep(30.0)
    world.finish_all()
    assert world.where(chain("a", 2)) == "bb"


# --- several drives ------------------------------------------------------------------------------------------------


def drives_of(world: TwoTiers, transfers: Sequence[Transfer]) -> set[int]:
    """Which of two drives these transfers touch."""
    return {t.shard.spaces[NVME].place(slot)[0] % 2 for t in transfers for slot in t.nvme_slots}


def on_two_drives(**world: object) -> TwoTiers:
    """A namespace with a slab of four slots on each drive, one of which holds a block: the first drive's is next."""
    made = TwoTiers(slabs=8, nvme={"drives": 2}, **world)  # type: ignore[arg-type]
    made.persist(made.write(chain("a", 5)) and chain("a", 5))
    made.store.evict(1, made.ns, Scope.BLOCKS, chain("a", 5)[1:4])
    return made


def test_drive_that_takes_no_writes_leaves_its_turn_to_the_others() -> None:
    """Both while it is paused and at the first try after that; what is on the other one is written without a pause."""
    world = on_two_drives()
    names = chain("b", 1)
    world.write(names)
    world.store.persist(1, world.ns, names, world.now)
    [first] = world.step()
    [bad] = drives_of(world, [first])
    world.finish(first, FAILED)
    world.store.persist(1, world.ns, names, world.now)
    [again] = world.step()
    assert drives_of(world, [again]) == {1 - bad}
    world.finish(again)
    assert world.where(names) == "b"
    world.now += PAUSE_S
    world.write(chain("c", 1))
    world.store.persist(1, world.ns, chain("c", 1), world.now)
    assert drives_of(world, world.step()) == {1 - bad}


def test_nothing_is_written_while_every_drive_is_paused() -> None:
    world = on_two_drives()
    names = chain("b", 6)
    world.write(names)
    for _ in range(2):
        world.store.persist(1, world.ns, names, world.now)
        world.finish_all(FAILED)
    world.store.persist(1, world.ns, names, world.now)
    assert world.step() == []
    world.now += PAUSE_S
    world.store.persist(1, world.ns, names, world.now)
    assert drives_of(world, world.step()) == {0, 1}


def test_part_of_a_transfer_that_failed_on_one_drive_pauses_that_drive_alone() -> None:
    world = on_two_drives()
    names = chain("b", 6)
    world.write(names)
    world.store.persist(1, world.ns, names, world.now)
    [transfer] = world.step()
    places = [transfer.shard.spaces[NVME].place(slot)[0] % 2 for slot in transfer.nvme_slots]
    assert set(places) == {0, 1}
    world.finish(transfer, *(FAILED if drive == 0 else OK for drive in places))
    world.store.persist(1, world.ns, names, world.now)
    assert drives_of(world, world.step()) <= {1}
    world.finish_all()
    assert world.where(names).count("b") >= places.count(1)


def test_full_tier_makes_room_on_the_drive_that_takes_writes() -> None:
    """And gives up no more for it than what is coldest: the paused drive's blocks are still read."""
    world = TwoTiers(slabs=8, drive_slabs=4, nvme={"drives": 2})
    world.store_on_drive(chain("a", 16))
    assert world.drive_tier().slots_resident == 16
    world.write(chain("b", 1))
    world.store.persist(1, world.ns, chain("b", 1), world.now)
    [first] = world.step()
    [bad] = drives_of(world, [first])
    world.finish(first, FAILED)
    world.store.persist(1, world.ns, chain("b", 1), world.now)
    transfers = world.step()
    assert drives_of(world, transfers) <= {1 - bad}
    assert world.hits(chain("a", 16)) >= 12
    world.finish_all()
    world.check()
