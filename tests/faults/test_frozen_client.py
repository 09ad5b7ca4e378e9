"""A client that is stopped, not dead: its time runs out by the clock, its slots stay its own, its late copy fails."""

from __future__ import annotations

from forebay.client import Client
from support.actor import SPEC, Actor, chain, payload
from support.live import LiveDaemon, eventually

BLOCKS = 8
TIER = "8MiB"
TIER_BLOCKS = 32


def _fill(client: Client, first_seed: int, conversations: int) -> int:
    """Store conversations of BLOCKS blocks; returns how many blocks were written."""
    ns = client.open_namespace(SPEC)
    seeds = range(first_seed, first_seed + conversations)
    return sum(client.store(ns, chain(seed, BLOCKS), payload(seed, BLOCKS)).committed for seed in seeds)


def test_reader_frozen_past_its_lease_gets_no_bytes_of_another_block() -> None:
    """Its blocks are evicted and their slots refilled while it sleeps in the middle of its copy."""
    with (
        LiveDaemon({"leases.ttl_ms": 200}, host_bytes=TIER) as daemon,
        Client(daemon.runtime_dir, strict=True) as owner,
    ):
        ns = owner.open_namespace(SPEC)
        owner.store(ns, chain(1, BLOCKS), payload(1, BLOCKS))
        with Actor(daemon.runtime_dir, "half_read", freeze=True) as reader:
            eventually(lambda: daemon.store()["counters"]["expired_leases"] == 1, "the lease runs out")
            assert _fill(owner, 100, 8) == 8 * BLOCKS
            assert owner.lookup(ns, chain(1, BLOCKS)).blocks == 0, "its blocks are still there"
            answer = reader.go_on()
        assert answer == {"blocks": 0, "reason": "stale", "right": True}
        assert daemon.problems() == ()


def test_slots_of_a_frozen_writer_are_not_given_away() -> None:
    """Its blocks may be stored by others meanwhile, its slots not: when it wakes up it still writes into them."""
    settings = {"leases.reservation_ttl_ms": 200}
    with LiveDaemon(settings, host_bytes=TIER) as daemon, Client(daemon.runtime_dir, strict=True) as owner:
        with Actor(daemon.runtime_dir, "half_written", freeze=True) as writer:
            eventually(lambda: daemon.store()["quarantined_reservations"] == 1, "the reservation runs out")
            assert _fill(owner, 1, 1) == BLOCKS, "its blocks cannot be stored by another"
            assert _fill(owner, 200, 8) == 8 * BLOCKS
            tier = daemon.store()["tiers"][0]
            assert tier["slots_quarantined"] == BLOCKS
            assert tier["slots_resident"] == TIER_BLOCKS - BLOCKS
            answer = writer.go_on()
        assert answer["committed"] == 0
        assert set(answer["outcomes"]) == {"FAILED"}
        eventually(lambda: daemon.store()["tiers"][0]["slots_quarantined"] == 0, "its slots come back when it is done")
        _assert_intact(owner, range(206, 208))
        assert daemon.problems() == ()


def test_frozen_writer_that_dies_gives_its_slots_back() -> None:
    with LiveDaemon({"leases.reservation_ttl_ms": 200}, host_bytes=TIER) as daemon:
        with Actor(daemon.runtime_dir, "written", freeze=True) as writer:
            eventually(lambda: daemon.store()["tiers"][0]["slots_quarantined"] == BLOCKS, "the reservation runs out")
            writer.kill()
            eventually(lambda: daemon.store()["tiers"][0]["slots_quarantined"] == 0, "the slots come back")
        assert daemon.store()["tiers"][0]["slots_resident"] == 0
        assert daemon.problems() == ()


def _assert_intact(client: Client, seeds: range) -> None:
    """The conversations stored last are all there, byte for byte."""
    ns = client.open_namespace(SPEC)
    for seed in seeds:
        with client.acquire(ns, chain(seed, BLOCKS)) as lease:
            assert len(lease) == BLOCKS
            assert all((block == want).all() for block, want in zip(lease.views(), payload(seed, BLOCKS), strict=True))
