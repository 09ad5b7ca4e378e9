"""The rules of the store, one fact each: who sees what, who may take what, and what becomes of it in the end."""

from __future__ import annotations

import pytest

from forebay.kvstore.errors import (
    BadRequest,
    Busy,
    Draining,
    Expired,
    Forbidden,
    LayoutError,
    NotLeased,
    QuotaExceeded,
    UnknownNamespace,
    UnknownSession,
)
from forebay.kvstore.groups import SlabOpened, SlabRetired
from forebay.kvstore.outcome import Outcome, Scope
from forebay.kvstore.store import Durability, Store, StoreConfig
from support.core import UID, TwoTiers, World, chain, numbers, outcomes, spec

WRITE, PRESENT, IN_FLIGHT = Outcome.WRITE, Outcome.PRESENT, Outcome.IN_FLIGHT
FULL, ORPHAN, DRAINING = Outcome.FULL, Outcome.ORPHAN, Outcome.DRAINING


def two_sessions(**config: float) -> World:
    """Sessions 1 and 2 of one user, both with the namespace open."""
    world = World(**config)  # type: ignore[arg-type]
    world.open_session(2)
    world.open(spec(), 2)
    return world


# --- storing and finding -------------------------------------------------------------------------------------------


def test_committed_chain_is_found_and_an_uncommitted_one_is_not() -> None:
    world = two_sessions()
    names = chain("a", 3)
    reserved = world.reserve(names)
    assert outcomes(reserved) == [WRITE] * 3
    assert world.hits(names) == world.hits(names, session=2) == 0
    assert world.acquire(names) == (0, [], [])
    assert world.commit(reserved) == 3
    assert world.hits(names, session=2) == 3
    world.check()


def test_lookup_stops_at_the_first_absent_block() -> None:
    world = World()
    world.write(chain("a", 3))
    assert world.hits([*chain("a", 2), *chain("b", 1), *chain("a", 3)[2:]]) == 2
    assert world.hits([]) == 0


def test_stored_block_is_present_and_takes_no_slot() -> None:
    world = World()
    world.write(chain("a", 2))
    again = world.reserve(chain("a", 2))
    assert (outcomes(again), again.reservation_id, len(again.slots)) == ([PRESENT] * 2, 0, 0)


def test_block_that_another_session_writes_is_in_flight() -> None:
    world = two_sessions()
    world.reserve(chain("a", 2))
    other = world.reserve(chain("a", 3), session=2)
    assert outcomes(other) == [IN_FLIGHT, IN_FLIGHT, WRITE]
    assert len(set(other.slots)) == 1


def test_hash_named_twice_in_a_request_is_written_once() -> None:
    world = World()
    name = chain("a", 1)
    reserved = world.reserve([*name, *name])
    assert outcomes(reserved) == [WRITE, IN_FLIGHT]
    world.commit(reserved)
    world.check()


def test_two_writers_never_hold_the_same_slot() -> None:
    world = two_sessions()
    one, two = world.reserve(chain("a", 4)), world.reserve(chain("b", 4), session=2)
    assert not set(one.slots) & set(two.slots)


def test_failed_block_is_not_published_and_its_slot_is_free() -> None:
    world = World()
    reserved = world.reserve(chain("a", 2))
    assert world.commit(reserved, failed=[1, 1]) == 1
    assert world.hits(chain("a", 2)) == 1
    assert world.tier().slots_resident == 1
    assert world.tier().slots_reserved == 0
    world.check()
    assert outcomes(world.write(chain("a", 2))) == [PRESENT, WRITE]
    assert world.hits(chain("a", 2)) == 2


def test_what_continues_a_failed_block_is_given_back_with_it() -> None:
    """Nobody could find it, and the rows in between would have to be kept for it."""
    world = World()
    assert world.commit(world.reserve(chain("a", 4)), failed=[1]) == 1
    assert world.tier().slots_resident == 1
    assert world.tier().slots_reserved == 0
    world.check()
    assert outcomes(world.write(chain("a", 4))) == [PRESENT, WRITE, WRITE, WRITE]


def test_commit_of_an_index_out_of_range_changes_nothing() -> None:
    world = World()
    reserved = world.reserve(chain("a", 2))
    for bad in ([2], [-1], [0, 99]):
        with pytest.raises(BadRequest):
            world.commit(reserved, failed=bad)
    assert world.commit(reserved) == 2


