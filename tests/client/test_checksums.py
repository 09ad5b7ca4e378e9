"""Checksums are those of the bytes in slot order, wherever they lie, and never 0."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import xxhash

from forebay.client import checksums
from forebay.client.segments import SegmentTable

BLOCKS = 5


def memory() -> np.ndarray[Any, Any]:
    """K and V apart: (2, blocks, 300)."""
    return np.random.default_rng(0).integers(0, 255, (2, BLOCKS, 300), dtype=np.uint8)


def expected(paged: np.ndarray[Any, Any], ids: list[int]) -> list[int]:
    return [xxhash.xxh3_64_intdigest(paged[:, block].tobytes()) for block in ids]


@pytest.mark.parametrize("ids", [[0], [4, 0, 2], []])
def test_segments_are_summed_in_order(ids: list[int]) -> None:
    paged = memory()
    table = SegmentTable.of(paged, block_axis=1)
    assert checksums.of_paged(table, np.array(ids, np.int64)).tolist() == expected(paged, ids)


def test_a_block_of_one_segment_has_the_checksum_of_its_bytes() -> None:
    packed = np.ascontiguousarray(memory().transpose(1, 0, 2))
    table = SegmentTable.of(packed)
    assert len(table.sizes) == 1
    assert checksums.of_paged(table, np.arange(BLOCKS)).tolist() == expected(memory(), list(range(BLOCKS)))


def test_a_slot_has_the_checksum_of_its_payload_without_the_padding() -> None:
    slots = np.full((BLOCKS, 4096), 99, np.uint8)
    slots[:, :600] = memory().transpose(1, 0, 2).reshape(BLOCKS, 600)
    addresses = int(slots.__array_interface__["data"][0]) + 4096 * np.arange(BLOCKS, dtype=np.int64)
    assert checksums.of_slots(addresses, 600).tolist() == expected(memory(), list(range(BLOCKS)))


def test_zero_is_never_a_checksum() -> None:
    assert checksums._known([0, 5, (1 << 64) - 1], 3).tolist() == [1, 5, (1 << 64) - 1]


def test_the_hash_is_not_imported_before_it_is_used() -> None:
    code = "import sys, forebay.client; sys.exit('xxhash' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0
