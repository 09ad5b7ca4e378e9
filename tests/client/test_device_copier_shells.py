"""Both clients with blocks in a GPU's memory, which `LateDevice` plays: against the fake daemon and the real one."""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from forebay.client import BlockOutcome, FetchResult, NamespaceSpec, PrefixHasher, SegmentTable
from forebay.client.copier import NumpyCopier
from forebay.client.device_copier import DeviceCopier
from forebay.client.link import held_open
from forebay.kvstore.errors import LayoutError
from forebay.transports.dma import DmaError, PinnedRegions
from forebay.transports.messages import Verb
from support.device_arrays import CudaTensor, LateDevices
from support.fake_daemon import FakeDaemon
from support.live import LiveDaemon, eventually
from support.shells import AsyncShell, SyncShell, commit

SPEC = NamespaceSpec(model="gpu", revision="1", dtype="uint8", block_tokens=4, segment_bytes=(3000, 3000))
BLOCKS = 10
CHAIN = PrefixHasher(SPEC).hashes(range(4 * BLOCKS))
SHELLS = [pytest.param(SyncShell, id="sync"), pytest.param(AsyncShell, id="async")]


class Gpu:
    """A client whose copier moves blocks of late devices; `paged` is what lies in their memory."""

    def __init__(self, kind: Any, daemon: Any, timeout_s: float, **options: Any) -> None:
        self.devices = LateDevices(7, timeout_s=timeout_s)
        copier = DeviceCopier(NumpyCopier(), self.devices, timeout_s=timeout_s)
        self.shell = kind(daemon.runtime_dir, copier=copier, **{"timeout_ms": 10_000.0, **options})
        self.ns = self.shell.open_namespace(SPEC)
        self.paged = np.random.default_rng(2).integers(1, 255, (2, BLOCKS, 3000), dtype=np.uint8)
        self.target = np.zeros_like(self.paged)

    def table(self, memory: NDArray[np.uint8]) -> SegmentTable:
        return SegmentTable.of([CudaTensor(plane) for plane in memory])

    def store(self) -> Any:
        return self.shell.store(self.ns, CHAIN, self.table(self.paged))

    def fetch(self) -> FetchResult:
        fetched: FetchResult = self.shell.fetch(self.ns, CHAIN, self.table(self.target))
        return fetched

    @property
    def pinned(self) -> PinnedRegions:
        return self.devices.made[0].pinned

    def wait(self, outcome: Any) -> Any:
        return self.shell.wait(outcome) if inspect.isawaitable(outcome) else outcome

    def hang(self) -> None:
        self.wait(self.shell.prepare(0))
        self.devices.devices[0].hung = True


MakeGpu = Callable[..., Gpu]


@pytest.fixture(params=SHELLS)
def make_gpu(request: pytest.FixtureRequest) -> Iterator[MakeGpu]:
    """Makes clients of one kind and closes them, those too that would stay open for a GPU that hangs."""
    made: list[Gpu] = []

    def make(daemon: Any, timeout_s: float = 10.0, **options: Any) -> Gpu:
        made.append(Gpu(request.param, daemon, timeout_s, **options))
        return made[-1]

    yield make
    for gpu in made:
        for device in gpu.devices.devices.values():
            device.hung = False
            device.settle()
        gpu.shell.close()
    for link in {id(link): link for link in held_open}.values():
        while link._users:  # type: ignore[attr-defined]
            link.leave()  # type: ignore[attr-defined]
    held_open.clear()


@pytest.fixture
def fake() -> Iterator[FakeDaemon]:
    with FakeDaemon() as daemon:
        yield daemon


@pytest.fixture(scope="module")
def live() -> Iterator[LiveDaemon]:
    with LiveDaemon() as daemon:
        yield daemon


