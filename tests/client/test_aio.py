"""What only the asyncio client promises: many tasks at once, and cancellation that leaves nothing behind."""

from __future__ import annotations

import asyncio
import select
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import zmq

from forebay.client import AsyncClient, FetchResult, LookupResult, Namespace, NamespaceSpec, PrefixHasher
from forebay.client.copier import CopyPlan, NumpyCopier
from forebay.transports.messages import Verb
from support.fake_daemon import FakeDaemon

SPEC = NamespaceSpec(model="m", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(4096,))
HASHER = PrefixHasher(SPEC)


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon(capacity=4096) as daemon:
        yield daemon


class SlowCopier(NumpyCopier):
    """Copies only after it was told to; says when it has begun."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.ended = 0

    def gather(self, plan: CopyPlan) -> Sequence[int]:
        self._wait()
        return super().gather(plan)

    def scatter(self, plan: CopyPlan) -> Sequence[int]:
        self._wait()
        return super().scatter(plan)

    def _wait(self) -> None:
        self.begun.set()
        assert self.may_end.wait(10)
        self.ended += 1


@pytest.fixture
def copier() -> SlowCopier:
    return SlowCopier()


@pytest_asyncio.fixture
async def client(fake: FakeDaemon, copier: SlowCopier) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(fake.runtime_dir, copier=copier) as client:
        yield client


def payload(seed: int, blocks: int = 6) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(1, 255, (blocks, 4096), dtype=np.uint8)


def chain(seed: int, blocks: int = 6) -> list[bytes]:
    return HASHER.hashes(range(seed * 1000, seed * 1000 + 4 * blocks))


async def in_thread(call: Any, *arguments: Any) -> Any:
    """What blocks in a test must not block the loop under test."""
    return await asyncio.get_running_loop().run_in_executor(None, call, *arguments)


async def nothing_held(fake: FakeDaemon) -> bool:
    """Whether leases and reservations come to an end soon."""
    async with asyncio.timeout(10):
        while await in_thread(fake.held) != (0, 0):
            pass
    return True


async def asked_and_answered(client: AsyncClient, fake: FakeDaemon, ns: Namespace) -> asyncio.Task[LookupResult]:
    """A lookup whose reply lies at the socket, while the loop has not turned since."""
    await in_thread(fake.run, lambda: setattr(fake, "hanging", True))
    task = asyncio.create_task(client.lookup(ns, chain(1)))
    await in_thread(lambda: None)
    link = client._link
    assert link is not None
    assert link._waiting
    fake.run(lambda: setattr(fake, "hanging", False))
    assert select.select([link._control.fileno()], [], [], 10)[0]
    return task


@pytest.mark.asyncio
async def test_many_tasks_share_one_session(client: AsyncClient, fake: FakeDaemon) -> None:
    ns = await client.open_namespace(SPEC)

    async def work(seed: int) -> None:
        source, target = payload(seed), np.zeros((6, 4096), np.uint8)
        assert (await client.store(ns, chain(seed), source)).committed == 6
        assert (await client.fetch(ns, chain(seed), target)).blocks == 6
        assert np.array_equal(source, target)

    await asyncio.gather(*(work(seed) for seed in range(50)))
    assert client.stats().attachments == 1
    assert fake.sessions_seen == 1


@pytest.mark.asyncio
async def test_a_reply_that_came_while_a_lease_was_given_back_is_taken(client: AsyncClient, fake: FakeDaemon) -> None:
    """Sending may take the signal of the reply off the descriptor (libzmq, ZMQ_FD), as asking for events does."""
    ns = await client.open_namespace(SPEC)
    await client.store(ns, chain(1), payload(1))
    lease = await client.acquire(ns, chain(1))
    task = await asked_and_answered(client, fake, ns)
    assert client._link._control.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN
    lease.release()
    assert (await task).blocks == 6
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_an_answer_counts_though_the_loop_was_held_up_beyond_the_timeout(
    client: AsyncClient, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    ns = await client.open_namespace(SPEC)
    await client.store(ns, chain(1), payload(1))
    task = await asked_and_answered(client, fake, ns)
    loop = asyncio.get_running_loop()
    held_until = loop.time() + 2 * client.options.timeout_ms / 1000
    monkeypatch.setattr(loop, "time", lambda: held_until)
    assert (await task).blocks == 6
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_the_loop_goes_on_during_a_copy(client: AsyncClient, copier: SlowCopier) -> None:
    ns = await client.open_namespace(SPEC)
    copier.may_end.clear()
    storing = asyncio.create_task(client.store(ns, chain(1), payload(1)))
    assert await in_thread(copier.begun.wait, 10)
    assert await client.ping()
    assert not storing.done()
    copier.may_end.set()
    assert (await storing).committed == 6


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["store", "fetch"])
async def test_a_cancelled_copy_ends_before_its_slots_are_given_back(
    kind: str, client: AsyncClient, copier: SlowCopier, fake: FakeDaemon
) -> None:
    ns = await client.open_namespace(SPEC)
    if kind == "fetch":
        await client.store(ns, chain(1), payload(1))
    copier.begun.clear()
    copier.may_end.clear()
    ended = copier.ended
    task = asyncio.create_task(getattr(client, kind)(ns, chain(1), np.zeros((6, 4096), np.uint8)))
    assert await in_thread(copier.begun.wait, 10)
    task.cancel()
    await client.ping()
    assert not task.done()
    assert sum(await in_thread(fake.held)) == 1
    copier.may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert copier.ended == ended + 1
    assert await nothing_held(fake)
    assert (await client.lookup(ns, chain(1))).blocks == (6 if kind == "fetch" else 0)


@pytest.mark.asyncio
@pytest.mark.parametrize("kind", ["acquire", "reserve"])
async def test_a_grant_that_comes_after_its_caller_was_cancelled_is_given_back(
    kind: str, client: AsyncClient, fake: FakeDaemon
) -> None:
    ns = await client.open_namespace(SPEC)
    await client.store(ns, chain(1), payload(1))
    verb = Verb.ACQUIRE if kind == "acquire" else Verb.RESERVE
    before = await in_thread(fake.sent, verb)
    await in_thread(fake.run, lambda: setattr(fake, "hanging", True))
    task = asyncio.create_task(getattr(client, kind)(ns, chain(1 if kind == "acquire" else 2)))
    await asyncio.wait([asyncio.create_task(in_thread(lambda: None))])
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await in_thread(fake.run, lambda: setattr(fake, "hanging", False))
    async with asyncio.timeout(10):
        while await in_thread(fake.sent, verb) == before:
            pass
    assert await client.ping()
    assert await nothing_held(fake)
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_a_dying_daemon_ends_all_waits_at_once(fake: FakeDaemon) -> None:
    async with AsyncClient(fake.runtime_dir, timeout_ms=30_000.0) as client:
        ns = await client.open_namespace(SPEC)
        await in_thread(fake.run, lambda: setattr(fake, "hanging", True))
        tasks = [asyncio.create_task(client.fetch(ns, chain(n), np.zeros((6, 4096), np.uint8))) for n in range(5)]
        await asyncio.wait([asyncio.create_task(in_thread(lambda: None))])
        await in_thread(fake.stop)
        async with asyncio.timeout(10):
            assert await asyncio.gather(*tasks) == [FetchResult(0, 0, "peer_lost")] * 5


@pytest.mark.asyncio
async def test_tasks_that_find_no_link_attach_once(client: AsyncClient) -> None:
    assert all(await asyncio.gather(*(client.ping() for _ in range(20))))
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_a_cancelled_first_call_leaves_the_attaching_to_the_others(client: AsyncClient) -> None:
    first = asyncio.create_task(client.ping())
    second = asyncio.create_task(client.ping())
    await asyncio.wait([asyncio.create_task(in_thread(lambda: None))])
    first.cancel()
    assert await second
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_many_tasks_wait_for_their_own_loads(client: AsyncClient, fake: FakeDaemon) -> None:
    ns = await client.open_namespace(SPEC)
    for seed in range(10):
        await client.store(ns, chain(seed), payload(seed))
    fake.ready_max = 2
    targets = [np.zeros((6, 4096), np.uint8) for _ in range(10)]
    tasks = [asyncio.create_task(client.fetch(ns, chain(seed), target)) for seed, target in enumerate(targets)]
    async with asyncio.timeout(10):
        while len(leases := await in_thread(fake.loading)) < 10:
            pass
        assert await client.ping()
        for lease in reversed(leases):
            await in_thread(lambda lease=lease: fake.land(6, lease=lease))
        assert await asyncio.gather(*tasks) == [FetchResult(6, 6 * 4096, "")] * 10
    assert all(np.array_equal(target, payload(seed)) for seed, target in enumerate(targets))
    assert len(client._link.attachment.loads) == 0


@pytest.mark.asyncio
async def test_a_fetch_cancelled_while_it_waits_gives_back_its_lease(client: AsyncClient, fake: FakeDaemon) -> None:
    ns = await client.open_namespace(SPEC)
    await client.store(ns, chain(1), payload(1))
    fake.ready_max = 2
    task = asyncio.create_task(client.fetch(ns, chain(1), np.zeros((6, 4096), np.uint8)))
    async with asyncio.timeout(10):
        while not len(client._link.attachment.loads):
            await in_thread(lambda: None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await nothing_held(fake)
    assert await client.ping()
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_a_call_cancelled_when_its_reply_was_just_taken_gives_back_its_lease(
    client: AsyncClient, fake: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    ns = await client.open_namespace(SPEC)
    await client.store(ns, chain(1), payload(1))
    link = client._link
    take = link._take

    def take_and_cancel(message: bytes) -> None:
        take(message)
        task.cancel()

    monkeypatch.setattr(link, "_take", take_and_cancel)
    await in_thread(fake.run, lambda: setattr(fake, "hanging", True))
    task = asyncio.create_task(client.acquire(ns, chain(1)))
    while not link._waiting:
        await in_thread(lambda: None)
    await in_thread(fake.run, lambda: setattr(fake, "hanging", False))
    with pytest.raises(asyncio.CancelledError):
        await task
    monkeypatch.undo()
    assert await nothing_held(fake)
    assert client.stats().attachments == 1


@pytest.mark.asyncio
async def test_notices_that_come_before_a_slab_reach_who_waits(client: AsyncClient, fake: FakeDaemon) -> None:
    ns = await client.open_namespace(SPEC)
    await client.store(ns, chain(1), payload(1))
    fake.ready_max = 2
    for turn in range(5):
        with await client.acquire(ns, chain(1)) as lease:
            waiting = asyncio.create_task(lease.wait())
            await in_thread(fake.run, lambda: setattr(fake, "before_map", lambda: fake._land(6)))
            assert (await client.store(ns, chain(2 + turn), payload(2))).committed == 6
            assert await waiting == 6
