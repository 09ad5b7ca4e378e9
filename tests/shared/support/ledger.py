"""What a test knows from outside about the blocks it stored: their bytes, and which of them were reported durable.

It lives in the test's process, so it outlives every daemon the test kills. Blocks' bytes are made from the seed and
the hash again whenever they are needed, so that any fetched block can be checked and none has to be kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def block_bytes(seed: int, block_hash: bytes, size_bytes: int) -> bytes:
    """The only right contents of a block; another seed, hash or size has others."""
    return hashlib.shake_128(seed.to_bytes(8, "little") + size_bytes.to_bytes(8, "little") + block_hash).digest(
        size_bytes
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Blocks of one fetch or of several: served, of these wrong, and not served though reported durable."""

    served: int = 0
    wrong: int = 0
    missing: int = 0

    def __add__(self, other: Verdict) -> Verdict:
        return Verdict(self.served + other.served, self.wrong + other.wrong, self.missing + other.missing)


class Ledger:
    """Which hashes are durable, as far as anybody was told."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.total = Verdict()
        """Of all calls of `compare` together."""
        self._durable: set[bytes] = set()

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._durable

    def __len__(self) -> int:
        return len(self._durable)

    def durable(self, hashes: Iterable[bytes]) -> None:
        """These were reported durable."""
        self._durable.update(hashes)

    def gone(self, hashes: Iterable[bytes]) -> None:
        """These may be missing from now on: evicted, deleted, or written anew and not yet reported."""
        self._durable.difference_update(hashes)

    def fill(self, hashes: Sequence[bytes], memory: memoryview) -> None:
        """Put the blocks' bytes into `memory`, one after the other; its length divides evenly among them."""
        size_bytes = len(memory) // len(hashes)
        for position, block_hash in enumerate(hashes):
            start = position * size_bytes
            memory[start : start + size_bytes] = block_bytes(self.seed, block_hash, size_bytes)

    def compare(self, hashes: Sequence[bytes], fetched: Sequence[memoryview | bytes | None]) -> Verdict:
        """Judge a fetch: per hash the bytes it was served with, or None for a miss. A durable miss counts each time."""
        served = wrong = missing = 0
        for block_hash, memory in zip(hashes, fetched, strict=True):
            if memory is None:
                missing += block_hash in self._durable
            else:
                served += 1
                wrong += memory != block_bytes(self.seed, block_hash, len(memory))
        verdict = Verdict(served, wrong, missing)
        self.total += verdict
        return verdict
