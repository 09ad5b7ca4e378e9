"""What a model costs: bytes of KV a token, operations a token, and where loading is faster than computing.

A token at depth p costs `2 P + 2 c p` operations: P weights that it passes (of experts, those it is routed to), and
attention over what stands before it, `c = layers x query heads x (key width + value width)` multiply-adds a position.
A prompt of p tokens costs `2 P p + c p^2`. Formulae and their limits: docs/physics.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from forebay.kvstore.errors import BadRequest

LAYERS_MAX = 4096
WIDTH_MAX = 1 << 24


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What of a model's architecture decides these costs.

    Attributes:
        kv_width: elements of KV a token and layer: key and value of all heads, or what is kept in their place (MLA).
        attention_width: query heads times (key width + value width): what a query costs at each position.
        active_weights: that one token passes.
        kv_element_bytes: of the KV cache's data type.
        replicated: every rank of a tensor parallel group holds all of a token's KV, as with MLA.
        note: what was assumed.
    """

    name: str
    layers: int
    kv_width: int
    attention_width: int
    active_weights: float
    kv_element_bytes: int = 2
    replicated: bool = False
    note: str = ""

    @property
    def kv_token_bytes(self) -> int:
        """KV of one token, over all ranks that hold different parts."""
        return self.layers * self.kv_width * self.kv_element_bytes

    @property
    def token_flops(self) -> float:
        """Of one token at the beginning of a prompt."""
        return 2 * self.active_weights

    @property
    def double_tokens(self) -> float:
        """The depth at which attention costs as much as all else: a token there costs twice the first."""
        return self.active_weights / (self.layers * self.attention_width)

    def prefill_flops(self, tokens: float, depth: float = 0.0) -> float:
        """Of computing so many tokens after so many that are there."""
        return self.token_flops * tokens * (1 + (depth + tokens / 2) / self.double_tokens)

    def prefill_s(self, tokens: float, flops_per_s: float, depth: float = 0.0) -> float:
        return self.prefill_flops(tokens, depth) / flops_per_s

    def break_even_gb_s(self, tokens: float, flops_per_s: float) -> float:
        """Into the engine: a link that is faster loads so long a prefix sooner than it is computed."""
        return self.kv_token_bytes * tokens / self.prefill_s(tokens, flops_per_s) / 1e9

    def break_even_tokens(self, gb_s: float, flops_per_s: float, latency_s: float = 0.0) -> int | None:
        """The shortest prefix that the link loads sooner than it is computed; None: none of a million tokens.

        Computing grows with the square of the length and loading does not, so there is at most one such point.
        """
        low, high = 1, 1 << 20
        if not self._pays(high, gb_s, flops_per_s, latency_s):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self._pays(middle, gb_s, flops_per_s, latency_s) else (middle + 1, high)
        return low

    def _pays(self, tokens: int, gb_s: float, flops_per_s: float, latency_s: float) -> bool:
        return latency_s + self.kv_token_bytes * tokens / (gb_s * 1e9) <= self.prefill_s(tokens, flops_per_s)


def grouped(name: str, layers: int, query_heads: int, kv_heads: int, head_width: int, weights: float) -> ModelShape:
    """A model whose query heads share keys and values."""
    return ModelShape(name, layers, 2 * kv_heads * head_width, 2 * query_heads * head_width, weights)


def latent(name: str, layers: int, heads: int, latent_width: int, head_width: int, weights: float) -> ModelShape:
    """A model that keeps one latent vector a token and layer (MLA), on every rank; `head_width` is key plus value."""
    return ModelShape(name, layers, latent_width, heads * head_width, weights, replicated=True)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        grouped("llama-3-8b", 32, 32, 8, 128, 8.03e9),
        grouped("llama-3-70b", 80, 64, 8, 128, 70.6e9),
        grouped("llama-3.1-405b", 126, 128, 8, 128, 405.9e9),
        grouped("mistral-7b", 32, 32, 8, 128, 7.25e9),
        grouped("mixtral-8x7b", 32, 32, 8, 128, 12.9e9),
        grouped("qwen2.5-7b", 28, 28, 4, 128, 7.62e9),
        grouped("qwen2.5-72b", 80, 64, 8, 128, 72.7e9),
        grouped("qwen3-8b", 36, 32, 8, 128, 8.19e9),
        grouped("qwen3-32b", 64, 64, 8, 128, 32.8e9),
        grouped("qwen3-30b-a3b", 48, 32, 4, 128, 3.35e9),
        grouped("qwen3-235b-a22b", 94, 64, 4, 128, 22.2e9),
        latent("deepseek-v2-lite", 27, 16, 576, 320, 2.66e9),
        latent("deepseek-v3", 61, 128, 576, 320, 37.0e9),
    )
}
"""Published shapes; the weights are those active for a token, in the models' own accounts."""

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "fp8": 1}


def from_config(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a model's `config.json` describes, in Hugging Face's names; raises BadRequest.

    The weights are counted from its widths: attention, feed-forward (of experts those a token is routed to, and the
    shared ones), output head.
    """
    inner = config.get("text_config")
    config = {**config, **inner} if isinstance(inner, Mapping) else config
    layers = _whole(config, "num_hidden_layers", LAYERS_MAX)
    hidden = _whole(config, "hidden_size")
    heads = _whole(config, "num_attention_heads")
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    element_bytes = _ELEMENT_BYTES.get(dtype, 2)
    if config.get("kv_lora_rank"):
        rope, nope = _whole(config, "qk_rope_head_dim"), _whole(config, "qk_nope_head_dim")
        value, rank = _whole(config, "v_head_dim"), _whole(config, "kv_lora_rank")
        shape = latent(name, layers, heads, rank + rope, rope + nope + value, 0.0)
        queries = _optional(config, "q_lora_rank")
        width = heads * (rope + nope)
        attention = hidden * queries + queries * width if queries else hidden * width
        attention += hidden * (rank + rope) + rank * heads * (nope + value) + heads * value * hidden
    else:
        kv_heads = _optional(config, "num_key_value_heads") or heads
        head_width = _optional(config, "head_dim") or hidden // heads
        shape = grouped(name, layers, heads, kv_heads, head_width, 0.0)
        attention = 2 * hidden * head_width * (heads + kv_heads)
    weights = layers * attention + _feed_forward(config, layers, hidden) + hidden * _optional(config, "vocab_size")
    note = "weights counted from the configuration's widths"
    if _optional(config, "sliding_window") and config.get("use_sliding_window", True):
        note += "; layers with a sliding window are counted as full, which is too much for long prompts"
    return replace(shape, active_weights=float(weights), kv_element_bytes=element_bytes, note=note)


def _feed_forward(config: Mapping[str, Any], layers: int, hidden: int) -> int:
    """Weights of all layers' feed-forward parts that a token passes."""
    dense = 3 * hidden * _optional(config, "intermediate_size")
    routed = _optional(config, "num_experts_per_tok")
    if not routed:
        return layers * dense
    width = _optional(config, "moe_intermediate_size") or _optional(config, "intermediate_size")
    experts = routed + _optional(config, "n_shared_experts")
    first = min(layers, _optional(config, "first_k_dense_replace"))
    return first * dense + (layers - first) * 3 * hidden * width * experts


def _whole(config: Mapping[str, Any], key: str, most: int = WIDTH_MAX) -> int:
    value = config.get(key)
    if type(value) is not int or not 1 <= value <= most:
        raise BadRequest(f"{key} must be a whole number from 1 to {most}")
    return value


def _optional(config: Mapping[str, Any], key: str) -> int:
    """0 where it is absent."""
    return _whole(config, key) if config.get(key) else 0