def test_commit_is_once() -> None:
    world = World()
    reserved = world.reserve(chain("a", 1))
    world.commit(reserved)
    with pytest.raises(NotLeased):
        world.commit(reserved)
    with pytest.raises(NotLeased):
        world.store.abort(1, reserved.reservation_id)


def test_aborted_reservation_leaves_nothing() -> None:
    world = World()
    reserved = world.reserve(chain("a", 3))
    world.store.abort(1, reserved.reservation_id)
    assert world.hits(chain("a", 3)) == 0
    assert world.tier().slots_free == 4
    assert len(world.store.shard(1, world.ns).group.index) == 0
    world.check()


def test_reservation_of_another_session_cannot_be_committed_or_aborted() -> None:
    world = two_sessions()
    reserved = world.reserve(chain("a", 1))
    with pytest.raises(NotLeased):
        world.commit(reserved, session=2)
    with pytest.raises(NotLeased):
        world.store.abort(2, reserved.reservation_id)
    assert world.commit(reserved) == 1


def test_block_whose_parent_is_absent_is_an_orphan() -> None:
    """Nobody could ever find it."""
    world = World()
    reserved = world.reserve(chain("a", 3)[1:], parent=chain("a", 1)[0])
    assert (outcomes(reserved), reserved.reservation_id) == ([ORPHAN, ORPHAN], 0)
    assert world.tier().slabs_assigned == 0
    world.check()


def test_chain_may_be_stored_piece_by_piece_below_its_parent() -> None:
    """An engine stores as it computes; the piece before may still be being written."""
    world = World()
    names = chain("a", 4)
    first = world.reserve(names[:2])
    second = world.reserve(names[2:], parent=names[1])
    assert outcomes(second) == [WRITE, WRITE]
    world.commit(second)
    assert world.hits(names) == 0
    world.commit(first)
    assert world.hits(names) == 4
    world.check()


def test_parent_that_was_removed_makes_an_orphan_though_its_child_is_there() -> None:
    """A tombstone is no block."""
    world = World()
    names = chain("a", 3)
    world.write(names[:2])
    world.store.evict(1, world.ns, Scope.BLOCKS, names[:1])
    assert outcomes(world.reserve(chain("b", 1), parent=names[0])) == [ORPHAN]
    assert outcomes(world.reserve(chain("b", 1), parent=names[1])) == [WRITE]


def test_hole_in_a_chain_can_be_filled_again() -> None:
    world = World()
    names = chain("a", 4)
    world.write(names)
    world.store.evict(1, world.ns, Scope.BLOCKS, names[1:2])
    assert world.hits(names) == 1
    assert outcomes(world.write(names)) == [PRESENT, WRITE, PRESENT, PRESENT]
    assert world.hits(names) == 4


# --- room ----------------------------------------------------------------------------------------------------------


def test_steady_state_is_full_and_every_store_is_answered() -> None:
    """Room is made by need and one block at a time: never under 97 %, nothing dropped without an answer."""
    world = World(slabs=8, slots=16)
    total, unanswered, lowest = 8 * 16, 0, 1.0
    for number in range(400):
        world.now = float(number)
        reserved = world.reserve(chain(f"c{number}", 1 + number % 7))
        unanswered += len(reserved.outcomes) != 1 + number % 7
        assert set(outcomes(reserved)) == {WRITE}
        world.commit(reserved)
        if number > 60:
            lowest = min(lowest, world.tier().slots_resident / total)
    world.check()
    assert unanswered == 0
    assert lowest >= 0.97


def test_victims_are_the_tails_of_the_least_recently_used_chain() -> None:
    world = World(slabs=2)
    world.write(chain("old", 4))
    world.at(1.0)
    world.write(chain("young", 4))
    world.at(2.0)
    world.write(chain("new", 2))
    assert world.hits(chain("old", 4)) == 2
    assert world.hits(chain("young", 4)) == 4


def test_lookup_counts_as_a_use() -> None:
    world = World(slabs=2)
    world.write(chain("old", 4))
    world.write(chain("young", 4))
    world.hits(chain("old", 4))
    world.write(chain("new", 2))
    assert world.hits(chain("old", 4)) == 4


def test_touched_chain_stays_and_a_finished_one_goes_first() -> None:
    world = World(slabs=3)
    for label in "abc":
        world.write(chain(label, 4))
    assert world.store.touch(1, world.ns, chain("a", 4), 1.0) == 4
    assert world.store.done(1, world.ns, chain("c", 9)) == 4
    world.write(chain("d", 4))
    assert [len(world.present(chain(label, 4))) for label in "abc"] == [4, 4, 0]


