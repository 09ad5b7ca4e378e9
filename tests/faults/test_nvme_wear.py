"""What a live daemon writes keeps to the budget of its configuration, and the life of its drive is counted on."""

from __future__ import annotations

from forebay.daemon.cli_status import render
from forebay.tiers.nvme_format import PAGE
from support.ledger import Ledger, Verdict
from support.nvme_live import BLOCK_BYTES, BLOCKS, Engine, NvmeDaemon

CHAIN_BYTES = BLOCKS * (BLOCK_BYTES + PAGE)
"""On the drive, header pages included."""
HOUR_CHAINS = 4
A_DAY = 24 * HOUR_CHAINS * CHAIN_BYTES
"""A budget of which an hour's share, all that may be written at once, is four chains."""
REFILL_SHARE = 0.1
"""What may come back of an hour's share while the test runs: six minutes' worth."""


def test_no_more_is_written_than_the_budget_allows_and_memory_serves_on() -> None:
    chains = range(1, 3 * HOUR_CHAINS + 1)
    with NvmeDaemon({"nvme.write_bytes_per_day": A_DAY, "nvme.admission": "all"}) as daemon:
        with Engine(daemon, Ledger(31)) as engine:
            for number in chains:
                assert engine.store(number).committed == BLOCKS
            durable = sum(engine.persist(number, timeout_ms=200).durable for number in chains)
            assert 0 < durable <= HOUR_CHAINS * BLOCKS * (1 + REFILL_SHARE)
            assert engine.fetch_all(chains) == Verdict(len(chains) * BLOCKS, 0, 0)
        store = daemon.store()
        assert daemon.status()["nvme"]["written_bytes"] <= HOUR_CHAINS * CHAIN_BYTES * (1 + REFILL_SHARE)
        assert store["movement"]["budget_bytes_per_day"] == A_DAY
        assert store["movement"]["budget_left_bytes"] < CHAIN_BYTES
        assert "write budget 15.0 MiB a day" in render(daemon.status())
        assert daemon.problems() == ()


def test_life_of_the_drive_shrinks_by_what_is_written_and_outlives_the_daemon() -> None:
    rated = {"nvme.drive_bytes": "1GiB", "nvme.dwpd": 1, "nvme.drive_years": 1}
    with NvmeDaemon(rated) as daemon:
        ledger, lives = Ledger(32), []
        for life in range(2):
            if life:
                daemon.stop()
                daemon.start()
                daemon.restored()
            with Engine(daemon, ledger) as engine:
                engine.store_durably([2 * life + 1, 2 * life + 2])
            status = daemon.status()
            [drive] = status["nvme"]["drives"]
            lives.append(drive["lifetime_written_bytes"])
            assert status["nvme"]["life_bytes"] == 365 << 30
            assert "drive life left 100.0 % (" in render(status)
        assert lives == [2 * CHAIN_BYTES, 4 * CHAIN_BYTES]
