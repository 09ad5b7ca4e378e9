"""The kernels in numpy, on host memory: what each of them must do, slowly.

Same names, arguments and contract as `forebay.kernels.cuda.CudaKernels`; a stream is no stream here, a call has ended
when it returns.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.kernels.layout import Layout, Table, summed_stripes, sums_of

_MASK = (1 << 64) - 1
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_LANES = 8
_STRIPES_PER_SUM = 16

_PRIME32_1, _PRIME32_2, _PRIME32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_PRIME64_1, _PRIME64_2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_PRIME64_3, _PRIME64_4, _PRIME64_5 = 0x165667B19E3779F9, 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_AVALANCHE = 0x165667919E3779F9
_INITIAL = (_PRIME32_3, _PRIME64_1, _PRIME64_2, _PRIME64_3, _PRIME64_4, _PRIME32_2, _PRIME64_5, _PRIME32_1)
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


class ReferenceKernels:
    """See `CudaKernels` for what the arguments mean."""

    def gather(
        self,
        table: Table,
        block_ids: int,
        slots: int,
        blocks: int,
        *,
        width: int,
        sums: int = 0,
        stream: int = 0,
        multiprocessors: int = 0,
    ) -> None:
        for block, slot in zip(_numbers(block_ids, blocks), _numbers(slots, blocks), strict=True):
            for paged, offset, size in _segments(table.layout, block):
                ctypes.memmove(slot + offset, paged, size)
        if sums:
            self.read(table, block_ids, blocks, width=width, sums=sums)

    def scatter(
        self,
        table: Table,
        block_ids: int,
        slots: int,
        blocks: int,
        *,
        width: int,
        sums: int = 0,
        stream: int = 0,
        multiprocessors: int = 0,
    ) -> None:
        for block, slot in zip(_numbers(block_ids, blocks), _numbers(slots, blocks), strict=True):
            for paged, offset, size in _segments(table.layout, block):
                ctypes.memmove(paged, slot + offset, size)
        if sums:
            self.read(table, block_ids, blocks, width=width, sums=sums)

    def read(
        self,
        table: Table,
        block_ids: int,
        blocks: int,
        *,
        width: int,
        sums: int,
        stream: int = 0,
        multiprocessors: int = 0,
    ) -> None:
        rows = sums_of(table.layout.block_bytes)
        out = _array(sums, blocks * rows * _LANES).reshape(blocks, rows, _LANES)
        for row, block in zip(out, _numbers(block_ids, blocks), strict=True):
            row[:] = block_sums(_payload(table.layout, block))

    def finish(self, table: Table, block_ids: int, blocks: int, *, sums: int, checksums: int, stream: int = 0) -> None:
        rows = sums_of(table.layout.block_bytes)
        given = _array(sums, blocks * rows * _LANES).reshape(blocks, rows, _LANES)
        out = _array(checksums, blocks)
        for position, block in enumerate(_numbers(block_ids, blocks)):
            out[position] = finished(given[position], _payload(table.layout, block)) or 1


def block_sums(payload: bytes) -> NDArray[np.uint64]:
    """What XXH3 adds between two scrambles: uint64 (sums_of, 8)."""
    rows, stripes = sums_of(len(payload)), summed_stripes(len(payload))
    words: NDArray[np.uint64] = np.frombuffer(payload, "<u8", stripes * _LANES).reshape(stripes, _LANES)
    keys = np.array([[_word(8 * (s + lane)) for lane in range(_LANES)] for s in range(_STRIPES_PER_SUM)], np.uint64)
    mixed = words ^ keys[np.arange(stripes) % _STRIPES_PER_SUM]
    added = (mixed & _LOW) * (mixed >> _HALF) + words[:, [1, 0, 3, 2, 5, 4, 7, 6]]
    padded = np.zeros((rows * _STRIPES_PER_SUM, _LANES), np.uint64)
    padded[:stripes] = added
    sums: NDArray[np.uint64] = padded.reshape(rows, _STRIPES_PER_SUM, _LANES).sum(axis=1, dtype=np.uint64)
    return sums


def finished(sums: NDArray[np.uint64], payload: bytes) -> int:
    """XXH3-64 of a block of more than 240 bytes, from its sums."""
    accumulators = list(_INITIAL)
    for row, values in enumerate(sums.tolist()):
        accumulators = [(acc + value) & _MASK for acc, value in zip(accumulators, values, strict=True)]
        if row + 1 < len(sums):
            accumulators = [_scrambled(acc, _word(128 + 8 * lane)) for lane, acc in enumerate(accumulators)]
    last = np.frombuffer(payload[-64:], "<u8").tolist()
    for lane, word in enumerate(last):
        mixed = word ^ _word(121 + 8 * lane)
        accumulators[lane] += (mixed & 0xFFFFFFFF) * (mixed >> 32) + last[lane ^ 1]
    keyed = [(acc & _MASK) ^ _word(11 + 8 * lane) for lane, acc in enumerate(accumulators)]
    products = [even * odd for even, odd in zip(keyed[::2], keyed[1::2], strict=True)]
    merged = len(payload) * _PRIME64_1 + sum((product & _MASK) ^ (product >> 64) for product in products)
    merged &= _MASK
    merged = ((merged ^ (merged >> 37)) * _AVALANCHE) & _MASK
    return merged ^ (merged >> 32)


def _scrambled(accumulator: int, key: int) -> int:
    return (((accumulator ^ (accumulator >> 47)) ^ key) * _PRIME32_1) & _MASK


def _word(offset: int) -> int:
    return int.from_bytes(_SECRET[offset : offset + 8], "little")


def _payload(layout: Layout, block: int) -> bytes:
    return b"".join(ctypes.string_at(paged, size) for paged, _, size in _segments(layout, block))


def _segments(layout: Layout, block: int) -> list[tuple[int, int, int]]:
    """Address, offset in the slot and size of each segment of a block."""
    addresses = (layout.bases + block * layout.strides).tolist()
    return list(zip(addresses, layout.offsets[:-1].tolist(), layout.sizes.tolist(), strict=True))


def _array(address: int, count: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))


def _numbers(address: int, count: int) -> list[int]:
    numbers: list[int] = _array(address, count).tolist()
    return numbers
