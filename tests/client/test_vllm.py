"""The connector itself under stand-ins for vLLM's modules: which half is built, what each hook is answered.

What vLLM really does with it is shown in tests/engines.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from forebay.client.copier import NumpyCopier
from forebay.client.device_copier import DeviceCopier
from forebay.client.vllm_ledger import Notice
from forebay.client.vllm_work import StepWork
from forebay.kvstore.errors import BadRequest, LayoutError
from forebay.transports.dma import DmaError
from support.device_arrays import CudaTensor, LateDevices

torch = pytest.importorskip("torch", reason="torch is not installed")

BLOCKS, BLOCK, PAGE = 6, 16, 256
OURS = ("forebay.client.vllm", "forebay.client.vllm_stats", "forebay.client.vllm_events")


class Role(Enum):
    SCHEDULER = 0
    WORKER = 1


class Base:
    def __init__(self, vllm_config: Any, role: Role, kv_cache_config: Any) -> None:
        self._kv_cache_config = kv_cache_config
        self.bound: Any = None

    def bind_connector_metadata(self, metadata: Any) -> None:
        self.bound = metadata


class Stats:
    def __init__(self, data: dict[str, Any] | None = None) -> None:
        self.data = data or {}


class Metrics:
    def __init__(self, *details: Any) -> None:
        self.details = details


class FullAttentionSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


class SlidingWindowSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


class MambaSpec(SimpleNamespace):
    """Bears the name of vLLM's."""


@dataclass
class TransferResults:
    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    failed_recving: set[str] = field(default_factory=set)


class Factory:
    """Like vLLM's it refuses a name that it has."""

    known: ClassVar[dict[str, tuple[str, str]]] = {}

    @classmethod
    def register_connector(cls, name: str, module_path: str, class_name: str) -> None:
        if name in cls.known:
            raise ValueError(f"Connector {name!r} is already registered.")
        cls.known[name] = module_path, class_name


def stand_ins() -> dict[str, ModuleType]:
    v1 = "vllm.distributed.kv_transfer.kv_connector.v1"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.32.0"},
        f"{v1}.base": {
            "KVConnectorBase_V1": Base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorHandshakeMetadata": type("KVConnectorHandshakeMetadata", (), {}),
            "KVConnectorRole": Role,
            "KVConnectorTransferResults": TransferResults,
            "SupportsHMA": type("SupportsHMA", (), {}),
        },
        "vllm.distributed.kv_transfer.kv_connector.factory": {"KVConnectorFactory": Factory},
        "vllm.distributed.kv_events": {
            "KVConnectorKVEvents": type("KVConnectorKVEvents", (), {}),
            "BlockStored": SimpleNamespace,
            "BlockRemoved": SimpleNamespace,
        },
        f"{v1}.metrics": {"KVConnectorPromMetrics": Metrics, "KVConnectorStats": Stats},
        "vllm.platforms": {"current_platform": SimpleNamespace(device_type="cuda", get_device_name=lambda: "a device")},
        "vllm.distributed.parallel_state": {
            "get_tensor_model_parallel_rank": lambda: 1,
            "get_pp_group": lambda: SimpleNamespace(rank_in_group=0),
        },
        "vllm.utils.hashing": {"get_hash_fn_by_name": lambda name: name},
        "vllm.v1.core.kv_cache_utils": {
            "resolve_none_hash_seed": lambda function: "seed",
            "maybe_convert_block_hash": lambda name: name,
        },
    }
    modules: dict[str, ModuleType] = {}
    for name, values in contents.items():
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            part = ".".join(parts[:depth])
            modules.setdefault(part, ModuleType(part)).__path__ = []
        vars(modules[name]).update(values)
    return modules


@pytest.fixture
def connector_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    for name, module in stand_ins().items():
        monkeypatch.setitem(sys.modules, name, module)
    for name in OURS:
        sys.modules.pop(name, None)
    yield importlib.import_module(OURS[0])
    for name in OURS:
        sys.modules.pop(name, None)


