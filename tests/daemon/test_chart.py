"""Charts: what lies where in the picture, and what cannot be drawn is said before."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from forebay.daemon.chart import HEIGHT, LEFT, RIGHT, WIDTH, CannotPlot, Panel, check_plot, draw, svg

RISING = Panel("a < b", "size", {"one": [(4.0, 10.0), (1.0, 0.0), (2.0, 5.0)], "two": [(1.0, 8.0)]})


def points(text: str, line: int = 0) -> list[tuple[float, float]]:
    found = re.findall(r'<polyline points="([^"]*)"', text)[line]
    return [(float(x), float(y)) for x, y in (point.split(",") for point in found.split())]


def test_lines_are_drawn_from_left_to_right_on_a_logarithmic_axis() -> None:
    (left, bottom), (middle, half), (right, top) = points(svg([RISING]))
    assert (left, right) == (LEFT, WIDTH - RIGHT)
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert half == pytest.approx((top + bottom) / 2, abs=0.1)
    assert top < bottom < HEIGHT


def test_picture_is_xml_with_every_name_in_it() -> None:
    text = svg([RISING, RISING])
    root = ElementTree.fromstring(text)  # noqa: S314 (our own)
    assert root.get("width") == str(2 * WIDTH)
    assert {"a < b", "size", "one", "two", "1", "2", "4"} <= {each.text for each in root.iter() if each.text}


def test_axis_reaches_below_zero_where_values_do() -> None:
    (_, low), (_, zero) = points(svg([Panel("t", "x", {"one": [(1.0, -5.0), (2.0, 0.0)]})]))
    assert low > zero


@pytest.mark.parametrize("line", [[(3.0, 0.0)], [(3.0, 2.0)], [(3.0, -2.0), (3.0, -2.0)]])
def test_one_place_alone_can_be_drawn(line: list[tuple[float, float]]) -> None:
    assert all(0 < y < HEIGHT for _, y in points(svg([Panel("t", "x", {"one": line})])))


def test_mark_is_named_and_stays_in_the_picture() -> None:
    text = svg([Panel("t", "x", {"one": [(1.0, 1.0), (2.0, 2.0)]}, mark=(100.0, "now"))])
    assert ">now<" in text
    assert f'x1="{WIDTH - RIGHT:.1f}"' in text


def test_ticks_for_which_there_is_no_room_are_left_out() -> None:
    crowded = Panel("t", "x", {"one": [(1 + at / 1000, 1.0) for at in range(1000)]}, tick="{:.3f} of something".format)
    assert 1 < svg([crowded]).count("of something") < 10


def test_kind_of_file_is_told_by_its_name(tmp_path: Path) -> None:
    draw([RISING], tmp_path / "x.svg")
    assert (tmp_path / "x.svg").read_text() == svg([RISING])
    with pytest.raises(CannotPlot, match=r"\.svg or \.png"):
        check_plot(tmp_path / "x.pdf")


def test_png_is_drawn_with_matplotlib_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(CannotPlot, match=r"forebay\[plot\]"):
            draw([RISING], path)
        return
    draw([RISING], path)
    assert path.read_bytes().startswith(b"\x89PNG")
