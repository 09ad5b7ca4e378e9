"""Load or recompute: how much of a stored prefix an engine had better load, from where, and how long that takes.

Each link (a tier's way into the engine) keeps what was measured of it: bandwidth by size class, latency, bytes queued
now. Prefill is a line in tokens and in tokens times depth, fitted on what engines report. A plan compares, for each
prefix that could be loaded, when the request's first token would come and how long the GPU would be busy for it, which
delays those that wait. A pure function of those numbers, with the table it decided by.

Source: trace replays with one FIFO link and one FIFO engine; without the term for those who wait, planning was worse
than loading always where the link was nearly saturated. Loading the end of a prefix while its beginning is computed
would gain more on slow links, but engines accept leading hits only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

_CLASS_BITS = 2
"""Size classes are factors of four."""
_CLASSES = 24
_EWMA = 0.2
_SAMPLE_S = 2e-3
"""Bandwidth is taken over at least so long, so that the grain of completions does not show."""
_WAITING_SHARE = 0.25
"""How much of the prefill of one request each that waits is delayed, on average."""
_PIECES = 8
"""Into so many parts the last run may be cut."""
_SOFT_TIMES, _SOFT_SHARE, _SOFT_MIN_S = 3.0, 0.25, 0.02
"""A load is given up after so many times what it was to take, but not before so much of the time has gone by that
computing takes, nor within what any machine may be busy for."""
_FORGET = 0.98
_PRIOR_SAMPLES = 2.0
_TOKEN_SCALE = 1e-3
"""Tokens are counted in thousands in the fit, so that its columns are alike in size."""


class Mode(StrEnum):
    """Whether plans are made, or one of the two answers is given to everybody."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


class Origin(StrEnum):
    """Where the bandwidth of a link comes from."""

    ASSUMED = "assumed"
    BENCHED = "benched"
    MEASURED = "measured"


class Link:
    """What is known of the way from one tier to the engine.

    Args:
        name: the tier's.
        gb_s, latency_s: assumed until something was measured.
        origin: of `gb_s`.
    """

    __slots__ = (
        "_bandwidths",
        "_busy_s",
        "_bytes",
        "_effective",
        "_last_done_s",
        "_origin",
        "latency_s",
        "name",
        "queued_bytes",
    )

    def __init__(self, name: str, gb_s: float, latency_s: float = 0.0, *, origin: Origin = Origin.ASSUMED) -> None:
        self.name = name
        self.latency_s = latency_s
        self.queued_bytes = 0
        self._origin = origin
        self._effective = [gb_s * 1e9] * _CLASSES
        self._bandwidths = [0.0] * _CLASSES
        self._bytes = [0] * _CLASSES
        self._busy_s = [0.0] * _CLASSES
        self._last_done_s = 0.0

    @property
    def origin(self) -> Origin:
        """Of what it is taken for now: whatever was measured here, of any size, counts more than what was said."""
        return Origin.MEASURED if any(self._bandwidths) else self._origin

    def begin(self, size_bytes: int) -> None:
        """A transfer waits or runs."""
        self.queued_bytes += size_bytes

    def cancel(self, size_bytes: int) -> None:
        """It has ended without having moved."""
        self.queued_bytes -= size_bytes

    def done(self, size_bytes: int, started_s: float, now: float) -> None:
        """A transfer that began to wait at `started_s` has ended; the link was busy for it since the last one ended."""
        self.queued_bytes -= size_bytes
        busy_s = now - max(started_s, self._last_done_s)
        if started_s >= self._last_done_s:  # it found the link idle: its time is latency and transfer, nobody else's
            alone_s = max(0.0, busy_s - size_bytes / self.bytes_per_s(size_bytes))
            self.latency_s += _EWMA * (alone_s - self.latency_s)
        self._last_done_s = now
        self.measured(size_bytes, busy_s)

    def measured(self, size_bytes: int, busy_s: float) -> None:
        """So many bytes came in so long a time, in which the link did nothing else."""
        size_class = _size_class(size_bytes)
        self._bytes[size_class] += size_bytes
        self._busy_s[size_class] += busy_s
        if self._busy_s[size_class] < _SAMPLE_S:
            return
        sample = self._bytes[size_class] / self._busy_s[size_class]
        known = self._bandwidths[size_class]
        self._bandwidths[size_class] = known + _EWMA * (sample - known) if known else sample
        self._bytes[size_class], self._busy_s[size_class] = 0, 0.0
        measured = [each for each in range(_CLASSES) if self._bandwidths[each]]
        for each in range(_CLASSES):
            self._effective[each] = self._bandwidths[min(measured, key=lambda other: abs(other - each))]

    def bytes_per_s(self, size_bytes: int) -> float:
        """In transfers of this size; the nearest size that was measured, else the assumption."""
        return self._effective[_size_class(size_bytes)]

    def eta_s(self, size_bytes: int, piece_bytes: int = 0) -> float:
        """Until so many bytes more have come, in transfers of `piece_bytes` where not in one."""
        bandwidth = self.bytes_per_s(piece_bytes or size_bytes)
        return self.latency_s + (self.queued_bytes + size_bytes) / bandwidth

    def blocks_s(self, blocks: int, block_bytes: int, shards: int) -> float:
        """Until so many blocks more have come; `block_bytes` is one of them over all its shards."""
        return self.eta_s(blocks * block_bytes, block_bytes)


