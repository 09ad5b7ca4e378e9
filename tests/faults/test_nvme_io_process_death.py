"""The process that moves a drive's blocks dies under a live daemon: nothing is lost or wrong, nobody hangs.

A drive whose process dies again and again is down, and memory serves on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from support.ledger import Ledger, Verdict
from support.live import eventually
from support.nvme_live import BLOCKS, Engine, NvmeDaemon, chain

KEPT = range(1, 25)
"""Chains that are durable before the first death: more than fit in memory, and with all that is stored less than fit on
the drive."""
CALL_S = 10.0
"""What no call of a client may take, however often the process dies meanwhile."""
IMPATIENT = (
    "import sys; from forebay.tiers import nvme_io_process as process; from forebay.daemon.cli import main;"
    "process.ENDS_MAX = 3; process._RESTART_FIRST_S = 0.01; sys.argv = sys.argv[1:]; sys.exit(main())"
)
"""A daemon that gives a drive up after three deaths, with pauses that a test has time for."""


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(23)


@pytest.fixture
def daemon() -> Iterator[NvmeDaemon]:
    with NvmeDaemon(host_bytes="2MiB") as running:
        yield running


def drive_of(daemon: NvmeDaemon) -> dict[str, Any]:
    [drive] = daemon.status()["nvme"]["drives"]
    return dict(drive)


def kill_once(daemon: NvmeDaemon) -> None:
    eventually(lambda: bool(daemon.io_pids), "an I/O process runs", within_s=30)
    [pid] = daemon.io_pids
    os.kill(pid, signal.SIGKILL)


def store_durably(engine: Engine) -> None:
    """One by one: what leaves memory before it is written is lost."""
    for number in KEPT:
        engine.store_durably([number])


class Traffic:
    """Reads what is durable and stores what is new while it is entered; notes how long the longest call took."""

    def __init__(self, daemon: NvmeDaemon, ledger: Ledger) -> None:
        self._daemon, self._ledger = daemon, ledger
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.read = Verdict()
        self.longest_s = 0.0
        self.calls = 0
        self.error: Exception | None = None

    def _run(self) -> None:
        try:
            with Engine(self._daemon, self._ledger) as engine:
                while not self._stopping.is_set():
                    began_s = time.monotonic()
                    self.read += engine.fetch(KEPT[self.calls % len(KEPT)])
                    read_s = time.monotonic()
                    engine.store(1000 + self.calls % 50)
                    self.longest_s = max(self.longest_s, read_s - began_s, time.monotonic() - read_s)
                    self.calls += 1
        except Exception as error:  # noqa: BLE001  # for the test's own thread
            self.error = error

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(60)


def test_deaths_under_traffic_cost_misses_and_are_told(daemon: NvmeDaemon, ledger: Ledger) -> None:
    with Engine(daemon, ledger) as engine:
        store_durably(engine)
    with Traffic(daemon, ledger) as traffic:
        for deaths in range(1, 5):
            kill_once(daemon)
            eventually(lambda deaths=deaths: drive_of(daemon)["io_process_ends"] == deaths, "it is counted")
            served = traffic.read.served
            eventually(
                lambda served=served: traffic.read.served > served, "blocks come from the drive again", within_s=30
            )
    assert traffic.error is None, traffic.error
    assert traffic.read.wrong == 0
    assert traffic.read.served >= 4
    assert traffic.longest_s < CALL_S
    drive = drive_of(daemon)
    assert drive["up"]
    assert drive["io_process_reason"].endswith("was killed by SIGKILL")
    eventually(lambda: bool(daemon.io_pids), "an I/O process runs", within_s=30)
    with Engine(daemon, ledger) as engine:
        found = engine.fetch_all(KEPT)
    assert (found.wrong, found.missing) == (0, 0), "what was durable is lost"
    assert found.served == len(KEPT) * BLOCKS
    assert daemon.problems() == ()
    daemon.restart()
    daemon.restored()
    with Engine(daemon, ledger) as engine:
        found = engine.fetch_all(KEPT)
    assert (found.wrong, found.missing) == (0, 0), "what was durable is not found by the next life"


def test_drive_whose_process_dies_again_and_again_is_down_and_memory_serves_on(
    daemon: NvmeDaemon, ledger: Ledger
) -> None:
    daemon.stop()
    daemon.wrap = [sys.executable, "-P", "-c", IMPATIENT]
    daemon.start()
    with Engine(daemon, ledger) as engine:
        store_durably(engine)
        for deaths in range(1, 4):
            kill_once(daemon)
            eventually(lambda deaths=deaths: drive_of(daemon)["io_process_ends"] == deaths, "it is counted")
        eventually(lambda: not drive_of(daemon)["up"], "the drive is down")
        status = daemon.status()
        [reason] = status["not_ready"]
        assert reason.startswith("tier nvme is down: the I/O process of ")
        assert "3 times in a row: the drive is not used until the next start" in reason
        assert engine.fetch(KEPT[0]).wrong == 0
        # What cannot be read from the drive any more is stored anew, and found in memory.
        assert engine.store(KEPT[0]).rejected == 0
        found = engine.fetch(KEPT[0])
        assert (found.served, found.wrong) == (BLOCKS, 0)
        assert engine.client.lookup(engine.ns, chain(KEPT[0])).blocks == BLOCKS
    assert daemon.io_pids == []
    assert daemon.problems() == ()
    daemon.wrap = []
    daemon.restart()
    daemon.restored()
    with Engine(daemon, ledger) as engine:
        left = [number for number in KEPT if number != KEPT[0]]
        found = engine.fetch_all(left)
    assert (found.wrong, found.missing) == (0, 0), "what nobody asked for meanwhile is lost"
