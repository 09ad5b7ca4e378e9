"""What the scheduler's hook costs a request of 1,000 blocks, with a live daemon, and with none."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from forebay.client import Client, NamespaceSpec
from forebay.client.vllm_layout import Geometry
from forebay.client.vllm_scheduler import WAIT_MS, LeaseDesk, VllmScheduler
from support.live import LiveDaemon

BLOCK, BLOCKS, ASKED = 16, 1000, 300
PATIENT_S = 30.0
"""Of whoever waits for the answer: what is asserted is the answer, and how long it took is printed."""

GEOMETRY = Geometry(("a",), (64,), BLOCK, 1, ("x",), False)
SPEC = NamespaceSpec(model="m", revision="r", dtype="uint8", block_tokens=BLOCK, segment_bytes=(64,), hash_scheme="x")
HASHES = [i.to_bytes(32, "little") for i in range(1, BLOCKS + 2)]


def request_of(number: int) -> Any:
    return SimpleNamespace(
        request_id=str(number), num_tokens=BLOCKS * BLOCK + 1, block_hashes=HASHES, num_preemptions=0
    )


def measured(client: Client, wait_s: float, requests: int) -> tuple[list[float], list[int | None]]:
    """Milliseconds of each request's first question, and its answers."""
    scheduler = VllmScheduler(
        LeaseDesk(client), client.open_namespace(SPEC), GEOMETRY, wait_s=wait_s, give_up_s=PATIENT_S
    )
    times, answers = [], []
    for number in range(requests):
        begun = time.perf_counter()
        answers.append(scheduler.matched(request_of(number), 0)[0])
        times.append((time.perf_counter() - begun) * 1000)
        scheduler.finished(str(number))
    scheduler.close()
    return times, answers


def test_hit_of_a_thousand_blocks() -> None:
    """The first question maps the slabs and is reported apart."""
    with LiveDaemon() as daemon, Client(daemon.runtime_dir) as client:
        stored = client.store(client.open_namespace(SPEC), HASHES[:BLOCKS], np.zeros((BLOCKS, 64), np.uint8))
        assert stored.committed == BLOCKS
        times, answers = measured(client, PATIENT_S, ASKED)
    p50, p99 = np.percentile(times[1:], [50, 99])
    print(f"scheduler hook at {BLOCKS} blocks: first {times[0]:.3f} ms, p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    assert answers == [BLOCKS * BLOCK] * ASKED


def test_hit_that_is_not_waited_for() -> None:
    """With the default wait a slow answer is taken in the next step instead."""
    with LiveDaemon() as daemon, Client(daemon.runtime_dir) as client:
        client.store(client.open_namespace(SPEC), HASHES[:BLOCKS], np.zeros((BLOCKS, 64), np.uint8))
        times, answers = measured(client, WAIT_MS / 1000, ASKED)
    p50, p99 = np.percentile(times[1:], [50, 99])
    later = answers.count(None)
    print(
        f"scheduler hook, waiting {WAIT_MS} ms: p50 {p50:.3f} ms, p99 {p99:.3f} ms, {later} of {ASKED} answered later"
    )
    assert set(answers) <= {None, BLOCKS * BLOCK}


def test_absent_daemon_costs_a_wait_once(tmp_path: Path) -> None:
    with Client(tmp_path) as client:
        times, answers = measured(client, PATIENT_S, ASKED)
    p50, p99 = np.percentile(times[1:], [50, 99])
    print(f"scheduler hook without a daemon: first {times[0]:.3f} ms, p50 {p50:.3f} ms, p99 {p99:.3f} ms")
    assert answers == [0] * ASKED
