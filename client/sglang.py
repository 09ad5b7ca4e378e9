"""SGLang's HiCache keeps its third tier in forebay: a storage backend for `--hicache-storage-backend dynamic`.

SGLang's host pool is its second tier. Pages are copied between that pool and the daemon's shared memory straight by
their addresses, which the pool tells (`get_page_buffer_meta`): one segment table per pool, made when the pool is
registered and checked at both ends and in the middle. A pool that tells no addresses, or an SGLang started without
`interface_v1`, is served page by page through a buffer. SGLang's keys are hex SHA-256 chain values, already salted with
cache_salt and adapter but not with model, rank or layout: those are the namespace's. Nothing raises inside the serving
loop: without a daemon every page is a miss.

Rejected: having SGLang allocate its host pool in the daemon's memory (the allocator is chosen by the backend's name,
and a dynamic backend has none there).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from forebay.client import scattered
from forebay.client.engine_options import CLIENT_KEYS, client_of, client_options
from forebay.client.namespaces import Namespace
from forebay.client.segments import SegmentTable
from forebay.client.sync import Client
from forebay.kvstore.errors import BadRequest, ForebayError, LayoutError
from forebay.kvstore.namespace import NamespaceSpec
from forebay.transports.messages import EvictScope

try:
    import sglang
    import torch
    from sglang.srt.mem_cache.hicache_storage import (
        HiCacheStorage,
        PoolHitPolicy,
        PoolName,
        PoolTransferResult,
    )
except ImportError as error:
    raise ImportError(f"forebay.client.sglang needs SGLang ({error}): install sglang in this environment") from error

log = logging.getLogger(__name__)

OPTIONS_KEY = "forebay"
"""Where in the backend's extra-config our own options lie, apart from SGLang's."""

_KV = str(PoolName.KV.value)
_MAMBA = str(PoolName.MAMBA.value)
_HASH_BYTES = 32
_METERED_MAX = 4096
_GEOMETRY = (
    "layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "kv_cache_dim",
    "storage_format_tag",
)
_SERVED = ("kv_cache_dtype", "quantization")
_SETTINGS = (
    "quantization_param_path",
    "json_model_override_args",
    "modelopt_quant",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
    "speculative_draft_kv_cache_dtype",
)
"""Start options that change a page's bytes under one model name, beside those that are written out."""


