"""A warm start: what an earlier life left on the drive is found in any order, beside clients that already ask."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.errors import LayoutError, QuotaExceeded
from forebay.kvstore.groups import NVME, DriveSlabAssigned, DriveSlabRetired
from forebay.kvstore.movement import Verdict
from forebay.kvstore.outcome import Outcome, Scope
from forebay.kvstore.restoration import FoundBlock, Owner
from support.core import UID, SlabOwner, TwoTiers, chain, outcomes, spec

FIRST = 7 << 32 | 1
"""First generation of this life."""

OLD = 3 << 32 | 1
OURS = SlabOwner(UID, spec().group_fingerprint())


def found(
    names: Sequence[bytes], slab: int = 0, *, slot: int = 0, above: bytes = b"", depth: int = 0
) -> list[FoundBlock]:
    """A chain that lies in consecutive slots."""
    parents = [above, *names[:-1]]
    return [
        (slab, slot + i, name, parent, depth + i, OLD + i)
        for i, (name, parent) in enumerate(zip(names, parents, strict=True))
    ]


def started(*slabs: tuple[int, Owner, int], **world: Any) -> TwoTiers:
    """A world whose drive has told which of its slabs are in use."""
    made = TwoTiers(restored=False, **world)
    made.store.restore_slabs(slabs or ((0, OURS, OLD), (1, OURS, OLD)), FIRST)
    return made


def restore(world: TwoTiers, blocks: Sequence[FoundBlock]) -> None:
    world.store.restore_blocks(blocks, world.now)
    world.step()


def test_found_blocks_are_visible_at_once_and_loaded_as_they_were_written() -> None:
    world = started()
    restore(world, found(chain("a", 3)))
    assert world.hits(chain("a", 3)) == 3
    world.acquire(chain("a", 3))
    [load] = world.step()
    assert [load.shard.spaces[NVME].place(slot) for slot in load.nvme_slots] == [(0, 0), (0, 1), (0, 2)]
    assert load.generations == [OLD, OLD + 1, OLD + 2]
    world.finish(load)
    assert world.where(chain("a", 3)) == "bbb"
    assert world.counters.restored_blocks == 3


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 1 << 30), st.integers(1, 7))
def test_blocks_are_found_whatever_the_order_in_which_they_come(seed: int, batch: int) -> None:
    """Children before parents, chains in pieces."""
    world = started((0, OURS, OLD), (1, OURS, OLD), (2, OURS, OLD))
    trunk, left, right = chain("t", 4), chain("l", 4), chain("r", 4)
    blocks = found(trunk) + found(left, 1, above=trunk[1], depth=2) + found(right, 2, above=left[0], depth=3)
    random.Random(seed).shuffle(blocks)
    for at in range(0, len(blocks), batch):
        restore(world, blocks[at : at + batch])
    world.store.restore_done()
    world.step()
    assert world.hits([*trunk[:2], *left]) == 6
    assert world.hits([*trunk[:2], left[0], *right]) == 7
    assert world.hits(trunk) == 4
    index = world.index
    assert [index.depths[index.find(name)] for name in (*trunk, right[3])] == [0, 1, 2, 3, 6]
    assert (world.counters.restored_blocks, world.counters.restored_dropped_blocks) == (12, 0)
    assert world.drive.forgotten == []


def test_what_nobody_can_reach_is_dropped_in_the_end() -> None:
    """A block whose parent did not come back; as long as it might, it is kept."""
    world = started()
    names = chain("a", 5)
    restore(world, found(names[:2]) + found(names[3:], 1, above=names[2], depth=3))
    assert world.hits(names) == 2
    assert world.drive_tier().slots_resident == 4
    world.store.restore_done()
    world.step()
    assert world.drive_tier().slots_resident == 2
    assert sorted(world.drive.forgotten) == [(1, 0), (1, 1)]
    assert len(world.index) == 2
    assert world.counters.restored_dropped_blocks == 2


def test_lost_parent_that_a_client_stores_meanwhile_leads_to_its_children() -> None:
    world = started()
    names = chain("a", 4)
    restore(world, found(names)[2:])
    world.write(names[:2])
    assert world.hits(names) == 4
    world.store.restore_done()
    world.step()
    assert world.where(names) == "hhdd"


def test_slots_in_which_nothing_was_found_are_free_in_the_end() -> None:
    """And what is written to them has generations that no old image has."""
    world = started()
    restore(world, found(chain("a", 2)))
    assert world.drive_tier().slots_quarantined == 6
    world.store.restore_done()
    tier = world.drive_tier()
    assert (tier.slots_free, tier.slots_resident, tier.slots_quarantined) == (6, 2, 0)
    world.write(chain("b", 4))
    world.store.persist(1, world.ns, chain("b", 4), world.now)
    [write] = world.step()
    assert min(write.generations) >= FIRST
    world.finish(write)
    world.store.evict(1, world.ns, Scope.BLOCKS, chain("a", 2))
    spaces = world.store.shard(1, world.ns).spaces[NVME]
    assert min(min(slab.generations) for slab in spaces.slabs.values()) >= FIRST


def test_nothing_is_written_before_the_drive_has_told_which_slabs_are_in_use() -> None:
    world = TwoTiers(slabs=1, restored=False)
    world.write(chain("a", 4))
    world.store.plan_writes(world.now)
    world.store.sweep(world.now + 100.0)
    world.store.persist(1, world.ns, chain("a", 4), world.now)
    assert world.step() == []
    world.store.restore_slabs([(0, OURS, OLD)], FIRST)
    world.persist(chain("a", 4))
    assert isinstance(world.drive.slabs[-1], DriveSlabAssigned)
    assert world.drive.slabs[-1].physical == 1


# --- beside clients ------------------------------------------------------------------------------------------------


def test_block_stored_again_before_it_was_found_lies_in_both_tiers() -> None:
    world = started()
    world.write(chain("a", 2))
    restore(world, found(chain("a", 3)))
    assert world.where(chain("a", 3)) == "bbd"
    movement = world.store.stats().movement
    assert movement is not None
    assert movement.dirty_blocks == 0


def test_block_written_to_the_drive_before_it_was_found_is_found_once() -> None:
    world = started()
    world.write(chain("a", 2))
    world.persist(chain("a", 2))
    restore(world, found(chain("a", 3)))
    assert world.where(chain("a", 3)) == "bbd"
    assert world.drive.forgotten == [(0, 0), (0, 1)]
    assert world.counters.restored_dropped_blocks == 2


def test_block_found_while_a_client_stores_it_is_complete_and_not_loaded_over_it() -> None:
    """The client's copy is already on its way to the slot that a load would need."""
    world = started()
    reserved = world.reserve(chain("a", 2))
    restore(world, found(chain("a", 2)))
    assert world.hits(chain("a", 2)) == 2
    assert world.acquire(chain("a", 2)) == (0, [], [])
    assert world.store.prefetch(1, world.ns, chain("a", 2), world.now) == (0, 0)
    assert world.step() == []
    world.commit(reserved)
    assert world.where(chain("a", 2)) == "bb"
    assert world.store.acquire(1, world.ns, chain("a", 2), 30.0, 0.0).ready == 2


