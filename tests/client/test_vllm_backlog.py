"""What waits in front of the engine, as its scheduler tells, and which prompt a step's time will be that of."""

from __future__ import annotations

import pytest

from forebay.client.vllm_backlog import PREFILL_TOKENS_MIN, EngineBacklog, prefill_of
from forebay.client.vllm_work import Prefill
from forebay.kvstore.planner import Backlog


def test_a_request_is_no_backlog_of_its_own() -> None:
    backlog = EngineBacklog()
    for id_, tokens in (("a", 100), ("b", 200), ("c", 400)):
        backlog.waits(id_, tokens)
    assert backlog.before("c") == Backlog(2, 300)
    assert backlog.before("unknown") == Backlog(3, 700)


def test_prompts_under_way_count_with_what_is_left_of_them() -> None:
    backlog = EngineBacklog()
    backlog.waits("a", 1000)
    backlog.waits("b", 50)
    backlog.ran("a", 600)
    assert backlog.before("b") == Backlog(0, 600)
    assert backlog.before("a") == Backlog(1, 50)
    backlog.ran("a", 0)
    assert backlog.before("b") == Backlog(0, 0)
    assert len(backlog) == 1


def test_what_turns_out_to_be_cached_is_taken_off() -> None:
    backlog = EngineBacklog()
    backlog.waits("a", 1000)
    backlog.waits("a", 200)
    assert backlog.before("b") == Backlog(1, 200)


def test_who_has_gone_leaves_nothing_behind_and_who_decodes_is_not_counted() -> None:
    backlog = EngineBacklog()
    backlog.waits("a", 1000)
    assert backlog.gone("a")
    assert not backlog.gone("a")
    backlog.ran("decoding", 5)
    assert (len(backlog), backlog.before("b")) == (0, Backlog(0, 0))


@pytest.mark.parametrize(
    ("scheduled", "computed", "expected"),
    [
        ({}, {}, None),
        ({"a": 512}, {"a": 1024}, Prefill(512, 1024)),
        ({"a": 512, "b": 1, "c": 1}, {"a": 0, "b": 9, "c": 9}, Prefill(512, 0)),
        ({"a": 512, "b": 512}, {"a": 0, "b": 0}, None),
        ({"a": 1, "b": 1}, {"a": 40, "b": 50}, None),
        ({"a": PREFILL_TOKENS_MIN - 1}, {"a": 0}, None),
        ({"a": 512}, {}, None),
    ],
    ids=["nothing", "alone", "beside decodes", "two prompts", "decodes", "too small", "unknown"],
)
def test_a_step_is_the_prefill_of_the_prompt_that_fills_it(
    scheduled: dict[str, int], computed: dict[str, int], expected: Prefill | None
) -> None:
    assert prefill_of(scheduled, computed) == expected
