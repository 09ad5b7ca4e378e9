"""vLLM's scheduler out of its source archive with our half in it: run by `test_vllm_suites.py`, never by itself."""

from __future__ import annotations

from typing import Any

import pytest
from tests.v1.kv_connector.unit.utils import (
    create_model_runner_output,
    create_request,
    create_scheduler,
    create_vllm_config,
    make_kv_cache_config,
)
from vllm.v1.request import RequestStatus

from support.live import eventually

BLOCK, WHOLE = 16, 5


def scheduler_with(windows: bool) -> Any:
    config = create_vllm_config(
        block_size=BLOCK, kv_load_failure_policy="recompute", disable_hybrid_kv_cache_manager=False
    )
    groups = make_kv_cache_config(BLOCK, swa_enabled=True, sw_size=2 * BLOCK, num_blocks=100) if windows else None
    return create_scheduler(config, num_blocks=100, kv_cache_config=groups, hash_block_size=BLOCK)


def admitted(scheduler: Any, id_: int = 1) -> Any:
    """A request of five blocks and a half, whose five are stored, up to its load."""
    request = create_request(request_id=id_, block_size=BLOCK, num_tokens=WHOLE * BLOCK + 8, do_remote_prefill=True)
    scheduler.add_request(request)
    work = scheduler.schedule().kv_connector_metadata
    assert request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
    assert request.num_computed_tokens == WHOLE * BLOCK
    (load,) = work.loads
    ids = scheduler.kv_cache_manager.get_block_ids(request.request_id)
    assert len(load.parts) == len(ids)
    for part in load.parts:
        assert part.block_ids == tuple(block for block in ids[part.group] if block)
    return request


def told(scheduler: Any, request: Any, failed: bool = False) -> None:
    """The workers have ended its load."""
    output = create_model_runner_output([], finished_recving={request.request_id})
    if failed:
        output.kv_connector_output.failed_recving = {request.request_id}
    scheduler.update_from_output(scheduler.schedule(), output)


def nothing_left(scheduler: Any, free: int) -> None:
    planning = scheduler.connector._planning
    assert (planning.open_leases, planning.tracked) == (0, 0)
    assert scheduler.kv_cache_manager.block_pool.get_num_free_blocks() == free
    client = scheduler.connector._client
    eventually(lambda: client.status()["store"]["leases"] == 0, "no lease is left")


@pytest.mark.parametrize("windows", [False, True])
def test_hit_is_loaded_and_the_rest_computed(windows: bool) -> None:
    scheduler = scheduler_with(windows)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    request = admitted(scheduler)
    told(scheduler, request)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens == {request.request_id: 8}
    scheduler.update_from_output(output, create_model_runner_output([request], use_eos=True))
    scheduler.schedule()
    nothing_left(scheduler, free)


def test_load_that_failed_as_a_whole_is_computed() -> None:
    scheduler = scheduler_with(windows=True)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    request = admitted(scheduler)
    told(scheduler, request, failed=True)
    output = scheduler.schedule()
    assert output.num_scheduled_tokens[request.request_id] == min(64, WHOLE * BLOCK + 8)
    while not request.is_finished():
        scheduler.update_from_output(output, create_model_runner_output([request], use_eos=True))
        output = scheduler.schedule()
    nothing_left(scheduler, free)


@pytest.mark.parametrize("windows", [False, True])
def test_abort_during_a_load_leaves_nothing(windows: bool) -> None:
    scheduler = scheduler_with(windows)
    free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    request = admitted(scheduler)
    scheduler.finish_requests(request.request_id, RequestStatus.FINISHED_ABORTED)
    told(scheduler, request)
    nothing_left(scheduler, free)
