"""What the store knows of time and work: links, prefill rate, what was asked for, what was saved by having it.

One object beside the index. It counts, and answers two questions: what of a match is worth loading (`plan`), and what
more memory would hit (`curve`). It changes nothing in the store. Who asked is answered first: references are entered
into the curve by `settle`, afterwards.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

from forebay.kvstore.curve import NamespaceCurve, ReuseCurve
from forebay.kvstore.groups import HOST, NVME, Group
from forebay.kvstore.load_times import LoadTimes
from forebay.kvstore.planner import (
    NO_BACKLOG,
    NO_PLAN,
    Backlog,
    Demand,
    Link,
    Mode,
    Origin,
    Plan,
    PrefillRate,
    plan,
    soft_deadline_s,
)
from forebay.kvstore.recording import Recording

NVME_GB_S = 3.0
"""What a drive is taken for where nothing at all is known of it."""
SIZES_TOLD = (0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
"""Of the curve, at these multiples of all tiers' capacity, status and metrics tell."""
HORIZON = SIZES_TOLD[-1]

ETA_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
"""Relative errors of predicted load times are counted up to these."""
_PENDING_MAX, _PENDING_BLOCKS_MAX = 256, 4096
"""Few, or the memory of all their hashes is cold when the next request wants it."""
_TOKENS_PER_S_MAX, _BYTES_PER_S_MAX = 1e8, 1e13
"""Nobody computes, or copies, faster than this."""
_EXPECTED_MAX = 4096
_CURVES_TOLD = 64
"""Namespaces whose curves are told, those most asked for."""
_RECENT_MAX = 1024
_SAME_S = 5.0
"""A chain that was asked for is leased within so long by all who serve the same request: that is no other one."""


@dataclass(frozen=True, slots=True)
class PhysicsConfig:
    """What is assumed until something was measured; 0: nothing is known.

    Attributes:
        prefill_tokens_per_s, prefill_double_tokens: of one replica, see `PrefillRate`.
        token_flops: operations for one token at the beginning of a prompt.
        gpus: of one replica.
        host_gb_s, nvme_gb_s: of the links.
        nvme_origin: of the second.
    """

    mode: Mode = Mode.AUTO
    prefill_tokens_per_s: float = 0.0
    prefill_double_tokens: float = 0.0
    token_flops: float = 0.0
    gpus: int = 1
    host_gb_s: float = 20.0
    nvme_gb_s: float = NVME_GB_S
    nvme_origin: Origin = Origin.ASSUMED


NOTHING_KNOWN = PhysicsConfig()


@dataclass(slots=True)
class Savings:
    """Totals since the start of what leased blocks saved. `stall_gpu_s` were spent waiting for loads instead."""

    tokens: int = 0
    flops: float = 0.0
    gpu_s: float = 0.0
    stall_gpu_s: float = 0.0


@dataclass(slots=True)
class EtaErrors:
    """How far from the truth predicted load times were, relative to it.

    `counts[i]` are errors up to ETA_BOUNDS[i], its last element the rest.
    """

    counts: list[int] = field(default_factory=lambda: [0] * (len(ETA_BOUNDS) + 1))
    total: float = 0.0

    def add(self, predicted_s: float, took_s: float) -> None:
        """Nothing, where either is not known."""
        if predicted_s > 0 and took_s > 0:
            error = abs(predicted_s - took_s) / took_s
            self.counts[bisect_left(ETA_BOUNDS, error)] += 1
            self.total += error


@dataclass(slots=True)
class PlanCounts:
    """Plans by what they said, loads given up at their soft deadline, and by tier how well load times were foreseen."""

    load: int = 0
    part: int = 0
    recompute: int = 0
    errors: tuple[EtaErrors, EtaErrors] = field(default_factory=lambda: (EtaErrors(), EtaErrors()))
    late: int = 0


@dataclass(frozen=True, slots=True)
class LinkStats:
    """``gb_s`` and ``latency_s`` as plans take them now, for blocks of 1 MiB; where they come from is ``origin``."""

    tier: str
    gb_s: float
    latency_s: float
    queued_bytes: int
    origin: Origin = Origin.ASSUMED


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """What a memory of this size would have hit, of blocks asked for lately."""

    size_bytes: int
    hit_share: float
    hit_tokens_per_day: float
    hit_bytes_per_day: float
    gpu_s_per_day: float


