"""What one run is to measure, and with what; handed to every section."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from forebay.bench.processes import Cores

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Plan:
    """One run.

    Attributes:
        directory: the run's own; removed afterwards.
        drive: the run's own too, on the drive to be measured, where one is.
        told: where to leave what was measured of that drive, if anywhere.
        wanted: names of the figures to measure; a section leaves out what no wanted figure needs.
        progress: tells a person what is being done.
    """

    quick: bool
    directory: Path
    cores: Cores
    wanted: frozenset[str]
    progress: Callable[[str], None]
    drive: Path | None = None
    told: Path | None = None

    def wants(self, *names: str) -> bool:
        """Whether any of them is wanted."""
        return not self.wanted.isdisjoint(names)

    @property
    def on_drive(self) -> Path:
        """`drive`, for a section that needs one."""
        assert self.drive is not None, "no drive was chosen"
        return self.drive

    def pick(self, quick: T, full: T) -> T:
        """The value for this kind of run."""
        return quick if self.quick else full


@contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """This thread, and every thread begun meanwhile, on these cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
