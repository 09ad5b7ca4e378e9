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
    draw(
        [
            Panel(f"{name}: token hit rate, %", "capacity, % of blocks", lines, _percent)
            for name, lines in traces.items()
        ],
        path,
    )


def _percent(value: float) -> str:
    """1 % of a trace's blocks, cut off to whole ones, is 0.999 %."""
    return f"{round(value, 2):g}"
