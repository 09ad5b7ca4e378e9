"""Whether a block may be written to the nvme tier: a rule for what is worth it, a budget for what the drive can bear.

Flash wears by writing. The budget is a token bucket in bytes: it fills evenly over the day and holds at most an hour's
share, so that no burst, and no series of bursts, wears the drive faster than its owner allowed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from forebay.kvstore.eviction.hazard_model import HORIZON_S
from forebay.kvstore.groups import HOST, NVME
from forebay.kvstore.stats import Counters

if TYPE_CHECKING:
    from forebay.kvstore.groups import Group
    from forebay.kvstore.planner import PrefillRate

DAY_S = 86_400.0
BURST_S = 3_600.0


@dataclass(frozen=True, slots=True)
class WriteTerms:
    """What a write costs, set against what it may save; all 0: nothing is known, and everything is worth writing.

    Attributes:
        least_chance: of being asked for again, at least; 0: what the prices make.
        dollars_per_byte: of wear.
        gpu_dollars_per_s: of one replica.
    """

    least_chance: float = 0.0
    dollars_per_byte: float = 0.0
    gpu_dollars_per_s: float = 0.0


class AdmissionRule(Protocol):
    """Chooses what is written. One object serves all namespaces."""

    def admit(self, group: Group, rows: Sequence[int], now: float) -> Sequence[int]:
        """Which of these rows, parents before children, are worth writing. Whose child is written is written too."""


class WriteOnEvict:
    """Everything that is about to leave host memory is written: measured as never worse than writing through.

    Source: trace replays of five admission rules; writing only what is likely to be asked for again saves up to half of
    the writes and costs 1 to 5 points of hit rate.
    """

    def admit(self, group: Group, rows: Sequence[int], now: float) -> Sequence[int]:
        del group, now
        return rows


class WorthWriting:
    """A run of a chain is written if the chance that it is asked for again, times its computing, costs more.

        chance x seconds of prefill x price of those > bytes x price of wear

    The chance is the eviction policy's, within what it learns of; what it knows nothing of is written. Where writes
    have a budget the least chance rises from that to 1 as the budget's bucket empties: then the best of what comes is
    written, and not the first. Decided for runs from the front: of each, up to its last block that is worth it, and
    up to the last whose continuation is on the drive already, which nobody could find without.

    Source: the break-even of one write; rejected: a coin for each block (a chain with holes is of use up to the first)
    and a count of uses (what was asked for twice has been computed twice).

    Args:
        prefill: the rate that engines reported, or what is assumed.
        counters: told what was declined.
    """

    def __init__(self, terms: WriteTerms, budget: WriteBudget, prefill: PrefillRate, counters: Counters) -> None:
        self._terms = terms
        self._budget = budget
        self._prefill = prefill
        self._counters = counters

    def admit(self, group: Group, rows: Sequence[int], now: float) -> Sequence[int]:
        share = self._budget.share_left(now)
        if share == 1 and not self._has_prices():
            return rows
        chances = group.policies[HOST].chances(rows, HORIZON_S, now)
        if chances is None:
            return rows
        admitted: list[int] = []
        for first, end in _runs(group, rows):
            run = rows[first:end]
            cost = self._least_chance(group, run)
            count = _worth(group, run, chances[first:end], cost + max(0.0, 1 - cost) * (1 - share))
            admitted += run[:count]
            group.declined.difference_update(run[:count])
            if count < len(run):
                self._decline(group, run[count:], over_budget=max(chances[first + count : end]) > cost)
        return admitted

    def _has_prices(self) -> bool:
        terms = self._terms
        return bool(terms.least_chance or (terms.dollars_per_byte and terms.gpu_dollars_per_s and self._prefill.known))

    def _least_chance(self, group: Group, run: Sequence[int]) -> float:
        """At which writing a run costs as much as it saves, at the run's depth."""
        terms, tokens = self._terms, group.spec.block_tokens
        if terms.least_chance or not self._has_prices():
            return terms.least_chance
        fixed, *_ = self._prefill.line
        seconds = self._prefill.seconds(len(run) * tokens, group.index.depths[run[0]] * tokens) - fixed
        return len(run) * group.complete_bytes * terms.dollars_per_byte / max(1e-12, seconds * terms.gpu_dollars_per_s)

    def _decline(self, group: Group, run: Sequence[int], *, over_budget: bool) -> None:
        """A run is counted once, although it may be looked at again until it leaves."""
        fresh = [row for row in run if row not in group.declined]
        if not fresh:
            return
        if run[0] not in group.declined:
            self._counters.declined_cost_chains += not over_budget
            self._counters.declined_budget_chains += over_budget
        self._counters.declined_blocks += len(fresh)
        group.declined.update(fresh)


def _runs(group: Group, rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Where each run of parents and their children begins and ends."""
    parents, first = group.index.parents, 0
    for at in range(1, len(rows) + 1):
        if at == len(rows) or parents[rows[at]] != rows[at - 1]:
            if first < at:
                yield first, at
            first = at


def _worth(group: Group, run: Sequence[int], chances: Sequence[float], least: float) -> int:
    """How many leading ones."""
    for at in reversed(range(len(run))):
        if chances[at] >= least or _continues_on_drive(group, run[at]):
            return at + 1
    return 0


def _continues_on_drive(group: Group, row: int) -> bool:
    index = group.index
    return any(index.is_in(child, NVME) or index.is_coming_to(child, NVME) for child in index.children(row))


class WriteBudget:
    """A token bucket over bytes. `bytes_per_day` 0: no limit. Begins full, with what fills it in `burst_s`.

    So a day's writes are, where there is more to write than may be, within `burst_s` over a day of what is allowed.
    """

    def __init__(self, bytes_per_day: int, burst_s: float = BURST_S) -> None:
        self.bytes_per_day = bytes_per_day
        self._per_s = bytes_per_day / DAY_S
        self._most = self._per_s * burst_s
        self._tokens = self._most
        self._filled_s: float | None = None

    def left_bytes(self, now: float) -> int:
        """What may be written at once; -1 without a limit."""
        if not self.bytes_per_day:
            return -1
        self._fill(now)
        return int(self._tokens)

    def share_left(self, now: float) -> float:
        """Of what may be written at once, how much is left, 0 to 1; 1 without a limit."""
        if not self.bytes_per_day:
            return 1.0
        self._fill(now)
        return max(0.0, self._tokens) / self._most

    def take(self, size_bytes: int, now: float) -> bool:
        """Spend; False, spending nothing, where there is not enough."""
        if not self.bytes_per_day:
            return True
        self._fill(now)
        if size_bytes > self._tokens:
            return False
        self._tokens -= size_bytes
        return True

    def give_back(self, size_bytes: int) -> None:
        """What was taken and not written."""
        self._tokens = min(self._tokens + size_bytes, self._most)

    def _fill(self, now: float) -> None:
        if self._filled_s is not None:
            self._tokens = min(self._most, self._tokens + (now - self._filled_s) * self._per_s)
        self._filled_s = now
