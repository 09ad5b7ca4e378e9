"""Removal in parts: each is bounded, together they do what one turn would, whatever happens in between."""

import itertools
import random
from collections.abc import Iterator

import pytest

from forebay.kvstore import removal
from forebay.kvstore.errors import NotLeased
from forebay.kvstore.groups import Group
from forebay.kvstore.index import NO_ROW
from forebay.kvstore.outcome import Scope
from forebay.kvstore.store import Removed
from support.core import UID, World, chain, spec

BLOCKS = 300


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(removal, "PART_COST", 40)


def world_of(slabs: int = 40) -> World:
    return World(slabs=slabs, slots=8, pin_quota=1.0)


def group_of(world: World) -> Group:
    return world.store.shard(1, world.ns).group


def parts(world: World, done: Removed) -> Iterator[Removed]:
    """The first reply and those of all later parts."""
    yield done
    while done.more:
        done = world.store.remove_more(1, done.more)
        yield done


def grow(world: World, dice: random.Random) -> list[list[bytes]]:
    """A tree of random branches in use in all ways there are; returns its chains. Some middles are removed."""
    chains = [chain(f"root{number}", 3) for number in range(3)]
    for number in range(40):
        begun = dice.choice(chains)
        chains.append([*begun[: dice.randint(0, len(begun))], *chain(f"{number}", dice.randint(1, 6))])
    for names in chains:
        world.write(names)
    for names in dice.sample(chains, 4):
        world.acquire(names[: dice.randint(1, len(names))])
        world.store.evict(1, world.ns, Scope.BLOCKS, [dice.choice(dice.choice(chains))])
    for names in dice.sample(chains, 4):
        world.store.pin(1, world.ns, names[: dice.randint(1, len(names))])
        if len(names) > 2:
            world.store.unpin(1, world.ns, names[:-1])
    for number, names in enumerate(dice.sample(chains, 3)):
        world.reserve([*names, *chain(f"written{number}", 2)])
    return chains


def at_once(group: Group, scope: Scope, names: list[bytes]) -> tuple[set[bytes], int]:
    """What a removal takes, and how many it keeps, by the whole of the rows: children before parents."""
    index = group.index
    rows = {row for row in map(index.find, names) if row != NO_ROW}
    if scope != Scope.BLOCKS:
        rows = set(index.rows()) if scope == Scope.NAMESPACE else index.subtrees(rows)
    gone, kept = set(), set()
    for row in sorted(rows, key=lambda row: -index.depths[row]):
        leads = scope != Scope.BLOCKS and any(child in kept for child in index.children(row))
        if index.is_resident(row) and not leads and group.removable(row):
            gone.add(index.hashes[row] or b"")
        elif index.is_resident(row) or index.holds[row]:
            kept.add(row)
    return gone, len(kept)


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("seed", range(25))
def test_parts_together_do_what_one_turn_would(scope: Scope, seed: int) -> None:
    dice, world = random.Random(seed), world_of()
    chains = grow(world, dice)
    names = [dice.choice(dice.choice(chains)) for _ in range(12)]
    group = group_of(world)
    resident = {
        name for row in group.index.rows() if group.index.is_resident(row) and (name := group.index.hashes[row])
    }
    gone, kept = at_once(group, scope, names)
    before = world.store.counters.removed_blocks

    *_, told = parts(world, world.store.evict(1, world.ns, scope, names, dry_run=True))
    assert (told.removed, told.kept) == (len(gone), kept)
    assert world.store.counters.removed_blocks == before

    replies = list(parts(world, world.store.evict(1, world.ns, scope, names)))
    assert (replies[-1].removed, replies[-1].kept) == (len(gone), kept)
    assert world.store.counters.removed_blocks == before + len(gone)
    assert {name for name in resident if not group.index.is_resident(group.index.find(name))} == gone
    assert len(replies) > 1 or len(gone) < 8
    world.check()


def wide(world: World) -> list[bytes]:
    """One block that all others continue."""
    top = chain("top", 1)
    names = [name for number in range(BLOCKS - 1) for name in chain(f"{number}", 1)]
    for name in names:
        world.write([*top, name])
    return [*top, *names]


@pytest.mark.parametrize("shape", ["wide", "deep"])
@pytest.mark.parametrize("scope", Scope)
def test_no_part_removes_more_than_its_share(scope: Scope, shape: str) -> None:
    world = world_of()
    names = chain("deep", BLOCKS) if shape == "deep" else wide(world)
    world.write(names[: BLOCKS if shape == "deep" else 0])
    world.store.pin(1, world.ns, names[:1])
    replies = list(parts(world, world.store.evict(1, world.ns, scope, names)))
    assert (replies[-1].removed, replies[-1].kept) == (BLOCKS - 1, 1)
    removed = [0, *(reply.removed for reply in replies)]
    most = removal.PART_COST // removal.DROP_COST
    assert max(now - before for before, now in itertools.pairwise(removed)) <= most
    assert len(replies) <= 20 + BLOCKS * (removal.DROP_COST + 3) // removal.PART_COST
    world.check()


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize("scope", [Scope.PREFIX, Scope.NAMESPACE])
def test_what_is_kept_is_walked_once(scope: Scope, dry_run: bool) -> None:
    world = world_of()
    names = wide(world)
    for name in names[1:]:
        world.acquire([names[0], name])
    replies = list(parts(world, world.store.evict(1, world.ns, scope, names[:1], dry_run=dry_run)))
    assert (replies[-1].removed, replies[-1].kept) == (0, BLOCKS)
    assert len(replies) <= 2 + 3 * BLOCKS // removal.PART_COST + 2


