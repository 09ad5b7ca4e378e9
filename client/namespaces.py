"""A namespace as an engine holds it: what to open, not what was opened.

The handle outlives daemons: each attachment opens the namespace again the first time an operation needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forebay.kvstore.errors import BadRequest
from forebay.kvstore.hashing import PrefixHasher
from forebay.kvstore.namespace import NamespaceSpec
from forebay.transports.messages import FindNamespaceReply, FindNamespaceRequest, OpenNamespaceRequest


@dataclass(frozen=True, slots=True)
class Namespace:
    """A handle for client calls; may be shared by threads and kept over forks and daemon restarts.

    Attributes:
        spec: what a block's bytes are; None for one that was found by its fingerprint.
        key: names the handle among those of a client.
    """

    opener: OpenNamespaceRequest | FindNamespaceRequest
    spec: NamespaceSpec | None
    key: bytes
    group_fingerprint: bytes
    block_bytes: int
    block_tokens: int
    hash_bytes: int

    @classmethod
    def of(cls, spec: NamespaceSpec) -> Namespace:
        """Raises BadRequest when the spec is out of bounds."""
        spec.validate()
        return cls(
            OpenNamespaceRequest(spec),
            spec,
            spec.fingerprint(),
            spec.group_fingerprint(),
            spec.block_bytes,
            spec.block_tokens,
            spec.hash_bytes,
        )

    @classmethod
    def found(cls, request: FindNamespaceRequest, reply: FindNamespaceReply) -> Namespace:
        key = b"found" + request.rank.to_bytes(4, "little") + reply.group_fingerprint
        opener = FindNamespaceRequest(reply.group_fingerprint, request.rank)
        return cls(
            opener,
            None,
            key,
            reply.group_fingerprint,
            reply.block_bytes,
            reply.block_tokens,
            reply.hash_bytes,
        )

    @property
    def hasher(self) -> PrefixHasher:
        """A new hasher of the blocks' names. Raises BadRequest when the engine brings its own hashes."""
        if self.spec is None:
            raise BadRequest("a namespace found by its fingerprint cannot hash: its spec is not known")
        return PrefixHasher(self.spec)

    def blob(self, hashes: Sequence[bytes]) -> bytes:
        """The hashes joined, for a question: only their total length is checked, for a wrong one just misses.

        Raises BadRequest.
        """
        joined = b"".join(hashes)
        if len(joined) != len(hashes) * self.hash_bytes:
            raise BadRequest(f"every hash of this namespace is {self.hash_bytes} bytes")
        return joined

    def check_hashes(self, hashes: Sequence[bytes]) -> None:
        """Raise BadRequest unless every hash is as wide as this namespace's."""
        if list(map(len, hashes)).count(self.hash_bytes) != len(hashes):
            raise BadRequest(f"every hash of this namespace is {self.hash_bytes} bytes")
