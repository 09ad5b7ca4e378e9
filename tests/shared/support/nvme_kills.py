"""A daemon that is killed again and again, at any moment, and what an outside ledger says of it afterwards.

The tier has room for all that is ever stored, so nothing leaves it for space: what was reported durable must be there
after every restart, and whatever is there must be right.
"""

from __future__ import annotations

import random
import shutil
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

from forebay.transports.messages import EvictScope
from support.ledger import Ledger, Verdict
from support.nvme_live import BLOCKS, OTHER_FIRST, Engine, NvmeDaemon, chain

CHAINS = 120
OTHERS = range(OTHER_FIRST, OTHER_FIRST + 40)
"""Chains of a namespace that is cleared now and then, so that slabs change hands."""
SAMPLE = 25
NVME_BYTES = 36 << 20
"""35 slabs: CHAINS chains of BLOCKS blocks take 19 of 51 slots, OTHERS 9 of 36 slots, and drives share them evenly."""


@dataclass
class KillResult:
    """What came of a loop.

    `killed_while` counts what the daemon was about, as far as it is known from outside; `indexes_lost` how often its
    index was deleted before a start, so that only the headers told what is there.
    """

    verdict: Verdict = field(default_factory=Verdict)
    durable: int = 0
    start_ms: list[float] = field(default_factory=list)
    killed_while: Counter[str] = field(default_factory=Counter)
    indexes_lost: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.killed_while.total()

    @property
    def start_ms_p50(self) -> float:
        return round(statistics.median(self.start_ms), 1)


class KillLoop:
    """One daemon on one set of paths for the whole loop. A seed fixes what is asked for, not when a thread runs."""

    def __init__(self, seed: int, *, drives: int = 1) -> None:
        self._random = random.Random(seed)
        self._ledger = Ledger(seed)
        self._daemon = NvmeDaemon({"nvme.idle_s": 0.1}, nvme_bytes=NVME_BYTES, drives=drives)
        self._stored: set[int] = set()
        self.result = KillResult()

    def run(self, kills: int, durable_min: int = 0) -> KillResult:
        """Kill so often, and up to three times as often where too few blocks are durable by then.

        On a busy machine little gets done between two kills, and with nothing durable there is nothing to lose.
        """
        result = self.result
        with self._daemon:
            self._daemon.kill()
            result.killed_while["idle"] += 1
            while result.kills < kills or (len(self._ledger) < durable_min and result.kills < 3 * kills):
                self._die_starting() if self._random.random() < 0.25 else self._live_and_die()
            self._daemon.start()
            with Engine(self._daemon, self._ledger, others=True) as engine:
                self._verify(engine, sorted(self._stored))
            log = self._daemon.log()
        result.durable = len(self._ledger)
        result.problems += [line for line in log.splitlines() if "Traceback" in line or "msg=bug" in line]
        return result

    def _die_starting(self) -> None:
        """Killed before it is ready, or just after: while it opens its drives, or reads its index."""
        self._daemon.launch()
        threading.Event().wait(self._random.uniform(0.0, 0.6))
        self._daemon.kill()
        self.result.killed_while["start"] += 1

    def _live_and_die(self) -> None:
        if self._random.random() < 0.15:
            shutil.rmtree(self._random.choice(self._daemon.paths) / "index", ignore_errors=True)
            self.result.indexes_lost += 1
        began = time.monotonic()
        self._daemon.start()
        with Engine(self._daemon, self._ledger, others=True) as engine:
            engine.client.lookup(engine.ns, chain(0))
            self.result.start_ms.append(1000 * (time.monotonic() - began))
            if self._random.random() < 0.25:
                self._work_until_killed(engine, 0.05, "restore")
                return
            stored = sorted(self._stored)
            self._verify(engine, self._random.sample(stored, min(SAMPLE, len(stored))))
            self._work_until_killed(engine, 0.2, "work")

    def _verify(self, engine: Engine, numbers: list[int]) -> None:
        """Nothing is wrong while the index is still coming back; and then nothing durable is missing."""
        for number in numbers[:3]:
            early = engine.fetch(number)
            self.result.verdict += Verdict(early.served, early.wrong, 0)
        self._daemon.restored()
        for number in numbers:
            found = engine.fetch(number)
            self.result.verdict += found
            if found.missing:
                self.result.problems.append(f"chain {number}: {found.missing} durable blocks lost: {self._state()}")
        self.result.problems += self._daemon.problems()

    def _state(self) -> str:
        status = self._daemon.status()
        return f"{status['nvme']['errors']} {status['store']['counters']}"

    def _work_until_killed(self, engine: Engine, within_s: float, doing: str) -> None:
        """Store, persist, fetch and remove until the daemon is dead; the answers it gave until then count."""
        process = self._daemon.process
        assert process is not None
        killer = threading.Timer(self._random.uniform(0.0, within_s), process.kill)
        killer.start()
        while process.poll() is None:
            self._step(engine)
        killer.join()
        self.result.killed_while[doing] += 1

    def _step(self, engine: Engine) -> None:
        number, kind = self._random.randrange(CHAINS + len(OTHERS)), self._random.random()
        number = number if number < CHAINS else OTHERS[number - CHAINS]
        if kind < 0.5:
            self._stored.add(number)
            engine.store(number)
            if self._random.random() < 0.7:
                engine.persist(number, timeout_ms=self._random.choice([0, 20, 200]))
        elif kind < 0.88:
            found = engine.fetch(number)
            self.result.verdict += Verdict(found.served, found.wrong, 0)
        elif kind < 0.93:
            engine.client.prefetch(engine.ns_of(number), chain(number))
        elif kind < 0.97:
            gone = chain(number)[self._random.randrange(BLOCKS) :]
            engine.ledger.gone(gone)
            engine.client.evict(engine.ns_of(number), gone)
        else:
            for other in OTHERS:
                engine.ledger.gone(chain(other))
            engine.client.evict(engine.other_ns, scope=EvictScope.NAMESPACE)
