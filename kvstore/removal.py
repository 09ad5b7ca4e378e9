"""Removal on request, in parts: a whole namespace would keep everybody else waiting for seconds.

A removal is a walk over the tree, children before parents, so that what leads to a block that stays can stay as well.
Between two parts the walk is no more than the path to where it is: for each block on it which child was passed last.
What was passed is gone, or stays and is not looked at again. Everything may change between two parts; rows are
compared by the name they had before they are used.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from forebay.kvstore.groups import Group
from forebay.kvstore.index import NO_ROW

PART_COST = 5000
"""Of one part: 10 ms at most of a slow core's time."""
DROP_COST = 10
"""To drop a block costs so many times what it costs to look at one."""


@dataclass(slots=True)
class Removal:
    """What a request has removed and kept so far; `work` does the rest of it, and tells the cost of each step."""

    dry_run: bool
    removed: int = 0
    kept: int = 0
    work: Iterator[int] = field(init=False)

    def do_part(self) -> bool:
        """Do as much as one turn may take; returns whether there is more to do."""
        left = PART_COST
        for cost in self.work:
            left -= cost
            if left <= 0:
                return True
        return False


@dataclass(slots=True)
class _Step:
    """A block on the path.

    Attributes:
        passed: its child that was passed last and is still there, or NO_ROW: the next is the sibling of that.
        leads: to a block that stays.
        removed, kept: of the whole removal, when the step was taken.
    """

    row: int
    name: bytes | None
    removed: int
    kept: int
    passed: int = NO_ROW
    passed_name: bytes | None = None
    leads: bool = False


def every_root(group: Group) -> Iterator[int]:
    """Roots of all that is there now, and NO_ROW for each other row, which costs time as well."""
    index = group.index
    parents, names = index.parents, index.hashes
    for row in range(len(names)):
        yield row if parents[row] == NO_ROW and names[row] is not None else NO_ROW


def named(group: Group, rows: Collection[int]) -> Iterator[int]:
    """These rows, the deepest first, each as long as its block has one."""
    index = group.index
    deepest = sorted(rows, key=lambda row: -index.depths[row])
    return map(index.find, [name for row in deepest if (name := index.hashes[row]) is not None])


def remove(group: Group, tops: Iterator[int], removal: Removal, *, below: bool) -> Iterator[int]:
    """Remove `tops`, of which none continues another; with `below` all that continues them, and not what leads to
    a block that is kept. Each block is one step or two, whose cost is told.

    Ends early when the namespace begins anew.
    """
    index = group.index
    for top in tops:
        if top == NO_ROW:
            yield 1
            if group.index is not index:
                return
            continue
        path = [_Step(top, index.hashes[top], removal.removed, removal.kept)]
        while path:
            yield _advance(group, path, removal) if below else _judge(group, path.pop().row, removal, leads=False)
            if group.index is not index:
                return


def _advance(group: Group, path: list[_Step], removal: Removal) -> int:
    """One step down or up; returns its cost."""
    index, here = group.index, path[-1]
    if index.hashes[here.row] is not here.name:
        path.pop()  # a tombstone that went with its last child, or evicted since the last part
        return 1
    if here.passed != NO_ROW and not _is_child(group, here):
        _begin_again(here, removal)
    child = index.child_after(here.row, here.passed)
    if child != NO_ROW:
        path.append(_Step(child, index.hashes[child], removal.removed, removal.kept))
        return 1
    path.pop()
    kept = removal.kept
    cost = _judge(group, here.row, removal, leads=here.leads or _leads_anew(group, here.row, removal))
    if path and index.hashes[here.row] is here.name:
        above = path[-1]
        above.passed, above.passed_name = here.row, here.name
        above.leads |= removal.kept > kept
    return cost


def _is_child(group: Group, here: _Step) -> bool:
    """The child that was passed last is still one; since the last part it may have been evicted, its row reused."""
    return group.index.hashes[here.passed] is here.passed_name and group.index.parents[here.passed] == here.row


def _begin_again(here: _Step, removal: Removal) -> None:
    """Where among its children the walk was cannot be told, so that what was counted of them is counted again."""
    here.passed, here.leads = NO_ROW, False
    removal.kept = here.kept
    if removal.dry_run:
        removal.removed = here.removed


def _leads_anew(group: Group, row: int, removal: Removal) -> bool:
    """Of the children that are left all were tombstones, unless one was stored since it was passed."""
    index = group.index
    return not removal.dry_run and any(index.is_resident(each) or index.holds[each] for each in index.children(row))


def _judge(group: Group, row: int, removal: Removal, *, leads: bool) -> int:
    """Remove or keep a block; a tombstone is neither. Returns the cost."""
    index = group.index
    if not index.is_resident(row) and not index.holds[row]:
        return 1
    if leads or not group.removable(row):
        removal.kept += 1
        return 1
    removal.removed += 1
    if removal.dry_run:
        return 1
    group.drop(row)
    return DROP_COST
