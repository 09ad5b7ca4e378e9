"""The scheduler's half with stand-ins for vLLM's requests and for the client: promises, leases, what is stored."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from forebay.client.hints import STOPPED_NAMES, Hints
from forebay.client.results import LookupResult
from forebay.client.vllm_layout import Geometry
from forebay.client.vllm_leases import LEASE_USE_S, LeaseDesk
from forebay.client.vllm_scheduler import VllmScheduler
from forebay.client.vllm_work import Prefill, StepWork
from forebay.kvstore.errors import BadRequest
from forebay.kvstore.planner import Backlog
from support.live import eventually

BLOCK = 16
GEOMETRY = Geometry(("a",), (64,), BLOCK, 1, ("x",), False)
WAIT_S = 5.0


class FakeLease:
    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self.released = 0

    def __len__(self) -> int:
        return self.blocks

    def release(self) -> None:
        self.released += 1


class FakeClient:
    """Holds `stored` blocks of any chain; `open_` is closed while it does not answer."""

    def __init__(self, stored: int) -> None:
        self.stored = stored
        self.open_ = threading.Event()
        self.open_.set()
        self.leases: list[FakeLease] = []
        self.asked: list[Sequence[bytes]] = []
        self.backlogs: list[Backlog] = []
        self.entered = threading.Event()
        self.error: Exception | None = None

    def lookup(self, ns: Any, hashes: Sequence[bytes], backlog: Backlog) -> LookupResult:
        self.backlogs.append(backlog)
        return LookupResult(len(hashes))

    def acquire(self, ns: Any, hashes: Sequence[bytes], ttl_ms: int = 0) -> FakeLease:
        self.entered.set()
        assert self.open_.wait(WAIT_S)
        self.asked.append(hashes)
        if self.error is not None:
            raise self.error
        lease = FakeLease(min(self.stored, len(hashes)))
        self.leases.append(lease)
        return lease

    @property
    def held(self) -> int:
        return sum(not lease.released for lease in self.leases)

    def holds(self, leases: int) -> None:
        """Wait until so many are held: the desk releases on a thread of its own."""
        eventually(lambda: self.held == leases, f"{leases} leases are held")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rig:
    def __init__(
        self, stored: int = 100, wait_s: float = WAIT_S, groups: Sequence[Geometry] = (GEOMETRY,), **options: Any
    ) -> None:
        self.client, self.clock = FakeClient(stored), Clock()
        self.desk = LeaseDesk(self.client, self.clock)
        self.scheduler = VllmScheduler(
            self.desk,
            [["ns"], ["other"]][: len(groups)],
            groups,
            wait_s=wait_s,
            give_up_s=1.0,
            clock=self.clock,
            **options,
        )

    def admit(self, request: Any, computed: int = 0) -> int:
        """One scheduling of a waiting request up to its load; returns the tokens promised."""
        tokens, asynchronous = self.scheduler.matched(request, computed)
        assert tokens is not None
        assert asynchronous == (tokens > 0)
        self.scheduler.allocated(request, (list(range(100, 200)),), tokens)
        return tokens


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.client.open_.set()
    made.scheduler.close()
    assert made.client.held == 0


def request_of(tokens: int, id_: str = "r") -> Any:
    hashes = [i.to_bytes(32, "little") for i in range(tokens // BLOCK)]
    return SimpleNamespace(request_id=id_, num_tokens=tokens, block_hashes=hashes, num_preemptions=0)


def groups_of(blocks: Any) -> Any:
    return blocks if isinstance(blocks, tuple) else (blocks,)


def step_of(new: Sequence[Any] = (), cached: Sequence[Any] = (), **scheduled: int) -> Any:
    """What the scheduler decided: new are (id, blocks, computed), cached (id, blocks or None, computed, resumed).

    Blocks are a list, or one for each cache group.
    """
    return SimpleNamespace(
        scheduled_new_reqs=[
            SimpleNamespace(req_id=i, block_ids=groups_of(b), num_computed_tokens=c) for i, b, c in new
        ],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[i for i, _, _, _ in cached],
            new_block_ids=[None if b is None else groups_of(b) for _, b, _, _ in cached],
            num_computed_tokens=[c for _, _, c, _ in cached],
            resumed_req_ids={i for i, _, _, resumed in cached if resumed},
        ),
        num_scheduled_tokens=scheduled,
    )


@pytest.mark.parametrize(("tokens", "blocks"), [(BLOCK, 0), (BLOCK + 1, 1), (4 * BLOCK, 3), (4 * BLOCK + 5, 4)])
def test_last_token_is_always_computed(rig: Rig, tokens: int, blocks: int) -> None:
    assert rig.scheduler.matched(request_of(tokens), 0)[0] == blocks * BLOCK


def test_local_hit_is_taken_from_the_argument(rig: Rig) -> None:
    request = request_of(10 * BLOCK)
    assert rig.admit(request, 3 * BLOCK) == 6 * BLOCK
    work = rig.scheduler.step(step_of())
    (part,) = work.loads[0].parts
    assert part.hashes == tuple(request.block_hashes[3:9])
    assert part.block_ids == tuple(range(103, 109))
    assert set(part.block_ids) <= work.fresh


def test_lease_is_held_from_the_promise_to_the_end_of_the_load(rig: Rig) -> None:
    rig.admit(request_of(10 * BLOCK))
    rig.scheduler.step(step_of())
    assert rig.client.held == 1
    rig.scheduler.loaded({"r"})
    assert rig.scheduler.open_leases == 0
    rig.client.holds(0)
    assert rig.scheduler.step(step_of()) == StepWork()


def test_second_call_after_the_load_loads_nothing(rig: Rig) -> None:
    """vLLM tells of the allocation twice; the second time there is nothing to load."""
    request = request_of(10 * BLOCK)
    rig.admit(request)
    rig.scheduler.step(step_of())
    rig.scheduler.allocated(request, (list(range(100, 200)),), 0)
    assert rig.scheduler.step(step_of()).loads == ()
    assert rig.client.held == 1


@pytest.mark.parametrize("when", ["asked", "promised", "allocated", "stepped"])
def test_abort_releases_the_lease_whenever_it_comes(rig: Rig, when: str) -> None:
    request = request_of(10 * BLOCK)
    if when == "asked":
        rig.client.open_.clear()
        rig.scheduler._wait_left_s = 0.0
        assert rig.scheduler.matched(request, 0) == (None, False)
        assert rig.client.entered.wait(WAIT_S)
    elif when == "promised":
        rig.scheduler.matched(request, 0)
    else:
        rig.admit(request)
        if when == "stepped":
            rig.scheduler.step(step_of())
    rig.scheduler.finished("r")
    rig.client.open_.set()
    rig.desk.close()
    assert (rig.client.held, rig.scheduler.open_leases, rig.scheduler.tracked) == (0, 0, 0)


def test_hung_daemon_is_not_known_yet_and_in_the_end_a_miss(rig: Rig) -> None:
    rig.client.open_.clear()
    rig.scheduler._wait_left_s = 0.0
    request = request_of(10 * BLOCK)
    assert rig.scheduler.matched(request, 0) == (None, False)
    rig.clock.now = 0.9
    assert rig.scheduler.matched(request, 0) == (None, False)
    rig.clock.now = 1.1
    assert rig.scheduler.matched(request, 0) == (0, False)
    assert rig.scheduler.open_leases == 0


def test_answer_that_comes_later_is_taken_then(rig: Rig) -> None:
    rig.client.open_.clear()
    rig.scheduler._wait_left_s = 0.0
    request = request_of(10 * BLOCK)
    assert rig.scheduler.matched(request, 0) == (None, False)
    rig.client.open_.set()
    answered = rig.scheduler._asked["r"].question.answered
    assert answered.wait(WAIT_S)
    assert rig.scheduler.matched(request, 0) == (9 * BLOCK, True)
    assert len(rig.client.asked) == 1


def test_hooks_of_one_step_share_the_wait() -> None:
    """However many requests wait for a daemon that hangs, a step is held up by them once."""
    rig = Rig(wait_s=0.01)
    rig.client.open_.clear()

    class Waited(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is not None
            waits.append(timeout)
            rig.clock.now += timeout
            return False

    waits: list[float] = []
    ask = rig.desk.ask

    def asked(*question_of: Any) -> Any:
        question = ask(*question_of)
        question.answered = Waited()
        return question

    rig.desk.ask = asked  # type: ignore[method-assign]
    requests = [request_of(4 * BLOCK, str(i)) for i in range(5)]
    for _ in range(2):
        assert [rig.scheduler.matched(request, 0) for request in requests] == [(None, False)] * 5
    assert waits == [0.01]
    rig.scheduler.step(step_of())
    for _ in range(2):
        assert [rig.scheduler.matched(request, 0) for request in requests] == [(None, False)] * 5
    assert waits == [0.01, 0.01], "one more, and not for the request that was waited for"
    rig.client.open_.set()
    rig.scheduler.close()


def test_error_of_the_client_is_a_miss_and_the_desk_goes_on(rig: Rig) -> None:
    rig.client.error = BadRequest("a bug")
    assert rig.scheduler.matched(request_of(10 * BLOCK), 0) == (0, False)
    rig.client.error = None
    assert rig.scheduler.matched(request_of(10 * BLOCK), 0) == (9 * BLOCK, True)


def test_request_that_waits_for_room_keeps_its_lease_until_that_is_old(rig: Rig) -> None:
    request = request_of(10 * BLOCK)
    for _ in range(3):
        assert rig.scheduler.matched(request, 0) == (9 * BLOCK, True)
    assert len(rig.client.leases) == 1
    rig.clock.now = LEASE_USE_S + 1
    assert rig.scheduler.matched(request, 0) == (9 * BLOCK, True)
    assert len(rig.client.leases) == 2
    rig.client.holds(1)


def test_longer_local_hit_asks_anew(rig: Rig) -> None:
    request = request_of(10 * BLOCK)
    rig.scheduler.matched(request, 0)
    assert rig.scheduler.matched(request, 4 * BLOCK) == (5 * BLOCK, True)
    assert len(rig.client.leases) == 2
    rig.client.holds(1)


def test_request_whose_load_failed_computes_until_it_is_preempted(rig: Rig) -> None:
    """A corrupt block would be promised for ever otherwise."""
    request = request_of(10 * BLOCK)
    rig.admit(request)
    rig.scheduler.loaded({"r"})
    assert rig.scheduler.matched(request, 0) == (0, False)
    request.num_preemptions = 1
    assert rig.scheduler.matched(request, 0) == (9 * BLOCK, True)


def test_miss_holds_nothing() -> None:
    rig = Rig(stored=0)
    assert rig.scheduler.matched(request_of(10 * BLOCK), 0) == (0, False)
    assert rig.scheduler.open_leases == 0
    rig.scheduler.close()


def test_requests_that_must_not_read_and_engines_that_only_write_ask_nobody(rig: Rig) -> None:
    request = request_of(10 * BLOCK)
    request.skip_reading_prefix_cache = True
    assert rig.scheduler.matched(request, 0) == (0, False)
    writer = Rig(loads=False)
    assert writer.scheduler.matched(request_of(10 * BLOCK), 0) == (0, False)
    writer.scheduler.close()
    assert (rig.client.asked, writer.client.asked) == ([], [])


def test_blocks_are_offered_once_they_are_whole(rig: Rig) -> None:
    rig.client.stored = 0
    request = request_of(4 * BLOCK + 3)
    assert rig.scheduler.matched(request, 0) == (0, False)
    rig.scheduler.allocated(request, ([7, 8, 9, 10, 11],), 0)
    work = rig.scheduler.step(step_of(new=[("r", [7, 8, 9, 10, 11], 0)], r=2 * BLOCK + 5))
    assert [(s.parent, s.hashes, s.block_ids) for s in work.stores] == [(b"", tuple(request.block_hashes[:2]), (7, 8))]
    assert work.fresh == {7, 8, 9, 10, 11}
    work = rig.scheduler.step(step_of(cached=[("r", None, 2 * BLOCK + 5, False)], r=2 * BLOCK - 2))
    assert [(s.parent, s.block_ids) for s in work.stores] == [(request.block_hashes[1], (9, 10))]
    request.block_hashes.append(b"e" * 32)
    work = rig.scheduler.step(step_of(cached=[("r", [12], 4 * BLOCK + 3, False)], r=BLOCK - 3))
    assert [(s.hashes, s.block_ids) for s in work.stores] == [((b"e" * 32,), (11,))]
    assert work.fresh == {12}


def test_drafted_tokens_are_not_offered(rig: Rig) -> None:
    request = request_of(BLOCK)
    rig.admit(request)
    work = rig.scheduler.step(step_of(new=[("r", [7, 8], 0)], r=2 * BLOCK))
    assert work.stores[0].block_ids == (7,)


def test_local_hits_are_offered_too_and_are_not_fresh(rig: Rig) -> None:
    request = request_of(4 * BLOCK)
    rig.admit(request, 2 * BLOCK)
    work = rig.scheduler.step(step_of(new=[("r", [7, 8, 9, 10], 3 * BLOCK)], r=BLOCK))
    assert work.stores[0].block_ids == (7, 8, 9, 10)
    assert 10 in work.fresh
    assert not {7, 8, 9} & work.fresh


def test_resumed_request_stores_out_of_its_new_blocks(rig: Rig) -> None:
    request = request_of(4 * BLOCK)
    rig.admit(request)
    rig.scheduler.step(step_of(new=[("r", [7, 8, 9, 10], 0)], r=2 * BLOCK))
    work = rig.scheduler.step(step_of(cached=[("r", [20, 21, 22, 23], 0, True)], r=4 * BLOCK))
    assert work.stores[0].block_ids == (20, 21, 22, 23)
    assert work.fresh >= {20, 21, 22, 23}


def test_reader_only_offers_nothing() -> None:
    rig = Rig(stores=False)
    rig.admit(request_of(4 * BLOCK))
    assert rig.scheduler.step(step_of(new=[("r", [7, 8, 9, 10], 0)], r=4 * BLOCK)).stores == ()
    rig.scheduler.close()


WINDOWED = Geometry(("b",), (64,), BLOCK, 1, ("x",), False, window=2 * BLOCK + 1)
"""Looks at the last three blocks at most."""


def hybrid() -> Rig:
    return Rig(groups=[GEOMETRY, WINDOWED])


def test_window_loads_only_what_the_next_token_looks_at() -> None:
    rig, request = hybrid(), request_of(10 * BLOCK)
    assert rig.scheduler.matched(request, 2 * BLOCK) == (7 * BLOCK, True)
    ids = list(range(100, 109)), [0] * 6 + [206, 207, 208]
    rig.scheduler.allocated(request, ids, 7 * BLOCK)
    work = rig.scheduler.step(step_of())
    full, window = work.loads[0].parts
    assert (full.group, full.hashes, full.block_ids) == (0, tuple(request.block_hashes[2:9]), tuple(range(102, 109)))
    assert (window.group, window.hashes, window.block_ids) == (1, tuple(request.block_hashes[6:9]), (206, 207, 208))
    assert work.fresh == {*range(102, 109), 206, 207, 208}
    rig.scheduler.loaded({"r"})
    rig.client.holds(0)
    rig.scheduler.close()


def test_window_stores_every_block_while_it_has_it() -> None:
    """What the window has left behind belongs to others: never offered, not even when all is offered anew."""
    rig, request = hybrid(), request_of(10 * BLOCK)
    rig.client.stored = 0
    assert rig.scheduler.matched(request, 0) == (0, False)
    rig.scheduler.allocated(request, ([], []), 0)

    def offered(work: StepWork) -> list[tuple[int, bytes, tuple[int, ...], bool]]:
        return [(store.group, store.parent, store.block_ids, store.orphans) for store in work.stores]

    work = rig.scheduler.step(step_of(new=[("r", ([1, 2, 3, 4], [11, 12, 13, 14]), 0)], r=4 * BLOCK))
    assert offered(work) == [(0, b"", (1, 2, 3, 4), False), (1, b"", (11, 12, 13, 14), True)]
    assert work.fresh == {1, 2, 3, 4, 11, 12, 13, 14}
    work = rig.scheduler.step(step_of(cached=[("r", ([5, 6], [15, 16]), 4 * BLOCK, False)], r=2 * BLOCK))
    names = request.block_hashes
    assert offered(work) == [(0, names[3], (5, 6), False), (1, names[3], (15, 16), True)]
    blocks = list(range(1, 9)), [0, 0, 0, 14, 15, 16, 17, 18]
    work = rig.scheduler.step(step_of(cached=[("r", blocks, 6 * BLOCK, True)], r=2 * BLOCK))
    assert offered(work) == [(0, b"", tuple(range(1, 9)), False), (1, names[2], (14, 15, 16, 17, 18), True)]
    rig.scheduler.close()


def test_local_hit_of_a_window_is_offered_from_where_it_begins() -> None:
    rig, request = hybrid(), request_of(10 * BLOCK)
    rig.client.stored = 0
    rig.scheduler.matched(request, 0)
    rig.scheduler.allocated(request, ([], []), 0)
    blocks = list(range(1, 9)), [0, 0, 0, 14, 15, 16, 17, 18]
    work = rig.scheduler.step(step_of(new=[("r", blocks, 6 * BLOCK)], r=2 * BLOCK))
    assert [store.block_ids for store in work.stores] == [tuple(range(1, 9)), (14, 15, 16, 17, 18)]
    assert work.fresh == {7, 8, 17, 18}
    rig.scheduler.close()


def test_answers_are_multiples_of_every_groups_blocks() -> None:
    wide = Geometry(("c",), (64,), 2 * BLOCK, 2, ("x",), False)
    rig = Rig(groups=[GEOMETRY, wide])
    assert rig.scheduler.matched(request_of(10 * BLOCK), 2 * BLOCK) == (6 * BLOCK, True)
    rig.client.stored = 3
    assert rig.scheduler.matched(request_of(10 * BLOCK, "other"), 2 * BLOCK) == (2 * BLOCK, True)
    for id_ in ("r", "other"):
        rig.scheduler.finished(id_)
    rig.client.holds(0)
    rig.scheduler.close()


def test_reset_moves_to_a_namespace_of_its_own(rig: Rig) -> None:
    rig.scheduler.matched(request_of(4 * BLOCK), 0)
    rig.scheduler.reset(lambda name: ["ns " + name])
    assert rig.scheduler.open_leases == 0
    rig.client.holds(0)
    name = rig.scheduler.step(step_of()).reset
    assert name
    assert rig.scheduler.step(step_of()).reset == name


@pytest.mark.parametrize(("status", "stored"), [("RUNNING", False), ("PREEMPTED", True)])
def test_what_was_computed_before_a_reset_is_not_stored_after_it(rig: Rig, status: str, stored: bool) -> None:
    """A request that goes on has blocks of the old weights; one that is preempted computes all of them again."""
    request = request_of(4 * BLOCK)
    rig.client.stored = 0
    rig.admit(request)
    rig.scheduler.step(step_of([("r", [1, 2, 3, 4], 0)], r=2 * BLOCK))
    request.status = SimpleNamespace(name=status)
    request.num_preemptions = int(status == "PREEMPTED")
    rig.scheduler.reset(lambda name: [["ns " + name]])
    resumed = step_of(cached=[("r", [1, 2, 3, 4], 0, True)], r=4 * BLOCK)
    goes_on = step_of(cached=[("r", None, 2 * BLOCK, False)], r=2 * BLOCK)
    work = rig.scheduler.step(resumed if stored else goes_on)
    assert [store.block_ids for store in work.stores] == ([(1, 2, 3, 4)] if stored else [])
    request.num_preemptions += 1
    (store,) = rig.scheduler.step(step_of([("r", [5, 6, 7, 8], 0)], r=4 * BLOCK)).stores
    assert store.block_ids == (5, 6, 7, 8)


@pytest.mark.parametrize("stored", [0, 100])
def test_blocks_that_another_connector_loads_into_are_fresh(rig: Rig, stored: int) -> None:
    """vLLM's MultiConnector tells of the allocation, not of the load; the request is not scheduled before that ends."""
    request = request_of(6 * BLOCK)
    rig.client.stored = stored
    rig.scheduler.matched(request, 2 * BLOCK)
    rig.scheduler.allocated(request, ([1, 2, 3, 4, 5],), 0)
    assert rig.scheduler.open_leases == 0
    assert rig.scheduler.step(step_of()).fresh == {3, 4, 5}
    rig.scheduler.allocated(request, ([1, 2, 3, 4, 5, 6],), 0)
    work = rig.scheduler.step(step_of([("r", [1, 2, 3, 4, 5, 6], 5 * BLOCK)], r=BLOCK))
    assert work.fresh == {6}
    assert work.stores[0].block_ids == (1, 2, 3, 4, 5, 6)


