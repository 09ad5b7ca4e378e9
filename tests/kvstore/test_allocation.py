"""Slabs follow demand: to those who need them, from those who do not, never from under a reader or a writer."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from forebay.kvstore.groups import NVME, DriveSlabAssigned, DriveSlabRetired, SlabOpened, SlabRetired
from forebay.kvstore.outcome import Outcome, Scope
from support.core import TwoTiers, World, chain, outcomes, spec


def slabs(world: World, ns: int) -> int:
    return len(world.store.shard(1, ns).slots.slabs)


def all_written(world: World, ns: int, label: str, length: int) -> bool:
    return set(outcomes(world.write(chain(label, length), ns=ns))) == {Outcome.WRITE}


def test_slabs_are_assigned_when_they_are_needed() -> None:
    """An open namespace costs nothing."""
    world = World(slabs=4)
    assert world.tier().slabs_assigned == 0
    world.write(chain("a", 1))
    assert world.tier().slabs_assigned == 1
    assert world.effects().slabs == [SlabOpened(world.ns, 0, 0, 4)]
    world.write(chain("b", 4))
    assert world.tier().slabs_assigned == 2


def test_new_namespace_gets_a_slab_of_a_full_tier() -> None:
    """At once, not after the others have become cold."""
    world = World(slabs=4)
    world.write(chain("a", 16))
    world.effects()
    other = world.open(spec("other"))
    assert all_written(world, other, "b", 1)
    assert (slabs(world, world.ns), slabs(world, other)) == (3, 1)
    retired, opened = world.effects().slabs
    assert isinstance(retired, SlabRetired)
    assert isinstance(opened, SlabOpened)
    assert retired.physical == opened.physical


def test_new_namespace_is_served_though_the_coldest_one_is_pinned() -> None:
    """A pinned system prompt of one tenant must not lock another out while a third has room to give."""
    world = World(slabs=4, pin_quota=1.0)
    world.write(chain("a", 8))
    world.store.pin(1, world.ns, chain("a", 8))
    world.at(1.0)
    warm, new = world.open(spec("warm")), world.open(spec("new"))
    assert all_written(world, warm, "b", 8)
    world.at(2.0)
    assert all_written(world, new, "c", 1)
    assert slabs(world, world.ns) == 2


def test_new_namespace_is_served_though_most_slabs_hold_a_pin() -> None:
    """Every slab is tried before anybody is told that nothing could go."""
    world = World(slabs=12, pin_quota=1.0)
    for number in range(12):
        world.write(chain(f"a{number}", 4))
    for number in range(11):
        world.store.pin(1, world.ns, chain(f"a{number}", 1))
    new = world.open(spec("new"))
    assert all_written(world, new, "b", 1)


def test_idle_namespace_gives_its_slabs() -> None:
    """Long idle, it gives them one by one to a namespace that is asked for."""
    world = World(slabs=4, slab_idle_s=60.0)
    busy = world.open(spec("busy"))
    world.write(chain("a", 8))
    for second in range(90):
        world.at(float(second))
        world.write(chain(f"b{second}", 4), ns=busy)
    assert slabs(world, busy) == 4
    assert slabs(world, world.ns) == 0
    assert world.present(chain("a", 8)) == []


def test_two_active_namespaces_do_not_thrash() -> None:
    """Slabs that went to and fro would empty both; each evicts its own instead."""
    world = World(slabs=4, slab_idle_s=60.0)
    other = world.open(spec("other"))
    world.write(chain("a", 8))
    world.write(chain("b", 8), ns=other)
    world.effects()
    for second in range(300):
        world.at(second * 0.5)
        assert all_written(world, world.ns, f"a{second}", 4)
        assert all_written(world, other, f"b{second}", 4)
    assert world.effects().slabs == []
    assert (slabs(world, world.ns), slabs(world, other)) == (2, 2)
    assert world.tier().slots_resident == 16


def test_empty_slab_is_taken_before_a_block_is_evicted() -> None:
    """Whoever emptied it, a slab that holds nothing costs nobody a block."""
    world = World(slabs=4)
    other = world.open(spec("other"))
    world.write(chain("a", 4))
    world.write(chain("c", 4))
    world.write(chain("b", 8), ns=other)
    world.store.evict(1, world.ns, Scope.BLOCKS, chain("c", 4))
    assert all_written(world, other, "d", 4)
    assert len(world.present(chain("b", 8), ns=other)) == 8
    assert len(world.present(chain("a", 4))) == 4


def hold_by_lease(world: World) -> None:
    world.acquire(chain("a", 4))


def hold_by_pin(world: World) -> None:
    world.store.pin(1, world.ns, chain("a", 4))


def hold_by_reservation(world: World) -> None:
    world.store.evict(1, world.ns, Scope.BLOCKS, chain("a", 4)[3:])
    world.reserve(chain("a", 4))


def hold_by_quarantine(world: World) -> None:
    hold_by_reservation(world)
    world.at(60.0)


@pytest.mark.parametrize("hold", [hold_by_lease, hold_by_pin, hold_by_reservation, hold_by_quarantine])
def test_slab_in_use_is_never_taken(hold: Callable[[World], None]) -> None:
    """A lease, a pin, a writer or a late writer keeps the whole slab, however long it is idle."""
    world = World(slabs=1, pin_quota=1.0, slab_idle_s=1.0, reservation_ttl_s=60.0)
    world.write(chain("a", 4))
    hold(world)
    world.effects()
    other = world.open(spec("other"))
    world.now += 5.0
    assert outcomes(world.write(chain("b", 1), ns=other)) == [Outcome.FULL]
    assert world.effects().slabs == []
    assert slabs(world, world.ns) == 1


@pytest.mark.parametrize("hold", ["lease", "pin", "write"])
def test_slab_whose_chain_is_in_use_further_down_is_never_taken(hold: str) -> None:
    """Its blocks lead to one in another slab: without them that one could not be found."""
    world = World(slabs=2, pin_quota=1.0)
    names = chain("a", 6)
    world.write(names[:5])
    if hold == "lease":
        world.store.acquire(1, world.ns, names[4:5], 30.0, 0.0)
    elif hold == "pin":
        world.store.pin(1, world.ns, names[4:5])
    else:
        world.reserve(names[5:], parent=names[4])
    other = world.open(spec("other"))
    assert outcomes(world.write(chain("b", 1), ns=other)) == [Outcome.FULL]
    assert world.present(names[:5]) == names[:5]


def test_taken_slab_loses_its_blocks_and_what_continues_them_only() -> None:
    world = World(slabs=2)
    world.write(chain("a", 4))
    world.at(1.0)
    world.write(chain("b", 4))
    other = world.open(spec("other"))
    assert all_written(world, other, "c", 1)
    assert len(world.present(chain("a", 4))) + len(world.present(chain("b", 4))) == 4
    assert world.hits(chain("a", 4)) in (0, 4)


def test_doomed_slab_of_one_long_chain_takes_one_walk() -> None:
    """The chain may lie in its slab tail first; walking below each block would be quadratic."""
    length = 2000
    world = World(slabs=1, slots=length)
    world.write(chain("a", length))
    world.write(chain("b", length))
    visits = 0
    index = world.store.shard(1, world.ns).group.index
    real = index.children

    def counted(row: int) -> object:
        nonlocal visits
        visits += 1
        return real(row)

    index.children = counted  # type: ignore[method-assign, assignment]
    assert all_written(world, world.open(spec("other")), "c", 1)
    assert visits <= 4 * length


def test_rank_without_slabs_gets_one_of_a_richer_sibling() -> None:
    """A block needs all its ranks: one that filled the tier alone must give, and nothing else be lost for it."""
    world = World(slabs=4)
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank)) for rank in range(2)]
    names = chain("a", 16)
    assert all_written(world, ranks[0], "a", 16)
    for position in range(0, 16, 4):
        world.write(names[position : position + 4], ns=ranks[1])
        world.at(world.now + 2.0)
    assert slabs(world, ranks[0]) == slabs(world, ranks[1]) == 2
    for _ in range(2):
        for ns in ranks:
            world.write(chain("b", 8), ns=ns)
    assert world.hits(chain("b", 8), ns=ranks[0]) == 8


def test_group_whose_rank_holds_nothing_is_not_emptied_in_vain() -> None:
    """Victims free the slots of the ranks that hold them; a rank that holds none gains nothing."""
    world = World(slabs=1)
    ranks = [world.open(spec("pair", shard_size=2, shard_rank=rank)) for rank in range(2)]
    assert all_written(world, ranks[0], "a", 4)
    assert outcomes(world.write(chain("b", 4), ns=ranks[1])) == [Outcome.FULL] * 4
    assert world.tier().slots_resident == 4


def test_clear_gives_every_slab_back() -> None:
    world = World(slabs=4)
    other = world.open(spec("other"))
    world.write(chain("a", 8))
    world.write(chain("b", 8), ns=other)
    world.effects()
    world.store.evict(1, world.ns, Scope.NAMESPACE, [])
    assert [type(event) for event in world.effects().slabs] == [SlabRetired] * 2
    assert slabs(world, world.ns) == 0
    assert world.tier().slabs_assigned == 2
    world.check()


def test_physical_slab_is_opened_again_only_after_it_was_retired() -> None:
    """Its memory changes hands in this order, or a new owner writes into an old owner's map."""
    world = World(slabs=2)
    namespaces = [world.open(spec(f"m{n}")) for n in range(5)]
    owner: dict[int, tuple[int, int]] = {}
    for turn in range(40):
        world.at(turn * 100.0)
        world.write(chain(f"c{turn}", 5), ns=namespaces[turn % 5])
        for event in world.effects().slabs:
            if isinstance(event, SlabOpened):
                assert event.physical not in owner
                owner[event.physical] = (event.ns, event.slab)
            else:
                assert owner.pop(event.physical) == (event.ns, event.slab)
    assert len(owner) == 2


