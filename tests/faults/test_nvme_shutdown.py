"""SIGTERM with an nvme tier: what is only in memory is written down within the time allowed, and never longer."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from support.ledger import Ledger, Verdict
from support.live import eventually
from support.nvme_live import BLOCKS, Engine, NvmeDaemon, Tampered, chain, why_no_strace

CHAINS = range(20)
CLOSE_S = 10.0
"""What a stop may take beside its settings: the drive's threads are given 5 s to end."""
NO_STRACE = why_no_strace()
WRITES = ("pwritev", "pwritev2", "fdatasync")


def _store_all(daemon: NvmeDaemon, ledger: Ledger) -> None:
    with Engine(daemon, ledger) as engine:
        for number in CHAINS:
            assert engine.store(number).committed == BLOCKS


def test_what_was_only_in_memory_is_back_after_a_stop() -> None:
    ledger = Ledger(1)
    with NvmeDaemon({"shutdown.flush_s": 30, "nvme.idle_s": 3600}) as daemon:
        _store_all(daemon, ledger)
        assert daemon.nvme()["slots_resident"] == 0, "it was written before the stop"
        assert daemon.stop() == 0
        daemon.start()
        daemon.restored()
        with Engine(daemon, ledger) as engine:
            assert engine.fetch_all(CHAINS) == Verdict(len(CHAINS) * BLOCKS, 0, 0)
        assert daemon.problems() == ()


def test_without_time_to_flush_it_stops_at_once() -> None:
    with NvmeDaemon({"shutdown.flush_s": 0, "nvme.idle_s": 3600}) as daemon:
        _store_all(daemon, Ledger(2))
        began = time.monotonic()
        assert daemon.stop() == 0
        print(f"stopped after {time.monotonic() - began:.2f} s")
        assert time.monotonic() - began < 3.0
        daemon.start()
        daemon.restored()
        with Engine(daemon, Ledger(2)) as engine:
            assert engine.fetch_all(CHAINS) == Verdict(0, 0, 0)


def test_idle_daemon_writes_down_what_is_only_in_memory() -> None:
    ledger = Ledger(3)
    with NvmeDaemon({"nvme.idle_s": 0.1}) as daemon:
        _store_all(daemon, ledger)
        eventually(lambda: daemon.nvme()["slots_resident"] == len(CHAINS) * BLOCKS, "all is written")
        daemon.restart()
        daemon.restored()
        with Engine(daemon, ledger) as engine:
            assert engine.fetch_all(CHAINS) == Verdict(len(CHAINS) * BLOCKS, 0, 0)


@pytest.mark.skipif(bool(NO_STRACE), reason=NO_STRACE)
@pytest.mark.parametrize("fault", ["delay_enter=500000", "error=EIO"], ids=["slow", "failing"])
def test_flush_to_a_drive_that_does_not_take_it_ends_in_time(fault: str) -> None:
    """What was written is whole, and the rest is lost; the exit is a clean one."""
    ledger, flush_s = Ledger(4), 1
    with NvmeDaemon({"shutdown.flush_s": flush_s, "nvme.idle_s": 3600, "nvme.queue_depth": 1}) as daemon:
        _store_all(daemon, ledger)
        with Tampered(daemon.pids, WRITES, fault, daemon.data_files[0]):
            began = time.monotonic()
            assert daemon.stop() == 0
            print(f"stopped after {time.monotonic() - began:.2f} s")
            assert time.monotonic() - began < flush_s + CLOSE_S
        _no_traceback(daemon.log_path)
        daemon.start()
        daemon.restored()
        with Engine(daemon, ledger) as engine:
            assert engine.fetch_all(CHAINS).wrong == 0
            engine.store_durably(CHAINS)
        assert daemon.problems() == ()


def test_stop_while_the_index_comes_back_is_clean() -> None:
    """It is stopped as soon as it is ready, again and again; nothing is lost over it."""
    ledger = Ledger(5)
    with NvmeDaemon() as daemon:
        with Engine(daemon, ledger) as engine:
            engine.store_durably(CHAINS)
        for _ in range(2):
            assert daemon.stop() == 0
            daemon.start()
        daemon.restored()
        with Engine(daemon, ledger) as engine:
            assert engine.fetch_all(CHAINS) == Verdict(len(CHAINS) * BLOCKS, 0, 0)
            assert engine.client.lookup(engine.ns, chain(1)).blocks == BLOCKS
        assert not daemon.status()["nvme"]["rebuilt"]
        assert not list(daemon.paths[0].glob("index.*"))
        _no_traceback(daemon.log_path)


def _no_traceback(log: Path) -> None:
    assert "Traceback" not in log.read_text(errors="replace")