def test_the_daemon_is_told_what_is_to_be_computed_before_a_request() -> None:
    """One under way with what a step leaves of it, one that waits, less what the engine has of it; not itself."""
    rig = Rig(stored=0)
    running, cached, last = request_of(20 * BLOCK, "a"), request_of(10 * BLOCK, "b"), request_of(6 * BLOCK, "c")
    for request in (running, cached, last):
        rig.scheduler.arrived(request)
    rig.admit(running)
    rig.scheduler.step(step_of(new=[("a", list(range(20)), 0)], a=15 * BLOCK))
    assert rig.scheduler.matched(cached, 4 * BLOCK) == (0, False)
    assert rig.scheduler.matched(last, 0) == (0, False)
    assert rig.client.backlogs == [
        Backlog(2, 16 * BLOCK),
        Backlog(1, 5 * BLOCK + 6 * BLOCK),
        Backlog(1, 5 * BLOCK + 6 * BLOCK),
    ]
    for id_ in "abc":
        rig.scheduler.finished(id_)
    assert rig.scheduler.uncomputed == 0
    rig.scheduler.close()


def test_what_is_promised_is_not_to_be_computed() -> None:
    rig = Rig(stored=8)
    loading, last = request_of(10 * BLOCK, "a"), request_of(6 * BLOCK, "b")
    rig.scheduler.arrived(loading)
    rig.admit(loading)
    rig.scheduler.arrived(last)
    rig.scheduler.matched(last, 0)
    assert rig.client.backlogs[-1] == Backlog(1, 2 * BLOCK)
    for id_ in "ab":
        rig.scheduler.finished(id_)
    rig.scheduler.close()


