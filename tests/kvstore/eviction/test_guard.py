"""The shadow of LRU hits what LRU hits, and takes over where that is more."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from forebay.kvstore.eviction.guard import (
    HOLD_WINDOWS,
    JUDGED_REQUESTS,
    REQUESTS_MAX,
    REQUESTS_MIN,
    SHADOW_MAX,
    WINDOW_S,
    LruGuard,
)


def names(label: str, length: int) -> list[bytes]:
    return [hashlib.sha256(f"{label}/{at}".encode()).digest() for at in range(length)]


def ask(guard: LruGuard, window: int, present: int, requests: int = REQUESTS_MIN + 20, every_s: float = 1.0) -> None:
    """Five chains of 10 blocks in turn, within one window, of which `present` blocks each time are said to be there."""
    for number in range(requests):
        guard.request(names(str(number % 5), 10), present, window * WINDOW_S + number * every_s)


class Watched:
    """A guard that is asked every two seconds, and whose windows so are as long as `REQUESTS_MIN` requests take."""

    def __init__(self) -> None:
        self.guard, self.number = LruGuard(), 0
        self.guard.capacity_blocks = 60

    def ask(self, present: int) -> None:
        self.number += 1
        self.guard.request(names(str(self.number % 5), 10), present, 2.0 * self.number)

    def windows_held(self) -> int:
        """Do badly until LRU takes over, then as it would: for how many windows does it choose?"""
        while not self.guard.lru_ahead:
            self.ask(5)
        began = self.number
        while self.guard.lru_ahead:
            self.ask(10)
        return round((self.number - began) / REQUESTS_MIN)


def test_lru_takes_over_where_it_does_better_and_gives_back() -> None:
    """Half an hour later the other is tried again; where it fails again, an hour later."""
    watched = Watched()
    held = [watched.windows_held() for _ in range(7)]
    assert held == [HOLD_WINDOWS << times for times in (0, 1, 2, 3, 4, 5, 5)]


def test_who_does_well_meanwhile_is_given_back_his_first_chance() -> None:
    watched = Watched()
    watched.windows_held()
    for _ in range(2 * REQUESTS_MIN):
        watched.ask(10)
    assert watched.windows_held() == HOLD_WINDOWS


def test_lru_takes_over_within_a_window_where_it_does_far_better() -> None:
    """Hits lost until the window's end are not got back. But not in the first, in which nothing was learned."""
    guard = LruGuard()
    guard.capacity_blocks = 60
    ask(guard, 0, present=0, requests=JUDGED_REQUESTS + 100)
    assert not guard.lru_ahead
    guard = LruGuard()
    guard.capacity_blocks = 60
    ask(guard, 0, present=10)
    ask(guard, 1, present=0, requests=JUDGED_REQUESTS)
    assert guard.lru_ahead


def test_quiet_daemon_finds_out_as_well() -> None:
    """A request every five minutes, of which LRU would hit a block more: no window of ten minutes shows that."""
    guard = LruGuard()
    guard.capacity_blocks = 60
    ask(guard, 0, present=9, requests=REQUESTS_MIN + 1, every_s=300.0)
    assert guard.lru_ahead


def test_busy_daemon_turns_its_windows_by_requests() -> None:
    """Else what it held for half an hour would be held for millions of requests."""
    guard = LruGuard()
    guard.capacity_blocks = 60
    ask(guard, 0, present=0, requests=REQUESTS_MAX + 2, every_s=0.001)
    assert guard.lru_ahead
    ask(guard, 1, present=10, requests=(HOLD_WINDOWS + 1) * REQUESTS_MAX, every_s=0.001)
    assert not guard.lru_ahead


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
