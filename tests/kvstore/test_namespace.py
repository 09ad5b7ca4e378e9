"""Fingerprints are stable for ever, differ for everything that changes a block's bytes, and refuse garbage."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.namespace import NamespaceSpec

PLAIN = NamespaceSpec("llama", "r1", "bfloat16", 16, (2048, 2048))
FULL = NamespaceSpec(
    "Qwen/Qwen3-32B", "sha256:abcd", "float8_e4m3", 64, (1, 2, 1 << 32), "HND", 3, 8, "sharded",
    "swa", "adapter-\u00e9", b"\x00salt\xff", "vllm-sha256", 16,
)  # fmt: skip
REPLICATED = replace(FULL, shard_kind="replicated")

PLAIN_CANONICAL = (
    "666f72656261792d6e616d6573706163652d3100"
    "056d6f64656c7305000000000000006c6c616d61"
    "087265766973696f6e7302000000000000007231"
    "05647479706573080000000000000062666c6f61743136"
    "0c626c6f636b5f746f6b656e736908000000000000001000000000000000"
    "0d7365676d656e745f627974657374100000000000000000080000000000000008000000000000"
    "066c61796f7574730000000000000000"
    "0a73686172645f72616e6b6908000000000000000000000000000000"
    "0a73686172645f73697a656908000000000000000100000000000000"
    "0a73686172645f6b696e6473070000000000000073686172646564"
    "086b765f67726f7570730000000000000000"
    "046c6f7261730000000000000000"
    "0b74656e616e745f73616c74620000000000000000"
    "0b686173685f736368656d65730900000000000000666f72656261792d31"
    "0a686173685f62797465736908000000000000002000000000000000"
)  # fmt: skip

GOLDEN = [
    (
        PLAIN,
        "939c9c7dc880c5e3344c6f69502b11f203af397fc8d0d9e26c029d065f3e1242",
        "939c9c7dc880c5e3344c6f69502b11f203af397fc8d0d9e26c029d065f3e1242",
    ),
    (
        FULL,
        "a318f89f14d86b7a4e8d3a540f966c9d0c44dbc86a0232ae258fec6a3014caab",
        "7e80029bd1967007b9f1ab01842cfd9c7505a037cb2270daa12fd9d02d656412",
    ),
    (
        REPLICATED,
        "f3ad48336ffad50efdb9920cecdb0ca52df55d8bf6710b8c8c4b835a69e719a2",
        "f3ad48336ffad50efdb9920cecdb0ca52df55d8bf6710b8c8c4b835a69e719a2",
    ),
]

OTHER: dict[str, Any] = {
    "model": "llama2",
    "revision": "r2",
    "dtype": "float16",
    "block_tokens": 32,
    "segment_bytes": (4096,),
    "layout": "NHD",
    "shard_rank": 1,
    "shard_size": 4,
    "shard_kind": "replicated",
    "kv_group": "full",
    "lora": "a",
    "tenant_salt": b"s",
    "hash_scheme": "mine",
    "hash_bytes": 31,
}


def canonical_by_hand(spec: NamespaceSpec) -> bytes:
    """The same bytes, written again from the words of the description."""
    out = b"forebay-namespace-1\x00"
    for item in fields(spec):
        value = getattr(spec, item.name)
        if spec.shard_kind == "replicated":
            value = {"shard_rank": 0, "shard_size": 1}.get(item.name, value)
        tag, body = {
            str: lambda v: (b"s", v.encode("utf-8")),
            bytes: lambda v: (b"b", v),
            int: lambda v: (b"i", struct.pack("<Q", v)),
            tuple: lambda v: (b"t", struct.pack(f"<{len(v)}Q", *v)),
        }[type(value)](value)
        name = item.name.encode("ascii")
        out += struct.pack("<B", len(name)) + name + tag + struct.pack("<Q", len(body)) + body
    return out


def test_canonical_bytes_are_the_golden_ones() -> None:
    """They never change within a version: another byte is a cache lost, or worse."""
    assert PLAIN.canonical().hex() == PLAIN_CANONICAL


@pytest.mark.parametrize(("spec", "fingerprint", "group"), GOLDEN, ids=("plain", "full", "replicated"))
def test_fingerprints_are_the_golden_ones(spec: NamespaceSpec, fingerprint: str, group: str) -> None:
    """Hard-coded, and made again by an implementation of the test's own."""
    assert spec.canonical() == canonical_by_hand(spec)
    assert spec.fingerprint().hex() == hashlib.sha256(canonical_by_hand(spec)).hexdigest() == fingerprint
    assert spec.group_fingerprint().hex() == group


