"""`forebay record` beside a daemon that serves, and what `forebay replay` makes of the trace."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from forebay.bench.replay_run import replay
from forebay.bench.trace import Trace, read_trace
from forebay.client import Client, NamespaceSpec, PrefixHasher
from forebay.daemon import cli
from forebay.daemon.cli import Exit
from forebay.kvstore.eviction.policies import lru
from forebay.kvstore.shapes import SHAPES
from support.live import COMMAND, LiveDaemon, eventually

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=16, segment_bytes=(1 << 16,))
HASHER = PrefixHasher(SPEC)
SLAB_BYTES = 4 << 20
BLOCKS = 2 * SLAB_BYTES // (1 << 16)
END_S = 20.0


@pytest.fixture
def daemon() -> Iterator[LiveDaemon]:
    """128 blocks of memory, least recently used first: no decision of its own depends on the clock."""
    settings: dict[str, object] = {"host.slab_bytes": SLAB_BYTES, "host.eviction": "lru"}
    with LiveDaemon(settings, host_bytes=str(2 * SLAB_BYTES)) as daemon:
        yield daemon


def work(daemon: LiveDaemon, requests: int = 150, answer_blocks: int = 0) -> float:
    """Conversations of 4 blocks more each turn, as an engine asks and stores; the share of blocks that were there.

    Of these 4 so many are the last turn's answer, which is stored when the engine has given it.
    """
    chosen, turns = random.Random(1), [0] * 20
    memory = np.zeros((128, 1 << 16), np.uint8)
    hit = asked = 0
    with Client(runtime_dir=str(daemon.runtime_dir)) as client:
        ns = client.open_namespace(SPEC)
        for _ in range(requests):
            who = min(chosen.randrange(20), chosen.randrange(20))
            turns[who] = turns[who] % 10 + 1
            hashes = HASHER.hashes(range(who * 100_000, who * 100_000 + 64 * turns[who]))
            found = client.lookup(ns, hashes).blocks
            assert client.fetch(ns, hashes, memory).blocks == found
            client.store(ns, hashes, memory)
            if answer_blocks:
                length = 64 * turns[who] + 16 * answer_blocks
                client.store(ns, HASHER.hashes(range(who * 100_000, who * 100_000 + length)), memory)
            hit, asked = hit + found, asked + len(hashes)
    return hit / asked


def begin(daemon: LiveDaemon, *words: str) -> subprocess.Popen[str]:
    """`forebay record`, once it says that it does."""
    with Client(runtime_dir=str(daemon.runtime_dir)) as client:
        client.open_namespace(SPEC)
    recorder = subprocess.Popen(
        [*COMMAND, "record", "--runtime-dir", str(daemon.runtime_dir), *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    said: IO[str] | None = recorder.stderr
    assert said is not None
    assert said.readline().startswith("recording to ")
    return recorder


def token_hits(trace: Trace, warm_up: float = 0.0) -> float:
    shape = SHAPES["llama-3-70b"]
    assert trace.block_tokens == SPEC.block_tokens
    found = replay(trace, "lru", lru, BLOCKS, shape=shape, block_tokens=trace.block_tokens, warm_up=warm_up)
    return found.token_hit_percent


def prompts_of(trace: Trace) -> Trace:
    return replace(trace, requests=tuple(replace(request, answer=()) for request in trace.requests))


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_trace_replays_to_the_hit_rate_of_the_daemon(daemon: LiveDaemon, tmp_path: Path, name: str) -> None:
    """Ctrl-C ends it, with all that came before; the file is for its owner, and names no hash."""
    path = tmp_path / name
    recorder = begin(daemon, "-o", str(path), "--json")
    try:
        hit_share = work(daemon)
        recorder.send_signal(signal.SIGINT)
        answer, _ = recorder.communicate(timeout=END_S)
    finally:
        recorder.kill()
    told = json.loads(answer)
    assert (recorder.returncode, told["requests"], told["dropped"], told["ended_by"]) == (Exit.OK, 150, 0, "Ctrl-C")
    trace = read_trace(path)
    assert len(trace.requests) == 150
    assert 0.2 < hit_share < 0.9
    assert token_hits(trace) == pytest.approx(100 * hit_share, abs=1e-9)
    assert path.stat().st_mode & 0o777 == 0o600
    assert trace.unique_blocks > BLOCKS


def test_answers_that_were_stored_are_told_and_replayed(daemon: LiveDaemon, tmp_path: Path) -> None:
    """As the daemon had them: without that a replay would hit less than it did."""
    path = tmp_path / "trace.jsonl"
    recorder = begin(daemon, "-o", str(path), "--requests", "150")
    hit_share = work(daemon, 150, answer_blocks=2)
    assert recorder.wait(END_S) == Exit.OK
    recorder.communicate()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["output_length"] for line in lines[:-1]] == [32] * 149, "the last one's came after the last request"
    assert all(len(line["output_hash_ids"]) == 2 for line in lines[:-1])
    trace = read_trace(path)
    assert token_hits(trace) == pytest.approx(100 * hit_share, abs=1e-9)
    assert token_hits(prompts_of(trace)) < 100 * hit_share - 1


def test_another_simulator_reads_the_trace_too(daemon: LiveDaemon, tmp_path: Path) -> None:
    """And hits as much of the prompts, once it is full; the key that it does not know is passed over."""
    if importlib.util.find_spec("kvcache_sim") is None:
        pytest.skip("kvcache-simulator (PyPI, 0.1.3 was tried) is not installed: nothing reads the trace")
    from kvcache_sim.plan import build_execution_plan
    from kvcache_sim.policies import simulate_policy
    from kvcache_sim.trace import parse_trace_file

    path = tmp_path / "trace.jsonl.gz"
    recorder = begin(daemon, "-o", str(path), "--requests", "150")
    work(daemon, 150, answer_blocks=2)
    assert recorder.wait(END_S) == Exit.OK
    recorder.communicate()
    trace = read_trace(path)
    assert any(request.answer for request in trace.requests)
    plan = build_execution_plan(parse_trace_file(path), warmup_fraction=0.5)
    expected = 100 * simulate_policy(plan, "lru", BLOCKS).hitRate
    assert token_hits(prompts_of(trace), warm_up=0.5) == pytest.approx(expected, abs=0.0005)
    assert expected > 10


def test_two_recordings_share_no_id(daemon: LiveDaemon, tmp_path: Path) -> None:
    """The key is another each time."""
    ids = []
    for name in ("one", "two"):
        recorder = begin(daemon, "-o", str(tmp_path / name), "--requests", "5")
        work(daemon, 5)
        assert recorder.wait(END_S) == Exit.OK
        recorder.communicate()
        lines = (tmp_path / name).read_text().splitlines()
        ids.append({block for line in lines for block in json.loads(line)["hash_ids"]})
        assert len(lines) == 5
    assert ids[0].isdisjoint(ids[1])
    assert max(ids[0]) < 1 << 53


def test_a_file_no_larger_than_asked_ends_the_recording(daemon: LiveDaemon, tmp_path: Path) -> None:
    path = tmp_path / "small"
    recorder = begin(daemon, "-o", str(path), "--bytes", "1000", "--json")
    work(daemon, 40)
    answer, _ = recorder.communicate(timeout=END_S)
    assert json.loads(answer)["ended_by"] == "its size"
    assert 0 < path.stat().st_size <= 1000


def test_a_recorder_that_is_killed_costs_the_daemon_nothing(daemon: LiveDaemon, tmp_path: Path) -> None:
    recorder = begin(daemon, "-o", str(tmp_path / "one"))
    recorder.kill()
    recorder.communicate()
    eventually(lambda: daemon.store()["sessions"] == 0, "the recorder's session ends")
    assert work(daemon, 5) >= 0
    again = begin(daemon, "-o", str(tmp_path / "two"), "--seconds", "0.2")
    assert again.wait(END_S) == Exit.NEGATIVE
    again.communicate()


def test_a_file_that_is_there_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kept"
    path.write_text("mine")
    assert cli.run(["record", "-o", os.fspath(path)]) == Exit.USAGE
    assert "File exists" in capsys.readouterr().err
    assert path.read_text() == "mine"
