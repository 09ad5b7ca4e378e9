"""Copies between paged KV and pinned memory as LMCache 0.5.6 makes them, with its own machine code.

Three paths, since what it does depends on how it is deployed:

direct   Its daemon by default for these layouts, with CUDA 12.8 or newer: one cudaMemcpyBatchAsync a chunk, with one
         entry for each part, layer and block (`execute_direct_copy_transfer`).
staged   Its daemon otherwise: four staging buffers on the GPU, `lmcache_memcpy_async`, and a block kernel.
classic  Its connector inside the engine. A load's token kernel reads pinned memory; a store's writes to a buffer on the
         GPU, which is copied to pinned memory, with a wait after every chunk.
"""

from __future__ import annotations

import ctypes
import random
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.bench.gpu_lmcache_kernels import Kernels, Objects4, ShapeDesc, find_library, load_library

PATHS = ("direct", "staged", "classic")
CHUNK_TOKENS = 256  # its default
PIN_CHUNK_BYTES = 1 << 26  # none of its copies crosses a multiple of this in its pinned pool
LOAD, STORE = 0, 1  # lmcache_native.TransferDirection
FORMATS = {2: 1, 1: 3}  # parts -> EngineKVFormat: NL_X_TWO_NB_BS_NH_HS, NL_X_NB_BS_HS
STAGING_SLOTS = 4
HEAD_DIM = 128
ELEMENT_BYTES = 2  # bfloat16
WORD_BYTES = 8  # what a thread of the token kernel moves
THREADS_MAX = 1024


@dataclass(frozen=True, slots=True)
class KvShape:
    """Paged KV: one tensor a layer.

    Attributes:
        parts: 2 for K and V, [2, blocks, block_tokens, heads, 128]; 1 for MLA, [blocks, block_tokens, dim].
        token_bytes: of one part of one layer; whole heads where there are two parts.
    """

    layers: int
    parts: int
    block_tokens: int
    token_bytes: int

    @property
    def blocks_per_chunk(self) -> int:
        return CHUNK_TOKENS // self.block_tokens

    @property
    def chunk_bytes(self) -> int:
        """A chunk in pinned memory is [parts, layers, 256, token_bytes]."""
        return self.parts * self.layers * CHUNK_TOKENS * self.token_bytes

    @property
    def heads(self) -> int:
        return 1 if self.parts == 1 else self.token_bytes // (HEAD_DIM * ELEMENT_BYTES)

    @property
    def dim(self) -> int:
        return self.token_bytes // ELEMENT_BYTES // self.heads

    def tensor(self, blocks: int) -> tuple[int, ...]:
        """The shape of a layer's tensor."""
        if self.parts == 1:
            return (blocks, self.block_tokens, self.dim)
        return (2, blocks, self.block_tokens, self.heads, self.dim)


def refusal(folder: Path) -> str:
    """Why this unpacked wheel's code cannot copy here; empty where it can. Raises FileNotFoundError, ImportError."""
    find_library(folder)
    import torch

    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    ops, _ = load_library(folder)
    if not ops.batch_memcpy_supported():
        return "LMCache says that this runtime or driver has no cudaMemcpyBatchAsync"
    unfit = [code for code in FORMATS.values() if not ops.direct_copy_format_supported(code)]
    return f"LMCache's direct path refuses the formats {unfit}" if unfit else ""


