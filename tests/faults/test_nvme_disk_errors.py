"""A drive that fails, fills up or hangs under a live daemon: memory goes on being served, the cause is told, and the
tier comes back by itself.

System calls are tampered with by strace, and the full disk is a small tmpfs in a mount namespace of the daemon's own;
where the machine permits neither, the tests on the simulated disk still stand.
"""

from __future__ import annotations

import itertools
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay.client import Client
from support import actor
from support.ledger import Ledger, Verdict
from support.live import eventually
from support.nvme_live import BLOCK_BYTES, BLOCKS, PERSIST_MS, Engine, NvmeDaemon, Tampered, chain, why_no_strace

NO_STRACE = why_no_strace()
needs_strace = pytest.mark.skipif(bool(NO_STRACE), reason=NO_STRACE)

READS = ("preadv", "preadv2")
WRITES = ("pwritev", "pwritev2")
SYNCS = ("fdatasync", "fsync")
INDEX_WRITES = ("pwrite64", "pwritev", "fdatasync", "fsync", "msync", "write")
RECOVERY_S = 30.0
HOST_BYTES = 4 << 20


@pytest.fixture(scope="module")
def ledger() -> Ledger:
    return Ledger(11)


@pytest.fixture(scope="module")
def daemon() -> Iterator[NvmeDaemon]:
    """One for all tests but two; each uses chains of its own. One call a time at the drive, so that others wait."""
    with NvmeDaemon({"nvme.queue_depth": 1}, host_bytes=f"{HOST_BYTES}B", nvme_bytes=128 << 20) as running:
        yield running


_numbers = itertools.count(1)


def _fresh(count: int) -> list[int]:
    """Chains that no test has used."""
    return list(itertools.islice(_numbers, count))


def _drive(daemon: NvmeDaemon) -> dict[str, Any]:
    [drive] = daemon.status()["nvme"]["drives"]
    return dict(drive)


def _counters(daemon: NvmeDaemon) -> Counter[str]:
    """What is counted of blocks that came up, and errors by cause."""
    counters = {name: count for name, count in daemon.store()["counters"].items() if name.startswith("promot")}
    return Counter(counters) + Counter(daemon.errors())


def _is_at_rest(daemon: NvmeDaemon) -> bool:
    """Nobody reads, writes or waits, and nothing is held for anybody."""
    store = daemon.store()
    moving, slots = store["movement"], [tier["slots_reserved"] for tier in store["tiers"]]
    return (store["leases"], moving["loads"], moving["writes"], *slots) == (0, 0, 0, 0, 0)


def _rests(daemon: NvmeDaemon) -> None:
    eventually(lambda: _is_at_rest(daemon), "nothing is held", within_s=20)
    assert daemon.problems() == ()


