"""A pytest plug-in (`-p vllm_connector_plugin`) that runs vLLM's own tests of its scheduler with our connector in it.

Their helpers put NIXL's connector into the scheduler and mark a request whose KV a peer has computed. Here it is ours,
and what the peer has computed is stored in a daemon before the request comes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tests.v1.kv_connector.unit import utils

from forebay.client import Client
from support.live import LiveDaemon, eventually

_daemon = LiveDaemon()
_connectors: list[Any] = []
_create_config, _create_scheduler = utils.create_vllm_config, utils.create_scheduler


def _config(*args: Any, **kwargs: Any) -> Any:
    if "kv_connector" not in kwargs:
        kwargs |= {"kv_connector": "ForebayConnector", "kv_connector_module_path": "forebay.client.vllm"}
        kwargs |= {"kv_role": "kv_both"}
        kwargs["kv_connector_extra_config"] = {"runtime_dir": str(_daemon.runtime_dir), "scheduler_wait_ms": 100}
    return _create_config(*args, **kwargs)


def _scheduler(*args: Any, **kwargs: Any) -> Any:
    scheduler = _create_scheduler(*args, **kwargs)
    connector, add = scheduler.connector, scheduler.add_request
    _connectors.append(connector)

    def add_request(request: Any) -> None:
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            _store(connector, request)
        add(request)

    scheduler.add_request = add_request
    return scheduler


def _store(connector: Any, request: Any) -> None:
    """Its whole blocks, as another engine would have."""
    planning = connector._planning
    for (ns,), geometry in zip(planning._namespaces, planning._geometries, strict=True):
        names = geometry.names_of(request.block_hashes, 0, len(request.block_hashes))
        connector._client.store(ns, names, np.zeros((len(names), ns.block_bytes), np.uint8))


def pytest_configure(config: Any) -> None:
    _daemon.__enter__()
    utils.create_vllm_config, utils.create_scheduler = _config, _scheduler


@pytest.fixture(autouse=True)
def clean() -> Any:
    """Nothing stored by one test is found by the next, and none leaves a lease."""
    yield
    for connector in _connectors:
        connector.shutdown()
    _connectors.clear()
    with Client(_daemon.runtime_dir) as client:
        eventually(lambda: client.clear().kept == 0, "nothing is leased, and all is gone")


def pytest_unconfigure(config: Any) -> None:
    _daemon.__exit__(None, None, None)
