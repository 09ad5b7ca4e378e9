"""A namespace: one exact KV geometry of one tenant, named by a canonical fingerprint.

Two engines share blocks exactly when their fingerprints agree, so every field that changes the bytes of a
block, or what a prefix hash means, goes into it. The bytes hashed are written out field by field (name,
type, length, value) and carry a version: a language's own ``hash()`` or a serializer's field order may
change between processes and releases, and then every hit is silently lost or, worse, wrong.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import Any

from forebay.kvstore.errors import BadRequest

BLOCK_TOKENS_MAX = 1 << 16
SEGMENTS_MAX = 1 << 14
SEGMENT_BYTES_MAX = 1 << 32
SHARDS_MAX = 1 << 10
TEXT_CHARS_MAX = 1024
SALT_BYTES_MAX = 64

_CANONICAL_PREFIX = b"forebay-namespace-1\0"


@dataclass(frozen=True, slots=True)
class NamespaceSpec:
    """What a block's bytes are.

    Attributes:
        model: the model's name as the operator knows it.
        revision: weights revision or fingerprint; two revisions never share a block.
        dtype: element type of the KV cache, e.g. ``bfloat16``.
        block_tokens: tokens in a block.
        segment_bytes: bytes of each segment, in the order in which they lie in a slot.
        layout: how elements are ordered inside a segment (``NHD``, ``HND``, a backend's own name).
        shard_rank: this rank's index among the shards of a block.
        shard_size: how many shards make a block complete.
        shard_kind: ``sharded`` (each rank holds a part) or ``replicated`` (each rank holds the same bytes,
            as with MLA: rank and size then do not enter the fingerprint and all ranks share one copy).
        kv_group: which KV cache group of a hybrid model, or which pipeline stage.
        lora: adapter identity, empty for none.
        tenant_salt: secret that keeps tenants apart, at most 64 bytes; also keys the prefix hashes.
        hash_scheme: how prefix hashes are made; ``forebay-1`` or an engine's own name.
        hash_bytes: width of a prefix hash, 16 to 32.
    """

    model: str
    revision: str
    dtype: str
    block_tokens: int
    segment_bytes: tuple[int, ...]
    layout: str = ""
    shard_rank: int = 0
    shard_size: int = 1
    shard_kind: str = "sharded"
    kv_group: str = ""
    lora: str = ""
    tenant_salt: bytes = b""
    hash_scheme: str = "forebay-1"
    hash_bytes: int = 32

    @property
    def block_bytes(self) -> int:
        """Payload bytes of one block of one shard."""
        return sum(self.segment_bytes)

    def validate(self) -> None:
        """Raise BadRequest naming the first field that is out of bounds."""
        _check_text(self)
        _check_int("block_tokens", self.block_tokens, 1, BLOCK_TOKENS_MAX)
        _check_int("shard_size", self.shard_size, 1, SHARDS_MAX)
        _check_int("shard_rank", self.shard_rank, 0, self.shard_size - 1)
        _check_int("hash_bytes", self.hash_bytes, 16, 32)
        if self.shard_kind not in ("sharded", "replicated"):
            raise BadRequest(f"shard_kind is 'sharded' or 'replicated', not {self.shard_kind!r}")
        if not isinstance(self.tenant_salt, bytes) or len(self.tenant_salt) > SALT_BYTES_MAX:
            raise BadRequest(f"tenant_salt must be at most {SALT_BYTES_MAX} bytes")
        if not isinstance(self.segment_bytes, tuple) or not 1 <= len(self.segment_bytes) <= SEGMENTS_MAX:
            raise BadRequest(f"segment_bytes must hold 1 to {SEGMENTS_MAX} sizes")
        for size in self.segment_bytes:
            _check_int("segment_bytes", size, 1, SEGMENT_BYTES_MAX)

    def canonical(self) -> bytes:
        """The bytes whose SHA-256 is the fingerprint: prefix, then name, type, length and value of each field."""
        spec = self.merged()
        return _CANONICAL_PREFIX + b"".join(_field_bytes(f.name, getattr(spec, f.name)) for f in fields(spec))

    def fingerprint(self) -> bytes:
        """32 bytes naming this shard's memory: equal in every process and Python version."""
        return hashlib.sha256(self.canonical()).digest()

    def group_fingerprint(self) -> bytes:
        """32 bytes naming the whole block: the same for all ranks of one group."""
        return replace(self, shard_rank=0).fingerprint()

    def merged(self) -> NamespaceSpec:
        """The spec that holds the memory: replicated ranks fall together into one shard."""
        if self.shard_kind == "replicated":
            return replace(self, shard_rank=0, shard_size=1)
        return self

    def to_fields(self) -> list[Any]:
        """Positional fields for the wire, in declaration order."""
        return [list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)]

    @classmethod
    def from_fields(cls, values: object) -> NamespaceSpec:
        """The inverse of `to_fields`, for untrusted input; raises BadRequest."""
        if not isinstance(values, (list, tuple)) or len(values) != len(fields(cls)):
            raise BadRequest(f"a namespace spec has {len(fields(cls))} fields")
        positional: list[Any] = [tuple(v) if isinstance(v, list) else v for v in values]
        spec = cls(*positional)
        spec.validate()
        return spec


def _check_text(spec: NamespaceSpec) -> None:
    for name in ("model", "revision", "dtype", "layout", "shard_kind", "kv_group", "lora", "hash_scheme"):
        value = getattr(spec, name)
        if not isinstance(value, str) or len(value) > TEXT_CHARS_MAX:
            raise BadRequest(f"{name} must be text of at most {TEXT_CHARS_MAX} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise BadRequest(f"{name} is not valid Unicode text") from None
    for name in ("model", "dtype", "hash_scheme"):
        if not getattr(spec, name):
            raise BadRequest(f"{name} must not be empty")


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int:  # its repr may be endless, so its type must do; a bool is no count either
        raise BadRequest(f"{name} must be an integer from {low} to {high}, not {type(value).__name__}")
    if not low <= value <= high:
        raise BadRequest(f"{name} must be an integer from {low} to {high}")


def _field_bytes(name: str, value: str | bytes | int | tuple[int, ...]) -> bytes:
    if isinstance(value, str):
        kind, body = b"s", value.encode()
    elif isinstance(value, bytes):
        kind, body = b"b", value
    elif isinstance(value, int):
        kind, body = b"i", value.to_bytes(8, "little")
    else:
        kind, body = b"t", b"".join(item.to_bytes(8, "little") for item in value)
    return len(name).to_bytes(1, "little") + name.encode() + kind + len(body).to_bytes(8, "little") + body