def test_every_field_is_tried() -> None:
    assert set(OTHER) == {item.name for item in fields(NamespaceSpec)}


@pytest.mark.parametrize("name", OTHER)
def test_any_single_field_changes_the_fingerprint(name: str) -> None:
    """Two namespaces that differ anywhere never share a block; ranks share a group and no memory."""
    base = replace(PLAIN, shard_size=2)
    other = replace(base, **{name: OTHER[name]})
    assert other.fingerprint() != base.fingerprint()
    assert (other.group_fingerprint() == base.group_fingerprint()) == (name == "shard_rank")


def test_bytes_cannot_move_between_neighbouring_fields() -> None:
    """Lengths are part of what is hashed."""
    assert (
        replace(PLAIN, model="ab", revision="c").fingerprint() != replace(PLAIN, model="a", revision="bc").fingerprint()
    )


def test_replicated_ranks_have_one_fingerprint_whatever_their_number() -> None:
    """Every rank holds the same bytes, so they share one copy, across parallel degrees too."""
    ranks = [replace(REPLICATED, shard_rank=rank, shard_size=size) for size in (1, 2, 8) for rank in range(size)]
    assert len({spec.fingerprint() for spec in ranks}) == 1
    assert {spec.merged() for spec in ranks} == {replace(REPLICATED, shard_rank=0, shard_size=1)}


def test_replicated_and_unsharded_are_not_the_same() -> None:
    assert replace(PLAIN, shard_kind="replicated").fingerprint() != PLAIN.fingerprint()


def test_fingerprints_are_the_same_in_every_process() -> None:
    """Nothing of the interpreter's own hashing goes in."""
    code = (
        "from forebay.kvstore.namespace import NamespaceSpec as N\n"
        "print(N('llama', 'r1', 'bfloat16', 16, (2048, 2048)).fingerprint().hex())"
    )
    found = set()
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": "random"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found.add(done.stdout.strip())
    assert found == {PLAIN.fingerprint().hex()}


@pytest.mark.parametrize("spec", [PLAIN, FULL, REPLICATED])
def test_fields_of_the_wire_come_back_as_the_same_spec(spec: NamespaceSpec) -> None:
    assert NamespaceSpec.from_fields(spec.to_fields()) == spec


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", ""),
        ("model", "x" * 1025),
        ("model", b"bytes"),
        ("revision", "\ud800"),
        ("dtype", ""),
        ("hash_scheme", ""),
        ("block_tokens", 0),
        ("block_tokens", (1 << 16) + 1),
        ("block_tokens", True),
        ("block_tokens", 16.0),
        ("segment_bytes", ()),
        ("segment_bytes", (0,)),
        ("segment_bytes", ((1 << 32) + 1,)),
        ("segment_bytes", (1,) * ((1 << 14) + 1)),
        ("segment_bytes", 4096),
        ("shard_rank", 1),
        ("shard_rank", -1),
        ("shard_size", 0),
        ("shard_size", 1025),
        ("shard_kind", "mirrored"),
        ("tenant_salt", b"x" * 65),
        ("tenant_salt", "text"),
        ("hash_bytes", 15),
        ("hash_bytes", 33),
        pytest.param("block_tokens", 10**5000, id="endless"),
    ],
)
def test_field_out_of_bounds_is_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(BadRequest, match=name):
        replace(PLAIN, **{name: value}).validate()


def test_endlessly_nested_field_is_refused() -> None:
    """The message must not print what was sent."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    values = PLAIN.to_fields()
    values[3] = nested
    with pytest.raises(BadRequest, match="block_tokens"):
        NamespaceSpec.from_fields(values)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(anything | st.lists(anything, min_size=14, max_size=14))
def test_garbage_raises_only_bad_request(values: object) -> None:
    with pytest.raises(BadRequest):
        NamespaceSpec.from_fields(values)


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 13), anything)
def test_one_wrong_field_raises_only_bad_request(position: int, value: object) -> None:
    """A spec that is taken is a valid one, and comes back the same."""
    values = FULL.to_fields()
    values[position] = value
    try:
        spec = NamespaceSpec.from_fields(values)
    except BadRequest:
        return
    spec.validate()
    assert NamespaceSpec.from_fields(spec.to_fields()) == spec
