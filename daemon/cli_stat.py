"""``forebay stat``: one line of activity per interval, from the differences of the daemon's counters."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from forebay.daemon.cli import Exit
from forebay.daemon.cli_tools import asking, fetch_status
from forebay.daemon.control_link import ControlLink

HEADER_EVERY = 20
HEADER = (
    f"{'req/s':>9} {'lookup/s':>9} {'hit':>7} {'read/s':>9} {'GB/s':>7} {'store/s':>9} {'GB/s':>7} "
    f"{'reject/s':>9} {'evict/s':>9} {'fill':>7} {'sess':>5}"
)
NVME_HEADER = f" {'promote/s':>9} {'GB/s':>7} {'demote/s':>9} {'GB/s':>7} {'nvme':>7}"
"""What follows where there is an nvme tier."""


_COUNTERS = (
    "lookups",
    "lookup_hashes",
    "lookup_hit_blocks",
    "acquired_blocks",
    "acquired_bytes",
    "committed_blocks",
    "committed_bytes",
    "evicted_blocks",
    "promoted_blocks",
    "demoted_blocks",
)
_NVME_COUNTERS = ("read_bytes", "written_bytes")


@dataclass(frozen=True, slots=True)
class Line:
    """One interval. Rates are per second of blocks unless named otherwise; ``hit`` and the fills are shares, 0 to 1.

    What concerns the nvme tier is 0 where there is none.
    """

    interval_s: float
    requests_s: float
    lookups_s: float
    hit: float
    read_blocks_s: float
    read_gb_s: float
    stored_blocks_s: float
    stored_gb_s: float
    rejected_blocks_s: float
    evicted_blocks_s: float
    fill: float
    sessions: int
    promoted_blocks_s: float
    nvme_read_gb_s: float
    demoted_blocks_s: float
    nvme_written_gb_s: float
    nvme_fill: float

    def text(self) -> str:
        return (
            f"{self.requests_s:9.1f} {self.lookups_s:9.1f} {self.hit:7.1%} {self.read_blocks_s:9.1f} "
            f"{self.read_gb_s:7.3f} {self.stored_blocks_s:9.1f} {self.stored_gb_s:7.3f} {self.rejected_blocks_s:9.1f} "
            f"{self.evicted_blocks_s:9.1f} {self.fill:7.1%} {self.sessions:5d}"
        )

    def nvme_text(self) -> str:
        """The columns under NVME_HEADER."""
        return (
            f" {self.promoted_blocks_s:9.1f} {self.nvme_read_gb_s:7.3f} {self.demoted_blocks_s:9.1f} "
            f"{self.nvme_written_gb_s:7.3f} {self.nvme_fill:7.1%}"
        )


def totals(document: Mapping[str, Any]) -> dict[str, float]:
    """The counters of a status document that a line is made of."""
    counters = document.get("store", {}).get("counters", {})
    rejected = sum(count for name, count in counters.items() if name.startswith("rejected_"))
    requests = sum(verb.get("requests", 0) for verb in document.get("verbs", []))
    found = {name: counters.get(name, 0) for name in _COUNTERS}
    nvme = document.get("nvme") or {}
    moved = {f"nvme_{name}": nvme.get(name, 0) for name in _NVME_COUNTERS}
    return {**found, **moved, "rejected": rejected, "requests": requests}


def line_between(before: Mapping[str, Any], after: Mapping[str, Any], interval_s: float) -> Line:
    """The activity between two status documents of one daemon run."""
    old, new = totals(before), totals(after)
    delta = {name: new[name] - old[name] for name in new}
    return Line(
        interval_s=interval_s,
        requests_s=delta["requests"] / interval_s,
        lookups_s=delta["lookups"] / interval_s,
        hit=delta["lookup_hit_blocks"] / delta["lookup_hashes"] if delta["lookup_hashes"] else 0.0,
        read_blocks_s=delta["acquired_blocks"] / interval_s,
        read_gb_s=delta["acquired_bytes"] / interval_s / 1e9,
        stored_blocks_s=delta["committed_blocks"] / interval_s,
        stored_gb_s=delta["committed_bytes"] / interval_s / 1e9,
        rejected_blocks_s=delta["rejected"] / interval_s,
        evicted_blocks_s=delta["evicted_blocks"] / interval_s,
        fill=_fill(after, "host"),
        sessions=after.get("store", {}).get("sessions", 0),
        promoted_blocks_s=delta["promoted_blocks"] / interval_s,
        nvme_read_gb_s=delta["nvme_read_bytes"] / interval_s / 1e9,
        demoted_blocks_s=delta["demoted_blocks"] / interval_s,
        nvme_written_gb_s=delta["nvme_written_bytes"] / interval_s / 1e9,
        nvme_fill=_fill(after, "nvme"),
    )


def _fill(document: Mapping[str, Any], name: str) -> float:
    """The share of a tier's capacity that holds blocks; 0 where there is no such tier."""
    tiers = [tier for tier in document.get("store", {}).get("tiers", []) if tier.get("tier") == name]
    capacity = sum(tier.get("capacity_bytes", 0) for tier in tiers)
    return sum(tier.get("resident_bytes", 0) for tier in tiers) / capacity if capacity else 0.0


def lines(
    take: Callable[[], Mapping[str, Any]],
    wait: Callable[[float], object],
    clock: Callable[[], float],
    interval_s: float,
) -> Iterator[Line]:
    """Endless lines, one per interval; the interval is measured, so a late wake-up does not bend the rates."""
    before, begun = take(), clock()
    while True:
        wait(max(0.0, begun + interval_s - clock()))
        after, now = take(), clock()
        yield line_between(before, after, max(now - begun, 1e-9))
        before, begun = after, now


@asking
def stat(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Print until ``--count`` lines are out, the daemon goes, or Ctrl-C."""
    never = threading.Event()
    nvme = bool(fetch_status(link).get("nvme"))
    made = lines(lambda: fetch_status(link), never.wait, time.monotonic, arguments.interval)
    for number, line in enumerate(made, 1):
        if arguments.json:
            print(json.dumps(asdict(line)), flush=True)
        else:
            if number % HEADER_EVERY == 1:
                print(HEADER + NVME_HEADER * nvme)
            print(line.text() + line.nvme_text() * nvme, flush=True)
        if number == arguments.count:
            break
    return Exit.OK
