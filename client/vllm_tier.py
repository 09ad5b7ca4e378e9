"""vLLM's offloading keeps a secondary tier in forebay: a `SecondaryTierManager` that stock vLLM loads by its module.

It runs in vLLM's scheduler process under `TieringOffloadingSpec` and sees vLLM's CPU tier only, so it copies from host
memory to host memory and holds no GPU code. A chunk is one row of vLLM's memory: the bytes of all its workers. The
scheduler never waits: lookups answer RETRY until the daemon has been asked, copies are done by threads (`tier_jobs`).

Rejected: a namespace for each KV cache group (all rows are as long, and the group is part of vLLM's key).
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Collection, Iterable
from typing import Any

from forebay.client.engine_options import client_of, client_options
from forebay.client.segments import SegmentTable
from forebay.client.tier_jobs import Finished, TierJobs
from forebay.kvstore.errors import BadRequest, LayoutError
from forebay.kvstore.namespace import NamespaceSpec

try:
    import vllm
    from vllm.v1.kv_offload.base import (
        Locality,
        LookupResult,
        Medium,
        OffloadingEvent,
        RequestOffloadingContext,
    )
    from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager
except ImportError as error:
    raise ImportError(
        f"forebay.client.vllm_tier needs a vLLM with tiered offloading, 0.33 or newer ({error})"
    ) from error

GROUP_BYTES = 4
"""The end of vLLM's keys: the cache group."""

log = logging.getLogger(__name__)


class ForebayTier(SecondaryTierManager):
    """A tier of vLLM's tiered offloading. Its options are the other keys of its entry in ``secondary_tiers``.

    Args:
        offloading_spec, primary_kv_view, tier_type, backpressure_detector: vLLM's.
        revision: the name of these exact weights; two revisions share nothing.
        enable_kv_events: tell vLLM's KV events of what was stored.
        locality: what those events say of this tier, ``LOCAL`` or ``REMOTE``.
        options: keys of `engine_options.CLIENT_KEYS`.
    Raises:
        BadRequest, LayoutError: an option is wrong, or vLLM's memory cannot be copied.
    """

    medium = Medium.CPU

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        revision: str = "",
        enable_kv_events: bool = False,
        locality: str = "LOCAL",
        **options: object,
    ) -> None:
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        if not isinstance(revision, str) or not isinstance(enable_kv_events, bool):
            raise BadRequest("revision is text and enable_kv_events true or false")
        if locality not in ("LOCAL", "REMOTE"):
            raise BadRequest(f"locality is LOCAL or REMOTE, not {locality!r}")
        self.locality = Locality(locality)
        table = _table(primary_kv_view)
        spec = namespace_spec(offloading_spec.config, table.block_bytes, revision)
        spec.validate()
        client = client_of(client_options(options, name=f"vllm-tier {spec.model}"[:120]))
        self._prefixes = _prefix_groups(offloading_spec.config.groups)
        self._jobs = TierJobs(client, client.open_namespace(spec), table, _name, self._chain_of)
        self._row_bytes = table.block_bytes
        self._keys: dict[int, list[Any]] = {}
        self._events: list[Any] = []
        self._tells_events = enable_kv_events and bool(offloading_spec.kv_events_config.enable_kv_cache_events)
        if enable_kv_events and not self._tells_events:
            log.warning("enable_kv_events is set on tier %s, but vLLM's KV cache events are off", tier_type)

    # Lookups

    def lookup(self, key: Any, req_context: Any) -> Any:
        found = self._jobs.lookup(req_context.req_id, key)
        if found is None:
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def _chain_of(self, key: bytes) -> bytes:
        group = key[-GROUP_BYTES:]
        return group if group in self._prefixes else b""

    def on_schedule_end(self, context: Any) -> None:
        self._jobs.ask()

    def on_new_request(self, req_context: Any) -> Any:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: Any) -> None:
        self._jobs.forget(req_context.req_id)

    def touch(self, keys: Collection[Any], req_context: Any) -> None:
        self._jobs.touch(list(keys))

    # Transfers

    def submit_store(self, job_metadata: Any) -> None:
        keys, rows = self._begin(job_metadata)
        self._jobs.store(job_metadata.job_id, job_metadata.req_context.req_id, keys, rows)

    def submit_load(self, job_metadata: Any) -> None:
        keys, rows = self._begin(job_metadata)
        self._jobs.load(job_metadata.job_id, keys, rows)

    def get_finished_jobs(self) -> Iterable[Any]:
        return [self._result(job) for job in self._jobs.finished()]

    def drain_jobs(self) -> None:
        self._jobs.drain()

    def take_events(self) -> Iterable[Any]:
        events, self._events = self._events, []
        return events

    def shutdown(self) -> None:
        self._jobs.close()

    def _begin(self, job: Any) -> tuple[list[Any], list[int]]:
        keys = list(job.keys)
        self._keys[job.job_id] = keys
        return keys, [int(row) for row in job.chunk_ids]

    def _result(self, job: Finished) -> Any:
        keys = self._keys.pop(job.job_id)
        copied = [key for key, right in zip(keys, job.right, strict=True) if right]
        if self._tells_events and not job.is_load and job.success:
            self._events.append(OffloadingEvent(keys=keys, medium=self.medium, removed=False, locality=self.locality))
        partly = job.is_load and not job.success and bool(copied)
        return JobResult(
            job_id=job.job_id,
            success=job.success,
            successful_keys=tuple(copied) if partly else None,
            transfer_time=job.transfer_s,
            transfer_bytes=len(copied) * self._row_bytes,
        )


