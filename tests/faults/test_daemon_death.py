"""A daemon that is killed and restarted under a running engine costs misses: no exception and no wrong bytes."""

from __future__ import annotations

import signal
import subprocess
import time

import numpy as np

from forebay.client import Client
from support.actor import BLOCK_BYTES, SPEC, Actor, chain, payload
from support.live import FOREBAY, LiveDaemon, eventually

BLOCKS = 8


def _fetch(client: Client, seed: int) -> int:
    """Blocks fetched; every one of them is right."""
    memory = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
    fetched = client.fetch(client.open_namespace(SPEC), chain(seed, BLOCKS), memory)
    assert (memory[: fetched.blocks] == payload(seed, BLOCKS)[: fetched.blocks]).all()
    return fetched.blocks


def test_client_survives_a_restart_and_attaches_again() -> None:
    with LiveDaemon() as daemon, Client(daemon.runtime_dir) as engine:
        ns = engine.open_namespace(SPEC)
        assert engine.store(ns, chain(1, BLOCKS), payload(1, BLOCKS)).committed == BLOCKS
        assert _fetch(engine, 1) == BLOCKS
        first_boot = daemon.status()["boot_id"]
        daemon.kill()
        assert _fetch(engine, 1) == 0
        assert engine.store(ns, chain(1, BLOCKS), payload(1, BLOCKS)).committed == 0
        daemon.start()
        assert daemon.status()["boot_id"] != first_boot
        eventually(
            lambda: engine.store(ns, chain(1, BLOCKS), payload(1, BLOCKS)).committed == BLOCKS, "it stores again"
        )
        assert _fetch(engine, 1) == BLOCKS


def test_restart_between_two_calls_is_noticed() -> None:
    """Nothing of the first daemon's life is believed in the second's."""
    with LiveDaemon() as daemon, Client(daemon.runtime_dir) as engine:
        ns = engine.open_namespace(SPEC)
        engine.store(ns, chain(1, BLOCKS), payload(1, BLOCKS))
        with engine.acquire(ns, chain(1, BLOCKS)) as lease:
            assert len(lease) == BLOCKS
            daemon.restart()
        assert engine.lookup(ns, chain(1, BLOCKS)).blocks == 0
        eventually(
            lambda: engine.store(ns, chain(2, BLOCKS), payload(2, BLOCKS)).committed == BLOCKS, "it stores again"
        )
        assert _fetch(engine, 2) == BLOCKS
        assert daemon.problems() == ()


def test_daemon_killed_in_the_middle_of_a_copy_costs_at_most_a_miss() -> None:
    """The reader still maps the dead daemon's memory: its copy cannot fault, and its bytes are right or refused."""
    with LiveDaemon() as daemon, Client(daemon.runtime_dir, strict=True) as owner:
        owner.store(owner.open_namespace(SPEC), chain(1, BLOCKS), payload(1, BLOCKS))
        with Actor(daemon.runtime_dir, "half_read", blocks=BLOCKS) as reader:
            daemon.kill()
            answer = reader.go_on()
            assert answer["right"]
        daemon.start()


def test_daemon_killed_in_the_middle_of_a_store_is_reported() -> None:
    with LiveDaemon() as daemon:
        with Actor(daemon.runtime_dir, "half_written", blocks=BLOCKS) as writer:
            daemon.kill()
            answer = writer.go_on()
        assert answer["committed"] == 0
        assert set(answer["outcomes"]) <= {"FAILED", "UNAVAILABLE"}
        daemon.start()


def test_hung_daemon_costs_one_time_out() -> None:
    """SIGSTOP: it accepts connections and answers nothing. The breaker opens after the first call."""
    with LiveDaemon() as daemon, Client(daemon.runtime_dir, timeout_ms=200) as engine:
        ns = engine.open_namespace(SPEC)
        engine.store(ns, chain(1, BLOCKS), payload(1, BLOCKS))
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGSTOP)
        try:
            started = time.monotonic()
            answers = [engine.lookup(ns, chain(1, BLOCKS)).blocks for _ in range(1000)]
            took_s = time.monotonic() - started
        finally:
            daemon.process.send_signal(signal.SIGCONT)
        assert answers == [0] * 1000
        assert took_s < 5.0, f"1000 calls took {took_s:.1f} s"
        eventually(lambda: _fetch(engine, 1) == BLOCKS, "it serves again")


def test_second_daemon_refuses_and_does_not_disturb_the_first() -> None:
    with LiveDaemon() as daemon, Client(daemon.runtime_dir, strict=True) as engine:
        ns = engine.open_namespace(SPEC)
        engine.store(ns, chain(1, BLOCKS), payload(1, BLOCKS))
        second = subprocess.run(
            [FOREBAY, "serve", "--runtime-dir", str(daemon.runtime_dir), "--metrics-listen", "off"],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert second.returncode == 5
        assert str(daemon.pid) in second.stderr, second.stderr
        assert _fetch(engine, 1) == BLOCKS
        with Client(daemon.runtime_dir, strict=True) as newcomer:
            assert _fetch(newcomer, 1) == BLOCKS


def test_sigterm_waits_for_what_is_under_way_and_refuses_what_is_new() -> None:
    with LiveDaemon({"shutdown.drain_s": 20}) as daemon, Client(daemon.runtime_dir, strict=True) as engine:
        ns = engine.open_namespace(SPEC)
        reservation = engine.reserve(ns, chain(1, BLOCKS))
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        eventually(lambda: daemon.status()["state"] == "draining", "it drains")
        assert {o.name for o in engine.store(ns, chain(2, BLOCKS), payload(2, BLOCKS)).outcomes} == {"DRAINING"}
        reservation.commit()
        assert daemon.process.wait(10) == 0
