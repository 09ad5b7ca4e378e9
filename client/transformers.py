"""A prefix cache for Hugging Face transformers' `generate`: `DynamicCache` in and out, block by block.

`PrefixCache.generate` looks up the longest stored prefix of the prompt, copies its blocks straight into the
tensors of a `DynamicCache`, lets `model.generate` compute the rest, and stores the new whole blocks of prompt and
answer, so that the next turn of the conversation finds them in any process. The last token of a prompt is always
computed: its logits are what generation starts from.

Rejected: deducing the KV geometry from the model's config (field names differ between architectures; one token is
run through the model instead and the cache it leaves is measured), and sampling the weights for the fingerprint (an
edit of one matrix would share another model's blocks; hashing all of them costs less than loading them).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from forebay.client.copier import LEGACY_STREAM
from forebay.client.hints import NO_HINTS, HintClient, Hints, tell
from forebay.client.results import FetchResult, LookupResult, StoreResult
from forebay.client.segments import SegmentTable
from forebay.kvstore.errors import ForebayError, LayoutError
from forebay.kvstore.hashing import PrefixHasher
from forebay.kvstore.namespace import NamespaceSpec

try:
    import torch
    import transformers
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer
    from transformers.generation.streamers import BaseStreamer
    from transformers.modeling_outputs import CausalLMOutputWithPast
except ImportError as error:
    raise ImportError(
        f"forebay.client.transformers needs torch and transformers ({error}): pip install 'forebay[transformers]'"
    ) from error

BLOCK_TOKENS = 16

CACHE_ARGUMENT = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""What transformers calls the cache in its arguments and outputs: `cache` from 5.24 on."""

_log = logging.getLogger("forebay.client")

_HASH_THREADS = 4
_HASH_CHUNK_BYTES = 64 << 20
# Fields of a config that say nothing about keys and values.
_VOLATILE_CONFIG = frozenset(
    (
        "_name_or_path",
        "architectures",
        "dtype",
        "id2label",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "use_cache",
    )
)
_LENGTH_DEPENDENT_ROPE = frozenset(("dynamic", "longrope"))
# Arguments of `generate` that do not change the KV of a token, beside the fields of GenerationConfig.
_HARMLESS_ARGUMENTS = frozenset(
    (
        "attention_mask",
        "generation_config",
        "logits_processor",
        "logits_to_keep",
        "prefix_allowed_tokens_fn",
        "stopping_criteria",
        "streamer",
        "tokenizer",
        "use_model_defaults",
    )
)


class UnsupportedModel(LayoutError):
    """The model's KV cache cannot be kept in blocks of tokens; the text says which part cannot."""


class CacheClient(HintClient, Protocol):
    """What `PrefixCache` asks of a client; `forebay.client.Client` is one."""

    def open_namespace(self, spec: NamespaceSpec) -> Any: ...

    def lookup(self, ns: Any, hashes: Sequence[bytes]) -> LookupResult: ...

    def fetch(
        self, ns: Any, hashes: Sequence[bytes], destination: SegmentTable, *, stream: int | None = LEGACY_STREAM
    ) -> FetchResult: ...

    def store(
        self,
        ns: Any,
        hashes: Sequence[bytes],
        source: SegmentTable,
        *,
        priority: int = 0,
        stream: int | None = LEGACY_STREAM,
    ) -> StoreResult: ...

    def prepare(self, device: int) -> None:
        """See `forebay.client.Client.prepare`; asked only where the model is on a GPU."""
        ...

    def report_prefill(self, tokens: int, depth_tokens: int, seconds: float) -> bool: ...


@dataclass(slots=True)
class Report:
    """What one `generate` call did; filled in as it goes.

    Attributes:
        restored_tokens: prompt tokens whose KV came from forebay.
        computed_tokens: prompt tokens that the model read, never 0.
        ttft_s: from the call to the first token, hashing, lookup and fetch included; where tokens cannot be
            streamed (beams) to the end of generation.
        fetch_s: copying and verifying alone; lookup_s and store_s likewise.
        bypassed: why the cache was not used, empty when it was.
        rejected_blocks: blocks offered and not stored: no room, or no daemon.
        failure: which client call came to less than it should have and why, empty for none; the output is right
            all the same.
    """

    prompt_tokens: int = 0
    restored_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    lookup_s: float = 0.0
    fetch_s: float = 0.0
    ttft_s: float = 0.0
    generate_s: float = 0.0
    store_s: float = 0.0
    restored_blocks: int = 0
    restored_bytes: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0
    rejected_blocks: int = 0
    bypassed: str = ""
    failure: str = ""

    @property
    def gb_per_s(self) -> float:
        """Rate of the fetch, 0 when nothing was fetched."""
        return self.restored_bytes / self.fetch_s / 1e9 if self.fetch_s else 0.0


