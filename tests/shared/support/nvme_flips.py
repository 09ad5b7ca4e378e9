"""Single bits of the index flipped between two lives of a daemon: whether anybody notices, and whether all comes back.

Most flips are aimed at what LMDB reads: its two meta pages, and the used parts of the pages that the newest one leads
to. A tenth go anywhere. In each life chains are removed and others stored, so that both meta pages are of trees worth
having and older copies of pages lie about. A daemon with several drives reads as many indexes in one start, so that a
restart tries as many flips.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from support.ledger import Ledger, Verdict
from support.live import eventually
from support.lmdb_pages import AIMS, aimed_bit
from support.nvme_file import flip_bit
from support.nvme_live import BLOCKS, Engine, NvmeDaemon, chain

DRIVES = 5
CHAINS = 40
TURNED = 5
"""Chains that are removed, and stored, in each life."""
LEAST_SHARE = 0.4
"""Of the flips so many must have led to an index made anew, or the loop has tried next to nothing."""


@dataclass
class FlipResult:
    """`flips` and `rebuilds` by what was aimed at; a rebuild is an index that was found out, set aside and made anew.

    All other flips had no effect: nothing durable was missing afterwards.
    """

    flips: Counter[str] = field(default_factory=Counter)
    rebuilds: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)
    problems: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Of the flips that were found out."""
        return self.rebuilds.total() / max(1, self.flips.total())


class FlipLoop:
    """One daemon; each of its drives gets one flip a restart."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ledger = Ledger(seed)
        self._daemon = NvmeDaemon(drives=DRIVES, nvme_bytes=8 << 20)
        self._chains = range(CHAINS)
        self.result = FlipResult()

    def run(self, flips: int) -> FlipResult:
        result = self.result
        with self._daemon:
            with Engine(self._daemon, self._ledger) as engine:
                engine.store_durably(self._chains)
            while result.flips.total() < flips:
                self._daemon.kill()
                self._live({path: self._flip(path / "index" / "data.mdb") for path in self._daemon.paths})
            self._daemon.kill()
            self._live({})
        if result.share < LEAST_SHARE:
            result.problems.append(f"{result.rebuilds} of {result.flips} flips were found out: too few to tell")
        return result

    def _flip(self, index: Path) -> str:
        """Invert one bit; returns what was aimed at."""
        aim = AIMS[self.result.flips.total() % len(AIMS)]
        flip_bit(index, aimed_bit(index.read_bytes(), aim, self._random))
        self.result.flips[aim] += 1
        return aim

    def _live(self, aims: dict[Path, str]) -> None:
        """One life of the daemon, on drives whose indexes were flipped as `aims` says; the others are sound."""
        daemon, result = self._daemon, self.result
        before = {path: _set_aside(path) for path in daemon.paths}
        said = len(daemon.log())
        daemon.start()
        eventually(lambda: "nvme tier restored" in daemon.log()[said:], "the log says that all is back", within_s=60)
        anew = [path for path in daemon.paths if _set_aside(path) > before[path]]
        for path in anew:
            if path not in aims:
                result.problems.append(f"{path}: a sound index was made anew")
            if f"{path / 'index'}: " not in daemon.log()[said:]:
                result.problems.append(f"{path}: the log does not say why the index was made anew")
        result.rebuilds.update(aims.get(path, "none") for path in anew)
        if daemon.status()["nvme"]["rebuilt"] != bool(anew):
            result.problems.append(f"{len(anew)} indexes were made anew, and the status does not say so")
        with Engine(daemon, self._ledger) as engine:
            result.verdict += engine.fetch_all(self._chains)
            self._turn(engine)
        result.problems += daemon.problems()
        assert daemon.process is not None
        if daemon.process.poll() is not None:
            result.problems.append(f"the daemon ended with {daemon.process.returncode}")

    def _turn(self, engine: Engine) -> None:
        """Remove the oldest chains and store others, which takes transactions of their own."""
        for number in self._chains[:TURNED]:
            self._ledger.gone(chain(number))
            engine.client.evict(engine.ns, chain(number))
        first, end = self._chains.start, self._chains.stop
        self._chains = range(first + TURNED, end + TURNED)
        engine.store_durably(range(end, end + TURNED))


def _set_aside(path: Path) -> int:
    """How many indexes of this drive have been set aside so far: they are numbered, and the latest two are kept."""
    return max((int(bad.name.rpartition("-")[2]) for bad in path.glob("index.bad-*")), default=0)


def served_in_all(flips: int) -> int:
    """How many blocks a loop of so many flips serves when none is missing."""
    return (-(-flips // DRIVES) + 1) * CHAINS * BLOCKS
