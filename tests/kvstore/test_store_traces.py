"""Published hit rates on recorded request traces, reached by the whole store and not by a simulator of it.

Source of the figures: tail-first LRU, cold start, hit = leading present blocks of a request, capacity = a share of
the trace's distinct 512-token blocks; they agree with PyPI `kvcache-simulator` to all digits. The traces are not part
of the repository; without them beside it, this is skipped.
"""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from forebay.kvstore.store import Store, StoreConfig
from support.core import BLOCK_BYTES, UID, spec

TRACES = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces"
BLOCK_TOKENS = 512


def requests_of(trace: str) -> list[dict[str, Any]]:
    path = TRACES / f"{trace}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {TRACES}: the recorded traces are not part of the repository")
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]


def replay(requests: list[dict[str, Any]], blocks: int) -> tuple[float, Store]:
    """Token hit rate in percent; every request looks up its chain and then stores what was missing."""
    ids = itertools.count(1)
    capacity = blocks * BLOCK_BYTES
    store = Store(StoreConfig(capacity, capacity), lambda: next(ids))
    store.open_session(1, UID)
    ns = store.open_namespace(1, spec()).ns
    hit = total = 0
    for request in requests:
        now, tokens = request["timestamp"] / 1000, request["input_length"]
        names = [number.to_bytes(32, "little") for number in request["hash_ids"]]
        hit += min(len(store.lookup(1, ns, names, now)) * BLOCK_TOKENS, tokens)
        total += tokens
        reserved = store.reserve(1, ns, b"", names, now)
        assert len(reserved.outcomes) == len(names)
        if reserved.reservation_id:
            store.commit(1, reserved.reservation_id, [], now)
        store.drain_effects()
    return 100 * hit / total, store


@pytest.mark.parametrize(("trace", "percent", "published"), [("conversation", 5, 19.96), ("synthetic", 10, 26.73)])
def test_store_reaches_the_published_hit_rate_of_lru_and_runs_full(trace: str, percent: int, published: float) -> None:
    requests = requests_of(trace)
    blocks = percent * len({number for request in requests for number in request["hash_ids"]}) // 100
    hit_rate, store = replay(requests, blocks)
    assert hit_rate == pytest.approx(published, abs=0.02)
    assert store.stats().tiers[0].slots_resident == blocks
    assert store.stats().counters.rejected_full_blocks == 0
    assert store.check() == []
