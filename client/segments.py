"""Segment tables: where the segments of each block lie in an engine's memory.

Segment s of block b is ``sizes[s]`` bytes at ``bases[s] + b * strides[s]``. That one table describes every
paged layout (NHD, HND, K and V apart or fused, one tensor a layer or one for all, MLA, a dense cache whose
blocks are ranges of tokens), so the copiers know addresses and nothing about attention. Tensors are read by
duck typing (`data_ptr`, `stride`, `element_size`, `device`): importing torch to look at a torch tensor would
cost every engine-less tool its start-up time, and numpy has no bfloat16 to convert to. The addresses are of host memory
or of one CUDA device; those of a device are never touched here.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forebay.kernels.layout import Layout
from forebay.kvstore.errors import LayoutError
from forebay.kvstore.namespace import SEGMENTS_MAX

Addresses = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RawBytes:
    """Foreign memory as numpy sees it: hand it to `np.asarray`. Does not keep the memory alive."""

    __array_interface__: dict[str, Any]


def raw_array(address: int, shape: tuple[int, ...], strides: tuple[int, ...], item_bytes: int) -> NDArray[Any]:
    """A view of opaque `item_bytes`-wide items at `address`; the caller keeps the memory alive."""
    return np.asarray(
        RawBytes(
            {
                "data": (address, False),
                "shape": shape,
                "strides": strides,
                "typestr": f"|V{item_bytes}",
                "version": 3,
            }
        )
    )


class SegmentTable:
    """Addresses of the segments of `blocks` blocks; immutable, may be shared by threads.

    Attributes:
        bases, strides: int64 (segments,), bytes; block b's segment s begins at ``bases[s] + b * strides[s]``.
        sizes: bytes of each segment, in the order in which they lie in a slot.
        blocks: valid block ids are 0 to ``blocks - 1``.
        writable: may be the destination of a fetch.
        device: index of the CUDA device whose memory this is; None: host memory.

    The table owns a reference to each array it was built from, so the memory outlives the table's copies.
    Neighbouring segments that are contiguous in memory are one segment.
    """

    __slots__ = (
        "__weakref__",
        "_rows",
        "bases",
        "block_bytes",
        "blocks",
        "device",
        "offsets",
        "owners",
        "sizes",
        "strides",
        "writable",
    )

    def __init__(
        self,
        bases: Addresses,
        strides: Addresses,
        sizes: Addresses,
        blocks: int,
        *,
        writable: bool,
        owners: tuple[object, ...],
        device: int | None = None,
    ) -> None:
        if blocks < 1 or not len(sizes) or int(sizes.min()) < 1:
            raise LayoutError("the memory holds no whole block")
        if len(sizes) > SEGMENTS_MAX:
            raise LayoutError(f"a block would have more than {SEGMENTS_MAX} segments")
        self.bases, self.strides, joined = _join(bases, strides, sizes)
        self.sizes: tuple[int, ...] = tuple(joined.tolist())
        self.block_bytes = sum(self.sizes)
        self.offsets: Addresses = np.cumsum(joined) - joined
        self.blocks = blocks
        order = np.argsort(self.bases)
        ends = (self.bases + joined)[order]
        overlapping = bool((self.bases[order][1:] < ends[:-1]).any())  # segments of one block, as in an expanded tensor
        overlapping |= blocks > 1 and bool((np.abs(self.strides) < joined).any())
        self.writable = writable and not overlapping
        self.owners = owners
        self.device = device
        self._rows: list[NDArray[Any]] = []
        if device is None:
            self._rows = [
                raw_array(base, (blocks, 1), (stride, size), size)
                for base, stride, size in zip(self.bases.tolist(), self.strides.tolist(), self.sizes, strict=True)
            ]

    @property
    def rows(self) -> list[NDArray[Any]]:
        """Of each segment: items of its size, (blocks, 1). Raises LayoutError where that is a device's memory."""
        if self.device is not None:
            raise LayoutError(f"the blocks are in the memory of CUDA device {self.device}, which a CPU cannot read")
        return self._rows

    @classmethod
    def of(
        cls,
        memory: object,
        *,
        block_axis: int = 0,
        token_axis: int | None = None,
        block_tokens: int = 0,
        writable: bool = True,
    ) -> SegmentTable:
        """The table of one array, or of several whose segments follow each other (one or two per layer).

        Args:
            memory: numpy array, torch tensor on the CPU or on CUDA, or array with ``__cuda_array_interface__``
                (cupy), of any dtype; or a sequence of them, all with as many blocks and in one memory.
                The order of the sequence, and C order within an array, is the order of the bytes in a slot.
            block_axis: the axis that counts blocks, in each array.
            token_axis: for dense caches instead: the axis that counts tokens; a block is a range of
                `block_tokens` tokens and a trailing partial block has no id.
            writable: False for a source that must never be a fetch's destination.
        Raises:
            LayoutError: neither host nor CUDA memory, or several of them; no whole block, different block counts, or
                too scattered.
        """
        arrays = list(memory) if isinstance(memory, (list, tuple)) else [memory]
        if not arrays:
            raise LayoutError("no arrays to build a segment table of")
        parts, blocks, devices = [], set(), set()
        for array in arrays:
            region = _describe(array)
            devices.add(region.device)
            axes, block = _axes(region, block_axis, token_axis, block_tokens)
            parts.append(_segments(region, axes, block))
            blocks.add(block[0])
            writable = writable and region.writable
        if len(blocks) != 1:
            raise LayoutError(f"arrays of one table hold as many blocks each, not {sorted(blocks)}")
        if len(devices) != 1:
            raise LayoutError("arrays of one table lie in one memory, not on several devices")
        bases, strides, sizes = (np.concatenate(column) for column in zip(*parts, strict=True))
        owners = tuple(arrays)
        return cls(bases, strides, sizes, blocks.pop(), writable=writable, owners=owners, device=devices.pop())

    @classmethod
    def packed(cls, memory: object, block_bytes: int, *, writable: bool = True) -> SegmentTable:
        """The table of one contiguous buffer (array, tensor or bytes-like) cut into whole blocks."""
        if isinstance(memory, (bytes, bytearray, memoryview)):
            memory = np.frombuffer(memory, np.uint8)
        region = _describe(memory)
        if block_bytes < 1:
            raise LayoutError(f"block_bytes must be positive, not {block_bytes}")
        size, outer = _contiguous(list(zip(region.shape, region.strides, strict=True)), region.item_bytes)
        if outer:
            raise LayoutError("a packed buffer must be contiguous")
        one = np.array([region.address], np.int64)
        width = np.array([block_bytes], np.int64)
        writable = writable and region.writable
        blocks = size // block_bytes
        return cls(one, width, width, blocks, writable=writable, owners=(memory,), device=region.device)

    @classmethod
    def from_pointers(
        cls,
        bases: Sequence[int],
        strides: Sequence[int],
        segment_bytes: Sequence[int],
        blocks: int,
        *,
        owner: object,
        writable: bool = True,
        device: int | None = None,
    ) -> SegmentTable:
        """The table of raw addresses, of host memory or of a CUDA device's.

        The caller vouches that `blocks` blocks are mapped there.
        """
        if not len(bases) == len(strides) == len(segment_bytes):
            raise LayoutError("bases, strides and segment_bytes must be as many")
        if min(bases, default=0) <= 0:
            raise LayoutError("a base address must be positive")
        first, step, size = (np.array(column, np.int64) for column in (bases, strides, segment_bytes))
        return cls(first, step, size, blocks, writable=writable, owners=(owner,), device=device)

    def checked_ids(self, block_ids: Iterable[int], count: int) -> Addresses:
        """`count` block ids as int64, or LayoutError: too few, too many, or one outside the memory."""
        ids = np.asarray(block_ids if isinstance(block_ids, np.ndarray) else list(block_ids))
        if ids.shape != (count,) or (count and ids.dtype.kind not in "iu"):
            raise LayoutError(f"{count} hashes need {count} integer block ids, not {ids.shape} of {ids.dtype}")
        if count and (int(ids.min()) < 0 or int(ids.max()) >= self.blocks):
            raise LayoutError(f"block ids run from 0 to {self.blocks - 1}, not {ids.min()} to {ids.max()}")
        return ids.astype(np.int64)

    def extents(self) -> tuple[Addresses, Addresses]:
        """First address and end address of each segment over all blocks, int64 (segments,) each."""
        reach = (self.blocks - 1) * self.strides
        sizes = np.array(self.sizes, np.int64)
        return self.bases + np.minimum(reach, 0), self.bases + np.maximum(reach, 0) + sizes

    def layout(self) -> Layout:
        """The same as the kernels are told it. Raises ValueError: a block too large for them to address."""
        return Layout.of(self.bases, self.strides, np.array(self.sizes, np.int64))

    def check_layout(self, segment_bytes: Sequence[int]) -> None:
        """Raise LayoutError unless this table cuts the same bytes: each cut of one side is also one of the other.

        A table may be finer (one segment a head) or coarser (contiguous memory) than the namespace's spec.
        """
        mine, theirs = set(itertools.accumulate(self.sizes)), set(itertools.accumulate(segment_bytes))
        if self.block_bytes != sum(segment_bytes):
            raise LayoutError(f"blocks of {self.block_bytes} bytes; the namespace's have {sum(segment_bytes)}")
        if not (mine <= theirs or theirs <= mine):
            raise LayoutError("the segments are cut at other places than the namespace's segment_bytes")

    def check_writable(self) -> None:
        """Raise LayoutError if a fetch must not write here: read-only memory, overlapping blocks or segments."""
        if not self.writable:
            raise LayoutError("the destination is read-only, or its blocks or segments overlap")


