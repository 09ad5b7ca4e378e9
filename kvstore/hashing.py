"""Prefix hashes: a 32-byte name for a block of tokens and everything before it.

``hash[i] = SHA-256(key-block || parent || tokens as little-endian u32)`` where ``parent`` is ``hash[i - 1]``
(32 zero bytes for the first block) and the key block, padded to SHA-256's 64-byte block so that its state is
computed once and copied, is derived from the namespace's fingerprint and salt. Keyed, because an unkeyed or
fixed-seeded hash lets anyone who sees names confirm a guessed prompt. SHA-256, because with SHA extensions it
costs 0.4 us for a 16-token block, less than keyed BLAKE3 or BLAKE2b there; a 64-bit or non-cryptographic hash
was rejected: a collision is another prompt's answer.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Iterable

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.namespace import NamespaceSpec

HASH_BYTES = 32
SCHEME = "forebay-1"

_KEY_PREFIX = b"forebay-prefix-key-1\0"
_ROOT = bytes(HASH_BYTES)


class PrefixHasher:
    """Hashes the blocks of one namespace group; every rank of a group makes the same hashes."""

    def __init__(self, spec: NamespaceSpec) -> None:
        if spec.hash_scheme != SCHEME or spec.hash_bytes != HASH_BYTES:
            raise BadRequest(f"hashes of scheme {spec.hash_scheme!r} are brought by the engine")
        self._block_tokens = spec.block_tokens
        # The salt itself goes in, not only through the fingerprint, which anyone may read in the status.
        key = hashlib.sha256(_KEY_PREFIX + spec.group_fingerprint() + spec.tenant_salt).digest()
        self._keyed = hashlib.sha256(key.ljust(64, b"\0"))

    def hashes(self, tokens: Iterable[int], parent: bytes = b"") -> list[bytes]:
        """Names of the whole blocks of `tokens`, in order; a trailing partial block has no name.

        Args:
            tokens: token ids, each 0 to 2**32 - 1.
            parent: hash of the block before `tokens`, empty at the start of a sequence.
        Raises:
            BadRequest: a token out of range, or a parent of another width.
        """
        chain = parent or _ROOT
        if len(chain) != HASH_BYTES:
            raise BadRequest(f"a parent hash is {HASH_BYTES} bytes, not {len(chain)}")
        data = _token_bytes(tokens)
        step = 4 * self._block_tokens
        names = []
        for start in range(0, len(data) - step + 1, step):
            state = self._keyed.copy()
            state.update(chain)
            state.update(data[start : start + step])
            chain = state.digest()
            names.append(chain)
        return names


def _token_bytes(tokens: Iterable[int]) -> memoryview:
    if isinstance(tokens, (bytes, bytearray, memoryview, str)):
        raise BadRequest(f"tokens are a sequence of integers, not {type(tokens).__name__}")
    try:
        ids = array("I", tokens)
    except (OverflowError, TypeError, ValueError) as error:
        raise BadRequest(f"token ids are integers from 0 to 2**32 - 1: {error}") from error
    if sys.byteorder == "big":
        ids.byteswap()
    return memoryview(ids).cast("B")
