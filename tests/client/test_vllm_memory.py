"""Both ways to move an engine's blocks, on CPU tensors: the same bytes arrive."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from forebay.client import vllm_memory
from forebay.client.copier import NumpyCopier
from forebay.client.results import FetchResult
from forebay.client.segments import SegmentTable
from forebay.client.vllm_memory import EngineMemory, HostMemory, StagedMemory

torch = pytest.importorskip("torch", reason="torch is not installed")

BLOCKS = 12


def memory_of(kind: str, pages: Sequence[Any], sizes: Sequence[int]) -> EngineMemory:
    if kind == "host":
        return HostMemory(SegmentTable.of(list(pages)), NumpyCopier())
    return StagedMemory(pages, sizes, torch)


@pytest.mark.parametrize("kind", ["host", "staged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_blocks_go_out_and_come_back(kind: str, dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V on an axis of their own, staging for three blocks at a time."""
    torch.manual_seed(0)
    pages = [torch.randint(0, 100, (2, BLOCKS, 4, 8)).to(dtype).movedim(1, 0) for _ in range(3)]
    sizes = [2 * 4 * 8 * dtype.itemsize] * 3
    monkeypatch.setattr(vllm_memory, "STAGING_BYTES", 3 * sum(sizes))
    memory = memory_of(kind, pages, sizes)
    source, target = [0, 3, 7, 2], [11, 4, 9, 6]
    slots = [np.zeros(sum(sizes), np.uint8) for _ in source]
    memory.gather(source, slots)
    assert any(slot.any() for slot in slots)

    def fetch(hashes: Sequence[bytes], table: SegmentTable, block_ids: Sequence[int]) -> FetchResult:
        ids = list(block_ids)
        for name, block in zip(hashes, ids):
            piece = slots[int.from_bytes(name, "little")]
            for row, offset, size in zip(table.rows, table.offsets.tolist(), table.sizes):
                row[block : block + 1].view(np.uint8)[:] = piece[offset : offset + size]
        return FetchResult(len(ids), len(ids) * table.block_bytes)

    result = memory.load(fetch, [i.to_bytes(4, "little") for i in range(4)], target)
    assert (result.blocks, result.bytes) == (4, 4 * sum(sizes))
    for page in pages:
        assert torch.equal(page[target], page[source])


def test_staged_load_stops_where_the_fetch_did(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [torch.zeros((BLOCKS, 16), dtype=torch.uint8)]
    monkeypatch.setattr(vllm_memory, "STAGING_BYTES", 2 * 16)
    memory = StagedMemory(pages, [16], torch)
    calls = []

    def fetch(hashes: Sequence[bytes], table: SegmentTable, block_ids: Sequence[int]) -> FetchResult:
        calls.append(len(hashes))
        table.owners[0][:] = 7  # type: ignore[index]
        return FetchResult(2, 32) if len(calls) == 1 else FetchResult(1, 16, "stale")

    result = memory.load(fetch, [b"a"] * 5, [1, 2, 3, 4, 5])
    assert (result.blocks, result.reason, calls) == (3, "stale", [2, 2])
    assert [int(i) for i in pages[0][:, 0].nonzero()] == [1, 2, 3]
