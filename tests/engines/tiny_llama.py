"""A tiny random Llama on disk, whose greedy tokens depend strongly on every key and value."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512


def save_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Write the model's files, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.08,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=VOCABULARY - 1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
