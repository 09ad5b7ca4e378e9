"""One trace through the daemon's own store at one capacity, on a virtual clock.

Each request looks its chain up, has what lies on the drive brought up, and stores what was missing, as an engine does;
and what it wants copied is said to be done at once. Nothing of the store or of
its policies is modelled here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

from forebay.bench.trace import Request, Trace
from forebay.kvstore.admission import BURST_S, DAY_S, WriteTerms
from forebay.kvstore.eviction.policies import PolicyMaker
from forebay.kvstore.groups import Direction
from forebay.kvstore.movement import PAGE_BYTES, NvmeConfig, Verdict
from forebay.kvstore.namespace import NamespaceSpec
from forebay.kvstore.physics import PhysicsConfig
from forebay.kvstore.shapes import ModelShape
from forebay.kvstore.slabs import RESIDENT
from forebay.kvstore.store import Store, StoreConfig

_SESSION = 1
GPU_FLOPS = 989e12 / 2
"""A second, of a prefill: half of the peak of an H100 in bf16. An assumption."""
TOLD_REQUESTS = 128
BLOCK_BYTES = 4096
"""Of a block, to the store: the least that an nvme slot holds, since bytes are only counted."""


@dataclass(frozen=True, slots=True)
class Result:
    """Rates in percent, from a cold start unless requests were left out to warm up.

    Attributes:
        occupancy_mean: resident share of the host tier, mean over requests from the first eviction on.
        evictions: blocks by reason: `lost` for space, `unwritten` of them without an nvme tier having had them,
            `demoted` to it, `bypassed` (never stored), `declined` (found not to be worth a write to it).
        flops_saved: prefill work that hits made needless.
        written_bytes: to the drive, of real blocks.
        budget_used_percent: what was written, of what the write budget allows in the time that the trace lasts.
    """

    trace: str
    policy: str
    capacity_percent: float
    capacity_blocks: int
    token_hit_percent: float
    flops_saved_percent: float
    nvme_writes_per_new_block: float
    occupancy_mean: float
    evictions: dict[str, int]
    flops_saved: float
    nvme_blocks: int
    written_bytes: float = 0.0
    budget_used_percent: float = 0.0


@dataclass(frozen=True, slots=True)
class Drive:
    """An nvme tier.

    Attributes:
        budget_blocks_per_day: 0: no budget; `budget_burst_s` is as in `NvmeConfig`.
        terms: what a write is weighed by; its price is that of a byte of a real block.
        block_bytes: of a real block.
    """

    blocks: int
    budget_blocks_per_day: float = 0.0
    terms: WriteTerms | None = None
    block_bytes: int = BLOCK_BYTES
    budget_burst_s: float = BURST_S

    def config(self) -> NvmeConfig:
        """One slab that holds just so many blocks, each behind a header page, and the slab's own."""
        size = self.blocks * (BLOCK_BYTES + PAGE_BYTES) + PAGE_BYTES
        terms = self.terms
        if terms is not None:
            terms = replace(terms, dollars_per_byte=terms.dollars_per_byte * self.block_bytes / BLOCK_BYTES)
        per_day = int(self.budget_blocks_per_day * (BLOCK_BYTES + PAGE_BYTES))
        return NvmeConfig(size, size, budget_bytes_per_day=per_day, budget_burst_s=self.budget_burst_s, terms=terms)


