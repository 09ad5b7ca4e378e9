"""``forebay advise`` reckons with what the status document says, and says so when that is nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from forebay.daemon import cli_advise
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
