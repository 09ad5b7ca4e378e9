"""The policies that a replay can compare, by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from forebay.bench.belady import belady
from forebay.bench.trace import Trace
from forebay.kvstore.eviction.arc import ArcPolicy
from forebay.kvstore.eviction.fifo import FifoPolicy
from forebay.kvstore.eviction.gdsf import GdsfPolicy
from forebay.kvstore.eviction.policies import PolicyMaker, hazard, lru
from forebay.kvstore.eviction.s3fifo import S3FifoPolicy
from forebay.kvstore.shapes import ModelShape

_ANY_TRACE: dict[str, PolicyMaker] = {
    "hazard": hazard,
    "lru": lru,
    "fifo": FifoPolicy,
    "s3fifo": S3FifoPolicy,
    "arc": ArcPolicy,
    "gdsf": GdsfPolicy,
}
_OF_A_SHAPE: dict[str, Callable[[ModelShape], PolicyMaker]] = {
    "hazard-cost": lambda shape: partial(hazard, equal_cost_tokens=shape.double_tokens),
}
_OF_A_TRACE: dict[str, Callable[[Trace], PolicyMaker]] = {"belady": belady}

NAMES = (*_ANY_TRACE, *_OF_A_SHAPE, *_OF_A_TRACE)
"""`hazard-cost` weighs blocks by what they cost to compute again; `belady` knows the future."""


def policy_maker(name: str, trace: Trace, shape: ModelShape) -> PolicyMaker:
    """A policy by one of `NAMES`."""
    if name in _ANY_TRACE:
        return _ANY_TRACE[name]
    return _OF_A_SHAPE[name](shape) if name in _OF_A_SHAPE else _OF_A_TRACE[name](trace)