def test_victim_has_no_present_child() -> None:
    """A parent outlives what continues it, even when only the parent is asked for less."""
    world = World(slabs=1)
    world.write(chain("a", 4))
    for number in range(3):
        world.write(chain(f"b{number}", 1))
        left = len(world.present(chain("a", 4)))
        assert world.hits(chain("a", 4)) == left


def test_leased_block_is_never_a_victim() -> None:
    world = World(slabs=1)
    world.write(chain("a", 4))
    lease, slots, generations = world.acquire(chain("a", 4))
    assert outcomes(world.reserve(chain("b", 3))) == [FULL] * 3
    found = world.store.resolve(1, world.ns, lease)
    assert (numbers(found.slots), numbers(found.generations)) == (slots, generations)
    assert world.hits(chain("a", 4)) == 4


def test_all_leased_or_pinned_or_being_written_is_full_and_every_block_is_answered() -> None:
    world = World(slabs=3, pin_quota=1.0)
    world.write(chain("leased", 4))
    world.acquire(chain("leased", 4))
    world.write(chain("pinned", 4))
    world.store.pin(1, world.ns, chain("pinned", 4))
    world.reserve(chain("writing", 3))
    reserved = world.reserve(chain("new", 5))
    assert outcomes(reserved) == [WRITE, FULL, FULL, FULL, FULL]
    assert len(reserved.slots) == 1
    assert world.store.stats().counters.rejected_full_blocks == 4
    world.check()


def test_store_does_not_evict_the_chain_that_it_continues() -> None:
    """Room for a block is never made of what leads to it."""
    world = World(slabs=1)
    world.write(chain("a", 4))
    assert outcomes(world.reserve(chain("a", 6))) == [PRESENT] * 4 + [FULL] * 2
    assert world.hits(chain("a", 4)) == 4


def test_store_of_one_rank_does_not_evict_the_other_ranks_blocks_of_the_same_request() -> None:
    """Room for the first block is not made of the second, which would never become complete then."""
    world = World(slabs=2, slots=3)
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank)) for rank in range(2)]
    for ns in ranks:
        world.write(chain("leased", 1), ns=ns)
    world.acquire(chain("leased", 1), ns=ranks[0])
    world.write(chain("a", 2), ns=ranks[0])
    world.reserve(chain("writing", 2), ns=ranks[1])
    assert outcomes(world.write(chain("a", 2), ns=ranks[1])) == [FULL, FULL]
    assert outcomes(world.reserve(chain("a", 2), ns=ranks[0])) == [PRESENT, PRESENT]
    world.check()


def test_bumped_generation_is_told_before_the_slot_is_used_again() -> None:
    """A late reader finds another generation than it was given, whatever is in the slot by then."""
    world = World(slabs=1, slots=1)
    world.write(chain("a", 1))
    _, slots, generations = world.acquire(chain("a", 1), ttl_s=1.0)
    world.at(1.0)
    world.effects()
    again = world.reserve(chain("b", 1))
    assert numbers(again.slots) == slots
    assert world.effects().generations == [(world.ns, slots[0], generations[0] + 1)]
    assert numbers(again.generations) == [generations[0] + 1]


def test_slab_without_memory_gives_up_what_was_reserved_on_it() -> None:
    world = World(slabs=2)
    world.write(chain("a", 4))
    reserved = world.reserve(chain("b", 3))
    opened = world.effects().slabs[-1]
    assert isinstance(opened, SlabOpened)
    world.store.slab_failed(opened.ns, opened.slab)
    world.store.slab_failed(opened.ns, opened.slab)
    with pytest.raises(NotLeased):
        world.commit(reserved)
    assert world.effects().slabs == [SlabRetired(opened.ns, opened.slab, opened.physical)]
    assert world.hits(chain("a", 4)) == 4
    world.check()


# --- leases --------------------------------------------------------------------------------------------------------


def test_released_lease_is_over() -> None:
    world = World(slabs=1)
    world.write(chain("a", 2))
    lease, _, _ = world.acquire(chain("a", 2))
    world.store.release(1, lease)
    for event in (world.store.release, lambda s, i: world.store.resolve(s, world.ns, i)):
        with pytest.raises(NotLeased):
            event(1, lease)
    assert world.store.next_deadline() is None


