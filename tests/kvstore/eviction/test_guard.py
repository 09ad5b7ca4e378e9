"""The shadow of LRU hits what LRU hits, and takes over where that is more."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from forebay.kvstore.eviction.guard import HOLD_WINDOWS, SHADOW_MAX, WINDOW_S, LruGuard


def names(label: str, length: int) -> list[bytes]:
    return [hashlib.sha256(f"{label}/{at}".encode()).digest() for at in range(length)]


def ask(guard: LruGuard, window: int, present: int, requests: int = 40) -> None:
    """Five chains of 10 blocks in turn, within one window, of which `present` blocks each time are said to be there."""
    for number in range(requests):
        guard.request(names(str(number % 5), 10), present, window * WINDOW_S + number)


def test_lru_takes_over_where_it_does_better_and_gives_back() -> None:
    """Half an hour later the other is tried again."""
    guard = LruGuard()
    guard.capacity_blocks = 60
    ask(guard, 0, present=5)
    assert not guard.lru_ahead
    verdicts = []
    for window in range(1, HOLD_WINDOWS + 4):
        ask(guard, window, present=10)
        verdicts.append(guard.lru_ahead)
    assert verdicts[:HOLD_WINDOWS] == [True] * HOLD_WINDOWS
    assert verdicts[-1] is False


def test_as_good_as_lru_is_good_enough() -> None:
    guard = LruGuard()
    guard.capacity_blocks = 60
    for window in range(4):
        ask(guard, window, present=10)
    assert not guard.lru_ahead


def test_one_lucky_chain_is_no_reason() -> None:
    """Far more than half a point, and yet chance."""
    guard = LruGuard()
    guard.capacity_blocks = 60
    ask(guard, 0, present=10)
    guard.request(names("0", 10), 0, 100.0)
    ask(guard, 1, present=10, requests=1)
    assert not guard.lru_ahead


def test_shadow_of_a_small_cache_is_exactly_lru() -> None:
    """All blocks are followed, root last touched and so last to go."""
    guard, flat, hits = LruGuard(), OrderedDict[bytes, None](), 0
    guard.capacity_blocks = 25
    expected = 0
    for number in range(200):
        chain = names(str(number * number % 7), 3 + number % 6)
        expected += sum(name in flat for name in chain)
        for name in reversed(chain):
            flat[name] = None
            flat.move_to_end(name)
        while len(flat) > 25:
            flat.popitem(last=False)
        before = guard._ahead
        guard.request(chain, 0, 1.0)
        hits += int(guard._ahead - before)
    assert hits == expected


def test_shadow_is_bounded_and_keeps_its_measure() -> None:
    """A cache of any size is followed by no more than so many blocks, and its hits are still counted in blocks."""
    guard = LruGuard()
    guard.capacity_blocks = 10 * SHADOW_MAX
    chains = [names(f"c{number}", 50) for number in range(SHADOW_MAX // 10)]
    for chain in chains:
        guard.request(chain, 0, 1.0)
        assert len(guard._shadow) <= SHADOW_MAX
    before = guard._ahead
    for chain in chains:
        guard.request(chain, 0, 2.0)
    total = 50 * len(chains)
    assert abs(guard._ahead - before - total) < 0.1 * total
