"""A namespace group: holds, pins, and what is remembered of a search for victims that found none."""

from __future__ import annotations

import pytest

from forebay.kvstore.groups import Group
from support.core import World, chain, outcomes, spec


@pytest.fixture
def full() -> World:
    """One slab of four slots, all leased."""
    world = World(slabs=1)
    world.write(chain("a", 4))
    world.acquire(chain("a", 4), ttl_s=10.0)
    return world


def searches(world: World, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every question whether a block may go."""
    asked: list[int] = []
    real = Group.evictable

    def counted(group: Group, row: int) -> bool:
        asked.append(row)
        return real(group, row)

    monkeypatch.setattr(Group, "evictable", counted)
    return asked


def test_vain_search_is_not_made_again_for_each_store(full: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full tier is when a daemon has least time for walks over all of its chains."""
    full.write(chain("b", 1))
    asked = searches(full, monkeypatch)
    for label in "cdefgh":
        assert [o.name for o in outcomes(full.write(chain(label, 2)))] == ["FULL", "FULL"]
    assert asked == []


@pytest.mark.parametrize("event", ["release", "expire", "die"])
def test_end_of_a_lease_makes_the_search_worth_while_again(event: str) -> None:
    world = World(slabs=1)
    world.write(chain("a", 4))
    world.open_session(2)
    world.open(spec(), 2)
    lease, _, _ = world.acquire(chain("a", 4), ttl_s=10.0, session=2)
    assert outcomes(world.write(chain("b", 1)))[0].name == "FULL"
    if event == "release":
        world.store.release(2, lease)
    elif event == "expire":
        world.at(10.0)
    else:
        world.store.close_session(2)
    assert outcomes(world.write(chain("b", 1)))[0].name == "WRITE"


def test_cleared_pin_makes_the_search_worth_while_again() -> None:
    world = World(slabs=1, pin_quota=1.0)
    world.write(chain("a", 4))
    world.store.pin(1, world.ns, chain("a", 4))
    assert outcomes(world.write(chain("b", 1)))[0].name == "FULL"
    world.store.unpin(1, world.ns, chain("a", 4)[-1:])
    assert outcomes(world.write(chain("b", 1)))[0].name == "WRITE"


def test_parent_of_a_refused_block_may_go_for_the_next_store() -> None:
    """While room was looked for, the refused block itself kept its parent; not any longer."""
    world = World(slabs=1, slots=1)
    world.write(chain("a", 1))
    assert outcomes(world.write(chain("a", 2)))[1].name == "FULL"
    assert outcomes(world.write(chain("b", 1)))[0].name == "WRITE"


def test_pins_are_counted_in_bytes_of_all_shards() -> None:
    world = World(slabs=8)
    group = world.store.open_namespace(1, spec("pair", shard_size=2)).group
    assert group.complete_bytes == 2 * 4096
    assert group.pinned_bytes == 0


def test_check_names_what_is_wrong() -> None:
    """A check that cannot fail guards nothing."""
    world = World()
    world.write(chain("a", 2))
    group = world.store.shard(1, world.ns).group
    group.pinned_blocks = 1
    assert world.store.check()
    group.pinned_blocks = 0
    world.check()
    group.index.holds[0] += 1
    assert world.store.check()
