"""Our tier under vLLM's real tiering manager; and vLLM's own tests of that, with our tier in its example's place.

Needs an importable vLLM (its source archive on PYTHONPATH will do, nothing need be built) and a real daemon. The second
test also needs the archive's tests: FOREBAY_VLLM_SOURCES names the unpacked archive.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import fake_vllm

if not fake_vllm.REAL:
    pytest.skip("vLLM is not installed, and its sources are not on PYTHONPATH", allow_module_level=True)
pytest.importorskip("vllm.v1.kv_offload.tiering.manager", reason="what vLLM's offloading imports is not complete")

from vllm.v1.kv_offload import config as kv_config
from vllm.v1.kv_offload.base import LookupResult, ReqContext, ScheduleEndContext, make_offload_key
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from support.live import LiveDaemon, eventually

SOURCES = os.environ.get("FOREBAY_VLLM_SOURCES", "")
SUITE = "tests/v1/kv_offload/tiering/test_tiering_offloading.py"
EXPECTED_FAILURES = {
    # asks for a label that only the example has
    "test_config_info_keys_match_the_filled_values",
    # stores behind the back of a request that was told "not there", which we remember for as long as the request lives
    "test_basic_store_and_lookup",
}
EXPECTED_PASSES = 70
SUITE_TIMEOUT_S = 110
CHUNKS, CHUNK_BYTES = 4, 4096
STEP = ScheduleEndContext(new_req_ids=[], preempted_req_ids=())


@pytest.fixture
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon() as live:
        yield live


def manager(daemon: LiveDaemon, engine_id: str) -> tuple[Any, Any]:
    """vLLM's manager as its spec makes it from a configuration, and the rows of its primary tier."""
    tier = {
        "type": "ForebayTier",
        "module_path": "forebay.client.vllm_tier",
        "runtime_dir": str(daemon.runtime_dir),
        "budget_ms": 500,
    }
    config = kv_config.OffloadingConfig(
        groups=(kv_config.OffloadingGroupConfig(16, ("layer",), 0),),
        worker_kv_bytes_per_block=CHUNK_BYTES,
        enable_kv_cache_events=False,
        extra_config={"cpu_bytes_to_use": CHUNKS * CHUNK_BYTES, "secondary_tiers": [tier]},
        engine_id=engine_id,
        model=kv_config.OffloadingModelConfig(name="tiny", dtype="float32"),
        cache=kv_config.OffloadingCacheConfig(tokens_per_hash=16, blocks_per_chunk=1),
        parallel=kv_config.OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, False),
    )
    made = TieringOffloadingSpec(config).get_manager()
    return made, np.asarray(made.secondary_tiers[0]._primary_kv_view)


def step_until(made: Any, condition: Any) -> None:
    def step() -> bool:
        made.on_schedule_end(STEP)
        return bool(condition())

    eventually(step, "the scheduler's steps lead there")


def test_chunks_outlive_the_engine(daemon: LiveDaemon) -> None:
    """Written by one vLLM, promoted by the next, the bytes the same: lookups say RETRY until the daemon was asked."""
    keys = [make_offload_key(bytes([number]) * 32, 0) for number in range(3)]
    first, rows = manager(daemon, "first")
    (tier,) = first.secondary_tiers
    ctx = ReqContext(req_id="one")
    first.on_new_request(ctx)
    stored = first.prepare_store(keys, ctx)
    rows.view(np.uint8)[stored.store_spec.block_ids] = np.arange(1, 4, dtype=np.uint8)[:, None]
    first.complete_store(keys, ctx)
    step_until(first, lambda: tier._jobs._client.stats().stored_blocks == 3)
    first.on_request_finished(ctx)
    first.shutdown()

    second, rows = manager(daemon, "second")
    ctx = ReqContext(req_id="two")
    second.on_new_request(ctx)
    assert second.lookup(keys[0], ctx) is LookupResult.RETRY
    step_until(second, lambda: [second.lookup(key, ctx) for key in keys] == [LookupResult.HIT] * 3)
    loaded = second.prepare_load(keys, ctx)
    assert [row[0] for row in rows.view(np.uint8)[loaded.block_ids]] == [1, 2, 3]
    assert all((row == row[0]).all() for row in rows.view(np.uint8)[loaded.block_ids])
    second.complete_load(keys, ctx)
    second.on_request_finished(ctx)
    second.shutdown()


@pytest.mark.skipif(not SOURCES, reason="FOREBAY_VLLM_SOURCES does not name an unpacked source archive of vLLM 0.33.0")
def test_vllms_own_tiering_tests(tmp_path: Path) -> None:
    here = Path(__file__).resolve().parent
    path = [SOURCES, str(here), str(here.parent / "shared"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "vllm_tier_plugin", "-p", "no:cacheprovider", SUITE],
        cwd=SOURCES,
        env={**os.environ, "PYTHONPATH": ":".join(path), "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SUITE_TIMEOUT_S,
    )
    print(done.stdout[-300:])
    failed = {name.split("[")[0] for name in re.findall(r"^FAILED \S+::(\S+)", done.stdout, flags=re.MULTILINE)}
    assert failed == EXPECTED_FAILURES, done.stdout[-4000:]
    assert f"{EXPECTED_PASSES} passed" in done.stdout
