"""Single bits of the index flipped between two lives of a daemon: whether anybody notices, and whether all comes back.

A daemon with several drives reads as many indexes in one start, so that a restart tries as many flips.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from support.ledger import Ledger, Verdict
from support.nvme_file import flip_bit
from support.nvme_live import Engine, NvmeDaemon

DRIVES = 5
CHAINS = 40


@dataclass
class FlipResult:
    """`rebuilds` counts the indexes that were found out and made anew; the other flips hit nothing that is used."""

    flips: int = 0
    rebuilds: int = 0
    verdict: Verdict = field(default_factory=Verdict)
    problems: list[str] = field(default_factory=list)


class FlipLoop:
    """One daemon; each of its drives gets one flip a restart."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._ledger = Ledger(seed)
        self._daemon = NvmeDaemon(drives=DRIVES, nvme_bytes=4 << 20)
        self.result = FlipResult()

    def run(self, flips: int) -> FlipResult:
        daemon, result = self._daemon, self.result
        with daemon:
            with Engine(daemon, self._ledger) as engine:
                engine.store_durably(range(CHAINS))
            while result.flips < flips:
                daemon.kill()
                for path in daemon.paths:
                    index = path / "index" / "data.mdb"
                    flip_bit(index, self._random.randrange(8 * index.stat().st_size))
                    result.flips += 1
                daemon.start()
                daemon.restored()
                with Engine(daemon, self._ledger) as engine:
                    result.verdict += engine.fetch_all(range(CHAINS))
                result.problems += daemon.problems()
                assert daemon.process is not None
                if daemon.process.poll() is not None:
                    result.problems.append(f"the daemon ended with {daemon.process.returncode}")
            result.rebuilds = daemon.log().count("was not all restored from its indexes")
        return result
