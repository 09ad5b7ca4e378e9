"""A daemon asked what a trace asks hits what the replay of the trace hits."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from pathlib import Path

import pytest

from forebay.bench.live_replay import Comparison, compare, first_of, main, told
from forebay.bench.trace import Request, Trace


def talks(seed: int, requests: int) -> Trace:
    """Conversations with a few prompts in common, each turn up to three blocks longer than the last, one abandoned now
    and then; a request a second."""
    choose = random.Random(seed)  # a trace, not a secret
    open_talks: list[list[str]] = []
    made = []
    for at in range(requests):
        if len(open_talks) < 30 or choose.random() < 0.15:
            open_talks.append([f"prompt {choose.randrange(4)}.{block}" for block in range(3)])
        talk = open_talks.pop(choose.randrange(len(open_talks)))
        talk += [f"{at}.{block}" for block in range(choose.randint(1, 3))]
        if len(talk) < 24:
            open_talks.append(talk)
        names = tuple(hashlib.sha256("/".join(talk[: end + 1]).encode()).digest() for end in range(len(talk)))
        made.append(Request(float(at), 512 * len(names) - 100, names))
    return Trace("talks", tuple(made), len({name for request in made for name in request.names}))


@pytest.mark.parametrize(("policy", "seconds", "points"), [("lru", 0.0, 1e-9), ("hazard", 5.0, 1.5)])
def test_a_daemon_hits_what_the_replay_hits(tmp_path: Path, policy: str, seconds: float, points: float) -> None:
    """By recency, which no time changes, to the token; by what is learned of ages as near as so few requests allow."""
    seen = []
    done = compare(
        talks(5, 900), 15.0, tmp_path / "run", policy=policy, seconds=seconds, progress=lambda at, _: seen.append(at)
    )
    assert (done.unanswered, done.wrong) == (0, 0), told(done)
    assert done.occupancy is not None, "memory was never full, so nothing was compared"
    assert done.occupancy >= 0.97
    assert 10 < done.live_percent < 95
    assert abs(done.live_percent - done.replay_percent) <= points
    assert sum(done.outcomes.values()) == sum(len(request.names) for request in talks(5, 900).requests)
    assert seen == list(range(1, 901))


GOOD = Comparison(10, 100, 20.0, 20.4, 0.98, 0, 0, 0.01, {"stored": 7})


@pytest.mark.parametrize(
    "bad",
    [{"live_percent": 19.8}, {"occupancy": 0.96}, {"unanswered": 1}, {"wrong": 1}],
)
def test_what_misses_its_target_fails(bad: dict[str, float]) -> None:
    assert GOOD.ok
    assert told(GOOD).endswith("ok")
    assert not replace(GOOD, **bad).ok  # type: ignore[arg-type]
    assert told(replace(GOOD, **bad)).endswith("FAILS")  # type: ignore[arg-type]


def test_the_beginning_of_a_trace_is_a_trace() -> None:
    whole = talks(1, 50)
    part = first_of(whole, 3)
    assert part.requests == whole.requests[:3]
    assert part.unique_blocks == len({name for request in part.requests for name in request.names})


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.jsonl"
    path.write_text("nothing\n")
    assert main([str(path)]) == 2
    assert "no request of a trace" in capsys.readouterr().err
