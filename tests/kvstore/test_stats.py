"""Stats: totals that only grow, records that nobody can change, plain enough for JSON."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, asdict, fields

import pytest

from forebay.kvstore.outcome import Scope, StopReason
from forebay.kvstore.stats import Counters
from support.core import World, chain, spec

MOVED_ELSEWHERE = (
    "declined_cost_chains",
    "declined_budget_chains",
    "declined_blocks",
    "bypassed_blocks",
    "evicted_unwritten_blocks",
    "released_blocks",
    "promoted_blocks",
    "promoted_bytes",
    "promotions_full_blocks",
    "promotions_cancelled_blocks",
    "promotions_failed_blocks",
    "demoted_blocks",
    "demoted_bytes",
    "demotions_failed_blocks",
    "corrupt_blocks",
    "stale_blocks",
    "restored_blocks",
    "restored_dropped_blocks",
)
"""Zero without one; `test_movement` moves them, and `test_store_bypass` the first."""


def test_stats_are_a_picture_of_one_instant() -> None:
    """What happens afterwards does not show in it."""
    world = World()
    before = world.store.stats()
    world.write(chain("a", 2))
    assert before.counters.committed_blocks == 0
    assert world.store.stats().counters.committed_blocks == 2
    with pytest.raises(FrozenInstanceError):
        before.leases = 5  # type: ignore[misc]


def test_stats_go_into_json() -> None:
    world = World()
    world.write(chain("a", 2))
    again = json.loads(json.dumps(asdict(world.store.stats())))
    assert again["counters"]["committed_blocks"] == 2
    assert again["namespaces"][0]["blocks"] == 2


def test_every_counter_counts() -> None:
    """Each total is moved by the event that it is named after."""
    world = World(slabs=1, pin_quota=0.5)
    world.open_session(2)
    world.open(spec(), 2)
    world.commit(world.store.reserve(1, world.ns, b"", chain("a", 3), world.now, priority=1))
    world.write(chain("a", 3))
    world.reserve(chain("b", 1))
    world.reserve(chain("b", 1), session=2)
    world.reserve(chain("n", 2), parent=b"absent")
    world.acquire(chain("a", 3), ttl_s=5.0)
    world.write(chain("c", 2))
    world.hits(chain("a", 4))
    world.store.expect(1, world.ns, chain("a", 3), 1.0, world.now)
    world.store.done(1, world.ns, chain("a", 3))
    world.store.stopped(1, world.ns, chain("a", 3), StopReason.LENGTH)
    world.at(100.0)
    world.store.close_session(1)
    world.write(chain("d", 4), session=2)
    world.store.evict(2, world.ns, Scope.NAMESPACE, [])
    world.store.drain()
    world.reserve(chain("e", 1), session=2)
    counters = asdict(world.store.stats().counters)
    assert counters == dict.fromkeys(MOVED_ELSEWHERE, 0) | {
        "lookups": 1,
        "lookup_hashes": 4,
        "lookup_hit_blocks": 3,
        "acquired_blocks": 3,
        "acquired_bytes": 3 * 4096,
        "reserved_blocks": 8,
        "committed_blocks": 7,
        "committed_bytes": 7 * 4096,
        "aborted_blocks": 1,
        "present_blocks": 3,
        "in_flight_blocks": 1,
        "rejected_full_blocks": 2,
        "rejected_orphan_blocks": 2,
        "rejected_draining_blocks": 1,
        "evicted_blocks": 3,
        "removed_blocks": 4,
        "done_hints": 1,
        "done_blocks": 3,
        "stopped_hints": 1,
        "expect_hints": 1,
        "expected_blocks": 1,
        "unexpected_blocks": 2,
        "preferred_blocks": 1,
        "unpreferred_blocks": 2,
        "expired_leases": 1,
        "expired_reservations": 1,
        "sessions_opened": 2,
        "sessions_closed": 1,
        "slabs_assigned": 1,
        "slabs_retired": 1,
    }
    assert set(counters) == {item.name for item in fields(Counters)}


def test_slots_of_the_tier_are_in_one_state_each() -> None:
    world = World(slabs=2)
    world.write(chain("a", 3))
    world.reserve(chain("b", 2))
    tier = world.tier()
    assert (tier.slots_resident, tier.slots_reserved, tier.slots_quarantined, tier.slots_free) == (3, 2, 0, 3)
    world.at(60.0)
    tier = world.tier()
    assert (tier.slots_resident, tier.slots_reserved, tier.slots_quarantined, tier.slots_free) == (3, 0, 2, 3)
    assert tier.resident_bytes == 3 * 4096
    assert (tier.capacity_bytes, tier.slabs_total, tier.slabs_assigned) == (2 * 4 * 4096, 2, 2)


def test_namespace_is_told_by_fingerprint_and_counts_complete_blocks() -> None:
    world = World()
    pair = spec("pair", shard_size=2)
    ns = world.open(pair)
    world.now = 7.0
    world.write(chain("a", 2), ns=ns)
    told = world.store.stats().namespaces[1]
    assert told.fingerprint == pair.group_fingerprint().hex()
    assert (told.blocks, told.shard_size, told.slabs, told.resident_bytes) == (0, 2, 1, 2 * 4096)
    assert told.last_touch_s == 7.0
