"""Known shapes have the published costs, and a config.json leads to the same ones."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.shapes import SHAPES, from_config

H100 = 989e12 * 0.5
LLAMA_8B: dict[str, Any] = {
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
    "vocab_size": 128_256,
    "torch_dtype": "bfloat16",
}
DEEPSEEK_V3: dict[str, Any] = {
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "intermediate_size": 18_432,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 3,
    "vocab_size": 129_280,
}


@pytest.mark.parametrize(
    ("name", "kv_bytes", "double_tokens"),
    [
        ("llama-3-8b", 131_072, 30_600),
        ("llama-3-70b", 327_680, 53_900),
        ("qwen3-32b", 262_144, 31_300),
        ("deepseek-v3", 70_272, 14_800),
    ],
)
def test_known_models_have_the_published_costs(name: str, kv_bytes: int, double_tokens: int) -> None:
    assert SHAPES[name].kv_token_bytes == kv_bytes
    assert SHAPES[name].double_tokens == pytest.approx(double_tokens, rel=0.01)


def test_prefill_seconds_of_8b_on_one_gpu() -> None:
    """Linear part and causal attention at half of the peak rate."""
    seconds = [SHAPES["llama-3-8b"].prefill_s(tokens, H100) for tokens in (4096, 16_384, 32_768, 131_072)]
    assert seconds == pytest.approx([0.142, 0.674, 1.633, 13.364], rel=0.005)


def test_computing_in_two_parts_costs_what_the_whole_does() -> None:
    shape = SHAPES["llama-3-70b"]
    assert shape.prefill_flops(3000) + shape.prefill_flops(5000, depth=3000) == pytest.approx(shape.prefill_flops(8000))


def test_break_even_bandwidth_falls_with_the_length() -> None:
    shape = SHAPES["llama-3-8b"]
    found = [shape.break_even_gb_s(tokens, H100) for tokens in (1024, 4096, 16_384, 32_768, 131_072)]
    assert found == pytest.approx([3.97, 3.78, 3.18, 2.63, 1.29], rel=0.005)


def test_break_even_length_is_where_loading_begins_to_pay() -> None:
    shape = SHAPES["llama-3-8b"]
    assert shape.break_even_tokens(50.0, H100) == 1
    assert shape.break_even_tokens(0.05, H100) is None
    tokens = shape.break_even_tokens(2.0, H100, latency_s=0.04)
    assert tokens is not None
    assert shape.break_even_gb_s(tokens, H100) < 2.0
    loaded_s = 0.04 + shape.kv_token_bytes * tokens / 2e9
    assert loaded_s == pytest.approx(shape.prefill_s(tokens, H100), rel=1e-3)


@pytest.mark.parametrize(("known", "config"), [("llama-3-8b", LLAMA_8B), ("deepseek-v3", DEEPSEEK_V3)])
def test_a_configuration_leads_to_the_known_shape(known: str, config: dict[str, Any]) -> None:
    """Its weights are counted without input embedding and norms, so they are a little fewer."""
    found, expected = from_config("x", config), SHAPES[known]
    assert (found.kv_token_bytes, found.attention_width) == (expected.kv_token_bytes, expected.attention_width)
    assert found.active_weights == pytest.approx(expected.active_weights, rel=0.08)
    assert found.replicated == expected.replicated


def test_element_bytes_nested_text_and_windows_are_read() -> None:
    found = from_config("x", {"text_config": {**LLAMA_8B, "torch_dtype": "float32", "sliding_window": 4096}})
    assert found.kv_token_bytes == 2 * 131_072
    assert "sliding window" in found.note


@pytest.mark.parametrize("wrong", [{}, {**LLAMA_8B, "num_hidden_layers": "32"}, {**LLAMA_8B, "head_dim": -1}])
def test_a_configuration_that_describes_no_model_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match="must be a whole number"):
        from_config("x", wrong)


def test_attention_makes_a_prompt_of_twice_the_length_more_than_twice_as_dear() -> None:
    shape = SHAPES["llama-3-8b"]
    assert shape.prefill_flops(2000) > 2 * shape.prefill_flops(1000)
    assert shape.prefill_flops(0) == 0
