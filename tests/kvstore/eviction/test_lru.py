"""The piece-wise LRU policy is the flat, tail-first LRU list, whatever the requests are."""

from __future__ import annotations

from array import array

from hypothesis import given, settings
from hypothesis import strategies as st

from forebay.kvstore.eviction.lru import LruPolicy


class Tree:
    """Rows of a tree of blocks, the policy over them, and the flat list that it must agree with."""

    def __init__(self) -> None:
        self.parents = array("i")
        self.depths = array("i")
        self.policy = LruPolicy(self.parents, self.depths)
        self.flat: list[int] = []  # oldest first
        self.now = 0.0

    def add(self, parent: int) -> int:
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1 if parent >= 0 else 0)
        return len(self.parents) - 1

    def path(self, row: int) -> list[int]:
        """Root first."""
        rows = [row]
        while self.parents[rows[-1]] >= 0:
            rows.append(self.parents[rows[-1]])
        return rows[::-1]

    def touch_flat(self, row: int) -> None:
        for known in reversed(self.path(row)):
            if known in self.flat:
                self.flat.remove(known)
                self.flat.append(known)

    def request(self, row: int) -> None:
        self.now += 1
        self.policy.request([], self.path(row), self.now)
        self.touch_flat(row)

    def insert(self, rows: list[int]) -> None:
        self.now += 1
        self.policy.insert(rows, self.now)
        self.flat += rows
        self.touch_flat(rows[-1])

    def remove(self, row: int) -> None:
        self.policy.remove(row)
        self.flat.remove(row)

    def evictable(self, row: int) -> bool:
        return not any(self.parents[other] == row for other in self.flat)

    def check(self) -> None:
        assert list(self.policy.check(self.flat)) == []


def chain(tree: Tree, length: int, parent: int = -1) -> list[int]:
    rows = []
    for _ in range(length):
        parent = tree.add(parent)
        rows.append(parent)
    tree.insert(rows)
    return rows


def drained(tree: Tree) -> list[int]:
    """Victims until none is left."""
    order = []
    while (row := tree.policy.victim(tree.evictable)) is not None:
        tree.remove(row)
        order.append(row)
        tree.check()
    return order


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_victims_are_those_of_a_flat_list_touched_tail_first(data: st.DataObject) -> None:
    """Pieces only save work; each victim is the oldest of the flat list, over random trees of chains."""
    tree = Tree()
    for _ in range(data.draw(st.integers(1, 25))):
        known = sorted(tree.flat)
        action = data.draw(st.sampled_from(("store", "request", "evict"))) if known else "store"
        if action == "store":
            parent = data.draw(st.sampled_from([-1, *known]))
            if parent >= 0:
                tree.request(parent)
            chain(tree, data.draw(st.integers(1, 5)), parent)
        elif action == "request":
            tree.request(data.draw(st.sampled_from(known)))
        else:
            oldest = tree.flat[0]
            assert tree.policy.victim(tree.evictable) == oldest
            tree.remove(oldest)
        tree.check()
    expected = list(tree.flat)
    assert drained(tree) == expected


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_any_block_may_be_removed_at_any_time(data: st.DataObject) -> None:
    """Removal on request takes blocks out of the middle; what stays is still known exactly once."""
    tree = Tree()
    for _ in range(data.draw(st.integers(1, 4))):
        chain(tree, data.draw(st.integers(1, 6)), data.draw(st.sampled_from([-1, *sorted(tree.flat)])))
    for row in data.draw(st.permutations(sorted(tree.flat))):
        tree.remove(row)
        tree.check()
        if tree.flat:
            tree.request(data.draw(st.sampled_from(sorted(tree.flat))))
            tree.check()
    assert tree.policy.oldest_touch() is None


def test_tail_of_the_oldest_chain_goes_first() -> None:
    """A child goes before its parent, whole chains in the order of their last use."""
    tree = Tree()
    old, young = chain(tree, 3), chain(tree, 2)
    assert drained(tree) == [*old[::-1], *young[::-1]]


