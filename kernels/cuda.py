"""The kernels on a GPU: started on a stream, never waited for.

All addresses are the device's: device memory, or mapped host memory as the device sees it. Nothing here keeps memory
alive: tables, ids, slots, sums and both sides must stay until an event recorded after the call has passed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from forebay.kernels.layout import Table
from forebay.kernels.nvrtc import cached_kernels

_THREADS = {"gather": 256, "scatter": 512, "read": 512}  # of a CTA
_THREADS_PER_SM = 1024
_TILE_BYTES = {16: 4096, 4: 1024, 1: 1024}  # what a warp copies at a time, by width
_FINISH_THREADS = 32
_FINISH_BLOCKS = _FINISH_THREADS // 8

_u64, _u32 = ctypes.c_uint64, ctypes.c_uint32


class CudaKernels:
    """The kernels loaded into the current device's primary context. May be used by several threads at once.

    Attributes:
        multiprocessors: how many the device has.
    """

    def __init__(self, cache: Path) -> None:
        """Raises CompileError, ImportError without cupy, cupy's errors without a usable device."""
        import cupy

        device = cupy.cuda.Device()
        self._launch = cupy.cuda.driver.launchKernel
        self._module = cupy.cuda.function.Module()
        self._module.load(cached_kernels(device.compute_capability, cache))
        self._functions: dict[str, Any] = {}
        self.multiprocessors = int(device.attributes["MultiProcessorCount"])

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
        """Paged memory to slots.

        Args:
            block_ids: address of uint64 (blocks,); repeats are allowed.
            slots: address of uint64 (blocks,), the address of each block's slot.
            width: bytes of one access, of `WIDTHS`: divides the layout's alignment and every slot's address.
            sums: where the checksums' sums go, uint64 (blocks, sums_of(block_bytes), 8); 0: none are made.
            stream: handle of a CUDA stream.
            multiprocessors: how many to use at most, one CTA each; 0: all, and all of each.
        """
        self._copy("gather", table, block_ids, slots, blocks, width, sums, stream, multiprocessors)

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
        """Slots to paged memory; as `gather`, but no block id may come twice."""
        self._copy("scatter", table, block_ids, slots, blocks, width, sums, stream, multiprocessors)

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
        """The sums of blocks as they lie in the paged memory, without copying them."""
        self._copy("read", table, block_ids, 0, blocks, width, sums, stream, multiprocessors)

    def finish(self, table: Table, block_ids: int, blocks: int, *, sums: int, checksums: int, stream: int = 0) -> None:
        """Checksums, uint64 (blocks,), from sums: XXH3-64 of each block, 1 where that is 0.

        The last 64 bytes of each block are read from the paged memory, which must hold it by then. Blocks have at
        least `CHECKSUM_BLOCK_BYTES_MIN` bytes.
        """
        if not blocks:
            return
        grid = -(-blocks // _FINISH_BLOCKS)
        arguments = (*_layout(table), _u64(block_ids), _u32(blocks), _u64(sums), _u64(checksums))
        self._start("finish_xxh3", grid, _FINISH_THREADS, arguments, stream)

    def _copy(
        self,
        name: str,
        table: Table,
        block_ids: int,
        slots: int,
        blocks: int,
        width: int,
        sums: int,
        stream: int,
        multiprocessors: int,
    ) -> None:
        if not blocks:
            return
        tiles = -(-table.layout.block_bytes // _TILE_BYTES[width]) * blocks
        threads = _THREADS[name]
        most = min(multiprocessors, self.multiprocessors) or self.multiprocessors * _THREADS_PER_SM // threads
        grid = min(most, -(-tiles // (threads // 32)))
        places = (_u64(block_ids), _u64(slots), _u32(blocks), _u64(sums))
        suffix = "_xxh3" if sums else ""
        self._start(f"{name}_{width}{suffix}", grid, threads, (*_layout(table), *places), stream)

    def _start(self, name: str, grid: int, threads: int, arguments: tuple[Any, ...], stream: int) -> None:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._module.get_function(name)
        # The driver copies the arguments before the call returns.
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._launch(function.ptr, grid, 1, 1, threads, 1, 1, 0, stream, ctypes.addressof(pointers), 0)


def _layout(table: Table) -> tuple[Any, ...]:
    layout, row = table.layout, 8 * table.layout.segments
    addresses = (table.address, table.address + row, table.address + 2 * row)
    sizes = (layout.segments, layout.segment_bytes, layout.block_bytes)
    return (*map(_u64, addresses), *map(_u32, sizes))
