"""The status as text: what an operator reads of a document, and what is left out where there is nothing to say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from forebay.daemon import status
from forebay.daemon.cli_status import render
from forebay.daemon.status import DaemonSnapshot


@pytest.fixture
def document(make_snapshot: Callable[..., DaemonSnapshot]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(status.to_json(make_snapshot()))
    for name in ("corrupt_blocks", "stale_blocks", "declined_blocks"):
        found["store"]["counters"][name] = 0
    found["nvme"]["errors"] = []
    return found


def nvme_lines(document: dict[str, Any]) -> list[str]:
    """The line of the tier, and those under it."""
    lines = render(document).splitlines()
    (at,) = [at for at, line in enumerate(lines) if line.startswith("tier nvme")]
    return [lines[at], *(line.strip() for line in lines[at + 1 :] if line.startswith("  "))]


def test_nvme_tier_has_its_drives_and_what_they_did(document: dict[str, Any]) -> None:
    document["nvme"] |= {"read_bytes": 3 << 29, "written_bytes": 1 << 30}
    tier, drive, done, wear = nvme_lines(document)
    assert tier == "tier nvme: 123.0 MiB of 1.0 GiB (12.0 %), slabs 10 of 64 x 16.0 MiB"
    assert drive == (
        "drive /data: up, direct I/O, reads 3 + 1 queued, writes 4 + 2 queued, index up, 5 blocks, 6 changes waiting"
    )
    counters = document["store"]["counters"]
    assert done == (
        f"read 1.5 GiB, written 1.0 GiB, promoted {counters['promoted_blocks']}, demoted {counters['demoted_blocks']} "
        f"blocks, only in memory 91, restored {counters['restored_blocks']}, RESTORING 50.0 %"
    )
    assert wear == (
        "write budget 10.0 TiB a day, 11.0 GiB left at once, drive life left 85.0 % (3.0 TiB of 20.0 TiB written)"
    )


def test_what_was_not_worth_a_write_is_told_with_its_reason(document: dict[str, Any]) -> None:
    declined = {"declined_blocks": 30, "declined_cost_chains": 4, "declined_budget_chains": 2}
    document["store"]["counters"] |= declined
    assert "not worth a write: 30 blocks, 4 chains for the cost, 2 for the budget" in nvme_lines(document)


def test_what_is_not_configured_or_over_is_not_shown(document: dict[str, Any]) -> None:
    document["nvme"] |= {"life_bytes": 0, "restored": True}
    document["store"]["movement"] |= {"budget_bytes_per_day": 0, "budget_left_bytes": -1}
    text = "\n".join(nvme_lines(document))
    assert not any(word in text for word in ("budget", "life", "RESTORING", "error"))


def test_drive_that_is_down_says_why_once(document: dict[str, Any]) -> None:
    reason = "/data is in use by another daemon"
    document["nvme"]["drives"][0] |= {"up": False, "reason": reason}
    about = {**document["tiers"][0], "tier": "nvme", "warnings": [reason, "/other is on the system's disk"]}
    document["tiers"].append(about)
    lines = nvme_lines(document)
    assert f"drive /data: DOWN: {reason}" in lines
    assert "warning: /other is on the system's disk" in lines
    assert "\n".join(lines).count(reason) == 1


def test_buffered_io_a_pause_and_a_failing_index_have_their_reasons(document: dict[str, Any]) -> None:
    document["nvme"]["drives"][0] |= {
        "io": "buffered",
        "io_reason": "[Errno 22] Invalid argument",
        "writing": False,
        "reason": "[Errno 28] No space left on device",
        "index": "failing",
        "index_reason": "disk full\x1b[2J",
    }
    line = nvme_lines(document)[1]
    assert "buffered I/O ([Errno 22] Invalid argument)" in line
    assert "WRITING PAUSED ([Errno 28] No space left on device)" in line
    assert "index failing (disk full?[2J)" in line


def test_blocks_in_error_are_counted_by_cause(document: dict[str, Any]) -> None:
    document["store"]["counters"]["corrupt_blocks"] = 2
    document["nvme"]["errors"] = [["load_bad_payload", 2]]
    assert nvme_lines(document)[-1] == "blocks in error: corrupt 2, load_bad_payload 2"


def test_what_was_given_up_at_the_start_is_a_warning_of_the_nvme_tier(document: dict[str, Any]) -> None:
    document["store"]["warnings"] = ["3 slabs were given up\x1b[2J"]
    assert nvme_lines(document)[-1] == "warning: 3 slabs were given up?[2J"


def test_namespace_that_no_drive_has_slots_for_says_why(document: dict[str, Any]) -> None:
    assert "IN MEMORY ALONE" not in render(document)
    document["store"]["namespaces"][0]["memory_only"] = "a block does not fit\x1b[2J"
    [line] = [line for line in render(document).splitlines() if line.startswith("namespace")]
    assert line.endswith("IN MEMORY ALONE (a block does not fit?[2J)")


def test_document_of_a_daemon_without_an_nvme_tier_has_no_such_lines(document: dict[str, Any]) -> None:
    document["nvme"] = document["store"]["movement"] = None
    del document["store"]["tiers"][1]
    assert "nvme" not in render(document).replace("restored", "")


def test_what_was_saved_and_what_plans_go_by_is_shown(document: dict[str, Any]) -> None:
    lines = render(document).splitlines()
    saved = next(line for line in lines if line.startswith("saved: "))
    assert saved.startswith("saved: 5000 tokens not computed, 6.0 PFLOP, 620.0 GPU-seconds net of 80.0 for loading, $")
    plans = next(line for line in lines if line.startswith("plans: "))
    assert "load 11, part 12, recompute 13, 4 loads given up; " in plans
    assert "; host 20.0 GB/s (assumed), nvme 3.0 GB/s (by bandwidth.json); " in plans
    assert "prefill 10000 tokens/s + 4.0 ms" in plans
    assert any(line.startswith("would hit, by size of all tiers: 256.0 MiB 11.6%") for line in lines)


def test_a_daemon_that_tells_nothing_of_it_has_no_such_lines(document: dict[str, Any]) -> None:
    document["store"]["physics"] = None
    assert "saved: " not in render(document)


def test_what_gpus_reach_is_told_where_a_client_has_one(document: dict[str, Any]) -> None:
    store = document["store"]
    store |= {"gpu_pinned_bytes": 0, "gpu_unpinned_sessions": 0, "gpu_refusals": []}
    assert "GPUs reach" not in render(document)
    store |= {"gpu_pinned_bytes": 3 << 29}
    assert "GPUs reach 1.5 GiB by themselves" in render(document).splitlines()
    store |= {"gpu_unpinned_sessions": 2, "gpu_refusals": ["memlock", "no\x1b room"]}
    expected = "  warning: 2 clients cannot pin memory and copy it once more: memlock; no? room"
    assert expected in render(document).splitlines()
