"""Traces that nobody recorded: each is a way in which prompts may come back, drawn by a seeded generator.

Chains of blocks of 512 tokens. They are small, a few thousand requests, so that a replay takes a second.
"""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import accumulate

from forebay.bench.trace import Request, Trace

Chain = tuple[int, ...]
Asked = tuple[float, Chain]
"""When, and which blocks."""


class _Draw(random.Random):
    """Dice, and blocks that were never seen before."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self._next = 0

    def blocks(self, least: int, most: int) -> Chain:
        count = self.randint(least, most)
        self._next += count
        return tuple(range(self._next - count, self._next))

    def ranked(self, count: int, power: float) -> Callable[[], int]:
        """Draws a rank below `count` by Zipf's law."""
        sums = list(accumulate(1 / (rank + 1) ** power for rank in range(count)))
        return lambda: bisect_left(sums, self.random() * sums[-1])


def zipf(seed: int = 1, requests: int = 3000) -> Trace:
    """Whole prompts by their popularity, without conversations."""
    draw = _Draw(seed)
    prompts, rank = [draw.blocks(2, 14) for _ in range(1500)], draw.ranked(1500, 1.0)
    return _trace("zipf", ((number / 3, prompts[rank()]) for number in range(requests)))


def scan(seed: int = 2, requests: int = 3000) -> Trace:
    """Popular prompts, and by turns long runs of documents that are read once."""
    draw = _Draw(seed)
    prompts, rank = [draw.blocks(2, 14) for _ in range(300)], draw.ranked(300, 0.9)
    return _trace(
        "scan",
        (
            (number / 2, draw.blocks(5, 40) if number // 300 % 2 and draw.random() < 0.7 else prompts[rank()])
            for number in range(requests)
        ),
    )


def single_use(seed: int = 3, requests: int = 1500) -> Trace:
    """Nothing ever comes back."""
    draw = _Draw(seed)
    return _trace("single use", ((number / 2, draw.blocks(1, 20)) for number in range(requests)))


def documents(seed: int = 4, requests: int = 3000) -> Trace:
    """Questions about shared documents after one instruction, the popular ones others every few minutes."""
    draw = _Draw(seed)
    head, texts = draw.blocks(2, 2), [draw.blocks(4, 24) for _ in range(400)]
    rank = draw.ranked(400, 0.9)
    return _trace(
        "documents",
        ((at / 2, head + texts[(rank() + at // 300 * 17) % 400] + draw.blocks(1, 2)) for at in range(requests)),
    )


def agents(seed: int = 5, sessions: int = 100) -> Trace:
    """Loops of short steps that now and then wait for a tool for minutes."""
    draw = _Draw(seed)
    heads = [draw.blocks(12, 12) for _ in range(3)]
    asked: list[Asked] = []
    for _ in range(sessions):
        at, chain = draw.random() * 5000, draw.choice(heads) + draw.blocks(2, 8)
        for _ in range(min(60, 1 + int(draw.expovariate(1 / 20)))):
            asked.append((at, chain))
            chain += draw.blocks(1, 4)
            at += draw.uniform(300, 1500) if draw.random() < 0.08 else draw.uniform(2, 8)
    return _trace("agents", asked)


def soon_or_never(pace: float = 1.0, seed: int = 6, prompts: int = 1500) -> Trace:
    """What recency likes: a prompt comes again and again soon after it came, then never. `pace` times as fast."""
    draw = _Draw(seed)
    asked: list[Asked] = []
    for _ in range(prompts):
        at, chain = draw.random() * 4 * prompts, draw.blocks(3, 12)
        for _ in range(1 + int(draw.expovariate(1 / 3))):
            asked.append((at / pace, chain))
            at += draw.expovariate(1 / 40)
    return _trace(f"soon or never, {pace:g} times as fast", asked)


def chats(pace: float = 1.0, seed: int = 7, sessions: int = 900) -> Trace:
    """Turns with a minute of thought between them. `pace` times as fast."""
    draw = _Draw(seed)
    heads = [draw.blocks(1, 4) for _ in range(10)]
    asked: list[Asked] = []
    for _ in range(sessions):
        at, chain = draw.random() * 4 * sessions, draw.choice(heads) + draw.blocks(1, 10)
        for _ in range(1 + int(draw.expovariate(1 / 4))):
            asked.append((at / pace, chain))
            chain += draw.blocks(1, 4)
            at += draw.lognormvariate(4.1, 1)
    return _trace(f"chats, {pace:g} times as fast", asked)


def bursts(seed: int = 8) -> Trace:
    """Chats, and every few minutes a batch: of prompts that begin alike, or of such as are read once."""
    draw = _Draw(seed)
    asked: list[Asked] = [(request.now_s, _blocks(request)) for request in chats(seed=seed, sessions=500).requests]
    draw.blocks(1_000_000, 1_000_000)
    for number in range(8):
        at, head = number * 300.0, draw.blocks(10, 40)
        asked += (
            (at + step / 5, head + draw.blocks(1, 3) if number % 3 else draw.blocks(5, 20)) for step in range(150)
        )
    return _trace("bursts", asked)


def turned_round(seed: int = 9) -> Trace:
    """First a loop that no cache holds, of which recency hits nothing; then what recency likes."""
    draw = _Draw(seed)
    prompts = [draw.blocks(8, 8) for _ in range(600)]
    asked: list[Asked] = [(number * 0.6, prompts[number % 600]) for number in range(1800)]
    later = soon_or_never(seed=seed, prompts=800).requests
    asked += ((1100 + each.now_s, tuple(block + 1_000_000 for block in _blocks(each))) for each in later)
    return _trace("turned round", asked)


SHAPES: dict[str, Callable[[], Trace]] = {
    "zipf": zipf,
    "scan": scan,
    "single use": single_use,
    "documents": documents,
    "agents": agents,
    "soon or never": soon_or_never,
    "soon or never, fast": lambda: soon_or_never(50.0),
    "chats": chats,
    "chats, slow": lambda: chats(1 / 40),
    "chats, fast": lambda: chats(50.0),
    "bursts": bursts,
}


def _blocks(request: Request) -> Chain:
    return tuple(int.from_bytes(name, "big") for name in request.names)


def _trace(name: str, asked: Iterable[Asked]) -> Trace:
    requests = tuple(
        Request(at, 512 * len(chain), tuple(block.to_bytes(16, "big") for block in chain))
        for at, chain in sorted(asked)
    )
    return Trace(name, requests, len({block for request in requests for block in request.names}))
