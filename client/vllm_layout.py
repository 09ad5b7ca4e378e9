"""What vLLM's paged KV cache is made of, as forebay needs to know it: geometry, namespace, segment table.

The scheduler's process has to name the namespace before any worker has allocated a byte, so the geometry comes from
vLLM's own `KVCacheConfig`, which both sides are given, and each worker then compares it with the tensors it really got.
Nothing here imports vLLM or torch: its objects are read by their attributes, which keeps the rules testable without it.

A hybrid model's layers are in several cache groups, each with a geometry and a namespace of its own. Full attention,
sliding windows and chunks are taken; recurrent state, windows without any full attention and what only parts of vLLM
know how to load are refused at start-up.

Pipeline stages hold different layers, perhaps not as many, so each stage has namespaces of its own too, and a block
counts when all stages have theirs. One namespace with a shard for each stage was rejected: shards are equally long.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.client.segments import SegmentTable
from forebay.kvstore.errors import BadRequest, LayoutError
from forebay.kvstore.namespace import NamespaceSpec

VERSION_MIN = (0, 32)
VERSION_MAX = (0, 33)
"""Minor releases of vLLM whose connector interface and layouts this was written against."""

FULL_ATTENTION = frozenset(("FullAttentionSpec", "MLAAttentionSpec"))
SLIDING_WINDOW = "SlidingWindowSpec"
CHUNKED = "ChunkedLocalAttentionSpec"
REPLICATED = "MLAAttentionSpec"
HASH_BYTES = {"sha256": 32, "sha256_cbor": 32, "xxhash": 16, "xxhash_cbor": 16}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".json")


def check_version(version: str) -> None:
    """Raise BadRequest outside the supported range; a text that names no release is taken as it is."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        return
    found = int(match[1]), int(match[2])
    if not VERSION_MIN <= found <= VERSION_MAX:
        low, high = (".".join(map(str, bound)) for bound in (VERSION_MIN, VERSION_MAX))
        raise BadRequest(f"vLLM {version} is not supported: forebay's connector knows {low} to {high}")


@dataclass(frozen=True, slots=True)
class Geometry:
    """One block of one cache group of one rank.

    Attributes:
        layers: names of the layers, in the order in which their pages lie in a slot.
        page_bytes: bytes of each layer's page.
        block_tokens: tokens in a block.
        hash_step: how many of the engine's block hashes make one block; its name is the last of them.
        kinds: class, heads, head size and element type of each layer's cache, in words.
        replicated: every tensor parallel rank holds the same bytes.
        window: tokens before the next one that the layers still look at; 0: all.
        chunk: tokens of the pieces that a prompt is cut into, where the layers look at the next token's piece only.
    """

    layers: tuple[str, ...]
    page_bytes: tuple[int, ...]
    block_tokens: int
    hash_step: int
    kinds: tuple[str, ...]
    replicated: bool
    window: int = 0
    chunk: int = 0

    @property
    def is_local(self) -> bool:
        """The layers look at the end of a prompt only."""
        return bool(self.window or self.chunk)

    @classmethod
    def of(cls, group: Any, hash_tokens: int) -> Geometry:
        """Of one of vLLM's cache groups, of which a pipeline stage may have no layer.

        Raises LayoutError: what cannot be kept block by block.
        """
        names = tuple(group.layer_names)
        whole = group.kv_cache_spec
        per_layer: Mapping[str, Any] = getattr(whole, "kv_cache_specs", None) or dict.fromkeys(names, whole)
        specs = [per_layer[name] for name in names]
        reaches = {_reach(name, spec) for name, spec in (per_layer or {"of another stage": whole}).items()}
        if len(reaches) != 1:
            raise LayoutError(f"layers of one group look back {', '.join(map(str, sorted(reaches)))} (window, chunk)")
        tokens = int(whole.block_size)
        if tokens % hash_tokens:
            raise LayoutError(f"blocks of {tokens} tokens are no multiple of the {hash_tokens} tokens that are hashed")
        return cls(
            names,
            tuple(int(spec.page_size_bytes) for spec in specs),
            tokens,
            tokens // hash_tokens,
            tuple(map(_kind, specs)),
            all(type(spec).__name__ == REPLICATED for spec in specs),
            *reaches.pop(),
        )

    def names_of(self, block_hashes: Sequence[bytes], first: int, last: int) -> list[bytes]:
        """The names of blocks `first` to `last`, the latter not included, as far as the engine's hashes go."""
        step = self.hash_step
        return list(block_hashes[(first + 1) * step - 1 : last * step : step])

    def needed_from(self, computed_tokens: int) -> int:
        """The token with which the first block begins that is looked at once so many tokens are computed."""
        first = 0
        if self.window:
            first = max(0, computed_tokens - self.window)
        elif self.chunk:
            first = computed_tokens // self.chunk * self.chunk
        return first // self.block_tokens * self.block_tokens