@dataclass(frozen=True, slots=True)
class _Region:
    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_bytes: int
    writable: bool
    device: int | None = None


def _describe(array: Any) -> _Region:
    if isinstance(array, np.ndarray):
        if array.dtype.hasobject:
            raise LayoutError("arrays of Python objects have no bytes to store")
        address = int(array.__array_interface__["data"][0])
        return _Region(address, array.shape, array.strides, array.itemsize, array.flags.writeable)
    if all(hasattr(array, name) for name in ("data_ptr", "stride", "element_size", "device")):
        return _describe_tensor(array)
    if hasattr(array, "__cuda_array_interface__"):
        return _describe_cuda(array)
    raise LayoutError(f"neither a numpy array nor a tensor: {type(array).__name__}")


def _describe_tensor(tensor: Any) -> _Region:
    kind = getattr(tensor.device, "type", "cpu")
    if kind not in ("cpu", "cuda"):
        raise LayoutError(f"the tensor is on {tensor.device}; only CPU and CUDA memory can be copied")
    item = int(tensor.element_size())
    strides = tuple(int(stride) * item for stride in tensor.stride())
    device = int(tensor.device.index or 0) if kind == "cuda" else None
    return _Region(int(tensor.data_ptr()), tuple(int(n) for n in tensor.shape), strides, item, True, device)