def _only_on_the_drive(daemon: NvmeDaemon, ledger: Ledger, numbers: Sequence[int]) -> None:
    """Store these chains durably, and then others until these have left memory: as much as fits there, twice."""
    with Engine(daemon, ledger) as engine:
        engine.store_durably(numbers)
        for number in _fresh(2 * HOST_BYTES // (BLOCKS * BLOCK_BYTES)):
            assert engine.store(number).rejected == 0
        for number in numbers:
            assert engine.client.lookup(engine.ns, chain(number)).by_tier == {"nvme": BLOCKS}
    _rests(daemon)


@needs_strace
@pytest.mark.parametrize(
    ("calls", "name", "error", "cause"),
    [
        (WRITES, "blocks.dat", "EIO", "write_io_error"),
        (WRITES, "blocks.dat", "ENOSPC", "write_no_space"),
        (SYNCS, "blocks.dat", "EIO", "sync_io_error"),
        (INDEX_WRITES, "index/data.mdb", "EIO", "index_io_error"),
    ],
    ids=["write EIO", "write ENOSPC", "sync EIO", "index EIO"],
)
def test_failing_writes_cost_no_answer_and_come_back_by_themselves(
    daemon: NvmeDaemon, ledger: Ledger, calls: tuple[str, ...], name: str, error: str, cause: str
) -> None:
    before, *others, last = _fresh(9)
    with Engine(daemon, ledger) as engine:
        engine.store_durably([before])
        errors = daemon.errors().get(cause, 0)
        with Tampered(daemon.pids, calls, f"error={error}", daemon.paths[0] / name):
            for number in others:
                assert engine.store(number).committed == BLOCKS
                assert engine.fetch(number) == Verdict(BLOCKS, 0, 0)
                assert engine.persist(number, timeout_ms=0).durable == 0
            eventually(lambda: not _try_to_persist(engine, daemon, number)["writing"], "the drive's writing goes down")
            assert _drive(daemon)["reason"], "nobody is told why"
            assert daemon.errors()[cause] > errors
            assert engine.fetch_all([before, *others]) == Verdict(8 * BLOCKS, 0, 0)
        took_s = eventually(
            lambda: engine.persist(number, timeout_ms=0).durable == BLOCKS, "writing comes back", within_s=RECOVERY_S
        )
        print(f"{cause}: writing again {took_s:.1f} s after the cause had ended")
        engine.store_durably([*others, last])
        drive = _drive(daemon)
        assert (drive["writing"], drive["reason"], drive["index"]) == (True, "", "up")
    _rests(daemon)
    daemon.restart()
    daemon.restored()
    with Engine(daemon, ledger) as engine:
        assert engine.fetch_all([before, *others, last]) == Verdict(9 * BLOCKS, 0, 0)


def _try_to_persist(engine: Engine, daemon: NvmeDaemon, number: int) -> dict[str, Any]:
    assert engine.persist(number, timeout_ms=0).durable == 0, "durable, by a drive that writes nothing"
    return _drive(daemon)


@needs_strace
def test_failing_reads_are_misses_and_memory_is_served(daemon: NvmeDaemon, ledger: Ledger) -> None:
    lost, *kept, hot = _fresh(4)
    _only_on_the_drive(daemon, ledger, [lost, *kept])
    before = _counters(daemon)
    with Engine(daemon, ledger) as engine:
        assert engine.store(hot).committed == BLOCKS
        with Tampered(daemon.pids, READS, "error=EIO", daemon.data_files[0]):
            ledger.gone(chain(lost))
            assert engine.fetch(lost).served == 0
            assert engine.fetch(hot) == Verdict(BLOCKS, 0, 0)
        assert _counters(daemon) - before == {"load_io_error": BLOCKS, "promotions_failed_blocks": BLOCKS}
        assert engine.fetch_all(kept) == Verdict(2 * BLOCKS, 0, 0), "chains that nobody read were lost"
        assert engine.store(lost).committed == BLOCKS
        assert engine.fetch(lost) == Verdict(BLOCKS, 0, 0)
    _rests(daemon)


# --- a full disk ---------------------------------------------------------------------------------------------------

TMPFS_BYTES = 24 << 20
TMPFS_NVME_BYTES = 16 << 20
MOUNT = f'mkdir -p "$0" && mount -t tmpfs -o size={TMPFS_BYTES} none "$0" && exec "$@"'


def _why_no_mounts() -> str:
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/tmp"], capture_output=True, text=True, check=False
    )
    return "" if tried.returncode == 0 else f"no mount namespace of one's own here: {tried.stderr.strip()[-200:]}"


NO_MOUNTS = _why_no_mounts()


@pytest.mark.skipif(bool(NO_MOUNTS), reason=NO_MOUNTS)
def test_full_disk_stops_the_index_and_nothing_else(tmp_path: Path) -> None:
    place, ledger, stored = tmp_path / "disk", Ledger(12), [1]
    wrap = ("unshare", "-Urm", "sh", "-c", MOUNT, str(place))
    with NvmeDaemon(paths=[place / "nvme"], nvme_bytes=TMPFS_NVME_BYTES, wrap=wrap) as daemon:
        filler = Path(f"/proc/{daemon.pid}/root") / str(place).lstrip("/") / "filler"
        with Engine(daemon, ledger) as engine:
            engine.store_durably(stored)
            _fill_up(filler)
            while _drive(daemon)["writing"]:
                assert len(stored) < 50, "the disk was not full enough"
                stored.append(stored[-1] + 1)
                assert engine.store(stored[-1]).committed == BLOCKS
                assert engine.fetch(stored[-1]) == Verdict(BLOCKS, 0, 0)
                engine.persist(stored[-1], timeout_ms=100)
            assert "index_no_space" in daemon.errors()
            assert "No space left" in _drive(daemon)["reason"]
            assert engine.fetch_all(stored) == Verdict(len(stored) * BLOCKS, 0, 0)
            filler.unlink()
            eventually(
                lambda: engine.persist(stored[-1], timeout_ms=0).durable == BLOCKS, "it writes", within_s=RECOVERY_S
            )
            engine.store_durably(stored)
            drive = _drive(daemon)
            assert (drive["writing"], drive["reason"], drive["index"]) == (True, "", "up")
        _rests(daemon)


