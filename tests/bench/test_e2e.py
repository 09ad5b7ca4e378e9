"""The end-to-end run's one line: what counts as good."""

from __future__ import annotations

from typing import Any

from forebay.bench.e2e import SCRIPT, summary


def row_of(restored: int = 0, without_ms: float = 100.0, with_ms: float = 50.0, good: bool = True) -> dict[str, Any]:
    return {
        "restored_tokens": restored,
        "ttft_ms_without": without_ms,
        "ttft_ms_with": with_ms,
        "as_expected": good,
    }


def test_gains_are_of_the_requests_that_restored_something() -> None:
    result = summary([row_of(), row_of(32), row_of(32, 90.0, 10.0), row_of(32, 10.0, 20.0)])
    assert (result["ttft_gain_min"], result["ttft_gain_median"], result["ttft_gain_max"]) == (0.5, 2.0, 9.0)
    assert result["ok"]


def test_one_request_that_is_not_as_expected_fails_the_run() -> None:
    assert not summary([row_of(32), row_of(good=False)])["ok"]
    assert summary([row_of()])["ttft_gain_min"] == 0.0


def test_script_restores_after_every_kind_of_restart() -> None:
    """A case that must restore nothing comes only where nothing can be there."""
    assert {ask.case for ask in SCRIPT if ask.restores} == {"other engine", "engine restarted", "other engine again"}
    assert {ask.case for ask in SCRIPT if not ask.restores} == {"cold", "daemon killed", "daemon restarted"}
