"""What a token of a model costs: bytes of KV to hold, work to prefill."""

from __future__ import annotations

from dataclasses import dataclass

H100_FLOPS = 989e12
MFU = 0.5
"""Assumed share of a GPU's peak that prefill reaches (bf16); fp8 models reach less of a higher peak."""


@dataclass(frozen=True, slots=True)
class Shape:
    """`active` parameters a token passes; `attention` is 2 x layers x query heads x head size.

    FLOPs of a prompt of p tokens: 2 x active x p + attention x p^2 (causal).
    """

    name: str
    kv_bytes_per_token: int
    active: float
    attention: float

    def prefill_flops(self, tokens: int) -> float:
        return 2 * self.active * tokens + self.attention * tokens * tokens

    @property
    def gpu_flops_per_s(self) -> float:
        """What one GPU does of a prefill; an assumption, to be replaced by a measurement."""
        return H100_FLOPS * MFU

    @property
    def equal_cost_tokens(self) -> float:
        """Depth at which a token's attention costs as much as all the rest of it."""
        return self.active / self.attention


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("8b", 2 * 32 * 8 * 128 * 2, 8.03e9, 2 * 32 * 32 * 128),
        Shape("70b", 2 * 80 * 8 * 128 * 2, 70.6e9, 2 * 80 * 64 * 128),
        Shape("qwen3-32b", 2 * 64 * 8 * 128 * 2, 32.8e9, 2 * 64 * 64 * 128),
        Shape("v3", 61 * 576 * 2, 37e9, 61 * 128 * 320),
    )
}