def test_shared_prefix_outlives_its_branches() -> None:
    """A later request splits the piece that it leaves."""
    tree = Tree()
    prefix = chain(tree, 2)
    first = chain(tree, 2, prefix[-1])
    tree.request(prefix[-1])
    second = chain(tree, 2, prefix[-1])
    assert drained(tree) == [*first[::-1], *second[::-1], *prefix[::-1]]


def test_tail_that_may_not_go_makes_its_piece_young() -> None:
    """A leased tail is in use; the next victim is looked for elsewhere, and each piece is asked once."""
    tree = Tree()
    leased, free = chain(tree, 2), chain(tree, 2)
    asked = []

    def evictable(row: int) -> bool:
        asked.append(row)
        return row not in leased and tree.evictable(row)

    assert tree.policy.victim(evictable) == free[1]
    assert asked == [leased[1], free[1]]
    tree.check()


def test_tails_that_are_being_copied_are_asked_about_once_until_copies_end() -> None:
    """A slow drive's window lies before the next victim; each of many stores must not walk over it."""
    tree = Tree()
    copied = [chain(tree, 2) for _ in range(3)]
    free = [chain(tree, 1)[0] for _ in range(3)]
    busy = {tail for _, tail in copied}
    asked = []

    def evictable(row: int) -> bool | None:
        asked.append(row)
        return None if row in busy else tree.evictable(row)

    assert tree.policy.victim(evictable) == free[0]
    tree.remove(free[0])
    assert tree.policy.victim(evictable) == free[1]
    assert asked == [copied[0][1], copied[1][1], copied[2][1], free[0], free[1]]
    busy.clear()
    tree.policy.look_again()
    assert tree.policy.victim(evictable) == copied[0][1]
    tree.check()


def test_tail_that_was_copied_meanwhile_goes_before_nobody_does() -> None:
    """Even when nobody said that copies have ended."""
    tree = Tree()
    copied, free = chain(tree, 1), chain(tree, 1)
    busy = set(copied)
    assert tree.policy.victim(lambda row: None if row in busy else True) == free[0]
    tree.remove(free[0])
    busy.clear()
    assert tree.policy.victim(lambda row: None if row in busy else True) == copied[0]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_copies_change_nothing_in_the_order_of_victims(data: st.DataObject) -> None:
    """With rows coming under copy and out of it, the victim is the first of the flat list that may go."""
    tree, busy = Tree(), set[int]()

    def evictable(row: int) -> bool | None:
        return None if row in busy else tree.evictable(row) or None

    for _ in range(data.draw(st.integers(1, 40))):
        known = sorted(tree.flat)
        action = data.draw(st.sampled_from(("store", "request", "evict", "copy", "copied"))) if known else "store"
        if action == "store":
            parent = data.draw(st.sampled_from([-1, *known]))
            if parent >= 0:
                tree.request(parent)
            chain(tree, data.draw(st.integers(1, 3)), parent)
        elif action == "request":
            tree.request(data.draw(st.sampled_from(known)))
        elif action == "copy":
            busy.add(data.draw(st.sampled_from(known)))
        elif action == "copied":
            busy.clear()
            tree.policy.look_again()
        else:
            first = next((row for row in tree.flat if evictable(row)), None)
            assert tree.policy.victim(evictable) == first
            if first is not None:
                tree.remove(first)
        tree.check()


def test_no_victim_when_nothing_may_go() -> None:
    """Asking ends after each piece was asked."""
    tree = Tree()
    for _ in range(3):
        chain(tree, 2)
    asked: list[int] = []
    assert tree.policy.victim(lambda row: bool(asked.append(row))) is None
    assert len(asked) == 3
    tree.check()


