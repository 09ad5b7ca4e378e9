"""The block index: leading complete blocks, tombstones, shards, and a second tier."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.index import NO_ROW, NO_SLOT, BlockIndex
from support.core import chain


def add_chain(index: BlockIndex, names: list[bytes], parent: int = NO_ROW) -> list[int]:
    """Rows, committed in every rank of tier 0; row number serves as slot number."""
    rows = []
    for name in names:
        parent = index.add(name, parent)
        for rank in range(index.shard_size):
            index.reserve(parent, 0, rank, parent, 1)
            index.commit(parent, 0, rank)
        rows.append(parent)
    return rows


def remove(index: BlockIndex, row: int, tier: int = 0) -> list[tuple[int, int]]:
    dropped = index.vacate(row, tier)
    index.forget_if_empty(row)
    return dropped


def check(index: BlockIndex) -> None:
    assert list(index.check()) == []


def test_walk_stops_at_the_first_block_that_is_absent() -> None:
    index = BlockIndex(1)
    names = chain("a", 3)
    rows = add_chain(index, names)
    assert list(index.walk(names)) == rows
    assert list(index.walk([*names[:2], b"other" * 4, names[2]])) == rows[:2]
    assert list(index.walk([b"other" * 4, *names])) == []
    assert list(index.walk([])) == []


@pytest.mark.parametrize("length", [63, 64, 65, 319, 320, 321, 2000])
def test_walk_of_any_length_is_exact(length: int) -> None:
    """It goes in growing strides; no stride's border may lose or invent a block."""
    index = BlockIndex(1)
    names = chain("a", length)
    rows = add_chain(index, names)
    for present in {0, 1, length // 2, length - 1, length}:
        assert list(index.walk([*names[:present], b"absent"])) == rows[:present]


def test_uncommitted_block_is_invisible() -> None:
    index = BlockIndex(1)
    row = index.add(b"x", NO_ROW)
    index.reserve(row, 0, 0, 5, 1)
    assert list(index.walk([b"x"])) == []
    assert index.reserved_slot(row, 0, 0) == 5
    assert index.slot(row, 0, 0) == NO_SLOT
    index.commit(row, 0, 0)
    assert list(index.walk([b"x"])) == [row]
    assert index.slot(row, 0, 0) == 5
    assert index.reserved_slot(row, 0, 0) == NO_SLOT
    check(index)


def test_block_is_complete_when_its_last_shard_is_committed() -> None:
    """Complete, or a miss."""
    index = BlockIndex(3)
    row = index.add(b"x", NO_ROW)
    for rank in (2, 0, 1):
        assert list(index.walk([b"x"])) == []
        index.reserve(row, 0, rank, 10 + rank, 1)
        assert index.commit(row, 0, rank) == (rank == 1)
        check(index)
    assert list(index.walk([b"x"])) == [row]
    assert index.slots([row], 0, 2).tolist() == [12]


def test_vacated_block_is_a_miss_and_names_its_slots() -> None:
    index = BlockIndex(2)
    (row,) = add_chain(index, [b"x"])
    assert remove(index, row) == [(0, row), (1, row)]
    assert index.find(b"x") == NO_ROW
    assert len(index) == 0
    check(index)


def test_block_removed_from_the_middle_stays_as_a_tombstone() -> None:
    """Storing it again makes what continues it reachable again."""
    index = BlockIndex(1)
    names = chain("a", 3)
    rows = add_chain(index, names)
    remove(index, rows[1])
    assert list(index.walk(names)) == rows[:1]
    assert index.find(names[1]) == rows[1]
    assert not index.is_resident(rows[1])
    check(index)
    index.reserve(rows[1], 0, 0, 9, 4)
    index.commit(rows[1], 0, 0)
    assert list(index.walk(names)) == rows
    check(index)


def test_tombstones_go_with_the_last_block_below_them() -> None:
    """Otherwise the index would grow without bound."""
    index = BlockIndex(1)
    rows = add_chain(index, chain("a", 5))
    for row in rows[:-1]:
        remove(index, row)
    assert len(index) == 5
    remove(index, rows[-1])
    assert len(index) == 0
    assert list(index.rows()) == []
    check(index)


def test_aborted_chain_leaves_nothing_behind() -> None:
    index = BlockIndex(1)
    rows = []
    for name in chain("a", 4):
        rows.append(index.add(name, rows[-1] if rows else NO_ROW))
        index.reserve(rows[-1], 0, 0, len(rows), 1)
    for row in (rows[1], rows[0], rows[3], rows[2]):
        index.abort(row, 0, 0)
        check(index)
    assert len(index) == 0


def test_forgotten_row_is_used_again_clean() -> None:
    """Nothing of the block before may show through."""
    index = BlockIndex(1)
    (parent,) = add_chain(index, [b"p"])
    row = index.add(b"x", parent)
    index.reserve(row, 0, 0, 77, 5)
    index.abort(row, 0, 0)
    again = index.add(b"y", NO_ROW)
    assert again == row
    assert (index.parents[again], index.depths[again], index.holds[again]) == (NO_ROW, 0, 0)
    assert not index.has_child(parent)
    assert not index.has_child(again)
    assert index.slot(again, 0, 0) == index.reserved_slot(again, 0, 0) == NO_SLOT


def test_children_are_listed_whichever_of_them_went() -> None:
    index = BlockIndex(1)
    (parent,) = add_chain(index, [b"p"])
    children = [add_chain(index, [bytes([n])], parent)[0] for n in range(4)]
    for gone in (1, 3, 0, 2):
        left = {child for child in children if index.hashes[child] is not None}
        assert set(index.children(parent)) == left
        remove(index, children[gone])
        check(index)
    assert not index.has_child(parent)


def test_subtrees_are_the_roots_and_all_below_them() -> None:
    index = BlockIndex(1)
    trunk = add_chain(index, chain("a", 3))
    branch = add_chain(index, chain("b", 2), trunk[1])
    other = add_chain(index, chain("c", 1))
    assert index.subtrees([trunk[2], trunk[1]]) == {trunk[1], trunk[2], *branch}
    assert index.subtrees([]) == set()
    assert index.subtrees([*other, trunk[0]]) == {*trunk, *branch, *other}


def test_subtrees_of_a_whole_chain_take_one_walk() -> None:
    """Evicting a long chain by prefix names each of its blocks; walking below each would be quadratic."""
    index = BlockIndex(1)
    rows = add_chain(index, chain("a", 3000))
    visits = []
    children = index.children

    def counted(row: int) -> object:
        visits.append(row)
        return children(row)

    index.children = counted  # type: ignore[method-assign, assignment]
    assert index.subtrees(reversed(rows)) == set(rows)
    assert len(visits) == len(rows)


def test_check_is_linear_in_the_number_of_siblings() -> None:
    """A system prompt has as many children as there are conversations."""
    index = BlockIndex(1)
    (parent,) = add_chain(index, [b"p"])
    children = [add_chain(index, [bytes(2) + n.to_bytes(4, "big")], parent)[0] for n in range(500)]
    visits = 0
    real = index.children

    def counted(row: int) -> object:
        nonlocal visits
        for child in real(row):
            visits += 1
            yield child

    index.children = counted  # type: ignore[method-assign, assignment]
    check(index)
    assert visits == len(children)


def test_generations_are_those_of_the_time_of_writing() -> None:
    index = BlockIndex(1)
    row = index.add(b"x", NO_ROW)
    index.reserve(row, 0, 0, 3, 41)
    index.commit(row, 0, 0)
    assert index.generations([row], 0).tolist() == [41]


def test_block_in_a_second_tier_stays_complete_when_the_first_is_vacated() -> None:
    """A demotion: committed in tier 1, then taken out of tier 0."""
    index = BlockIndex(2, tiers=2)
    (row,) = add_chain(index, [b"x"])
    assert index.count_by_tier([row]) == [1, 0]
    for rank in range(2):
        index.reserve(row, 1, rank, 100 + rank, 1)
        assert list(index.walk([b"x"])) == [row]
        assert not index.commit(row, 1, rank)
        check(index)
    assert remove(index, row, 0) == [(0, row), (1, row)]
    assert list(index.walk([b"x"])) == [row]
    assert index.count_by_tier([row]) == [0, 1]
    assert index.slots([row], 1, 1).tolist() == [101]
    check(index)
    assert remove(index, row, 1) == [(0, 100), (1, 101)]
    assert len(index) == 0


def test_slowest_shard_decides_the_tier_of_a_block() -> None:
    index = BlockIndex(2, tiers=2)
    row = index.add(b"x", NO_ROW)
    for rank, tier in ((0, 0), (1, 1)):
        index.reserve(row, tier, rank, 1, 1)
        index.commit(row, tier, rank)
    assert list(index.walk([b"x"])) == [row]
    assert index.count_by_tier([row]) == [0, 1]
    check(index)


def test_vacating_one_of_two_tiers_of_one_shard_makes_the_block_partial() -> None:
    index = BlockIndex(2, tiers=2)
    row = index.add(b"x", NO_ROW)
    for rank, tier in ((0, 0), (1, 1)):
        index.reserve(row, tier, rank, 1, 1)
        index.commit(row, tier, rank)
    assert remove(index, row, 0) == [(0, 1)]
    assert list(index.walk([b"x"])) == []
    assert index.is_resident(row)
    check(index)


def test_check_names_what_is_wrong() -> None:
    """A check that cannot fail guards nothing."""
    index = BlockIndex(1)
    rows = add_chain(index, chain("a", 2))
    index._missing[rows[0]] = 1
    assert list(index.check())
    index._missing[rows[0]] = 0
    check(index)
    index._first_child[rows[0]] = NO_ROW
    assert list(index.check())


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 399)), max_size=6), st.integers(0, 2), st.integers(0, 400))
@settings(max_examples=60, deadline=None)
def test_walk_finds_what_looking_up_block_by_block_finds(
    removed: list[tuple[int, int]], asked: int, length: int
) -> None:
    """Whether a chain's rows lie in one run or not, and wherever blocks of it are missing."""
    index = BlockIndex(1)
    chains = [[b"%d/%d" % (number, position) for position in range(400)] for number in range(3)]
    above = [NO_ROW, NO_ROW]
    for pair in zip(chains[0], chains[1], strict=True):  # block by block in turn: neither is a run
        above = [add_chain(index, [name], parent)[0] for name, parent in zip(pair, above, strict=True)]
    add_chain(index, chains[2])
    for number, position in removed:
        row = index.find(chains[number][position])
        if row != NO_ROW and index.is_resident(row):
            remove(index, row)
    wanted = [*chains[asked][:length], b"absent"]
    present = list(itertools.takewhile(index.complete.__contains__, wanted))
    assert list(index.walk(wanted)) == [index.complete[name] for name in present]
    check(index)


