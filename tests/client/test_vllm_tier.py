"""The vLLM tier: what its scheduler may rely on, with a daemon of the real protocol, and the cases of vLLM's fs tier.

vLLM's own types are used where vLLM is installed, small stand-ins elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.client import tier_jobs
from forebay.kvstore.errors import BadRequest, LayoutError, Timeout
from forebay.transports.messages import Verb
from support import fake_vllm
from support.fake_daemon import FakeDaemon
from support.live import eventually

fake_vllm.install()

from vllm.v1.kv_offload.base import LookupResult, Medium, ReqContext, ScheduleEndContext  # noqa: E402
from vllm.v1.kv_offload.tiering.base import TransferJob  # noqa: E402

from forebay.client.vllm_tier import ForebayTier  # noqa: E402

ROWS, ROW_BYTES = 8, 256
CTX = ReqContext(req_id="r")
STEP = ScheduleEndContext(new_req_ids=[], preempted_req_ids=())
HIT, MISS, RETRY = LookupResult.HIT, LookupResult.MISS, LookupResult.RETRY


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with FakeDaemon(capacity=256) as fake:
        yield fake


class Engine:
    """A primary tier of random rows and our tier beneath it."""

    def __init__(self, daemon: FakeDaemon, *, spec: Any = None, seed: int = 0, **options: Any) -> None:
        self.rows = np.random.default_rng(seed).integers(1, 127, (ROWS, ROW_BYTES), dtype=np.int8)
        options = {"runtime_dir": str(daemon.runtime_dir), **options}
        self.tier = ForebayTier(spec or fake_vllm.spec(), memoryview(self.rows), "forebay", **options)

    def job(
        self, number: int, keys: Sequence[bytes], rows: Sequence[int], *, ctx: Any = CTX, load: bool = False
    ) -> Any:
        return TransferJob(number, keys, np.array(rows), load, ctx)

    def store(self, number: int, keys: Sequence[bytes], rows: Sequence[int], *, ctx: Any = CTX) -> Any:
        self.tier.submit_store(self.job(number, keys, rows, ctx=ctx))
        return self.only()

    def load(self, number: int, keys: Sequence[bytes], rows: Sequence[int], *, ctx: Any = CTX) -> Any:
        self.tier.submit_load(self.job(number, keys, rows, ctx=ctx, load=True))
        return self.only()

    def only(self) -> Any:
        self.tier.drain_jobs()
        (result,) = self.tier.get_finished_jobs()
        return result

    def look(self, keys: Sequence[bytes], ctx: Any = CTX) -> list[Any]:
        """The verdicts once they are known."""
        first = [self.tier.lookup(key, ctx) for key in keys]
        if RETRY not in first:
            return first
        self.tier.on_schedule_end(STEP)
        self.tier.drain_jobs()
        return [self.tier.lookup(key, ctx) for key in keys]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        self.tier.shutdown()


def key(number: int, group: int = 0) -> bytes:
    return number.to_bytes(32, "big") + group.to_bytes(4, "big")


KEYS = [key(number) for number in range(4)]


def held_back(daemon: FakeDaemon) -> threading.Event:
    """Keep the daemon's thread busy, from now on until the event is set, 10 s at most."""
    begun, release = threading.Event(), threading.Event()

    def hold() -> None:
        begun.set()
        release.wait(10)

    daemon._tasks.put(hold)
    os.eventfd_write(daemon._wake, 1)
    assert begun.wait(10)
    return release


# --- the cases of vLLM's test_fs_tier.py ----------------------------------------------------------------------


