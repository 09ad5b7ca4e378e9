"""What only the blocking client promises: threads, forks, and what it costs to have no daemon."""

from __future__ import annotations

import gc
import os
import resource
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgpack
import numpy as np
import pytest

from forebay.client import BlockOutcome, Client, FetchResult, NamespaceSpec, PrefixHasher, SegmentTable
from forebay.client.copier import CopyPlan, NumpyCopier
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


# --- threads that wait for blocks that are still being read -------------------------------------------------------


class Fetch(threading.Thread):
    """Fetches a chain on a thread of its own; tells the result, the bytes, and what processor time that took."""

    def __init__(self, client: Client, ns: Any, seed: int) -> None:
        super().__init__()
        self.target = np.zeros((6, 4096), np.uint8)
        self.result = FetchResult()
        self.cpu_s = 0.0
        self._ask = lambda: client.fetch(ns, chain(seed), self.target)
        self.start()

    def run(self) -> None:
        begun = time.thread_time()
        self.result = self._ask()
        self.cpu_s = time.thread_time() - begun

    def ended(self) -> FetchResult:
        self.join(20)
        assert not self.is_alive()
        return self.result


@pytest.fixture
def waiting(fake: FakeDaemon) -> Iterator[tuple[Client, Any]]:
    """A client and its namespace with 6 blocks of each of the chains 1 to 4, two of which are in memory."""
    with Client(fake.runtime_dir, timeout_ms=20_000.0) as client:
        ns = client.open_namespace(SPEC)
        for seed in range(1, 5):
            assert client.store(ns, chain(seed), payload(seed)).committed == 6
        fake.ready_max = 2
        yield client, ns
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_each_thread_is_told_of_its_own_lease(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    """Whoever watches the socket hands on what is for others, in whatever order it comes."""
    client, ns = waiting
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        fetches = []
        for seed in range(1, 5):
            fetches.append(Fetch(client, ns, seed))
            eventually(lambda seed=seed: len(fake.loading()) == seed, "its lease is granted")
        leases = fake.loading()
        for number in order:
            fake.land(4, lease=leases[number])
        assert all(fetch.is_alive() for fetch in fetches)
        for number in order:
            fake.land(6, lease=leases[number])
            assert fetches[number].ended() == FetchResult(6, 6 * 4096, "")
            assert np.array_equal(fetches[number].target, payload(number + 1))
    assert client.stats().attachments == 1


def test_a_thread_that_waits_keeps_no_other_from_the_session(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    """Others map new slabs and release their leases meanwhile."""
    client, ns = waiting
    first = Fetch(client, ns, 1)
    eventually(lambda: len(fake.loading()) == 1, "its lease is granted")
    fake.ready_max = 6
    assert client.store(ns, chain(5), payload(5)).committed == 6
    assert client.fetch(ns, chain(2), np.zeros((6, 4096), np.uint8)).blocks == 6
    eventually(lambda: fake.held() == (1, 0), "only the first is held")
    fake.land(6)
    assert first.ended().blocks == 6


def test_what_a_thread_that_maps_reads_reaches_the_one_that_waits(
    fake: FakeDaemon, waiting: tuple[Client, Any]
) -> None:
    client, ns = waiting
    for turn in range(10):
        first = Fetch(client, ns, 1)
        eventually(lambda: len(fake.loading()) == 1, "its lease is granted")
        fake.run(lambda: setattr(fake, "before_map", lambda: fake._land(6)))
        assert client.store(ns, chain(5 + turn), payload(5)).committed == 6
        assert first.ended().blocks == 6
        assert np.array_equal(first.target, payload(1))


def test_when_the_one_that_watches_gives_up_another_watches(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    client, ns = waiting
    lease = client.acquire(ns, chain(1))
    watcher = threading.Thread(target=lambda: lease.wait(timeout_ms=300.0))
    watcher.start()
    link = client._link
    assert link is not None
    eventually(lambda: link._watcher == watcher.ident, "it watches")
    other = Fetch(client, ns, 2)
    eventually(lambda: len(fake.loading()) == 2, "the other's lease is granted")
    watcher.join(10)
    eventually(lambda: link._watcher == other.ident, "the other watches")
    fake.land(6)
    assert other.ended().blocks == 6
    lease.release()


def test_waiting_costs_no_processor_time(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    with Client(fake.runtime_dir, timeout_ms=400.0) as client:
        fetches = [Fetch(client, waiting[1], seed) for seed in (1, 2, 3)]
        assert [fetch.ended() for fetch in fetches] == [FetchResult(2, 2 * 4096, "timeout")] * 3
        assert sum(fetch.cpu_s for fetch in fetches) < 0.1


def test_closing_the_client_ends_every_wait(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    client, ns = waiting
    lease = client.acquire(ns, chain(3))
    fetches = [Fetch(client, ns, seed) for seed in (1, 2)]
    eventually(lambda: len(fake.loading()) == 3, "their leases are granted")
    client.close()
    assert [fetch.ended() for fetch in fetches] == [FetchResult(0, 0, "peer_lost")] * 2
    assert (lease.wait(), lease.ready()) == (0, 0)


def test_releasing_a_lease_ends_the_wait_for_it(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    client, ns = waiting
    lease = client.acquire(ns, chain(1))
    told: list[int] = []
    waiter = threading.Thread(target=lambda: told.append(lease.wait()))
    waiter.start()
    lease.release()
    waiter.join(10)
    assert not waiter.is_alive()
    assert told[0] in (0, 2)


def test_a_forked_child_does_not_wait_for_its_parents_lease(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    client, ns = waiting
    lease = client.acquire(ns, chain(1))
    first = Fetch(client, ns, 2)
    eventually(lambda: len(fake.loading()) == 2, "both are granted")
    in_child(lambda: _check_not_mine(lease))
    assert len(fake.loading()) == 2
    fake.land(6)
    assert first.ended().blocks == 6
    lease.release()


def _check_not_mine(lease: Any) -> None:
    assert (lease.ready(), lease.wait()) == (0, 0)
    lease.release()


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


def tell_nonsense(fake: FakeDaemon) -> None:
    """On the fake daemon's thread."""
    for peer in fake._by_fd.values():
        peer._socket.send(msgpack.packb([0, "gossip", 1]))


def test_a_notice_that_makes_no_sense_ends_the_session(fake: FakeDaemon) -> None:
    with Client(fake.runtime_dir) as client:
        assert client.ping()
        fake.run(lambda: tell_nonsense(fake))
        eventually(lambda: client.ping() and client.stats().attachments == 2, "it attached again")
        assert not client.stats().errors


def test_nonsense_behind_a_slab_keeps_nobody_from_the_session(
    fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(fake.runtime_dir, timeout_ms=20_000.0) as client:
        ns = client.open_namespace(SPEC)
        link = client._link
        assert link is not None
        map_slab = link._session.map_slab

        def map_and_tell(*arguments: Any) -> Any:
            mapped = map_slab(*arguments)
            fake.run(lambda: tell_nonsense(fake))
            return mapped

        monkeypatch.setattr(link._session, "map_slab", map_and_tell)
        assert client.store(ns, chain(1), payload(1)).reason == "peer_lost"
        assert not link._mapping.locked()
        assert client.store(ns, chain(2), payload(2)).committed == 6


def test_replies_that_cannot_be_given_back_end_the_session(fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy failed, and another thread keeps the control socket to itself: the slots come back with the session."""

    class Failing(NumpyCopier):
        def gather(self, plan: CopyPlan) -> Sequence[int]:
            assert client._link is not None
            assert client._link._exchanging.acquire(timeout=10)
            raise MemoryError("no more")

    monkeypatch.setattr("forebay.client.core.BATCH_BLOCKS", 2)
    with Client(fake.runtime_dir, budget_ms=5.0, timeout_ms=100.0, copier=Failing()) as client:
        ns = client.open_namespace(SPEC)
        with pytest.raises(MemoryError):
            client.store(ns, chain(1), payload(1))
        eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_clients_that_nobody_closed_leave_no_descriptors(fake: FakeDaemon) -> None:
    def descriptors() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def use() -> None:
        client = Client(fake.runtime_dir)
        assert client.ping()

    use()
    eventually(lambda: fake.run(lambda: len(fake._by_fd)) == 0, "its session has ended")
    before = descriptors()
    for _ in range(5):
        use()
    gc.collect()
    eventually(lambda: fake.run(lambda: len(fake._by_fd)) == 0, "their sessions have ended")
    assert descriptors() == before


def test_polling_a_lease_of_a_dead_daemon_keeps_nothing(fake: FakeDaemon, waiting: tuple[Client, Any]) -> None:
    client, ns = waiting
    lease = client.acquire(ns, chain(1))
    link = client._link
    assert link is not None
    fake.stop()
    eventually(lambda: lease.ready() == 0, "it is seen")
    for _ in range(50):
        assert lease.ready() == 0
    assert link.fault is not None
    assert len(traceback.extract_tb(link.fault.__traceback__)) < 10
    fake.start()


def test_a_process_out_of_descriptors_gets_a_miss(fake: FakeDaemon) -> None:
    """libzmq would abort it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with Client(fake.runtime_dir) as client:
        for spare in (0, 2, 5, 8):
            resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + spare, hard))
            try:
                assert not client.ping()
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert set(client.stats().errors) == {"peer_lost"}
        eventually(client.ping, "it attaches")


def test_options_are_checked() -> None:
    bad: list[dict[str, Any]] = [{"name": "x" * 129}, {"client_group": b"x" * 33}, {"verify": "store"}]
    for options in (*bad, {"budget_ms": 0}, {"timeout_ms": 1.0}):
        with pytest.raises(BadRequest):
            Client(**options)


def test_a_stranger_in_the_runtime_directory_is_a_miss(tmp_path: Any) -> None:
    (tmp_path / "session.sock").write_text("no socket")
    with Client(tmp_path) as client:
        ns = client.open_namespace(SPEC)
        result = client.store(ns, chain(1), SegmentTable.of(payload(1)))
        assert result.outcomes == (BlockOutcome.UNAVAILABLE,) * 6
