"""The command itself: structure of what it prints, names, what a failing section leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from forebay.bench.__main__ import NAMES, OutOfTime, Section, main, run
from forebay.bench.figures import Figure
from forebay.bench.plan import Plan
from forebay.bench.processes import BenchError, Cores

PROMISED = {
    "ping_ratio",
    "lookup_1000_ms",
    "lookup_1000_echo_ratio",
    "lookup_1000_busy_p99_ratio",
    "fetch_2mib_ratio",
    "fetch_64kib_ratio",
    "fetch_paged_ratio",
    "store_2mib_ratio",
    "store_present_us_per_block",
    "idle_rss_mib",
    "idle_cpu_percent",
    "start_ms",
    "rss_bytes_per_block",
    "fill_ratio",
    "unanswered_stores",
}


def plan(tmp_path: Path, *wanted: str) -> Plan:
    return Plan(True, tmp_path, Cores.of([0]), frozenset(wanted), lambda text: None)


def test_promised_figures_are_measured() -> None:
    """docs/benchmarks.md and those who compare runs rely on the names."""
    assert set(NAMES) >= PROMISED


def test_every_figure_is_described() -> None:
    """A number that nobody explains is not read."""
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text()
    assert [name for name in NAMES if f"`{name}`" not in text] == []


def test_unknown_figure_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Measuring nothing would look like success."""
    assert main(["--only", "no_such_figure"]) == 2
    assert "no_such_figure" in capsys.readouterr().err


def test_failing_section_leaves_its_figures_without_a_value(tmp_path: Path) -> None:
    """And what it had measured before, and the other sections, as they are."""

    def fails(_: Plan) -> Iterator[Figure]:
        yield Figure("a", 1, "x")
        raise BenchError("broken")

    sections = (Section(("a", "b"), fails), Section(("c",), lambda _: iter([Figure("c", 3, "x")])))
    figures = list(run(plan(tmp_path, "a", "b", "c"), sections))
    assert [(figure.name, figure.value) for figure in figures] == [("a", 1), ("b", None), ("c", 3)]
    assert "broken" in figures[1].note


def test_sections_after_the_deadline_are_not_begun(tmp_path: Path) -> None:
    """A run that must end ends."""

    def late(_: Plan) -> Iterator[Figure]:
        raise OutOfTime("out of time")

    def never(_: Plan) -> Iterator[Figure]:
        raise AssertionError

    figures = list(run(plan(tmp_path, "a", "b"), (Section(("a",), late), Section(("b",), never))))
    assert [(figure.name, figure.value, figure.note) for figure in figures] == [
        ("a", None, "not measured: out of time"),
        ("b", None, "not measured: out of time"),
    ]


def test_figure_with_a_target_that_was_left_out_fails(tmp_path: Path) -> None:
    """Too little memory for 1 GiB, say; a quick run may leave out what is reported only."""
    section = Section(("fetch_2mib_1gib_ratio", "fetch_64kib_1gib_ratio"), lambda _: iter(()))
    figures = list(run(plan(tmp_path, *section.figures), (section,)))
    assert [(figure.name, figure.ok) for figure in figures] == [("fetch_2mib_1gib_ratio", False)]


def test_section_that_nobody_wants_is_not_begun(tmp_path: Path) -> None:
    """--only saves time."""

    def never(_: Plan) -> Iterator[Figure]:
        raise AssertionError

    assert list(run(plan(tmp_path, "b"), (Section(("a",), never),))) == []


def test_command_measures_a_real_daemon_and_prints_json() -> None:
    """Structure, not speed: a machine under test has other work."""
    command = [sys.executable, "-P", "-m", "forebay.bench", "--quick", "--only", "ping_ratio", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    figures = json.loads(done.stdout)
    assert list(figures) == ["ping_ratio"]
    ping = figures["ping_ratio"]
    assert set(ping) >= {"value", "unit", "bound", "ratio", "target", "ok"}
    assert ping["value"] > 0
    assert ping["bound"] > 0
    assert ping["target"] == 1.3
    assert len(ping["samples"]["measured_us"]) == len(ping["samples"]["bound_us"]) >= 2
    assert done.returncode == (0 if ping["ok"] else 1), done.stderr
