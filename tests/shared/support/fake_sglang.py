"""The few types of SGLang that its storage backends see, for tests where SGLang is not installed; and pools of pages.

`install` leaves a real SGLang alone, so that the same tests run against either.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

REAL = importlib.util.find_spec("sglang") is not None


class PoolName(enum.StrEnum):
    KV = "kv"
    MAMBA = "mamba"
    SWA = "swa"
    INDEXER = "indexer"


class PoolHitPolicy(enum.StrEnum):
    ALL_PAGES = "all_pages"
    TRAILING_PAGES = "trailing_pages"
    BLOCK_GROUPS = "block_groups"


@dataclass
class PoolTransfer:
    name: Any
    host_indices: Any = None
    keys: list[str] | None = None
    hit_policy: PoolHitPolicy = PoolHitPolicy.ALL_PAGES


@dataclass
class PoolTransferResult:
    kv_hit_pages: int
    extra_pool_hit_pages: dict[Any, int] = field(default_factory=dict)
    restorable_prefix_pages: list[int] | None = None


@dataclass
class StorageMetrics:
    prefetch_pgs: list[int] = field(default_factory=list)
    backup_pgs: list[int] = field(default_factory=list)
    prefetch_bandwidth: list[float] = field(default_factory=list)
    backup_bandwidth: list[float] = field(default_factory=list)


class HiCacheStorage:
    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        self.mem_pool_host = mem_pool_host

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        if not hasattr(self, "registered_pools"):
            self.registered_pools: dict[Any, Any] = {}
        self.registered_pools[host_pool_name] = host_pool


def install() -> None:
    """Make `sglang.srt.mem_cache.hicache_storage` importable, unless it is."""
    if REAL or "sglang" in sys.modules:
        return
    parts = ("", ".srt", ".srt.mem_cache", ".srt.mem_cache.hicache_storage", ".srt.observability")
    for part in (*parts, ".srt.observability.metrics_collector"):
        sys.modules[f"sglang{part}"] = ModuleType(f"sglang{part}")
    sys.modules["sglang"].__dict__["__version__"] = "0.5.23"
    sys.modules["sglang.srt.observability.metrics_collector"].__dict__["StorageMetrics"] = StorageMetrics
    storage = sys.modules["sglang.srt.mem_cache.hicache_storage"]
    for kind in (HiCacheStorage, PoolHitPolicy, PoolName, PoolTransfer, PoolTransferResult):
        setattr(storage, kind.__name__, kind)


def config(**changed: Any) -> Any:
    """A `HiCacheStorageConfig` of one rank, as SGLang hands it to a dynamic backend."""
    values: dict[str, Any] = {
        "tp_rank": 0,
        "tp_size": 1,
        "pp_rank": 0,
        "pp_size": 1,
        "attn_cp_rank": 0,
        "attn_cp_size": 1,
        "is_mla_model": False,
        "model_name": "tiny",
        "enable_storage_metrics": False,
        "extra_config": {},
        **changed,
    }
    writer = not values["is_mla_model"] or values["tp_rank"] == 0
    return SimpleNamespace(**values, dcp_size=1, is_storage_writer=writer)


class HostPool:
    """Host pages of keys and values: uint8, two planes (K, V), in one of SGLang's two orders.

    layer_first: (2, layers, pages * page_size, width). page_first: (2, pages * page_size, layers, width).
    """

    def __init__(
        self,
        pages: int,
        *,
        layout: str = "page_first",
        page_size: int = 4,
        layers: int = 3,
        width: int = 8,
        dtype: torch.dtype = torch.uint8,
    ) -> None:
        self.layout, self.page_size, self.layer_num = layout, page_size, layers
        self.head_num, self.head_dim = 1, width
        self.dtype = dtype
        self.size = pages * page_size
        order = (self.size, layers) if layout == "page_first" else (layers, self.size)
        self.kv_buffer = torch.zeros((2, *order, width), dtype=dtype)

    def page(self, number: int) -> torch.Tensor:
        """A view of a page: (2, page_size, layers, width) or (2, layers, page_size, width)."""
        return self.kv_buffer.narrow(1 if self.layout == "page_first" else 2, number * self.page_size, self.page_size)

    def slots(self, pages: list[int]) -> torch.Tensor:
        """The token slots of pages, as SGLang passes them."""
        return torch.cat([torch.arange(self.page_size) + page * self.page_size for page in pages])

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        pointers, sizes = [], []
        for slot in indices.tolist()[:: self.page_size]:
            view = self.page(slot // self.page_size)
            parts = (
                list(view)
                if self.layout == "page_first"
                else [view[kv, n] for n in range(self.layer_num) for kv in (0, 1)]
            )
            pointers += [part.data_ptr() for part in parts]
            sizes += [part.numel() * part.element_size() for part in parts]
        return pointers, sizes

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros_like(self.page(0)).contiguous().flatten()

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        page = self.page(int(index) // self.page_size)
        return page.flatten() if flat else page

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        page = self.page(int(index) // self.page_size)
        page.copy_(data_page.reshape(page.shape))


class OpaquePool(HostPool):
    """A pool that does not tell where its pages are."""

    def get_page_buffer_meta(self, indices: torch.Tensor) -> tuple[list[int], list[int]]:
        raise ValueError("Unsupported layout")
