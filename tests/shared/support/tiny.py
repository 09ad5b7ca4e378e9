"""A tiny random Llama, made in milliseconds: the engine of tests that must run anywhere.

Its greedy tokens depend strongly on every key and value (a trained model shrugs off much damage), so equal tokens
mean equal KV. Needs torch and transformers, imported when used: the tests that have neither skip.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 512
GREEDY = {"do_sample": False, "max_new_tokens": 20}


def tiny_model(seed: int = 0, dtype: str = "float32", **changes: Any) -> Any:
    """Four layers, 4 query and 2 KV heads of 32; `changes` are fields of the config.

    torch gets one thread: sharing so little work out costs more than it saves, and where another process wants a core
    too, OpenMP's threads that wait for each other made tests take fifteen times as long.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.08,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **changes,
    }
    return LlamaForCausalLM(LlamaConfig(**fields)).to(getattr(torch, dtype)).eval()


def prompt_of(tokens: int, seed: int = 1) -> Any:
    """Random token ids, int64 (1, tokens); the same for the same seed."""
    import torch

    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


def plain(model: Any, ids: Any, **options: Any) -> list[int]:
    """What `model` answers greedily without forebay: prompt and answer."""
    output: list[int] = model.generate(ids, **{**GREEDY, **options})[0].tolist()
    return output
