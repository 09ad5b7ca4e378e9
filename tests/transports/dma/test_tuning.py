"""Tuning: what is measured decides, the copy engine before kernels, and a file that is off is measured again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from forebay.kernels.layout import Layout
from forebay.transports.dma import Direction, DmaEngine, Strategy, Tuning, tuning
from forebay.transports.dma.tuning import Row
from support.late_device import LateDevice

NAME = "Test GPU 3000, driver 13000"


def row(moved: int, segment: int = 32 << 10, direction: Direction = Direction.LOAD, **rates: float) -> Row:
    return Row(direction, segment, moved, {name: rate * 1e9 for name, rate in rates.items()})


@pytest.mark.parametrize(
    ("rates", "best"),
    [
        ({"dma": 50, "staged": 52, "mapped": 51}, Strategy.DMA),
        ({"dma": 40, "staged": 48, "mapped": 52}, Strategy.STAGED),
        ({"dma": 10, "staged": 20, "mapped": 26}, Strategy.MAPPED),
    ],
)
def test_what_takes_least_from_the_engine_is_chosen_while_it_is_nearly_as_fast(
    rates: dict[str, float], best: Strategy
) -> None:
    assert row(1 << 20, **rates).best is best


def test_the_nearest_row_of_the_same_direction_decides() -> None:
    rows = (
        row(1 << 20, dma=1, staged=1, mapped=9),
        row(64 << 20, dma=1, staged=9, mapped=1),
        row(1 << 20, direction=Direction.STORE, dma=9, staged=1, mapped=1),
    )
    known = Tuning(NAME, 0.0, rows)
    assert known.choose(Direction.LOAD, 16 << 10, 2 << 20) is Strategy.MAPPED
    assert known.choose(Direction.LOAD, 16 << 10, 1 << 30) is Strategy.STAGED
    assert known.choose(Direction.STORE, 16 << 10, 1 << 30) is Strategy.DMA
    assert Tuning(NAME, 0.0, rows[:2]).choose(Direction.STORE, 1, 1) is None


def test_what_was_saved_is_found_by_its_device_alone(tmp_path: Path) -> None:
    saved = Tuning(NAME, 1.5, (row(1 << 20, dma=1.25, staged=2, mapped=3),))
    path = tuning.save(saved, tmp_path / "made")
    assert path == tuning.path_of(tmp_path / "made", NAME)
    found = tuning.load(tmp_path / "made", NAME)
    assert found is not None
    assert found.document() == saved.document()
    path.replace(tuning.path_of(tmp_path, "another GPU"))
    assert tuning.load(tmp_path, "another GPU") is None


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"rows": [{"direction": "up"}]},
        {"rows": [{"direction": "load", "segment_bytes": 0, "moved_bytes": 1, "gb_per_s": {"dma": 1}}]},
        {"rows": [{"direction": "load", "segment_bytes": 1, "moved_bytes": 1, "gb_per_s": {"warp": 1}}]},
        {"rows": [{"direction": "load", "segment_bytes": 1, "moved_bytes": 1, "gb_per_s": {}}]},
        {"rows": None},
    ],
)
def test_a_file_that_is_off_is_as_good_as_none(tmp_path: Path, change: dict[str, object]) -> None:
    document = Tuning(NAME, 1.0, (row(1 << 20, dma=1),)).document()
    path = tuning.save(Tuning(NAME, 1.0, ()), tmp_path)
    path.write_text(json.dumps({**document, **change}), "utf-8")
    assert tuning.load(tmp_path, NAME) is None
    path.write_text("{", "utf-8")
    assert tuning.load(tmp_path, NAME) is None


def test_measuring_tries_every_strategy_both_ways_and_an_engine_follows_it() -> None:
    device = LateDevice(1)
    engine = DmaEngine(device)
    known = tuning.measure(engine, device, NAME, segment_bytes=(2 << 10,), moved_bytes=(64 << 10, 128 << 10))
    assert [(r.direction, r.moved_bytes) for r in known.rows] == [
        (direction, moved) for direction in Direction for moved in (64 << 10, 128 << 10)
    ]
    assert all(set(r.rates) == {s.value for s in Strategy} and min(r.rates.values()) > 0 for r in known.rows)
    assert device.unpinned_copies == 0
    forced = Tuning(NAME, 0.0, (row(1, dma=9, staged=1, mapped=1),))
    one = known.rows[0].segment_bytes
    layout = Layout.of(*(np.array([number], np.int64) for number in (4096, one, one)))
    assert DmaEngine(device, tuning=forced).choose(layout, 8, Direction.LOAD) is Strategy.DMA
    engine.close(5)