def test_a_step_that_one_prompt_fills_is_told_as_its_prefill(rig: Rig) -> None:
    request = request_of(20 * BLOCK)
    rig.scheduler.arrived(request)
    rig.admit(request)
    step = step_of(new=[("r", list(range(20)), 5 * BLOCK)], r=10 * BLOCK, other=1)
    assert rig.scheduler.step(step).prefill == Prefill(10 * BLOCK, 5 * BLOCK)
    assert rig.scheduler.uncomputed == 1
    step = step_of(cached=[("r", None, 15 * BLOCK, False)], r=5 * BLOCK)
    assert rig.scheduler.step(step).prefill == Prefill(5 * BLOCK, 15 * BLOCK)
    assert rig.scheduler.uncomputed == 0
    assert rig.scheduler.step(step_of(cached=[("r", None, 20 * BLOCK, False)], r=1)).prefill is None
    rig.scheduler.finished("r")


def ended(rig: Rig, tokens: int, hints: Any, status: str = "FINISHED_STOPPED") -> Any:
    """A request that ran with these hints and is about to be finished."""
    request = request_of(tokens)
    request.kv_transfer_params, request.status = {"forebay": hints}, SimpleNamespace(name=status)
    rig.scheduler.allocated(request, ([0],), 0)
    rig.scheduler.ending(request)
    return request


