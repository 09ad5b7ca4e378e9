"""What a store learns of time and work while it serves: links, prefills, what was asked and what was saved."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from forebay.kvstore.groups import HOST, NVME
from forebay.kvstore.movement import Verdict
from forebay.kvstore.physics import ETA_BOUNDS, NOTHING_KNOWN, SIZES_TOLD, PhysicsConfig, PhysicsStats
from forebay.kvstore.planner import Mode
from forebay.kvstore.store import Store, StoreConfig
from support.core import BLOCK_BYTES, UID, TwoTiers, chain, spec

KNOWN = PhysicsConfig(prefill_tokens_per_s=1000.0, prefill_double_tokens=1e6, token_flops=1e9, gpus=4, host_gb_s=1.0)


class Small:
    """A store of 64 blocks, one session, one namespace; `now` is moved by hand."""

    def __init__(self, config: PhysicsConfig = KNOWN) -> None:
        ids = itertools.count(1)
        self.store = Store(StoreConfig(64 * BLOCK_BYTES, 16 * BLOCK_BYTES, physics=config), lambda: next(ids))
        self.store.open_session(1, UID)
        self.ns = self.store.open_namespace(1, spec()).ns
        self.group = self.store.shard(1, self.ns).group
        self.now = 0.0

    def put(self, names: list[bytes]) -> None:
        reserved = self.store.reserve(1, self.ns, b"", names, self.now)
        if reserved.reservation_id:
            self.store.commit(1, reserved.reservation_id, [], self.now)

    def look(self, names: list[bytes]) -> int:
        rows = self.store.lookup(1, self.ns, names, self.now)
        return self.store.physics.plan(self.group, names, rows, self.group.index.count_by_tier(rows)).blocks

    def lease(self, names: list[bytes]) -> None:
        lease = self.store.acquire(1, self.ns, names, 10.0, self.now)
        if lease.lease_id:
            self.store.release(1, lease.lease_id)

    def stats(self) -> PhysicsStats:
        found = self.store.stats(self.now).physics
        assert found is not None
        return found


def test_a_lookup_and_the_leases_that_follow_are_one_request() -> None:
    """An engine looks up, leases in its scheduler, and once more in each worker."""
    small = Small()
    names = chain("a", 10)
    small.put(names)
    small.look([*names, *chain("b", 5)])
    for _ in range(3):
        small.lease(names)
    (curve,) = (small.stats(), *small.store.physics.curve.namespaces)[1:]
    assert curve.references == 15
    assert small.stats().savings.tokens == 160


def test_leases_without_a_lookup_are_requests() -> None:
    small = Small()
    small.put(chain("a", 10))
    for _ in range(3):
        small.lease(chain("a", 10))
        small.now += 60.0
    small.lease(chain("absent", 4))
    small.stats()
    assert small.store.physics.curve.namespaces[0].references == 34
    assert small.stats().savings.tokens == 480


def test_savings_are_what_computing_would_have_taken_and_loading_took() -> None:
    small = Small()
    small.put(chain("a", 10))
    small.lease(chain("a", 10))
    saved = small.stats().savings
    assert saved.flops == pytest.approx(160e9, rel=1e-3)
    assert saved.gpu_s == pytest.approx(4 * 0.160, rel=1e-3)
    assert saved.stall_gpu_s == pytest.approx(4 * 10 * BLOCK_BYTES / 1e9)


def test_without_a_prefill_rate_tokens_alone_are_counted() -> None:
    small = Small(NOTHING_KNOWN)
    small.put(chain("a", 10))
    small.lease(chain("a", 10))
    saved = small.stats().savings
    assert (saved.tokens, saved.flops, saved.gpu_s, saved.stall_gpu_s) == (160, 0.0, 0.0, 0.0)


def test_plans_follow_what_engines_report_and_are_counted() -> None:
    small = Small()
    small.put(chain("a", 10))
    assert small.look(chain("a", 10)) == 10
    for _ in range(200):
        small.store.physics.copied(1 << 20, 100.0)  # 10 kB/s
        small.store.physics.computed(1000, 0, 0.001)
    assert small.look(chain("a", 10)) == 0
    assert small.look(chain("absent", 10)) == 0
    plans = small.stats().plans
    assert (plans.load, plans.part, plans.recompute) == (1, 0, 1)
    assert small.stats().prefill_samples == 200


def test_reports_that_cannot_be_true_are_ignored() -> None:
    small = Small()
    before = small.store.physics.prefill.line
    small.store.physics.computed(1 << 47, 0, 1e-6)
    small.store.physics.copied(1 << 47, 1e-6)
    assert small.store.physics.prefill.line == before
    assert small.store.physics.links[0].bytes_per_s(1 << 20) == 1e9


def test_the_mode_may_change_while_running() -> None:
    small = Small()
    small.put(chain("a", 10))
    config = small.store.config
    small.store.reconfigure(StoreConfig(config.capacity_bytes, config.slab_bytes, physics=PhysicsConfig(Mode.NEVER)))
    assert small.look(chain("a", 10)) == 0


def test_the_curve_tells_what_other_sizes_would_hit() -> None:
    """Twenty chains of 8 blocks in turn: 64 blocks hit nothing of them, four times as many all but the first round."""
    small = Small()
    for turn in range(200):
        small.now += 10.0
        small.look(chain(f"{turn % 20}", 8))
        small.put(chain(f"{turn % 20}", 8))
        small.store.physics.settle()
    points = dict(zip(SIZES_TOLD, small.stats().curve, strict=True))
    assert points[1.0].hit_share < 0.05
    assert points[4.0].hit_share == pytest.approx(0.9, abs=0.03)
    a_day = 43.2 * 0.9 * 200 * 8 * 16  # 2000 s observed
    assert points[4.0].hit_tokens_per_day == pytest.approx(a_day, rel=0.05)
    assert points[4.0].gpu_s_per_day == pytest.approx(4 * a_day / 1000, rel=0.05)
    ((fingerprint, told),) = small.stats().curves
    assert fingerprint == small.group.fingerprint.hex()
    assert told[-1][1] == pytest.approx(0.9, abs=0.03)


def test_predicted_load_times_are_held_against_the_true_ones() -> None:
    physics = Small().store.physics
    physics.expect(7, 1.0, 100.0)
    physics.arrived(7, 102.0)
    physics.expect(8, 1.0, 100.0)
    physics.ended(8)
    physics.arrived(8, 100.1)
    errors = physics.plans.errors[NVME]
    assert errors.counts[ETA_BOUNDS.index(0.5)] == 1
    assert sum(errors.counts) == 1
    assert errors.total == pytest.approx(0.5)


def test_loads_out_of_memory_that_clients_report_are_held_against_what_was_foreseen() -> None:
    """At 1 GB/s, as assumed, 4 MB take 4 ms; when they took 16, 16 are foreseen the next time."""
    small = Small()
    physics = small.store.physics
    for _ in range(2):
        physics.copied(4_000_000, 0.016)
    physics.copied(4_000_000, 1e-9)  # nobody copies so fast
    errors = small.stats().plans.errors[HOST]
    assert errors.counts[ETA_BOUNDS.index(1.0)] == 1
    assert errors.counts[0] == 1
    assert errors.total == pytest.approx(0.75)


def test_a_flood_of_requests_is_skipped_rather_than_kept() -> None:
    small = Small()
    for number in range(300):
        small.look(chain(f"{number}", 2))
    assert small.store.physics.pending == 256
    assert small.stats().curve_skipped == 44
    for number in range(3):
        small.look(chain(f"long {number}", 3000))
    assert small.store.physics.pending == 2
    assert small.stats().curve_skipped == 45
    assert small.store.physics.pending == 0


def test_a_namespace_that_goes_takes_its_curve_along() -> None:
    small = Small()
    small.look(chain("a", 8))
    small.store.physics.forget(small.group)
    assert small.store.physics.curve.keys == 0
    assert small.stats().curves == ()


def test_what_the_drive_holds_is_planned_over_its_link() -> None:
    small = Small()
    small.put(chain("a", 10))
    rows = small.group.index.walk(chain("a", 10))
    physics = small.store.physics
    assert physics.plan(small.group, chain("a", 10), rows, [0, 10]).steps[0].tier == "nvme"
    physics.links[NVME].begin(1 << 40)
    assert physics.plan(small.group, chain("a", 10), rows, [0, 10]).blocks == 0


def test_loads_from_the_drive_measure_its_link_and_the_plan_of_it() -> None:
    """Four blocks come after 20 ms; the second time that is foreseen."""
    world = TwoTiers()
    names = chain("a", 4)
    world.store_on_drive(names)
    link, plans = world.store.physics.links[NVME], world.store.physics.plans
    for _ in range(2):
        lease, *_ = world.acquire(names)
        assert link.queued_bytes == 4 * BLOCK_BYTES
        world.step()
        world.now += 0.02
        world.finish_all()
        assert link.queued_bytes == 0
        world.store.release(world.session, lease)
        for name in names:
            world.store.shard(world.session, world.ns).group.evict(world.index.find(name), HOST)
        world.step()
        world.now += 1.0
    assert link.bytes_per_s(4 * BLOCK_BYTES) == pytest.approx(4 * BLOCK_BYTES / 0.02)
    errors = plans.errors[NVME].counts
    assert sum(errors) == 2
    assert errors[ETA_BOUNDS.index(1.0)] == 1
    assert sum(errors[: ETA_BOUNDS.index(0.3)]) == 1


@pytest.mark.parametrize(
    ("known", "soft_s"),
    [(KNOWN, 0.06), (replace(KNOWN, prefill_tokens_per_s=10.0), 1.6), (NOTHING_KNOWN, 0)],
    ids=["loads by their own time", "slow engines by a quarter of theirs", "nothing known"],
)
def test_a_lease_that_waits_for_the_drive_says_when_to_give_up(known: PhysicsConfig, soft_s: float) -> None:
    """Once measured: four blocks of 16 tokens in 20 ms. What is in memory is not waited for."""
    world = TwoTiers(physics=known)
    names = chain("a", 4)
    world.store_on_drive(names)
    physics = world.store.physics
    physics.links[NVME].measured(4 * BLOCK_BYTES, 0.02)
    acquired = world.store.acquire(world.session, world.ns, names, 10.0, world.now)
    assert acquired.soft_s == pytest.approx(soft_s, rel=0.01)
    world.step()
    world.finish_all()
    assert world.store.acquire(world.session, world.ns, names, 10.0, world.now).soft_s == 0.0


def test_a_chain_that_continues_another_is_planned_at_its_depth() -> None:
    """16 tokens a block: what follows 512 of them costs more to compute than a prompt's beginning."""
    small = Small(replace(KNOWN, prefill_double_tokens=100.0))
    names = chain("a", 40)
    small.put(names)
    physics, rows = small.store.physics, small.group.index.walk(names)
    begin = physics.weigh(small.group, names[:8], rows[:8], [8])
    end = physics.weigh(small.group, names[32:], rows[32:], [8])
    assert begin.recompute_s == pytest.approx(physics.prefill.seconds(128, 0))
    assert end.recompute_s == pytest.approx(physics.prefill.seconds(128, 512))
    assert end.recompute_s > begin.recompute_s


