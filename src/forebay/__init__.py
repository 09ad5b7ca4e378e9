"""forebay: a KV-cache store for LLM inference, one daemon per GPU node."""

__version__ = "0.1.0"
