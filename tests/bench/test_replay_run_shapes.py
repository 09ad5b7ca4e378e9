"""Ways in which prompts come back that no recorded trace shows: the hazard policy never falls far behind LRU."""

from __future__ import annotations

import pytest

from forebay.bench.replay_policies import policy_maker
from forebay.bench.replay_run import Result, replay
from forebay.bench.trace import Trace
from forebay.kvstore.shapes import SHAPES as MODELS
from support.trace_shapes import SHAPES, turned_round

BEHIND_MAX = 0.5
"""Points of token hit rate."""
TURNED_MAX = 1.5
"""Where a trace turns into its opposite: to notice that costs some hundred blocks of hits, each time it is tried."""


def run(trace: Trace, policy: str, percent: int) -> Result:
    shape = MODELS["llama-3-70b"]
    blocks = max(1, percent * trace.unique_blocks // 100)
    return replay(trace, policy, policy_maker(policy, trace, shape), blocks, shape=shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_hazard_is_never_far_behind_lru(shape: str) -> None:
    """Cold. The generators were not made for the policy, nor it for them."""
    trace = SHAPES[shape]()
    for percent in (2, 10):
        hazard, lru = (run(trace, policy, percent).token_hit_percent for policy in ("hazard", "lru"))
        print(f"{trace.name}, {len(trace.requests)} requests, {percent} %: hazard {hazard:.2f} %, LRU {lru:.2f} %")
        assert hazard >= lru - BEHIND_MAX


def test_what_was_learned_is_given_up_when_it_is_wrong() -> None:
    """Without LRU beside it 7 points would be lost."""
    trace = turned_round()
    hazard, lru = (run(trace, policy, 2).token_hit_percent for policy in ("hazard", "lru"))
    print(f"{trace.name}, {len(trace.requests)} requests, 2 %: hazard {hazard:.2f} %, LRU {lru:.2f} %")
    assert hazard >= lru - TURNED_MAX