# --- the drive's slabs ---------------------------------------------------------------------------------------------


def drive_slabs(world: TwoTiers, ns: int) -> list[int]:
    return [slab.physical for slab in world.store.shard(1, ns).spaces[NVME].slabs.values()]


def test_namespace_new_to_a_full_drive_gets_a_slab_of_the_coldest() -> None:
    """As in host memory, and what is in host memory too is not lost by it."""
    world = TwoTiers(slabs=4, drive_slabs=2)
    world.store_on_drive(chain("a", 8))
    world.acquire(chain("a", 1))
    world.finish_all()
    other = world.open(spec("other"))
    world.write(chain("b", 1), ns=other)
    world.persist(chain("b", 1), ns=other)
    assert (len(drive_slabs(world, world.ns)), len(drive_slabs(world, other))) == (1, 1)
    assert world.present(chain("b", 1), ns=other) == chain("b", 1)
    assert world.hits(chain("a", 8)) in (1, 4)
    retired, assigned = world.drive.slabs[-2:]
    assert isinstance(retired, DriveSlabRetired)
    assert isinstance(assigned, DriveSlabAssigned)
    assert retired.physical == assigned.physical


def test_host_slab_whose_blocks_are_on_the_drive_is_taken_without_loss() -> None:
    world = TwoTiers(slabs=2)
    world.write(chain("a", 8))
    world.persist(chain("a", 8))
    other = world.open(spec("other"))
    assert all_written(world, other, "b", 1)
    assert world.hits(chain("a", 8)) == 8
    assert sorted(world.where(chain("a", 8))) == ["b"] * 4 + ["d"] * 4
    assert (world.counters.released_blocks, world.counters.evicted_blocks) == (4, 0)


def test_slab_with_a_block_on_its_way_to_the_drive_is_not_taken() -> None:
    world = TwoTiers(slabs=1)
    world.write(chain("a", 4))
    world.store.persist(1, world.ns, chain("a", 4), world.now)
    other = world.open(spec("other"))
    assert outcomes(world.write(chain("b", 1), ns=other)) == [Outcome.FULL]
    world.finish_all()
    assert outcomes(world.write(chain("b", 1), ns=other)) == [Outcome.WRITE]
