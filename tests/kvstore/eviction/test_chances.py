"""Chances by class and length: a part of which much was seen has its own, one of which little was has its class's."""

from __future__ import annotations

import pytest

from forebay.kvstore.eviction import chances as module
from forebay.kvstore.eviction.chances import Chances
from forebay.kvstore.eviction.hazard_model import BINS, HazardModel, bin_of, chance_within

SHORT, LONG = 5, 50


class Seen:
    """A class of requests short and long, and what is thought of it."""

    def __init__(self) -> None:
        self.model = HazardModel(1)
        self.chances = Chances(self.model)
        self.waiting = [[0.0] * BINS]

    def returned(self, length: int, age_s: float, blocks: int) -> None:
        self.model.returned(0, age_s, blocks)
        self.chances.returned(0, length, age_s, blocks)

    def waits(self, length: int, age_s: float, blocks: int) -> None:
        self.waiting[0][bin_of(age_s)] += blocks
        self.chances.waits(0, length, age_s, blocks)

    def refresh(self) -> None:
        self.model.refresh(self.waiting)
        self.chances.refresh()
        self.waiting = [[0.0] * BINS]

    def of(self, length: int, age_s: float = 1.0, within_s: float = 20.0) -> float:
        return self.chances.probability(0, length, age_s, within_s)

    @property
    def of_class(self) -> float:
        return chance_within(self.model.hazards(0), 1.0, 20.0)


def test_nothing_learned_is_no_chance() -> None:
    seen = Seen()
    assert seen.of(SHORT) == 0.0
    seen.refresh()
    assert seen.of(SHORT) == 0.0


def test_long_requests_come_back_where_short_ones_do_not() -> None:
    """The class as a whole says the same of both."""
    seen = Seen()
    seen.returned(LONG, 8.0, 5000)
    seen.waits(SHORT, 500.0, 5000)
    seen.refresh()
    assert seen.of(LONG) > 0.9 > seen.of_class > 0.1 > seen.of(SHORT)
    assert seen.of(LONG + 1) == seen.of(LONG), "of the same octave"


def test_part_of_which_little_was_seen_is_taken_for_its_class() -> None:
    seen = Seen()
    seen.returned(LONG, 8.0, 100_000)
    seen.waits(SHORT, 500.0, 2)
    seen.refresh()
    assert seen.of(SHORT) == pytest.approx(seen.of_class, abs=0.02)
    assert seen.of(1000) == seen.of_class, "nothing was seen"


def test_what_is_given_up_has_reached_its_age() -> None:
    seen = Seen()
    seen.returned(SHORT, 8.0, 5000)
    seen.returned(LONG, 8.0, 5000)
    seen.chances.given_up(0, SHORT, 100.0, 15_000)
    seen.model.given_up(0, 100.0, 15_000)
    seen.refresh()
    assert seen.of(SHORT) == pytest.approx(0.25, abs=0.02)


def test_what_changed_is_learned_and_what_was_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the sums were scaled meanwhile."""
    found = []
    for weight_max in (1e9, 1.1):
        monkeypatch.setattr(module, "_WEIGHT_MAX", weight_max)
        seen = Seen()
        seen.returned(LONG, 8.0, 5000)
        seen.refresh()
        before = seen.of(LONG)
        for _ in range(100):
            seen.waits(LONG, 500.0, 500)
            seen.chances.given_up(0, LONG, 400.0, 500)
            seen.model.given_up(0, 400.0, 500)
            seen.refresh()
        assert before > 0.9 > 0.2 > seen.of(LONG)
        found.append(seen.of(LONG))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_one_class_of_one_length_is_its_class() -> None:
    """Both keep the same books, decay included."""
    seen = Seen()
    for number in range(30):
        seen.returned(LONG, 2.0 + number % 7, 3000)
        seen.waits(LONG, 20.0 + number, 40_000)
        seen.refresh()
    assert seen.of(LONG) == pytest.approx(seen.of_class, rel=0.02)
