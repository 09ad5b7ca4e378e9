"""A tiny random Llama 4 on disk: layers that look at chunks of the prompt beside layers of full attention."""

from __future__ import annotations

from pathlib import Path

VOCABULARY = 512
CHUNK = 96


def save_tiny(folder: Path, *, seed: int = 0) -> Path:
    """Write the model's files, without a tokenizer. Every second layer has full attention; no layer has experts."""
    import torch
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch.manual_seed(seed)
    config = Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=256,
        intermediate_size_mlp=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_layers=[],
        interleave_moe_layer_step=0,
        num_local_experts=1,
        attention_chunk_size=CHUNK,
        no_rope_layers=[1, 0, 1, 0],
        initializer_range=0.08,
        max_position_embeddings=16384,
        bos_token_id=None,
        eos_token_id=VOCABULARY - 1,
        pad_token_id=0,
    )
    Llama4ForCausalLM(config).save_pretrained(folder)
    return folder
