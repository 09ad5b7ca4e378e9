"""Layouts: what the kernels are told about a paged memory, and what they cannot be told."""

from __future__ import annotations

import numpy as np
import pytest

from forebay.kernels.layout import BLOCK_BYTES_MAX, WIDTHS, Layout, alignment_of, summed_stripes, sums_of


def layout(bases: list[int], strides: list[int], sizes: list[int]) -> Layout:
    return Layout.of(*(np.array(column, np.int64) for column in (bases, strides, sizes)))


def test_offsets_are_the_sizes_before_a_segment() -> None:
    described = layout([0, 100, 200], [16, 16, 16], [3, 5, 7])
    assert described.offsets.tolist() == [0, 3, 8, 15]
    assert described.block_bytes == 15
    assert described.segments == 3


def test_packed_form_is_bases_strides_and_offsets() -> None:
    described = layout([7, 9], [-32, 64], [16, 8])
    assert described.packed().tolist() == [7, 9, -32, 64, 0, 16, 24]
    assert described.packed().dtype == np.int64


@pytest.mark.parametrize(("sizes", "told"), [([48, 48], 48), ([48], 48), ([48, 32], 0)])
def test_segment_bytes_are_told_where_all_are_equal(sizes: list[int], told: int) -> None:
    """The kernels then divide where they would search."""
    assert layout([0] * len(sizes), [96] * len(sizes), sizes).segment_bytes == told


@pytest.mark.parametrize(
    ("base", "stride", "size", "width"),
    [
        (0, 0, 16, 16),
        (4096, -4096, 48, 16),
        (8, 64, 16, 4),
        (64, 24, 16, 4),
        (64, -20, 16, 4),
        (64, 64, 20, 4),
        (64, 64, 18, 1),
        (66, 64, 16, 1),
        (64, 63, 16, 1),
    ],
)
def test_alignment_is_the_widest_access_that_fits_all(base: int, stride: int, size: int, width: int) -> None:
    """One segment decides for all."""
    assert layout([base, 0], [stride, 0], [size, 16]).alignment == width
    assert layout([0, base], [0, stride], [16, size]).alignment == width


def test_alignment_of_no_numbers_is_the_widest() -> None:
    assert alignment_of(np.array([], np.int64)) == max(WIDTHS)


def test_part_is_what_lies_in_a_slot_from_its_first_segment_on() -> None:
    whole = layout([10, 20, 30, 40], [100, 100, 100, 100], [1, 2, 3, 4])
    part = whole.part(1, 3)
    assert part.bases.tolist() == [20, 30]
    assert part.offsets.tolist() == [0, 2, 5]
    assert part.block_bytes == whole.offsets[3] - whole.offsets[1]


@pytest.mark.parametrize(
    ("bases", "strides", "sizes"),
    [([], [], []), ([0], [0, 0], [1, 1]), ([0, 0], [0, 0], [1]), ([0], [0], [0]), ([0, 0], [0, 0], [8, -1])],
)
def test_layout_without_segments_or_with_uneven_columns_is_refused(
    bases: list[int], strides: list[int], sizes: list[int]
) -> None:
    with pytest.raises(ValueError, match="one base, stride and positive size"):
        layout(bases, strides, sizes)


def test_block_that_positions_of_32_bits_cannot_address_is_refused() -> None:
    assert layout([0], [0], [BLOCK_BYTES_MAX]).block_bytes == BLOCK_BYTES_MAX
    with pytest.raises(ValueError, match="blocks of more than"):
        layout([0, 0], [0, 0], [BLOCK_BYTES_MAX, 1])


@pytest.mark.parametrize(
    ("block_bytes", "sums", "stripes"),
    [(241, 1, 3), (1023, 1, 15), (1024, 1, 15), (1025, 2, 16), (2048, 2, 31), (2049, 3, 32), (4097, 5, 64)],
)
def test_last_stripe_and_last_sum_hold_at_least_one_byte(block_bytes: int, sums: int, stripes: int) -> None:
    """XXH3 takes the end of an input apart, even where it is a whole stripe."""
    assert sums_of(block_bytes) == sums
    assert summed_stripes(block_bytes) == stripes