def test_block_stays_while_one_of_its_leases_lasts() -> None:
    world = two_sessions(slabs=1)
    world.write(chain("a", 4))
    first, _, _ = world.acquire(chain("a", 4), ttl_s=5.0)
    world.acquire([*chain("a", 4), *chain("a", 4)], ttl_s=20.0, session=2)
    world.store.release(1, first)
    world.at(19.0)
    assert outcomes(world.reserve(chain("b", 1))) == [FULL]
    world.at(20.0)
    assert outcomes(world.write(chain("b", 1))) == [WRITE]


def test_lease_ends_by_the_clock() -> None:
    world = World()
    world.write(chain("a", 1))
    lease, _, _ = world.acquire(chain("a", 1), ttl_s=5.0)
    assert world.store.next_deadline() == 5.0
    world.at(5.0)
    with pytest.raises(NotLeased):
        world.store.release(1, lease)
    assert world.store.stats().counters.expired_leases == 1
    assert world.store.next_deadline() is None


def test_lease_is_never_longer_than_the_limit() -> None:
    world = World(ttl_max_s=10.0)
    world.write(chain("a", 1))
    world.acquire(chain("a", 1), ttl_s=1e9)
    assert world.store.next_deadline() == 10.0


def test_lease_of_another_session_cannot_be_released() -> None:
    world = two_sessions()
    world.write(chain("a", 1))
    lease, _, _ = world.acquire(chain("a", 1))
    with pytest.raises(NotLeased):
        world.store.release(2, lease)
    with pytest.raises(NotLeased):
        world.store.resolve(2, world.ns, lease)
    world.store.release(1, lease)


def test_guessed_lease_is_not_leased() -> None:
    """An answer that told apart 'another's' and 'none' would help to guess."""
    world = two_sessions()
    world.write(chain("a", 1))
    lease, _, _ = world.acquire(chain("a", 1))
    texts = []
    for guess in (lease, lease + 1, 0, 2**63 - 1):
        with pytest.raises(NotLeased) as refused:
            world.store.release(2, guess)
        texts.append(str(refused.value).replace(str(guess), "N"))
    assert len(set(texts)) == 1


def test_id_that_is_taken_or_nothing_is_not_given() -> None:
    """Zero means none on the wire."""
    ids = iter([0, 5, 5, 0, 6])
    store = Store(StoreConfig(4 * 4096, 4096), lambda: next(ids))
    store.open_session(1, UID)
    ns = store.open_namespace(1, spec()).ns
    store.commit(1, store.reserve(1, ns, b"", chain("a", 1), 0.0).reservation_id, [], 0.0)
    leases = [store.acquire(1, ns, chain("a", 1), 9.0, 0.0).lease_id for _ in range(2)]
    assert leases == [5, 6]


def test_sessions_of_one_client_group_resolve_each_others_leases() -> None:
    """The scheduler takes the lease, each worker finds its own shard's slots by it."""
    world = World()
    world.open_session(2, group=b"engine")
    world.open_session(3, group=b"engine")
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank), 2) for rank in range(2)]
    for ns in ranks:
        world.write(chain("a", 2), ns=ns, session=2)
    world.open(spec("pair", shard_size=2, shard_rank=1), 3)
    lease, slots, _ = world.acquire(chain("a", 2), ns=ranks[0], session=2)
    assert len(slots) == 2
    found = world.store.resolve(3, ranks[1], lease)
    group = world.store.shard(3, ranks[1]).group
    assert numbers(found.slots) == group.index.slots(group.index.walk(chain("a", 2)), 0, 1).tolist()
    with pytest.raises(NotLeased):
        world.store.release(3, lease)


def test_client_group_of_another_user_is_another_group() -> None:
    world = World()
    world.open_session(2, uid=1, group=b"engine")
    world.open_session(3, uid=2, group=b"engine")
    ns = world.open(spec(), 2)
    world.write(chain("a", 1), ns=ns, session=2)
    lease, _, _ = world.acquire(chain("a", 1), ns=ns, session=2)
    with pytest.raises(NotLeased):
        world.store.resolve(3, world.open(spec(), 3), lease)


@pytest.mark.parametrize("width", [1, 2, 8, 16, 32])
def test_nobody_joins_a_session_that_named_no_group(width: int) -> None:
    """Its own group is wider than any that a client may name."""
    world = World()
    world.write(chain("a", 1))
    lease, _, _ = world.acquire(chain("a", 1))
    world.open_session(2, group=(1).to_bytes(width, "little"))
    world.open(spec(), 2)
    with pytest.raises(NotLeased):
        world.store.resolve(2, world.ns, lease)


