"""A call's memory: as the file has it, straight or through a buffer, with nothing of an earlier call in it."""

from __future__ import annotations

import ctypes
import mmap
import os

import pytest
import xxhash

from forebay.tiers.nvme_format import PAGE
from forebay.tiers.nvme_staging import PIECE_BYTES, STAGED_BYTES_MAX, Passage, Staged, Straight, blank, carry

SIZES = [64 << 10, (64 << 10) + 1, PIECE_BYTES, PIECE_BYTES + 1, (1 << 20) + PAGE, (3 << 20) - 1]


def slots_of(count: int, size: int) -> list[memoryview]:
    """Adjacent slots, each full of its own number."""
    whole = memoryview(mmap.mmap(-1, count * size))
    slots = [whole[at : at + size] for at in range(0, count * size, size)]
    for number, slot in enumerate(slots):
        slot[:] = bytes([number + 1]) * size
    return slots


def ignore(size: int) -> None:
    """Of a piece."""


def image(passage: Passage) -> bytes:
    return b"".join(passage.buffers)


@pytest.mark.parametrize("way", [Straight, Staged])
def test_call_is_pages_and_slots_by_turns(way: type[Straight]) -> None:
    slots = slots_of(3, 2 * PAGE)
    passage = way(4).open(slots)
    for index, slot in enumerate(slots):
        carry(passage.slots[index], slot, len(slot), to_drive=True, after_each=ignore)
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
    carry(slots[1], passage.slots[1], len(slots[1]), to_drive=False, after_each=ignore)
    assert (bytes(slots[0]), bytes(slots[1])) == (b"\x01" * (128 << 10), b"x" * (128 << 10))


@pytest.mark.parametrize("to_drive", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_slot_is_carried_whole_and_its_payload_hashed_piece_by_piece(size: int, to_drive: bool) -> None:
    payload_bytes = size - 100
    source = memoryview(bytearray(os.urandom(size)))
    around = memoryview(bytearray(b"\x55" * (size + 2)))
    pieces: list[int] = []
    checksum = carry(around[1:-1], source, payload_bytes, to_drive=to_drive, after_each=pieces.append)
    assert checksum == xxhash.xxh3_64_intdigest(source[:payload_bytes])
    assert around[1:-1] == source
    assert (around[0], around[-1]) == (0x55, 0x55)
    assert sum(pieces) == size
    assert max(pieces) <= PIECE_BYTES


def test_padding_of_more_than_a_piece_is_no_payload() -> None:
    (slot,) = slots_of(1, 2 * PIECE_BYTES)
    assert carry(slot, slot, 100, to_drive=False, after_each=ignore) == xxhash.xxh3_64_intdigest(slot[:100])


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