# --- found on disk -------------------------------------------------------------------------------------------------


def adopt(index: BlockIndex, *found: tuple[bytes, bytes, int, int], rank: int = 0) -> list[int]:
    """Rows of shards found in the second tier."""
    rows, _ = index.adopt_all(found, 1, rank)
    check(index)
    return rows


def test_found_chain_is_complete_and_linked_whatever_came_first() -> None:
    a, b, c = names = chain("a", 3)
    shards = [(a, b"", 0, 10), (b, a, 1, 11), (c, b, 2, 12)]
    for order in itertools.permutations(shards):
        index = BlockIndex(1, tiers=2)
        adopt(index, *order)
        rows = [index.find(name) for name in names]
        assert list(index.walk(names)) == rows
        assert index.slots(rows, 1, 0).tolist() == [10, 11, 12]
        assert [index.parents[row] for row in rows] == [NO_ROW, *rows[:2]]
        assert [index.depths[row] for row in rows] == [0, 1, 2]
        assert [index.holds[row] for row in rows] == [0, 0, 0]
        assert index.doubled == 0


def test_found_branches_are_all_children_of_their_parent() -> None:
    index = BlockIndex(1, tiers=2)
    parent, *rows = adopt(index, (b"p", b"", 0, 0), *((bytes([n]), b"p", 1, n + 1) for n in range(5)))
    assert set(index.children(parent)) == set(rows)
    remove(index, rows[2], 1)
    adopt(index, (b"new", b"p", 1, 9), (b"other", b"p", 1, 10))
    assert len(set(index.children(parent))) == 6