def _size_class(size_bytes: int) -> int:
    return min(_CLASSES - 1, max(0, size_bytes.bit_length() - 1) // _CLASS_BITS)


class PrefillRate:
    """Seconds to compute `tokens` more after `depth` that are there: `a + b tokens + c tokens mean_depth`.

    Least squares with forgetting on what was measured, held to the assumption by a few samples' weight.

    Args:
        tokens_per_s: of a short prompt; 0: nothing is known until samples come.
        double_tokens: the depth at which a token costs twice what the first does (attention); 0: it never does.
    """

    def __init__(self, tokens_per_s: float = 0.0, double_tokens: float = 0.0) -> None:
        self.samples = 0
        self._line = (0.0, 1 / tokens_per_s, _per(1 / tokens_per_s, double_tokens)) if tokens_per_s else (0.0, 0.0, 0.0)
        self._moments = [[0.0] * 3 for _ in range(3)]
        self._target = [0.0] * 3
        if tokens_per_s:
            for tokens, depth in ((256, 0), (4096, 0), (4096, 32768)):
                self._add(tokens, depth, self.seconds(tokens, depth), _PRIOR_SAMPLES / 3)

    @property
    def known(self) -> bool:
        """Whether it can say anything."""
        return self._line[1] > 0

    @property
    def line(self) -> tuple[float, float, float]:
        """Seconds at once, per token, and per token and token of mean depth."""
        return self._line

    def seconds(self, tokens: float, depth: float) -> float:
        fixed, each, deep = self._line
        return fixed + tokens * (each + deep * (depth + tokens / 2)) if tokens > 0 else 0.0

    def report(self, tokens: int, depth: int, seconds: float) -> None:
        """An engine has computed so many tokens after so many that were there."""
        self.samples += 1
        for row in range(3):
            self._target[row] *= _FORGET
            for column in range(3):
                self._moments[row][column] *= _FORGET
        self._add(tokens, depth, seconds, 1.0)
        self._line = self._solved()

    def _add(self, tokens: float, depth: float, seconds: float, weight: float) -> None:
        """Errors count in proportion to the time, else the longest prefills alone would decide."""
        tokens_k, depth_k = tokens * _TOKEN_SCALE, (depth + tokens / 2) * _TOKEN_SCALE
        weight /= max(seconds, 1e-6) ** 2
        columns = (1.0, tokens_k, tokens_k * depth_k)
        for row in range(3):
            self._target[row] += weight * columns[row] * seconds
            for column in range(3):
                self._moments[row][column] += weight * columns[row] * columns[column]

    def _solved(self) -> tuple[float, float, float]:
        """The line, without the terms that came out negative: noise, or too few kinds of samples."""
        kept = [0, 1, 2]
        while kept:
            found = _solve([[self._moments[i][j] for j in kept] for i in kept], [self._target[i] for i in kept])
            if found is not None and min(found) >= 0:
                line = dict(zip(kept, found, strict=True))
                return (
                    line.get(0, 0.0),
                    line.get(1, 0.0) * _TOKEN_SCALE,
                    line.get(2, 0.0) * _TOKEN_SCALE * _TOKEN_SCALE,
                )
            kept.remove(0 if 0 in kept else kept[-1])
        return self._line


def _per(value: float, by: float) -> float:
    return value / by if by else 0.0


def _solve(matrix: list[list[float]], target: list[float]) -> list[float] | None:
    """Gaussian elimination of at most three unknowns; None where they cannot be told apart."""
    rows = [[*row, right] for row, right in zip(matrix, target, strict=True)]
    size = len(rows)
    for i in range(size):
        pivot = max(range(i, size), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        if abs(rows[i][i]) <= 1e-9 * max(1e-300, abs(matrix[i][i])):
            return None
        for k in range(size):
            if k != i:
                factor = rows[k][i] / rows[i][i]
                rows[k] = [left - factor * right for left, right in zip(rows[k], rows[i], strict=True)]
    return [rows[i][size] / rows[i][i] for i in range(size)]


@dataclass(frozen=True, slots=True)
class Step:
    """One run of a plan: `count` blocks from `first` on come from a tier, the last after `eta_s`."""

    tier: str
    first: int
    count: int
    eta_s: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """What loading so many blocks would mean: when they are there, when the first token is, and the score."""

    blocks: int
    load_s: float
    finish_s: float
    score: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What to load.

    Attributes:
        blocks: leading blocks to load; the rest of the match is better computed.
        steps: from where, in prompt order.
        load_s: until all of them are there.
        recompute_s: to compute the whole prompt instead.
        reason: in words.
        table: what was weighed.
    """

    blocks: int
    steps: tuple[Step, ...]
    load_s: float
    recompute_s: float
    reason: str
    table: tuple[Candidate, ...]


NO_PLAN = Plan(0, (), 0.0, 0.0, "nothing is stored", ())


@dataclass(frozen=True, slots=True)
class Backlog:
    """What waits in front of the engine that asks.

    Attributes:
        requests: that have not begun to be computed.
        tokens: of prompts, theirs and of those under way, that are still to be computed.
    """

    requests: int = 0
    tokens: int = 0

    def seconds(self, prefill: PrefillRate) -> float:
        """Until the engine could begin with another: as many prompts of one length, for a long one costs more."""
        prompts = max(1, self.requests)
        return prompts * prefill.seconds(self.tokens / prompts, 0)


NO_BACKLOG = Backlog()


@dataclass(frozen=True, slots=True)
class Demand:
    """A request, as far as a plan needs it.

    Attributes:
        runs: leading blocks of the match as (link, blocks), in prompt order.
        tokens: of the prompt, but for the `depth` that the engine has already.
        block_tokens, block_bytes: of one block over all its shards.
        shards: of a block, each loaded by a rank of its own.
        queue_s: until the engine could begin to compute.
        waiting: requests that wait for the engine.
    """

    runs: Sequence[tuple[Link, int]]
    tokens: int
    block_tokens: int
    block_bytes: int
    queue_s: float = 0.0
    waiting: int = 0
    shards: int = 1
    depth: int = 0


def soft_deadline_s(load_s: float, recompute_s: float, mode: Mode) -> float:
    """How long to wait for a load that was to take `load_s` before its rest is better computed; 0: as long as it takes.

    That is where nothing is waited for, where the configuration decides, and where nothing is known of computing, which
    would take `recompute_s`. A quarter of that more is the most a wait in vain costs, unless the load was to take long;
    giving up a load that is late by a moment may cost all of it.
    """
    if load_s <= 0 or mode is not Mode.AUTO or recompute_s <= 0:
        return 0.0
    return max(_SOFT_MIN_S, _SOFT_TIMES * load_s, _SOFT_SHARE * recompute_s)


def plan(demand: Demand, prefill: PrefillRate, mode: Mode = Mode.AUTO) -> Plan:
    """How much of the match to load. Cost: 20 to 40 us whatever its length.

    Where nothing is known of the prefill rate everything is loaded: that is what an engine does without a plan.
    """
    matched = sum(count for _, count in demand.runs)
    recompute_s = prefill.seconds(demand.tokens, demand.depth)
    if not matched:
        return Plan(0, (), 0.0, recompute_s, "nothing is stored", ())
    if mode is Mode.NEVER:
        return Plan(0, (), 0.0, recompute_s, "the configuration says never", ())
    if mode is Mode.ALWAYS or not prefill.known:
        why = "the configuration says always" if mode is Mode.ALWAYS else "the prefill rate is not known"
        return Plan(matched, _steps(demand, matched), _load_s(demand, matched), recompute_s, why, ())
    table = tuple(_candidate(demand, prefill, blocks) for blocks in _choices(demand))
    best = min(table, key=lambda each: (each.score, -each.blocks))
    return Plan(
        best.blocks, _steps(demand, best.blocks), best.load_s, recompute_s, _reason(best, matched, table), table
    )


def _choices(demand: Demand) -> list[int]:
    """Nothing, the end of each run, and eighths of the last."""
    ends = [0]
    for _, count in demand.runs:
        ends.append(ends[-1] + count)
    last = demand.runs[-1][1]
    ends[-1:-1] = sorted({ends[-2] + last * piece // _PIECES for piece in range(1, _PIECES)} - {ends[-2], ends[-1]})
    return ends


def _candidate(demand: Demand, prefill: PrefillRate, blocks: int) -> Candidate:
    load_s = _load_s(demand, blocks)
    there = min(blocks * demand.block_tokens, demand.tokens)
    compute_s = prefill.seconds(demand.tokens - there, demand.depth + there)
    finish_s = max(demand.queue_s, load_s) + compute_s
    return Candidate(blocks, load_s, finish_s, finish_s + _WAITING_SHARE * demand.waiting * compute_s)


def _load_s(demand: Demand, blocks: int) -> float:
    """The slowest link's time; they work beside each other."""
    counts: dict[Link, int] = {}
    for link, count in demand.runs:
        taken = min(count, blocks)
        blocks -= taken
        if taken:
            counts[link] = counts.get(link, 0) + taken
    size, shards = demand.block_bytes, demand.shards
    return max((link.blocks_s(count, size, shards) for link, count in counts.items()), default=0.0)


def _steps(demand: Demand, blocks: int) -> tuple[Step, ...]:
    steps, first, counts = [], 0, dict[Link, int]()
    for link, count in demand.runs:
        taken = min(count, blocks - first)
        if taken > 0:
            counts[link] = counts.get(link, 0) + taken
            eta_s = link.blocks_s(counts[link], demand.block_bytes, demand.shards)
            steps.append(Step(link.name, first, taken, eta_s))
            first += taken
    return tuple(steps)


def _reason(best: Candidate, matched: int, table: Sequence[Candidate]) -> str:
    nothing, everything = table[0], table[-1]
    if best.blocks == matched:
        return f"loading is done in {best.load_s:.4f} s; without, the first token takes {nothing.finish_s:.4f} s"
    if best.blocks:
        return f"the last {matched - best.blocks} blocks would take until {everything.load_s:.4f} s"
    return f"loading takes {everything.load_s:.4f} s, computing is done in {nothing.finish_s:.4f} s"
