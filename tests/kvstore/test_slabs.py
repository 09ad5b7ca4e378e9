"""Slabs and slots: arithmetic, four states, generations that only grow."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.slabs import FREE, QUARANTINED, RESERVED, RESIDENT, ShardSlots, SlabFormat, TierSpace

SLAB_BYTES = 4 * 4096


def shard(slabs: int = 1, block_bytes: int = 4096) -> ShardSlots:
    slots = ShardSlots(SlabFormat(SLAB_BYTES), block_bytes)
    for physical in range(slabs):
        slots.add_slab(physical)
    return slots


def counts(slots: ShardSlots) -> list[int]:
    return [slots.count(state) for state in (FREE, RESERVED, QUARANTINED, RESIDENT)]


def test_tier_holds_whole_slabs_only() -> None:
    """A remainder of the capacity is never promised."""
    tier = TierSpace("host", 10_000, SlabFormat(4096))
    assert (tier.slabs_total, tier.capacity_bytes, tier.slabs_free) == (2, 8192, 2)


def test_physical_slabs_are_taken_lowest_first_and_run_out() -> None:
    tier = TierSpace("host", 3 * 4096, SlabFormat(4096))
    assert [tier.take() for _ in range(4)] == [0, 1, 2, None]
    tier.give_back(1)
    assert tier.take() == 1


@pytest.mark.parametrize(
    ("block_bytes", "slot_bytes", "slots"), [(1, 4096, 4), (4096, 4096, 4), (4097, 8192, 2), (16_384, 16_384, 1)]
)
def test_slot_is_the_block_rounded_up_to_a_page(block_bytes: int, slot_bytes: int, slots: int) -> None:
    found = ShardSlots(SlabFormat(SLAB_BYTES), block_bytes)
    assert (found.slot_bytes, found.slots_per_slab) == (slot_bytes, slots)


def test_block_larger_than_a_slab_has_no_slot() -> None:
    assert ShardSlots(SlabFormat(SLAB_BYTES), SLAB_BYTES + 1).slots_per_slab == 0


def test_slot_id_is_serial_times_slots_and_slot() -> None:
    """Clients turn it back into a slab and an offset."""
    slots = shard(2)
    assert [slots.reserve(0)[0] for _ in range(8)] == [4, 5, 6, 7, 0, 1, 2, 3]


def test_slot_is_in_exactly_one_state_all_along() -> None:
    slots = shard()
    slot, generation = slots.reserve(7)
    assert (generation, counts(slots)) == (1, [3, 1, 0, 0])
    slots.publish(slot)
    assert counts(slots) == [3, 0, 0, 1]
    assert slots.free(slot) == 2
    assert counts(slots) == [4, 0, 0, 0]
    assert list(slots.check()) == []


def test_quarantined_slot_is_not_given_out() -> None:
    """Its writer may only be stopped, with a copy in flight."""
    slots = shard()
    late, _ = slots.reserve(7)
    slots.quarantine(late)
    assert late not in [slots.reserve(row)[0] for row in range(3)]
    assert not slots.has_free()
    assert slots.free(late) == 2
    assert slots.reserve(9) == (late, 2)


def test_generation_is_bumped_before_the_slot_is_given_again() -> None:
    """Whoever read the old generation must see another one afterwards."""
    slots = shard()
    seen: dict[int, int] = {}
    for row in range(20):
        slot, generation = slots.reserve(row)
        assert generation > seen.get(slot, 0)
        seen[slot] = generation
        if row % 2:
            slots.publish(slot)
        slots.free(slot)
        assert slots.generation(slot) > generation


def test_serial_of_a_slab_is_never_used_again() -> None:
    """A client that still maps a slab that was taken back must never mistake it for a newer one."""
    slots = shard(2)
    slots.drop_slabs([slots.slabs[0], slots.slabs[1]])
    assert slots.slots_total == 0
    assert not slots.has_free()
    assert slots.add_slab(0).serial == 2
    assert [slots.reserve(0)[0] for _ in range(4)] == [8, 9, 10, 11]
    assert list(slots.check()) == []


def test_dropping_slabs_takes_only_their_slots_from_the_free_list() -> None:
    slots = shard(3)
    kept = slots.reserve(1)[0]
    assert kept // 4 == 2
    slots.drop_slabs([slots.slabs[0]])
    assert {slots.reserve(0)[0] // 4 for _ in range(7)} == {1, 2}
    assert not slots.has_free()


def test_slab_in_use_is_not_dropped() -> None:
    """Only a bug can ask for it."""
    slots = shard()
    slots.reserve(1)
    with pytest.raises(AssertionError):
        slots.drop_slabs([slots.slabs[0]])


def test_only_a_reserved_slot_is_published() -> None:
    slots = shard()
    slot, _ = slots.reserve(1)
    slots.publish(slot)
    with pytest.raises(AssertionError):
        slots.publish(slot)
    slots.free(slot)
    with pytest.raises(AssertionError):
        slots.quarantine(slot)


def test_slots_of_an_adopted_slab_never_get_a_generation_of_an_earlier_life() -> None:
    """The block that was found keeps its own; what is written after it, or into the other slots, has a newer one."""
    slots = shard()
    slab = slots.adopt_slab(7, 100)
    slots.adopt([(slab, 0, 3)], [5])
    found = slab.serial * 4
    assert slots.generation(found) == 3
    slots.settle(slab)
    assert slots.free(found) == 100
    assert min(slab.generations) >= 100
    assert slots.free(slots.reserve(1)[0]) == 101


def test_check_names_what_is_wrong() -> None:
    """A check that cannot fail guards nothing."""
    slots = shard()
    slot, _ = slots.reserve(1)
    slots.slabs[0].states[slot] = FREE
    assert len(list(slots.check())) >= 1
    slots = shard()
    slots._free.append(slots._free[0])
    assert len(list(slots.check())) >= 1


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from(("reserve", "publish", "quarantine", "free", "add", "drop")), st.integers(0)))
)
def test_slots_agree_with_a_dictionary(events: list[tuple[str, int]]) -> None:
    """States partition the slots whatever happens."""
    slots, model, physical = shard(), dict[int, int](), 1
    for what, choice in events:
        pick = sorted(model)[choice % len(model)] if model else None
        if what == "reserve" and slots.has_free():
            slot, _ = slots.reserve(1)
            assert slot not in model
            model[slot] = RESERVED
        elif what in ("publish", "quarantine") and pick is not None and model[pick] == RESERVED:
            (slots.publish if what == "publish" else slots.quarantine)(pick)
            model[pick] = RESIDENT if what == "publish" else QUARANTINED
        elif what == "free" and pick is not None:
            slots.free(pick)
            del model[pick]
        elif what == "add":
            slots.add_slab(physical)
            physical += 1
        elif what == "drop":
            slots.drop_slabs([slab for slab in slots.slabs.values() if slots.is_empty(slab)])
        assert list(slots.check()) == []
        assert counts(slots)[1:] == [list(model.values()).count(s) for s in (RESERVED, QUARANTINED, RESIDENT)]
        assert slots.count(FREE) == slots.slots_total - len(model)


def test_very_slab_is_claimed_once() -> None:
    tier = TierSpace("nvme", 4 * 4096, SlabFormat(4096))
    assert (tier.claim(2), tier.claim(2), tier.claim(9)) == (True, False, False)
    assert [tier.take() for _ in range(4)] == [0, 1, 3, None]
    tier.give_back(2)
    assert tier.claim(2)


def test_slab_given_back_raises_the_first_generation_of_the_next() -> None:
    tier = TierSpace("nvme", 4 * 4096, SlabFormat(4096))
    tier.first_generation = 50
    tier.give_back(0, 40)
    assert tier.first_generation == 50
    tier.give_back(1, 60)
    assert tier.first_generation == 60


def test_headers_take_their_room() -> None:
    assert SlabFormat(10 * 4096, 4096, 4096).slots_per_slab(4096) == 4


def test_adopted_slab_gives_no_slot_until_it_is_settled() -> None:
    slots = shard(0)
    slab = slots.adopt_slab(3, 100)
    assert counts(slots) == [0, 0, 4, 0]
    assert not slots.has_free()
    slots.adopt([(slab, 1, 9), (slab, 2, 9)], [5, -1])
    assert counts(slots) == [0, 0, 3, 1]
    assert (slab.rows[1], slots.place(1)) == (5, (3, 1))
    assert list(slots.quarantined()) == [0, 2, 3]
    slots.settle(slab)
    assert counts(slots) == [3, 0, 0, 1]
    assert [slots.reserve(1)[0] for _ in range(3)] == [0, 2, 3]
    assert list(slots.check()) == []


def test_block_that_could_not_be_read_leaves_its_slot_quarantined() -> None:
    slots = shard()
    slot, _ = slots.reserve(1)
    slots.publish(slot)
    slots.quarantine(slot)
    assert counts(slots) == [3, 0, 1, 0]
    assert list(slots.quarantined()) == [slot]
    slots.free(slot)
    assert counts(slots) == [4, 0, 0, 0]


def test_checksum_is_kept_until_its_slot_is_freed() -> None:
    slots = ShardSlots(SlabFormat(SLAB_BYTES, checksums=True), 4096)
    slots.add_slab(0)
    slot, _ = slots.reserve(1)
    assert not slots.knows_checksums
    slots.keep_checksum(slot, 0)
    assert not slots.knows_checksums
    slots.keep_checksum(slot, 5)
    assert (slots.checksum(slot), slots.knows_checksums) == (5, True)
    slots.free(slot)
    assert slots.checksum(slot) == 0