def test_empty_tier_misses(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        assert engine.look(KEYS) == [MISS] * 4


def test_stored_chunks_hit(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        result = engine.store(7, KEYS, [0, 1, 2, 3])
        assert (result.job_id, result.success, result.transfer_bytes) == (7, True, 4 * ROW_BYTES)
        assert engine.look([*KEYS, key(9)]) == [HIT] * 4 + [MISS]


def test_store_corrects_the_verdict_of_requests_that_asked_before(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        assert engine.look(KEYS[:1]) == [MISS]
        engine.store(1, KEYS[:1], [0], ctx=ReqContext(req_id="other"))
        assert engine.tier.lookup(KEYS[0], CTX) is HIT


def test_round_trip_to_other_rows(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        before = engine.rows.copy()
        engine.store(1, KEYS, [3, 1, 2, 0])
        engine.rows[:] = 0
        assert engine.load(2, KEYS, [4, 5, 6, 7]).success
        assert np.array_equal(engine.rows[4:], before[[3, 1, 2, 0]])
        assert not engine.rows[:4].any(), "a row that was not asked for was written"


def test_chunk_of_another_writer_counts_as_stored(daemon: FakeDaemon) -> None:
    with Engine(daemon) as one, Engine(daemon, seed=1) as two:
        assert one.store(1, KEYS[:2], [0, 1]).success
        assert two.store(1, KEYS, [0, 1, 2, 3]).success
        assert two.load(2, KEYS[:1], [7]).success
        assert np.array_equal(two.rows[7], one.rows[0])


def test_load_of_what_is_not_there_fails(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        result = engine.load(1, KEYS, [0, 1, 2, 3])
        assert (result.success, result.successful_keys) == (False, None)


def test_jobs_are_told_one_by_one(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        for number in range(4):
            engine.tier.submit_store(engine.job(number, [KEYS[number]], [number]))
        engine.tier.drain_jobs()
        assert sorted(result.job_id for result in engine.tier.get_finished_jobs()) == [0, 1, 2, 3]
        assert not engine.tier.get_finished_jobs()


def test_partial_load_keeps_what_came(daemon: FakeDaemon) -> None:
    """The rest is a miss for the request that asked, and a new request asks anew."""
    with Engine(daemon) as engine:
        engine.store(1, KEYS, [0, 1, 2, 3])
        assert engine.look(KEYS) == [HIT] * 4
        lost = engine.tier._jobs._client
        lost.evict(engine.tier._jobs._ns, list(daemon.run(lambda: list(daemon.namespace().blocks)))[2:3])
        result = engine.load(2, KEYS, [4, 5, 6, 7])
        assert not result.success
        assert tuple(result.successful_keys) == (KEYS[0], KEYS[1], KEYS[3])
        assert [engine.tier.lookup(each, CTX) for each in KEYS] == [HIT, HIT, MISS, HIT]
        assert engine.look(KEYS, ReqContext(req_id="fresh")) == [HIT, HIT, MISS, HIT]


def test_corrupt_chunk_is_a_miss_and_removed(daemon: FakeDaemon) -> None:
    """Or the request would be promised it for ever, and nobody could store a right one."""
    with Engine(daemon, verify="load") as engine:
        engine.store(1, KEYS, [0, 1, 2, 3])
        assert engine.look(KEYS) == [HIT] * 4

        def damage() -> None:
            space = daemon.namespace()
            space.write(list(space.blocks.values())[1], b"\x7e" * ROW_BYTES)

        daemon.run(damage)
        result = engine.load(2, KEYS, [4, 5, 6, 7])
        assert tuple(result.successful_keys) == (KEYS[0], KEYS[2], KEYS[3])
        assert engine.tier.lookup(KEYS[1], CTX) is MISS
        assert daemon.run(lambda: len(daemon.namespace().blocks)) == 3
        assert engine.store(3, [KEYS[1]], [1]).success
        assert engine.load(4, [KEYS[1]], [4]).success


def test_passing_failure_leaves_the_chunk(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        engine.store(1, KEYS[:1], [0])
        assert engine.look(KEYS[:1]) == [HIT]
        daemon.run(lambda: daemon.fail.update({Verb.ACQUIRE: Timeout("later")}))
        assert not engine.load(2, KEYS[:1], [4]).success
        assert engine.tier.lookup(KEYS[0], CTX) is MISS
        daemon.run(daemon.fail.clear)
        assert engine.look(KEYS[:1], ReqContext(req_id="fresh")) == [HIT]


def test_failed_load_of_a_finished_request_leaves_a_newer_question_alone(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        newer = ReqContext(req_id="newer")
        engine.tier.submit_load(engine.job(2, KEYS[:1], [1], load=True))
        engine.tier.on_request_finished(CTX)
        assert engine.tier.lookup(KEYS[0], newer) is RETRY
        assert not engine.only().success
        assert engine.tier.lookup(KEYS[0], newer) is MISS


def test_shutdown_gives_up_what_is_queued(daemon: FakeDaemon) -> None:
    engine = Engine(daemon)
    engine.store(0, KEYS[:1], [0])
    release = held_back(daemon)
    for number in range(1, 20):
        engine.tier.submit_store(engine.job(number, [key(100 + number)], [number % ROWS]))
    lane = engine.tier._jobs._writing
    releasing = threading.Thread(
        target=lambda: (
            eventually(lambda: lane._closed and not lane._tasks, "what is queued is given up"),
            release.set(),
        )
    )
    releasing.start()
    begun = time.monotonic()
    engine.tier.shutdown()
    releasing.join(20)
    assert time.monotonic() - begun < 5
    outcomes = {result.job_id: result.success for result in engine.tier.get_finished_jobs()}
    assert set(outcomes) == set(range(1, 20)), "every job is told of"
    assert list(outcomes.values()).count(True) <= 1
    engine.tier.submit_store(engine.job(20, KEYS, [0, 1, 2, 3]))
    assert [result.success for result in engine.tier.get_finished_jobs()] == [False]


@pytest.mark.parametrize("rows", [[0, 1, 2, ROWS], [-1, 0, 1, 2]])
def test_row_out_of_bounds_fails_the_job_alone(daemon: FakeDaemon, rows: list[int]) -> None:
    with Engine(daemon) as engine:
        assert not engine.store(1, KEYS, rows).success
        assert not engine.load(2, KEYS, rows).success
        assert engine.store(3, KEYS, [0, 1, 2, 3]).success


def test_events_tell_what_was_stored(daemon: FakeDaemon) -> None:
    spec = fake_vllm.spec(events=True)
    with Engine(daemon, spec=spec, enable_kv_events=True, locality="REMOTE") as engine:
        engine.store(1, KEYS[:2], [0, 1])
        engine.load(2, KEYS[:2], [4, 5])
        assert not engine.store(3, KEYS, [0, 1, 2, ROWS]).success
        (event,) = engine.tier.take_events()
        assert (event.keys, event.medium, event.removed) == (KEYS[:2], Medium.CPU, False)
        assert event.locality.value == "REMOTE"
        assert not engine.tier.take_events()


@pytest.mark.parametrize(("events", "enabled"), [(True, False), (False, True)])
def test_events_need_both_switches(daemon: FakeDaemon, events: bool, enabled: bool) -> None:
    with Engine(daemon, spec=fake_vllm.spec(events=events), enable_kv_events=enabled) as engine:
        engine.store(1, KEYS, [0, 1, 2, 3])
        assert not engine.tier.take_events()


# --- the scheduler's side -------------------------------------------------------------------------------------


def test_scheduler_never_waits_for_a_hung_daemon(daemon: FakeDaemon) -> None:
    """Every call returns at once while the daemon answers nothing."""
    with Engine(daemon, timeout_ms=2000) as engine:
        engine.store(0, KEYS, [0, 1, 2, 3])
        release = held_back(daemon)
        begun = time.perf_counter()
        assert engine.tier.lookup(KEYS[0], CTX) is RETRY
        engine.tier.on_schedule_end(STEP)
        engine.tier.submit_load(engine.job(1, KEYS, [4, 5, 6, 7], load=True))
        engine.tier.submit_store(engine.job(2, [key(9)], [0]))
        engine.tier.touch(KEYS, CTX)
        assert engine.tier.lookup(KEYS[0], CTX) is RETRY
        assert not engine.tier.get_finished_jobs()
        took = time.perf_counter() - begun
        release.set()
        assert took < 0.1
        engine.tier.drain_jobs()
        assert [result.success for result in engine.tier.get_finished_jobs()] == [True, True]


def test_scheduler_pays_little_for_a_thousand_chunks(daemon: FakeDaemon) -> None:
    """What one request costs the scheduler's thread: its first lookups, the question sent, its second lookups."""
    keys, took = [key(number) for number in range(1000)], []
    with Engine(daemon) as engine:
        for number in range(30):
            ctx = ReqContext(req_id=str(number))
            begun = time.perf_counter()
            for each in keys:
                engine.tier.lookup(each, ctx)
            engine.tier.on_schedule_end(STEP)
            asked = time.perf_counter() - begun
            engine.tier.drain_jobs()
            begun = time.perf_counter()
            assert all(engine.tier.lookup(each, ctx) is MISS for each in keys)
            took.append(asked + time.perf_counter() - begun)
            engine.tier.on_request_finished(ctx)
    took.sort()
    print(
        f"1 000 chunks, both rounds of lookups: median {took[15] * 1e3:.2f} ms, slowest of 30 {took[-1] * 1e3:.2f} ms"
    )
    assert took[15] < 0.05


def test_full_queue_fails_at_once(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lookup becomes a miss, a job a failed job; nothing grows without bound."""
    monkeypatch.setattr(tier_jobs, "QUEUE_JOBS_MAX", 2)
    with Engine(daemon, timeout_ms=5000) as engine:
        engine.store(0, KEYS, [0, 1, 2, 3])
        release = held_back(daemon)
        for number in range(1, 6):
            engine.tier.submit_load(engine.job(number, KEYS, [4, 5, 6, 7], load=True))
        failed = [result.job_id for result in engine.tier.get_finished_jobs()]
        engine.tier.lookup(KEYS[0], CTX)
        engine.tier.on_schedule_end(STEP)
        verdict = engine.tier.lookup(KEYS[0], CTX)
        release.set()
        assert set(failed) >= {4, 5}
        assert verdict is MISS
        engine.tier.drain_jobs()


def test_no_more_is_promised_than_the_plan_says_is_worth_loading(daemon: FakeDaemon) -> None:
    """Of a window, whose last chunks are wanted, all that is stored."""
    groups = tuple(
        GROUP(tokens_per_block=16, layer_names=("layer",), group_id=number, sliding_window_size_in_chunks=window)
        for number, window in ((0, None), (1, 2))
    )
    windows = [key(number, group=1) for number in range(2)]
    spec = fake_vllm.spec(groups=groups)
    with Engine(daemon, spec=spec) as engine, Engine(daemon, spec=spec, plan="always") as eager:
        engine.store(1, KEYS, [0, 1, 2, 3])
        engine.store(2, windows, [4, 5])
        for worth in (3, 0):
            daemon.worth = worth
            found = engine.look([*KEYS, *windows], ReqContext(req_id=f"{worth}"))
            assert found == [HIT] * worth + [MISS] * (4 - worth) + [HIT] * 2
        assert eager.look([*KEYS, *windows]) == [HIT] * 6
    with Engine(daemon, spec=spec, plan="never") as never:
        asked = len(daemon.requests)
        assert never.look([*KEYS, *windows]) == [MISS] * 6
        assert len(daemon.requests) == asked


def test_chain_goes_on_what_the_request_found(daemon: FakeDaemon) -> None:
    """The daemon then evicts the end of a conversation before its beginning."""
    with Engine(daemon) as engine:
        engine.store(1, KEYS[:2], [0, 1])
        later = ReqContext(req_id="later")
        assert engine.look(KEYS, later) == [HIT, HIT, MISS, MISS]
        engine.store(2, KEYS[2:], [2, 3], ctx=later)
        reserves = daemon.run(lambda: [r for _, r in daemon.requests if r.verb == Verb.RESERVE])
        assert reserves[-1].parent == reserves[0].blob[32:64]


def test_a_thousand_requests_leave_nothing_behind(daemon: FakeDaemon) -> None:
    """Some are aborted while their jobs are queued, and most find the daemon full."""
    with Engine(daemon) as engine:
        jobs = 0
        for number in range(1000):
            ctx = ReqContext(req_id=str(number))
            engine.tier.on_new_request(ctx)
            engine.tier.lookup(key(number), ctx)
            engine.tier.on_schedule_end(STEP)
            engine.tier.submit_store(engine.job(2 * number, [key(number)], [number % ROWS], ctx=ctx))
            engine.tier.submit_load(engine.job(2 * number + 1, [key(number)], [0], ctx=ctx, load=True))
            if number % 3:
                engine.tier.drain_jobs()
            jobs += len(list(engine.tier.get_finished_jobs()))
            engine.tier.on_request_finished(ctx)
        engine.tier.drain_jobs()
        assert jobs + len(list(engine.tier.get_finished_jobs())) == 2000
        jobs_left = engine.tier._jobs
        assert (jobs_left._requests, jobs_left._askers, jobs_left._unasked, engine.tier._keys) == ({}, {}, {}, {})
        eventually(lambda: daemon.held() == (0, 0), "no lease and no reservation is held")


def test_dead_daemon_is_misses_and_failed_jobs(daemon: FakeDaemon) -> None:
    with Engine(daemon) as engine:
        engine.store(1, KEYS, [0, 1, 2, 3])
        daemon.stop()
        assert engine.look(KEYS) == [MISS] * 4
        assert not engine.load(2, KEYS, [4, 5, 6, 7]).success
        assert not engine.store(3, KEYS, [0, 1, 2, 3]).success


def test_engine_starts_without_a_daemon(tmp_path: Any) -> None:
    rows = np.zeros((ROWS, ROW_BYTES), np.int8)
    tier = ForebayTier(fake_vllm.spec(), memoryview(rows), "forebay", runtime_dir=str(tmp_path))
    tier.lookup(KEYS[0], CTX)
    tier.on_schedule_end(STEP)
    tier.drain_jobs()
    assert tier.lookup(KEYS[0], CTX) is MISS
    tier.shutdown()


def test_shutdown_lets_go_of_the_engines_memory(daemon: FakeDaemon) -> None:
    """vLLM unmaps it then."""
    memory = bytearray(ROWS * ROW_BYTES)
    view = memoryview(memory).cast("b", (ROWS, ROW_BYTES))
    tier = ForebayTier(fake_vllm.spec(), view, "forebay", runtime_dir=str(daemon.runtime_dir))
    tier.shutdown()
    del tier
    view.release()
    memory.clear()
    assert not memory


# --- namespaces and options -----------------------------------------------------------------------------------

GROUP = type(fake_vllm.spec().config.groups[0])
APART: list[dict[str, Any]] = [
    {"name": "other"},
    {"dtype": "bfloat16"},
    {"tokens_per_hash": 32},
    {"blocks_per_chunk": 2},
    {"tp_size": 2},
    {"pp_size": 2},
    {"dcp_size": 2},
    {"replicated_layout": True},
    {"canonical_layout": True},
    {"kv_cache_layout": "LBNHC"},
    {"worker_kv_bytes_per_block": 128},
    {"groups": (GROUP(tokens_per_block=16, layer_names=("other",), group_id=0, sliding_window_size_in_chunks=None),)},
]


@pytest.mark.parametrize("changed", APART, ids=repr)
def test_what_makes_chunks_incompatible_keeps_them_apart(daemon: FakeDaemon, changed: dict[str, Any]) -> None:
    with Engine(daemon) as one, Engine(daemon, spec=fake_vllm.spec(**changed)) as other:
        assert one.store(1, KEYS, [0, 1, 2, 3]).success
        assert other.look(KEYS) == [MISS] * 4


def test_revisions_and_groups_are_apart(daemon: FakeDaemon) -> None:
    with Engine(daemon, revision="1") as one, Engine(daemon, revision="2") as other:
        assert one.store(1, KEYS, [0, 1, 2, 3]).success
        assert other.look(KEYS) == [MISS] * 4
        assert one.look([key(0, group=1)]) == [MISS]


@pytest.mark.parametrize(
    "options",
    [
        {"budgetms": 3},
        {"timeout_ms": "3"},
        {"copy_threads": True},
        {"revision": 3},
        {"enable_kv_events": "yes"},
        {"locality": "local"},
    ],
    ids=repr,
)
def test_wrong_options_stop_the_engine(options: dict[str, Any]) -> None:
    rows = np.zeros((ROWS, ROW_BYTES), np.int8)
    with pytest.raises(BadRequest):
        ForebayTier(fake_vllm.spec(), memoryview(rows), "forebay", **options)


def test_the_guides_options_are_taken_as_printed(daemon: FakeDaemon) -> None:
    guide = (Path(__file__).resolve().parents[2] / "docs" / "engines.md").read_text()
    flags = re.findall(r"--kv-transfer-config '(\{.*?\})'", guide, flags=re.DOTALL)
    (tier,) = json.loads(flags[1])["kv_connector_extra_config"]["secondary_tiers"]
    assert (tier.pop("module_path"), tier.pop("type")) == (ForebayTier.__module__, ForebayTier.__name__)
    with Engine(daemon, **tier) as engine:
        assert engine.store(1, KEYS, range(4)).success
        assert engine.look(KEYS) == [HIT] * 4


def test_memory_that_cannot_be_copied_stops_the_engine() -> None:
    rows = np.zeros((ROWS, ROW_BYTES), np.int8)
    for view in (memoryview(rows).toreadonly(), memoryview(rows[:, : ROW_BYTES // 2]), memoryview(rows.ravel())):
        with pytest.raises(LayoutError):
            ForebayTier(fake_vllm.spec(), view, "forebay")


def test_a_bug_fails_one_job_and_the_tier_goes_on(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: object) -> list[bool]:
        raise RuntimeError("a bug")

    with Engine(daemon) as engine:
        engine.store(0, KEYS, [0, 1, 2, 3])
        with monkeypatch.context() as patched:
            patched.setattr(tier_jobs.scattered, "fetch_each", bug)
            assert not engine.load(1, KEYS, [4, 5, 6, 7]).success
        assert engine.load(2, KEYS, [4, 5, 6, 7]).success


def test_a_bug_in_a_lookup_is_a_miss_not_an_endless_retry(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM asks again in each step for as long as it is told to."""

    def bug(*_: object) -> list[bool]:
        raise RuntimeError("a bug")

    with Engine(daemon) as engine:
        engine.store(0, KEYS, [0, 1, 2, 3])
        with monkeypatch.context() as patched:
            patched.setattr(tier_jobs.scattered, "worth_loading", bug)
            assert engine.look(KEYS) == [MISS] * 4
        assert engine.look(KEYS, ReqContext(req_id="later")) == [HIT] * 4


def test_shutdown_tells_of_a_copy_that_still_uses_the_engines_memory(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM keeps its memory mapped when a tier's shutdown raises, and unmaps it otherwise."""
    entered, release = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> list[bool]:
        entered.set()
        release.wait(10)
        return [False] * len(arguments[2])

    monkeypatch.setattr(tier_jobs, "DRAIN_S", 0.05)
    monkeypatch.setattr(tier_jobs.scattered, "fetch_each", slow)
    engine = Engine(daemon)
    engine.tier.submit_load(engine.job(1, KEYS, [0, 1, 2, 3], load=True))
    assert entered.wait(10)
    with pytest.raises(Timeout, match="memory"):
        engine.tier.shutdown()
    release.set()
    engine.tier.shutdown()


def test_finished_jobs_cost_no_walk_over_the_other_requests(daemon: FakeDaemon) -> None:
    """Only the verdicts that a job changes are touched, however many requests there are."""

    class Counted(dict[bytes, Any]):
        touched = 0

        def update(self, *given: Any, **named: Any) -> None:
            Counted.touched += 1
            super().update(*given, **named)

        def __setitem__(self, name: bytes, value: Any) -> None:
            Counted.touched += 1
            super().__setitem__(name, value)

        def keys(self) -> Any:
            Counted.touched += 1
            return super().keys()

    with Engine(daemon) as engine:
        jobs = engine.tier._jobs
        for number in range(200):
            jobs._requests[str(number)] = tier_jobs._Request(verdicts=Counted())
            engine.tier.lookup(key(number), ReqContext(req_id=str(number)))
        Counted.touched = 0
        engine.store(1, [key(7)], [0], ctx=ReqContext(req_id="other"))
        assert Counted.touched == 1
        assert engine.tier.lookup(key(7), ReqContext(req_id="7")) is HIT
