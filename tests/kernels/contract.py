"""What every set of kernels promises (`CudaKernels`), as tests to inherit: a subclass provides the fixture `rig`.

The oracle is a loop over slices of numpy arrays, and the checksums' is the xxhash library. Everything that a kernel may
write lies between bytes that must stay as they were.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.kernels.layouts import GUARD_BYTES, Case, cases, layers, line
from tests.kernels.memories import Bytes, Memory, Region

from forebay.kernels import reference
from forebay.kernels.layout import CHECKSUM_BLOCK_BYTES_MIN, WIDTHS, Table, sums_of

POISON = 0xA5
POISONED_WORD = 0xA5A5A5A5A5A5A5A5
EXAMPLES = 60
TILE_BYTES = 4096
LENGTH_MAX = 70_000

# differing_executors: each subclass runs the same tests over its own kernels.
drawn = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow]
)


def edges() -> list[int]:
    """Lengths of blocks at the borders of stripes (to 5 KiB), of sums and of tiles, and one to either side."""
    near = [*range(256, 5 << 10, 64), *range(1024, LENGTH_MAX, 1024)]
    lengths = {length + step for length in near for step in (-1, 0, 1)} | {CHECKSUM_BLOCK_BYTES_MIN}
    return sorted(length for length in lengths if length >= CHECKSUM_BLOCK_BYTES_MIN)


@dataclass(frozen=True)
class Rig:
    """Kernels, and the memories on both sides.

    Attributes:
        tables: where the kernels' arguments and results lie.
    """

    kernels: Any
    paged: Memory
    slots: Memory
    tables: Memory


class Call:
    """The two sides of a case, placed in memory, with all that a kernel is given."""

    def __init__(self, rig: Rig, case: Case, paged: Bytes, slots: Bytes) -> None:
        self.rig, self.case = rig, case
        self.blocks = len(case.block_ids)
        self.before = paged, slots
        self.paged, self.slots = rig.paged.place(paged), rig.slots.place(slots)
        layout = case.at(self.paged.address)
        self._packed = rig.tables.place(layout.packed().view(np.uint8))
        self._ids = self._numbers(case.block_ids)
        self._places = self._numbers([self.slots.address + slot for slot in case.slots])
        self._table = Table(self._packed.address, layout)
        self.sums = self._poisoned(self.blocks * sums_of(case.block_bytes) * 64)
        self._checksums = self._poisoned(self.blocks * 8)

    def copy(self, name: str, *, sums: bool = False, stream: int = 0) -> None:
        """`gather` or `scatter`."""
        call = getattr(self.rig.kernels, name)
        arguments = self._table, self._ids.address, self._places.address, self.blocks
        call(*arguments, sums=self.sums.address + GUARD_BYTES if sums else 0, stream=stream, **self._shape())
        self.rig.tables.synchronize()

    def read(self) -> None:
        sums = self.sums.address + GUARD_BYTES
        self.rig.kernels.read(self._table, self._ids.address, self.blocks, sums=sums, **self._shape())
        self.rig.tables.synchronize()

    def checksums(self) -> list[int]:
        """`finish`, from the sums that were made."""
        places = {"sums": self.sums.address + GUARD_BYTES, "checksums": self._checksums.address + GUARD_BYTES}
        self.rig.kernels.finish(self._table, self._ids.address, self.blocks, **places)
        self.rig.tables.synchronize()
        _between_guards(self.sums)
        checksums: list[int] = _between_guards(self._checksums).view(np.uint64).tolist()
        return checksums

    def payloads(self) -> list[bytes]:
        """What the blocks hold in the paged memory now."""
        memory = self.paged.read()
        return [b"".join(memory[a:b].tobytes() for a, b in self.case.pieces(block)) for block in self.case.block_ids]

    def expected_checksums(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(payload) for payload in self.payloads()]

    def _shape(self) -> dict[str, int]:
        return {"width": self.case.width, "multiprocessors": self.case.multiprocessors}

    def _numbers(self, numbers: list[int]) -> Region:
        return self.rig.tables.place(np.array(numbers, np.uint64).view(np.uint8))

    def _poisoned(self, size: int) -> Region:
        return self.rig.tables.place(np.full(GUARD_BYTES + size + GUARD_BYTES, POISON, np.uint8))


class KernelContract:
    @pytest.mark.parametrize("width", WIDTHS)
    @drawn
    @given(data=st.data())
    def test_gather_fills_each_slot_and_nothing_else(self, rig: Rig, width: int, data: st.DataObject) -> None:
        case = data.draw(cases(width))
        call = gathering(rig, case)
        call.copy("gather")
        assert_gathered(call)

    @pytest.mark.parametrize("width", WIDTHS)
    @drawn
    @given(data=st.data())
    def test_scatter_writes_each_block_and_nothing_else(self, rig: Rig, width: int, data: st.DataObject) -> None:
        case = data.draw(cases(width, unique=True))
        call = scattering(rig, case)
        call.copy("scatter")
        assert_scattered(call)

    @pytest.mark.parametrize("width", WIDTHS)
    @drawn
    @given(data=st.data())
    def test_gather_makes_checksums_of_what_it_copies(self, rig: Rig, width: int, data: st.DataObject) -> None:
        case = data.draw(cases(width, checksummed=True))
        call = gathering(rig, case)
        call.copy("gather", sums=True)
        assert_gathered(call)
        assert call.checksums() == call.expected_checksums()

    @pytest.mark.parametrize("width", WIDTHS)
    @drawn
    @given(data=st.data())
    def test_scatter_makes_checksums_of_what_it_copies(self, rig: Rig, width: int, data: st.DataObject) -> None:
        case = data.draw(cases(width, unique=True, checksummed=True))
        call = scattering(rig, case)
        call.copy("scatter", sums=True)
        assert_scattered(call)
        assert call.checksums() == call.expected_checksums()

    @pytest.mark.parametrize("width", WIDTHS)
    @drawn
    @given(data=st.data())
    def test_read_makes_checksums_and_writes_nothing(self, rig: Rig, width: int, data: st.DataObject) -> None:
        case = data.draw(cases(width, checksummed=True))
        call = gathering(rig, case)
        call.read()
        assert call.checksums() == call.expected_checksums()
        assert_unchanged(call.slots, call.before[1])
        assert_unchanged(call.paged, call.before[0])

    @drawn
    @given(length=st.integers(CHECKSUM_BLOCK_BYTES_MIN, LENGTH_MAX), blocks=st.integers(1, 9))
    def test_checksums_are_those_of_the_library_at_any_length(self, rig: Rig, length: int, blocks: int) -> None:
        """Four blocks share the warp that finishes them; any number of blocks has one that is not full."""
        call = gathering(rig, line(length, 1, blocks=blocks, seed=length))
        call.read()
        assert call.checksums() == call.expected_checksums()

    @pytest.mark.parametrize("width", WIDTHS)
    def test_checksums_are_those_of_the_library_at_every_edge(self, rig: Rig, width: int) -> None:
        """Around whole stripes, sums and tiles: where the last stripe, the last scramble and the last tile move on."""
        lengths = sorted({-(-length // width) * width for length in edges()})
        wrong = []
        for length in lengths:
            call = gathering(rig, line(length, width, seed=length))
            call.read()
            if call.checksums() != call.expected_checksums():
                wrong.append(length)
        assert not wrong
        assert len(lengths) > 100

    @pytest.mark.parametrize("blocks", [1, 3, 40])
    @pytest.mark.parametrize("sums", [False, True])
    @pytest.mark.parametrize("width", WIDTHS)
    @pytest.mark.parametrize("name", ["gather", "scatter"])
    def test_grid_of_any_size_copies_everything(self, rig: Rig, name: str, width: int, sums: bool, blocks: int) -> None:
        """One multiprocessor walks many tiles; many leave warps without any."""
        for multiprocessors in (1, 2, 0):
            case = replace(line(9 * 1024 + 48, width, blocks=blocks, seed=blocks), multiprocessors=multiprocessors)
            call = PREPARED[name](rig, case)
            call.copy(name, sums=sums)
            ASSERTED[name](call)
            assert not sums or call.checksums() == call.expected_checksums()

    @pytest.mark.parametrize(("segments", "segment_bytes"), [(64, 32 << 10), (61, 16 * 1152)], ids=["llama", "mla"])
    @pytest.mark.parametrize("name", ["gather", "scatter"])
    def test_shapes_of_engines(self, rig: Rig, name: str, segments: int, segment_bytes: int) -> None:
        """Keys and values of 32 layers, 16 tokens a block; and the latents of 61 layers."""
        call = PREPARED[name](rig, layers(segments, segment_bytes))
        call.copy(name, sums=True)
        ASSERTED[name](call)
        assert call.checksums() == call.expected_checksums()

    @pytest.mark.parametrize("segment_bytes", [TILE_BYTES - 16, TILE_BYTES, TILE_BYTES + 16, 2 * TILE_BYTES])
    @pytest.mark.parametrize("name", ["gather", "scatter"])
    def test_segments_around_a_tile(self, rig: Rig, name: str, segment_bytes: int) -> None:
        """A tile within one segment is copied without looking for the next one."""
        call = PREPARED[name](rig, layers(3, segment_bytes))
        call.copy(name, sums=True)
        ASSERTED[name](call)
        assert call.checksums() == call.expected_checksums()

    @pytest.mark.parametrize("name", ["gather", "scatter"])
    def test_no_blocks_are_no_work(self, rig: Rig, name: str) -> None:
        case = line(4096, 16)
        call = gathering(rig, case)
        call.blocks = 0
        call.copy(name, sums=True)
        call.read()
        assert call.checksums() == [POISONED_WORD]
        assert_unchanged(call.slots, call.before[1])
        assert_unchanged(call.paged, call.before[0])
        assert (call.sums.read() == POISON).all()

    def test_hash_of_zero_is_told_as_one(self, rig: Rig) -> None:
        """0 stands for "not known" wherever checksums are kept."""
        call = gathering(rig, line(256, 16))
        call.sums = rig.tables.place(np.concatenate([_guard(), sums_of_zero(call.payloads()[0]), _guard()]))
        assert call.checksums() == [1]


def gathering(rig: Rig, case: Case) -> Call:
    return Call(rig, case, _noise(case.paged_bytes, case.seed), np.full(case.slots_bytes, POISON, np.uint8))


def scattering(rig: Rig, case: Case) -> Call:
    return Call(rig, case, np.full(case.paged_bytes, POISON, np.uint8), _noise(case.slots_bytes, case.seed))


def assert_gathered(call: Call) -> None:
    """Each slot holds its block; no other byte of either side has changed."""
    paged, slots = call.before
    expected = slots.copy()
    for block, slot in zip(call.case.block_ids, call.case.slots, strict=True):
        at = slot
        for first, last in call.case.pieces(block):
            expected[at : at + last - first] = paged[first:last]
            at += last - first
    assert_unchanged(call.slots, expected)
    assert_unchanged(call.paged, paged)


def assert_scattered(call: Call) -> None:
    """Each block holds its slot's bytes; no other byte of either side has changed."""
    paged, slots = call.before
    expected = paged.copy()
    for block, slot in zip(call.case.block_ids, call.case.slots, strict=True):
        at = slot
        for first, last in call.case.pieces(block):
            expected[first:last] = slots[at : at + last - first]
            at += last - first
    assert_unchanged(call.paged, expected)
    assert_unchanged(call.slots, slots)