def test_found_blocks_take_unused_rows_first() -> None:
    index = BlockIndex(1, tiers=2)
    rows = add_chain(index, chain("a", 2))
    for row in reversed(rows):
        remove(index, row)
    assert sorted(adopt(index, (b"x", b"", 0, 0), (b"y", b"x", 1, 1), (b"z", b"y", 2, 2))) == [0, 1, 2]


def test_parent_not_found_is_a_tombstone_until_it_is() -> None:
    index = BlockIndex(1, tiers=2)
    (row,) = adopt(index, (b"c", b"p", 1, 0))
    parent = index.parents[row]
    assert index.loose == [parent]
    assert not index.is_resident(parent)
    assert adopt(index, (b"p", b"", 0, 1)) == [parent]
    assert list(index.walk([b"p", b"c"])) == [parent, row]


def test_contradiction_leaves_nothing_behind() -> None:
    index = BlockIndex(1, tiers=2)
    adopt(index, (b"p", b"", 0, 0), (b"c", b"p", 1, 1))
    lies = [
        (b"c", b"unknown", 1, 5),
        (b"c", b"unknown", 4, 5),
        (b"c", b"", 0, 5),
        (b"p", b"c", 2, 5),
        (b"p", b"unknown", 1, 5),
        (b"x", b"x", 1, 5),
        (b"x", b"p", 3, 5),
        (b"x", b"", 3, 5),
        (b"x", b"p", 0, 5),
        (b"x", b"unknown", 1 << 31, 5),
        (b"c", b"p", 1, 5),
    ]
    for lie in lies:
        assert adopt(index, lie) == [NO_ROW]
    assert len(index) == 2


