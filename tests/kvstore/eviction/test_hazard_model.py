"""Hazards by age, and the index that says how fast a place pays."""

from __future__ import annotations

import itertools
import random

import pytest

from forebay.kvstore.eviction.hazard_model import (
    BINS,
    FIRST_BIN_S,
    HORIZON_S,
    HazardModel,
    bin_of,
    chance_within,
    gittins,
)

EDGES_S = [0.0, *(FIRST_BIN_S * 2 ** (k / 2) for k in range(BINS))]


def nothing(classes: int) -> list[list[float]]:
    return [[0.0] * BINS for _ in range(classes)]


def test_bins_are_half_octaves() -> None:
    assert [bin_of(age) for age in (0.0, 0.24, 0.25, 0.36, 0.5, 1.0, 1e9)] == [0, 0, 1, 2, 3, 5, BINS - 1]


def test_index_is_the_best_ratio_over_all_stopping_times() -> None:
    """The one pass over the bins finds what trying every stopping time finds."""
    dice = random.Random(1)
    for _ in range(20):
        hazards = [dice.choice((0.0, 0.01, 0.3, 0.9)) for _ in range(BINS)]
        for at, found in enumerate(gittins(hazards)):
            stays, gain, time, best = 1.0, 0.0, 0.0, 0.0
            for k in range(at, BINS):
                after = stays * (1 - hazards[k])
                gain, time = gain + stays - after, time + (EDGES_S[k + 1] - EDGES_S[k]) * (stays + after) / 2
                stays, best = after, max(best, gain / time)
            assert found == pytest.approx(best, rel=1e-9)


def test_nothing_learned_is_worth_nothing() -> None:
    model = HazardModel(2)
    model.refresh(nothing(2))
    assert model.value(0, 5.0) == 0.0
    assert chance_within(model.hazards(0), 5.0, 100.0) == 0.0


def test_class_that_returns_is_worth_more_and_most_before_its_peak() -> None:
    """Blocks of class 0 come back after 8 s, those of class 1 wait for ever."""
    model = HazardModel(2)
    model.returned(0, 8.0, 5000)
    waiting = nothing(2)
    waiting[1][bin_of(500.0)] = 5000
    model.refresh(waiting)
    assert model.value(0, 6.0) > model.value(0, 1.0) > model.value(1, 1.0)
    assert model.value(0, 30.0) < model.value(0, 6.0)
    assert chance_within(model.hazards(0), 1.0, 20.0) > 0.9 > 0.1 > chance_within(model.hazards(1), 1.0, 20.0)
    assert chance_within(model.hazards(0), 1.0, 2.0) < 0.1


def test_few_observations_count_little() -> None:
    """A class of which little was seen is taken for what all are."""
    model = HazardModel(2)
    model.returned(0, 8.0, 1_000_000)
    model.returned(1, 100.0, 2)
    model.refresh(nothing(2))
    assert chance_within(model.hazards(1), 7.0, 2.0) > 0.5


def test_value_is_continuous_in_age() -> None:
    """Otherwise all pieces within half an octave would be the same."""
    model = HazardModel(1)
    model.returned(0, 8.0, 5000)
    model.returned(0, 60.0, 5000)
    model.refresh(nothing(1))
    ages = [0.01 * 1.01**k for k in range(1200)]
    values = [model.value(0, age) for age in ages]
    assert all(abs(b - a) < 0.05 * max(values) for a, b in itertools.pairwise(values))


def test_what_is_given_up_has_reached_its_age_and_no_more() -> None:
    """Censored blocks lower the hazard of the ages that they reached, not of later ones."""
    seen, censored = HazardModel(1), HazardModel(1)
    for model in (seen, censored):
        model.returned(0, 2.0, 5000)
        model.returned(0, 100.0, 5000)
    censored.given_up(0, 10.0, 5000)
    for model in (seen, censored):
        model.refresh(nothing(1))
    assert chance_within(censored.hazards(0), 1.0, 3.0) < chance_within(seen.hazards(0), 1.0, 3.0)
    assert chance_within(censored.hazards(0), 90.0, 30.0) == pytest.approx(chance_within(seen.hazards(0), 90.0, 30.0))


def test_what_is_older_than_the_horizon_counts_at_its_age() -> None:
    """Or the few that come back so late would seem to be all that there were, and the oldest would never go."""
    model, counts = HazardModel(1), nothing(1)
    age_s = 4 * HORIZON_S
    model.returned(0, age_s, 100)
    counts[0][bin_of(age_s)] += 50_000
    model.given_up(0, age_s, 50_000)
    model.refresh(counts)
    assert model.hazards(0)[bin_of(age_s)] == pytest.approx(0.001, rel=0.05)
    assert model.value(0, age_s) < 1e-6
