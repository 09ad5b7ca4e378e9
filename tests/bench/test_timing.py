"""Samples, series and pairs."""

from __future__ import annotations

import pytest

from forebay.bench.timing import Pair, Sample, Series, by_turns, percentile, take


def series(*samples: tuple[float, float]) -> Series:
    return Series(tuple(Sample(seconds, share) for seconds, share in samples))


def test_best_sample_is_the_fastest_that_was_not_held_up() -> None:
    """A sample that waited for a core measured the machine's other work."""
    assert series((1.0, 0.5), (2.0, 0.0), (3.0, 0.01)).best_s == 2.0


def test_samples_are_all_used_when_all_were_held_up() -> None:
    """A busy machine gives a poor figure, not none."""
    held_up = series((1.0, 0.5), (2.0, 0.9))
    assert held_up.best_s == 1.0
    assert held_up.rejected == 2


def test_ratios_compare_the_best_of_both_sides() -> None:
    """Times: more is worse. Rates: less is worse."""
    pair = Pair(bound=series((1.0, 0), (2.0, 0)), measured=series((4.0, 0), (2.0, 0)))
    assert pair.time_ratio == 2.0
    assert pair.rate_ratio == 0.5


def test_typical_ratio_is_the_median_of_the_turns() -> None:
    """A bound that doubles in some turns does not set the ratio by itself."""
    pair = Pair(
        bound=series((1.0, 0), (8.0, 0), (1.0, 0)),
        measured=series((4.0, 0), (1.0, 0), (2.0, 0)),
    )
    assert pair.typical_rate_ratio == 0.5
    assert pair.rate_ratio == 1.0


def test_note_counts_rejected_samples() -> None:
    """Readers must see how quiet the machine was."""
    assert Pair(series((1, 0)), series((1, 0))).note() == ""
    assert Pair(series((1, 0)), series((1, 1))).note() == "1 of 2 samples held up"
    assert Pair(series((1, 1)), series((1, 1))).note() == "all samples were held up by other work"


def test_bound_and_measurement_take_turns() -> None:
    """Both must meet the same machine."""
    calls: list[str] = []

    def action(name: str) -> float:
        calls.append(name)
        return 1.0

    pair = by_turns(lambda: action("bound"), lambda: action("measured"), 3)
    assert calls == ["bound", "measured"] * 3
    assert len(pair.bound.samples) == len(pair.measured.samples) == 3


def test_two_turns_are_taken_however_little_time_there_is() -> None:
    """One could not be told from an outlier."""
    assert len(by_turns(lambda: 1.0, lambda: 1.0, 100, budget_s=-1.0).bound.samples) == 2


def test_sample_counts_the_seconds_that_its_action_returns() -> None:
    """An action may leave its own preparation out."""
    sample = take(lambda: 0.25)
    assert sample.seconds == 0.25
    assert sample.held_up_share >= 0


@pytest.mark.parametrize(("percent", "value"), [(50, 5), (90, 9), (99, 10), (100, 10), (1, 1)])
def test_percentile_is_the_smallest_value_not_exceeded_by_that_share(percent: float, value: float) -> None:
    """Of ten values, half do not exceed the fifth."""
    assert percentile([10, 9, 8, 7, 6, 5, 4, 3, 2, 1], percent) == value
