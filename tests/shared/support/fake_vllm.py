"""The few types of vLLM that a secondary tier sees, for tests where vLLM is not installed.

`install` leaves a real vLLM alone, so that the same tests run against either.
"""

from __future__ import annotations

import enum
import importlib.util
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

REAL = importlib.util.find_spec("vllm") is not None


class LookupResult(enum.Enum):
    MISS = enum.auto()
    HIT = enum.auto()
    HIT_PENDING = enum.auto()
    RETRY = enum.auto()


class Medium(enum.Enum):
    CPU = "CPU"
    STORAGE = "STORAGE"


class Locality(enum.Enum):
    LOCAL = "LOCAL"
    REMOTE = "REMOTE"


@dataclass
class OffloadingEvent:
    keys: list[bytes]
    medium: Medium
    removed: bool
    locality: Locality | None = None


@dataclass
class RequestOffloadingContext:
    policy: str = "chunk_level"


@dataclass
class ReqContext:
    req_id: str


class ScheduleEndContext(NamedTuple):
    new_req_ids: Any
    preempted_req_ids: Any


@dataclass
class JobResult:
    job_id: int
    success: bool
    successful_keys: Any = None
    transfer_time: float | None = None
    transfer_bytes: int | None = None


@dataclass
class TransferJob:
    job_id: int
    keys: Any
    chunk_ids: Any
    is_promotion: bool
    req_context: Any
    submit_time: float = field(default=0.0)


class SecondaryTierManager:
    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
    ) -> None:
        self.tier_type = tier_type


def install() -> None:
    """Make vLLM's offloading types importable, unless they are."""
    if REAL or "vllm" in sys.modules:
        return
    base, tiering = "vllm.v1.kv_offload.base", "vllm.v1.kv_offload.tiering.base"
    for name in (
        "vllm",
        "vllm.platforms",
        "vllm.v1",
        "vllm.v1.kv_offload",
        base,
        "vllm.v1.kv_offload.tiering",
        tiering,
    ):
        sys.modules[name] = ModuleType(name)
    sys.modules["vllm"].__dict__["__version__"] = "0.33.0"
    sys.modules["vllm.platforms"].__dict__["current_platform"] = SimpleNamespace(device_type="cpu")
    offload = (
        LookupResult,
        Medium,
        Locality,
        OffloadingEvent,
        RequestOffloadingContext,
        ReqContext,
        ScheduleEndContext,
    )
    for module, kinds in ((base, offload), (tiering, (JobResult, TransferJob, SecondaryTierManager))):
        for kind in kinds:
            setattr(sys.modules[module], kind.__name__, kind)


def spec(*, events: bool = False, **changed: Any) -> Any:
    """An `OffloadingSpec` of one worker; `changed` are fields of its config, of its model, cache or parallel parts."""

    def part(**values: Any) -> Any:
        return SimpleNamespace(**{key: changed.get(key, value) for key, value in values.items()})

    config = part(
        groups=(
            SimpleNamespace(
                tokens_per_block=16, layer_names=("layer",), group_id=0, sliding_window_size_in_chunks=None
            ),
        ),
        worker_kv_bytes_per_block=64,
        replicated_layout=False,
        canonical_layout=False,
        kv_cache_layout="LBHNC",
    )
    config.model = part(name="tiny", dtype="float32")
    config.cache = part(tokens_per_hash=16, blocks_per_chunk=1)
    sizes = dict.fromkeys(("tp_size", "pp_size", "pcp_size", "dcp_size", "world_size"), 1)
    config.parallel = part(is_parallelism_agnostic=False, **sizes)
    return SimpleNamespace(config=config, kv_events_config=SimpleNamespace(enable_kv_cache_events=events))
