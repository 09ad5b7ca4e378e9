"""``forebay advise`` reckons with what the status document says, and says so when that is nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from forebay.daemon import cli_advise, cli_tools
from forebay.daemon.cli import Exit, run
from forebay.daemon.status import DaemonSnapshot, Prices, document

MakeSnapshot = Callable[..., DaemonSnapshot]
GIB = 1 << 30


def told(snapshot: DaemonSnapshot) -> dict[str, Any]:
    """The document as it comes over the wire."""
    found: dict[str, Any] = json.loads(json.dumps(document(snapshot)))
    return found


def test_additions_follow_the_curve_the_links_and_the_prices(make_snapshot: MakeSnapshot) -> None:
    """The curve of the snapshot rises by 12.5 points a capacity; capacity is 2 GiB in two tiers."""
    found = cli_advise.advice(told(make_snapshot()))
    doubled = next(each for each in found["more"] if (each["tier"], each["bytes"]) == ("nvme", 2 * GIB))
    assert doubled["hit_points"] == pytest.approx(12.5)
    assert doubled["gpu_s_per_day"] == pytest.approx(100 - 1e11 / 3e9)
    assert doubled["saved_dollars_per_day"] == pytest.approx(doubled["gpu_s_per_day"] * 2.5 / 3600)
    assert doubled["cost_dollars_per_day"] == pytest.approx(2 * 0.1 / 30.4)
    host = next(each for each in found["more"] if (each["tier"], each["bytes"]) == ("host", 2 * GIB))
    assert host["gpu_s_per_day"] == pytest.approx(100 - 1e11 / 20e9)


def test_all_gpus_of_a_replica_wait_for_a_load(make_snapshot: MakeSnapshot) -> None:
    found = told(make_snapshot())
    found["store"]["physics"]["gpus"] = 4
    doubled = next(
        each for each in cli_advise.advice(found)["more"] if (each["tier"], each["bytes"]) == ("host", 2 * GIB)
    )
    assert doubled["gpu_s_per_day"] == pytest.approx(100 - 4 * 1e11 / 20e9)


def test_text_has_the_curve_and_a_line_for_each_addition(make_snapshot: MakeSnapshot) -> None:
    lines = cli_advise.render(cli_advise.advice(told(make_snapshot()))).splitlines()
    assert sum("<- now" in line for line in lines) == 1
    assert any(line.startswith("+2.0 GiB nvme: +12.5 points, +67 GPU-seconds a day, +$0.05 a day") for line in lines)


def test_without_prices_no_dollars_are_told(make_snapshot: MakeSnapshot) -> None:
    text = cli_advise.render(cli_advise.advice(told(make_snapshot(prices=Prices()))))
    assert "points" in text
    assert "$" not in text


def test_a_daemon_that_was_asked_nothing_knows_nothing() -> None:
    found = cli_advise.advice({"store": {"physics": None}})
    assert found["curve"] == []
    assert cli_advise.render(found).startswith("nothing is known yet")


def test_between_points_the_curve_is_a_line_and_beyond_them_level() -> None:
    keys = ("hit_share", "hit_tokens_per_day", "hit_bytes_per_day", "gpu_s_per_day")
    points = [{"size_bytes": at, **dict.fromkeys(keys, at / 100)} for at in (10, 20)]
    assert [cli_advise.at(points, at)["hit_share"] for at in (5, 15, 99)] == pytest.approx([0.05, 0.15, 0.2])


def test_plot_has_the_curve_the_gpu_time_and_the_money(make_snapshot: MakeSnapshot) -> None:
    """A panel for each that is known; what costs nothing has no line of costs."""
    curve, work, money = cli_advise.panels(cli_advise.advice(told(make_snapshot())))
    assert curve.mark == (2 * GIB, "now")
    assert [y for _, y in curve.lines["lru"]] == sorted(y for _, y in curve.lines["lru"])
    assert set(work.lines) == {"host", "nvme"}
    assert {"host: saved", "nvme: saved", "nvme: cost"} <= set(money.lines)
    (unpriced, _) = cli_advise.panels(cli_advise.advice(told(make_snapshot(prices=Prices()))))
    assert unpriced == curve


def test_what_cannot_be_drawn_is_refused_before_the_daemon_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["advise", "--runtime-dir", str(tmp_path), "--plot", str(tmp_path / "x.pdf")]) == Exit.USAGE
    assert ".svg or .png" in capsys.readouterr().err


def test_advice_of_a_daemon_is_printed_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, make_snapshot: MakeSnapshot
) -> None:
    """And a plot that cannot be written is told."""
    monkeypatch.setattr(cli_advise, "fetch_status", lambda link: told(make_snapshot()))
    monkeypatch.setattr(cli_tools, "ControlLink", lambda *_: nullcontext())
    drawn = tmp_path / "x.svg"
    assert run(["advise", "--plot", str(drawn)]) == Exit.OK
    assert "<- now" in capsys.readouterr().out
    assert drawn.read_text().count("<polyline") >= 5
    assert run(["advise", "--plot", str(tmp_path / "no" / "x.svg")]) == Exit.USAGE
    assert "No such file" in capsys.readouterr().err