def test_lease_is_not_resolved_in_another_namespace() -> None:
    world = World()
    world.write(chain("a", 1))
    lease, _, _ = world.acquire(chain("a", 1))
    with pytest.raises(NotLeased):
        world.store.resolve(1, world.open(spec("other")), lease)


# --- late and dead writers -----------------------------------------------------------------------------------------


def test_key_of_an_expired_reservation_can_be_stored_by_another_session() -> None:
    """The late writer's slots stay its own until it is done."""
    world = two_sessions(reservation_ttl_s=60.0)
    late = world.reserve(chain("a", 2))
    world.at(60.0)
    assert world.tier().slots_quarantined == 2
    assert world.hits(chain("a", 2)) == 0
    other = world.reserve(chain("a", 2), session=2)
    assert outcomes(other) == [WRITE, WRITE]
    assert not set(other.slots) & set(late.slots)
    world.commit(other, session=2)
    with pytest.raises(Expired):
        world.commit(late)
    assert world.tier().slots_quarantined == 0
    assert world.hits(chain("a", 2)) == 2
    with pytest.raises(NotLeased):
        world.commit(late)
    world.check()


@pytest.mark.parametrize("end", ["abort", "die"])
def test_quarantined_slots_come_back_when_their_writer_is_done(end: str) -> None:
    world = two_sessions(slabs=1)
    late = world.reserve(chain("a", 4))
    world.at(60.0)
    assert outcomes(world.reserve(chain("b", 4), session=2)) == [FULL] * 4
    world.effects()
    if end == "abort":
        world.store.abort(1, late.reservation_id)
    else:
        world.store.close_session(1)
    assert len(world.effects().generations) == 4
    again = world.reserve(chain("b", 4), session=2)
    assert sorted(again.slots) == sorted(late.slots)
    assert set(again.generations) == {2}
    world.check()


def test_expired_reservation_does_not_keep_a_shutdown_waiting() -> None:
    world = World()
    world.reserve(chain("a", 2))
    assert world.store.in_use == 1
    world.at(60.0)
    assert world.store.in_use == 0


def test_dead_session_leaves_no_lease_no_reservation_and_no_half_written_block() -> None:
    world = two_sessions()
    world.write(chain("a", 2))
    world.acquire(chain("a", 2))
    world.reserve(chain("b", 3))
    world.store.close_session(1)
    stats = world.store.stats()
    assert (stats.leases, stats.reservations, stats.sessions) == (0, 0, 1)
    assert world.tier().slots_reserved == 0
    assert world.hits(chain("a", 2), session=2) == 2
    assert outcomes(world.reserve(chain("b", 3), session=2)) == [WRITE] * 3
    with pytest.raises(UnknownSession):
        world.hits(chain("a", 2))


def test_stored_blocks_outlive_their_session() -> None:
    world = two_sessions()
    world.write(chain("a", 2))
    world.store.close_session(1)
    assert world.hits(chain("a", 2), session=2) == 2


# --- namespaces and sessions ---------------------------------------------------------------------------------------


def test_same_spec_is_the_same_namespace_for_one_user_only() -> None:
    world = two_sessions()
    world.open_session(3, uid=UID + 1)
    mine, theirs = world.open(spec(), 2), world.open(spec(), 3)
    assert mine == world.ns != theirs
    world.write(chain("a", 2))
    assert world.hits(chain("a", 2), ns=theirs, session=3) == 0


def test_namespace_that_was_not_opened_cannot_be_named() -> None:
    world = World()
    world.open_session(2)
    world.write(chain("a", 1))
    for event in (
        lambda: world.hits(chain("a", 1), session=2),
        lambda: world.store.slab(2, world.ns, 0),
        lambda: world.store.shard(2, 99),
        lambda: world.reserve(chain("a", 1), session=2),
        lambda: world.store.evict(2, world.ns, Scope.NAMESPACE, []),
    ):
        with pytest.raises(UnknownNamespace):
            event()


def test_slab_of_a_namespace_can_be_mapped_by_its_sessions_only() -> None:
    world = World()
    world.write(chain("a", 1))
    shard, slab = world.store.slab(1, world.ns, 0)
    assert (shard.ns, slab.serial) == (world.ns, 0)
    with pytest.raises(UnknownNamespace):
        world.store.slab(1, world.ns, 1)
    assert world.store.sessions_of(world.ns) == [1]