@pytest.fixture(params=["fake", "live"])
def daemon(request: pytest.FixtureRequest) -> Any:
    """The fake, and the real daemon, emptied."""
    daemon = request.getfixturevalue(request.param)
    if request.param == "live":
        shell = SyncShell(daemon.runtime_dir, strict=True, timeout_ms=10_000.0)
        shell.clear()
        shell.close()
    return daemon


def test_what_was_stored_is_fetched_byte_for_byte_and_verified(make_gpu: MakeGpu, daemon: Any) -> None:
    """The first store goes through the bounce buffer, while the slabs are being pinned, what follows does not."""
    gpu = make_gpu(daemon, strict=True, checksum_stores=True, verify="load")
    stored = gpu.store()
    assert (stored.committed, stored.bytes) == (BLOCKS, BLOCKS * 6000)
    assert gpu.pinned.wait(10)
    for _ in range(2):
        gpu.target[:] = 0
        assert gpu.fetch() == FetchResult(BLOCKS, BLOCKS * 6000, "")
        assert np.array_equal(gpu.paged, gpu.target)
    assert gpu.pinned.status().pinned > 0
    assert gpu.devices.devices[0].unpinned_copies == 0


def test_host_and_gpu_engines_share_blocks_and_their_checksums(make_gpu: MakeGpu, daemon: Any) -> None:
    """Stored from a GPU, verified on a CPU, and the other way round: the same function of the same bytes."""
    gpu = make_gpu(daemon, strict=True, checksum_stores=True, verify="load")
    gpu.store()
    host = np.zeros_like(gpu.paged)
    assert gpu.shell.fetch(gpu.ns, CHAIN, SegmentTable.of(host, block_axis=1)).blocks == BLOCKS
    assert np.array_equal(host, gpu.paged)
    assert gpu.shell.clear().removed == BLOCKS
    assert gpu.shell.store(gpu.ns, CHAIN, SegmentTable.of(gpu.paged, block_axis=1)).committed == BLOCKS
    assert gpu.fetch() == FetchResult(BLOCKS, BLOCKS * 6000, "")
    assert np.array_equal(gpu.target, gpu.paged)


def test_a_flipped_bit_in_a_slot_is_corrupt_on_the_gpu(make_gpu: MakeGpu, fake: FakeDaemon) -> None:
    gpu = make_gpu(fake, checksum_stores=True, verify="load")
    gpu.store()

    def flip() -> None:
        space = fake.namespace()
        slot = space.blocks[CHAIN[6]]
        data = bytearray(space.read(slot))
        data[17] ^= 4
        space.write(slot, bytes(data))

    fake.run(flip)
    assert gpu.fetch() == FetchResult(6, 6 * 6000, "corrupt")


def test_stats_tell_what_is_pinned_and_why_something_is_not(make_gpu: MakeGpu, daemon: Any) -> None:
    gpu = make_gpu(daemon)
    assert (gpu.shell.stats().pinned_bytes, gpu.shell.stats().pin_refused) == (0, "")
    gpu.wait(gpu.shell.prepare(0))
    gpu.devices.devices[0].refuse = "memlock"
    gpu.store()
    assert gpu.pinned.wait(5)
    stats = gpu.shell.stats()
    assert stats.pinned_bytes == 0
    assert "memlock" in stats.pin_refused
    other = make_gpu(daemon)
    assert other.fetch().blocks == BLOCKS
    assert other.pinned.wait(5)
    assert other.shell.stats().pinned_bytes == other.pinned.status().pinned > 0


def test_the_daemons_status_tells_what_clients_gpus_reach(make_gpu: MakeGpu) -> None:
    """As of a client's last fetch or store."""
    with LiveDaemon() as live:
        refused, gpu = make_gpu(live), make_gpu(live)
        refused.wait(refused.shell.prepare(0))
        refused.devices.devices[0].refuse = "memlock " * 99
        refused.store()
        for each in (refused, gpu, refused, gpu):
            assert each.fetch().blocks == BLOCKS
            assert each.pinned.wait(5)

        def told() -> bool:
            store = live.status()["store"]
            reasons = store["gpu_refusals"]
            return bool(store["gpu_pinned_bytes"] == gpu.pinned.status().pinned > 0 and reasons)

        eventually(told, "status tells of both")
        [reason] = live.status()["store"]["gpu_refusals"]
        assert reason == ("memlock " * 99)[:256]


