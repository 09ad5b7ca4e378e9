"""On a disk that fails, lies and loses power the NVMe tier misses blocks; it never serves a wrong byte.

Each seed is run once and looked at by several tests; `run_faults.py` runs more of them.
"""

from __future__ import annotations

import functools
import random
import shutil
import tempfile
from pathlib import Path

import lmdb
import pytest

from forebay.tiers.nvme_index import Index
from support.nvme_script import Script
from support.nvme_sim import NvmeSimulation, SimResult, shapes
from support.sim_files import SimFiles

SEEDS = range(1, 8)
SOUND_SEEDS = range(101, 103)
SERVED_MIN = 20_000


@functools.cache
def run(seed: int) -> SimResult:
    with tempfile.TemporaryDirectory(prefix="forebay-test-") as folder:
        return NvmeSimulation(seed, Path(folder), sound=seed in SOUND_SEEDS).run()


@pytest.mark.parametrize("seed", [*SEEDS, *SOUND_SEEDS])
def test_nothing_wrong_is_served_and_nothing_durable_is_lost(seed: int) -> None:
    assert run(seed).check() == []


def test_runs_are_long_enough_and_every_call_has_failed() -> None:
    """What the other tests found to be zero was looked for often, under every fault there is."""
    total = sum(map(run, (*SEEDS, *SOUND_SEEDS)), SimResult())
    print(total)
    assert total.served_reads >= SERVED_MIN
    assert total.detected == total.injected > 500
    assert total.durable_blocks > 1000
    assert total.sites_without_failure() == []


def test_blocks_written_after_a_half_made_reassignment_outlive_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the slab's header and its index record, the slab goes back to its old owner, who writes on."""
    first, second, _ = shapes()
    one = Script(tmp_path, SimFiles(random.Random(0)))
    one.tier.assign_slab(0, first.owner, one.tier.first_generation)
    one.write(first, slot=0)
    with monkeypatch.context() as patched:
        patched.setattr(Index, "apply", _fail)
        one.tier.assign_slab(0, second.owner, one.tier.first_generation + 1)
        one.tier.flush()
        one.until(lambda: one.tier.detail().drives[0].index == "failing")
        two = Script(tmp_path, one.killed())
    assert [owner for _, owner, _ in two.slabs] == [first.owner]
    two.write(first, slot=1)
    two.tier.close(10.0)
    shutil.rmtree(tmp_path / "drive" / "index")
    three = Script(tmp_path, two.files)
    three.tier.close(10.0)
    assert {block[:2] for block in three.blocks} >= {(0, 1)}


def _fail(*arguments: object, **options: object) -> None:
    raise lmdb.Error("the process dies about now")