class PrefixCache:
    """Gives `model.generate` the KV of prompts that any engine of the same namespace has computed before.

    Sequences are handled one at a time. What the cache cannot serve (a batch of several, beams, padding, a model
    input other than token ids, another cache implementation) runs as plain `generate`, and the report says why.
    Not for calls from several threads at once.

    Args:
        client: a `forebay.client.Client`, or anything shaped like `CacheClient`.
        model: a causal language model in evaluation mode whose layers all use full attention.
        block_tokens: tokens in a block. Fewer restore more of a prompt's end, more copy faster.
        name: the model's name in status and metrics; engines that give different ones share nothing.
        revision: the operator's name for these exact weights; empty = a SHA-256 over all of them, which
            takes about 1 s per GB and core once.
        tenant_salt: secret that keeps tenants apart.
    Raises:
        UnsupportedModel: sliding-window, quantized, static, recurrent or other layers, an encoder, an adapter,
            or rotary embeddings that depend on the length of the sequence.
    """

    def __init__(
        self,
        client: CacheClient,
        model: Any,
        *,
        block_tokens: int = BLOCK_TOKENS,
        name: str = "",
        revision: str = "",
        tenant_salt: bytes = b"",
    ) -> None:
        _refuse_unsupported(model)
        self._client = client
        self._model = model
        self._geometry = _measure(model, block_tokens)
        self._cuda = _usable_cuda(client, self._geometry.planes)
        self._weights_stamp = _weights_stamp(model)
        self.spec = NamespaceSpec(
            model=name or _model_name(model),
            revision=revision or weights_fingerprint(model),
            dtype=str(self._geometry.dtype).removeprefix("torch."),
            block_tokens=block_tokens,
            segment_bytes=self._geometry.segment_bytes(),
            layout=f"transformers-{transformers.__version__}/{model.config._attn_implementation}/HND/"
            f"{self._geometry.describe()}",
            tenant_salt=tenant_salt,
        )
        self.spec.validate()
        self._hasher = PrefixHasher(self.spec)
        self._ns: Any = None

    def generate(self, input_ids: Any, *, hints: Hints = NO_HINTS, **generate_kwargs: Any) -> tuple[Any, Report]:
        """`model.generate` with the prompt's stored prefix restored first and new blocks stored after.

        Args:
            input_ids: int64 (1, tokens).
            hints: what the caller knows of the prompt and its answer: told to the daemon when both are stored.
            generate_kwargs: passed on to `model.generate`.
        Returns:
            What `model.generate` returns, and a report. Errors of the client never surface here; those of
            `model.generate` do.
        Blocking: for the generation, and after it for the copy of the new blocks.
        """
        begun = time.perf_counter()
        report = Report(prompt_tokens=int(input_ids.shape[-1]))
        report.bypassed = self._bypass_reason(input_ids, generate_kwargs)
        if report.bypassed:
            return self._run(input_ids, generate_kwargs, report, begun), report
        prompt = input_ids[0].tolist()
        hashes = self._hasher.hashes(prompt)
        cache = self._restore(hashes[: (len(prompt) - 1) // self.spec.block_tokens], report)
        output = self._run(input_ids, {**generate_kwargs, CACHE_ARGUMENT: cache}, report, begun)
        sequence = _sequences(output)[0].tolist()
        hashes = self._store(cache, sequence, hashes, report, hints.priority)
        if hints.has_ending and hashes and self._ns is not None:
            told = tell(self._client, self._ns, hashes, hints, hints.keep_tokens // self.spec.block_tokens)
            report.failure = report.failure if told else "hints: not told"
        return output, report

    def _bypass_reason(self, input_ids: Any, kwargs: Mapping[str, Any]) -> str:
        reason = _input_reason(input_ids, kwargs, self._model) or _config_reason(kwargs, self._model)
        if reason:
            return reason
        if self._model.training:
            return "the model is in training mode"
        if self._weights_stamp != _weights_stamp(self._model):
            return "the weights changed after this PrefixCache was made"
        return ""

    def _restore(self, hashes: list[bytes], report: Report) -> Any:
        """A DynamicCache holding the stored and verified head of `hashes`, empty when there is none."""
        cache = DynamicCache(config=self._model.config)
        if not hashes or not self._attached(report):
            return cache
        try:
            begun = time.perf_counter()
            present = self._client.lookup(self._ns, hashes).worth_loading
            report.lookup_s = time.perf_counter() - begun
            if present == 0:
                return cache
            tensors = self._geometry.allocate(present, self._cuda)
            begun = time.perf_counter()
            table = self._geometry.table(tensors, self._cuda)
            fetched = self._client.fetch(self._ns, hashes[:present], table, stream=self._stream())
            report.fetch_s = time.perf_counter() - begun
        except ForebayError as error:
            report.failure = f"restore: {type(error).__name__}: {error}"
            return cache
        report.failure = f"fetch: {fetched.reason}" if fetched.reason else ""
        blocks = fetched.blocks
        if blocks == 0:
            return cache
        self._geometry.fill(cache, tensors, blocks)
        report.restored_blocks = blocks
        report.restored_tokens = blocks * self.spec.block_tokens
        report.restored_bytes = blocks * self.spec.block_bytes
        return cache

    def _run(self, input_ids: Any, kwargs: Mapping[str, Any], report: Report, begun: float) -> Any:
        report.computed_tokens = report.prompt_tokens - report.restored_tokens
        clock = None
        options = dict(kwargs)
        if _setting(kwargs, self._model, "num_beams") in (None, 1):
            clock = options["streamer"] = _FirstToken(options.get("streamer"))
        started = time.perf_counter()
        output = self._model.generate(input_ids, **options)
        ended = time.perf_counter()
        report.generate_s = ended - begun
        first_token_at = clock.first_token_at if clock and clock.first_token_at else None
        report.ttft_s = (first_token_at or ended) - begun
        if first_token_at:
            self._tell(report, first_token_at - started)
        report.generated_tokens = int(_sequences(output).shape[-1]) - report.prompt_tokens
        return output

    def _tell(self, report: Report, prefill_s: float) -> None:
        """The daemon plans by what it is told; a failure to tell it costs nobody anything."""
        if self._ns is not None and not report.bypassed:
            try:
                self._client.report_prefill(report.computed_tokens, report.restored_tokens, prefill_s)
            except ForebayError as error:
                report.failure = report.failure or f"report: {type(error).__name__}: {error}"

    def _store(
        self, cache: Any, sequence: list[int], hashes: list[bytes], report: Report, priority: int
    ) -> list[bytes]:
        """Offer all whole blocks of `cache`; the daemon says which of them it lacks, only those are copied.

        `hashes` are the prompt's; returns those of all of them.
        """
        tokens = sequence[: cache.get_seq_length()]
        known = len(hashes) * self.spec.block_tokens
        hashes = hashes + self._hasher.hashes(tokens[known:], parent=hashes[-1] if hashes else b"")
        hashes = hashes[: len(tokens) // self.spec.block_tokens]
        if not hashes or not self._attached(report):
            return hashes
        begun = time.perf_counter()
        try:
            planes = [plane for layer in cache.layers for plane in (layer.keys, layer.values)]
            table = self._geometry.table(planes, self._cuda)
            stored = self._client.store(self._ns, hashes, table, priority=priority, stream=self._stream())
            report.stored_blocks, report.rejected_blocks = stored.committed, stored.rejected
            report.failure = f"store: {stored.reason}" if stored.reason else report.failure
        except ForebayError as error:
            report.failure = f"store: {type(error).__name__}: {error}"
        report.stored_bytes = report.stored_blocks * self.spec.block_bytes
        report.store_s = time.perf_counter() - begun
        return hashes

    def _stream(self) -> int:
        """The CUDA stream that the model runs on, by handle."""
        return LEGACY_STREAM if self._cuda is None else int(torch.cuda.current_stream(self._cuda).cuda_stream)

    def _attached(self, report: Report) -> bool:
        if self._ns is None:
            try:
                self._ns = self._client.open_namespace(self.spec)
            except ForebayError as error:
                report.failure = f"open_namespace: {type(error).__name__}: {error}"
        return self._ns is not None


def weights_fingerprint(model: Any) -> str:
    """Hex SHA-256 over the config and every parameter and buffer (name, dtype, shape, all bytes) of `model`.

    Two processes agree exactly when they run the same weights with the same config. Buffers count because some
    (rotary frequencies) are not in the config as such. Blocks for about 1 s per GB and core.
    """
    tensors = sorted([*model.named_parameters(), *model.named_buffers()], key=lambda item: item[0])
    with ThreadPoolExecutor(_HASH_THREADS, "forebay-fingerprint") as pool:
        digests = list(pool.map(_tensor_digest, (tensor for _, tensor in tensors)))
    total = hashlib.sha256(_config_bytes(model.config))
    for (name, _), digest in zip(tensors, digests, strict=True):
        total.update(len(name).to_bytes(4, "little") + name.encode() + digest)
    return total.hexdigest()


def _tensor_digest(tensor: Any) -> bytes:
    shape = ",".join(map(str, tensor.shape))
    digest = hashlib.sha256(f"{tensor.dtype}[{shape}]".encode())
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for part in torch.split(flat, _HASH_CHUNK_BYTES):
        digest.update(part.cpu().numpy().data)
    return digest.digest()


def _config_bytes(config: Any) -> bytes:
    """The config as canonical JSON, without what says nothing about keys and values."""
    values = {key: value for key, value in config.to_dict().items() if key not in _VOLATILE_CONFIG}
    return json.dumps(values, sort_keys=True, default=str).encode()


def _model_name(model: Any) -> str:
    """Never a path: two engines that hold the same weights in two directories share their blocks."""
    return f"{model.config.model_type}-{model.num_parameters()}"


def _weights_stamp(model: Any) -> int:
    """Changes when a parameter is replaced or written in place by torch (not through ``.data`` or numpy)."""
    return hash(tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters()))


def _refuse_unsupported(model: Any) -> None:
    config = model.config
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{config.model_type} is an encoder-decoder: its cache depends on the encoder's input")
    if getattr(model, "peft_config", None):
        raise UnsupportedModel("the model has adapters, which its weights do not show: merge them first")
    if model.training:
        raise UnsupportedModel("the model is in training mode: call model.eval() first")
    implementation = model.generation_config.cache_implementation
    if implementation not in (None, "dynamic"):
        raise UnsupportedModel(f"the model's generation config asks for a {implementation} cache")
    rope = getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for kind in _rope_kinds(rope):
        if kind in _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedModel(f"{kind} rotary embeddings give a prefix other keys when more text follows it")
    _refuse_layers(DynamicCache(config=config).layers)


def _rope_kinds(rope: Mapping[str, Any]) -> Iterable[str]:
    """`rope_parameters` is one table, or one per layer type."""
    tables = [rope, *(table for table in rope.values() if isinstance(table, Mapping))]
    return [table["rope_type"] for table in tables if "rope_type" in table]


def _refuse_layers(layers: Iterable[Any]) -> None:
    for index, layer in enumerate(layers):
        if type(layer) is not DynamicLayer:
            raise UnsupportedModel(f"layer {index} keeps a {type(layer).__name__}, only plain DynamicLayer is served")


def _input_reason(input_ids: Any, kwargs: Mapping[str, Any], model: Any) -> str:
    """Why these model inputs cannot use the cache: a prefix hash covers token ids and nothing else."""
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        return f"input_ids of shape {tuple(input_ids.shape)}: one sequence at a time"
    allowed = _HARMLESS_ARGUMENTS | vars(model.generation_config).keys()
    strange = sorted(key for key, value in kwargs.items() if value is not None and key not in allowed)
    if strange:
        return f"argument {strange[0]} may change keys and values"
    mask = kwargs.get("attention_mask")
    if mask is not None:
        return "" if mask.shape == input_ids.shape and bool((mask == 1).all()) else "padding in attention_mask"
    pad = _setting(kwargs, model, "pad_token_id")
    if pad is not None and bool((input_ids == pad).any()):
        return "the padding token in a prompt without attention_mask"
    return ""


def _config_reason(kwargs: Mapping[str, Any], model: Any) -> str:
    """Why this way of generating cannot use the cache."""
    for name in ("num_beams", "num_return_sequences"):
        if (_setting(kwargs, model, name) or 1) != 1:
            return f"{name} above 1"
    if _setting(kwargs, model, "use_cache") is False:
        return "use_cache is off"
    if _setting(kwargs, model, "cache_implementation") not in (None, "dynamic"):
        return "another cache implementation"
    for name in ("prefill_chunk_size", "prompt_lookup_num_tokens", "guidance_scale", "token_healing"):
        if _setting(kwargs, model, name) not in (None, False, 1.0):
            return f"{name} is set"
    return ""


def _setting(kwargs: Mapping[str, Any], model: Any, name: str) -> Any:
    """A generation setting by transformers' precedence: argument, `generation_config` argument, the model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    config = kwargs.get("generation_config")
    value = getattr(config, name, None) if config is not None else None
    return value if value is not None else getattr(model.generation_config, name, None)


def _sequences(output: Any) -> Any:
    return output if isinstance(output, torch.Tensor) else output.sequences


class _FirstToken(BaseStreamer):
    """Notes when the first generated token arrives (`generate` puts the prompt first); feeds the caller's streamer."""

    def __init__(self, streamer: Any) -> None:
        self.first_token_at = 0.0
        self._puts = 0
        self._streamer = streamer

    def put(self, value: Any) -> None:
        self._puts += 1
        if self._puts == 2:
            self.first_token_at = time.perf_counter()
        if self._streamer is not None:
            self._streamer.put(value)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


@dataclass(frozen=True, slots=True)
class _Plane:
    """The keys, or the values, of one layer: (1, heads, tokens, head_dim) on `device`."""

    heads: int
    head_dim: int
    device: Any


@dataclass(frozen=True, slots=True)
class _Geometry:
    """Where a block's bytes lie in a DynamicCache: plane by plane (each layer's keys, then values), head by head.

    A head's tokens are contiguous in a cache's tensor, so each head of each plane is one segment.
    """

    planes: tuple[_Plane, ...]
    dtype: Any
    block_tokens: int

    def describe(self) -> str:
        """Heads x head_dim of the planes, runs of equal ones counted: ``60*(3x64)``."""
        runs = [(key, len(list(group))) for key, group in groupby((p.heads, p.head_dim) for p in self.planes)]
        return "+".join(f"{count}*({heads}x{dim})" for (heads, dim), count in runs)

    def segment_bytes(self) -> tuple[int, ...]:
        """Bytes of each segment of a block."""
        token_bytes = [self.dtype.itemsize * plane.head_dim for plane in self.planes for _ in range(plane.heads)]
        return tuple(self.block_tokens * size for size in token_bytes)

    def allocate(self, blocks: int, cuda: Any) -> list[Any]:
        """Tensors of `blocks` blocks, one per plane, in one allocation that lives as long as any of them.

        On `cuda`, or in host memory: there made by numpy, which asks the kernel for huge pages where torch does not:
        filling fresh 4 KiB pages costs several times the copy itself in page faults.
        """
        tokens = blocks * self.block_tokens
        shapes = [(1, plane.heads, tokens, plane.head_dim) for plane in self.planes]
        counts = [math.prod(shape) for shape in shapes]
        if cuda is None:
            memory = torch.from_numpy(np.empty(sum(counts) * self.dtype.itemsize, np.uint8)).view(self.dtype)
        else:
            memory = torch.empty(sum(counts), dtype=self.dtype, device=cuda)
        parts = torch.split(memory, counts)
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def table(self, tensors: Sequence[Any], cuda: Any) -> SegmentTable:
        """Where blocks lie in `tensors`, one per plane.

        Those in host memory or on `cuda` are used in place, others copied to host memory first.
        """
        there = tensors if cuda is not None else [tensor.cpu() for tensor in tensors]
        return SegmentTable.of(list(there), token_axis=2, block_tokens=self.block_tokens)

    def fill(self, cache: Any, tensors: Sequence[Any], blocks: int) -> None:
        """Make the first `blocks` blocks of `tensors` the content of `cache`, moved to its devices."""
        tokens = blocks * self.block_tokens
        for index, layer in enumerate(cache.layers):
            keys, values = (
                tensors[plane][:, :, :tokens].to(self.planes[plane].device) for plane in (2 * index, 2 * index + 1)
            )
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values


def _usable_cuda(client: CacheClient, planes: Sequence[_Plane]) -> Any:
    """The CUDA device that holds all planes, if the client can move its blocks; else None: by way of host memory."""
    devices = {plane.device for plane in planes}
    device = devices.pop()
    if devices or device.type != "cuda":
        return None
    try:
        client.prepare(int(device.index or 0))
    except ForebayError as error:
        _log.warning("blocks go by way of host memory: %s", error)
        return None
    return device


def _measure(model: Any, block_tokens: int) -> _Geometry:
    """Run one token through `model` and read the shapes off the cache it leaves."""
    cache: Any = DynamicCache(config=model.config)
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    with torch.no_grad():
        model(input_ids=token, use_cache=True, **{CACHE_ARGUMENT: cache})
    _refuse_layers(cache.layers)
    tensors: list[Any] = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    for number, tensor in enumerate(tensors):
        if tensor is None or tensor.ndim != 4 or tensor.shape[0] != 1 or tensor.shape[2] != 1:
            raise UnsupportedModel(f"layer {number // 2} does not keep (batch, heads, tokens, head_dim)")
        if tensor.dtype != tensors[0].dtype:
            raise UnsupportedModel(f"layers keep both {tensors[0].dtype} and {tensor.dtype}")
    planes = tuple(_Plane(t.shape[1], t.shape[3], t.device) for t in tensors)
    return _Geometry(planes, tensors[0].dtype, block_tokens)
