"""Figures, targets, the table and the JSON object."""

from __future__ import annotations

import json

import pytest

from forebay.bench.figures import TARGETS, Figure, at_least, at_most, number, passed, table, to_json

DOCUMENT_KEYS = {"value", "unit", "bound", "ratio", "target", "ok"}


def test_limit_itself_meets_its_target() -> None:
    """A target says "at most" or "at least", not "below" or "above"."""
    assert at_most(1.3).met(1.3)
    assert not at_most(1.3).met(1.31)
    assert at_least(0.97).met(0.97)
    assert not at_least(0.97).met(0.96)


@pytest.mark.parametrize("value", [None, float("nan")])
def test_value_that_was_not_measured_meets_no_target(value: float | None) -> None:
    """Silence must not pass."""
    assert not at_most(1).met(value)
    assert not at_least(0).met(value)


def test_figure_without_a_target_is_neither_ok_nor_failing() -> None:
    """It is reported only."""
    assert Figure("lookup_1_ms", 3.0, "ms").ok is None
    assert passed([Figure("lookup_1_ms", None, "ms")])


def test_one_missed_target_fails_the_run() -> None:
    """All others may be met."""
    good, bad = Figure("start_ms", 399, "ms"), Figure("idle_rss_mib", 61, "MiB")
    assert passed([good])
    assert not passed([good, bad])


def test_json_names_every_figure_with_its_six_values() -> None:
    """Programs read this: one object, figure name -> values."""
    figures = [Figure("ping_ratio", 1.2, "x echo", 45.0, 1.2, {"us": [54.123456]}), Figure("start_ms", None, "")]
    read = json.loads(to_json(figures))
    assert list(read) == ["ping_ratio", "start_ms"]
    assert set(read["ping_ratio"]) >= DOCUMENT_KEYS
    assert read["ping_ratio"]["target"] == 1.3
    assert read["ping_ratio"]["ok"] is True
    assert read["ping_ratio"]["samples"] == {"us": [54.123]}
    assert read["start_ms"]["value"] is None
    assert read["start_ms"]["ok"] is False


def test_table_has_a_line_per_figure_and_aligned_columns() -> None:
    """People read this."""
    figures = [Figure("fetch_2mib_ratio", 0.5, "x memcpy", note="slow"), Figure("idle_rss_mib", 30.25, "MiB")]
    head, first, second = table(figures).splitlines()
    assert head.split() == ["figure", "value", "unit", "bound", "ratio", "target", "ok", "note"]
    assert first.split() == ["fetch_2mib_ratio", "0.5", "x", "memcpy", "-", "-", ">=", "0.92", "FAILS", "slow"]
    assert second.index("MiB") == head.index("unit")


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (0.0, "0"), (60, "60"), (0.12345, "0.123"), (12.345, "12.3"), (1234.5, "1234")]
)
def test_numbers_have_three_digits_that_matter(value: float | None, text: str) -> None:
    """More would pretend to a precision that no run has."""
    assert number(value) == text


def test_every_target_belongs_to_a_figure_that_is_measured() -> None:
    """A target for a figure that no section makes would never be looked at."""
    from forebay.bench import __main__, gpu

    names = [*__main__.NAMES, *gpu.NAMES]
    assert set(TARGETS) <= set(names)
    assert len(set(names)) == len(names)