def test_a_slab_that_the_daemon_took_back_is_unpinned(make_gpu: MakeGpu, fake: FakeDaemon) -> None:
    gpu = make_gpu(fake)
    gpu.store()
    assert gpu.pinned.wait(10)
    before, slabs = gpu.pinned.status().pinned, gpu.shell.client._link.attachment.slabs
    size = next(iter(slabs.values())).data.nbytes
    assert before == 3 * size
    fake.retire(1)
    assert gpu.shell.ping()
    eventually(lambda: gpu.pinned.status().pinned == before - size, "one slab is unpinned")
    gpu.fetch()
    assert np.array_equal(gpu.target[:, :4], gpu.paged[:, :4])


def test_slabs_of_a_dead_daemon_are_unpinned_and_the_next_ones_pinned(make_gpu: MakeGpu) -> None:
    with LiveDaemon() as daemon:
        gpu = make_gpu(daemon)
        assert gpu.store().committed == BLOCKS
        assert gpu.pinned.wait(10)
        assert gpu.pinned.status().pinned > 0
        daemon.kill()
        assert gpu.fetch().blocks == 0
        gc.collect()
        eventually(lambda: gpu.pinned.status().pinned == 0, "the dead daemon's slabs are unpinned")
        daemon.start()
        eventually(lambda: gpu.store().committed == BLOCKS, "the new daemon is found")
        assert gpu.fetch() == FetchResult(BLOCKS, BLOCKS * 6000, "")
        assert np.array_equal(gpu.target, gpu.paged)
        assert gpu.pinned.wait(10)
        assert gpu.pinned.status().pinned > 0


def test_closing_the_client_unpins_its_slabs(make_gpu: MakeGpu, daemon: Any) -> None:
    gpu = make_gpu(daemon)
    gpu.store()
    assert gpu.pinned.wait(10)
    gpu.wait(gpu.shell.client.close())
    gc.collect()
    eventually(lambda: gpu.pinned.status().pinned == 0, "nothing is pinned any more")


# --- a GPU that hangs ----------------------------------------------------------------------------------------------


def test_slots_of_a_store_that_hangs_are_nobodys_until_the_process_ends(make_gpu: MakeGpu, daemon: Any) -> None:
    """Neither committed nor given back, nor freed by the end of the session when the client is closed."""
    gpu = make_gpu(daemon, timeout_s=0.5)
    other = SyncShell(daemon.runtime_dir, strict=True, timeout_ms=10_000.0)
    gpu.hang()
    result = gpu.store()
    assert (result.outcomes, result.reason) == ((BlockOutcome.FAILED,) * BLOCKS, "copy_timeout")
    assert gpu.store().committed == 0, "what is begun while it rests fails at once"
    gpu.wait(gpu.shell.client.close())
    gc.collect()
    with other.reserve(gpu.ns, CHAIN) as reservation:
        assert reservation.outcomes == (BlockOutcome.IN_FLIGHT,) * BLOCKS
    if isinstance(daemon, FakeDaemon):
        assert daemon.sent(Verb.ABORT) == daemon.sent(Verb.COMMIT) == 0
    other.close()


def test_a_fetch_that_hangs_is_told_and_keeps_its_lease(make_gpu: MakeGpu, fake: FakeDaemon) -> None:
    gpu = make_gpu(fake, timeout_s=0.5)
    assert gpu.store().committed == BLOCKS
    gpu.hang()
    assert gpu.fetch() == FetchResult(0, 0, "copy_timeout")
    assert gpu.shell.ping()
    assert fake.held() == (1, 0)