def test_others_read_between_two_parts_what_is_left() -> None:
    world = world_of()
    names = chain("deep", BLOCKS)
    world.write(names)
    world.store.pin(1, world.ns, names[:1])
    replies = parts(world, world.store.evict(1, world.ns, Scope.NAMESPACE, []))
    seen = [(reply.removed, world.hits(names)) for reply in replies]
    assert len(seen) > 10
    assert all(removed + hits == BLOCKS for removed, hits in seen)


@pytest.mark.parametrize("scope", [Scope.PREFIX, Scope.NAMESPACE])
def test_block_stored_where_the_walk_has_passed_is_not_orphaned(scope: Scope) -> None:
    world = world_of()
    names = wide(world)
    world.write(chain("other", 1))
    world.store.pin(1, world.ns, chain("other", 1))
    done = world.store.evict(1, world.ns, scope, names[:1])
    world.acquire([names[0], names[1]])  # the first in line is passed last
    for _ in range(BLOCKS // 8):
        done = world.store.remove_more(1, done.more)
    new = [names[0], *chain("new", 2)]
    world.write(new)
    *_, done = parts(world, done)
    assert world.hits(new) in (1, 3)
    assert world.hits(names[:2]) == 2
    world.check()


@pytest.mark.parametrize("seed", range(60))
def test_removal_ends_and_leaves_all_in_order_whatever_happens_in_between(seed: int) -> None:
    """Blocks are stored, evicted, leased and released while two removals go on."""
    dice, world = random.Random(seed), world_of(slabs=20)
    world.open_session(2, operator=True)
    chains = grow(world, dice)
    names = [names[0] for names in chains]
    leases = []
    scope = dice.choice([Scope.PREFIX, Scope.NAMESPACE])
    going = [world.store.evict(1, world.ns, scope, names, dry_run=dice.random() < 0.2).more for _ in range(2)]
    for step in range(2000):
        going = [world.store.remove_more(1, number).more for number in going if number]
        if not any(going):
            break
        action = dice.choice(("store", "store", "lease", "release", "evict", "clear"))
        some = dice.choice(chains)
        if action == "store" and step < 100:
            chains.append([*some[: dice.randint(0, len(some))], *chain(f"{seed}/{step}", 3)])
            world.write(dice.choice(chains))
            world.write(chains[-1])
        elif action == "lease":
            leases.append(world.acquire(some)[0])
        elif action == "release":
            for lease in filter(None, leases):
                world.store.release(1, lease)
            leases.clear()
        elif action == "evict":
            world.store.evict(1, world.ns, Scope.BLOCKS, some)
        elif action == "clear" and dice.random() < 0.1:
            world.store.clear(2)
        world.check()
    assert not any(going)


def test_namespace_that_makes_way_in_the_middle_of_a_clear_is_left_alone() -> None:
    world = World(slabs=40, slots=8, pin_quota=1.0, namespaces_max=2)
    world.open_session(2, operator=True)
    world.open_session(3)
    old = world.open(spec("old"), 3)
    world.write(chain("old", 40), ns=old, session=3)
    lease = world.acquire(chain("old", 1), ns=old, session=3)[0]
    done = world.store.remove_more(2, world.store.clear(2).more)
    assert 0 < done.removed < 39
    world.store.release(3, lease)
    world.store.close_session(3)
    new = world.open(spec("new"))
    assert world.store.stats().counters.removed_blocks == 40
    world.write(chain("new", 5), ns=new)
    removed = done.removed
    while done.more:
        done = world.store.remove_more(2, done.more)
    assert done == Removed(removed, 0)
    assert world.hits(chain("new", 5), ns=new) == 5
    world.check()


def test_only_the_session_that_asked_goes_on_and_only_until_it_is_done() -> None:
    world = world_of()
    world.open_session(2, uid=UID)
    names = chain("deep", BLOCKS)
    world.write(names)
    first = world.store.evict(1, world.ns, Scope.PREFIX, names[:1])
    with pytest.raises(NotLeased):
        world.store.remove_more(2, first.more)
    *_, done = parts(world, first)
    assert done.removed == BLOCKS
    with pytest.raises(NotLeased):
        world.store.remove_more(1, first.more)


def test_removals_that_are_not_gone_on_with_make_way() -> None:
    world = world_of()
    names = chain("deep", BLOCKS)
    world.write(names)
    numbers = [world.store.evict(1, world.ns, Scope.PREFIX, names[:1], dry_run=True).more for _ in range(17)]
    with pytest.raises(NotLeased):
        world.store.remove_more(1, numbers[0])
    assert [world.store.remove_more(1, number).more for number in numbers[1:]] == numbers[1:]