def test_what_the_caller_knows_goes_behind_the_last_stores(rig: Rig) -> None:
    """Told once, with the names of prompt and answer; blocks that others begin with are counted in whole ones."""
    request = ended(rig, 4 * BLOCK + 5, {"done": True, "keep_tokens": 2 * BLOCK + 1})
    (ending,) = rig.scheduler.step(step_of()).endings
    assert (ending.group, ending.hashes, ending.keep) == (0, tuple(request.block_hashes), 2)
    assert ending.hints.done
    assert rig.scheduler.step(step_of()) == StepWork()


@pytest.mark.parametrize("status", ["FINISHED_ERROR", "FINISHED_IGNORED"])
def test_of_a_request_that_failed_nothing_is_told(rig: Rig, status: str) -> None:
    ended(rig, 4 * BLOCK, {"done": True}, status)
    assert rig.scheduler.step(step_of()) == StepWork()


@pytest.mark.parametrize(
    ("status", "given", "told"),
    [
        ("FINISHED_STOPPED", None, "stop"),
        ("FINISHED_STOPPED", {"stop_reason": "tool_call"}, "tool_call"),
        ("FINISHED_LENGTH_CAPPED", None, "length"),
        ("FINISHED_ABORTED", {"done": True, "stop_reason": "stop"}, "abort"),
    ],
)
def test_how_a_request_stopped_is_told_by_its_last_blocks(rig: Rig, status: str, given: Any, told: str) -> None:
    """What its caller says of the end holds only where it came."""
    request = ended(rig, 40 * BLOCK, given, status)
    (ending,) = rig.scheduler.step(step_of()).endings
    assert (ending.hints, ending.hashes) == (Hints(stop_reason=told), tuple(request.block_hashes[-STOPPED_NAMES:]))