def test_block_found_while_a_client_stores_it_outlives_the_client() -> None:
    world = started()
    world.reserve(chain("a", 2))
    restore(world, found(chain("a", 2)))
    world.store.close_session(1)
    world.open_session(2)
    world.open(spec(), 2)
    world.step()
    assert len(world.acquire(chain("a", 2), session=2)[1]) == 2


def test_namespace_found_on_the_drive_is_opened_later_by_its_full_spec() -> None:
    """What is on disk names its geometry, not its salt or layout; the fingerprint says that it is the same."""
    secret = spec("secret", tenant_salt=b"salt", layout="NHD")
    owner = SlabOwner(UID, secret.group_fingerprint(), model="secret")
    world = started((0, owner, OLD))
    restore(world, found(chain("a", 2)))
    assert [n.blocks for n in world.store.stats().namespaces if n.model == "secret"] == [2]
    shard = world.store.open_namespace(1, secret)
    assert shard.group.spec == secret
    assert world.hits(chain("a", 2), ns=shard.ns) == 2


def test_block_of_two_ranks_is_complete_when_both_were_found() -> None:
    pair = [spec("pair", shard_size=2, shard_rank=rank) for rank in range(2)]
    owners = [SlabOwner(UID, pair[0].group_fingerprint(), rank=rank, shard_size=2) for rank in range(2)]
    world = started((0, owners[0], OLD), (1, owners[1], OLD))
    restore(world, found(chain("p", 2)))
    ranks = [world.open(each) for each in pair]
    assert world.hits(chain("p", 2), ns=ranks[0]) == 0
    restore(world, found(chain("p", 2), 1)[::-1])
    assert world.hits(chain("p", 2), ns=ranks[1]) == 2
    assert world.counters.restored_blocks == 2


