"""The live miss-ratio curve against exact LRU: on chains of its own making, and on recorded traces."""

from __future__ import annotations

import gzip
import json
import random
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

import pytest

from forebay.kvstore.curve import NamespaceCurve, ReuseCurve
from support.core import chain

TRACES = Path(__file__).resolve().parents[2] / ".." / "shared" / "traces"
BLOCK_BYTES = 1 << 20
PERCENTS = (1, 2, 5, 10, 20, 50)
FOREVER_S = 1e12


def exact(requests: Sequence[Sequence[bytes]], blocks: int) -> float:
    """Share of the references that LRU over so many blocks hits: leading present blocks, touched tail first."""
    present: OrderedDict[bytes, None] = OrderedDict()
    hits = 0
    for names in requests:
        hits += next((i for i, name in enumerate(names) if name not in present), len(names))
        for name in reversed(names):
            present[name] = None
            present.move_to_end(name)
        while len(present) > blocks:
            present.popitem(last=False)
    return hits / sum(map(len, requests))


def share(namespace: NamespaceCurve, blocks: float) -> float:
    return namespace.hit_blocks(blocks * BLOCK_BYTES) / namespace.references


def followed(requests: Sequence[Sequence[bytes]], **options: int) -> tuple[ReuseCurve, NamespaceCurve]:
    curve = ReuseCurve(half_life_s=FOREVER_S, **options)
    namespace = curve.open(BLOCK_BYTES)
    for names in requests:
        curve.refer(namespace, names, 0, 0.0)
    return curve, namespace


def conversations(turns: int, seed: int) -> list[list[bytes]]:
    """Turns of forty conversations under one system prompt, each longer than the last, at random."""
    draw = random.Random(seed)
    system = chain("system", 6)
    said = [0] * 40
    requests = []
    for _ in range(turns):
        who = min(int(draw.expovariate(0.1)), len(said) - 1)
        said[who] = (said[who] + draw.randint(1, 5)) % 120
        requests.append(system + chain(f"conversation {who}", said[who]))
    return requests


def test_followed_whole_the_curve_is_that_of_exact_lru() -> None:
    """Only the interpolation in age classes and between sizes is left as error."""
    requests = conversations(800, 1)
    _, namespace = followed(requests, every=1)
    for blocks in (100, 200, 400, 800, 1600):
        assert share(namespace, blocks) == pytest.approx(exact(requests, blocks), abs=0.02)


def test_what_a_request_repeats_at_once_is_hit_by_its_own_length() -> None:
    names = chain("a", 64)
    _, namespace = followed([names, names], every=1)
    assert share(namespace, 130) == pytest.approx(0.5)
    assert share(namespace, 16) < 0.2
    assert namespace.hit_depth(130 * BLOCK_BYTES) == pytest.approx(sum(range(64)))


def test_a_root_is_followed_even_where_hardly_anything_else_is() -> None:
    """Else a single system prompt would be all of the sample, or none of it."""
    system = chain("system", 1)
    requests = [system + chain(f"{number}", 1) for number in range(2000)]
    _, namespace = followed(requests, every=100)
    assert share(namespace, 100) == pytest.approx(0.5, abs=0.08)


def test_storing_makes_recent_and_counts_nothing() -> None:
    curve = ReuseCurve(every=1)
    namespace = curve.open(BLOCK_BYTES)
    curve.place(namespace, chain("a", 10), 0)
    assert namespace.references == 0
    curve.refer(namespace, chain("a", 10), 0, 0.0)
    assert share(namespace, 30) == pytest.approx(1.0)


def test_memory_is_bounded_and_the_oldest_is_forgotten() -> None:
    """Beyond the horizon hits are missed; nearer ones are found as before."""
    fresh = [chain(f"{number}", 50) for number in range(400)]
    requests = [names for number in range(400) for names in (fresh[number], fresh[max(0, number - 10)])]
    curve, namespace = followed(requests, keys_max=2000, every=1)
    assert curve.keys <= 2000
    assert share(namespace, 2000) == pytest.approx(exact(requests, 2000), abs=0.03)
    curve.refer(namespace, fresh[0], 0, 0.0)
    assert namespace.hit_blocks(1e15) == pytest.approx(exact(requests, 2000) * len(requests) * 50, rel=0.03)


def test_small_blocks_are_followed_sparsely_so_that_the_horizon_is_reached() -> None:
    curve = ReuseCurve(keys_max=1000, every=10, horizon_bytes=1 << 40)
    assert curve.open(1 << 30).every == 10
    assert curve.open(1 << 20).every == 1049


def test_namespaces_share_the_memory() -> None:
    """What another namespace asked for in between lies between a block and its reuse."""
    curve = ReuseCurve(every=1, half_life_s=FOREVER_S)
    mine, other = curve.open(BLOCK_BYTES), curve.open(4 * BLOCK_BYTES)
    curve.refer(mine, chain("a", 10), 0, 0.0)
    curve.refer(other, chain("a", 100), 0, 0.0)
    curve.refer(mine, chain("a", 10), 0, 0.0)
    assert share(mine, 300) == 0
    assert share(mine, 500) == pytest.approx(0.5)
    curve.close(other)
    assert curve.keys == 10
    curve.refer(mine, chain("a", 10), 0, 0.0)
    assert share(mine, 60) == pytest.approx(1 / 3)


def test_the_past_fades() -> None:
    curve = ReuseCurve(every=1, half_life_s=100.0)
    namespace = curve.open(BLOCK_BYTES)
    curve.refer(namespace, chain("a", 100), 0, 0.0)
    curve.refer(namespace, chain("b", 100), 0, 200.0)
    assert namespace.references == pytest.approx(125)


def test_a_request_without_blocks_is_none() -> None:
    _, namespace = followed([[]])
    assert (namespace.references, namespace.hit_blocks(1e15)) == (0, 0)


@pytest.mark.parametrize("salt", ["", "another sample"])
@pytest.mark.parametrize("trace", ["conversation", "synthetic", "agentA"])
def test_error_on_recorded_traces_is_within_one_and_a_half_points(trace: str, salt: str) -> None:
    """One block in ten followed, sizes of 1 to 50 % of the distinct blocks; whole blocks count, as in the daemon."""
    path = TRACES / f"{trace}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not in {TRACES}: the recorded traces are not part of the repository")
    with gzip.open(path) as lines:
        numbered = [json.loads(line)["hash_ids"] for line in lines]
    names = {number: sha256(f"{salt}{number}".encode()).digest() for number in set().union(*numbered)}
    requests = [[names[number] for number in numbers] for numbers in numbered]
    curve, namespace = followed(requests, every=10)
    errors = {}
    for percent in PERCENTS:
        blocks = percent * len(names) // 100
        errors[percent] = 100 * (share(namespace, blocks) - exact(requests, blocks))
    shown = ", ".join(f"{percent} %: {error:+.2f}" for percent, error in errors.items())
    print(f"{trace}: error in points {shown}; {curve.keys} blocks followed")
    assert max(map(abs, errors.values())) <= 1.5, shown