def _fill_up(filler: Path) -> None:
    """Take all the room there is on the filler's file system."""
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue


# --- a slow disk ---------------------------------------------------------------------------------------------------


def _slow(daemon: NvmeDaemon, seconds: float, calls: tuple[str, ...] = (*READS, *WRITES, *SYNCS)) -> Tampered:
    return Tampered(daemon.pids, calls, f"delay_enter={int(seconds * 1e6)}", daemon.data_files[0])


@needs_strace
def test_slow_drive_delays_nobody_who_does_not_wait_for_it(daemon: NvmeDaemon, ledger: Ledger) -> None:
    cold, hot, took_s = _fresh(5), _fresh(4), [0.0]
    _only_on_the_drive(daemon, ledger, cold)
    with Engine(daemon, ledger) as engine, Engine(daemon, ledger, timeout_ms=20_000) as patient:
        for number in hot:
            engine.store(number)
        with _slow(daemon, 0.3):
            waiting = threading.Thread(target=patient.fetch_all, args=(cold,))
            waiting.start()
            while waiting.is_alive():
                began = time.monotonic()
                number = hot[len(took_s) % len(hot)]
                assert engine.client.lookup(engine.ns, chain(number)).blocks == BLOCKS
                assert engine.fetch(number) == Verdict(BLOCKS, 0, 0)
                took_s.append(time.monotonic() - began)
            waiting.join()
        print(f"{len(took_s)} fetches from memory meanwhile, the slowest took {1000 * max(took_s):.1f} ms")
        assert len(took_s) > 20
        assert sorted(took_s)[len(took_s) // 2] < 0.1
        assert sorted(took_s)[int(0.95 * len(took_s))] < 0.2
    assert ledger.total.wrong == ledger.total.missing == 0
    _rests(daemon)


@needs_strace
def test_fetch_that_waits_for_the_drive_ends_in_time_with_what_was_right(daemon: NvmeDaemon, ledger: Ledger) -> None:
    [number] = _fresh(1)
    _only_on_the_drive(daemon, ledger, [number])
    with Engine(daemon, ledger, timeout_ms=500) as engine:
        assert engine.fetch(number, blocks=3) == Verdict(3, 0, 0)
        memory = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
        with _slow(daemon, 2.0, READS):
            began = time.monotonic()
            fetched = engine.client.fetch(engine.ns, chain(number), memory)
            took_s = time.monotonic() - began
        assert (fetched.blocks, fetched.reason) == (3, "timeout")
        assert ledger.compare(chain(number)[:3], [block.data for block in memory[:3]]).wrong == 0
        assert took_s < 1.5
        _rests(daemon)
        assert engine.fetch(number) == Verdict(BLOCKS, 0, 0)


@needs_strace
def test_load_that_takes_far_longer_than_foreseen_is_given_up_where_computing_is_an_answer(ledger: Ledger) -> None:
    """What had come is right; the daemon has counted it, and serves the chain when the drive is well again."""
    settings = {"nvme.queue_depth": 1, "economics.prefill_tokens_per_s": 1000}
    with NvmeDaemon(settings, host_bytes=f"{HOST_BYTES}B", nvme_bytes=128 << 20) as daemon:
        [number] = _fresh(1)
        _only_on_the_drive(daemon, ledger, [number])
        with Engine(daemon, ledger, timeout_ms=10_000) as engine:
            assert engine.fetch(number, blocks=3) == Verdict(3, 0, 0)
            memory = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
            with _slow(daemon, 3.0, READS):
                fetched = engine.client.fetch(engine.ns, chain(number), memory)
                counted = engine.client.status()["store"]["physics"]["plans"]["late"]
            assert (fetched.blocks, fetched.reason, counted) == (3, "late", 1)
            assert ledger.compare(chain(number)[:3], [block.data for block in memory[:3]]).wrong == 0
            assert engine.client.stats().late_fetches == 1
            _rests(daemon)
            assert engine.fetch(number) == Verdict(BLOCKS, 0, 0)


def _actor_chain_on_the_drive(daemon: NvmeDaemon, in_memory: int) -> int:
    """The seed of an actor's chain of which only the first few blocks are in memory as well."""
    seeds = _fresh(1 + 2 * HOST_BYTES // (BLOCKS * actor.BLOCK_BYTES))
    hashes = actor.chain(seeds[0], BLOCKS)
    with Client(daemon.runtime_dir, strict=True, timeout_ms=10_000) as client:
        ns = client.open_namespace(actor.SPEC)
        for seed in seeds:
            client.store(ns, actor.chain(seed, BLOCKS), actor.payload(seed, BLOCKS))
            assert client.persist(ns, actor.chain(seed, BLOCKS), PERSIST_MS).durable == BLOCKS
        assert client.lookup(ns, hashes).by_tier == {"nvme": BLOCKS}
        some = np.zeros((max(1, in_memory), actor.BLOCK_BYTES), np.uint8)
        assert client.fetch(ns, hashes[:in_memory], some).blocks == in_memory
    _rests(daemon)
    return seeds[0]


def _fetch_of_actor(daemon: NvmeDaemon, seed: int) -> int:
    """Blocks of an actor's chain that can be fetched; each of them is right."""
    memory = np.zeros((BLOCKS, actor.BLOCK_BYTES), np.uint8)
    with Client(daemon.runtime_dir, strict=True, timeout_ms=10_000) as client:
        fetched = client.fetch(client.open_namespace(actor.SPEC), actor.chain(seed, BLOCKS), memory)
    assert (memory[: fetched.blocks] == actor.payload(seed, BLOCKS)[: fetched.blocks]).all()
    return fetched.blocks


@needs_strace
@pytest.mark.parametrize("step", actor.FETCH_STEPS)
def test_client_killed_while_its_blocks_come_from_the_drive_leaves_nothing(daemon: NvmeDaemon, step: str) -> None:
    seed = _actor_chain_on_the_drive(daemon, BLOCKS // 2)
    with _slow(daemon, 0.5, READS), actor.Actor(daemon.runtime_dir, step, seed=seed, blocks=BLOCKS) as reader:
        assert daemon.store()["movement"]["loads"] > 0, "nothing is on its way"
        reader.kill()
        eventually(lambda: daemon.store()["leases"] == 0, "the dead reader's lease ends")
        _rests(daemon)
    assert _fetch_of_actor(daemon, seed) == BLOCKS


@needs_strace
def test_reader_stopped_while_its_blocks_come_from_the_drive_gets_no_wrong_byte() -> None:
    """Its lease runs out; what came up for it is let go and its memory refilled; then it wakes up."""
    with NvmeDaemon({"leases.ttl_ms": 300, "nvme.queue_depth": 1}, host_bytes=f"{HOST_BYTES}B") as daemon:
        seed = _actor_chain_on_the_drive(daemon, BLOCKS // 2)
        slow = _slow(daemon, 0.5, READS)
        with slow, actor.Actor(daemon.runtime_dir, "half_read", seed=seed, blocks=BLOCKS, freeze=True) as reader:
            eventually(lambda: daemon.store()["counters"]["expired_leases"] == 1, "the lease runs out")
            _rests(daemon)
            with Client(daemon.runtime_dir, strict=True, timeout_ms=10_000) as client:
                ns = client.open_namespace(actor.SPEC)
                for other in _fresh(4):
                    client.store(ns, actor.chain(other, BLOCKS), actor.payload(other, BLOCKS))
            answer = reader.go_on()
        assert answer == {"blocks": 0, "reason": "stale", "right": True}
        assert daemon.problems() == ()


@needs_strace
@pytest.mark.parametrize("asked_again", [False, True], ids=["for good", "and asked again"])
def test_release_while_blocks_come_from_the_drive_cancels_what_has_not_begun(
    daemon: NvmeDaemon, asked_again: bool
) -> None:
    seed = _actor_chain_on_the_drive(daemon, 0)
    before = _counters(daemon)
    with Client(daemon.runtime_dir, strict=True, timeout_ms=10_000) as client:
        ns = client.open_namespace(actor.SPEC)
        with _slow(daemon, 0.5, READS):
            client.acquire(ns, actor.chain(seed, BLOCKS)).release()
            eventually(lambda: daemon.store()["leases"] == 0, "the lease ends")
            if asked_again:
                with client.acquire(ns, actor.chain(seed, BLOCKS)) as lease:
                    assert lease.wait(timeout_ms=10_000) == BLOCKS, "what was cancelled is a miss to the next one"
            _rests(daemon)
    counters = _counters(daemon) - before
    if asked_again:
        assert counters["promoted_blocks"] == BLOCKS
    else:
        assert counters["promotions_cancelled_blocks"] > 0
        assert counters["promoted_blocks"] + counters["promotions_cancelled_blocks"] == BLOCKS
    assert _fetch_of_actor(daemon, seed) == BLOCKS