def vllm_config(tmp_path: Path, extra: dict[str, object] | None = None) -> Any:
    config = SimpleNamespace(to_dict=dict, _commit_hash="c")
    settings = {"runtime_dir": str(tmp_path), **(extra or {})}
    return SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_extra_config=settings, is_kv_consumer=True, is_kv_producer=True
        ),
        model_config=SimpleNamespace(model="m", revision=None, dtype=torch.float32, hf_config=config),
        cache_config=SimpleNamespace(block_size=BLOCK, cache_dtype="auto", prefix_caching_hash_algo="sha256"),
        parallel_config=SimpleNamespace(tensor_parallel_size=2),
    )


def kv_cache_config(*more: type[SimpleNamespace]) -> Any:
    """One group of full attention, and one of each of those kinds."""
    groups = []
    for name, kind in zip("abc", (FullAttentionSpec, *more)):
        spec = kind(block_size=BLOCK, page_size_bytes=PAGE, dtype=torch.float32, sliding_window=2 * BLOCK)
        groups.append(SimpleNamespace(layer_names=[name], kv_cache_spec=spec))
    tensors = [SimpleNamespace(layers=group.layer_names, block_stride=PAGE) for group in groups]
    return SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=groups, kv_cache_tensors=tensors)


def made(module: Any, role: Role, tmp_path: Path, extra: dict[str, object] | None = None) -> Any:
    return module.ForebayConnector(vllm_config(tmp_path, extra), role, kv_cache_config())


def test_vllm_knows_the_class_by_its_name_however_often_it_is_imported(connector_module: Any) -> None:
    importlib.reload(connector_module)
    assert Factory.known == {"ForebayConnector": ("forebay.client.vllm", "ForebayConnector")}


def test_both_halves_name_one_group_of_shards(connector_module: Any, tmp_path: Path) -> None:
    scheduler = made(connector_module, Role.SCHEDULER, tmp_path)
    worker = made(connector_module, Role.WORKER, tmp_path)
    (theirs,), (ours,) = scheduler._specs, worker._specs
    assert (theirs.shard_rank, ours.shard_rank, ours.shard_size) == (0, 1, 2)
    assert theirs.group_fingerprint() == ours.group_fingerprint()
    scheduler.shutdown()
    worker.shutdown()


def staged(module: Any, role: Role, tmp_path: Path, stage: int, rank: int, layers: tuple[list[str], ...]) -> Any:
    """A connector of a pipeline of two stages with two tensor parallel ranks; `layers` are those of each group."""
    state = sys.modules["vllm.distributed.parallel_state"]
    state.get_pp_group = lambda: SimpleNamespace(rank_in_group=stage)  # type: ignore[attr-defined]
    state.get_tensor_model_parallel_rank = lambda: rank  # type: ignore[attr-defined]
    config = vllm_config(tmp_path, {"scheduler_wait_ms": 100})
    config.parallel_config.pipeline_parallel_size = 2
    config.kv_events_config = SimpleNamespace(enable_kv_cache_events=True)
    caches = kv_cache_config(SlidingWindowSpec)
    for group, names in zip(caches.kv_cache_groups, layers, strict=True):
        group.layer_names = names
    return module.ForebayConnector(config, role, caches)