def test_replicated_ranks_share_one_copy() -> None:
    world = World()
    ranks = [world.open(spec("mla", shard_size=4, shard_rank=r, shard_kind="replicated")) for r in range(4)]
    assert len(set(ranks)) == 1
    world.write(chain("a", 2), ns=ranks[0])
    assert world.hits(chain("a", 2), ns=ranks[3]) == 2


def test_block_is_a_miss_until_every_rank_has_stored_it() -> None:
    world = World()
    ranks = [world.open(spec("tp", shard_size=2, shard_rank=rank)) for rank in range(2)]
    names = chain("a", 3)
    world.write(names, ns=ranks[1])
    assert world.hits(names, ns=ranks[0]) == world.hits(names, ns=ranks[1]) == 0
    assert outcomes(world.write(names, ns=ranks[1])) == [PRESENT] * 3
    assert outcomes(world.write(names[:2], ns=ranks[0])) == [WRITE] * 2
    assert world.hits(names, ns=ranks[0]) == world.hits(names, ns=ranks[1]) == 2


def test_namespaces_are_bounded() -> None:
    world = World(namespaces_max=2)
    world.open(spec("two"))
    with pytest.raises(QuotaExceeded):
        world.open(spec("three"))
    assert world.open(spec("two")) == 2


def test_namespace_that_nobody_has_open_makes_way_for_a_new_one() -> None:
    """The one that has gone longest unused, with its blocks; its handle is never used again."""
    world = World(namespaces_max=3)
    for number, name in enumerate(("old", "young"), start=2):
        world.open_session(number)
        world.now = float(number)
        ns = world.open(spec(name), number)
        world.write(chain(name, 2), ns=ns, session=number)
        world.store.close_session(number)
    assert world.open(spec("new")) == 4
    names = {stats.model for stats in world.store.stats().namespaces}
    assert names == {"m", "young", "new"}
    assert world.tier().slots_resident == 2
    world.check()
    assert world.hits(chain("young", 2), ns=world.open(spec("young"))) == 2
    with pytest.raises(QuotaExceeded):
        world.open(spec("old"))


def test_namespace_with_a_pin_does_not_make_way() -> None:
    world = World(namespaces_max=2)
    world.open_session(2)
    ns = world.open(spec("pinned"), 2)
    world.write(chain("a", 1), ns=ns, session=2)
    world.store.pin(2, ns, chain("a", 1))
    world.store.close_session(2)
    with pytest.raises(QuotaExceeded):
        world.open(spec("new"))
    world.check()


def test_block_that_fits_no_slab_makes_no_namespace() -> None:
    world = World()
    with pytest.raises(LayoutError):
        world.open(spec("big", blocks_of=5 * 4096))
    assert len(world.store.stats().namespaces) == 1
    world.check()


def test_block_that_fits_host_memory_alone_is_kept_there_and_never_written() -> None:
    """The operator is told once, in words that name the setting; nothing of it is counted as unwritten."""
    nvme_slab_bytes = 3 * 4096  # its header, a slot's header, and a block of one page
    small = TwoTiers(slots=4, nvme={"slab_bytes": nvme_slab_bytes, "capacity_bytes": 8 * nvme_slab_bytes})
    assert small.effects().warnings == []
    ns = small.open(spec("big", blocks_of=2 * 4096))
    [warning] = small.effects().warnings
    assert "memory alone" in warning
    assert "nvme.slab_bytes" in warning
    assert outcomes(small.write(chain("x", 2), ns=ns)) == [Outcome.WRITE] * 2
    assert small.store.persist(1, ns, chain("x", 2), small.now) == Durability(0, 0)
    for start in range(10):
        small.write(chain(f"more {start}", 2), ns=ns)
        small.store.plan_writes(small.now)
    small.at(100.0)
    small.store.sweep(small.now)
    assert small.hits(chain("more 9", 2), ns=ns) == 2
    assert small.store.prefetch(1, ns, chain("more 9", 2), small.now) == (2, 0)
    small.store.drain()
    assert not small.store.flush(small.now)
    assert small.step() == []
    assert small.counters.evicted_blocks > 0
    assert small.counters.evicted_unwritten_blocks == 0
    reasons = {each.model: each.memory_only for each in small.store.stats().namespaces}
    assert not reasons["m"]
    assert reasons["big"] in warning
    small.open(spec("big", blocks_of=2 * 4096))
    assert small.effects().warnings == []