def test_a_reservation_that_hangs_is_not_given_back(make_gpu: MakeGpu, fake: FakeDaemon) -> None:
    gpu = make_gpu(fake, timeout_s=0.5)
    gpu.hang()
    with gpu.shell.reserve(gpu.ns, CHAIN) as reservation:
        failed = gpu.wait(reservation.gather(gpu.table(gpu.paged), range(BLOCKS), stream=None))
        assert list(failed) == list(range(BLOCKS))
        assert commit(gpu.shell, reservation) == 0
    assert gpu.shell.ping()
    assert fake.held() == (0, 1)


@pytest.mark.parametrize("make_gpu", [AsyncShell], indirect=True)
def test_a_cancelled_store_that_hangs_is_not_given_back(make_gpu: MakeGpu, fake: FakeDaemon) -> None:
    gpu = make_gpu(fake, timeout_s=0.5)
    gpu.hang()

    async def cancelled() -> bool:
        task = asyncio.ensure_future(gpu.shell.client.store(gpu.ns, CHAIN, gpu.table(gpu.paged)))
        while not fake.sent(Verb.RESERVE):
            await asyncio.wait([task], timeout=0.005)
        await asyncio.wait([task], timeout=0.05)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert gpu.wait(cancelled())
    assert gpu.shell.ping()
    assert fake.held() == (0, 1)


# --- reservations and set-up ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["gpu", "host"])
def test_a_reservation_is_filled_from_the_engines_memory(make_gpu: MakeGpu, daemon: Any, where: str) -> None:
    gpu = make_gpu(daemon, strict=True, checksum_stores=True, verify="load")
    source = gpu.table(gpu.paged) if where == "gpu" else SegmentTable.of(gpu.paged, block_axis=1)
    with gpu.shell.reserve(gpu.ns, CHAIN) as reservation:
        assert list(gpu.wait(reservation.gather(source, range(BLOCKS)))) == []
        assert commit(gpu.shell, reservation, (8, 9)) == 8
        assert list(gpu.wait(reservation.gather(source, range(BLOCKS)))) == list(range(BLOCKS)), "it is over"
    assert gpu.fetch() == FetchResult(8, 8 * 6000, "miss")
    assert np.array_equal(gpu.target[:, :8], gpu.paged[:, :8])


def test_memory_that_does_not_fit_the_slots_raises(make_gpu: MakeGpu, fake: FakeDaemon) -> None:
    gpu = make_gpu(fake)
    with gpu.shell.reserve(gpu.ns, CHAIN) as reservation:
        with pytest.raises(LayoutError, match="3000"):
            gpu.wait(reservation.gather(gpu.table(gpu.paged[:1]), range(BLOCKS)))
        with pytest.raises(LayoutError, match="10 hashes"):
            gpu.wait(reservation.gather(gpu.table(gpu.paged), range(4)))


def test_a_gpu_that_cannot_be_used_is_told_at_set_up_and_later_fails_blocks(
    make_gpu: MakeGpu, fake: FakeDaemon
) -> None:
    gpu = make_gpu(fake)
    gpu.shell.store(gpu.ns, CHAIN, SegmentTable.of(gpu.paged, block_axis=1))

    def refuse(device: Any) -> None:
        raise DmaError("no driver")

    gpu.devices.on_made = refuse
    with pytest.raises(DmaError, match="no driver"):
        gpu.wait(gpu.shell.prepare(0))
    assert gpu.fetch() == FetchResult(0, 0, "failed")
    eventually(lambda: fake.held() == (0, 0), "nothing is held any more")


def test_prepare_is_for_nothing_where_a_test_brought_its_own_copier(fake: FakeDaemon) -> None:
    shell = SyncShell(fake.runtime_dir, copier=NumpyCopier())
    assert shell.prepare(0) is None
    shell.close()
