"""Shapes of models, against what their makers publish."""

from __future__ import annotations

import pytest

from forebay.bench.shapes import SHAPES


@pytest.mark.parametrize(
    ("name", "kv_bytes", "equal_tokens"),
    [("8b", 131_072, 30_600), ("70b", 327_680, 53_900), ("qwen3-32b", 262_144, 31_300), ("v3", 70_272, 14_800)],
)
def test_kv_bytes_and_depth_of_equal_cost(name: str, kv_bytes: int, equal_tokens: float) -> None:
    shape = SHAPES[name]
    assert shape.kv_bytes_per_token == kv_bytes
    assert shape.equal_cost_tokens == pytest.approx(equal_tokens, rel=0.01)


def test_attention_makes_a_prompt_of_twice_the_length_more_than_twice_as_dear() -> None:
    shape = SHAPES["8b"]
    assert shape.prefill_flops(2000) > 2 * shape.prefill_flops(1000)
    assert shape.prefill_flops(0) == 0