@dataclass(frozen=True, slots=True)
class PhysicsStats:
    """Everything above at one instant. ``curves`` is by namespace fingerprint: (size, share of its blocks).

    ``gpus`` are of one replica, as configured: all of them wait for a load.
    """

    savings: Savings
    plans: PlanCounts
    links: tuple[LinkStats, ...]
    prefill_samples: int
    prefill_line: tuple[float, float, float]
    curve: tuple[CurvePoint, ...]
    curves: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    curve_keys: int
    curve_skipped: int
    gpus: int = 1


class Physics:
    """For one store.

    Args:
        capacity_bytes: of all tiers together.
    """

    def __init__(self, config: PhysicsConfig, capacity_bytes: int) -> None:
        self.config = config
        self.capacity_bytes = capacity_bytes
        self.curve = ReuseCurve(horizon_bytes=int(HORIZON * capacity_bytes))
        self.prefill = PrefillRate(config.prefill_tokens_per_s, config.prefill_double_tokens)
        self.links = (LoadTimes("host", config.host_gb_s), Link("nvme", config.nvme_gb_s, origin=config.nvme_origin))
        self.savings = Savings()
        self.plans = PlanCounts()
        self._curves: dict[Group, NamespaceCurve] = {}
        self._pending: deque[tuple[Group, Sequence[bytes], int, float, bool]] = deque()
        self._pending_blocks = 0
        self._skipped = 0
        self._asked = _Recent()
        self._leased = _Recent()
        self._expected: dict[int, tuple[float, float]] = {}
        self._begun_s: float | None = None
        self.recording: Recording | None = None
        """Told of each request that is counted, while somebody records."""

    # What happens

    def asked(self, group: Group, hashes: Sequence[bytes], rows: Sequence[int], now: float) -> None:
        """A lookup: somebody has this prompt."""
        self._asked.add(group, hashes, len(rows), now)
        self._refer(group, hashes, rows, now, counted=True)

    def leased(self, group: Group, hashes: Sequence[bytes], rows: Sequence[int], on_drive: int, now: float) -> float:
        """An acquire of these leading blocks, so many of which are on the drive; returns how long those should take.

        Whoever leases what was looked up, and the other ranks of an engine, are no further requests.
        """
        if not self._asked.has(group, hashes, len(rows), now):
            self._asked.add(group, hashes, len(rows), now)
            self._refer(group, hashes, rows, now, counted=True)
        size = group.complete_bytes
        return self.links[NVME].eta_s(on_drive * size, size) if on_drive else 0.0

    def soft_deadline_s(self, group: Group, rows: Sequence[int], load_s: float) -> float:
        """When to give up a load of these rows that should take so long; 0: never."""
        tokens = group.spec.block_tokens
        recompute_s = self.prefill.seconds(len(rows) * tokens, group.index.depths[rows[0]] * tokens)
        return soft_deadline_s(load_s, recompute_s, self.config.mode)

    def granted(self, group: Group, hashes: Sequence[bytes], rows: Sequence[int], nvme_s: float, now: float) -> None:
        """The lease was given: nobody has to compute these blocks. The first of an engine's ranks counts for all."""
        if not self._leased.has(group, hashes, len(rows), now):
            self._leased.add(group, hashes, len(rows), now)
            host_s = self.links[HOST].blocks_s(len(rows), group.complete_bytes, group.index.shard_size)
            self._count_saved(group, rows, max(nvme_s, host_s))

    def stored(self, group: Group, hashes: Sequence[bytes], depth: int, now: float) -> None:
        """A reserve: these blocks are recent now, without having been asked for."""
        self._pend(group, hashes, depth, now, counted=False)

    def expect(self, lease_id: int, load_s: float, now: float) -> None:
        """A lease waits for the drive; `arrived` will tell how well that was foreseen."""
        if len(self._expected) < _EXPECTED_MAX:
            self._expected[lease_id] = load_s, now

    def arrived(self, lease_id: int, now: float) -> None:
        """All of a lease's blocks are there."""
        load_s, begun_s = self._expected.pop(lease_id, (0.0, 0.0))
        self.plans.errors[NVME].add(load_s, now - begun_s)

    def ended(self, lease_id: int) -> None:
        """A lease is over, whether all came or not."""
        self._expected.pop(lease_id, None)

    def computed(self, tokens: int, depth: int, seconds: float) -> None:
        """An engine reports a prefill. One that no engine could have made is not believed."""
        if seconds * _TOKENS_PER_S_MAX > tokens > 0:
            self.prefill.report(tokens, depth, seconds)

    def late(self, loads: int) -> None:
        """A client has given up so many at their soft deadline."""
        self.plans.late += loads

    def copied(self, size_bytes: int, seconds: float) -> None:
        """A client reports a load out of host memory; what would have been said of it is held against that."""
        if seconds * _BYTES_PER_S_MAX > size_bytes:
            self.plans.errors[HOST].add(self.links[HOST].eta_s(size_bytes), seconds)
            self.links[HOST].measured(size_bytes, seconds)

    @property
    def pending(self) -> int:
        """Requests that `settle` has to enter."""
        return len(self._pending)

    def settle(self, most: int = _PENDING_MAX) -> None:
        """Enter into the curve what was asked since, so many requests at most; 0.1 us a block."""
        for _ in range(min(most, len(self._pending))):
            group, hashes, depth, now, counted = self._pending.popleft()
            self._pending_blocks -= len(hashes)
            curve = self._curve_of(group)
            if counted:
                self._begun_s = now if self._begun_s is None else self._begun_s
                self.curve.refer(curve, hashes, depth, now)
            else:
                self.curve.place(curve, hashes, depth)

    def forget(self, group: Group) -> None:
        """A namespace has gone."""
        self.settle()
        curve = self._curves.pop(group, None)
        if curve is not None:
            self.curve.close(curve)

    # What is asked

    def plan(
        self,
        group: Group,
        hashes: Sequence[bytes],
        rows: Sequence[int],
        counts: Sequence[int],
        backlog: Backlog = NO_BACKLOG,
    ) -> Plan:
        """What of a match is worth loading; `counts` says how many of its blocks are in memory and on the drive.

        Of a prompt the daemon knows the whole blocks only.
        """
        if not self.prefill.known and self.config.mode is not Mode.NEVER:
            return self._all_of(group, rows, counts)
        made = self.weigh(group, hashes, rows, counts, backlog)
        if rows:
            plans = self.plans
            plans.load += made.blocks == len(rows)
            plans.part += 0 < made.blocks < len(rows)
            plans.recompute += made.blocks == 0
        return made

    def weigh(
        self,
        group: Group,
        hashes: Sequence[bytes],
        rows: Sequence[int],
        counts: Sequence[int],
        backlog: Backlog = NO_BACKLOG,
    ) -> Plan:
        """As `plan`, with its table, and without counting it."""
        tokens = group.spec.block_tokens
        runs = [(self.links[tier], count) for tier, count in self._runs(group, rows, counts)]
        demand = Demand(
            runs,
            len(hashes) * tokens,
            tokens,
            group.complete_bytes,
            backlog.seconds(self.prefill),
            backlog.requests,
            group.index.shard_size,
            group.index.depths[rows[0]] * tokens if rows else 0,
        )
        return plan(demand, self.prefill, self.config.mode)

    def link_stats(self) -> tuple[LinkStats, ...]:
        """What plans take the links for now."""
        return tuple(
            LinkStats(link.name, link.bytes_per_s(1 << 20) / 1e9, link.latency_s, link.queued_bytes, link.origin)
            for link in self.links
        )

    def _all_of(self, group: Group, rows: Sequence[int], counts: Sequence[int]) -> Plan:
        """What `plan` would say where nothing is known of prefills, in a third of the time."""
        size, shards, blocks = group.complete_bytes, group.index.shard_size, len(rows)
        if not blocks:
            return NO_PLAN
        self.plans.load += 1
        by_tier = zip(self.links, counts, strict=False)
        load_s = max(link.blocks_s(count, size, shards) for link, count in by_tier if count)
        return Plan(blocks, (), load_s, 0.0, "the prefill rate is not known", ())

    def _runs(self, group: Group, rows: Sequence[int], counts: Sequence[int]) -> list[tuple[int, int]]:
        """Runs of one tier. Rows are looked at only where both tiers have some."""
        if not rows:
            return []
        if len(counts) == 1 or not counts[NVME]:
            return [(HOST, len(rows))]
        if not counts[HOST]:
            return [(NVME, len(rows))]
        runs: list[tuple[int, int]] = []
        for row in rows:
            tier = HOST if group.index.is_whole_in(row, HOST) else NVME
            if runs and runs[-1][0] == tier:
                runs[-1] = (tier, runs[-1][1] + 1)
            else:
                runs.append((tier, 1))
        return runs

    def stats(self, now: float) -> PhysicsStats:
        self.settle()
        sizes = [int(share * self.capacity_bytes) for share in SIZES_TOLD]
        asked = [each for each in self._curves.items() if each[1].references]
        most = sorted(asked, key=lambda each: -each[1].references)[:_CURVES_TOLD]
        return PhysicsStats(
            savings=replace(self.savings),
            plans=deepcopy(self.plans),
            links=self.link_stats(),
            prefill_samples=self.prefill.samples,
            prefill_line=self.prefill.line,
            curve=tuple(self.point(size, now) for size in sizes),
            curves=tuple(
                (group.fingerprint.hex(), tuple((size, _share(curve, size)) for size in sizes)) for group, curve in most
            ),
            curve_keys=self.curve.keys,
            curve_skipped=self._skipped,
            gpus=self.config.gpus,
        )

    def point(self, size_bytes: int, now: float) -> CurvePoint:
        """All namespaces together, weighed by tokens."""
        asked = hit = hit_bytes = seconds = 0.0
        _, each, deep = self.prefill.line
        for group, curve in self._curves.items():
            tokens = group.spec.block_tokens
            blocks = curve.hit_blocks(size_bytes)
            asked += curve.references * tokens
            hit += blocks * tokens
            hit_bytes += blocks * curve.block_bytes
            seconds += tokens * (blocks * each + curve.hit_depth(size_bytes) * tokens * deep)
        per_day = self._per_day(now)
        share = hit / asked if asked else 0.0
        return CurvePoint(size_bytes, share, hit * per_day, hit_bytes * per_day, seconds * self.config.gpus * per_day)

    # Helpers

    def _per_day(self, now: float) -> float:
        """What turns the curve's decayed totals into daily rates."""
        observed_s = 0.0 if self._begun_s is None else now - self._begun_s
        return 86_400.0 / self.curve.weighted_s(observed_s) if observed_s > 0 else 0.0

    def _curve_of(self, group: Group) -> NamespaceCurve:
        curve = self._curves.get(group)
        if curve is None:
            curve = self._curves[group] = self.curve.open(group.complete_bytes)
        return curve

    def _refer(self, group: Group, hashes: Sequence[bytes], rows: Sequence[int], now: float, *, counted: bool) -> None:
        """A chain of which nothing is stored is taken to begin a prompt: who continues one has stored its beginning."""
        if self.recording is not None:
            self.recording.add(group, hashes, rows, now)
        depth = group.index.depths[rows[0]] if rows else 0
        self._pend(group, hashes, depth, now, counted=counted)

    def _pend(self, group: Group, hashes: Sequence[bytes], depth: int, now: float, *, counted: bool) -> None:
        if len(self._pending) >= _PENDING_MAX or self._pending_blocks >= _PENDING_BLOCKS_MAX:
            self._skipped += 1
        elif hashes:
            self._pending_blocks += len(hashes)
            self._pending.append((group, hashes, depth, now, counted))

    def _count_saved(self, group: Group, rows: Sequence[int], load_s: float) -> None:
        saved, config = self.savings, self.config
        tokens = len(rows) * group.spec.block_tokens
        depth = group.index.depths[rows[0]] * group.spec.block_tokens
        fixed, *_ = self.prefill.line
        saved.tokens += tokens
        if config.prefill_double_tokens:
            saved.flops += config.token_flops * tokens * (1 + (depth + tokens / 2) / config.prefill_double_tokens)
        else:
            saved.flops += config.token_flops * tokens
        if self.prefill.known:
            saved.stall_gpu_s += load_s * config.gpus
            saved.gpu_s += (self.prefill.seconds(tokens, depth) - fixed) * config.gpus


def _share(curve: NamespaceCurve, size_bytes: int) -> float:
    return curve.hit_blocks(size_bytes) / curve.references if curve.references else 0.0


class _Recent:
    """The ends of chains named lately, to know them again; bounded."""

    __slots__ = ("_seen",)

    def __init__(self) -> None:
        self._seen: dict[tuple[Group, bytes], float] = {}

    def add(self, group: Group, hashes: Sequence[bytes], present: int, now: float) -> None:
        """The chain may be named again whole, or as far as it is there."""
        for end in {len(hashes), present}:
            if end:
                self._seen[group, hashes[end - 1]] = now
        if len(self._seen) > _RECENT_MAX:
            young = {key: at for key, at in self._seen.items() if now - at < _SAME_S}
            self._seen = young if len(young) <= _RECENT_MAX // 2 else {}

    def has(self, group: Group, hashes: Sequence[bytes], present: int, now: float) -> bool:
        return any(
            end and now - self._seen.get((group, hashes[end - 1]), now - _SAME_S) < _SAME_S
            for end in (len(hashes), present)
        )
