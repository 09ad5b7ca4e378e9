"""Prefix hashes: golden, chained, keyed by namespace and salt."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.hashing import PrefixHasher
from forebay.kvstore.namespace import NamespaceSpec

SPEC = NamespaceSpec("llama", "r1", "bfloat16", 4, (2048, 2048))
SALTED = replace(SPEC, tenant_salt=b"pepper")
TOKENS = [0, 1, 2, 3, 100, 2**31, 2**32 - 1, 7, 8, 9]

GOLDEN = {
    SPEC: [
        "9faa0519763351329d436764a38bfcbc851fb698edb5d5d8ce55ef6360e57226",
        "7d0dc77fddccb9f6c78404ef60f43f9689093fc50ba854648bd7e8c39fd89581",
    ],
    SALTED: [
        "ffab24b5e3b6d083cc8d95ac3131afd67b4776fab4ac4dc2911c68b6f6da9b80",
        "faf90192748831464c60cf98b5abf3b306d61cb9ed466116a6f4687d4bb54635",
    ],
}


def hashes_by_hand(spec: NamespaceSpec, tokens: list[int], parent: bytes = bytes(32)) -> list[bytes]:
    """The definition of the module's first lines, written again."""
    secret = b"forebay-prefix-key-1\x00" + spec.group_fingerprint() + spec.tenant_salt
    key = hashlib.sha256(secret).digest() + bytes(32)
    names = []
    for start in range(0, len(tokens) // spec.block_tokens * spec.block_tokens, spec.block_tokens):
        block = struct.pack(f"<{spec.block_tokens}I", *tokens[start : start + spec.block_tokens])
        parent = hashlib.sha256(key + parent + block).digest()
        names.append(parent)
    return names


@pytest.mark.parametrize("spec", [SPEC, SALTED], ids=("plain", "salted"))
def test_hashes_are_the_golden_ones(spec: NamespaceSpec) -> None:
    """Two engines of two releases must find each other's blocks."""
    got = PrefixHasher(spec).hashes(TOKENS)
    assert got == hashes_by_hand(spec, TOKENS)
    assert [name.hex() for name in got] == GOLDEN[spec]


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=40), st.integers(0, 10))
def test_continuing_from_a_parent_gives_the_hashes_of_the_whole(tokens: list[int], blocks: int) -> None:
    """A block's name is a function of all tokens up to its end, however they are presented."""
    hasher = PrefixHasher(SPEC)
    whole = hasher.hashes(tokens)
    assert whole == hashes_by_hand(SPEC, tokens)
    assert len(whole) == len(tokens) // 4
    cut = min(blocks, len(whole))
    parent = whole[cut - 1] if cut else b""
    assert whole[:cut] + hasher.hashes(tokens[4 * cut :], parent) == whole


def test_changed_token_changes_its_block_and_all_after_it() -> None:
    hasher = PrefixHasher(SPEC)
    one, two = hasher.hashes(range(16)), hasher.hashes([*range(5), 99, *range(6, 16)])
    assert one[0] == two[0]
    assert not set(one[1:]) & set(two[1:])


@pytest.mark.parametrize(
    "other",
    [{"tenant_salt": b"x"}, {"model": "other"}, {"revision": "r2"}, {"lora": "a"}, {"dtype": "float16"}],
    ids=lambda change: next(iter(change)),
)
def test_other_namespace_has_other_hashes(other: dict[str, Any]) -> None:
    assert not set(PrefixHasher(SPEC).hashes(TOKENS)) & set(PrefixHasher(replace(SPEC, **other)).hashes(TOKENS))


def test_fingerprint_alone_does_not_give_the_key() -> None:
    """Fingerprints are shown in the status; whoever reads one must still not be able to confirm a guessed prompt."""
    guess = hashlib.sha256(b"forebay-prefix-key-1\x00" + SALTED.group_fingerprint()).digest() + bytes(32)
    block = struct.pack("<4I", *TOKENS[:4])
    assert hashlib.sha256(guess + bytes(32) + block).digest() != PrefixHasher(SALTED).hashes(TOKENS)[0]


def test_every_rank_makes_the_same_hashes() -> None:
    """The scheduler hashes once, for all of its workers."""
    ranks = [replace(SPEC, shard_rank=rank, shard_size=2) for rank in range(2)]
    assert PrefixHasher(ranks[0]).hashes(TOKENS) == PrefixHasher(ranks[1]).hashes(TOKENS)


def test_partial_block_has_no_name() -> None:
    hasher = PrefixHasher(SPEC)
    assert hasher.hashes([]) == hasher.hashes([1, 2, 3]) == []
    assert hasher.hashes(range(7)) == hasher.hashes(range(4))


def test_tokens_may_come_from_any_iterable() -> None:
    def stream() -> Iterator[int]:
        yield from TOKENS

    assert PrefixHasher(SPEC).hashes(stream()) == PrefixHasher(SPEC).hashes(tuple(TOKENS))


@pytest.mark.parametrize("bad", [[-1] * 4, [2**32] * 4, [1.5] * 4, ["1"] * 4, [None] * 4, "abcd", None, 5])
def test_what_is_no_token_is_refused(bad: Any) -> None:
    with pytest.raises(BadRequest):
        PrefixHasher(SPEC).hashes(bad)


@pytest.mark.parametrize("width", [1, 16, 31, 33])
def test_parent_of_another_width_is_refused(width: int) -> None:
    with pytest.raises(BadRequest):
        PrefixHasher(SPEC).hashes(TOKENS, bytes(width))


@pytest.mark.parametrize("other", [{"hash_scheme": "vllm"}, {"hash_bytes": 16}])
def test_scheme_of_an_engine_is_not_made_here(other: dict[str, Any]) -> None:
    with pytest.raises(BadRequest):
        PrefixHasher(replace(SPEC, **other))
