"""Lines over a logarithmic axis, in panels beside each other: as an SVG file or, with matplotlib, a PNG.

For commands that draw what they print; the daemon itself draws nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from math import log
from pathlib import Path

COLOURS = ("#0b6e4f", "#c1292e", "#235789", "#f1a208", "#6a4c93", "#5c5c5c", "#1b998b", "#a05195")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 560, 360, 56, 16, 34, 46
TICK_CHARS_PX = 7
"""Of an axis' text, so much room a character takes."""

Point = tuple[float, float]


class CannotPlot(ValueError):
    """The kind of file is not known, or what draws it is not installed."""


@dataclass(frozen=True, slots=True)
class Panel:
    """Attributes:
    lines: by name, at least one; their points have x above 0.
    tick: the text of a place on the axis of x.
    mark: a place on it that is named in the panel.
    """

    title: str
    x_title: str
    lines: Mapping[str, Sequence[Point]]
    tick: Callable[[float], str] = "{:g}".format
    mark: tuple[float, str] | None = None

    @property
    def points(self) -> list[Point]:
        return [point for line in self.lines.values() for point in line]


def check_plot(path: Path) -> None:
    """Raises CannotPlot before time has been spent on what is to be plotted."""
    if path.suffix not in {".svg", ".png"}:
        raise CannotPlot(f"{path}: a plot is written as .svg or .png")
    if path.suffix == ".png":
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            raise CannotPlot(
                f"{path}: a .png needs matplotlib (pip install 'forebay[plot]'); .svg needs nothing"
            ) from None


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the file. Raises CannotPlot, OSError."""
    check_plot(path)
    if path.suffix == ".svg":
        path.write_text(svg(panels), encoding="utf-8")
    else:
        _png(panels, path)


def svg(panels: Sequence[Panel]) -> str:
    width = WIDTH * len(panels)
    drawn = [f'<g transform="translate({WIDTH * at},0)">{_svg_panel(panel)}</g>' for at, panel in enumerate(panels)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT}" font-family="sans-serif" '
        f'font-size="12"><rect width="{width}" height="{HEIGHT}" fill="white"/>{"".join(drawn)}</svg>\n'
    )


class _Frame:
    """Where the points of a panel lie in its picture; y begins at 0, or below where values do."""

    def __init__(self, points: Sequence[Point]) -> None:
        self.low, self.high = min(x for x, _ in points), max(x for x, _ in points)
        self.bottom, self.top = min(0.0, *(y for _, y in points)), max(0.0, *(y for _, y in points))
        if self.bottom == self.top:
            self.top = 1.0

    def place(self, x: float, y: float) -> Point:
        across = log(x / self.low) / log(self.high / self.low) if self.high > self.low else 0.5
        up = (y - self.bottom) / (self.top - self.bottom)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def _svg_panel(panel: Panel) -> str:
    frame = _Frame(panel.points)
    parts = [
        f'<text x="{WIDTH / 2:.0f}" y="20" text-anchor="middle">{escape(panel.title)}</text>',
        f'<text x="{WIDTH / 2:.0f}" y="{HEIGHT - 8}" text-anchor="middle">{escape(panel.x_title)}</text>',
    ]
    for quarter in range(5):
        value = frame.bottom + quarter / 4 * (frame.top - frame.bottom)
        _, y = frame.place(frame.low, value)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>')
    for value, text in _ticks(panel, frame):
        x, _ = frame.place(value, 0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{escape(text)}</text>')
    if panel.mark is not None:
        at, name = panel.mark
        x, _ = frame.place(min(max(at, frame.low), frame.high), 0)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#999"/>')
        parts.append(f'<text x="{x + 4:.1f}" y="{HEIGHT - BOTTOM - 6}" fill="#666">{escape(name)}</text>')
    for at, (name, line) in enumerate(panel.lines.items()):
        colour = COLOURS[at % len(COLOURS)]
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in (frame.place(*point) for point in sorted(line)))
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{LEFT + 10}" y="{TOP + 14 + 16 * at}" fill="{colour}">{escape(name)}</text>')
    return "".join(parts)


def _ticks(panel: Panel, frame: _Frame) -> list[tuple[float, str]]:
    """Each x for which there is room, from the left, and its text."""
    ticks, taken = [], float("-inf")
    for value in sorted({x for x, _ in panel.points}):
        text, (x, _) = panel.tick(value), frame.place(value, 0)
        half = TICK_CHARS_PX * len(text) / 2
        if x - half >= taken:
            ticks.append((value, text))
            taken = x + half
    return ticks


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def _png(panels: Sequence[Panel], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(panels), 3.8), layout="constrained")
    for at, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), at + 1)
        for name, line in panel.lines.items():
            axes.plot(*zip(*sorted(line), strict=True), marker="o", label=name)
        axes.set_xscale("log")
        axes.set_xticks(*zip(*_ticks(panel, _Frame(panel.points)), strict=True))
        axes.set_xticks([], minor=True)
        if panel.mark is not None:
            axes.axvline(panel.mark[0], color="#999", label=panel.mark[1])
        axes.set(title=panel.title, xlabel=panel.x_title)
        axes.legend()
    figure.savefig(path)
