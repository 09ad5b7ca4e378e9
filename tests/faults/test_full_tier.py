"""A full tier: every block of every store is answered, and what is held stays."""

from __future__ import annotations

import numpy as np
import pytest

from forebay.client import Client
from forebay.client.results import BlockOutcome
from forebay.kvstore.errors import QuotaExceeded
from support.actor import BLOCK_BYTES, SPEC, chain, payload
from support.live import LiveDaemon

TIER = "8MiB"
TIER_BLOCKS = 32
BLOCKS = 8


def test_endless_stores_keep_the_tier_full_and_each_outcome_is_in_the_reply() -> None:
    with LiveDaemon(host_bytes=TIER) as daemon, Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        for seed in range(1, 41):
            stored = client.store(ns, chain(seed, BLOCKS), payload(seed, BLOCKS))
            assert stored.outcomes == (BlockOutcome.STORED,) * BLOCKS
        tier = daemon.store()["tiers"][0]
        assert tier["resident_bytes"] >= 0.97 * tier["capacity_bytes"]
        assert daemon.store()["counters"]["evicted_blocks"] == 40 * BLOCKS - TIER_BLOCKS
        assert daemon.problems() == ()


def test_leased_and_pinned_blocks_survive_and_all_held_means_rejected_with_the_reason() -> None:
    settings = {"leases.pin_quota": 1.0}
    with LiveDaemon(settings, host_bytes=TIER) as daemon, Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        for seed in range(1, 5):
            client.store(ns, chain(seed, BLOCKS), payload(seed, BLOCKS))
        for seed in (1, 2):
            assert client.pin(ns, chain(seed, BLOCKS)) == BLOCKS
        with client.acquire(ns, chain(3, BLOCKS)), client.acquire(ns, chain(4, BLOCKS)):
            refused = client.store(ns, chain(9, BLOCKS), payload(9, BLOCKS))
            assert set(refused.outcomes) <= {BlockOutcome.FULL, BlockOutcome.ORPHAN}
            assert refused.outcomes[0] == BlockOutcome.FULL
        assert client.store(ns, chain(9, 2 * BLOCKS), payload(9, 2 * BLOCKS)).committed == 2 * BLOCKS
        for seed in (1, 2):
            memory = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
            assert client.fetch(ns, chain(seed, BLOCKS), memory).blocks == BLOCKS
            assert (memory == payload(seed, BLOCKS)).all()
        assert daemon.problems() == ()


def test_pins_beyond_the_quota_are_refused_whole() -> None:
    with LiveDaemon(host_bytes=TIER) as daemon, Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        client.store(ns, chain(1, TIER_BLOCKS), payload(1, TIER_BLOCKS))
        with pytest.raises(QuotaExceeded):
            client.pin(ns, chain(1, TIER_BLOCKS))
        assert daemon.store()["pinned_blocks"] == 0


def test_what_a_client_released_makes_room_for_its_next_store() -> None:
    """The release and the store travel on different sockets; the store must not overtake it."""
    with LiveDaemon(host_bytes=TIER) as daemon, Client(daemon.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)
        client.store(ns, chain(0, TIER_BLOCKS), payload(1, TIER_BLOCKS))
        for seed in range(1, 301):
            client.acquire(ns, chain(seed - 1, TIER_BLOCKS)).release()
            with client.reserve(ns, chain(seed, TIER_BLOCKS)) as reservation:
                assert set(reservation.outcomes) == {BlockOutcome.STORED}, f"round {seed}"
                reservation.commit()