def test_found_shards_of_several_ranks_make_a_block_complete_together() -> None:
    index = BlockIndex(2, tiers=2)
    rows, fresh = index.adopt_all([(b"x", b"", 0, 3)], 1, 0)
    assert (fresh, list(index.walk([b"x"]))) == (rows, [])
    check(index)
    again, fresh = index.adopt_all([(b"x", b"", 0, 4)], 1, 1)
    assert (again, fresh, list(index.walk([b"x"]))) == (rows, [], rows)
    check(index)


def test_children_are_walked_one_by_one_the_newest_first() -> None:
    index = BlockIndex(1)
    (top,) = add_chain(index, [b"top"])
    children = [index.add(name, top) for name in (b"a", b"b", b"c")]
    walked = [index.child_after(top, NO_ROW)]
    while (child := index.child_after(top, walked[-1])) != NO_ROW:
        walked.append(child)
    assert walked == children[::-1]
    assert index.child_after(children[0], NO_ROW) == NO_ROW


def test_topmost_are_those_that_continue_no_other() -> None:
    index = BlockIndex(1)
    rows = add_chain(index, [b"a", b"b", b"c", b"d", b"e"])
    side = index.add(b"side", rows[1])
    assert index.topmost(set()) == []
    assert set(index.topmost({rows[2], rows[4], side})) == {rows[2], side}
    assert index.topmost({rows[1], rows[4], side}) == [rows[1]]
    assert index.topmost(set(rows) | {side}) == [rows[0]]


def test_block_in_both_tiers_counts_as_doubled_until_it_leaves_one() -> None:
    index = BlockIndex(1, tiers=2)
    (row,) = add_chain(index, [b"x"])
    assert adopt(index, (b"x", b"", 0, 7)) == [row]
    assert index.doubled == 1
    assert (index.is_in(row, 0), index.is_whole_in(row, 1), index.count_by_tier([row])) == (True, True, [1, 0])
    remove(index, row, 0)
    assert index.doubled == 0
    assert index.count_by_tier([row]) == [0, 1]
    check(index)


def test_block_on_its_way_to_a_tier_names_the_slot_it_is_given() -> None:
    index = BlockIndex(1, tiers=2)
    (row,) = adopt(index, (b"x", b"", 0, 7))
    index.reserve(row, 0, 0, 5, 9)
    assert index.is_coming_to(row, 0)
    assert (index.slots([row], 0, 0).tolist(), index.generations([row], 0).tolist()) == ([5], [9])
    index.abort(row, 0, 0)
    assert not index.is_coming_to(row, 0)
    assert list(index.walk([b"x"])) == [row]