class ForebayStorage(HiCacheStorage):
    """One rank's third tier. Any of SGLang's storage threads may call it at once.

    Args:
        storage_config: SGLang's `HiCacheStorageConfig`. Its extra-config may hold an object ``forebay`` with the keys
            ``revision`` (the name of these exact weights) and those of `engine_options.CLIENT_KEYS`.
        kwargs: what the factory passes beside; not used.
    Raises:
        BadRequest: options that are unknown or out of bounds, no model name, several nodes, context-parallel decoding.
    """

    def __init__(self, storage_config: Any, kwargs: Mapping[str, object] | None = None) -> None:
        options = _own_options(storage_config.extra_config or {})
        revision = options.pop("revision", "")
        if not isinstance(revision, str):
            raise BadRequest(f"revision is text, not {revision!r}")
        self._identity = _Identity(storage_config, revision)
        self._writes_replicas = bool(storage_config.is_storage_writer)
        self._options = client_options(options, name=self._identity.client_name)
        self._client = client_of(self._options)
        self._by_address = bool((storage_config.extra_config or {}).get("interface_v1"))
        self._pools: dict[str, _MappedPool | _CopiedPool] = {}
        self._meter = _Meter() if getattr(storage_config, "enable_storage_metrics", False) else None

    # Registration

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Raises LayoutError or BadRequest: pages that fit no slab, or a geometry out of bounds."""
        super().register_mem_pool_host(mem_pool_host)
        self._pools[_KV] = self._open(_KV, mem_pool_host, by_address=self._by_address)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """As `register_mem_pool_host`, for one pool of a hybrid model."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        name = _pool_name(host_pool_name)
        self._pools[name] = self._open(name, host_pool, by_address=self._by_address or name != _KV)

    def _open(self, name: str, host_pool: Any, *, by_address: bool) -> _MappedPool | _CopiedPool:
        table = _page_table(host_pool) if by_address else None
        if table is None:
            log.info("pages of pool %s go through a buffer", name)
            page_bytes = _nbytes(host_pool.get_dummy_flat_data_page())
            spec = self._identity.spec(name, host_pool, (page_bytes,), "flat")
            return _CopiedPool(self._client, self._client.open_namespace(spec), host_pool)
        spec = self._identity.spec(name, host_pool, table.sizes, "pages")
        return _MappedPool(self._client, self._client.open_namespace(spec), host_pool, table)

    # Version 1: the one pool of a plain model

    def batch_exists(self, keys: list[str], extra_info: Any = None) -> int:
        """How many leading pages are stored and come sooner than they are computed."""
        pool = self._pools.get(_KV)
        return pool.leading(_names(keys)) if pool else 0

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Copy stored pages into the host pool; which of them are right.

        Args:
            host_indices: int64 (pages * page_size,), token slots of the host pool; a page's are consecutive.
        """
        return self._get(_KV, keys, host_indices)

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any = None) -> list[bool]:
        """Store pages of the host pool; which of them are stored now. Arguments as for `batch_get_v1`."""
        return self._set(_KV, keys, host_indices, extra_info)

    # Version 2: several pools of a hybrid model

    def batch_exists_v2(self, keys: list[str], pool_transfers: Any = None, extra_info: Any = None) -> Any:
        """The longest prefix that every pool can restore, by its own policy, and all shorter ones that it could."""
        names = _names(keys)
        pool = self._pools.get(_KV)
        leading = pool.leading(names) if pool else 0
        hits: dict[Any, int] = {PoolName.KV: leading} if leading else {}
        restorable = set(range(1, leading + 1))
        for transfer in pool_transfers or ():
            if not restorable:
                break
            ends = self._restorable(transfer, names[:leading])
            if ends is None:
                continue
            if ends:
                hits[transfer.name] = max(ends)
            restorable &= ends
        return PoolTransferResult(max(restorable, default=0), hits, sorted(restorable))

    def batch_get_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {each.name: self._get(each.name, each.keys or [], each.host_indices) for each in transfers}

    def batch_set_v2(self, transfers: Sequence[Any], extra_info: Any = None) -> dict[Any, list[bool]]:
        return {each.name: self._set(each.name, each.keys or [], each.host_indices, extra_info) for each in transfers}

    # Pages as flat tensors: SGLang without `interface_v1`

    def get(self, key: str, target_location: Any = None, target_sizes: Any = None) -> Any:
        """Fill a contiguous CPU tensor with a page; returns the tensor, or None for a miss."""
        if target_location is None:
            return None

        def fetch(ns: Namespace, table: SegmentTable, names: list[bytes]) -> bool:
            return self._client.fetch(ns, names, table).blocks == 1

        return target_location if self._whole(key, target_location, fetch) else None

    def batch_get(self, keys: list[str], target_locations: Any = None, target_sizes: Any = None) -> list[Any]:
        targets = target_locations if target_locations is not None else [None] * len(keys)
        return [self.get(key, target) for key, target in zip(keys, targets, strict=True)]

    def set(self, key: str, value: Any = None, target_location: Any = None, target_sizes: Any = None) -> bool:
        """Store a page given as a CPU tensor; whether it is stored now."""
        if value is None:
            return False

        def store(ns: Namespace, table: SegmentTable, names: list[bytes]) -> bool:
            return self._client.store(ns, names, table).rejected == 0

        return self._whole(key, value.contiguous(), store)

    def batch_set(
        self, keys: list[str], values: Any = None, target_locations: Any = None, target_sizes: Any = None
    ) -> bool:
        return values is not None and all(map(self.set, keys, values))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # Life

    def get_stats(self) -> Any:
        """Pages and GB/s of each transfer since the last call, for SGLang's metrics; None when it wants none."""
        return self._meter.taken() if self._meter else None

    def clear(self) -> bool:
        """Remove the pages of this model's pools; whether none is left, which one in use or being written is."""
        try:
            with client_of(dataclasses.replace(self._options, strict=True)) as client:
                done = [client.evict(pool.ns, scope=EvictScope.NAMESPACE) for pool in self._pools.values()]
        except ForebayError as error:
            log.warning("the pages were not removed: %s: %s", type(error).__name__, error)
            return False
        kept = sum(each.kept for each in done)
        if kept:
            log.warning("%d pages in use were not removed: clear again", kept)
        return not kept

    def close(self) -> None:
        self._client.close()

    # Inside

    def _get(self, name: Any, keys: Sequence[str], host_indices: Any) -> list[bool]:
        try:
            pool, pages = self._pages(name, keys, host_indices)
            begun = time.perf_counter()
            right = pool.load(_names(keys), pages)
            if self._meter:
                self._meter.prefetched(sum(right), pool.ns.block_bytes, time.perf_counter() - begun)
            return right
        except ForebayError as error:
            log.warning("no page of %s was read: %s: %s", name, type(error).__name__, error)
            return [False] * len(keys)

    def _set(self, name: Any, keys: Sequence[str], host_indices: Any, extra_info: Any) -> list[bool]:
        if self._identity.replicated(_pool_name(name)) and not self._writes_replicas:
            return [True] * len(keys)  # the rank that writes for all of them does
        try:
            pool, pages = self._pages(name, keys, host_indices)
            prefix = getattr(extra_info, "prefix_keys", None) if _pool_name(name) == _KV else None
            parent = _names(prefix[-1:])[0] if prefix else b""
            begun = time.perf_counter()
            right = pool.save(_names(keys), pages, parent)
            if self._meter:
                self._meter.backed_up(sum(right), pool.ns.block_bytes, time.perf_counter() - begun)
            return right
        except ForebayError as error:
            log.warning("no page of %s was stored: %s: %s", name, type(error).__name__, error)
            return [False] * len(keys)

    def _pages(self, name: Any, keys: Sequence[str], host_indices: Any) -> tuple[_MappedPool | _CopiedPool, list[int]]:
        """The pool and the number of each key's page in it."""
        pool = self._pools.get(_pool_name(name))
        if pool is None:
            raise BadRequest("the pool was never registered")
        size = pool.page_size
        slots = [] if host_indices is None else host_indices.tolist()
        if len(slots) != len(keys) * size:
            raise BadRequest(f"{len(slots)} token slots for {len(keys)} pages of {size}")
        firsts = slots[::size]
        if any(slot % size for slot in firsts):
            raise BadRequest("a page does not begin at a page of the host pool")
        return pool, [slot // size for slot in firsts]

    def _restorable(self, transfer: Any, names: list[bytes]) -> AbstractSet[int] | None:
        """Lengths of the prefixes that a pool can restore; None when it has no say."""
        if transfer.hit_policy not in (PoolHitPolicy.ALL_PAGES, PoolHitPolicy.TRAILING_PAGES):
            return None
        pool = self._pools.get(_pool_name(transfer.name))
        if pool is None:
            return set()
        if transfer.hit_policy == PoolHitPolicy.ALL_PAGES:
            return set(range(1, pool.leading(names) + 1))
        window = max(1, len(transfer.keys or ()))
        ends, run = set(), 0
        for end, present in enumerate(scattered.stored(self._client, pool.ns, names), 1):
            run = run + 1 if present else 0
            if run >= min(window, end):
                ends.add(end)
        return ends

    def _whole(self, key: str, tensor: Any, action: Callable[[Namespace, SegmentTable, list[bytes]], bool]) -> bool:
        """Do something with a page that is one flat tensor; only pools that keep pages in that form have such."""
        pool = self._pools.get(_KV)
        try:
            if not isinstance(pool, _CopiedPool):
                raise BadRequest("pages of this pool are copied by their addresses, not as tensors")
            return action(pool.ns, SegmentTable.packed(tensor, pool.ns.block_bytes), _names([key]))
        except ForebayError as error:
            log.warning("a page was passed over: %s: %s", type(error).__name__, error)
            return False


class _Identity:
    """What makes the pages of this rank what they are, apart from the pool's geometry."""

    def __init__(self, config: Any, revision: str) -> None:
        served = _served()
        if int(served.get("nnodes") or 1) > 1:
            raise BadRequest("the ranks of one model must be on one node: each node has a daemon of its own")
        if int(getattr(config, "dcp_size", 1)) > 1:
            raise BadRequest("decode context parallelism is not supported")
        if not config.model_name:
            raise BadRequest("SGLang gave no model name, which keeps the pages of models apart")
        self._model = str(config.model_name)
        self._revision = revision or str(served.get("revision") or "")
        self._tp = (int(config.tp_rank), int(config.tp_size))
        self._stage = f"pp{config.pp_rank}of{config.pp_size}/cp{config.attn_cp_rank}of{config.attn_cp_size}"
        self._replicates = bool(config.is_mla_model)
        facts = [f"{name}={served[name]}" for name in _SERVED if served.get(name)] + _settings(served)
        self._engine = "/".join([f"sglang-{getattr(sglang, '__version__', 'unknown')}", *facts])
        self.client_name = f"sglang {self._model}"[:100] + f" tp{self._tp[0]}"

    def replicated(self, pool_name: str) -> bool:
        """Whether all tensor-parallel ranks hold the same bytes: MLA does, the state of recurrent layers does not."""
        return self._replicates and pool_name != _MAMBA

    def spec(self, pool_name: str, host_pool: Any, segment_bytes: tuple[int, ...], form: str) -> NamespaceSpec:
        """`form` names how the pool's bytes lie in a block where the segments alone do not tell."""
        geometry = [f"{name}={value}" for name in _GEOMETRY if (value := getattr(host_pool, name, None)) is not None]
        layout = getattr(host_pool, "layout", "")
        return NamespaceSpec(
            model=self._model,
            revision=self._revision,
            dtype=str(getattr(host_pool, "dtype", "unknown")).removeprefix("torch."),
            block_tokens=int(getattr(host_pool, "page_size", 1) or 1),
            segment_bytes=segment_bytes,
            layout="/".join([self._engine, type(host_pool).__name__, str(layout), form, *geometry]),
            shard_rank=self._tp[0],
            shard_size=self._tp[1],
            shard_kind="replicated" if self.replicated(pool_name) else "sharded",
            kv_group=f"{pool_name}/{self._stage}",
            hash_scheme="sglang-page-sha256",
            hash_bytes=_HASH_BYTES,
        )


class _Meter:
    """What SGLang's `StorageMetrics` hold: pages of each transfer, and its GB/s. Bounded, should nobody collect."""

    def __init__(self) -> None:
        self._prefetched: deque[tuple[int, float]] = deque(maxlen=_METERED_MAX)
        self._backed_up: deque[tuple[int, float]] = deque(maxlen=_METERED_MAX)

    def prefetched(self, pages: int, page_bytes: int, took_s: float) -> None:
        if pages:
            self._prefetched.append((pages, pages * page_bytes / took_s / 1e9))

    def backed_up(self, pages: int, page_bytes: int, took_s: float) -> None:
        if pages:
            self._backed_up.append((pages, pages * page_bytes / took_s / 1e9))

    def taken(self) -> Any:
        """A new `StorageMetrics`; what it holds is forgotten here."""
        from sglang.srt.observability.metrics_collector import StorageMetrics

        metrics = StorageMetrics()
        for kept, pages, rates in (
            (self._prefetched, metrics.prefetch_pgs, metrics.prefetch_bandwidth),
            (self._backed_up, metrics.backup_pgs, metrics.backup_bandwidth),
        ):
            while kept:
                count, rate = kept.popleft()
                pages.append(count)
                rates.append(rate)
        return metrics


class _MappedPool:
    """A pool whose pages are copied by their addresses. Pages are numbers of pages in the pool."""

    def __init__(self, client: Client, ns: Namespace, host_pool: Any, table: SegmentTable) -> None:
        self.ns = ns
        self.page_size = int(host_pool.page_size)
        self._client = client
        self._table = table

    def leading(self, names: list[bytes]) -> int:
        return self._client.lookup(self.ns, names).worth_loading

    def load(self, names: list[bytes], pages: list[int]) -> list[bool]:
        return scattered.fetch_each(self._client, self.ns, names, self._table, pages)

    def save(self, names: list[bytes], pages: list[int], parent: bytes) -> list[bool]:
        return scattered.store_chain(self._client, self.ns, names, self._table, pages, parent)


class _CopiedPool:
    """A pool whose pages are handed out and taken as flat tensors. Pages are numbers of pages in the pool."""

    def __init__(self, client: Client, ns: Namespace, host_pool: Any) -> None:
        self.ns = ns
        self.page_size = int(getattr(host_pool, "page_size", 1) or 1)
        self._client = client
        self._host_pool = host_pool

    def leading(self, names: list[bytes]) -> int:
        return self._client.lookup(self.ns, names).worth_loading

    def load(self, names: list[bytes], pages: list[int]) -> list[bool]:
        right = []
        for name, page in zip(names, pages, strict=True):
            data = self._host_pool.get_dummy_flat_data_page().contiguous()
            right.append(self._client.fetch(self.ns, [name], self._table(data)).blocks == 1)
            if right[-1]:
                self._host_pool.set_from_flat_data_page(page * self.page_size, data)
        return right

    def save(self, names: list[bytes], pages: list[int], parent: bytes) -> list[bool]:
        saved = []
        for name, page in zip(names, pages, strict=True):
            data = self._host_pool.get_data_page(page * self.page_size, flat=True).contiguous()
            saved += scattered.store_chain(self._client, self.ns, [name], self._table(data), [0], b"")
        return saved

    def _table(self, data: Any) -> SegmentTable:
        return SegmentTable.packed(data, self.ns.block_bytes)


def _page_table(host_pool: Any) -> SegmentTable | None:
    """Where the pool's pages lie; None when it does not tell, or when they do not lie at equal distances."""
    size = int(getattr(host_pool, "page_size", 0) or 0)
    tell = getattr(host_pool, "get_page_buffer_meta", None)
    slots = int(getattr(host_pool, "size", 0) or 0)
    if size < 1 or slots < size or tell is None:
        return None
    count = slots // size

    def meta(page: int) -> tuple[list[int], list[int]]:
        pointers, sizes = tell(torch.arange(page * size, (page + 1) * size))
        return [int(pointer) for pointer in pointers], [int(each) for each in sizes]

    try:
        bases, sizes = meta(0)
        second = meta(1)[0] if count > 1 else [base + each for base, each in zip(bases, sizes, strict=True)]
        strides = [there - here for there, here in zip(second, bases, strict=True)]
        for page in {0, count // 2, count - 1}:
            if meta(page) != ([b + page * s for b, s in zip(bases, strides, strict=True)], sizes):
                return None
        return SegmentTable.from_pointers(bases, strides, sizes, count, owner=host_pool)
    except (ValueError, NotImplementedError, AttributeError, AssertionError, LayoutError) as error:
        log.info("page addresses of %s are of no use: %s", type(host_pool).__name__, error)
        return None


def _own_options(extra: Mapping[str, object]) -> dict[str, object]:
    stray = sorted(set(extra) & {"revision", *CLIENT_KEYS})
    if stray:
        raise BadRequest(f'{", ".join(stray)} must be inside the object "{OPTIONS_KEY}" of the extra-config')
    options = extra.get(OPTIONS_KEY, {})
    if not isinstance(options, Mapping):
        raise BadRequest(f'"{OPTIONS_KEY}" of the extra-config is an object, not {options!r}')
    return dict(options)


def _served() -> dict[str, Any]:
    """What SGLang was started with, as far as this version tells: revision, cache type, quantisation, nodes."""
    try:
        from sglang.srt.runtime_context import get_server_args

        arguments = get_server_args()
    except (ImportError, ValueError):  # another version, or no server in this process
        return {}
    names = ("revision", "nnodes", "load_format", *_SERVED, *_SETTINGS)
    return {name: getattr(arguments, name, None) for name in names}


def _settings(served: Mapping[str, Any]) -> list[str]:
    """A digest of the `_SETTINGS` that were given, as a list; none when none was, as in most servers."""
    given = {name: str(served[name]) for name in _SETTINGS if served.get(name) not in (None, "", "{}")}
    if str(served.get("load_format")) in ("dummy", "LoadFormat.DUMMY"):  # random weights under a real model's name
        given["load_format"] = "dummy"
    if not given:
        return []
    return ["settings=" + hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest()]


def _names(keys: Sequence[str]) -> list[bytes]:
    """SGLang's hex SHA-256 keys as bytes; a key of another form is hashed."""
    return [_name(key) for key in keys]


def _name(key: str) -> bytes:
    if len(key) == 2 * _HASH_BYTES:
        try:
            name = bytes.fromhex(key)
        except ValueError:
            name = b""
        if len(name) == _HASH_BYTES:  # blanks count for nothing
            return name
    return hashlib.sha256(key.encode()).digest()


def _pool_name(name: Any) -> str:
    return str(getattr(name, "value", name))


def _nbytes(tensor: Any) -> int:
    return int(tensor.numel()) * int(tensor.element_size())