def geometries_of(kv_cache_config: Any, cache_config: Any) -> tuple[Geometry, ...]:
    """One for each cache group, in vLLM's order. Raises LayoutError: what cannot be kept, with what to do about it."""
    groups = list(kv_cache_config.kv_cache_groups)
    hashed = int(getattr(kv_cache_config, "hash_block_size", None) or cache_config.block_size)
    try:
        geometries = tuple(Geometry.of(group, hashed) for group in groups)
    except LayoutError as error:
        if len(groups) == 1:
            raise
        raise LayoutError(f"{error}; --disable-hybrid-kv-cache-manager may make full attention of it") from error
    if all(geometry.is_local for geometry in geometries):
        raise LayoutError("no layer has full attention; forebay keeps windows and chunks only beside such")
    if len(groups) > 1:
        for group in groups:
            _refuse_special(group)
    return geometries


def _refuse_special(group: Any) -> None:
    """Groups beside others that vLLM fills, resumes or shortens in ways of their own."""
    if (
        getattr(group, "is_eagle_group", False)
        or getattr(group, "host_resident", False)
        or not getattr(group, "enable_kv_transfer", True)
        or getattr(group.kv_cache_spec, "prefix_replay_tokens", 0)
    ):
        raise LayoutError(f"the cache group of layers {group.layer_names} is of a kind that forebay does not keep")


def _reach(layer: str, spec: Any) -> tuple[int, int]:
    """A layer's window and chunk, see `Geometry`. Raises LayoutError."""
    kind = type(spec).__name__
    if kind in FULL_ATTENTION:
        return 0, 0
    if kind == CHUNKED:
        return 0, int(spec.attention_chunk_size)
    if kind == SLIDING_WINDOW:
        return max(1, int(spec.sliding_window) - 1 + int(getattr(spec, "extra_retained_tokens", 0) or 0)), 0
    raise LayoutError(f"layer {layer} keeps {kind}; forebay keeps full attention, MLA, sliding windows and chunks only")


def _kind(spec: Any) -> str:
    fields = ("num_kv_heads", "head_size", "head_size_v", "sliding_window", "attention_chunk_size", "cache_dtype_str")
    shown = [f"{name}={value}" for name in fields if (value := getattr(spec, name, None)) is not None]
    return f"{type(spec).__name__}({','.join(shown)},{spec.dtype})"


@dataclass(frozen=True, slots=True)
class Engine:
    """What beside the geometry decides whether two engines' blocks are the same bytes.

    Attributes:
        version: vLLM's; layouts change between minor releases, so the first two numbers enter the layout.
        device: ``cpu``, ``cuda``, ...
        packing: how the device's attention packs a page, such as the instruction set on CPUs.
        hash_seed: what the engine's chain of block hashes starts from.
        rank, ranks: of the tensor parallel group.
        stage, stages: of the pipeline.
    """

    version: str
    device: str
    packing: str
    hash_seed: str
    rank: int
    ranks: int
    stage: int = 0
    stages: int = 1


def namespace_spec(
    vllm_config: Any,
    kv_cache_config: Any,
    geometry: Geometry,
    engine: Engine,
    extra: Mapping[str, str],
    group: str = "",
) -> NamespaceSpec:
    """The namespace of one rank's blocks of one cache group, which `group` names where there are several.

    `extra` may override ``model`` and ``revision`` and set ``tenant_salt``.

    Raises BadRequest: hashes of an unknown algorithm, or parallelism that splits a block in other ways.
    """
    refuse_unsupported(vllm_config.parallel_config)
    model, cache = vllm_config.model_config, vllm_config.cache_config
    algorithm = str(cache.prefix_caching_hash_algo)
    if algorithm not in HASH_BYTES:
        raise BadRequest(f"prefix_caching_hash_algo {algorithm!r} is none of {', '.join(HASH_BYTES)}")
    layout = (
        "vllm-" + ".".join(engine.version.split(".")[:2]),
        engine.device,
        engine.packing,
        str(getattr(kv_cache_config, "kv_cache_layout", None)),
        _attention(vllm_config),
        _digest(geometry.kinds),
        *([group] if group else []),
    )
    spec = NamespaceSpec(
        model=extra.get("model") or str(model.model),
        revision=f"{extra.get('revision') or _revision(model)}/{_config_digest(model)}",
        dtype=f"{model.dtype}/{cache.cache_dtype}".replace("torch.", ""),
        block_tokens=geometry.block_tokens,
        segment_bytes=geometry.page_bytes,
        layout="/".join(layout),
        shard_rank=engine.rank,
        shard_size=engine.ranks,
        shard_kind="replicated" if geometry.replicated else "sharded",
        kv_group=f"stage-{engine.stage}-of-{engine.stages}" if engine.stages > 1 else "",
        tenant_salt=extra.get("tenant_salt", "").encode(),
        hash_scheme=f"vllm-{algorithm}-{_digest([engine.hash_seed])}-{geometry.hash_step}",
        hash_bytes=HASH_BYTES[algorithm],
    )
    spec.validate()
    return spec