def test_loads_that_clients_gave_up_are_counted() -> None:
    small = Small()
    small.store.physics.late(0)
    small.store.physics.late(2)
    assert small.stats().plans.late == 2


def test_a_load_that_is_cancelled_measures_nothing() -> None:
    world = TwoTiers()
    world.store_on_drive(chain("a", 4))
    before = world.store.physics.links[NVME].bytes_per_s(BLOCK_BYTES)
    lease, *_ = world.acquire(chain("a", 4))
    world.step()
    world.store.release(world.session, lease)
    world.now += 100.0
    world.finish_all(Verdict.CANCELLED)
    link = world.store.physics.links[NVME]
    assert (link.queued_bytes, link.bytes_per_s(BLOCK_BYTES)) == (0, before)


def test_prefetches_that_the_drive_was_not_asked_for_yet_are_not_queued_before_leases() -> None:
    world = TwoTiers(slabs=8, nvme={"chunk_bytes": BLOCK_BYTES, "ahead_bytes": BLOCK_BYTES})
    names = chain("a", 8)
    world.store_on_drive(names)
    link = world.store.physics.links[NVME]
    world.store.prefetch(world.session, world.ns, names, world.now)
    assert link.queued_bytes == BLOCK_BYTES
    world.acquire(names[:4])
    assert link.queued_bytes == 4 * BLOCK_BYTES
    world.finish_all()
    assert link.queued_bytes == 0
