"""The prefix cache for transformers: same tokens always, exact counts, and never a block it should not use."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

from forebay.client.copier import CopyPlan, NumpyCopier  # noqa: E402
from forebay.client.hints import Hints  # noqa: E402
from forebay.client.results import BlockOutcome, FetchResult, LookupResult, StoreResult  # noqa: E402
from forebay.client.segments import SegmentTable  # noqa: E402
from forebay.client.transformers import (  # noqa: E402
    CACHE_ARGUMENT,
    PrefixCache,
    Report,
    UnsupportedModel,
    _Plane,
    _usable_cuda,
    weights_fingerprint,
)
from forebay.kvstore.errors import ForebayError, PeerLost  # noqa: E402
from forebay.kvstore.namespace import NamespaceSpec  # noqa: E402
from forebay.kvstore.outcome import StopReason  # noqa: E402
from forebay.transports.dma import DmaError  # noqa: E402
from support.tiny import GREEDY, plain, prompt_of, tiny_model  # noqa: E402

BLOCK = 16
RUN_TIMEOUT_S = 60


class DictClient:
    """A client whose blocks lie in a dict; can be told to lose, damage or refuse."""

    def __init__(self) -> None:
        self.blocks: dict[tuple[bytes, bytes], Any] = {}
        self.fetch_limit: int | None = None
        self.errors: dict[str, ForebayError] = {}
        self.reports: list[tuple[int, int, float]] = []
        self.advice: int | None = None
        self.hinted: list[tuple[int, float]] = []
        self.priorities: list[int] = []

    def open_namespace(self, spec: NamespaceSpec) -> Any:
        self._maybe_raise("open_namespace")
        return SimpleNamespace(name=spec.fingerprint(), block_bytes=spec.block_bytes, sizes=spec.segment_bytes)

    def lookup(self, ns: Any, hashes: Sequence[bytes]) -> Any:
        self._maybe_raise("lookup")
        present = self._present(ns, hashes)
        if self.advice is None:
            return LookupResult(present)
        return LookupResult(present, advice="load" if self.advice else "recompute", load_blocks=self.advice)

    def fetch(self, ns: Any, hashes: Sequence[bytes], destination: SegmentTable, *, stream: int | None = 0) -> Any:
        """Copies all it has, but vouches for the first `fetch_limit` blocks only: the rest is noise."""
        self._maybe_raise("fetch")
        count = self._present(ns, hashes)
        verified = count if self.fetch_limit is None else min(count, self.fetch_limit)
        for block, name in enumerate(hashes[:count]):
            stored = self.blocks[ns.name, name]
            data = stored if block < verified else np.full_like(stored, 0x3F)
            NumpyCopier().scatter(_plan(ns, destination, block, data))
        return FetchResult(verified, verified * ns.block_bytes, "" if verified == len(hashes) else "stale")

    def store(
        self, ns: Any, hashes: Sequence[bytes], source: SegmentTable, *, priority: int = 0, stream: int | None = 0
    ) -> Any:
        self._maybe_raise("store")
        self.priorities.append(priority)
        codes = bytearray([BlockOutcome.PRESENT]) * len(hashes)
        for block, name in enumerate(hashes):
            if (ns.name, name) not in self.blocks:
                data = np.zeros(ns.block_bytes, np.uint8)
                NumpyCopier().gather(_plan(ns, source, block, data))
                self.blocks[ns.name, name] = data
                codes[block] = BlockOutcome.STORED
        new = codes.count(BlockOutcome.STORED)
        return StoreResult(bytes(codes), new, new * ns.block_bytes)

    def done(self, ns: Any, hashes: Sequence[bytes], keep: int = 0) -> int:
        self._maybe_raise("done")
        self.hinted.append((self._present(ns, hashes), keep))
        return len(hashes)

    def stopped(self, ns: Any, hashes: Sequence[bytes], reason: StopReason) -> int:
        return len(hashes)

    def expect(self, ns: Any, hashes: Sequence[bytes], within_s: float) -> int:
        self.hinted.append((self._present(ns, hashes), within_s))
        return len(hashes)

    def report_prefill(self, tokens: int, depth_tokens: int, seconds: float) -> bool:
        self._maybe_raise("report_prefill")
        self.reports.append((tokens, depth_tokens, seconds))
        return True

    def _present(self, ns: Any, hashes: Sequence[bytes]) -> int:
        absent = (index for index, name in enumerate(hashes) if (ns.name, name) not in self.blocks)
        return next(absent, len(hashes))

    def _maybe_raise(self, call: str) -> None:
        if call in self.errors:
            raise self.errors[call]


def _plan(ns: Any, table: SegmentTable, block: int, data: Any) -> CopyPlan:
    table.check_layout(ns.sizes)
    addresses = np.array([data.ctypes.data], np.int64)
    return CopyPlan(table, table.checked_ids([block], 1), addresses, ns.block_bytes, (data,))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def client() -> DictClient:
    return DictClient()


@pytest.fixture
def cache(client: DictClient, model: Any) -> PrefixCache:
    return PrefixCache(client, model, block_tokens=BLOCK)


def cached(cache: PrefixCache, ids: Any, **options: Any) -> tuple[list[int], Report]:
    output, report = cache.generate(ids, **{**GREEDY, **options})
    return output[0].tolist(), report


def test_cold_call_stores_the_whole_blocks_of_prompt_and_answer(cache: PrefixCache, model: Any) -> None:
    """The KV of the last generated token is never computed, so 100 + 20 tokens leave 119."""
    ids = prompt_of(100)
    output, report = cached(cache, ids)
    assert output == plain(model, ids)
    assert (report.prompt_tokens, report.restored_tokens, report.computed_tokens) == (100, 0, 100)
    assert report.generated_tokens == 20
    assert report.stored_blocks == 119 // BLOCK
    assert report.stored_bytes == 119 // BLOCK * cache.spec.block_bytes
    assert report.bypassed == report.failure == ""


def test_warm_call_restores_exactly_the_stored_blocks_and_answers_the_same(cache: PrefixCache, model: Any) -> None:
    ids = prompt_of(100)
    cold, _ = cached(cache, ids)
    warm, report = cached(cache, ids)
    assert warm == cold == plain(model, ids)
    assert (report.restored_tokens, report.computed_tokens, report.stored_blocks) == (96, 4, 0)
    assert report.restored_bytes == 6 * cache.spec.block_bytes
    assert report.gb_per_s > 0


def test_what_is_not_worth_loading_is_computed_and_not_stored_again(
    cache: PrefixCache, client: DictClient, model: Any
) -> None:
    """The daemon advises to load two of six blocks, then none: answers stay the same."""
    ids = prompt_of(100)
    cached(cache, ids)
    for client.advice in (2, 0):
        output, report = cached(cache, ids)
        assert output == plain(model, ids)
        assert (report.restored_blocks, report.stored_blocks) == (client.advice, 0)


def test_hints_are_told_of_prompt_and_answer_when_both_are_stored(cache: PrefixCache, client: DictClient) -> None:
    tokens = prompt_of(40)
    _, report = cache.generate(tokens, hints=Hints(done=True, keep_tokens=2 * BLOCK + 3), **GREEDY)
    whole = (report.prompt_tokens + report.generated_tokens - 1) // BLOCK
    assert whole > 40 // BLOCK
    cache.generate(tokens, hints=Hints(expect_s=20.0, priority=1), **GREEDY)
    assert client.hinted == [(whole, 2), (whole, 20.0)]
    assert client.priorities == [0, 1]
    client.errors["done"] = PeerLost("gone")
    _, report = cache.generate(tokens, hints=Hints(done=True), **GREEDY)
    assert report.failure == "hints: not told"


def test_the_daemon_is_told_how_long_the_prefill_took(cache: PrefixCache, client: DictClient) -> None:
    for _ in range(2):
        cached(cache, prompt_of(100))
    assert [(tokens, depth) for tokens, depth, _ in client.reports] == [(100, 0), (4, 96)]
    assert all(seconds > 0 for _, _, seconds in client.reports)
    client.errors["report_prefill"] = PeerLost("gone")
    _, report = cached(cache, prompt_of(100))
    assert report.failure == "report: PeerLost: gone"


@pytest.mark.parametrize(("tokens", "restored"), [(96, 80), (97, 96), (17, 16), (16, 0), (1, 0)])
def test_last_prompt_token_is_always_computed(cache: PrefixCache, model: Any, tokens: int, restored: int) -> None:
    ids = prompt_of(tokens)
    cached(cache, ids)
    warm, report = cached(cache, ids)
    assert warm == plain(model, ids)
    assert report.restored_tokens == restored


def test_next_turn_restores_the_generated_tokens_too(cache: PrefixCache, model: Any) -> None:
    first, _ = cached(cache, prompt_of(100))
    ids = torch.cat([torch.tensor([first]), prompt_of(30, seed=2)], dim=1)
    output, report = cached(cache, ids)
    assert output == plain(model, ids)
    assert report.restored_tokens == 119 // BLOCK * BLOCK == 112


def test_shared_head_of_another_prompt_is_restored(cache: PrefixCache, model: Any) -> None:
    cached(cache, prompt_of(100))
    ids = torch.cat([prompt_of(100)[:, :70], prompt_of(40, seed=3)], dim=1)
    output, report = cached(cache, ids)
    assert output == plain(model, ids)
    assert report.restored_tokens == 64


def test_another_process_with_equal_weights_shares_and_its_answer_is_the_same(
    cache: PrefixCache, client: DictClient, model: Any
) -> None:
    ids = prompt_of(100)
    cached(cache, ids)
    other = PrefixCache(client, tiny_model(), block_tokens=BLOCK)
    output, report = cached(other, ids)
    assert output == plain(model, ids)
    assert report.restored_tokens == 96


def test_bfloat16_answers_like_a_local_cache_of_the_same_prefix(client: DictClient) -> None:
    """In bfloat16 a prompt read in two pieces may round differently from one read whole: compare like with like."""
    model = tiny_model(dtype="bfloat16")
    cache = PrefixCache(client, model, block_tokens=BLOCK)
    assert cache.spec.dtype == "bfloat16"
    ids = prompt_of(100)
    local = transformers.DynamicCache(config=model.config)
    model.generate(ids, **{CACHE_ARGUMENT: local}, **GREEDY)
    local.crop(96 - local.get_seq_length())
    expected = plain(model, ids, **{CACHE_ARGUMENT: local})
    cached(cache, ids)
    output, report = cached(cache, ids)
    assert output == expected
    assert report.restored_tokens == 96


@pytest.mark.parametrize(
    ("change", "options"),
    [
        ({"seed": 1}, {}),
        ({"dtype": "bfloat16"}, {}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}, {}),
        ({"rms_norm_eps": 1e-5}, {}),
        ({"attn_implementation": "eager"}, {}),
        ({}, {"tenant_salt": b"other"}),
        ({}, {"block_tokens": 32}),
        ({}, {"revision": "r2"}),
        ({}, {"name": "other"}),
    ],
)
def test_anything_that_changes_the_bytes_changes_the_namespace(
    cache: PrefixCache, client: DictClient, change: dict[str, Any], options: dict[str, Any]
) -> None:
    ids = prompt_of(100)
    cached(cache, ids)
    other = PrefixCache(client, tiny_model(**change), **{"block_tokens": BLOCK, **options})
    assert other.spec.fingerprint() != cache.spec.fingerprint()
    _, report = cached(other, ids)
    assert report.restored_tokens == 0


def test_fingerprint_sees_one_changed_weight() -> None:
    model = tiny_model()
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(tiny_model())
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[5, 7] += 0.5
    assert weights_fingerprint(model) != before


def test_weights_written_after_construction_bypass_the_cache(client: DictClient) -> None:
    model = tiny_model()
    cache = PrefixCache(client, model, block_tokens=BLOCK)
    cached(cache, prompt_of(100))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    output, report = cached(cache, prompt_of(100))
    assert output == plain(model, prompt_of(100))
    assert report.restored_tokens == 0
    assert "weights changed" in report.bypassed


@pytest.mark.parametrize("verified", [0, 1, 5])
def test_short_fetch_uses_only_what_was_verified(
    cache: PrefixCache, client: DictClient, model: Any, verified: int
) -> None:
    """The copy of the other blocks left noise in the destination, which must not reach the model."""
    ids = prompt_of(100)
    cached(cache, ids)
    client.fetch_limit = verified
    output, report = cached(cache, ids)
    assert output == plain(model, ids)
    assert (report.restored_tokens, report.computed_tokens) == (verified * BLOCK, 100 - verified * BLOCK)
    assert report.failure == "fetch: stale"


def test_one_wrong_block_would_show_in_the_answer(cache: PrefixCache, client: DictClient, model: Any) -> None:
    """The yardstick itself: identical tokens mean something only if wrong bytes change them."""
    ids = prompt_of(100)
    cached(cache, ids)
    for data in list(client.blocks.values())[2:3]:
        data.view(np.float32)[:] *= -1
    output, _ = cached(cache, ids)
    assert output != plain(model, ids)


@pytest.mark.parametrize("call", ["open_namespace", "lookup", "fetch", "store"])
def test_client_error_costs_the_hit_and_nothing_else(
    cache: PrefixCache, client: DictClient, model: Any, call: str
) -> None:
    ids = prompt_of(100)
    if call != "open_namespace":
        cached(cache, ids)
    client.errors[call] = PeerLost("gone")
    output, report = cached(cache, ids)
    assert output == plain(model, ids)
    assert report.failure == f"{'restore' if call in ('lookup', 'fetch') else call}: PeerLost: gone"
    assert report.restored_tokens == (96 if call == "store" else 0)


def test_evicted_head_is_stored_again(cache: PrefixCache, client: DictClient) -> None:
    ids = prompt_of(100)
    cached(cache, ids)
    del client.blocks[next(iter(client.blocks))]
    _, report = cached(cache, ids)
    assert (report.restored_tokens, report.stored_blocks) == (0, 1)


def test_streamer_of_the_caller_gets_every_token(cache: PrefixCache) -> None:
    seen: list[int] = []
    ended: list[bool] = []
    streamer = SimpleNamespace(
        put=lambda value: seen.extend(value.reshape(-1).tolist()), end=lambda: ended.append(True)
    )
    output, report = cached(cache, prompt_of(40), streamer=streamer)
    assert seen == output
    assert ended == [True]
    assert 0 < report.ttft_s < report.generate_s


def test_dict_output_and_generation_config_are_passed_through(cache: PrefixCache, model: Any) -> None:
    config = transformers.GenerationConfig(**GREEDY, return_dict_in_generate=True, output_scores=True)
    ids = prompt_of(40)
    cache.generate(ids, generation_config=config)
    output, report = cache.generate(ids, generation_config=config)
    assert output.sequences[0].tolist() == plain(model, ids)
    assert len(output.scores) == 20
    assert getattr(output, CACHE_ARGUMENT).get_seq_length() == 59
    assert report.restored_tokens == 32


def test_end_of_text_stops_and_the_stored_blocks_still_match(client: DictClient, model: Any) -> None:
    ids = prompt_of(100)
    stop = plain(model, ids)[110]
    cache = PrefixCache(client, model, block_tokens=BLOCK)
    first, report = cached(cache, ids, eos_token_id=stop, pad_token_id=stop)
    assert report.generated_tokens <= 11
    longer = torch.cat([torch.tensor([first]), prompt_of(20, seed=4)], dim=1)
    output, report = cached(cache, longer)
    assert output == plain(model, longer)
    assert report.restored_tokens == (len(first) - 1) // BLOCK * BLOCK


def _padded() -> dict[str, Any]:
    mask = torch.ones((1, 40), dtype=torch.long)
    mask[0, :3] = 0
    return {"attention_mask": mask}


@pytest.mark.parametrize(
    ("rows", "options", "reason"),
    [
        (2, {}, "one sequence"),
        (1, {"num_beams": 2}, "num_beams"),
        (1, {"num_return_sequences": 2, "do_sample": True}, "num_return_sequences"),
        (1, _padded(), "padding"),
        (1, {"pad_token_id": int(prompt_of(40)[0, 5])}, "padding token"),
        (1, {"use_cache": False}, "use_cache"),
        (1, {"cache_implementation": "static"}, "cache implementation"),
        (1, {"prefill_chunk_size": 16}, "prefill_chunk_size"),
        (1, {"position_ids": torch.arange(40)[None]}, "position_ids"),
        (1, {"generation_config": None, CACHE_ARGUMENT: transformers.DynamicCache()}, CACHE_ARGUMENT),
    ],
)
def test_what_the_cache_cannot_serve_runs_plain_and_says_why(
    cache: PrefixCache, client: DictClient, model: Any, rows: int, options: dict[str, Any], reason: str
) -> None:
    ids = prompt_of(40).repeat(rows, 1)
    torch.manual_seed(0)
    expected = model.generate(ids, **{**GREEDY, **options})
    if CACHE_ARGUMENT in options:
        options = {**options, CACHE_ARGUMENT: transformers.DynamicCache()}
    torch.manual_seed(0)
    output, report = cache.generate(ids, **{**GREEDY, **options})
    assert output.tolist() == expected.tolist()
    assert reason in report.bypassed
    assert (report.restored_tokens, report.stored_blocks, client.blocks) == (0, 0, {})


def test_training_mode_bypasses_the_cache(cache: PrefixCache, client: DictClient, model: Any) -> None:
    model.train()
    try:
        _, report = cached(cache, prompt_of(40))
    finally:
        model.eval()
    assert "training" in report.bypassed
    assert client.blocks == {}


def _sliding() -> Any:
    config = transformers.MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=16, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return transformers.MistralForCausalLM(config).eval()


def _generation_cache(kind: str) -> Any:
    model = tiny_model(num_hidden_layers=1)
    model.generation_config.cache_implementation = kind
    return model


def _adapted() -> Any:
    model = tiny_model(num_hidden_layers=1)
    model.peft_config = {"default": object()}
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_sliding, "DynamicSlidingWindowLayer"),
        (lambda: _generation_cache("quantized"), "quantized"),
        (lambda: _generation_cache("static"), "static"),
        (_adapted, "adapters"),
        (lambda: tiny_model(num_hidden_layers=1).train(), "training"),
        (
            lambda: tiny_model(
                num_hidden_layers=1,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
            ),
            "dynamic rotary",
        ),
    ],
)
def test_unsupported_model_is_refused_with_the_part_named(client: DictClient, make: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        PrefixCache(client, make(), block_tokens=BLOCK)


def _run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=RUN_TIMEOUT_S)


def test_importing_the_client_loads_neither_torch_nor_transformers() -> None:
    done = _run("import sys, forebay.client; print({'torch', 'transformers'} & set(sys.modules))")
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


@pytest.mark.parametrize("missing", ["torch", "transformers"])
def test_import_without_the_extra_names_it(missing: str) -> None:
    done = _run(f"import sys; sys.modules[{missing!r}] = None\nimport forebay.client.transformers")
    assert done.returncode != 0
    assert "pip install 'forebay[transformers]'" in done.stderr


@pytest.mark.parametrize(
    ("devices", "usable", "asked", "expected"),
    [
        (["cpu", "cpu"], True, [], None),
        (["cuda:1", "cuda:1"], True, [1], "cuda:1"),
        (["cuda:1", "cuda:1"], False, [1], None),
        (["cuda:0", "cuda:1"], True, [], None),
        (["cuda:0", "cpu"], True, [], None),
    ],
)
def test_a_cache_is_moved_in_place_where_all_of_it_is_on_one_gpu_that_can_be_used(
    devices: list[str], usable: bool, asked: list[int], expected: str | None
) -> None:
    """Else by way of host memory: a model does not stop for want of cupy."""
    prepared: list[int] = []

    class Client:
        def prepare(self, device: int) -> None:
            prepared.append(device)
            if not usable:
                raise DmaError("no cupy")

    found = _usable_cuda(Client(), [_Plane(2, 32, torch.device(name)) for name in devices])
    assert (prepared, found) == (asked, None if expected is None else torch.device(expected))
