"""What the hooks cost the scheduler's thread for a request of 1,000 blocks, with a live daemon and with none."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from forebay.client import Client, NamespaceSpec
from forebay.client.vllm_layout import Geometry
from forebay.client.vllm_leases import LeaseDesk
from forebay.client.vllm_scheduler import VllmScheduler
from support.live import LiveDaemon, eventually

BLOCK, BLOCKS, ASKED = 16, 1000, 300
HOOKS_MS = 0.5
PATIENT_S = 30.0
"""A question may take so long: what is asserted is the answer, and how long it took is printed."""

GEOMETRY = Geometry(("a",), (64,), BLOCK, 1, ("x",), False)
SPEC = NamespaceSpec(model="m", revision="r", dtype="uint8", block_tokens=BLOCK, segment_bytes=(64,), hash_scheme="x")
HASHES = [i.to_bytes(32, "little") for i in range(1, BLOCKS + 2)]
IDS = list(range(BLOCKS + 1))


class Stopwatch:
    """The milliseconds that the scheduler's thread spends in hooks, summed up in `total`."""

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self, hook: Callable[..., Any], *args: Any) -> Any:
        begun = time.perf_counter()
        result = hook(*args)
        self.total += (time.perf_counter() - begun) * 1000
        return result


def request_of(number: int) -> Any:
    return SimpleNamespace(
        request_id=str(number), num_tokens=BLOCKS * BLOCK + 1, block_hashes=HASHES, num_preemptions=0
    )


def new_step(request: Any, computed: int) -> Any:
    """The step that schedules a request for the first time."""
    new = SimpleNamespace(req_id=request.request_id, block_ids=(IDS,), num_computed_tokens=computed)
    cached = SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set())
    scheduled = {request.request_id: 1}
    return SimpleNamespace(scheduled_new_reqs=[new], scheduled_cached_reqs=cached, num_scheduled_tokens=scheduled)


def measured(client: Client) -> tuple[list[float], list[float], list[int]]:
    """Milliseconds of each request's first question, of all its hooks up to its end, and the tokens promised."""
    namespaces = [[client.open_namespace(SPEC)]]
    scheduler = VllmScheduler(LeaseDesk(client), namespaces, [GEOMETRY], wait_s=0.0, give_up_s=PATIENT_S)
    first, total, answers = [], [], []
    for number in range(ASKED):
        request, timed = request_of(number), Stopwatch()
        tokens = timed(scheduler.matched, request, 0)[0]
        first.append(timed.total)
        if tokens is None:
            question = scheduler._asked[str(number)].question
            assert question.answered.wait(PATIENT_S)
            tokens = timed(scheduler.matched, request, 0)[0]
        timed(scheduler.allocated, request, (IDS,), tokens)
        timed(scheduler.step, new_step(request, tokens))
        timed(scheduler.loaded, {str(number)})
        timed(scheduler.finished, str(number))
        total.append(timed.total)
        answers.append(tokens)
    assert (scheduler.open_leases, scheduler.tracked) == (0, 0)
    scheduler.close()
    return first, total, answers


def tell(what: str, first: list[float], total: list[float]) -> None:
    """Print it. Asserted is the median only: the rest is what else the machine does."""
    asked, whole = np.percentile(first[1:], [50, 99]), np.percentile(total[1:], [50, 99])
    print(
        f"scheduler's hooks, {what}: the question p50 {asked[0]:.3f} ms, p99 {asked[1]:.3f} ms; all of a request "
        f"p50 {whole[0]:.3f} ms, p99 {whole[1]:.3f} ms; the first one {total[0]:.3f} ms"
    )
    assert whole[0] <= HOOKS_MS


def test_hit_of_a_thousand_blocks() -> None:
    """No hook waits for the answer; leases end with their requests."""
    with LiveDaemon() as daemon, Client(daemon.runtime_dir) as client:
        stored = client.store(client.open_namespace(SPEC), HASHES[:BLOCKS], np.zeros((BLOCKS, 64), np.uint8))
        assert stored.committed == BLOCKS
        first, total, answers = measured(client)
        eventually(lambda: client.status()["store"]["leases"] == 0, "every lease is released")
    tell(f"{BLOCKS} blocks", first, total)
    assert answers == [BLOCKS * BLOCK] * ASKED


def test_absent_daemon_is_a_miss(tmp_path: Path) -> None:
    with Client(tmp_path) as client:
        first, total, answers = measured(client)
    tell("no daemon", first, total)
    assert answers == [0] * ASKED
