"""The vLLM connector: ``{"kv_connector": "ForebayConnector", "kv_connector_module_path": "forebay.client.vllm"}``.

vLLM builds the class twice, for the scheduler and for each worker; each builds its half (`vllm_scheduler`,
`vllm_worker`), and this is the thin layer of vLLM's names between. Loads and stores are asynchronous and of whole
blocks: they overlap with the computation of other requests. Waiting layer by layer was left out: it would keep a whole
step waiting for one request's load, and the engine from graphs of its forward pass, to hide a part of what is a fifth
of a hit's time to the first token (docs/engines.md has the figures).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from forebay.client.engine_options import CLIENT_KEYS, client_of, client_options
from forebay.client.segments import SegmentTable
from forebay.client.vllm_events import ForebayEvents, engine_events
from forebay.client.vllm_layout import (
    Engine,
    Geometry,
    check_version,
    geometries_of,
    layer_pages,
    namespace_spec,
    refuse_unsupported,
    segment_table,
)
from forebay.client.vllm_leases import LeaseDesk
from forebay.client.vllm_ledger import Ledger, Notice
from forebay.client.vllm_prefill import PrefillMeter, Seconds, Stop
from forebay.client.vllm_scheduler import VllmScheduler
from forebay.client.vllm_stats import ForebayMetrics, ForebayStats
from forebay.client.vllm_work import StepWork
from forebay.client.vllm_worker import VllmWorker, wait_for
from forebay.kvstore.errors import BadRequest
from forebay.kvstore.namespace import NamespaceSpec

try:
    import torch
    import vllm
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorHandshakeMetadata,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        SupportsHMA,
    )
except ImportError as error:
    raise ImportError(f"forebay.client.vllm runs inside vLLM, which could not be imported: {error}") from error

RECOMPUTE = "recompute"
"""vLLM's policy for blocks that were not loaded; by any other it fails the request, so loads must not be given up."""

OWN_KEYS = ("model", "revision", "tenant_salt", "scheduler_wait_ms")


class ForebayMetadata(StepWork, KVConnectorMetadata):
    """One step's work, as vLLM wants it typed."""


@dataclass(frozen=True)
class ForebayHandshake(KVConnectorHandshakeMetadata):
    """What a worker tells the scheduler before the first request.

    Attributes:
        specs: the namespace that it uses for each cache group; None where its pipeline stage has no layer.
    """

    specs: tuple[NamespaceSpec | None, ...]