def test_finished_conversation_goes_first() -> None:
    """The hint puts the chain's own tail at the old end; a prefix that others continue stays."""
    tree = Tree()
    old = chain(tree, 2)
    prefix = chain(tree, 1)
    other = chain(tree, 1, prefix[-1])
    tree.request(prefix[-1])
    finished = chain(tree, 2, prefix[-1])
    tree.policy.demote(finished[::-1])
    tree.check()
    order = drained(tree)
    assert order[:2] == finished[::-1]
    assert order.index(other[0]) < order.index(prefix[0])
    assert set(order) == {*old, *prefix, *other, *finished}


def test_hint_about_unknown_blocks_changes_nothing() -> None:
    """A hint is never an error."""
    tree = Tree()
    rows = chain(tree, 2)
    tree.policy.demote([])
    tree.policy.demote([tree.add(-1)])
    assert drained(tree) == rows[::-1]


def test_priorities_stretch_ages() -> None:
    """A block of priority 1 goes when it is four times as old as the oldest of priority 0 is then."""
    tree = Tree()
    priorities = bytearray(100)
    tree.policy = LruPolicy(tree.parents, tree.depths, priorities)
    priorities[0] = 1
    (kept,) = chain(tree, 1)
    others = [chain(tree, 1)[0] for _ in range(9)]  # touched at 2 to 10; the first is kept while 9 / 4 < 10 - touched
    order = tree.policy.coldest(20)
    assert order == [*others[:6], kept, *others[6:]]
    assert tree.policy.oldest_touch() == 2.0
    assert drained(tree) == order


def test_a_chain_of_two_priorities_is_never_broken() -> None:
    tree = Tree()
    priorities = bytearray(10)
    tree.policy = LruPolicy(tree.parents, tree.depths, priorities)
    priorities[2] = priorities[3] = 2  # the end outlives the beginning by age, which stays for it all the same
    rows = chain(tree, 4)
    assert drained(tree) == rows[::-1]


def test_oldest_touch_is_of_the_next_victim() -> None:
    """Namespaces are compared by it."""
    tree = Tree()
    assert tree.policy.oldest_touch() is None
    first = chain(tree, 2)
    chain(tree, 2)
    assert tree.policy.oldest_touch() == 1.0
    tree.request(first[-1])
    assert tree.policy.oldest_touch() == 2.0


def test_row_used_again_for_another_block_is_a_new_block() -> None:
    """The index hands row numbers out again after a block was forgotten."""
    tree = Tree()
    first, second = chain(tree, 1), chain(tree, 1)
    tree.remove(first[0])
    tree.insert(first)
    assert drained(tree) == [second[0], first[0]]


def test_tail_that_is_being_copied_stays_where_it_is_in_the_order() -> None:
    """Passed over, it is the first to go once the copy is made."""
    tree = Tree()
    copied, other = chain(tree, 2), chain(tree, 2)
    assert tree.policy.victim(lambda row: None if row in copied else True) == other[1]
    assert tree.policy.coldest(4) == [copied[1], copied[0], other[1], other[0]]
    tree.policy.look_again()
    assert tree.policy.victim(tree.evictable) == copied[1]
    tree.check()


def test_coldest_are_those_that_would_go_next_in_their_order() -> None:
    """However few are asked for, and without changing anything."""
    tree = Tree()
    prefix = chain(tree, 2)
    first = chain(tree, 3, prefix[-1])
    tree.request(prefix[-1])
    chain(tree, 2, prefix[-1])
    everything = tree.policy.coldest(99)
    assert [tree.policy.coldest(limit) for limit in range(8)] == [everything[:limit] for limit in range(8)]
    assert everything[:3] == first[::-1]
    assert drained(tree) == everything


def test_nothing_is_coldest_in_an_empty_policy() -> None:
    assert Tree().policy.coldest(3) == []


def test_numbers_of_pieces_are_used_again() -> None:
    """Otherwise they would grow with every chain that ever came and went."""
    tree = Tree()
    for _ in range(50):
        rows = chain(tree, 2)
        tree.request(rows[0])
        drained(tree)
    assert len(tree.policy._numbered) <= 2
    tree.check()