def _describe_cuda(array: Any) -> _Region:
    """Of an array with ``__cuda_array_interface__``, which says everything but on which device it is."""
    told = array.__cuda_array_interface__
    device = getattr(getattr(array, "device", None), "id", None)
    if not isinstance(device, int):
        raise LayoutError(f"{type(array).__name__} does not say on which device it is: device.id")
    dtype = np.dtype(told["typestr"])
    shape = tuple(int(n) for n in told["shape"])
    strides = told.get("strides")
    if strides is None:
        strides = tuple(dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    address, read_only = told["data"]
    return _Region(int(address), shape, tuple(map(int, strides)), dtype.itemsize, not read_only, device)


Axis = tuple[int, int]
"""Length and stride in bytes."""


def _axes(region: _Region, block_axis: int, token_axis: int | None, block_tokens: int) -> tuple[list[Axis], Axis]:
    """The axes inside a block, in C order, and the block axis."""
    axes = list(zip(region.shape, region.strides, strict=True))
    chosen = block_axis if token_axis is None else token_axis
    if not -len(axes) <= chosen < len(axes):
        raise LayoutError(f"axis {chosen} of an array with {len(axes)} axes")
    length, stride = axes[chosen]
    if token_axis is None:
        axes.pop(chosen)
        return axes, (length, stride)
    if block_tokens < 1:
        raise LayoutError(f"block_tokens must be positive, not {block_tokens}")
    axes[chosen] = (block_tokens, stride)
    return axes, (length // block_tokens, stride * block_tokens)


def _contiguous(axes: list[Axis], item_bytes: int) -> tuple[int, list[Axis]]:
    """Bytes of the innermost contiguous run, and the axes outside it."""
    run, outer = item_bytes, list(axes)
    while outer and (outer[-1][0] == 1 or outer[-1][1] == run):
        run *= outer.pop()[0]
    return run, [axis for axis in outer if axis[0] != 1]


def _segments(region: _Region, axes: list[Axis], block: Axis) -> tuple[Addresses, Addresses, Addresses]:
    run, outer = _contiguous(axes, region.item_bytes)
    offsets = np.zeros(1, np.int64)
    for length, stride in outer:
        if len(offsets) * length > SEGMENTS_MAX:
            raise LayoutError(f"a block would have more than {SEGMENTS_MAX} segments")
        offsets = (offsets[:, None] + np.arange(length, dtype=np.int64)[None, :] * stride).ravel()
    return region.address + offsets, np.full_like(offsets, block[1]), np.full_like(offsets, run)


def _join(bases: Addresses, strides: Addresses, sizes: Addresses) -> tuple[Addresses, Addresses, Addresses]:
    """Merge each segment that begins where the one before it ends."""
    follows = (bases[1:] == bases[:-1] + sizes[:-1]) & (strides[1:] == strides[:-1])
    starts = np.flatnonzero(np.concatenate(([True], ~follows)))
    return bases[starts], strides[starts], np.add.reduceat(sizes, starts)
