"""What one event may cost the owner thread, however many namespaces and blocks there are; what a bad place may cost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from forebay.kvstore import movement, restoration, store
from forebay.kvstore.groups import Group
from forebay.kvstore.movement import Movement, NvmeConfig, Verdict
from forebay.kvstore.slabs import slot_bytes_of
from forebay.tiers.nvme_jobs import SlabOwner
from support.core import BLOCK_BYTES, UID, World, chain, spec

SLAB_BYTES = 1 << 20
GROUPS = 6
BLOCKS = 4


class _Many(World):
    """A full host tier of many namespaces, a slab each; all of their blocks are dirty."""

    def __init__(self) -> None:
        super().__init__(slabs=GROUPS, nvme=NvmeConfig(64 * SLAB_BYTES, SLAB_BYTES, window_bytes=1 << 30))
        self.store.restore_slabs([], 1)
        self.namespaces = [self.ns, *(self.open(spec(f"m{number}")) for number in range(1, GROUPS))]
        for ns in self.namespaces:
            self.write(chain(str(ns), BLOCKS), ns=ns)

    def written(self) -> list[int]:
        """Namespaces of the writes begun since the last call, each of which ends well."""
        transfers = self.effects().transfers
        for each in transfers:
            count = len(each.rows)
            self.store.transfer_done(each.transfer_id, [Verdict.OK] * count, [1] * count, self.now)
        return [each.shard.ns for each in transfers]


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[Group]:
    """Every group that a plan has looked at."""
    groups: list[Group] = []
    watch_of = Movement._watch

    def noting(self: Movement, group: Group) -> movement._Watch:
        groups.append(group)
        return watch_of(self, group)

    monkeypatch.setattr(Movement, "_watch", noting)
    return groups


def test_plan_after_each_request_looks_at_few_namespaces_and_at_all_in_turn(
    monkeypatch: pytest.MonkeyPatch, looked: list[Group]
) -> None:
    """It is made after every request, be it a look-up in one namespace of a thousand."""
    monkeypatch.setattr(movement, "PLAN_GROUPS", 2)
    world = _Many()
    world.store.plan_writes(world.now)  # all have just been stored into
    world.written()
    looked.clear()
    for plans in range(1, GROUPS // 2 + 1):
        world.store.plan_writes(world.now)
        assert len(looked) == 2 * plans
    assert len(set(looked)) == GROUPS


def test_namespace_that_was_just_stored_into_need_not_wait_for_its_turn(
    monkeypatch: pytest.MonkeyPatch, looked: list[Group]
) -> None:
    monkeypatch.setattr(movement, "PLAN_GROUPS", 1)
    world = _Many()
    world.store.plan_writes(world.now)
    for ns in world.namespaces:
        looked.clear()
        world.write(chain(f"more {ns}", 1), ns=ns)
        world.store.plan_writes(world.now)
        assert world.store.shard(world.session, ns).group in looked


def test_sweeps_look_at_a_bounded_number_of_rows_and_come_to_every_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "SWEEP_ROWS", 2 * BLOCKS)
    world = _Many()
    swept: list[int] = []
    for second in range(GROUPS // 2):
        world.store.sweep(world.now + 10 + second)
        found = world.written()
        assert len(found) == 2
        swept += found
    assert sorted(swept) == sorted(world.namespaces)
    world.check()


def test_sweep_of_a_large_namespace_goes_on_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movement, "SWEEP_ROWS", BLOCKS)
    world = World(slots=4 * BLOCKS, nvme=NvmeConfig(4 * SLAB_BYTES, SLAB_BYTES))
    world.store.restore_slabs([], 1)
    world.write(chain("long", 3 * BLOCKS))
    for second in range(3):
        world.store.sweep(world.now + 10 + second)
        [write] = world.effects().transfers
        assert len(write.rows) == BLOCKS
        world.store.transfer_done(write.transfer_id, [Verdict.OK] * BLOCKS, [1] * BLOCKS, world.now)
    world.check()


def test_place_that_cannot_be_written_is_not_tried_first_for_ever() -> None:
    """One bad sector must not keep a namespace that stores little from ever being durable."""
    world = World(slots=16, nvme=NvmeConfig(4 * SLAB_BYTES, SLAB_BYTES))
    world.store.restore_slabs([], 1)
    world.write(chain("c", 1))
    bad = set[int]()
    for second in range(2):
        world.store.persist(world.session, world.ns, chain("c", 1), world.now + second)
        [write] = world.effects().transfers
        assert not bad & set(write.nvme_slots)
        bad |= set(write.nvme_slots)
        world.store.transfer_done(write.transfer_id, [Verdict.FAILED], [0], world.now + second)
    world.check()


@pytest.fixture
def orphaned(monkeypatch: pytest.MonkeyPatch) -> World:
    """A drive has come back with a chain whose first two blocks were on another one, which has not."""
    monkeypatch.setattr(restoration, "_AT_ONCE_ROWS", 2)
    monkeypatch.setattr(store, "_TIDIED_ROWS", 3)
    world = World(slots=16, nvme=NvmeConfig(4 * SLAB_BYTES, SLAB_BYTES))
    fingerprint = world.store.shard(world.session, world.ns).group.fingerprint
    owner = SlabOwner(UID, fingerprint, 0, 1, BLOCK_BYTES, slot_bytes_of(BLOCK_BYTES), 32, 16, "m")
    names = chain("c", 7)
    world.store.restore_slabs([(0, owner, 1)], 1 << 32)
    found = [(0, slot, names[slot], names[slot - 1], slot, 2) for slot in range(2, 7)]
    world.store.restore_blocks(found, world.now)
    return world


def test_blocks_that_nobody_can_reach_are_dropped_bit_by_bit_children_first(orphaned: World) -> None:
    orphaned.store.restore_done()
    names = chain("c", 7)
    assert orphaned.present(names) == names[2:]
    left = []
    for _ in range(8):
        orphaned.store.plan_writes(orphaned.now)
        orphaned.check()
        left.append(len(orphaned.present(names)))
        assert orphaned.present(names) == names[2 : 2 + left[-1]]
    assert sorted(left, reverse=True) == left
    assert max(before - after for before, after in zip([5, *left], left)) <= 3
    assert left[-1] == 0
    assert orphaned.store.counters.restored_dropped_blocks == 5


def test_blocks_whose_first_ones_are_stored_again_meanwhile_stay(orphaned: World) -> None:
    orphaned.store.restore_done()
    names = chain("c", 7)
    orphaned.store.plan_writes(orphaned.now)
    orphaned.write(names[:2])
    for _ in range(8):
        orphaned.store.plan_writes(orphaned.now)
    assert orphaned.hits(names) == 7
    orphaned.check()


def test_namespace_that_makes_way_takes_its_unreachable_blocks_along(orphaned: World) -> None:
    orphaned.store.restore_done()
    orphaned.store.close_session(orphaned.session)
    orphaned.store.reconfigure(replace(orphaned.store.config, namespaces_max=1))
    orphaned.session = orphaned.open_session(2)
    orphaned.ns = orphaned.open(spec("another"))
    for _ in range(8):
        orphaned.store.plan_writes(orphaned.now)
    orphaned.check()
    assert orphaned.store.stats().tiers[1].slabs_assigned == 0
