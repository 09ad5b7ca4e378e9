"""A client that dies at any step leaves nothing behind, and what it had half written is never seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from forebay.client import Client
from support.actor import FETCH_STEPS, SPEC, STORE_STEPS, Actor, chain, payload
from support.live import LiveDaemon, eventually

BLOCKS = 8


@pytest.fixture(scope="module")
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon() as running:
        yield running


def _nothing_held(daemon: LiveDaemon) -> bool:
    store = daemon.store()
    tier = store["tiers"][0]
    held = store["sessions"], store["leases"], store["reservations"], store["quarantined_reservations"]
    return held == (0, 0, 0, 0) and tier["slots_reserved"] == tier["slots_quarantined"] == 0


@pytest.mark.parametrize(("seed", "step"), list(enumerate(STORE_STEPS, start=10)))
def test_writer_killed_at_any_step_leaves_no_slot_and_no_block(daemon: LiveDaemon, seed: int, step: str) -> None:
    with Actor(daemon.runtime_dir, step, seed=seed, blocks=BLOCKS) as writer:
        assert daemon.store()["tiers"][0]["slots_reserved"] == BLOCKS
        with Client(daemon.runtime_dir, strict=True) as other:
            ns = other.open_namespace(SPEC)
            assert other.lookup(ns, chain(seed, BLOCKS)).blocks == 0, "a half-written block is visible"
        writer.kill()
        reclaim_s = eventually(lambda: _nothing_held(daemon), "the dead writer's slots come back")
        print(f"writer killed at {step}: all reclaimed after {reclaim_s * 1000:.1f} ms")
    with Client(daemon.runtime_dir, strict=True) as other:
        ns = other.open_namespace(SPEC)
        assert other.lookup(ns, chain(seed, BLOCKS)).blocks == 0
        assert other.store(ns, chain(seed, BLOCKS), payload(seed, BLOCKS)).committed == BLOCKS
    assert daemon.problems() == ()


@pytest.mark.parametrize(("seed", "step"), list(enumerate(FETCH_STEPS, start=20)))
def test_reader_killed_at_any_step_leaves_no_lease(daemon: LiveDaemon, seed: int, step: str) -> None:
    with Client(daemon.runtime_dir, strict=True) as owner:
        ns = owner.open_namespace(SPEC)
        owner.store(ns, chain(seed, BLOCKS), payload(seed, BLOCKS))
        with Actor(daemon.runtime_dir, step, seed=seed, blocks=BLOCKS) as reader:
            assert daemon.store()["leased_blocks"] == BLOCKS
            assert owner.evict(ns, chain(seed, BLOCKS)).kept == BLOCKS, "leased blocks were evicted"
            reader.kill()
            reclaim_s = eventually(lambda: daemon.store()["leases"] == 0, "the dead reader's lease ends")
            print(f"reader killed at {step}: reclaimed after {reclaim_s * 1000:.1f} ms")
        assert owner.evict(ns, chain(seed, BLOCKS)).removed == BLOCKS
    eventually(lambda: _nothing_held(daemon), "nothing is held")
    assert daemon.problems() == ()


def test_client_let_go_on_after_each_pause_is_right(daemon: LiveDaemon) -> None:
    """The actor itself works: without a kill its store is complete and its fetch is right."""
    with Actor(daemon.runtime_dir, "half_written", seed=30, blocks=BLOCKS) as writer:
        assert writer.go_on()["committed"] == BLOCKS
    with Actor(daemon.runtime_dir, "half_read", seed=30, blocks=BLOCKS) as reader:
        assert reader.go_on() == {"blocks": BLOCKS, "reason": "", "right": True}