def test_spec_out_of_bounds_makes_no_namespace() -> None:
    world = World()
    with pytest.raises(BadRequest):
        world.open(spec("bad", shard_rank=1))
    assert len(world.store.stats().namespaces) == 1


def test_namespace_is_found_by_the_beginning_of_its_fingerprint() -> None:
    """By operators: a fingerprint is public, so it must not open what the spec's salt keeps apart."""
    world = World()
    world.open_session(2)
    world.open_session(4, uid=0, operator=True)
    prefix = spec().group_fingerprint()[:4]
    assert world.store.find_namespace(4, prefix).ns == world.ns
    with pytest.raises(Forbidden):
        world.store.find_namespace(2, prefix)
    with pytest.raises(UnknownNamespace):
        world.store.find_namespace(4, prefix, rank=1)
    world.open(spec("other"), 2)
    with pytest.raises(BadRequest):
        world.store.find_namespace(4, b"")


def test_sessions_are_bounded() -> None:
    world = World(sessions_max=2)
    world.open_session(2)
    with pytest.raises(Busy):
        world.open_session(3)
    world.store.close_session(2)
    world.open_session(3)


def test_leases_and_reservations_are_bounded() -> None:
    world = World(slabs=8, leases_max=2, reservations_max=2)
    world.write(chain("a", 1))
    for _ in range(2):
        world.acquire(chain("a", 1))
    with pytest.raises(Busy):
        world.acquire(chain("a", 1))
    for label in "xy":
        world.reserve(chain(label, 1))
    with pytest.raises(Busy):
        world.reserve(chain("z", 1))
    world.check()
    world.at(1000.0)
    assert world.acquire(chain("a", 1))[0]
    with pytest.raises(Busy):
        world.reserve(chain("z", 1))


# --- pins ----------------------------------------------------------------------------------------------------------


def test_pinned_blocks_survive_until_unpinned() -> None:
    world = World(slabs=1, pin_quota=1.0)
    world.write(chain("a", 2))
    assert world.store.pin(1, world.ns, chain("a", 5)) == 2
    assert world.store.pin(1, world.ns, chain("a", 2)) == 2
    for number in range(5):
        world.write(chain(f"b{number}", 3))
    assert world.hits(chain("a", 2)) == 2
    assert world.store.unpin(1, world.ns, [*chain("a", 2), *chain("a", 2), *chain("z", 1)]) == 2
    assert world.store.unpin(1, world.ns, chain("a", 2)) == 0
    world.write(chain("c", 4))
    assert world.hits(chain("a", 2)) == 0


def test_pins_beyond_the_quota_are_refused_whole() -> None:
    world = World(slabs=4, pin_quota=0.25)
    world.write(chain("a", 5))
    with pytest.raises(QuotaExceeded):
        world.store.pin(1, world.ns, chain("a", 5))
    assert world.store.stats().pinned_blocks == 0
    assert world.store.pin(1, world.ns, chain("a", 4)) == 4
    with pytest.raises(QuotaExceeded):
        world.store.pin(1, world.ns, chain("a", 5))


def test_quota_is_of_the_tier_and_not_of_each_namespace() -> None:
    """Or a client with four salts would pin everything."""
    world = World(slabs=4, pin_quota=0.25)
    other = world.open(spec(tenant_salt=b"other"))
    world.write(chain("a", 4))
    world.write(chain("a", 4), ns=other)
    assert world.store.pin(1, world.ns, chain("a", 4)) == 4
    with pytest.raises(QuotaExceeded):
        world.store.pin(1, other, chain("a", 1))


def test_hash_named_twice_is_pinned_once() -> None:
    world = World(slabs=4, pin_quota=0.25)
    world.write(chain("a", 3))
    assert world.store.pin(1, world.ns, [*chain("a", 3), *chain("a", 3)]) == 6
    assert world.store.stats().pinned_blocks == 3


def test_pin_of_several_shards_counts_all_of_them() -> None:
    world = World(slabs=4, pin_quota=0.25)
    ranks = [world.open(spec("tp", shard_size=2, shard_rank=rank)) for rank in range(2)]
    for ns in ranks:
        world.write(chain("a", 3), ns=ns)
    with pytest.raises(QuotaExceeded):
        world.store.pin(1, ranks[0], chain("a", 3))
    assert world.store.pin(1, ranks[0], chain("a", 2)) == 2


# --- removal on request --------------------------------------------------------------------------------------------


