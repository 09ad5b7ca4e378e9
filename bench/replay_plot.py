"""Hit rate over capacity, one line a policy and one panel a trace, as an SVG file or, with matplotlib, a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log
from pathlib import Path

from forebay.bench.replay_run import Result

COLOURS = ("#0b6e4f", "#c1292e", "#235789", "#f1a208", "#6a4c93", "#5c5c5c", "#1b998b", "#a05195")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 360, 56, 16, 34, 46

Panel = dict[str, list[tuple[float, float]]]
"""(capacity in percent, token hit rate in percent) by policy."""


class CannotPlot(ValueError):
    """The kind of file is not known, or what draws it is not installed."""


def check_plot(path: Path) -> None:
    """Raises CannotPlot before hours have been spent on what is to be plotted."""
    if path.suffix not in {".svg", ".png"}:
        raise CannotPlot(f"{path}: a plot is written as .svg or .png")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise CannotPlot(
                f"{path}: a .png needs matplotlib (pip install 'forebay[plot]'); .svg needs nothing"
            ) from None


def plot(results: Sequence[Result], path: Path) -> None:
    """Write the plot. Raises CannotPlot, OSError."""
    check_plot(path)
    panels: dict[str, Panel] = {}
    for result in results:
        line = panels.setdefault(result.trace, {}).setdefault(result.policy, [])
        line.append((result.capacity_percent, result.token_hit_percent))
    if path.suffix == ".svg":
        path.write_text(svg(panels), encoding="utf-8")
    else:
        _png(panels, path)


def svg(panels: dict[str, Panel]) -> str:
    """The panels beside each other; the axis of capacities is logarithmic."""
    width = WIDTH * len(panels)
    drawn = [_panel(name, panel, WIDTH * at) for at, (name, panel) in enumerate(panels.items())]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{HEIGHT}" fill="white"/>{"".join(drawn)}</svg>\n'
    )


def _panel(name: str, panel: Panel, left: int) -> str:
    points = [point for line in panel.values() for point in line]
    low, high = min(x for x, _ in points), max(x for x, _ in points)
    top = max(1.0, *(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        share = log(x / low) / log(high / low) if high > low else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - y / top * (HEIGHT - TOP - BOTTOM)

    parts = [f'<text x="{WIDTH / 2:.0f}" y="20" text-anchor="middle">{escape(name)}: token hit rate, %</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        _, y = place(low, share * top)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{share * top:.0f}</text>')
    for capacity in sorted({x for x, _ in points}):
        x, _ = place(capacity, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{capacity:g}</text>')
    parts.append(f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">capacity, % of blocks</text>')
    for at, (policy, line) in enumerate(panel.items()):
        colour = COLOURS[at % len(COLOURS)]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 10}" y="{TOP + 14 + 16 * at}" fill="{colour}">{escape(policy)}</text>')
    return f'<g transform="translate({left},0)">{"".join(parts)}</g>'


def _png(panels: dict[str, Panel], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 3.8), layout="constrained")
    for at, (name, panel) in enumerate(panels.items()):
        axes = figure.add_subplot(1, len(panels), at + 1)
        for policy, line in panel.items():
            axes.plot(*zip(*sorted(line), strict=True), marker="o", label=policy)
        axes.set_xscale("log")
        axes.set(title=f"{name}: token hit rate, %", xlabel="capacity, % of blocks")
        axes.legend()
    figure.savefig(path)