def namespace_spec(config: Any, row_bytes: int, revision: str) -> NamespaceSpec:
    """The namespace of a vLLM's chunks, from its `OffloadingConfig`: all that must agree for their bytes to fit."""
    parallel, cache = config.parallel, config.cache
    facts = {
        "groups": [(int(group.tokens_per_block), list(group.layer_names)) for group in config.groups],
        "worker_bytes": config.worker_kv_bytes_per_block,
        "parallel": [parallel.tp_size, parallel.pp_size, parallel.pcp_size, parallel.dcp_size, parallel.world_size],
        "agnostic": parallel.is_parallelism_agnostic,
        "replicated": config.replicated_layout,
        "canonical": config.canonical_layout,
        "hash_tokens": cache.tokens_per_hash,
        "chunk_blocks": cache.blocks_per_chunk,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    where = f"{_device()}-{platform.machine()}"
    return NamespaceSpec(
        model=str(config.model.name),
        revision=revision,
        dtype=str(config.model.dtype),
        block_tokens=int(cache.tokens_per_hash) * int(cache.blocks_per_chunk),
        segment_bytes=(row_bytes,),
        layout=f"vllm-{vllm.__version__}/tier/{where}/{config.kv_cache_layout}/{digest}",
        hash_scheme="vllm-offload-key-sha256",
    )


def _device() -> str:
    """The kind of device whose layout the bytes have."""
    from vllm.platforms import current_platform

    return str(current_platform.device_type)


def _table(view: memoryview) -> SegmentTable:
    if view.readonly or not view.c_contiguous or view.ndim != 2 or view.strides is None:
        raise LayoutError("vLLM's primary tier must be writable contiguous rows")
    return SegmentTable.packed(view, view.strides[0])


def _prefix_groups(groups: Iterable[Any]) -> frozenset[bytes]:
    """Those whose leading chunks vLLM loads, as its keys name them; of windows it wants the last ones."""
    return frozenset(
        int(group.group_id).to_bytes(GROUP_BYTES, "big")
        for group in groups
        if group.sliding_window_size_in_chunks is None
    )


def _name(key: bytes) -> bytes:
    """vLLM's key (block hash of any width and group) as a name of the width that a namespace has."""
    return hashlib.sha256(key).digest()
