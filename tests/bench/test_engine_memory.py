"""Layouts, paged memory and chains of the benchmarks."""

from __future__ import annotations

import pytest

from forebay.bench.engine_memory import BY_NAME, PAGED, Layout, Pool, chain

SMALL = Layout("small", 8192, 2)


def test_paged_layout_has_64_segments_of_32_kib() -> None:
    """32 layers, K and V apart, 16 tokens a block."""
    assert PAGED.spec.segment_bytes == (32 << 10,) * 64
    assert PAGED.spec.block_bytes == 2 << 20


@pytest.mark.parametrize("layout", BY_NAME.values(), ids=lambda layout: layout.name)
def test_layouts_are_valid_namespaces(layout: Layout) -> None:
    """The daemon would refuse another."""
    layout.spec.validate()


def test_block_ids_are_in_no_order_and_never_twice() -> None:
    """Ids 0, 1, 2, ... would make one long copy of a transfer."""
    ids = Pool(SMALL, 64 * SMALL.block_bytes).block_ids.tolist()
    assert len(ids) == len(set(ids)) == 64
    assert ids != sorted(ids)


def test_marks_are_found_again_and_only_where_they_were_made() -> None:
    """What is fetched is compared with what was stored before anything is timed."""
    pool = Pool(SMALL, 16 * SMALL.block_bytes)
    pool.mark(7)
    assert pool.marked(7)
    assert not pool.marked(8)
    pool.arrays[1][pool.block_ids[3], 0] ^= 1
    assert not pool.marked(7)
    pool.mark(7)
    pool.wipe()
    assert not pool.marked(7)


def test_same_label_gives_the_same_chain() -> None:
    """Workers fetch what another process stored."""
    assert chain("a", 3) == chain("a", 3)
    assert chain("a", 3) != chain("b", 3)
    assert [len(name) for name in chain("a", 3)] == [32, 32, 32]
