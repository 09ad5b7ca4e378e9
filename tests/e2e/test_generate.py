"""A model, the transformers connector and a live daemon: the same tokens whatever happens to the cache."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from forebay.client import Client, EvictScope, NamespaceSpec  # noqa: E402
from forebay.client.copier import CopyPlan, NumpyCopier  # noqa: E402
from forebay.client.transformers import CACHE_ARGUMENT, PrefixCache, Report  # noqa: E402
from support.live import LiveDaemon, eventually  # noqa: E402
from support.tiny import GREEDY, plain, prompt_of, tiny_model  # noqa: E402

BLOCK = 16
PROMPT = 300
WHOLE = PROMPT // BLOCK * BLOCK
ENGINE_S = 90.0
HUNG_CALLS_S = 10.0


@pytest.fixture
def daemon() -> Iterator[LiveDaemon]:
    with LiveDaemon(host_bytes="256MiB") as live:
        yield live
        assert live.process is not None
        if live.process.poll() is None:
            assert live.problems() == ()


@pytest.fixture
def client(daemon: LiveDaemon) -> Iterator[Client]:
    with Client(daemon.runtime_dir) as attached:
        yield attached


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def ask(cache: PrefixCache, ids: Any) -> tuple[list[int], Report]:
    output, report = cache.generate(ids, **GREEDY)
    return output[0].tolist(), report


def engine(daemon: LiveDaemon, dtype: str, repeats: int) -> list[dict[str, Any]]:
    """Answers of an engine in a process of its own."""
    tests = Path(__file__).resolve().parent.parent
    command = [sys.executable, str(tests / "e2e" / "engine.py"), str(daemon.runtime_dir), dtype]
    done = subprocess.run(
        [*command, str(PROMPT), "1", str(repeats)],
        capture_output=True,
        text=True,
        timeout=ENGINE_S,
        env={**os.environ, "PYTHONPATH": str(tests / "shared"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_float32_tokens_are_those_of_plain_generate_cold_warm_and_in_another_process(
    daemon: LiveDaemon, client: Client, model: Any
) -> None:
    expected = plain(model, prompt_of(PROMPT))
    cold, warm = engine(daemon, "float32", repeats=2)
    here, report = ask(PrefixCache(client, model, block_tokens=BLOCK), prompt_of(PROMPT))
    assert cold["ids"] == warm["ids"] == here == expected
    assert (cold["restored_tokens"], cold["stored_blocks"]) == (0, (PROMPT + 19) // BLOCK)
    assert (warm["restored_tokens"], warm["stored_blocks"]) == (WHOLE, 0)
    assert (report.restored_tokens, report.computed_tokens, report.stored_blocks) == (WHOLE, PROMPT - WHOLE, 0)
    assert (cold["failure"], warm["failure"], report.failure) == ("", "", "")


def test_bfloat16_tokens_are_those_of_a_local_cache_of_the_same_prefix(daemon: LiveDaemon, client: Client) -> None:
    """A bfloat16 prompt read in two pieces may round differently from one read whole: compare like with like."""
    model = tiny_model(dtype="bfloat16")
    local = transformers.DynamicCache(config=model.config)
    model.generate(prompt_of(PROMPT), **{CACHE_ARGUMENT: local}, **GREEDY)
    local.crop(WHOLE - local.get_seq_length())
    expected = plain(model, prompt_of(PROMPT), **{CACHE_ARGUMENT: local})
    _, warm = engine(daemon, "bfloat16", repeats=2)
    here, report = ask(PrefixCache(client, model, block_tokens=BLOCK), prompt_of(PROMPT))
    assert warm["ids"] == here == expected
    assert warm["restored_tokens"] == report.restored_tokens == WHOLE


def test_conversation_restores_every_whole_block_of_the_turn_before(client: Client, model: Any) -> None:
    cache = PrefixCache(client, model, block_tokens=BLOCK)
    ids = prompt_of(PROMPT)
    stored = 0
    for turn in range(4):
        output, report = ask(cache, ids)
        assert output == plain(model, ids)
        assert report.restored_tokens == stored
        stored = (len(output) - 1) // BLOCK * BLOCK
        ids = torch.cat([torch.tensor([output]), prompt_of(30, seed=turn + 2)], dim=1)


def test_another_tenant_never_hits(client: Client, model: Any) -> None:
    ask(PrefixCache(client, model, block_tokens=BLOCK, tenant_salt=b"one"), prompt_of(PROMPT))
    output, report = ask(PrefixCache(client, model, block_tokens=BLOCK, tenant_salt=b"two"), prompt_of(PROMPT))
    assert output == plain(model, prompt_of(PROMPT))
    assert report.restored_tokens == 0


def test_evicted_tail_is_computed_and_stored_again(client: Client, model: Any) -> None:
    cache = PrefixCache(client, model, block_tokens=BLOCK)
    ask(cache, prompt_of(PROMPT))
    ns = client.open_namespace(cache.spec)
    names = ns.hasher.hashes(prompt_of(PROMPT)[0].tolist())
    removed = client.evict(ns, [names[5]], EvictScope.PREFIX).removed
    assert removed == (PROMPT + 19) // BLOCK - 5
    output, report = ask(cache, prompt_of(PROMPT))
    assert output == plain(model, prompt_of(PROMPT))
    assert (report.restored_tokens, report.stored_blocks) == (5 * BLOCK, removed)


class FaultyCopier(NumpyCopier):
    """Copies, then lets the test do something before the client verifies; or reports a failed block."""

    def __init__(self) -> None:
        super().__init__()
        self.after_scatter: Callable[[], object] | None = None
        self.failed: tuple[int, ...] = ()

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        super().gather(plan)
        return self.failed

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        super().scatter(plan)
        if self.after_scatter is not None:
            self.after_scatter()
        return self.failed


def test_failed_copy_of_a_block_costs_that_block_and_what_follows(daemon: LiveDaemon, model: Any) -> None:
    copier = FaultyCopier()
    with Client(daemon.runtime_dir, copier=copier) as client:
        cache = PrefixCache(client, model, block_tokens=BLOCK)
        copier.failed = (3,)
        output, report = ask(cache, prompt_of(PROMPT))
        assert (output, report.stored_blocks) == (plain(model, prompt_of(PROMPT)), 3)
        copier.failed = ()
        _, report = ask(cache, prompt_of(PROMPT))
        assert (report.restored_tokens, report.stored_blocks) == (3 * BLOCK, (PROMPT + 19) // BLOCK - 3)
        copier.failed = (7,)
        output, report = ask(cache, prompt_of(PROMPT))
        assert output == plain(model, prompt_of(PROMPT))
        assert (report.restored_tokens, report.failure) == (7 * BLOCK, "fetch: failed")


def test_slots_refilled_after_the_lease_ran_out_are_not_believed(model: Any) -> None:
    """The reader stalls past its lease in the middle of a fetch, and its blocks are removed meanwhile."""
    copier = FaultyCopier()
    with (
        LiveDaemon({"leases.ttl_ms": 100}) as daemon,
        Client(daemon.runtime_dir, copier=copier) as client,
        Client(daemon.runtime_dir, strict=True) as tool,
    ):
        cache = PrefixCache(client, model, block_tokens=BLOCK)
        ask(cache, prompt_of(PROMPT))
        ns = tool.open_namespace(cache.spec)

        def remove_all() -> None:
            eventually(lambda: tool.evict(ns, scope=EvictScope.NAMESPACE).kept == 0, "the lease expires")

        copier.after_scatter = remove_all
        output, report = ask(cache, prompt_of(PROMPT))
        assert output == plain(model, prompt_of(PROMPT))
        assert (report.restored_tokens, report.failure) == (0, "fetch: stale")


def test_absent_daemon_means_plain_generate(tmp_path: Path, model: Any) -> None:
    with Client(tmp_path / "nobody") as client:
        output, report = ask(PrefixCache(client, model, block_tokens=BLOCK), prompt_of(PROMPT))
    assert output == plain(model, prompt_of(PROMPT))
    assert (report.restored_tokens, report.stored_blocks) == (0, 0)
    assert report.rejected_blocks == (PROMPT + 19) // BLOCK
    assert report.failure.startswith("store: ")


def test_daemon_killed_and_restarted_under_an_engine_costs_only_hits(daemon: LiveDaemon, model: Any) -> None:
    expected = plain(model, prompt_of(PROMPT))
    with Client(daemon.runtime_dir) as client:
        cache = PrefixCache(client, model, block_tokens=BLOCK)
        assert ask(cache, prompt_of(PROMPT))[0] == expected
        daemon.kill()
        output, report = ask(cache, prompt_of(PROMPT))
        assert (output, report.restored_tokens) == (expected, 0)
        daemon.start()
        eventually(client.ping, "the client finds the new daemon")
        output, report = ask(cache, prompt_of(PROMPT))
        assert (output, report.restored_tokens, report.stored_blocks) == (expected, 0, (PROMPT + 19) // BLOCK)
        output, report = ask(cache, prompt_of(PROMPT))
        assert (output, report.restored_tokens) == (expected, WHOLE)


def test_hung_daemon_delays_one_answer_by_a_bounded_time(daemon: LiveDaemon, model: Any) -> None:
    expected = plain(model, prompt_of(PROMPT))
    with Client(daemon.runtime_dir, timeout_ms=200) as client:
        cache = PrefixCache(client, model, block_tokens=BLOCK)
        ask(cache, prompt_of(PROMPT))
        os.kill(daemon.pid, signal.SIGSTOP)
        try:
            begun = time.monotonic()
            output, report = ask(cache, prompt_of(PROMPT))
            assert (output, report.restored_tokens) == (expected, 0)
            assert time.monotonic() - begun < HUNG_CALLS_S
        finally:
            os.kill(daemon.pid, signal.SIGCONT)
        eventually(client.ping, "the client comes back", 30)
        output, report = ask(cache, prompt_of(PROMPT))
        assert (output, report.restored_tokens) == (expected, WHOLE)


def test_full_daemon_still_gives_the_right_tokens(model: Any) -> None:
    """More conversations than fit: every block stored or refused is accounted for, and every answer is right."""
    with LiveDaemon({"host.slab_bytes": "1MiB"}, host_bytes="2MiB") as daemon, Client(daemon.runtime_dir) as client:
        cache = PrefixCache(client, model, block_tokens=BLOCK)
        for seed in range(1, 7):
            ids = prompt_of(PROMPT, seed)
            output, report = ask(cache, ids)
            assert output == plain(model, ids)
            assert report.restored_tokens // BLOCK + report.stored_blocks + report.rejected_blocks >= 19
        assert daemon.store()["counters"]["evicted_blocks"] > 0
        assert daemon.problems() == ()


def test_spec_of_the_connector_opens_the_same_namespace_by_hand(client: Client, model: Any) -> None:
    """Tools can build the spec from its fields and see the same blocks."""
    cache = PrefixCache(client, model, block_tokens=BLOCK)
    ask(cache, prompt_of(PROMPT))
    ns = client.open_namespace(NamespaceSpec.from_fields(cache.spec.to_fields()))
    assert client.lookup(ns, ns.hasher.hashes(prompt_of(PROMPT)[0].tolist())).blocks == PROMPT // BLOCK
