"""Tuning: which strategy is fastest on this GPU, measured once and kept on disk.

A row is one combination of direction, segment size and bytes moved at once; a transfer takes the strategy of the row
nearest to it. The copy engine takes no multiprocessor from the inference engine, so it is preferred where it is nearly
as fast as a kernel.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from forebay.kernels.layout import Layout
from forebay.transports.dma.device import Addresses, Buffer, Device, Direction
from forebay.transports.dma.strategy import Strategy

if TYPE_CHECKING:
    from forebay.transports.dma.engine import DmaEngine

FORMAT = 1

SEGMENT_BYTES = (2 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10, 128 << 10, 512 << 10)
MOVED_BYTES = (1 << 20, 8 << 20, 64 << 20)
PREFERRED = {
    Direction.LOAD: ((Strategy.DMA, 0.95), (Strategy.STAGED, 0.85)),
    Direction.STORE: ((Strategy.DMA, 0.95), (Strategy.STAGED, 0.5)),
}
"""What is chosen from which share of the fastest strategy's rate on: first what takes least from the inference engine.

A mapped kernel holds its multiprocessors for as long as the link takes: on an H200 it slowed a matmul beside it by 5 to
7 %, a staged one by 2 to 3 %.
"""

_SEGMENTS = 32
_REPEATS = 5
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Row:
    """Attributes: rates: bytes a second of each strategy, by its name."""

    direction: Direction
    segment_bytes: int
    moved_bytes: int
    rates: Mapping[str, float]

    @property
    def best(self) -> Strategy:
        fastest = max(self.rates, key=self.rates.__getitem__)
        for strategy, share in PREFERRED[self.direction]:
            if self.rates.get(strategy.value, 0) >= share * self.rates[fastest]:
                return strategy
        return Strategy(fastest)


@dataclass(frozen=True, slots=True)
class Tuning:
    """The rows of one GPU.

    Attributes:
        device: its name and the driver's version, as `device_key` puts them.
        measured: seconds since 1970.
    """

    device: str
    measured: float
    rows: tuple[Row, ...]

    def choose(self, direction: Direction, segment_bytes: int, moved_bytes: int) -> Strategy | None:
        """The strategy of the nearest row; None without rows of that direction."""
        mine = [row for row in self.rows if row.direction is direction]
        if not mine:
            return None

        def distance(row: Row) -> float:
            return abs(math.log2(row.segment_bytes / segment_bytes)) + abs(math.log2(row.moved_bytes / moved_bytes))

        return min(mine, key=distance).best

    def document(self) -> dict[str, Any]:
        rows = [
            {
                "direction": row.direction.value,
                "segment_bytes": row.segment_bytes,
                "moved_bytes": row.moved_bytes,
                "gb_per_s": {name: round(rate / 1e9, 3) for name, rate in row.rates.items()},
                "best": row.best.value,
            }
            for row in self.rows
        ]
        return {"format": FORMAT, "device": self.device, "measured": self.measured, "rows": rows}

    @classmethod
    def of_document(cls, document: Any) -> Tuning:
        """Raises ValueError: another format, or no tuning at all."""
        try:
            if document["format"] != FORMAT:
                raise ValueError(f"tuning of format {document['format']}")
            rows = tuple(
                Row(
                    Direction(row["direction"]),
                    int(row["segment_bytes"]),
                    int(row["moved_bytes"]),
                    {Strategy(name).value: float(rate) * 1e9 for name, rate in row["gb_per_s"].items()},
                )
                for row in document["rows"]
            )
            if any(row.segment_bytes < 1 or row.moved_bytes < 1 or not row.rates for row in rows):
                raise ValueError("a row of sizes that cannot be")
            return cls(str(document["device"]), float(document["measured"]), rows)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tuning: {error!r}") from error


def path_of(directory: Path, device: str) -> Path:
    """Where the tuning of a device is kept."""
    plain = "".join(letter if letter.isalnum() else "-" for letter in device.lower())
    return directory / f"dma-tuning-{plain}.json"


def load(directory: Path, device: str) -> Tuning | None:
    """What is known of a device; None where nothing is, or nothing usable: measure again."""
    try:
        tuning = Tuning.of_document(json.loads(path_of(directory, device).read_text("utf-8")))
    except (OSError, ValueError):
        return None
    return tuning if tuning.device == device else None


def save(tuning: Tuning, directory: Path) -> Path:
    """Raises OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = path_of(directory, tuning.device)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(tuning.document(), indent=1) + "\n", "utf-8")
    temporary.replace(path)
    return path


def measure(
    engine: DmaEngine,
    device: Device,
    name: str,
    *,
    segment_bytes: Iterable[int] = SEGMENT_BYTES,
    moved_bytes: Iterable[int] = MOVED_BYTES,
) -> Tuning:
    """Try each strategy on scattered blocks of 32 segments; takes a few seconds and about 200 MB of the GPU.

    Raises DmaError, DmaTimeout.
    """
    segment_bytes, most = tuple(segment_bytes), max(moved_bytes := tuple(moved_bytes))
    largest = max(most, max(segment_bytes) * _SEGMENTS)
    with device.used():
        paged, host = device.device_memory(2 * largest), device.pinned_memory(largest)
    assert host.view is not None
    engine.pinned.know(host.address, host.size)
    rows = []
    try:
        for direction in Direction:
            for segment in segment_bytes:
                for moved in moved_bytes:
                    blocks = moved // (segment * _SEGMENTS)
                    if blocks:
                        transfer = _Trial(engine, direction, *_scattered(paged, host, segment, blocks))
                        rows.append(Row(direction, segment, moved, transfer.rates()))
    finally:
        engine.pinned.forget(host.address)
    return Tuning(name, time.time(), tuple(rows))


def _scattered(paged: Buffer, host: Buffer, segment: int, blocks: int) -> tuple[Layout, Addresses, Addresses]:
    """Every second block of the paged memory, in an order of its own, one after the other in the host's."""
    bases = paged.address + np.arange(_SEGMENTS, dtype=np.int64) * (2 * blocks * segment)
    layout = Layout.of(bases, np.full(_SEGMENTS, segment, np.int64), np.full(_SEGMENTS, segment, np.int64))
    ids = 2 * np.random.default_rng(blocks).permutation(blocks).astype(np.int64)
    return layout, ids, host.address + np.arange(blocks, dtype=np.int64) * layout.block_bytes


@dataclass(frozen=True, slots=True)
class _Trial:
    engine: DmaEngine
    direction: Direction
    layout: Layout
    block_ids: Addresses
    slots: Addresses

    def rates(self) -> dict[str, float]:
        moved = len(self.block_ids) * self.layout.block_bytes
        return {strategy.value: moved / self._seconds(strategy) for strategy in Strategy}

    def _seconds(self, strategy: Strategy) -> float:
        move = self.engine.load if self.direction is Direction.LOAD else self.engine.store
        times = []
        for _ in range(_REPEATS + 1):  # the first is a rehearsal: rings are allocated, kernels loaded
            began = time.perf_counter()
            move(self.layout, self.block_ids, self.slots, strategy=strategy).wait(_TIMEOUT_S)
            times.append(time.perf_counter() - began)
        return median(times[1:])