def test_evicting_blocks_takes_those_and_no_others() -> None:
    world = World()
    world.write(chain("a", 4))
    done = world.store.evict(1, world.ns, Scope.BLOCKS, [*chain("a", 3)[1:], *chain("z", 1)])
    assert (done.removed, done.kept) == (2, 0)
    assert world.present(chain("a", 4)) == [chain("a", 4)[0], chain("a", 4)[3]]
    world.check()


def test_evicting_a_prefix_takes_all_that_continues_it() -> None:
    world = World()
    trunk, branch = chain("a", 3), chain("b", 2)
    world.write(trunk)
    world.write([*trunk[:2], *branch])
    world.write(chain("other", 1))
    done = world.store.evict(1, world.ns, Scope.PREFIX, trunk[1:2])
    assert (done.removed, done.kept) == (4, 0)
    assert world.hits(trunk) == 1
    assert world.hits(chain("other", 1)) == 1
    world.check()


@pytest.mark.parametrize("scope", [Scope.PREFIX, Scope.NAMESPACE])
def test_leased_pinned_and_written_blocks_are_kept_and_so_is_what_leads_to_them(scope: Scope) -> None:
    world = World(slabs=8, pin_quota=1.0)
    trunk = chain("a", 2)
    leased, pinned, written, free = ([*trunk, *chain(label, 2)] for label in "lpwf")
    for names in (leased, pinned, written[:3], free):
        world.write(names)
    world.store.acquire(1, world.ns, leased[3:], 30.0, 0.0)
    world.store.pin(1, world.ns, pinned[3:])
    world.reserve(written)
    done = world.store.evict(1, world.ns, scope, trunk[:1])
    assert (done.removed, done.kept) == (2, 8)
    assert world.hits(leased) == world.hits(pinned) == 4
    assert world.hits(written) == 3
    assert world.hits(free) == 2
    world.check()


@pytest.mark.parametrize("scope", Scope)
def test_dry_run_counts_and_changes_nothing(scope: Scope) -> None:
    world = World(pin_quota=1.0)
    world.write(chain("a", 4))
    world.store.pin(1, world.ns, chain("a", 1))
    world.effects()
    told = world.store.evict(1, world.ns, scope, chain("a", 2), dry_run=True)
    assert world.hits(chain("a", 4)) == 4
    assert world.effects().generations == []
    assert world.store.stats().counters.removed_blocks == 0
    assert world.store.evict(1, world.ns, scope, chain("a", 2)) == told


def test_only_an_operator_clears_all_namespaces() -> None:
    world = World()
    world.open_session(2, uid=UID + 1)
    world.open_session(3, uid=0, operator=True)
    other = world.open(spec(), 2)
    world.write(chain("a", 2))
    world.write(chain("b", 2), ns=other, session=2)
    with pytest.raises(Forbidden):
        world.store.clear(1)
    assert world.store.clear(3, dry_run=True).removed == 4
    assert world.hits(chain("a", 2)) == 2
    assert world.store.clear(3).removed == 4
    assert world.tier().slabs_assigned == 0
    world.check()


# --- shutdown ------------------------------------------------------------------------------------------------------


def test_draining_store_takes_no_new_work_and_lets_old_work_finish() -> None:
    world = World()
    world.write(chain("a", 2))
    lease, _, _ = world.acquire(chain("a", 1))
    begun = world.reserve(chain("b", 1))
    world.store.drain()
    assert outcomes(world.reserve(chain("a", 3))) == [PRESENT, PRESENT, DRAINING]
    with pytest.raises(Draining):
        world.acquire(chain("a", 2))
    assert world.hits(chain("a", 2)) == 2
    assert world.store.in_use == 2
    world.store.release(1, lease)
    assert world.commit(begun) == 1
    assert world.store.in_use == 0


# --- check ---------------------------------------------------------------------------------------------------------


def test_check_names_what_is_wrong() -> None:
    """A check that cannot fail guards nothing."""
    world = World()
    world.write(chain("a", 2))
    slab = world.store.slab(1, world.ns, 0)[1]
    slab.physical = 2
    world.store.tiers[0]._free[9] = None
    assert world.store.check()


def test_tier_smaller_than_a_slab_answers_full() -> None:
    store = Store(StoreConfig(4096, 8192), lambda: 1)
    store.open_session(1, UID)
    ns = store.open_namespace(1, spec()).ns
    assert outcomes(store.reserve(1, ns, b"", chain("a", 2), 0.0)) == [FULL, FULL]
    assert store.check() == []
