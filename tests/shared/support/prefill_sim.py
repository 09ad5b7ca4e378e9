"""One engine, one link, two tiers: requests in the order of a trace, each planned on arrival, on a virtual clock.

The engine computes one prompt at a time, first come first served among those whose load has ended. The link moves one
load after the other. Memory and drive are LRU over whole chains, the drive holding what memory gave up.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from forebay.kvstore.planner import Demand, Link, PrefillRate

Choose = Callable[[Demand], int]


@dataclass(frozen=True, slots=True)
class Arrival:
    at_s: float
    tokens: int
    names: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates are the true ones; what a plan believes of them is in the links of its demands."""

    prefill: PrefillRate
    block_tokens: int
    block_bytes: int
    host_blocks: int
    nvme_blocks: int
    nvme_gb_s: float
    host_gb_s: float = 200.0


@dataclass(frozen=True, slots=True)
class Outcome:
    ttft_s: list[float]
    busy_s: float
    span_s: float

    @property
    def mean_s(self) -> float:
        return sum(self.ttft_s) / len(self.ttft_s)

    def percentile_s(self, percent: float) -> float:
        return sorted(self.ttft_s)[min(len(self.ttft_s) - 1, int(len(self.ttft_s) * percent / 100))]


class Simulation:
    """Runs one trace under one way to choose; `believed_gb_s` is what its plans take the drive for."""

    def __init__(self, machine: Machine, choose: Choose, believed_gb_s: float = 0.0) -> None:
        self._machine = machine
        self._choose = choose
        self._host = Link("host", machine.host_gb_s)
        self._nvme = Link("nvme", believed_gb_s or machine.nvme_gb_s)
        self._memory: OrderedDict[int, None] = OrderedDict()
        self._drive: OrderedDict[int, None] = OrderedDict()
        self._nvme_free_s = 0.0
        self._gpu_free_s = 0.0
        self._ready: list[tuple[float, int, float]] = []
        self._ttft: list[float] = []
        self._busy_s = 0.0

    def run(self, arrivals: Sequence[Arrival]) -> Outcome:
        for number, arrival in enumerate(arrivals):
            self._compute_until(arrival.at_s, arrivals)
            self._arrive(number, arrival)
        self._compute_until(float("inf"), arrivals)
        return Outcome(self._ttft, self._busy_s, arrivals[-1].at_s - arrivals[0].at_s)

    def _arrive(self, number: int, arrival: Arrival) -> None:
        machine, now = self._machine, arrival.at_s
        runs = self._match(arrival.names[: (arrival.tokens - 1) // machine.block_tokens])
        self._nvme.queued_bytes = int(max(0.0, self._nvme_free_s - now) * machine.nvme_gb_s * 1e9)
        queue_s = max(0.0, self._gpu_free_s - now) + sum(compute_s for _, _, compute_s in self._ready)
        demand = Demand(
            runs, arrival.tokens, machine.block_tokens, machine.block_bytes, queue_s, waiting=len(self._ready)
        )
        blocks = self._choose(demand)
        there_s, left = now, blocks
        for link, count in runs:
            taken = min(count, left)
            left -= taken
            if taken and link is self._nvme:
                size = taken * machine.block_bytes
                self._nvme_free_s = max(now, self._nvme_free_s) + size / (machine.nvme_gb_s * 1e9)
                there_s = max(there_s, self._nvme_free_s)
            elif taken:
                there_s = max(there_s, now + taken * machine.block_bytes / (machine.host_gb_s * 1e9))
        have = blocks * machine.block_tokens
        compute_s = machine.prefill.seconds(arrival.tokens - have, have)
        heapq.heappush(self._ready, (there_s, number, compute_s))
        self._touch(arrival.names)

    def _compute_until(self, now: float, arrivals: Sequence[Arrival]) -> None:
        """Begin every prefill that begins before `now`: the earliest arrival among those loaded by then."""
        while self._ready:
            begin_s = max(self._gpu_free_s, self._ready[0][0])
            if begin_s >= now:
                return
            loaded = [each for each in self._ready if each[0] <= begin_s]
            chosen = min(loaded, key=lambda each: each[1])
            self._ready.remove(chosen)
            heapq.heapify(self._ready)
            _, number, compute_s = chosen
            self._gpu_free_s = begin_s + compute_s
            self._busy_s += compute_s
            self._ttft.append(self._gpu_free_s - arrivals[number].at_s)

    def _match(self, names: Sequence[int]) -> list[tuple[Link, int]]:
        """Leading blocks present, as runs of a tier: chains are touched tail first, so memory holds the beginning."""
        runs: list[tuple[Link, int]] = []
        for name in names:
            if name not in self._memory and name not in self._drive:
                break
            link = self._host if name in self._memory else self._nvme
            if runs and runs[-1][0] is link:
                runs[-1] = (link, runs[-1][1] + 1)
            else:
                runs.append((link, 1))
        return runs

    def _touch(self, names: Sequence[int]) -> None:
        for name in reversed(names):
            self._drive.pop(name, None)
            self._memory[name] = None
            self._memory.move_to_end(name)
        while len(self._memory) > self._machine.host_blocks:
            self._drive[self._memory.popitem(last=False)[0]] = None
        while len(self._drive) > self._machine.nvme_blocks:
            self._drive.popitem(last=False)
