"""Why a block is where it is: its place, who uses it, what the policy thinks of it, and what a plan would do with it.

Reads, and changes nothing: neither the order of eviction nor any count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from forebay.kvstore.eviction.hazard import Explanation, HazardPolicy
from forebay.kvstore.eviction.lru import LruPolicy
from forebay.kvstore.groups import HOST, Group
from forebay.kvstore.index import NO_ROW
from forebay.kvstore.leases import Lease
from forebay.kvstore.physics import LinkStats, Physics
from forebay.kvstore.planner import Plan

ORDER_MAX = 1024
"""So many of the blocks that go next are looked through."""


@dataclass(frozen=True, slots=True)
class BlockStory:
    """Of one block.

    Attributes:
        depth: blocks before it in its prompt.
        tiers: where all shards of it lie; empty where some are being written, or nowhere.
        leases, lease_left_s: those that hold it, and the time of the last to end.
        priority: that it was stored with, while it is in memory.
        holds: leases, copies and writers that keep it.
        leaving: whether it may leave memory, or why not.
        order: how many blocks would leave memory before it, None where that is more than `ORDER_MAX`.
        policy: what the hazard policy knows, None with another one.
        age_s: since it was last asked for, None where that is not known.
        plan: for the prompt that ends with it.
        links, prefill_line: what the plan goes by.
    """

    stored: bool
    depth: int
    tokens: int
    tiers: tuple[str, ...]
    pinned: bool
    priority: int
    holds: int
    leases: int
    lease_left_s: float
    leaving: str
    order: int | None
    policy: Explanation | None
    age_s: float | None
    plan: Plan | None
    links: tuple[LinkStats, ...]
    prefill_line: tuple[float, float, float]


def explain(
    group: Group, physics: Physics, leases: Iterable[Lease], tiers: tuple[str, ...], name: bytes, now: float
) -> BlockStory | None:
    """What is known of a block, or None where nothing is. Cost: a walk to its root, and over leases."""
    row, policy = group.index.find(name), group.policies[HOST]
    thought = policy.explain(name, now) if isinstance(policy, HazardPolicy) else None
    index = group.index
    if row == NO_ROW or not (index.is_resident(row) or index.holds[row]):
        return None if thought is None else _ghost(physics, tiers, thought)
    holding = [lease for lease in leases if lease.group is group and row in lease.rows] if index.holds[row] else []
    chain, rows = _chain(group, row)
    touched = policy.touched(row) if isinstance(policy, LruPolicy) else None
    age_s = now - touched if touched is not None else thought.age_s if thought is not None else None
    return BlockStory(
        stored=index.is_resident(row),
        depth=index.depths[row],
        tokens=(index.depths[row] + 1) * group.spec.block_tokens,
        tiers=tuple(tier for level, tier in enumerate(tiers) if index.is_whole_in(row, level)),
        pinned=bool(index.pinned[row]),
        priority=index.priorities[row],
        holds=index.holds[row],
        leases=len(holding),
        lease_left_s=max((lease.deadline - now for lease in holding), default=0.0),
        leaving=_leaving(group, row),
        order=_order(group, row),
        policy=thought,
        age_s=age_s,
        plan=physics.weigh(group, chain, rows, index.count_by_tier(rows)),
        links=physics.link_stats()[: len(tiers)],
        prefill_line=physics.prefill.line,
    )


def _ghost(physics: Physics, tiers: tuple[str, ...], thought: Explanation) -> BlockStory:
    """Not stored, but the policy remembers it."""
    return BlockStory(
        False, 0, 0, (), False, 0, 0, 0, 0.0, "", None, thought, thought.age_s, None,
        physics.link_stats()[: len(tiers)], physics.prefill.line,
    )  # fmt: skip


def _chain(group: Group, row: int) -> tuple[list[bytes], list[int]]:
    """The prompt that ends with a block, as far as it is known, and the rows of its leading complete blocks."""
    index, chain = group.index, list[bytes]()
    while row != NO_ROW:
        name = index.hashes[row]
        assert name is not None, f"row {row} leads to one in use and is not"
        chain.append(name)
        row = index.parents[row]
    chain.reverse()
    return chain, list(index.walk(chain))


def _leaving(group: Group, row: int) -> str:
    index = group.index
    if not index.is_in(row, HOST):
        return "is not in memory"
    if index.pinned[row]:
        return "no, it is pinned"
    if index.holds[row]:
        return "no, it is leased, being copied or being written"
    if group.is_expected(row):
        return "no, a client expects to ask for it"
    if not group.evictable(row):
        return "not before the blocks that continue it"
    return "yes, before all others: its conversation is over" if group.policies[HOST].is_over(row) else "yes"


def _order(group: Group, row: int) -> int | None:
    coldest = group.policies[HOST].coldest(ORDER_MAX)
    return coldest.index(row) if row in coldest else None
