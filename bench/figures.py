"""Figures: what a benchmark says, in numbers; their targets, the table and the JSON object.

A figure's `ok` follows from its value and its target alone, so that a run can be judged by a program. A figure that
could not be measured has no value and fails its target: silence must not pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Target:
    """A limit that a value must not pass."""

    limit: float
    at_most: bool

    def met(self, value: float | None) -> bool:
        if value is None or math.isnan(value):
            return False
        return value <= self.limit if self.at_most else value >= self.limit

    def __str__(self) -> str:
        return f"{'<=' if self.at_most else '>='} {number(self.limit)}"


def at_most(limit: float) -> Target:
    return Target(limit, True)


def at_least(limit: float) -> Target:
    return Target(limit, False)


TARGETS: Mapping[str, Target] = {
    "ping_ratio": at_most(1.3),
    "lookup_1000_ms": at_most(0.4),
    "lookup_1000_echo_ratio": at_most(3),
    "lookup_1000_busy_p99_ratio": at_most(5),
    "fetch_2mib_ratio": at_least(0.92),
    "fetch_2mib_1gib_ratio": at_least(0.95),
    "fetch_paged_ratio": at_least(0.75),
    "store_2mib_ratio": at_least(0.88),
    "store_2mib_1gib_ratio": at_least(0.93),
    "store_paged_ratio": at_least(0.75),
    "store_present_us_per_block": at_most(2),
    "store_present_bytes": at_most(0),
    "idle_rss_mib": at_most(60),
    "idle_cpu_percent": at_most(0.2),
    "start_ms": at_most(400),
    "rss_bytes_per_block": at_most(400),
    "fill_ratio": at_least(0.97),
    "unanswered_stores": at_most(0),
    "nvme_fetch_2mib_ratio": at_least(0.9),
    "nvme_write_2mib_ratio": at_least(0.9),
    "nvme_fetch_64kib_ratio": at_least(0.8),
    "host_p99_under_nvme_ratio": at_most(1.5),
    "start_ms_1m_blocks": at_most(500),
    "visible_s_1m_blocks": at_most(5),
    "index_bytes_per_block": at_most(250),
    "gpu_load_llama_ratio": at_least(0.95),
    "gpu_store_llama_ratio": at_least(0.95),
    "gpu_load_mla_ratio": at_least(0.85),
    "gpu_store_mla_ratio": at_least(0.85),
    "gpu_duplex_ratio": at_least(0.9),
    "gpu_gather_ratio": at_least(0.85),
    "gpu_scatter_ratio": at_least(0.85),
    "gpu_checksum_staged_load_slowdown": at_most(0.03),
    "gpu_checksum_staged_store_slowdown": at_most(0.03),
    "gpu_checksum_mapped_load_slowdown": at_most(0.03),
    "gpu_checksum_mapped_store_slowdown": at_most(0.03),
    "gpu_matmul_dma_load_slowdown": at_most(0.03),
    "gpu_matmul_dma_store_slowdown": at_most(0.03),
    "gpu_matmul_staged_load_slowdown": at_most(0.08),
    "gpu_matmul_staged_store_slowdown": at_most(0.08),
    "gpu_matmul_mapped_load_slowdown": at_most(0.08),
    "gpu_matmul_mapped_store_slowdown": at_most(0.08),
    "gpu_lmcache_load_llama_ratio": at_least(1),
    "gpu_lmcache_store_llama_ratio": at_least(1),
    "gpu_lmcache_load_mla_ratio": at_least(1),
    "gpu_lmcache_store_mla_ratio": at_least(1),
}
"""Figures that pass or fail a run; all others are reported only."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One result.

    Attributes:
        value: None when it could not be measured; `note` then says why.
        bound: what the machine reaches without forebay, measured in the same run; None where there is no such thing.
        ratio: value and bound compared, the way round that the name or the note says.
        samples: every repetition, in words and units of its own, rejected ones included.
    """

    name: str
    value: float | None
    unit: str
    bound: float | None = None
    ratio: float | None = None
    samples: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def target(self) -> Target | None:
        return TARGETS.get(self.name)

    @property
    def ok(self) -> bool | None:
        """None without a target."""
        return None if self.target is None else self.target.met(self.value)

    def document(self) -> dict[str, Any]:
        """The figure as it stands in the JSON object."""
        target = self.target
        return {
            "value": self.value,
            "unit": self.unit,
            "bound": self.bound,
            "ratio": self.ratio,
            "target": None if target is None else target.limit,
            "ok": self.ok,
            "target_is": None if target is None else ("at most" if target.at_most else "at least"),
            "samples": {name: [_rounded(sample) for sample in values] for name, values in self.samples.items()},
            "note": self.note,
        }


def passed(figures: Iterable[Figure]) -> bool:
    """Whether every figure that has a target meets it."""
    return all(figure.ok is not False for figure in figures)


def to_json(figures: Iterable[Figure]) -> str:
    """One object: figure name -> {value, unit, bound, ratio, target, ok, ...}."""
    return json.dumps({figure.name: figure.document() for figure in figures}, indent=1, allow_nan=False)


def table(figures: Sequence[Figure]) -> str:
    """For people: one line a figure, columns aligned."""
    head = ("figure", "value", "unit", "bound", "ratio", "target", "ok", "note")
    rows = [head, *(_row(figure) for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    right = {1, 3, 4}
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    return (
        figure.name,
        number(figure.value),
        figure.unit,
        number(figure.bound),
        number(figure.ratio),
        "" if figure.target is None else str(figure.target),
        {None: "", True: "ok", False: "FAILS"}[figure.ok],
        figure.note,
    )


def number(value: float | None) -> str:
    """Three digits that matter."""
    if value is None:
        return "-"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _rounded(sample: float) -> float:
    return float(f"{sample:.5g}")
