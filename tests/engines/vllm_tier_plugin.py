"""A pytest plug-in (`-p vllm_tier_plugin`) that runs vLLM's own tiering tests with our tier in its example's place.

The tests expect what an in-memory example does: jobs that are finished when they are submitted, and a look at what it
holds. So the class that takes its place waits for our threads where the scheduler would come back later, gives each
tier a namespace of its own, and shows the daemon's blocks as the example's `chunks`. Everything else is `ForebayTier`
and a real daemon.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any
from unittest.mock import Mock

import pytest
import vllm.v1.kv_offload.tiering.example.manager as example
from vllm.v1.kv_offload.base import LookupResult

from forebay.client import scattered
from forebay.client.vllm_tier import ForebayTier, _name
from support import fake_vllm
from support.live import LiveDaemon

_daemon = LiveDaemon()
_numbers = itertools.count()
_tiers: list[ForebayTier] = []


class _Chunks:
    """What the tier holds, as the example shows it."""

    def __init__(self, tier: TierForTests) -> None:
        self._tier = tier
        self._jobs = tier._jobs

    def __setitem__(self, key: bytes, value: bool) -> None:
        jobs = self._jobs
        assert jobs._table is not None
        scattered.store_chain(jobs._client, jobs._ns, [_name(key)], jobs._table, [0], b"")
        self._tier.stored.add(key)

    def __contains__(self, key: bytes) -> bool:
        return scattered.stored(self._jobs._client, self._jobs._ns, [_name(key)]) == [True]


class TierForTests(ForebayTier):
    """Our tier where the example stands."""

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        custom_param: int = 0,
        backpressure_detector: Any = None,
    ) -> None:
        if isinstance(offloading_spec, Mock):
            offloading_spec = fake_vllm.spec()
        super().__init__(
            offloading_spec,
            primary_kv_view,
            tier_type,
            backpressure_detector,
            revision=f"tier {next(_numbers)}",
            runtime_dir=str(_daemon.runtime_dir),
            budget_ms=500,
        )
        self.chunks = _Chunks(self)
        self.stored: set[bytes] = set()
        self.completed_jobs: list[Any] = []
        _tiers.append(self)

    def lookup(self, key: Any, req_context: Any) -> Any:
        if super().lookup(key, req_context) is LookupResult.RETRY:
            self._jobs.ask()
            self._jobs.drain()
        return super().lookup(key, req_context)

    def submit_store(self, job_metadata: Any) -> None:
        super().submit_store(job_metadata)
        self.stored.update(job_metadata.keys)
        self._complete()

    def submit_load(self, job_metadata: Any) -> None:
        super().submit_load(job_metadata)
        self._complete()

    def _complete(self) -> None:
        self._jobs.drain()
        self.completed_jobs += super().get_finished_jobs()

    def get_finished_jobs(self) -> Iterable[Any]:
        done, self.completed_jobs = self.completed_jobs, []
        return done

    def get_num_chunks(self) -> int:
        return sum(key in self.chunks for key in self.stored)


def pytest_configure(config: pytest.Config) -> None:
    _daemon.start()
    example.ExampleSecondaryTierManager = TierForTests


def pytest_runtest_teardown(item: pytest.Item) -> None:
    while _tiers:
        _tiers.pop().shutdown()


def pytest_unconfigure(config: pytest.Config) -> None:
    _daemon.__exit__(None, None, None)
