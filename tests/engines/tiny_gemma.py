"""A tiny random Gemma 3 on disk: layers with a sliding window beside layers of full attention."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
WINDOW = 96


def save_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Write the model's files, without a tokenizer. One layer in three has full attention."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        initializer_range=0.08,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=0,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    return folder