def assert_unchanged(region: Region, expected: Bytes) -> None:
    found = region.read()
    different = np.flatnonzero(found != expected)
    assert not len(different), f"{len(different)} bytes differ, the first at {different[0]} of {len(expected)}"


PREPARED = {"gather": gathering, "scatter": scattering}
ASSERTED = {"gather": assert_gathered, "scatter": assert_scattered}


def sums_of_zero(payload: bytes) -> Bytes:
    """Sums that make the hash of this payload of at most 1 KiB zero; found backwards from the last step of XXH3.

    The hash is an invertible function of `length * prime + sum of the four products`: with factors 1 and x in the first
    and 0 in the others, x is what must be there.
    """
    mask = (1 << 64) - 1
    wanted = [1, -len(payload) * reference._PRIME64_1 & mask, 0, 0, 0, 0, 0, 0]
    last = np.frombuffer(payload[-64:], "<u8").tolist()
    sums = []
    for lane, value in enumerate(wanted):
        mixed = last[lane] ^ reference._word(121 + 8 * lane)
        stripe = (mixed & 0xFFFFFFFF) * (mixed >> 32) + last[lane ^ 1]
        sums.append(((value ^ reference._word(11 + 8 * lane)) - stripe - reference._INITIAL[lane]) & mask)
    assert reference.finished(np.array([sums], np.uint64), payload) == 0
    return np.array(sums, np.uint64).view(np.uint8)


def _between_guards(region: Region) -> Bytes:
    found = region.read()
    guards = np.concatenate([found[:GUARD_BYTES], found[-GUARD_BYTES:]])
    assert (guards == POISON).all(), "written beside the results"
    return found[GUARD_BYTES:-GUARD_BYTES]


def _guard() -> Bytes:
    return np.full(GUARD_BYTES, POISON, np.uint8)


def _noise(size: int, seed: int) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
