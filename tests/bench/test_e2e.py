"""The end-to-end run: what counts as good, and how it is summed up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from forebay.bench.e2e import CHATS, LATE_CHATS, SCRIPT, row, shared_tokens, spread, summary
from forebay.bench.e2e_server import BLOCK, Answer

CASE = SCRIPT[1]
COMPUTED = Answer(tuple(range(100)), (7, 8), "x", 90.0, computed=100)
RESTORED = replace(COMPUTED, ttft_ms=10.0, computed=4, restored=96)


def row_of(restored: int = 0, without_ms: float = 100.0, with_ms: float = 50.0, good: bool = True) -> dict[str, Any]:
    return {
        "restored_tokens": restored,
        "ttft_ms_without": without_ms,
        "ttft_ms_with": with_ms,
        "as_expected": good,
    }


def test_hits_and_misses_are_told_apart() -> None:
    result = summary([row_of(), row_of(32), row_of(32, 90.0, 10.0), row_of(32, 10.0, 20.0)])
    assert (result["hits"]["requests"], result["misses"]["requests"], result["hits_slower"]) == (3, 1, 1)
    assert result["hits"]["ratio"] == {"min": 0.5, "p25": 1.25, "p50": 2.0, "p75": 5.5, "max": 9.0}
    assert result["misses"]["ttft_ms_with"] == dict.fromkeys(("min", "p25", "p50", "p75", "max"), 50.0)
    assert result["ok"]


def test_one_request_that_is_not_as_expected_fails_the_run() -> None:
    assert not summary([row_of(32), row_of(good=False)])["ok"]
    assert summary([row_of()])["hits"]["ratio"] == spread([]) == {}


@pytest.mark.parametrize(
    ("with_", "expected", "good"),
    [
        (RESTORED, 96, True),
        (RESTORED, 64, False),
        (replace(RESTORED, ids=(7, 9)), 96, False),
        (replace(RESTORED, prompt=(1,)), 96, False),
        (replace(RESTORED, ttft_ms=91.0), 96, False),
        (COMPUTED, 0, False),
    ],
    ids=["hit", "other tokens restored", "other answer", "other prompt", "slower", "nothing restored"],
)
def test_hit_must_be_exact_identical_and_faster(with_: Answer, expected: int, good: bool) -> None:
    assert row(CASE, with_, COMPUTED, expected)["as_expected"] is good


def test_miss_may_take_its_time_where_nothing_can_be_stored() -> None:
    assert row(SCRIPT[0], replace(COMPUTED, ttft_ms=99.0), COMPUTED, 0)["as_expected"]


def test_whole_blocks_of_the_longest_common_prefix_are_expected() -> None:
    """Never the whole prompt: its last token is computed."""
    prompt = list(range(3 * BLOCK))
    assert shared_tokens(prompt, []) == 0
    assert shared_tokens(prompt, [prompt[: BLOCK + 5], prompt[: 2 * BLOCK + 1], [9]]) == 2 * BLOCK
    assert shared_tokens(prompt, [[*prompt, 5]]) == 2 * BLOCK
    assert shared_tokens([*prompt, 5], [prompt]) == 3 * BLOCK
    assert shared_tokens(prompt, [[*prompt[:BLOCK], 999, *prompt[BLOCK + 1 :]]]) == BLOCK


def test_script_restores_after_every_kind_of_restart() -> None:
    """A case that must restore nothing comes only where nothing can be there."""
    assert {case.name for case in SCRIPT if case.restores} == {"other server", "server restarted", "other server again"}
    assert {case.name for case in SCRIPT if not case.restores} == {"cold", "daemon killed", "daemon restarted"}
    assert not set(CHATS) & set(LATE_CHATS)
