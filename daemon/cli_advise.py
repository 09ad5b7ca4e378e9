"""``forebay advise``: what more memory or drives would hit, save and cost, from the daemon's own measurements.

Reads the status document alone. The curve says what share a least-recently-used tier of any size would have hit of
what was asked lately; a policy that does better than that hits more at each size.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from forebay.daemon.chart import CannotPlot, Panel, Point, check_plot, draw
from forebay.daemon.cli import Exit
from forebay.daemon.cli_status import size
from forebay.daemon.cli_tools import asking, fetch_status
from forebay.daemon.control_link import ControlLink

GIB = 1 << 30
DAY_S = 86_400
MONTH_DAYS = 30.4
MORE = (0.25, 0.5, 1.0, 2.0)
"""Offered in addition, as a share of all tiers' capacity."""
_BAR_CHARS = 40

Document = Mapping[str, Any]


def advise(arguments: argparse.Namespace) -> int:
    """Exit 1 while nothing was asked for yet, of which there is no plot either; 2 when that cannot be drawn."""
    try:
        if arguments.plot:
            check_plot(Path(arguments.plot))
    except CannotPlot as error:
        return _cannot_plot(error)
    return _advise(arguments)


@asking
def _advise(arguments: argparse.Namespace, link: ControlLink) -> int:
    found = advice(fetch_status(link))
    if arguments.plot and found["curve"]:
        try:
            draw(panels(found), Path(arguments.plot))
        except OSError as error:
            return _cannot_plot(error)
    print(json.dumps(found) if arguments.json else render(found))
    return Exit.OK if found["curve"] else Exit.NEGATIVE


def _cannot_plot(error: Exception) -> int:
    print(f"forebay advise: {error}", file=sys.stderr)
    return Exit.USAGE


def advice(document: Document) -> dict[str, Any]:
    """The curve, and what each addition would bring; an empty curve where nothing is known."""
    store = document.get("store", {})
    physics = store.get("physics") or {}
    points = [point for point in physics.get("curve", ()) if point.get("size_bytes")]
    if not any(point["hit_share"] for point in points):
        return {"capacity_bytes": 0, "curve": [], "more": [], "priced": False}
    capacity = sum(tier.get("capacity_bytes", 0) for tier in store.get("tiers", ()))
    prices = document.get("prices") or {}
    links = {link["tier"]: link["gb_s"] for link in physics.get("links", ())}
    tiers = [tier["tier"] for tier in store.get("tiers", ())]
    waiting = {tier: physics.get("gpus", 1) / (1e9 * rate) for tier, rate in links.items() if rate}
    more = [
        _addition(tier, int(capacity * share), capacity, points, prices, waiting) for tier in tiers for share in MORE
    ]
    return {
        "capacity_bytes": capacity,
        "curve": points,
        "more": more,
        "priced": bool(prices.get("gpu_hour")),
    }


def _addition(
    tier: str, extra: int, capacity: int, points: Sequence[Document], prices: Document, waiting: Mapping[str, float]
) -> dict[str, Any]:
    """What so many bytes more of a tier bring a day, net of the time to load what they hit.

    `waiting`: GPU-seconds that a byte out of each tier takes, of all GPUs of a replica.
    """
    now, then = at(points, capacity), at(points, capacity + extra)
    hit_bytes = then["hit_bytes_per_day"] - now["hit_bytes_per_day"]
    gpu_s = then["gpu_s_per_day"] - now["gpu_s_per_day"]
    load_s = hit_bytes * waiting.get(tier, 0.0) if gpu_s else 0.0
    saved = (gpu_s - load_s) * prices.get("gpu_hour", 0.0) / 3600
    cost = extra / GIB * prices.get(f"{tier}_gib_month", 0.0) / MONTH_DAYS
    return {
        "tier": tier,
        "bytes": extra,
        "hit_points": 100 * (then["hit_share"] - now["hit_share"]),
        "gpu_s_per_day": gpu_s - load_s,
        "saved_dollars_per_day": saved,
        "cost_dollars_per_day": cost,
    }


def at(points: Sequence[Document], size_bytes: float) -> dict[str, float]:
    """The curve between two of its points, on a line; from 0 at no memory, and level beyond the last."""
    keys = ("hit_share", "hit_tokens_per_day", "hit_bytes_per_day", "gpu_s_per_day")
    whole: list[Document] = [dict.fromkeys(("size_bytes", *keys), 0.0), *points]
    for left, right in pairwise(whole):
        if size_bytes <= right["size_bytes"]:
            part = (size_bytes - left["size_bytes"]) / (right["size_bytes"] - left["size_bytes"])
            return {key: left[key] + part * (right[key] - left[key]) for key in keys}
    return {key: whole[-1][key] for key in keys}


def panels(found: Mapping[str, Any]) -> list[Panel]:
    """The curve; what more of each tier brings in GPU time, where that is known; and in dollars, with prices."""
    share = [(point["size_bytes"], 100 * point["hit_share"]) for point in found["curve"]]
    now = (found["capacity_bytes"], "now")
    drawn = [Panel("tokens hit, % of those asked for", "all tiers together", {"lru": share}, size, now)]
    if any(point["gpu_s_per_day"] for point in found["curve"]):
        drawn.append(Panel("GPU-seconds more a day", "more of a tier", _by_tier(found, "gpu_s_per_day"), size))
    if found["priced"]:
        money = {f"{tier}: saved": line for tier, line in _by_tier(found, "saved_dollars_per_day").items()}
        costs = _by_tier(found, "cost_dollars_per_day").items()
        money |= {f"{tier}: cost": line for tier, line in costs if any(dollars for _, dollars in line)}
        drawn.append(Panel("dollars a day", "more of a tier", money, size))
    return drawn


def _by_tier(found: Mapping[str, Any], key: str) -> dict[str, list[Point]]:
    lines: dict[str, list[Point]] = {}
    for each in found["more"]:
        lines.setdefault(each["tier"], []).append((each["bytes"], each[key]))
    return lines


def render(found: Mapping[str, Any]) -> str:
    if not found["curve"]:
        return "nothing is known yet: no prompt was asked for twice since the daemon started"
    return "\n".join([*_curve(found), "", *_more(found)])


def _curve(found: Mapping[str, Any]) -> Iterator[str]:
    yield "tokens that tiers of this size together would hit, of those asked for lately:"
    for point in found["curve"]:
        here = "  <- now" if point["size_bytes"] == found["capacity_bytes"] else ""
        bar = "#" * round(_BAR_CHARS * point["hit_share"])
        yield f"{size(point['size_bytes']):>12} {point['hit_share']:7.1%} {bar}{here}"


def _more(found: Mapping[str, Any]) -> Iterator[str]:
    for each in found["more"]:
        line = f"+{size(each['bytes'])} {each['tier']}: {each['hit_points']:+.1f} points"
        if each["gpu_s_per_day"]:
            line += f", {each['gpu_s_per_day']:+.0f} GPU-seconds a day"
        if found["priced"]:
            line += f", {_dollars(each['saved_dollars_per_day'])} a day"
        if each["cost_dollars_per_day"]:
            line += f", at a cost of ${each['cost_dollars_per_day']:.2f} a day"
        yield line
    if not any(point["gpu_s_per_day"] for point in found["curve"]):
        yield "GPU time is told once engines report their prefills, or economics.prefill_tokens_per_s is set"


def _dollars(amount: float) -> str:
    return f"{'-' if amount < 0 else '+'}${abs(amount):.2f}"
