"""The eviction policies by name, each made for an index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from forebay.kvstore.eviction import EvictionPolicy
from forebay.kvstore.eviction.hazard import HazardPolicy
from forebay.kvstore.eviction.lru import LruPolicy

if TYPE_CHECKING:
    from forebay.kvstore.index import BlockIndex


@dataclass(frozen=True, slots=True)
class Place:
    """What a policy is made for: a tier of a namespace.

    Attributes:
        sole: there is no slower tier.
        fastest: there is no faster one; priorities are of blocks there.
    """

    index: BlockIndex
    block_tokens: int
    sole: bool = True
    fastest: bool = True


PolicyMaker: TypeAlias = "Callable[[Place], EvictionPolicy]"


def lru(place: Place) -> EvictionPolicy:
    index = place.index
    return LruPolicy(index.parents, index.depths, index.priorities if place.fastest else None)


def hazard(place: Place, *, equal_cost_tokens: float = 0.0) -> EvictionPolicy:
    """`equal_cost_tokens` is the depth at which attention costs as much as all else; 0: all blocks count the same."""
    index, equal_depth = place.index, equal_cost_tokens / place.block_tokens
    return HazardPolicy(
        index.parents, index.depths, index.hashes, index.priorities, equal_depth=equal_depth, sole=place.sole
    )


def served(name: str, equal_cost_tokens: int = 0) -> PolicyMaker:
    """The policy that a daemon is configured with: "hazard" or "lru"."""
    return partial(hazard, equal_cost_tokens=equal_cost_tokens) if name == "hazard" else lru