class LmcacheCopies:
    """Random paged KV on the GPU, pinned memory for the chunks of half of it, and one of LMCache's paths between them.

    Chunk i of the pinned pool belongs to the i-th group of 256 / block_tokens ids given to `load` or `store`.

    Args:
        folder: the unpacked wheel.
        chunks: what a copy moves at most; twice as many chunks' blocks are on the GPU.
    """

    def __init__(self, folder: Path, shape: KvShape, chunks: int, path: str) -> None:
        import torch

        self.torch, self.shape, self.chunks = torch, shape, chunks
        self.device = torch.device("cuda", 0)
        torch.cuda.set_device(self.device)
        self.ops, native = load_library(folder)
        self.blocks = 2 * chunks * shape.blocks_per_chunk
        self.kv = [
            torch.empty(shape.tensor(self.blocks), dtype=torch.bfloat16, device=self.device)
            for _ in range(shape.layers)
        ]
        for layer in self.kv:
            layer.view(torch.int16).random_(-32768, 32767)
        self.pool = torch.zeros(chunks * shape.chunk_bytes, dtype=torch.uint8, pin_memory=True)
        self.staging = torch.empty(STAGING_SLOTS * shape.chunk_bytes, dtype=torch.uint8, device=self.device)
        self.pointers = [layer.data_ptr() for layer in self.kv]
        self.pointers_there = torch.tensor(self.pointers, dtype=torch.int64, device=self.device)
        self.ids_there = torch.empty(self.blocks, dtype=torch.int64, device=self.device)
        stream: Any = torch.cuda.Stream
        self.stream = stream(self.device)
        stride = shape.block_tokens * shape.dim if shape.parts == 1 else 0  # set where blocks are the first axis
        values = (shape.parts, shape.layers, self.blocks, shape.block_tokens, shape.heads, shape.dim)
        self.desc_by_value = ShapeDesc(*values, ELEMENT_BYTES, stride)
        self.desc = native.PageBufferShapeDesc()
        for name in ShapeDesc.NAMES:
            setattr(self.desc, name, getattr(self.desc_by_value, name))
        self._move = {"direct": self._direct, "staged": self._staged, "classic": self._classic}[path]
        if path != "direct":
            self._find_kernels(path)
        torch.cuda.synchronize()

    def _find_kernels(self, path: str) -> None:
        self.kernels = Kernels(Path(self.ops.__file__).read_bytes(), ctypes.CDLL("libcuda.so.1"))
        start = "multi_layer_block_transfer_kernelI5uint4" if path == "staged" else "_multi_layer_kernelIl"
        end = f"EL14EngineKVFormat{FORMATS[self.shape.parts]}E"
        off, on = (self.kernels.find(f"{start}Lb{flag}{end}") for flag in (0, 1))
        # The block kernel's flag says "into the engine", the token kernel's "out of the engine".
        self.kernel = {LOAD: on, STORE: off} if path == "staged" else {LOAD: off, STORE: on}

    def load(self, block_ids: Sequence[int]) -> None:
        """Enqueue pinned pool -> blocks; `classic` waits as well, as LMCache does."""
        self._copy(block_ids, LOAD)

    def store(self, block_ids: Sequence[int]) -> None:
        """Enqueue blocks -> pinned pool; `classic` waits after each chunk, as LMCache does."""
        self._copy(block_ids, STORE)

    def synchronize(self) -> None:
        """Wait for all copies enqueued so far."""
        self.stream.synchronize()

    def _copy(self, block_ids: Sequence[int], direction: int) -> None:
        chunks, rest = divmod(len(block_ids), self.shape.blocks_per_chunk)
        if rest or chunks > self.chunks:
            raise ValueError(f"{len(block_ids)} blocks are not whole chunks, or more than the pinned pool holds")
        with self.torch.cuda.stream(self.stream):
            self._move(block_ids, chunks, direction)

    def _stage_ids(self, block_ids: Iterable[int]) -> None:
        ids = self.torch.frombuffer(array("q", block_ids), dtype=self.torch.int64)
        self.ids_there[: len(ids)].copy_(ids, non_blocking=True)

    def _direct(self, block_ids: Sequence[int], chunks: int, direction: int) -> None:
        self._stage_ids(block_ids)  # not used by this path, yet LMCache uploads them for every request
        code, size, base = FORMATS[self.shape.parts], self.shape.chunk_bytes, self.pool.data_ptr()
        group = self.ops.DirectCopyGroupSpec(self.pointers, self.desc, code, CHUNK_TOKENS, 0, list(block_ids))
        objects = [self.ops.DirectCopyObject(base + i * size, i * size, size, i, [0]) for i in range(chunks)]
        self.ops.execute_direct_copy_transfer(direction, self.device, PIN_CHUNK_BYTES, [group], objects)

    def _staged(self, block_ids: Sequence[int], chunks: int, direction: int) -> None:
        self._stage_ids(block_ids)
        shape, slots = self.shape, self.staging.data_ptr()
        x = min(shape.dim * ELEMENT_BYTES // 16, 32)
        block = (x, shape.heads, min(shape.block_tokens, THREADS_MAX // (x * shape.heads), 64))
        batch = STAGING_SLOTS if direction == LOAD else 1  # LMCache stores chunk by chunk
        for first in range(0, chunks, batch):
            count = min(batch, chunks - first)
            if direction == LOAD:
                self._stage_chunks(first, count, direction)
            objects = Objects4((ctypes.c_uint64 * 4)(*[slots + i * shape.chunk_bytes for i in range(count)]), count)
            ids = self.ids_there.data_ptr() + 8 * first * shape.blocks_per_chunk
            grid = (shape.parts, count * shape.blocks_per_chunk, shape.layers)
            addresses = objects, ctypes.c_uint64(self.pointers_there.data_ptr()), ctypes.c_uint64(ids)
            numbers = ctypes.c_int(shape.blocks_per_chunk), self.desc_by_value, ctypes.c_int(CHUNK_TOKENS)
            self._launch(direction, grid, block, *addresses, *numbers, ctypes.c_int(0))
            if direction == STORE:
                self._stage_chunks(first, count, direction)

    def _stage_chunks(self, first: int, count: int, direction: int) -> None:
        size = self.shape.chunk_bytes
        for slot in range(count):
            offset = (first + slot) * size
            there, here = self.staging.data_ptr() + slot * size, self.pool.data_ptr() + offset
            target, source = (there, here) if direction == LOAD else (here, there)
            self.ops.lmcache_memcpy_async(target, source, size, direction, offset, PIN_CHUNK_BYTES)

    def _classic(self, block_ids: Sequence[int], chunks: int, direction: int) -> None:
        torch, shape, size = self.torch, self.shape, self.shape.chunk_bytes
        tokens = torch.arange(shape.block_tokens)
        slots = (torch.tensor(block_ids)[:, None] * shape.block_tokens + tokens).flatten().to(self.device)
        words, pages = shape.token_bytes // WORD_BYTES, self.blocks * shape.block_tokens
        head_words = shape.dim * ELEMENT_BYTES // WORD_BYTES
        numbers = (words, CHUNK_TOKENS, shape.layers, pages, shape.block_tokens, head_words, 0)
        grid = (CHUNK_TOKENS, shape.layers, shape.parts)
        for i in range(chunks):
            host = self.pool[i * size : (i + 1) * size]
            packed = host if direction == LOAD else self.staging[:size]
            addresses = packed.data_ptr(), self.pointers_there.data_ptr(), slots.data_ptr() + 8 * i * CHUNK_TOKENS
            arguments = [*map(ctypes.c_uint64, addresses), *map(ctypes.c_int, numbers), ctypes.c_int64(0)]
            self._launch(direction, grid, (min(words, 128), 1, 1), *arguments)
            if direction == STORE:
                host.copy_(packed, non_blocking=True)
                self.stream.synchronize()
        self.stream.synchronize()

    def _launch(self, direction: int, grid: Sequence[int], block: Sequence[int], *arguments: Any) -> None:
        self.kernels.launch(self.kernel[direction], grid, block, self.stream.cuda_stream, *arguments)

    def check(self) -> None:
        """Store half of the blocks, load them into the other half, compare. Raises RuntimeError where bytes differ."""
        torch, half = self.torch, self.blocks // 2
        draw = random.Random(5)
        source, target = draw.sample(range(half), half), draw.sample(range(half, self.blocks), half)
        before = [layer.view(torch.int16).clone() for layer in self.kv]
        self.pool.zero_()
        torch.cuda.synchronize()
        self.store(source)
        self.synchronize()
        self.load(target)
        self.synchronize()
        axis = self.shape.parts - 1
        here, there = (torch.tensor(ids, device=self.device) for ids in (source, target))
        for number, (layer, old) in enumerate(zip(self.kv, before, strict=True)):
            bits = layer.view(torch.int16)
            if not torch.equal(bits.index_select(axis, there), old.index_select(axis, here)):
                raise RuntimeError(f"wrong bytes: layer {number}: loaded blocks differ from the stored ones")
            if not torch.equal(bits.index_select(axis, here), old.index_select(axis, here)):
                raise RuntimeError(f"wrong bytes: layer {number}: a load changed blocks that it was not given")
