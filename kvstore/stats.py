"""What the core tells about itself: frozen records, totals since start (never rates), taken at one instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.kvstore.physics import PhysicsStats


@dataclass(frozen=True, slots=True)
class TierStats:
    """Slots of one tier; ``free + reserved + quarantined + resident == slots_total`` over assigned slabs."""

    tier: str
    capacity_bytes: int
    slab_bytes: int
    slabs_total: int
    slabs_assigned: int
    resident_bytes: int
    slots_total: int
    slots_free: int
    slots_reserved: int
    slots_quarantined: int
    slots_resident: int


@dataclass(frozen=True, slots=True)
class NamespaceStats:
    """One namespace group; ``resident_bytes`` counts payload over all its shards.

    ``memory_only`` says why its blocks are never written to the nvme tier; empty where they are, or there is none.
    """

    fingerprint: str
    model: str
    uid: int
    block_tokens: int
    block_bytes: int
    shard_size: int
    blocks: int
    pinned_blocks: int
    slabs: int
    resident_bytes: int
    nvme_resident_bytes: int
    last_touch_s: float
    memory_only: str = ""


@dataclass(slots=True)
class Counters:
    """Totals the core adds to as it works; `StoreStats` carries a copy."""

    lookups: int = 0
    lookup_hashes: int = 0
    lookup_hit_blocks: int = 0
    acquired_blocks: int = 0
    acquired_bytes: int = 0
    reserved_blocks: int = 0
    committed_blocks: int = 0
    committed_bytes: int = 0
    aborted_blocks: int = 0
    present_blocks: int = 0
    in_flight_blocks: int = 0
    rejected_full_blocks: int = 0
    rejected_orphan_blocks: int = 0
    rejected_draining_blocks: int = 0
    bypassed_blocks: int = 0
    evicted_blocks: int = 0
    evicted_unwritten_blocks: int = 0
    released_blocks: int = 0
    promoted_blocks: int = 0
    promoted_bytes: int = 0
    promotions_full_blocks: int = 0
    promotions_cancelled_blocks: int = 0
    promotions_failed_blocks: int = 0
    demoted_blocks: int = 0
    demoted_bytes: int = 0
    demotions_failed_blocks: int = 0
    declined_cost_chains: int = 0
    declined_budget_chains: int = 0
    declined_blocks: int = 0
    corrupt_blocks: int = 0
    stale_blocks: int = 0
    restored_blocks: int = 0
    restored_dropped_blocks: int = 0
    removed_blocks: int = 0
    done_hints: int = 0
    done_blocks: int = 0
    stopped_hints: int = 0
    expect_hints: int = 0
    expected_blocks: int = 0
    unexpected_blocks: int = 0
    preferred_blocks: int = 0
    unpreferred_blocks: int = 0
    expired_leases: int = 0
    expired_reservations: int = 0
    sessions_opened: int = 0
    sessions_closed: int = 0
    slabs_assigned: int = 0
    slabs_retired: int = 0


@dataclass(frozen=True, slots=True)
class MovementStats:
    """What is between host memory and the nvme tier.

    ``budget_left_bytes`` is what may be written at once; -1 without a budget. ``dirty_blocks`` are in host memory only.
    ``ready`` is false until the tier has told which of its slabs are in use.
    """

    ready: bool
    loads: int
    loading_blocks: int
    writes: int
    writing_blocks: int
    writing_bytes: int
    dirty_blocks: int
    budget_bytes_per_day: int
    budget_left_bytes: int


@dataclass(frozen=True, slots=True)
class StoreStats:
    """The whole core at one instant. ``warnings`` are sentences for an operator about what was lost at the start.

    ``gpu_pinned_bytes``: mapped memory that clients' GPUs reach by themselves; the same slab counts for each client.
    ``gpu_unpinned_sessions``: sessions that could not pin some of it. ``gpu_refusals``: why, a few distinct reasons.
    """

    tiers: tuple[TierStats, ...]
    namespaces: tuple[NamespaceStats, ...]
    sessions: int
    leases: int
    leased_blocks: int
    reservations: int
    quarantined_reservations: int
    pinned_blocks: int
    draining: bool
    movement: MovementStats | None
    counters: Counters
    warnings: tuple[str, ...] = ()
    physics: PhysicsStats | None = None
    gpu_pinned_bytes: int = 0
    gpu_unpinned_sessions: int = 0
    gpu_refusals: tuple[str, ...] = ()