# --- what cannot be ------------------------------------------------------------------------------------------------


A, B, C = chain("a", 3)


@pytest.mark.parametrize(
    "lie",
    [
        (1, 0, C, b"", 2, OLD),
        (1, 0, C, b"", 1 << 31, OLD),
        (1, 0, C, B, 0, OLD),
        (1, 0, C, B, 7, OLD),
        (1, 0, C, B, 1 << 32, OLD),
        (1, 0, C, C, 1, OLD),
        (1, 0, B, C, 1, OLD),
        (1, 0, B, b"x" * 32, 1, OLD),
        (1, 0, A, b"x" * 32, 3, OLD),
        (1, 0, A, b"", 0, OLD),
        (1, 0, C[:20], B, 2, OLD),
        (1, 0, C, B[:20], 2, OLD),
        (1, 99, C, B, 2, OLD),
    ],
)
def test_block_that_contradicts_what_is_known_is_dropped(lie: FoundBlock) -> None:
    """And nothing is left of it, nor of the parent that it named."""
    world = started()
    restore(world, found([A, B]))
    restore(world, [lie])
    assert world.drive.forgotten == [lie[:2]]
    assert world.counters.restored_dropped_blocks == 1
    assert len(world.index) == 2
    world.store.restore_done()
    assert world.drive_tier().slots_resident == 2
    world.check()


def test_place_told_twice_holds_the_first_block() -> None:
    world = started()
    restore(world, [*found([A]), (0, 0, B, A, 1, OLD)])
    restore(world, [(0, 0, B, A, 1, OLD)])
    assert world.where([A, B]) == "d."
    assert world.drive.forgotten == []


def test_slab_nobody_can_own_is_free() -> None:
    """Sizes that do not fit, a spec that cannot be, a rank of another number of ranks, no such slab."""
    strange = [
        replace(OURS, slot_bytes=8192),
        replace(OURS, group_fingerprint=b"f" * 32, block_bytes=1 << 40, slot_bytes=1 << 40),
        replace(OURS, group_fingerprint=b"g" * 32, hash_bytes=99),
        replace(OURS, rank=1, shard_size=2),
    ]
    world = started(*((physical, owner, OLD) for physical, owner in enumerate(strange)), (77, OURS, OLD))
    world.step()
    assert world.drive.slabs == [DriveSlabRetired(physical) for physical in range(4)]
    assert world.drive_tier().slabs_assigned == 0
    restore(world, found([A]) + found([A], 77))
    assert world.where([A]) == "."
    assert [n.model for n in world.store.stats().namespaces] == ["m"]