def test_workers_tell_the_scheduler_what_each_stage_of_a_pipeline_holds(connector_module: Any, tmp_path: Path) -> None:
    """The second stage has more layers of full attention, and none with a window."""
    layers: tuple[tuple[list[str], ...], ...] = ((["a"], ["b"]), (["c", "d"], []))
    ranks = [(stage, rank) for stage in range(2) for rank in range(2)]
    workers = {
        (stage, rank): staged(connector_module, Role.WORKER, tmp_path, stage, rank, layers[stage])
        for stage, rank in ranks
    }
    scheduler = staged(connector_module, Role.SCHEDULER, tmp_path, 0, 0, layers[0])
    request = SimpleNamespace(request_id="r", num_tokens=100, block_hashes=[b"h" * 32] * 6, num_preemptions=0)
    assert scheduler._asked_namespaces("") == []
    assert scheduler.get_num_new_matched_tokens(request, 0) == (0, False)
    scheduler.set_xfer_handshake_metadata_pp_aware({at: workers[at].get_handshake_metadata() for at in ranks})
    asked = scheduler._asked_namespaces("")
    assert [[ns.block_bytes for ns in group] for group in asked] == [[PAGE, 2 * PAGE], [PAGE]]
    for (stage, _), worker in workers.items():
        own = worker._own_namespaces("")
        assert own[0].group_fingerprint == asked[0][stage].group_fingerprint
        assert (own[1] is None) == (stage == 1)
    assert len({worker._own_namespaces("")[0].key for worker in workers.values()}) == 4
    notices = [Notice(number, group, True, b"", (b"h",)) for group in range(2) for number in range(4 - 2 * group)]
    told = scheduler._ledger.take(notices)
    assert [notice.group for notice in told] == [0, 1]
    for connector in (scheduler, *workers.values()):
        connector.shutdown()


def test_stage_without_layers_of_a_group_loads_and_stores_nothing_of_it(connector_module: Any, tmp_path: Path) -> None:
    from forebay.client.vllm_work import Load, Part, Store
    from support.live import eventually

    connector = staged(connector_module, Role.WORKER, tmp_path, 1, 0, ([], ["b"]))
    connector.register_kv_caches({"b": torch.zeros((BLOCKS, PAGE // 4))})
    name = (b"h" * 32,)
    work = connector_module.ForebayMetadata(
        loads=(Load("r", (Part(0, name, (3,)),)),), stores=(Store("r", 0, b"", name, (3,)),)
    )
    connector.bind_connector_metadata(work)
    connector.start_load_kv(None)
    connector.wait_for_save()
    found: list[Any] = []
    eventually(
        lambda: (
            found.append(connector.get_transfer_results(set())) or bool(found[-1].finished_recving)  # type: ignore[func-returns-value]
        ),
        "the load has ended",
    )
    assert found[-1].failed_recving == set()
    assert connector._moving.open_stores == 0
    assert set(connector.get_kv_connector_stats().data) == {"loads", "load_seconds"}
    connector.shutdown()


def test_handshake_of_another_connector_is_nobodys_layers(connector_module: Any, tmp_path: Path) -> None:
    """vLLM's MultiConnector hands the first connector's to all: then a pipeline cannot be served."""
    worker, scheduler = (made(connector_module, role, tmp_path) for role in (Role.WORKER, Role.SCHEDULER))
    assert worker.get_handshake_metadata() is None
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): object()})
    assert len(scheduler._asked_namespaces("")) == 1
    pipeline = staged(connector_module, Role.SCHEDULER, tmp_path, 0, 0, (["a"], ["b"]))
    with pytest.raises(BadRequest, match="pipeline parallelism"):
        pipeline.set_xfer_handshake_metadata_pp_aware({(0, 0): object(), (1, 0): object()})
    for connector in (worker, scheduler, pipeline):
        connector.shutdown()


def test_scheduler_asks_for_what_workers_hold_where_vllm_gives_it_one_layers_kind_for_all(
    connector_module: Any, tmp_path: Path
) -> None:
    wide = FullAttentionSpec(block_size=BLOCK, page_size_bytes=2 * PAGE, dtype=torch.float32)
    caches = kv_cache_config()
    (group,) = caches.kv_cache_groups
    narrow = group.kv_cache_spec
    group.layer_names = ["a", "b"]
    group.kv_cache_spec = SimpleNamespace(block_size=BLOCK, kv_cache_specs={"a": narrow, "b": wide})
    worker = connector_module.ForebayConnector(vllm_config(tmp_path), Role.WORKER, caches)
    handshake = worker.get_handshake_metadata()
    group.kv_cache_spec = narrow
    scheduler = connector_module.ForebayConnector(vllm_config(tmp_path), Role.SCHEDULER, caches)
    scheduler.set_xfer_handshake_metadata_pp_aware({(0, 0): handshake})
    ((ours,),), (theirs,) = scheduler._asked_namespaces("reset"), worker._own_namespaces("reset")
    assert (ours.group_fingerprint, ours.block_bytes) == (theirs.group_fingerprint, 3 * PAGE)
    worker.shutdown()
    scheduler.shutdown()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"verfy": "load"}, "verfy"),
        ({"revision": 3}, "revision is text"),
        ({"scheduler_wait_ms": 1000}, "from 0 to 100"),
        ({"scheduler_wait_ms": True}, "from 0 to 100"),
        ({"budget_ms": -1}, "budget_ms"),
    ],
)
def test_wrong_settings_are_typed_errors_at_start_up(
    connector_module: Any, tmp_path: Path, extra: dict[str, object], words: str
) -> None:
    with pytest.raises(BadRequest, match=words):
        made(connector_module, Role.SCHEDULER, tmp_path, extra)


