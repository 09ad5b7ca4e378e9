"""vLLM 0.33 out of its source archive: its own tests of the scheduler, and ours, with our connector in the scheduler.

FOREBAY_VLLM_SOURCES names the unpacked archive, which need not be built; `docs/engines.md` says what it needs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = os.environ.get("FOREBAY_VLLM_SOURCES", "")
SUITE_TIMEOUT_S = 900
HERE = Path(__file__).resolve().parent
UNIT = Path(SOURCES, "tests/v1/kv_connector/unit")
SUITES = (
    "test_remote_prefill_lifecycle",
    "test_remote_decode_lifecycle",
    "test_kv_load_failure_recovery",
    "test_invalid_blocks_correctness",
    "test_cache_pollution_prevention",
    "test_error_propagation",
)
OTHERS_PROMISES = {
    # A peer's KV is promised to the last token, where a cache's is of whole blocks and the last token is computed.
    "test_remote_prefill_lifecycle::test_basic_lifecycle",
    "test_remote_prefill_lifecycle::test_full_block_prompt",
    # Its second request has the first one's prompt and is meant to miss; with a cache it hits.
    "test_remote_prefill_lifecycle::test_no_spurious_prefix_caching",
    # Blocks are kept after the request for a peer to fetch; we let go of them.
    "test_remote_decode_lifecycle::test_basic_lifecycle",
    "test_remote_decode_lifecycle::test_short_prompt_lifecycle",
    "test_remote_decode_lifecycle::test_prefix_cache_lifecycle",
    "test_remote_decode_lifecycle::test_abort_during_kv_transfer",
}
OVERRIDDEN = {
    # The promise is made in our place, so there is no lease to load by; the last one also hashes other blocks.
    "test_remote_prefill_lifecycle::test_async_load_reserves_blocks_for_inflight",
    "test_remote_prefill_lifecycle::test_async_loads_both_admitted_when_pool_fits",
    "test_remote_prefill_lifecycle::test_async_load_reserves_blocks_for_promotion_margin",
    "test_remote_prefill_lifecycle::test_deferred_lookup_does_not_block_parked_load",
}
RECURRENT = {
    # Models that are refused.
    "test_remote_prefill_lifecycle::test_p_side_chunked_prefill_mamba",
    "test_remote_prefill_lifecycle::test_async_load_does_not_double_reserve_mamba_spec_blocks",
}
PASSES, OURS = 24, 5
MODEL = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "max_position_embeddings": 2048,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
"""The shape of the model that vLLM's helpers name; nothing is loaded of it."""

pytestmark = [
    pytest.mark.skipif(
        not SOURCES, reason="FOREBAY_VLLM_SOURCES does not name an unpacked source archive of vLLM 0.33.0"
    ),
    pytest.mark.timeout(SUITE_TIMEOUT_S + 30),
]


def run(folder: Path, *files: Path) -> str:
    """The files under the plug-in; returns what pytest says."""
    model = folder / "facebook" / "opt-125m"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(MODEL))
    path = [SOURCES, str(HERE), str(HERE.parent / "shared"), os.environ.get("PYTHONPATH", "")]
    options = ["-q", "-rf", "-o", "filterwarnings=", "-p", "vllm_connector_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, "--rootdir", SOURCES, *map(str, files)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ":".join(path), "VLLM_TARGET_DEVICE": "cpu", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=SUITE_TIMEOUT_S,
    )
    print(done.stdout[-200:])
    return done.stdout


def test_vllms_own_scheduler_tests(tmp_path: Path) -> None:
    """What fails, fails by what the test is about."""
    said = run(tmp_path, *(UNIT / f"{suite}.py" for suite in SUITES))
    failed = re.findall(r"^(?:FAILED|ERROR) \S*?(\w+)\.py::(\w+)", said, flags=re.MULTILINE)
    assert {f"{suite}::{name}" for suite, name in failed} == OTHERS_PROMISES | OVERRIDDEN | RECURRENT, said[-4000:]
    assert f"{PASSES} passed" in said


def test_lifecycle_of_a_hit_in_vllms_scheduler(tmp_path: Path) -> None:
    said = run(tmp_path, HERE / "vllm_lifecycle_cases.py")
    assert f"{OURS} passed" in said, said[-4000:]
    assert "failed" not in said
