"""A call's memory: as the file has it, straight or through a buffer, with nothing of an earlier call in it."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest

from forebay.tiers.nvme_format import PAGE
from forebay.tiers.nvme_staging import STAGED_BYTES_MAX, Passage, Staged, Straight, blank, move


def slots_of(count: int, size: int) -> list[memoryview]:
    """Adjacent slots, each full of its own number."""
    whole = memoryview(mmap.mmap(-1, count * size))
    slots = [whole[at : at + size] for at in range(0, count * size, size)]
    for number, slot in enumerate(slots):
        slot[:] = bytes([number + 1]) * size
    return slots


def image(passage: Passage) -> bytes:
    return b"".join(passage.buffers)


@pytest.mark.parametrize("way", [Straight, Staged])
def test_call_is_pages_and_slots_by_turns(way: type[Straight]) -> None:
    slots = slots_of(3, 2 * PAGE)
    passage = way(4).open(slots)
    for index, slot in enumerate(slots):
        move(passage.slots[index], slot)
        passage.pages[index][:] = bytes([100 + index]) * PAGE
    expected = [bytes([100 + index]) * PAGE + bytes([index + 1]) * 2 * PAGE for index in range(3)]
    assert image(passage) == b"".join(expected)


def test_straight_call_has_the_slots_themselves() -> None:
    slots = slots_of(2, PAGE)
    passage = Straight(2).open(slots)
    assert all(mine is its for mine, its in zip(passage.slots, slots, strict=True))


def test_staged_call_leaves_the_slots_alone_until_they_are_moved() -> None:
    slots = slots_of(2, 128 << 10)  # more than is copied with the interpreter lock held
    way = Staged(2)
    passage = way.open(slots)
    assert len(passage.buffers) == 1
    passage.buffers[0][:] = b"x" * len(passage.buffers[0])
    assert bytes(slots[1]) == b"\x02" * (128 << 10)
    move(slots[1], passage.slots[1])
    assert (bytes(slots[0]), bytes(slots[1])) == (b"\x01" * (128 << 10), b"x" * (128 << 10))


@pytest.mark.parametrize("soon_read", [False, True])
@pytest.mark.parametrize("size", [64 << 10, (64 << 10) + 1, (1 << 20) + PAGE, (3 << 20) - 1])
def test_move_is_of_all_bytes_whether_they_pass_the_cache_by_or_not(size: int, soon_read: bool) -> None:
    source = memoryview(bytearray(os.urandom(size)))
    around = memoryview(bytearray(b"\x55" * (size + 2)))
    move(around[1:-1], source, soon_read=soon_read)
    assert around[1:-1] == source
    assert (around[0], around[-1]) == (0x55, 0x55)


def test_large_buffer_begins_with_a_huge_page() -> None:
    """Whether the system has one or not: a call is cut up at as few places as can be."""
    (buffer,) = Staged(1).open(slots_of(1, 2 << 20)).buffers
    assert ctypes.addressof(ctypes.c_char.from_buffer(buffer)) % (2 << 20) == 0
    assert len(buffer) == (2 << 20) + PAGE


def test_buffer_is_used_again_and_grows() -> None:
    way = Staged(8)
    way.open(slots_of(2, PAGE)).buffers[0][:] = b"x" * 4 * PAGE
    again = way.open(slots_of(1, PAGE))
    assert image(again) == b"x" * 2 * PAGE
    blank(again.pages[0])
    assert bytes(again.pages[0]) == bytes(PAGE)
    assert [len(buffer) for buffer in way.open(slots_of(8, PAGE)).buffers] == [16 * PAGE]


@pytest.mark.parametrize(("size", "buffers"), [(STAGED_BYTES_MAX - PAGE, 1), (STAGED_BYTES_MAX, 2)])
def test_calls_too_large_go_straight(size: int, buffers: int) -> None:
    assert len(Staged(1).open(slots_of(1, size)).buffers) == buffers