def test_groups_have_namespaces_of_their_own_and_a_load_of_them_fails_as_a_whole(
    connector_module: Any, tmp_path: Path
) -> None:
    from forebay.client.vllm_work import Load, Part
    from support.live import eventually

    connector = connector_module.ForebayConnector(
        vllm_config(tmp_path), Role.WORKER, kv_cache_config(SlidingWindowSpec)
    )
    assert len({spec.group_fingerprint() for spec in connector._specs}) == 2
    memory = torch.zeros((BLOCKS, PAGE // 4))
    connector.register_kv_caches({"a": memory, "b": memory})
    parts = (Part(0, (b"h" * 32,), (3,)), Part(1, (b"h" * 32,), (4,)))
    connector.bind_connector_metadata(connector_module.ForebayMetadata(loads=(Load("r", parts),)))
    connector.start_load_kv(None)
    found: list[TransferResults] = []
    eventually(
        lambda: (
            found.append(connector.get_transfer_results(set())) or bool(found[-1].finished_recving)  # type: ignore[func-returns-value]
        ),
        "the load has ended",
    )
    assert found[-1] == TransferResults(set(), {"r"}, {"r"})
    assert connector.get_block_ids_with_load_errors() == set()
    connector.shutdown()


def test_other_versions_and_recurrent_models_are_refused_at_start_up(connector_module: Any, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="MambaSpec"):
        connector_module.ForebayConnector(vllm_config(tmp_path), Role.WORKER, kv_cache_config(MambaSpec))
    connector_module.vllm.__version__ = "0.40.0"
    with pytest.raises(BadRequest, match=r"0\.40\.0 is not supported"):
        made(connector_module, Role.WORKER, tmp_path)


def test_random_hash_seed_is_refused(connector_module: Any, tmp_path: Path) -> None:
    """Nothing that is stored could be found again."""
    seeds = iter(("one", "two"))
    sys.modules["vllm.v1.core.kv_cache_utils"].resolve_none_hash_seed = lambda function: next(seeds)  # type: ignore[attr-defined]
    with pytest.raises(BadRequest, match="PYTHONHASHSEED"):
        made(connector_module, Role.WORKER, tmp_path)


def test_scheduler_without_a_daemon_answers_misses_and_keeps_no_block(connector_module: Any, tmp_path: Path) -> None:
    connector = made(connector_module, Role.SCHEDULER, tmp_path, {"scheduler_wait_ms": 100})
    request = SimpleNamespace(request_id="r", num_tokens=100, block_hashes=[b"h" * 32] * 6, num_preemptions=0)
    assert connector.get_num_new_matched_tokens(request, 0) == (0, False)
    connector.update_state_after_alloc(request, SimpleNamespace(get_block_ids=lambda: ([1, 2],)), 0)
    output = SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id="r", block_ids=([1, 2],), num_computed_tokens=0)],
        scheduled_cached_reqs=SimpleNamespace(req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=()),
        num_scheduled_tokens={"r": 32},
    )
    work = connector.build_connector_meta(output)
    assert isinstance(work, StepWork)
    assert work.stores[0].block_ids == (1, 2)
    assert connector.request_finished_all_groups(request, ([1, 2],)) == (False, None)
    assert connector.reset_cache() is True
    assert connector.requires_kv_delivery is False
    connector.update_connector_output(SimpleNamespace(finished_recving=None))
    connector.shutdown()