class ForebayConnector(KVConnectorBase_V1, SupportsHMA):
    """See the module. Wrong settings and models that cannot be kept are typed errors when the engine starts."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        check_version(str(vllm.__version__))
        super().__init__(vllm_config, role, kv_cache_config)
        extra = dict(vllm_config.kv_transfer_config.kv_connector_extra_config or {})
        own, wait_ms = _own_options(extra)
        options = client_options(
            {key: extra[key] for key in extra if key not in OWN_KEYS}, name=f"vllm {role.name.lower()}"
        )
        transfer = vllm_config.kv_transfer_config
        if role == KVConnectorRole.WORKER and getattr(transfer, "kv_load_failure_policy", "") != RECOMPUTE:
            options = replace(options, plan="always")
        refuse_unsupported(vllm_config.parallel_config)
        self._geometries = geometries_of(kv_cache_config, vllm_config.cache_config)
        self._engine = _engine(vllm_config, role)
        self._specs = _specs(vllm_config, kv_cache_config, self._geometries, self._engine, own)
        self._client = client_of(options)
        self._kv_caches: dict[str, Any] = {}
        events = getattr(vllm_config, "kv_events_config", None)
        self._tells = bool(events is not None and events.enable_kv_cache_events)
        self._ledger = Ledger([self._engine.ranks] * len(self._specs))
        self._told: list[Notice] = []
        self._told_specs: list[tuple[NamespaceSpec | None, ...]] = []
        self._scheduler: VllmScheduler | None = None
        self._worker: VllmWorker | None = None
        self._meter: PrefillMeter | None = None
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = VllmScheduler(
                LeaseDesk(self._client),
                self._asked_namespaces(""),
                self._geometries,
                wait_s=wait_ms / 1000,
                give_up_s=options.timeout_ms / 1000,
                loads=bool(transfer.is_kv_consumer),
                stores=bool(transfer.is_kv_producer),
            )
        else:
            block_bytes = [spec.block_bytes if spec else 0 for spec in self._specs]
            rank = self._engine.stage * self._engine.ranks + self._engine.rank
            tells = self._engine.rank == 0
            self._worker = VllmWorker(self._client, self._own_namespaces, block_bytes, rank, tells=tells)
            if rank == 0 and self._engine.stages == 1:  # of a pipeline one stage's time says too little
                self._meter = PrefillMeter(self._client)

    def _own_namespaces(self, reset: str) -> list[Any]:
        """Each cache group's in a worker, after the reset of that name (empty: the first ones); None without layers."""
        return [self._namespace(spec, reset) if spec else None for spec in self._specs]

    def _asked_namespaces(self, reset: str) -> list[list[Any]]:
        """Each cache group's in the scheduler: those of all stages with layers in it. None before they are told."""
        if not self._told_specs and self._engine.stages > 1:
            return []
        stages = self._told_specs or [tuple(self._specs)]
        return [[self._namespace(spec, reset) for spec in group if spec] for group in zip(*stages, strict=True)]

    def _namespace(self, spec: NamespaceSpec, reset: str) -> Any:
        return self._client.open_namespace(_after_reset(spec, reset) if reset else spec)

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is lost is a miss to come, no more."""
        return False

    # Scheduler

    @property
    def _planning(self) -> VllmScheduler:
        assert self._scheduler is not None, "a scheduler's hook in a worker"
        return self._scheduler

    def on_new_request(self, request: Any) -> None:
        self._planning.arrived(request)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        """The scheduler is given one stage's layers, and those not in full: the workers tell what they hold."""
        told = {rank: each.specs for rank, each in metadata.items() if isinstance(each, ForebayHandshake)}
        stages = [told[stage, 0] for stage in range(self._engine.stages) if (stage, 0) in told]
        if len(stages) < self._engine.stages:
            if self._engine.stages == 1:
                return  # another connector's, under vLLM's MultiConnector
            raise BadRequest("beside a connector with a handshake of its own forebay takes no pipeline parallelism")
        self._told_specs = stages
        self._ledger = Ledger([self._engine.ranks * sum(map(bool, group)) for group in zip(*stages, strict=True)])
        self._planning.adopt(self._asked_namespaces(""))

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._planning.matched(request, num_computed_tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._planning.allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> ForebayMetadata:
        work = self._planning.step(scheduler_output)
        return ForebayMetadata(work.loads, work.stores, work.fresh, work.reset, work.prefill, work.endings)

    def update_connector_output(self, connector_output: Any) -> None:
        self._planning.loaded(connector_output.finished_recving or ())
        events = getattr(connector_output, "kv_cache_events", None)
        if self._tells and isinstance(events, ForebayEvents):
            self._told += self._ledger.take(events.get_all_events())

    def take_events(self) -> list[Any]:
        told, self._told = self._told, []
        return engine_events(told)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._planning.ending(request)
        self._planning.finished(str(request.request_id))
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    def reset_cache(self) -> bool | None:
        self._planning.reset(self._asked_namespaces)
        return True

    # Worker

    @property
    def _moving(self) -> VllmWorker:
        assert self._worker is not None, "a worker's hook in the scheduler"
        return self._worker

    def get_handshake_metadata(self) -> ForebayHandshake | None:
        """None where the scheduler knows as much by itself: another connector beside this one may have its own."""
        groups = self._kv_cache_config.kv_cache_groups
        reduced = any(getattr(group.kv_cache_spec, "kv_cache_specs", None) for group in groups)
        return ForebayHandshake(tuple(self._specs)) if reduced or self._engine.stages > 1 else None

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Raises LayoutError, and DmaError where the caches are a GPU's and it cannot be used."""
        self._kv_caches = dict(kv_caches)
        self._moving.register([self._table(geometry) for geometry in self._geometries])

    def unregister_kv_caches(self) -> None:
        self._moving.unregister()

    def restore_kv_caches(self) -> None:
        if self._kv_caches:
            self.register_kv_caches(self._kv_caches)

    def _table(self, geometry: Geometry) -> SegmentTable | None:
        if not geometry.layers:
            return None
        table = segment_table(layer_pages(self._kv_caches, geometry, self._kv_cache_config), geometry)
        if table.device is not None:
            self._client.prepare(table.device)
        return table

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        self._moving.begin(kv_connector_metadata)

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._moving.begin(connector_metadata)
        if self._meter is not None:
            self._meter.begin(connector_metadata.prefill, _watch)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._moving.take_late():
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        self._moving.start_loads(_device_mark())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads are over before their request runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks are stored whole, after the step."""

    def wait_for_save(self) -> None:
        if self._meter is not None:
            self._meter.end()
        self._moving.start_stores(_device_mark())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        return None, self._moving.take_loaded() or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        loaded = self._moving.take_loaded()
        return KVConnectorTransferResults(finished_recving=loaded, failed_recving=self._moving.take_failed_requests())

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._moving.take_failed_blocks()

    def get_kv_connector_kv_cache_events(self) -> ForebayEvents | None:
        notices = self._moving.take_notices()
        return ForebayEvents(notices) if self._tells and notices else None

    def get_kv_connector_stats(self) -> ForebayStats | None:
        half = self._worker or self._scheduler
        counts = half.take_counts() if half is not None else {}
        return ForebayStats(data=dict(counts)) if counts else None

    def shutdown(self) -> None:
        if self._scheduler is not None:
            self._scheduler.close()
        if self._meter is not None:
            self._meter.close()
        if self._worker is not None:
            self._worker.close()
        self._client.close()

    # Metrics

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> ForebayStats:
        return ForebayStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]
    ) -> ForebayMetrics:
        return ForebayMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


with suppress(ValueError):  # it is already there
    # Under vLLM's MultiConnector the counts of each connector are put together by its name.
    KVConnectorFactory.register_connector(ForebayConnector.__name__, __name__, ForebayConnector.__name__)


def _own_options(extra: Mapping[str, object]) -> tuple[dict[str, str], float]:
    """What is ours of the extra-config. Raises BadRequest; keys of nobody are left to `client_options`."""
    unknown = sorted(set(extra) - {*OWN_KEYS, *CLIENT_KEYS})
    if unknown:
        raise BadRequest(f"unknown option {', '.join(unknown)}: there are {', '.join((*OWN_KEYS, *CLIENT_KEYS))}")
    texts: dict[str, str] = {}
    for key in ("model", "revision", "tenant_salt"):
        value = extra.get(key, "")
        if not isinstance(value, str):
            raise BadRequest(f"{key} is text, not {value!r}")
        texts[key] = value
    wait_ms = extra.get("scheduler_wait_ms", 0)
    if isinstance(wait_ms, bool) or not isinstance(wait_ms, int | float) or not 0 <= wait_ms <= 100:
        raise BadRequest(f"scheduler_wait_ms is a number of milliseconds from 0 to 100, not {wait_ms!r}")
    return texts, float(wait_ms)


def _specs(
    vllm_config: Any, kv_cache_config: Any, geometries: Sequence[Geometry], engine: Engine, own: Mapping[str, str]
) -> list[NamespaceSpec | None]:
    """Each cache group's; None where this stage of the pipeline has no layer of it."""
    specs: list[NamespaceSpec | None] = []
    for index, geometry in enumerate(geometries):
        group = f"group-{index}-of-{len(geometries)}" if len(geometries) > 1 else ""
        packed = engine
        if engine.device == "cpu":
            packed = replace(engine, packing=_cpu_packing(vllm_config, geometry))
        has = bool(geometry.layers)
        specs.append(namespace_spec(vllm_config, kv_cache_config, geometry, packed, own, group) if has else None)
    return specs


def _engine(vllm_config: Any, role: Any) -> Engine:
    from vllm.platforms import current_platform

    parallel = vllm_config.parallel_config
    rank = stage = 0
    if role == KVConnectorRole.WORKER:
        from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank

        rank, stage = int(get_tensor_model_parallel_rank()), int(get_pp_group().rank_in_group)
    return Engine(
        version=str(vllm.__version__),
        device=str(current_platform.device_type),
        packing=str(current_platform.get_device_name()),
        hash_seed=_hash_seed(vllm_config),
        rank=rank,
        ranks=int(parallel.tensor_parallel_size),
        stage=stage,
        stages=int(getattr(parallel, "pipeline_parallel_size", 1)),
    )


def _cpu_packing(vllm_config: Any, geometry: Geometry) -> str:
    """The instruction set, after which vLLM's CPU attention packs keys and values inside a page."""
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model, cache = vllm_config.model_config, vllm_config.cache_config
    return str(_get_attn_isa(model.dtype, geometry.block_tokens, model.get_head_size(), cache.cache_dtype))


def _hash_seed(vllm_config: Any) -> str:
    """What the engine's block hashes start from. Raises BadRequest when that is drawn anew in each process."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import resolve_none_hash_seed

    function = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    seed = str(resolve_none_hash_seed(function))
    if seed != str(resolve_none_hash_seed(function)):
        raise BadRequest("the block hashes start from a random seed: use sha256_cbor, or set PYTHONHASHSEED")
    return seed


def _device_mark() -> Callable[[], None]:
    """What copies wait for: on a GPU everything queued so far on the engine's stream, on a CPU nothing."""
    if not torch.cuda.is_available():
        return _nothing
    event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return partial(wait_for, event.query)


def _watch() -> Stop:
    """Starts a watch: on a GPU the clock of the engine's stream, on a CPU the thread's."""
    if not torch.cuda.is_available():
        begun_s = time.perf_counter()

        def stop_on_cpu() -> Seconds:
            took_s = time.perf_counter() - begun_s
            return lambda: took_s

        return stop_on_cpu
    first: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    first.record()

    def stop_on_gpu() -> Seconds:
        last: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        last.record()

        def seconds() -> float:
            wait_for(last.query)
            return float(first.elapsed_time(last)) / 1000

        return seconds

    return stop_on_gpu


def _nothing() -> None:
    return None


def _after_reset(spec: NamespaceSpec, reset: str) -> NamespaceSpec:
    return replace(spec, revision=f"{spec.revision}+{reset}")
