"""What only the blocking client promises: threads, forks, and what it costs to have no daemon."""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from forebay.client import BlockOutcome, Client, NamespaceSpec, PrefixHasher, SegmentTable
from forebay.kvstore.errors import BadRequest, PeerLost
from support.fake_daemon import FakeDaemon
from support.live import eventually

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(4096,))
HASHER = PrefixHasher(SPEC)


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon(capacity=1024) as daemon:
        yield daemon


def payload(seed: int, blocks: int = 6) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(1, 255, (blocks, 4096), dtype=np.uint8)


def chain(seed: int, blocks: int = 6) -> list[bytes]:
    return HASHER.hashes(range(seed * 1000, seed * 1000 + 4 * blocks))


def in_threads(count: int, work: Callable[[int], None]) -> None:
    """Run `work(0 .. count - 1)` at once; raise the first error."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:  # noqa: BLE001  # handed to the test's own thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


def in_child(work: Callable[[], None]) -> None:
    """Fork, run `work` in the child; fail unless it ended well."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:  # noqa: BLE001  # the child must end here whatever happens
            traceback.print_exc()
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    pause = threading.Event()
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return
        pause.wait(0.01)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    raise AssertionError("the child hangs")


def test_threads_share_one_client_and_one_session(fake: FakeDaemon) -> None:
    with Client(fake.runtime_dir, strict=True) as client:
        ns = client.open_namespace(SPEC)

        def work(number: int) -> None:
            for turn in range(10):
                seed = number * 100 + turn
                source, target = payload(seed), np.zeros((6, 4096), np.uint8)
                assert client.store(ns, chain(seed), source).committed == 6
                assert client.fetch(ns, chain(seed), target).blocks == 6
                assert np.array_equal(source, target)

        in_threads(6, work)
        assert client.stats().attachments == 1
        assert client.stats().fetched_blocks == 6 * 10 * 6
    assert fake.sessions_seen == 1
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_threads_that_find_no_link_attach_once(fake: FakeDaemon) -> None:
    with Client(fake.runtime_dir, budget_ms=900.0) as client:
        barrier = threading.Barrier(8)

        def work(number: int) -> None:
            barrier.wait(10)
            assert client.ping()

        in_threads(8, work)
        assert client.stats().attachments == 1


def test_threads_survive_a_restart(fake: FakeDaemon) -> None:
    """During it some calls are misses; none raises, and afterwards all is well again."""
    with Client(fake.runtime_dir, budget_ms=100.0) as client:
        ns = client.open_namespace(SPEC)
        ended = threading.Event()
        rounds = [0] * 4

        def work(number: int) -> None:
            while not ended.is_set():
                source, target = payload(number), np.zeros((6, 4096), np.uint8)
                client.store(ns, chain(number), source)
                blocks = client.fetch(ns, chain(number), target).blocks
                assert np.array_equal(target[:blocks], source[:blocks])
                rounds[number] += 1

        def disturb() -> None:
            for _ in range(3):
                goal = min(rounds) + 3
                eventually(lambda goal=goal: min(rounds) >= goal, "every thread goes on", 20)
                fake.restart()
            ended.set()

        in_threads(5, lambda number: disturb() if number == 4 else work(number))
        eventually(client.ping, "the client finds the daemon again")
        assert client.store(ns, chain(9), payload(9)).committed == 6


def test_a_forked_child_has_a_session_of_its_own(fake: FakeDaemon) -> None:
    with Client(fake.runtime_dir) as client:
        ns = client.open_namespace(SPEC)
        client.store(ns, chain(1), payload(1))
        lease = client.acquire(ns, chain(1))
        reservation = client.reserve(ns, chain(2))

        def child() -> None:
            target = np.zeros((6, 4096), np.uint8)
            lease.release()
            reservation.abort()
            assert client.fetch(ns, chain(1), target).blocks == 6
            assert np.array_equal(target, payload(1))
            assert client.store(ns, chain(3), payload(3)).committed == 6
            assert client.stats().attachments == 2
            client.close()

        in_child(child)
        assert fake.held() == (1, 1)
        assert reservation.commit() == 6
        lease.release()
        assert client.lookup(ns, chain(3)).blocks == 6
        assert client.stats().attachments == 1
    assert fake.sessions_seen == 2


def test_a_child_forked_while_another_thread_calls_is_not_stuck(fake: FakeDaemon) -> None:
    with Client(fake.runtime_dir) as client:
        ns = client.open_namespace(SPEC)
        client.store(ns, chain(1), payload(1))
        ended = threading.Event()

        def call() -> None:
            while not ended.is_set():
                client.fetch(ns, chain(1), np.zeros((6, 4096), np.uint8))

        busy = threading.Thread(target=call)
        busy.start()
        try:
            for _ in range(5):
                in_child(lambda: _check_lookup(client, ns))
        finally:
            ended.set()
            busy.join(10)


def _check_lookup(client: Client, ns: Any) -> None:
    assert client.lookup(ns, chain(1)).blocks == 6
    client.close()


def test_the_parents_death_is_seen_while_its_child_lives(fake: FakeDaemon) -> None:
    """The child must not keep the parent's session open, or its leases would live as long as the child."""
    client = Client(fake.runtime_dir)
    ns = client.open_namespace(SPEC)
    client.store(ns, chain(1), payload(1))
    client.acquire(ns, chain(1))
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        client.close()
        eventually(lambda: fake.held() == (0, 0), "the parent's lease ended")
    finally:
        os.close(writer)
        os.waitpid(pid, 0)
        os.close(reader)


def test_an_open_breaker_costs_next_to_nothing(fake: FakeDaemon) -> None:
    fake.stop()
    with Client(fake.runtime_dir, clock=lambda: 0.0) as client:
        ns = client.open_namespace(SPEC)
        hashes = chain(1)
        best = min(_seconds(lambda: client.lookup(ns, hashes)) for _ in range(200))
    assert best < 0.0005


def test_an_absent_daemon_is_found_out_within_the_budget(fake: FakeDaemon) -> None:
    fake.stop()

    def first_call() -> float:
        with Client(fake.runtime_dir) as client:
            return _seconds(client.ping)

    assert min(first_call() for _ in range(20)) < 0.005


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def test_a_daemon_that_dies_during_a_call_ends_the_wait_early(fake: FakeDaemon) -> None:
    with Client(fake.runtime_dir, strict=True, timeout_ms=30_000.0) as client:
        client.ping()
        fake.run(lambda: setattr(fake, "hanging", True))
        failures: list[PeerLost] = []

        def ask() -> None:
            with pytest.raises(PeerLost) as caught:
                client.ping()
            failures.append(caught.value)

        asking = threading.Thread(target=ask)
        asking.start()
        fake.stop()
        asking.join(10)
        assert failures


def test_options_are_checked() -> None:
    for options in ({"name": "x" * 129}, {"client_group": b"x" * 33}, {"budget_ms": 0}, {"timeout_ms": 1.0}):
        with pytest.raises(BadRequest):
            Client(**options)


def test_a_stranger_in_the_runtime_directory_is_a_miss(tmp_path: Any) -> None:
    (tmp_path / "session.sock").write_text("no socket")
    with Client(tmp_path) as client:
        ns = client.open_namespace(SPEC)
        result = client.store(ns, chain(1), SegmentTable.of(payload(1)))
        assert result.outcomes == (BlockOutcome.UNAVAILABLE,) * 6
