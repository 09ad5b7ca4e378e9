"""What of vLLM's cache is taken and what is refused, with stand-ins for vLLM's objects."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.client.vllm_layout import (
    Engine,
    Geometry,
    check_version,
    geometries_of,
    layer_pages,
    namespace_spec,
    segment_table,
)
from forebay.kvstore.errors import BadRequest, LayoutError

torch = pytest.importorskip("torch", reason="torch is not installed")

BLOCKS, BLOCK, HEADS, HEAD = 5, 16, 2, 8
PAGE = BLOCK * HEADS * HEAD * 2 * 4
ENGINE = Engine("0.32.0", "cpu", "vec", "seed", 0, 1)


class FullAttentionSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


class MLAAttentionSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


class SlidingWindowSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


class ChunkedLocalAttentionSpec(SimpleNamespace):
    """Bears the name of vLLM's."""

    attention_chunk_size = 64


class MambaSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


def spec_of(kind: type[SimpleNamespace] = FullAttentionSpec, **changes: Any) -> Any:
    fields = {"block_size": BLOCK, "page_size_bytes": PAGE, "num_kv_heads": HEADS, "head_size": HEAD}
    return kind(**{**fields, "dtype": torch.float32, **changes})


def cache_config(*specs: Any, **changes: Any) -> Any:
    groups = [SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=spec) for spec in specs or (spec_of(),)]
    tensors = [SimpleNamespace(layers=["a", "b"], block_stride=PAGE)]
    fields = {"num_blocks": BLOCKS, "kv_cache_groups": groups, "kv_cache_tensors": tensors}
    return SimpleNamespace(**{**fields, "kv_cache_layout": "LBHNC", "hash_block_size": None, **changes})


def engine_config(model: str = "a-model", **changes: Any) -> Any:
    config = SimpleNamespace(to_dict=lambda: {"layers": 2}, _commit_hash=changes.pop("commit", None))
    fields = {"model": model, "revision": None, "dtype": torch.float32, "hf_config": config, "quantization": None}
    hashes = changes.pop("prefix_caching_hash_algo", "sha256")
    cache = SimpleNamespace(block_size=BLOCK, cache_dtype="auto", prefix_caching_hash_algo=hashes)
    parallel = SimpleNamespace(**changes.pop("parallel", {}))
    return SimpleNamespace(
        model_config=SimpleNamespace(**{**fields, **changes}), cache_config=cache, parallel_config=parallel
    )


def geometries(config: Any) -> tuple[Geometry, ...]:
    return geometries_of(config, SimpleNamespace(block_size=BLOCK))


def geometry_of(config: Any) -> Geometry:
    (geometry,) = geometries(config)
    return geometry


def fingerprint(vllm: Any, engine: Engine = ENGINE, config: Any = None, **extra: str) -> bytes:
    config = config or cache_config()
    return namespace_spec(vllm, config, geometry_of(config), engine, extra).fingerprint()


