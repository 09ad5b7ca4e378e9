"""The demonstration's verdict: what counts as having come from nvme, and what makes it fail."""

from __future__ import annotations

from typing import Any

from forebay.bench.demo_rows import HEADER, Row, failures, row_text, summarize


def row(**changed: Any) -> Row:
    given: dict[str, Any] = {
        "act": 1, "engine": "A", "chat": "calls-1", "turn": 1, "prompt_tokens": 1000, "restored_tokens": 800,
        "plain_ttft_s": 2.0, "ttft_s": 0.5, "restored_bytes": 4_000_000, "gb_per_s": 1.25, "stored_blocks": 3,
        "identical": True, "by_tier": {}, "failure": "", "question": "What?", "answer": "That.",
    }  # fmt: skip
    return Row(**given | changed)


def test_only_the_part_of_a_prefix_that_lay_on_nvme_counts_as_from_there() -> None:
    rows = [row(act=2, by_tier=tiers) for tiers in ({"nvme": 50}, {"host": 10, "nvme": 40}, {"host": 50}, {})]
    total = summarize(rows)
    assert total["nvme_tokens"] == 800 + 640
    assert (total["requests"], total["restored_tokens"], total["speed_up"]) == (4, 3200, 4.0)


def test_demonstration_fails_for_each_promise_that_was_not_kept() -> None:
    first, second = summarize([row()]), summarize([row(act=2, by_tier={"nvme": 50})])
    assert failures([first, second]) == []
    assert failures([first, summarize([row(act=2, by_tier={"host": 50})])]) == [
        "nothing came from nvme after the daemon was killed"
    ]
    assert failures([summarize([row(restored_tokens=0)]), second]) == ["no token was restored"]
    assert failures([summarize([row(identical=False)])]) == ["an output differs"]


def test_numbers_stand_under_their_heads_and_the_second_act_names_the_tier() -> None:
    first, second = row_text(row()), row_text(row(act=2, by_tier={"nvme": 50}, failure="fetch: timeout"))
    assert len(first.splitlines()[0].rstrip("yes")) == HEADER.splitlines()[-1].index("identical")
    assert second.splitlines()[2:] == [
        "         its prefix lay in: nvme (50 blocks)",
        "         not served: fetch: timeout",
    ]
