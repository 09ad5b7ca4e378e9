"""SIGKILL at any moment: the daemon comes back with all it had reported durable, and with nothing that is wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from forebay.client import Client
from support.ledger import Ledger
from support.nvme_kills import KillLoop
from support.nvme_live import (
    BLOCK_BYTES,
    BLOCKS,
    PERSIST_MS,
    SPEC,
    Engine,
    NvmeDaemon,
    chain,
    killed_at,
    why_no_strace,
)

KILLS = 15
DURABLE_MIN = 51
NO_STRACE = why_no_strace()


@pytest.mark.parametrize(("seed", "drives"), [(1, 1), (2, 2)], ids=["one drive", "two drives"])
def test_nothing_durable_is_lost_and_nothing_is_wrong_after_kills(seed: int, drives: int) -> None:
    result = KillLoop(seed, drives=drives).run(KILLS, DURABLE_MIN)
    print(
        f"{result.kills} kills while {dict(result.killed_while)}, {result.indexes_lost} indexes deleted: "
        f"{result.durable} durable blocks, {result.verdict}, start to first answer p50 {result.start_ms_p50} ms"
    )
    assert result.problems == []
    assert result.verdict.wrong == result.verdict.missing == 0
    assert result.verdict.served > 200
    assert result.durable >= DURABLE_MIN


@pytest.mark.skipif(bool(NO_STRACE), reason=NO_STRACE)
@pytest.mark.parametrize("call", ["fdatasync", "pwrite64", "pwritev2,pwritev"])
def test_daemon_killed_at_each_early_call_of_its_disk_comes_back(call: str) -> None:
    """The n-th such call of any thread kills: at first those that make the file, later those that commit a block."""
    ledger = Ledger(1)
    with NvmeDaemon(nvme_bytes=8 << 20) as daemon:
        daemon.kill()
        died = 0
        for when in (1, 4, 6, 9):
            daemon.wrap = killed_at(call, when)
            died += _live_until_killed(daemon, ledger, 10 * when)
        daemon.wrap = []
        daemon.start()
        daemon.restored()
        with Engine(daemon, ledger) as engine:
            assert engine.fetch_all(range(100)).wrong == 0
        assert ledger.total.missing == ledger.total.wrong == 0
        assert daemon.status()["ready"]
        assert daemon.problems() == ()
    print(f"{call}: {died} of 4 lives ended by it, {len(ledger)} blocks were durable")
    assert died


def _live_until_killed(daemon: NvmeDaemon, ledger: Ledger, first: int) -> bool:
    """Whether the daemon died by itself, of what it was wrapped in; else it is killed."""
    daemon.launch()
    assert daemon.process is not None
    if daemon.is_ready():
        with Engine(daemon, ledger) as engine:
            for number in range(first, first + 8):
                if daemon.process.poll() is None:
                    engine.store(number)
                    engine.persist(number, timeout_ms=2000)
    died = daemon.process.poll() is not None
    daemon.kill()
    return died


def test_both_ranks_of_a_block_are_back_or_none() -> None:
    """Each rank's shard is written by itself; what only one of them has made durable is a miss for both."""
    specs = [replace(SPEC, shard_size=2, shard_rank=rank) for rank in range(2)]
    both, one = chain(1), chain(2)
    with NvmeDaemon() as daemon:
        with Client(daemon.runtime_dir, strict=True, timeout_ms=10_000) as client:
            ranks = [client.open_namespace(spec) for spec in specs]
            for rank, ns in enumerate(ranks):
                client.store(ns, both, np.full((BLOCKS, BLOCK_BYTES), 1 + rank, np.uint8))
            client.store(ranks[0], one, np.full((BLOCKS, BLOCK_BYTES), 3, np.uint8))
            assert client.persist(ranks[0], both, PERSIST_MS).durable == BLOCKS
            assert client.persist(ranks[1], one, 0).durable == 0
        daemon.restart()
        daemon.restored()
        with Client(daemon.runtime_dir, strict=True, timeout_ms=10_000) as client:
            for rank, ns in enumerate(client.open_namespace(spec) for spec in specs):
                memory = np.zeros((BLOCKS, BLOCK_BYTES), np.uint8)
                assert client.lookup(ns, one).blocks == 0
                assert client.fetch(ns, both, memory).blocks == BLOCKS
                assert (memory == 1 + rank).all()
        assert daemon.problems() == ()