def test_smaller_host_slabs_give_up_blocks_that_fit_none_of_them_and_say_so() -> None:
    """All others are found: how a slab of the drive is cut has nothing to do with the host's."""
    large = replace(OURS, group_fingerprint=b"l" * 32, block_bytes=4 * 4096, slot_bytes=4 * 4096)
    slabs = ((0, OURS, OLD), (1, large, OLD), (2, large, OLD))
    before = TwoTiers(slots=4, restored=False)
    before.store.restore_slabs(slabs, FIRST)
    assert before.effects().warnings == []
    after = TwoTiers(slots=2, restored=False, nvme={"slab_bytes": 36864, "capacity_bytes": 8 * 36864})
    after.store.restore_slabs(slabs, FIRST)
    restore(after, found(chain("a", 4)))
    assert after.where(chain("a", 4)) == "dddd"
    after.acquire(chain("a", 4))
    [load] = after.step()
    assert [load.shard.spaces[NVME].place(slot) for slot in load.nvme_slots] == [(0, slot) for slot in range(4)]
    assert after.drive.slabs == [DriveSlabRetired(1), DriveSlabRetired(2)]
    [warning] = after.store.stats().warnings
    assert "2 slabs of the nvme tier were given up" in warning
    assert "host.slab_bytes" in warning


def test_namespace_that_the_drive_knows_otherwise_is_not_opened() -> None:
    """Its slots would be too small for what the client writes."""
    other = spec("other", blocks_of=8192)
    world = started((0, SlabOwner(UID, other.group_fingerprint()), OLD))
    with pytest.raises(LayoutError):
        world.open(other)


# --- limits --------------------------------------------------------------------------------------------------------


def test_restored_namespaces_push_nobody_out() -> None:
    owners = [replace(OURS, group_fingerprint=bytes([n]) * 32) for n in range(4)]
    world = started(*((n, owner, OLD) for n, owner in enumerate(owners)), namespaces_max=3)
    world.step()
    assert world.drive.slabs == [DriveSlabRetired(2), DriveSlabRetired(3)]
    assert world.drive_tier().slabs_assigned == 2


def test_namespace_that_is_still_being_restored_may_make_way() -> None:
    """What is found of it later is nobody's; a slab that was given on is not touched by it."""
    world = started((0, replace(OURS, group_fingerprint=b"f" * 32), OLD), namespaces_max=2)
    restore(world, found(chain("x", 2)))
    other = world.open(spec("other"))
    world.step()
    assert world.drive.slabs == [DriveSlabRetired(0)]
    world.write(chain("b", 1), ns=other)
    world.persist(chain("b", 1), ns=other)
    world.drive.forgotten.clear()
    restore(world, found(chain("x", 4))[2:])
    world.store.restore_done()
    world.step()
    assert world.drive.forgotten == []
    assert world.hits(chain("b", 1), ns=other) == 1


def test_restored_namespace_whose_block_is_under_way_does_not_make_way() -> None:
    world = started((0, OURS, OLD), namespaces_max=1)
    restore(world, found(chain("a", 1)))
    world.store.prefetch(1, world.ns, chain("a", 1), world.now)
    world.store.close_session(1)
    world.open_session(2)
    with pytest.raises(QuotaExceeded):
        world.open(spec("other"), 2)
    world.finish_all(Verdict.CANCELLED)
    world.open(spec("other"), 2)
    world.step()


def test_namespace_cleared_while_it_is_restored_stays_cleared() -> None:
    """What comes later is not taken in, and not left on the drive for the next start either."""
    world = started((0, OURS, OLD))
    restore(world, found(chain("a", 2)))
    world.acquire(chain("a", 1))
    removed = world.store.evict(1, world.ns, Scope.NAMESPACE, [])
    assert (removed.removed, removed.kept) == (1, 1)
    restore(world, found(chain("a", 4))[2:])
    world.store.restore_done()
    world.step()
    assert world.hits(chain("a", 4)) == 1
    assert sorted(world.drive.forgotten) == [(0, 1), (0, 2), (0, 3)]
    assert world.drive_tier().slots_free == 3


def test_store_beside_a_restoration_takes_slabs_that_nobody_had() -> None:
    world = started((0, OURS, OLD), drive_slabs=2)
    assert outcomes(world.write(chain("b", 2))) == [Outcome.WRITE] * 2
    world.persist(chain("b", 2))
    assert [s.physical for s in world.store.shard(1, world.ns).spaces[NVME].slabs.values()] == [0, 1]
    restore(world, found(chain("a", 4)))
    world.store.restore_done()
    assert world.where(chain("a", 4)) == "dddd"
    assert world.where(chain("b", 2)) == "bb"