class _Run:
    """The store and what is counted."""

    def __init__(
        self, host_blocks: int, drive: Drive | None, maker: PolicyMaker, block_tokens: int, physics: PhysicsConfig
    ) -> None:
        ids = itertools.count(1)
        host_bytes, nvme = host_blocks * BLOCK_BYTES, drive.config() if drive else None
        config = StoreConfig(host_bytes, host_bytes, host_policy=maker, nvme=nvme, physics=physics)
        self.store = Store(config, lambda: next(ids))
        if drive:
            self.store.restore_slabs([], 1)
            self.store.restore_done()
        self.store.open_session(_SESSION, 0)
        spec = NamespaceSpec("replayed", "", "bytes", block_tokens, (BLOCK_BYTES,))
        self.shard = self.store.open_namespace(_SESSION, spec)
        self.has_nvme = drive is not None
        self.new_blocks = self.written_blocks = 0

    def ask(self, request: Request) -> int:
        """Blocks that a request finds; then it stores the others, and its answer's."""
        store, ns, names, now = self.store, self.shard.ns, request.names, request.now_s
        found = len(store.lookup(_SESSION, ns, names, now))
        lease = store.acquire(_SESSION, ns, names[:found], 60.0, now).lease_id if self.has_nvme and found else 0
        self._carry_out(now)
        reserved = store.reserve(_SESSION, ns, b"", names + request.answer, now)
        self.new_blocks += len(names) + len(request.answer) - found
        if reserved.reservation_id:
            store.commit(_SESSION, reserved.reservation_id, (), now)
        if lease:
            store.release(_SESSION, lease)
        self._carry_out(now)
        return found

    def end(self, request: Request, keep: int) -> None:
        """Say that all but the first blocks of a request and its answer will not be asked for again."""
        self.store.done(_SESSION, self.shard.ns, request.names + request.answer, keep)

    def _carry_out(self, now: float) -> None:
        """Say that all which is wanted has been done, until nothing more is wanted."""
        self.store.plan_writes(now)
        while not self.store.has_no_effects():
            for transfer in self.store.drain_effects().transfers:
                count = len(transfer.rows)
                self.written_blocks += count if transfer.direction == Direction.WRITE else 0
                self.store.transfer_done(transfer.transfer_id, [Verdict.OK] * count, [0] * count, now)
            self.store.plan_writes(now)


def replay(
    trace: Trace,
    policy: str,
    maker: PolicyMaker,
    host_blocks: int,
    *,
    drive: Drive | None = None,
    shape: ModelShape,
    block_tokens: int = 512,
    warm_up: float = 0.0,
    tell: Callable[[int], None] | None = None,
    hints: float = 0.0,
) -> Result:
    """Run the whole trace; `host_blocks` at least 1.

    The leading share `warm_up` of requests is left out of the rates. `tell` is told of each few that are done. The
    share `hints` of requests, evenly spread, is followed by the hint that those of its blocks, and its answer's, which
    no later request names are not needed any more.
    """
    physics = PhysicsConfig(
        prefill_tokens_per_s=GPU_FLOPS / shape.token_flops, prefill_double_tokens=shape.double_tokens
    )
    run = _Run(host_blocks, drive, maker, block_tokens, physics)
    hit = asked = 0
    saved = needed = occupied = 0.0
    looked = 0
    first = int(warm_up * len(trace.requests))
    wanted = trace.wanted_again() if hints else []
    for number, request in enumerate(trace.requests):
        if tell is not None and number % TOLD_REQUESTS == TOLD_REQUESTS - 1:
            tell(TOLD_REQUESTS)
        found = min(run.ask(request) * block_tokens, request.tokens)
        if wanted and int((number + 1) * hints) > int(number * hints):
            run.end(request, wanted[number])
        if number < first:
            continue
        hit, asked = hit + found, asked + request.tokens
        saved, needed = saved + shape.prefill_flops(found), needed + shape.prefill_flops(request.tokens)
        if run.shard.group.evicted_from_host or run.store.counters.bypassed_blocks:
            looked += 1
            occupied += run.shard.slots.count(RESIDENT)
    counters = run.store.counters
    resident = run.shard.slots.count(RESIDENT)
    return Result(
        trace=trace.name,
        policy=policy,
        capacity_percent=round(100 * host_blocks / trace.unique_blocks, 3),
        capacity_blocks=host_blocks,
        token_hit_percent=100 * hit / max(1, asked),
        flops_saved_percent=100 * saved / max(1.0, needed),
        nvme_writes_per_new_block=run.written_blocks / max(1, run.new_blocks),
        occupancy_mean=(occupied / looked if looked else resident) / host_blocks,
        evictions={
            "lost": counters.evicted_blocks,
            "unwritten": counters.evicted_unwritten_blocks,
            "demoted": counters.released_blocks,
            "bypassed": counters.bypassed_blocks,
            "declined": counters.declined_blocks,
        },
        flops_saved=saved,
        nvme_blocks=drive.blocks if drive else 0,
        written_bytes=run.written_blocks * drive.block_bytes if drive else 0.0,
        budget_used_percent=_budget_used_percent(drive, run.written_blocks, trace) if drive else 0.0,
    )


def _budget_used_percent(drive: Drive, written_blocks: int, trace: Trace) -> float:
    """Of what the budget allows while the trace lasts; 0 without one."""
    allowed = drive.budget_blocks_per_day * trace.seconds / DAY_S
    return 100 * written_blocks / allowed if allowed else 0.0