def test_worker_without_a_daemon_reports_every_block(connector_module: Any, tmp_path: Path) -> None:
    from forebay.client.vllm_work import Load, Part
    from support.live import eventually

    connector = made(connector_module, Role.WORKER, tmp_path)
    connector.register_kv_caches({"a": torch.zeros((BLOCKS, PAGE // 4))})
    work = connector_module.ForebayMetadata(loads=(Load("r", (Part(0, (b"h" * 32,) * 2, (3, 4)),)),))
    for _ in range(2):
        connector.unregister_kv_caches()
        connector.restore_kv_caches()
    connector.handle_preemptions(work)
    connector.bind_connector_metadata(work)
    connector.start_load_kv(None)
    connector.wait_for_save()
    found: set[str] = set()
    eventually(lambda: bool(found.update(connector.get_finished(set())[1] or ()) or found), "the load has ended")
    assert found == {"r"}
    assert connector.get_block_ids_with_load_errors() == {3, 4}
    stats = connector.get_kv_connector_stats()
    assert (stats.data["failed_blocks"], connector.get_kv_connector_stats()) == (2, None)
    connector.shutdown()


def test_events_tell_what_all_ranks_have_stored(connector_module: Any, tmp_path: Path) -> None:
    config = vllm_config(tmp_path)
    config.kv_events_config = SimpleNamespace(enable_kv_cache_events=True)
    scheduler = connector_module.ForebayConnector(config, Role.SCHEDULER, kv_cache_config())
    name = b"h" * 32
    of_ranks = [connector_module.ForebayEvents([Notice(rank, 0, True, b"p" * 32, (name,))]) for rank in range(2)]

    def told(events: Any) -> list[Any]:
        scheduler.update_connector_output(SimpleNamespace(finished_recving=None, kv_cache_events=events))
        found: list[Any] = scheduler.take_events()
        return found

    assert told(of_ranks[0]) == told(None) == []
    (stored,) = told(of_ranks[1])
    assert (stored.block_hashes, stored.parent_block_hash, stored.medium) == ([name], b"p" * 32, "CPU")
    of_ranks[0].add_events(of_ranks[1].get_all_events())
    of_ranks[0].increment_workers()
    assert (len(told(of_ranks[0].aggregate())), of_ranks[0].get_number_of_workers()) == (1, 2)
    (removed,) = told(connector_module.ForebayEvents([Notice(1, 0, False, b"", (name,))]))
    assert (removed.block_hashes, removed.group_idx) == ([name], 0)
    of_ranks[0].clear_events()
    assert told(of_ranks[0]) == []
    scheduler.shutdown()


def test_worker_tells_events_only_where_the_engine_publishes_them(connector_module: Any, tmp_path: Path) -> None:
    for wanted in (False, True):
        config = vllm_config(tmp_path)
        config.kv_events_config = SimpleNamespace(enable_kv_cache_events=wanted)
        worker = connector_module.ForebayConnector(config, Role.WORKER, kv_cache_config())
        worker._moving._tell(0, (b"h" * 32,), stored=True)
        events = worker.get_kv_connector_kv_cache_events()
        assert (events is not None) == wanted
        assert worker.get_kv_connector_kv_cache_events() is None
        worker.shutdown()
    assert events.get_all_events() == [Notice(1, 0, True, b"", (b"h" * 32,))]


def test_caches_on_a_gpu_that_cannot_be_used_are_a_typed_error_at_start_up(
    connector_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It names what to install; with a GPU the engine that moves its blocks is made before the first of them."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    connector = made(connector_module, Role.WORKER, tmp_path)
    caches = {"a": CudaPages(np.zeros((BLOCKS, PAGE), np.uint8))}
    with pytest.raises(DmaError, match=r"forebay\[cuda13\]"):
        connector.register_kv_caches(caches)
    devices = LateDevices()
    connector._client._copier = DeviceCopier(NumpyCopier(), devices)
    connector.register_kv_caches(caches)
    assert sorted(devices.made) == [0]
    connector.shutdown()


class CudaPages(CudaTensor):
    """With blocks on axis 0 already."""

    def movedim(self, axis: int, to: int) -> CudaPages:
        assert (axis, to) == (0, 0)
        return self

    def stride(self, axis: int | None = None) -> Any:
        strides = super().stride()
        return strides if axis is None else strides[axis]


def test_stats_add_up_over_ranks_and_reach_the_series(connector_module: Any) -> None:
    from prometheus_client import CollectorRegistry, Counter

    registry = CollectorRegistry()

    def counter(name: str, text: str, labelnames: list[str]) -> Counter:
        return Counter(name, text, labelnames, registry=registry)

    build = connector_module.ForebayConnector.build_kv_connector_stats
    total = build({"loads": 1, "load_seconds": 0.25}).aggregate(build({"loads": 2}))
    assert (total.reduce(), total.is_empty()) == ({"loads": 3, "load_seconds": 0.25}, False)
    metrics = connector_module.ForebayConnector.build_prom_metrics(
        None, {Counter: counter}, ["engine"], {0: ["0"], 1: ["1"]}
    )
    metrics.observe(total.data, 1)
    metrics.observe({"unknown": 1}, 1)
    assert registry.get_sample_value("vllm:forebay_loads_total", {"engine": "1"}) == 3
    assert registry.get_sample_value("vllm:forebay_loads_total", {"engine": "0"}) == 0
    total.reset()
    assert total.is_empty()


def test_prefills_are_measured_by_the_first_rank_from_before_a_step_to_after_it(
    connector_module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from forebay.client.vllm_work import Prefill
    from support.live import eventually

    assert made(connector_module, Role.WORKER, tmp_path)._meter is None
    ranks = sys.modules["vllm.distributed.parallel_state"]
    monkeypatch.setattr(ranks, "get_tensor_model_parallel_rank", lambda: 0)
    connector = made(connector_module, Role.WORKER, tmp_path)
    told: list[tuple[int, int, float]] = []
    monkeypatch.setattr(connector._client, "report_prefill", lambda *measured: told.append(measured) or True)
    connector.register_kv_caches({"a": torch.zeros((BLOCKS, PAGE // 4))})
    connector.bind_connector_metadata(connector_module.ForebayMetadata(prefill=Prefill(64, 32)))
    connector.start_load_kv(None)
    connector.wait_for_save()
    eventually(lambda: bool(told), "the prefill is told")
    ((tokens, depth, seconds),) = told
    assert (tokens, depth) == (64, 32)
    assert seconds > 0
    connector.shutdown()


@pytest.mark.parametrize(("policy", "plan"), [("recompute", "auto"), ("fail", "always")])
def test_loads_are_given_up_only_where_the_engine_computes_what_is_missing(
    connector_module: Any, tmp_path: Path, policy: str, plan: str
) -> None:
    """The lookups are the scheduler's, which go by the plan all the same."""
    config = vllm_config(tmp_path)
    config.kv_transfer_config.kv_load_failure_policy = policy
    for role, expected in ((Role.WORKER, plan), (Role.SCHEDULER, "auto")):
        connector = connector_module.ForebayConnector(config, role, kv_cache_config())
        assert connector._client.options.plan == expected
        connector.shutdown()


def test_requests_that_come_are_counted_until_they_go(connector_module: Any, tmp_path: Path) -> None:
    connector = made(connector_module, Role.SCHEDULER, tmp_path)
    request = SimpleNamespace(request_id="r", num_tokens=100)
    connector.on_new_request(request)
    assert connector._scheduler.uncomputed == 1
    connector.request_finished_all_groups(request, ([],))
    assert connector._scheduler.uncomputed == 0
    connector.shutdown()
