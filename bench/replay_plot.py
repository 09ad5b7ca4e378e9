"""Hit rate over capacity, one line a policy and one panel a trace."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from forebay.bench.replay_run import Result
from forebay.daemon.chart import Panel, Point, draw


def plot(results: Sequence[Result], path: Path) -> None:
    """Write the plot. Raises CannotPlot, OSError."""
    traces: dict[str, dict[str, list[Point]]] = {}
    for result in results:
        line = traces.setdefault(result.trace, {}).setdefault(result.policy, [])
        line.append((result.capacity_percent, result.token_hit_percent))
    draw([Panel(f"{name}: token hit rate, %", "capacity, % of blocks", lines) for name, lines in traces.items()], path)
