"""Segment tables: every layout an engine may have, and what they refuse."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.client.segments import SegmentTable, raw_array
from forebay.kvstore.errors import LayoutError
from forebay.kvstore.namespace import SEGMENTS_MAX
from support.device_arrays import CudaArray, CudaTensor


def block_bytes(table: SegmentTable, block: int) -> bytes:
    """What the table says block `block` is, read through its addresses."""
    parts = zip(table.bases.tolist(), table.strides.tolist(), table.sizes, strict=True)
    return b"".join(raw_array(base + block * stride, (size,), (1,), 1).tobytes() for base, stride, size in parts)


def numbered(*shape: int, dtype: Any = np.uint16) -> np.ndarray[Any, Any]:
    return np.arange(int(np.prod(shape)), dtype=dtype).reshape(shape)


def test_fused_blocks_are_one_segment() -> None:
    array = numbered(6, 2, 16, 4, 8)
    table = SegmentTable.of(array)
    assert (table.sizes, table.blocks) == ((2 * 16 * 4 * 8 * 2,), 6)
    assert block_bytes(table, 3) == array[3].tobytes()


def test_k_and_v_apart_are_two_segments() -> None:
    array = numbered(2, 6, 16, 4, 8)
    table = SegmentTable.of(array, block_axis=1)
    assert (table.sizes, table.blocks) == ((1024, 1024), 6)
    assert block_bytes(table, 5) == array[0, 5].tobytes() + array[1, 5].tobytes()


def test_layers_follow_each_other() -> None:
    layers = [numbered(2, 6, 16, 8) for _ in range(5)]
    table = SegmentTable.of(layers, block_axis=-3)
    assert len(table.sizes) == 10
    assert block_bytes(table, 2) == b"".join(layer[half, 2].tobytes() for layer in layers for half in (0, 1))


def test_a_block_of_a_dense_cache_is_a_range_of_tokens_in_each_head() -> None:
    layers = [numbered(1, 4, 50, 8, dtype=np.float32) for _ in range(3)]
    table = SegmentTable.of(layers, token_axis=2, block_tokens=16)
    assert (table.blocks, table.sizes) == (3, (16 * 8 * 4,) * 12)
    expected = b"".join(layer[0, head, 16:32].tobytes() for layer in layers for head in range(4))
    assert block_bytes(table, 1) == expected


def test_views_of_one_tensor_that_touch_are_one_segment() -> None:
    whole = numbered(6, 4, 100)
    table = SegmentTable.of([whole[:, layer] for layer in range(4)])
    assert table.sizes == (800,)
    assert block_bytes(table, 4) == whole[4].tobytes()


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    data=st.data(),
)
@settings(max_examples=200, deadline=None)
def test_any_strided_array_reads_as_numpy_does(shape: list[int], order: Any, data: st.DataObject) -> None:
    """Transposed, sliced and reversed arrays: the bytes of a block are those of C order over its other axes."""
    axes = list(range(len(shape)))
    order.shuffle(axes)
    array = numbered(*(2 * n for n in shape))
    array = array[tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in shape)].transpose(axes)
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    table = SegmentTable.of(array, block_axis=axis)
    assert table.blocks == array.shape[axis]
    for block in range(table.blocks):
        assert block_bytes(table, block) == np.take(array, block, axis=axis).tobytes()


def test_torch_tensors_of_any_dtype_are_read_by_duck_typing() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float32):
        tensor = torch.zeros((2, 6, 4, 8), dtype=dtype)
        tensor.view(torch.uint8).copy_(torch.randint(0, 255, tensor.view(torch.uint8).shape, dtype=torch.uint8))
        table = SegmentTable.of(tensor, block_axis=1)
        expected = tensor[:, 3].contiguous().view(torch.uint8).numpy().tobytes()
        assert block_bytes(table, 3) == expected
        assert table.writable


def test_a_tensor_in_memory_of_neither_cpu_nor_cuda_is_refused() -> None:
    class Device:
        type = "xpu"

        def __str__(self) -> str:
            return "xpu:0"

    class Tensor:
        device, shape = Device(), (1,)
        data_ptr = stride = element_size = lambda self: 1

    with pytest.raises(LayoutError, match="xpu:0"):
        SegmentTable.of(Tensor())


@pytest.mark.parametrize("kind", [CudaTensor, CudaArray])
def test_arrays_of_a_gpu_are_described_as_those_of_the_host_and_never_touched(kind: Any) -> None:
    """Torch's by duck typing, cupy's by their interface; views with gaps and blocks on a later axis too."""
    whole = numbered(2, 6, 4, 8)
    for memory, axis in ((whole, 1), (whole[:, ::2, 1:3], 1), (whole[0], 0)):
        host, there = SegmentTable.of(memory, block_axis=axis), SegmentTable.of(kind(memory, 3), block_axis=axis)
        assert (host.device, there.device) == (None, 3)
        assert (there.blocks, there.sizes, there.writable) == (host.blocks, host.sizes, host.writable)
        assert there.bases.tolist() == host.bases.tolist()
        assert there.strides.tolist() == host.strides.tolist()
        with pytest.raises(LayoutError, match="device 3"):
            _ = there.rows
    assert SegmentTable.packed(kind(whole, 1), 32).device == 1


def test_a_read_only_array_of_a_gpu_is_no_destination() -> None:
    table = SegmentTable.of(CudaArray(numbered(6, 16), read_only=True))
    with pytest.raises(LayoutError, match="read-only"):
        table.check_writable()


def test_a_table_lies_in_one_memory() -> None:
    memory = numbered(2, 6, 16)
    for other in (memory[1], CudaArray(memory[1], 1)):
        with pytest.raises(LayoutError, match="one memory"):
            SegmentTable.of([CudaTensor(memory[0], 0), other])
    assert SegmentTable.of([CudaTensor(memory[0], 1), CudaArray(memory[1], 1)]).device == 1


def test_an_array_that_does_not_say_which_gpu_it_is_on_is_refused() -> None:
    array = CudaArray(numbered(6, 16))
    array.device = None
    with pytest.raises(LayoutError, match=r"device\.id"):
        SegmentTable.of(array)


def test_pointers_may_be_a_gpus() -> None:
    table = SegmentTable.from_pointers([4096], [64], [64], 4, owner=None, device=2)
    assert (table.device, table.layout().block_bytes) == (2, 64)
    assert SegmentTable.from_pointers([4096], [64], [64], 4, owner=None).device is None


def test_packed_buffers_are_cut_into_blocks() -> None:
    data = bytearray(range(256)) * 4
    table = SegmentTable.packed(data, 100)
    assert (table.blocks, table.sizes, table.writable) == (10, (100,), True)
    assert block_bytes(table, 9) == bytes(data[900:1000])
    assert not SegmentTable.packed(bytes(data), 100).writable
    with pytest.raises(LayoutError, match="contiguous"):
        SegmentTable.packed(np.zeros((4, 4), np.uint8)[:, :2], 2)
    with pytest.raises(LayoutError, match="no whole block"):
        SegmentTable.packed(data, 5000)


def test_pointers_describe_memory_of_any_owner() -> None:
    array = numbered(4, 10)
    address = array.__array_interface__["data"][0]
    table = SegmentTable.from_pointers([address + 4, address], [20, 20], [16, 4], 4, owner=array)
    assert block_bytes(table, 2) == array[2, 2:].tobytes() + array[2, :2].tobytes()
    with pytest.raises(LayoutError, match="as many"):
        SegmentTable.from_pointers([1], [1, 2], [1], 1, owner=None)
    with pytest.raises(LayoutError, match="positive"):
        SegmentTable.from_pointers([0], [1], [1], 1, owner=None)


def test_the_table_keeps_the_memory_alive() -> None:
    array = np.zeros((4, 4), np.uint8)
    alive = weakref.ref(array)
    table = SegmentTable.of(array)
    del array
    gc.collect()
    assert alive() is not None
    del table
    gc.collect()
    assert alive() is None


def test_block_ids_are_checked() -> None:
    table = SegmentTable.of(np.zeros((4, 4), np.uint8))
    assert table.checked_ids(iter([3, 0, 3]), 3).tolist() == [3, 0, 3]
    assert table.checked_ids(np.array([1], np.uint8), 1).dtype == np.int64
    for ids, count in (([4], 1), ([-1], 1), ([0], 2), ([[0]], 1), ([0.5], 1), ([1 << 70], 1)):
        with pytest.raises(LayoutError, match="block ids"):
            table.checked_ids(ids, count)


def test_read_only_and_overlapping_memory_is_no_destination() -> None:
    frozen = np.zeros((4, 4), np.uint8)
    frozen.flags.writeable = False
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(16, np.uint8), (4, 8), (2, 1))
    for memory in (frozen, overlapping, np.broadcast_to(np.zeros(4, np.uint8), (4, 4))):
        with pytest.raises(LayoutError, match="read-only"):
            SegmentTable.of(memory).check_writable()
    with pytest.raises(LayoutError, match="read-only"):
        SegmentTable.of(np.zeros((4, 4), np.uint8), writable=False).check_writable()
    SegmentTable.of(np.zeros((4, 4), np.uint8)).check_writable()


@pytest.mark.parametrize(
    ("mine", "theirs", "fits"),
    [
        ((4, 4), (4, 4), True),
        ((2, 2, 2, 2), (4, 4), True),
        ((8,), (4, 4), True),
        ((4, 4), (6, 2), False),
        ((4, 4), (4, 5), False),
        ((2, 6), (2, 2, 2, 2), True),
    ],
)
def test_layouts_fit_when_one_only_refines_the_other(
    mine: tuple[int, ...], theirs: tuple[int, ...], fits: bool
) -> None:
    table = SegmentTable.of([np.zeros((3, size), np.uint8) for size in mine])
    if fits:
        table.check_layout(theirs)
        return
    with pytest.raises(LayoutError):
        table.check_layout(theirs)


@pytest.mark.parametrize(
    ("memory", "options", "message"),
    [
        ([], {}, "no arrays"),
        ("text", {}, "neither"),
        (np.zeros((4, 4), object), {}, "Python objects"),
        (np.zeros((4, 4)), {"block_axis": 2}, "axis 2"),
        (np.zeros(()), {}, "axis 0"),
        (np.zeros((0, 4)), {}, "no whole block"),
        (np.zeros((4, 0)), {}, "no whole block"),
        (np.zeros((4, 4)), {"token_axis": 0}, "block_tokens"),
        (np.zeros((4, 4)), {"token_axis": 0, "block_tokens": 5}, "no whole block"),
        ([np.zeros((4, 4)), np.zeros((5, 4))], {}, "as many blocks"),
        (np.zeros((1, 2, SEGMENTS_MAX, 2))[..., :1], {}, "more than"),
    ],
)
def test_memory_without_a_table_is_refused(memory: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        SegmentTable.of(memory, **options)


def test_memory_whose_segments_overlap_is_never_a_destination() -> None:
    """As of an expanded tensor, or of one array named twice: the last segment written would win."""
    array = np.zeros((4, 64), np.uint8)
    table = SegmentTable.of([array, array])
    with pytest.raises(LayoutError, match="overlap"):
        table.check_writable()
    SegmentTable.of([array, array.copy()]).check_writable()