def refuse_unsupported(parallel: Any) -> None:
    """Raise BadRequest where a block is not one part per rank, and all ranks of one node's daemon."""
    for field in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if int(getattr(parallel, field, 1) or 1) != 1:
            raise BadRequest(f"{field} must be 1 with forebay: ranks that share out a block's tokens are not kept")
    if int(getattr(parallel, "nnodes_within_dp", 1) or 1) != 1:
        raise BadRequest("the ranks of an engine must be on one node with forebay: they share one daemon")


def segment_table(pages: Sequence[Any], geometry: Geometry) -> SegmentTable:
    """The table of each layer's pages. Raises LayoutError where they are not what vLLM had planned."""
    for name, page, size in zip(geometry.layers, pages, geometry.page_bytes, strict=True):
        found = SegmentTable.of(page).block_bytes
        if found != size:
            raise LayoutError(f"layer {name} holds {found} bytes a block; vLLM planned {size}")
    table = SegmentTable.of(list(pages))
    table.check_layout(geometry.page_bytes)
    table.check_writable()
    return table


def layer_pages(kv_caches: Mapping[str, Any], geometry: Geometry, kv_cache_config: Any) -> list[Any]:
    """Each layer's tensor as a view with blocks on axis 0, in the order of the slot. Raises LayoutError."""
    strides = {
        layer: int(tensor.block_stride)
        for tensor in kv_cache_config.kv_cache_tensors
        for layer in tensor.layers
        if getattr(tensor, "block_stride", 0)
    }
    missing = [name for name in geometry.layers if name not in kv_caches]
    if missing:
        raise LayoutError(f"vLLM registered no cache for {', '.join(missing[:3])}")
    blocks = int(kv_cache_config.num_blocks)
    return [_pages(name, kv_caches[name], blocks, strides.get(name, 0)) for name in geometry.layers]


def _pages(name: str, tensor: Any, blocks: int, block_stride: int) -> Any:
    """Where the kernels' blocks are smaller than the manager's, several of theirs are one of ours."""
    if isinstance(tensor, (list, tuple)):
        raise LayoutError(f"layer {name} keeps several tensors; forebay keeps attention caches only")
    item = int(tensor.element_size())
    candidates = [
        (axis, length // blocks)
        for axis, length in enumerate(tensor.shape)
        if length >= blocks and length % blocks == 0
        and (not block_stride or int(tensor.stride(axis)) * item * (length // blocks) == block_stride)
    ]  # fmt: skip
    if len({axis for axis, _ in candidates}) > 1:
        candidates = [found for found in candidates if found[1] == 1] or candidates
    if not candidates:
        raise LayoutError(
            f"layer {name}: no axis of {tuple(tensor.shape)} with strides {tuple(tensor.stride())} counts {blocks} "
            f"blocks {block_stride} bytes apart"
        )
    axis, split = candidates[0]
    if split > 1:
        tensor = tensor.unflatten(axis, (blocks, split))
    return tensor.movedim(axis, 0)


def _attention(vllm_config: Any) -> str:
    backend = getattr(getattr(vllm_config, "attention_config", None), "backend", None)
    return str(getattr(backend, "name", backend) or "auto")


def _revision(model: Any) -> str:
    """The hub's commit where the config has one; of a local directory the names, sizes and times of its files."""
    commit = getattr(model.hf_config, "_commit_hash", None) or getattr(model, "revision", None)
    if commit:
        return str(commit)
    folder = Path(str(model.model))
    if not folder.is_dir():
        return "unnamed"
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)
    return "files-" + _digest([f"{path.name}:{(s := path.stat()).st_size}:{s.st_mtime_ns}" for path in files])


def _config_digest(model: Any) -> str:
    values = {key: value for key, value in model.hf_config.to_dict().items() if key != "_name_or_path"}
    return _digest([json.dumps(values, sort_keys=True, default=str), str(getattr(model, "quantization", None))])


def _digest(texts: Sequence[str]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(len(text).to_bytes(4, "little") + text.encode())
    return total.hexdigest()[:32]