@pytest.mark.parametrize("version", ["0.32.0", "0.33.1rc2", "dev"])
def test_versions_of_the_range_are_taken(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.31.9", "0.34.0", "1.0"])
def test_other_versions_are_refused_with_the_range(version: str) -> None:
    with pytest.raises(BadRequest, match=r"0\.32 to 0\.33"):
        check_version(version)


def test_sliding_windows_are_groups_of_their_own() -> None:
    """A window of 40 is the next token and the 39 before it."""
    full, window = geometries(cache_config(spec_of(), spec_of(SlidingWindowSpec, sliding_window=40)))
    assert (full.window, window.window) == (0, 39)
    assert [full.needed_from(tokens) for tokens in (16, 4000)] == [0, 0]
    assert [window.needed_from(tokens) for tokens in (0, 16, 48, 54, 55, 64, 160)] == [0, 0, 0, 0, 16, 16, 112]


def test_of_a_chunk_is_needed_what_comes_before_the_next_token() -> None:
    """Nothing where the next token begins a chunk; a chunk may begin inside a block."""
    _, chunk = geometries(cache_config(spec_of(), spec_of(ChunkedLocalAttentionSpec, attention_chunk_size=64)))
    assert (chunk.is_local, chunk.window, chunk.chunk) == (True, 0, 64)
    assert [chunk.needed_from(tokens) for tokens in (0, 48, 64, 80, 112, 128)] == [0, 0, 64, 64, 64, 128]
    assert replace(chunk, chunk=40).needed_from(80) == 80
    assert replace(chunk, chunk=40).needed_from(96) == 80
    assert replace(chunk, chunk=40).needed_from(64) == 32


def test_models_that_cannot_be_kept_are_refused_with_what_to_do() -> None:
    with pytest.raises(LayoutError, match=r"MambaSpec.*disable-hybrid-kv-cache-manager"):
        geometries(cache_config(spec_of(), spec_of(MambaSpec)))
    with pytest.raises(LayoutError, match="MambaSpec"):
        geometries(cache_config(spec_of(MambaSpec)))
    for alone in (spec_of(SlidingWindowSpec, sliding_window=64), spec_of(ChunkedLocalAttentionSpec)):
        with pytest.raises(LayoutError, match="no layer has full attention"):
            geometries(cache_config(alone))
    mixed = SimpleNamespace(
        block_size=BLOCK, kv_cache_specs={"a": spec_of(), "b": spec_of(SlidingWindowSpec, sliding_window=65)}
    )
    with pytest.raises(LayoutError, match=r"look back \(0, 0\), \(64, 0\)"):
        geometries(cache_config(mixed))


@pytest.mark.parametrize("change", [{"is_eagle_group": True}, {"enable_kv_transfer": False}, {"host_resident": True}])
def test_special_groups_are_refused_beside_others_only(change: dict[str, bool]) -> None:
    config = cache_config(spec_of(), spec_of(SlidingWindowSpec, sliding_window=64))
    vars(config.kv_cache_groups[1]).update(change)
    with pytest.raises(LayoutError, match="of a kind that forebay does not keep"):
        geometries(config)
    alone = cache_config()
    vars(alone.kv_cache_groups[0]).update(change)
    assert len(geometries(alone)) == 1


def test_last_hash_of_a_block_is_its_name() -> None:
    geometry = geometry_of(cache_config(hash_block_size=8))
    hashes = [bytes([i]) * 32 for i in range(5)]
    assert geometry.hash_step == 2
    assert geometry.names_of(hashes, 0, 5) == [hashes[1], hashes[3]]
    assert geometry.names_of(hashes, 1, 2) == [hashes[3]]
    assert geometry.names_of(hashes, 2, 2) == []
    with pytest.raises(LayoutError, match="multiple"):
        geometry_of(cache_config(hash_block_size=12))


def test_layers_of_different_pages_lie_in_the_order_of_the_group() -> None:
    both = SimpleNamespace(
        block_size=BLOCK,
        kv_cache_specs={"b": spec_of(page_size_bytes=64), "a": spec_of(MLAAttentionSpec, page_size_bytes=32)},
    )
    geometry = geometry_of(cache_config(both))
    assert (geometry.layers, geometry.page_bytes, geometry.replicated) == (("a", "b"), (32, 64), False)
    assert geometry_of(cache_config(spec_of(MLAAttentionSpec))).replicated


def test_all_that_makes_bytes_differ_makes_the_namespace_differ(tmp_path: Path) -> None:
    """Two engines share blocks exactly when each of these agrees."""
    fp8 = cache_config(spec_of(dtype=torch.float8_e4m3fn))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    local = engine_config(str(folder))
    known = [
        fingerprint(engine_config()),
        fingerprint(engine_config("another")),
        fingerprint(engine_config(revision="r1")),
        fingerprint(engine_config(commit="c1")),
        fingerprint(engine_config(dtype=torch.bfloat16)),
        fingerprint(engine_config(quantization="fp8")),
        fingerprint(engine_config(prefix_caching_hash_algo="sha256_cbor")),
        fingerprint(engine_config(), config=fp8),
        fingerprint(engine_config(), config=cache_config(kv_cache_layout="BLHNC")),
        fingerprint(engine_config(), config=cache_config(spec_of(block_size=32))),
        fingerprint(engine_config(), config=cache_config(spec_of(num_kv_heads=1, head_size=16))),
        fingerprint(engine_config(), config=cache_config(spec_of(MLAAttentionSpec))),
        fingerprint(engine_config(), config=cache_config(hash_block_size=8)),
        fingerprint(engine_config(), revision="mine"),
        fingerprint(engine_config(), tenant_salt="secret"),
        fingerprint(local),
        *(
            fingerprint(engine_config(), replace(ENGINE, **change))
            for change in (
                {"version": "0.33.0"},
                {"device": "cuda"},
                {"packing": "amx"},
                {"hash_seed": "0"},
                {"ranks": 2},
                {"ranks": 2, "rank": 1},
            )
        ),
    ]
    group = geometry_of(cache_config())
    known += [
        namespace_spec(engine_config(), cache_config(), group, ENGINE, {}, name).fingerprint() for name in ("1", "2")
    ]
    (folder / "model.safetensors").write_bytes(b"others!!")
    known.append(fingerprint(local))
    assert len(set(known)) == len(known)
    assert fingerprint(engine_config(), replace(ENGINE, version="0.32.9")) == known[0]


def test_ranks_of_one_group_share_the_group_and_not_the_shard() -> None:
    specs = [
        namespace_spec(
            engine_config(), cache_config(), geometry_of(cache_config()), replace(ENGINE, rank=r, ranks=2), {}
        )
        for r in range(2)
    ]
    assert specs[0].group_fingerprint() == specs[1].group_fingerprint()
    assert specs[0].fingerprint() != specs[1].fingerprint()


def test_stages_of_a_pipeline_share_nothing() -> None:
    known = [fingerprint(engine_config(), replace(ENGINE, stage=stage, stages=2)) for stage in (0, 1)]
    assert len({*known, fingerprint(engine_config())}) == 3


def test_group_without_layers_on_a_stage_keeps_its_blocks_and_window() -> None:
    """Also where the group's layers are described one by one."""
    whole = spec_of(SlidingWindowSpec, sliding_window=3 * BLOCK)
    each = SimpleNamespace(block_size=BLOCK, kv_cache_specs={"c": whole, "d": whole})
    for spec in (whole, each):
        config = cache_config(spec_of(), spec)
        config.kv_cache_groups[1].layer_names = []
        _, empty = geometries(config)
        assert (empty.layers, empty.block_tokens, empty.window) == ((), BLOCK, 3 * BLOCK - 1)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("decode_context_parallel_size", "decode_context_parallel_size must be 1"),
        ("prefill_context_parallel_size", "prefill_context_parallel_size must be 1"),
        ("nnodes_within_dp", "one node"),
    ],
)
def test_ranks_that_share_out_tokens_or_are_elsewhere_are_refused(field: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        fingerprint(engine_config(parallel={field: 2}))


def test_unknown_hashes_are_refused() -> None:
    with pytest.raises(BadRequest, match="md5"):
        fingerprint(engine_config(prefix_caching_hash_algo="md5"))


@pytest.mark.parametrize("blocks_last", [False, True])
def test_table_is_of_the_memory_that_was_allocated(blocks_last: bool) -> None:
    """Fused pages, K and V on an axis before the blocks, and kernels with smaller blocks: one table describes each."""
    shape = (2, BLOCKS, BLOCK, HEADS, HEAD) if blocks_last else (BLOCKS, HEADS, BLOCK, 2 * HEAD)
    config = cache_config(kv_cache_tensors=[SimpleNamespace(layers=["a", "b"], block_stride=0)])
    tensors = {name: torch.zeros(shape) for name in ("a", "b")}
    table = segment_table(layer_pages(tensors, geometry_of(config), config), geometry_of(config))
    assert (table.blocks, table.block_bytes, table.writable) == (BLOCKS, 2 * PAGE, True)


def test_smaller_blocks_of_the_kernels_are_joined() -> None:
    tensors = {name: torch.arange(BLOCKS * 2 * 4).reshape(BLOCKS * 2, 4) for name in ("a", "b")}
    geometry = geometry_of(cache_config(spec_of(page_size_bytes=64)))
    config = cache_config(kv_cache_tensors=[SimpleNamespace(layers=["a", "b"], block_stride=64)])
    pages = layer_pages(tensors, geometry, config)
    assert pages[0].shape == (BLOCKS, 2, 4)
    assert segment_table(layer_pages(tensors, geometry, config), geometry).blocks == BLOCKS


def test_memory_other_than_planned_is_refused() -> None:
    config, geometry = cache_config(), geometry_of(cache_config())
    good = torch.zeros((BLOCKS, PAGE // 4))
    for tensors, words in (
        ({"a": good}, "no cache for b"),
        ({"a": good, "b": torch.zeros((BLOCKS + 1, PAGE // 4))}, "no axis"),
        ({"a": good, "b": torch.zeros((BLOCKS, PAGE // 2))}, "no axis"),
        ({"a": good, "b": torch.zeros((BLOCKS, PAGE // 2))[:, : PAGE // 4]}, "no axis"),
        ({"a": good, "b": [good, good]}, "several tensors"),
    ):
        with pytest.raises(LayoutError, match=words):
            segment_table(layer_pages(tensors, geometry, config), geometry)
    loose = cache_config(kv_cache_tensors=[])
    with pytest.raises(LayoutError, match="vLLM planned"):
        segment_table(layer_pages({"a": good, "b": torch.zeros((BLOCKS, PAGE // 2))}, geometry, loose), geometry)