def test_wrong_hints_are_counted_and_requests_without_any_are_not(rig: Rig) -> None:
    ended(rig, 4 * BLOCK, None)
    rig.scheduler.finished("r")
    assert rig.scheduler.take_counts() == {}
    ended(rig, 4 * BLOCK, {"done": "perhaps"})
    assert [ending.hints for ending in rig.scheduler.step(step_of()).endings] == [Hints(stop_reason="stop")] * 2
    assert (rig.scheduler.take_counts(), rig.scheduler.take_counts()) == ({"ignored_hints": 1}, {})


def test_hints_are_about_what_each_group_needs_to_go_on() -> None:
    """Of a window the last blocks alone."""
    window = Geometry(("b",), (64,), BLOCK, 1, ("x",), False, 2 * BLOCK)
    rig = Rig(groups=(GEOMETRY, window))
    ended(rig, 6 * BLOCK, {"expect_s": 3})
    endings = rig.scheduler.step(step_of()).endings
    assert [(ending.group, len(ending.hashes)) for ending in endings] == [(0, 6), (1, 2)]
    rig.scheduler.close()


def test_hints_are_not_told_of_caches_that_were_reset(rig: Rig) -> None:
    ended(rig, 4 * BLOCK, {"done": True})
    rig.scheduler.reset(lambda reset: ["private"])
    assert rig.scheduler.step(step_of()).endings == ()


def test_blocks_are_stored_with_the_priority_that_the_caller_gave(rig: Rig) -> None:
    request = request_of(4 * BLOCK)
    request.kv_transfer_params = {"forebay": {"priority": 2}}
    rig.scheduler.allocated(request, ([0, 1, 2, 3],), 0)
    (store,) = rig.scheduler.step(step_of([("r", [0, 1, 2, 3], 0)], r=4 * BLOCK)).stores
    assert (store.priority, len(store.hashes)) == (2, 4)
    assert rig.scheduler.step(step_of()).endings == ()
