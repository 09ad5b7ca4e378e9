"""What `forebay fsck` says of a path and with which exit status, over drives that a tier has written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from tests.tiers.nvme_rig import SLAB, SLOT, filled

from forebay.daemon import cli
from forebay.daemon.cli import Exit
from forebay.tiers.nvme_drive import DATA_NAME
from forebay.tiers.nvme_format import PAGE, slot_offset

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed drive with blocks 0 .. 9 in slab 0."""
    filled(tmp_path / "drive", 10).close()
    return tmp_path / "drive"


def damage_payload(path: Path, slot: int) -> None:
    with (path / DATA_NAME).open("r+b") as file:
        file.seek(slot_offset(SLAB, SLOT, 0, slot) + PAGE)
        file.write(b"damage")


def run(*words: str | Path) -> int:
    return cli.run(["fsck", *map(str, words)])


def test_sound_drive_is_ok(path: Path, capsys: Capture) -> None:
    assert run(path) == Exit.OK
    assert capsys.readouterr().out == f"{path}: 1 of 7 slabs of 1.0 MiB in use, 10 blocks sound\nok\n"


def test_damage_is_a_negative_answer_that_names_its_slab(path: Path, capsys: Capture) -> None:
    damage_payload(path, 4)
    assert run(path) == Exit.NEGATIVE
    assert capsys.readouterr().out.splitlines() == [
        f"{path}: 1 of 7 slabs of 1.0 MiB in use, 9 blocks sound",
        "slab 0 (tiny, uid 1000): 1 damaged payloads",
        "index: 1 records of blocks that are not there, 0 blocks without a record",
        "NOT SOUND; --repair makes the index anew",
    ]


def test_json_has_the_counts_and_the_slabs_in_error(path: Path, capsys: Capture) -> None:
    damage_payload(path, 4)
    assert run(path, "--json") == Exit.NEGATIVE
    found = json.loads(capsys.readouterr().out)
    assert (found["ok"], found["repaired"], found["slabs"], found["assigned_slabs"]) == (False, False, 7, 1)
    assert (found["sound"], found["bad_payloads"], found["bad_headers"], found["unreadable"]) == (9, 1, 0, 0)
    assert found["index"] == {"reason": "", "matching": 9, "stale": 1, "missing": 0}
    assert [slab["model"] for slab in found["slabs_in_error"]] == ["tiny"]


def test_repair_of_a_lost_index_leaves_nothing_wrong(path: Path, capsys: Capture) -> None:
    shutil.rmtree(path / "index")
    assert run(path) == Exit.NEGATIVE
    assert "index: it is missing\n" in capsys.readouterr().out
    assert run(path, "--repair") == Exit.OK
    assert "index made anew, with 10 blocks\nok\n" in capsys.readouterr().out
    assert run(path) == Exit.OK


def test_repair_leaves_damaged_blocks_and_says_so(path: Path, capsys: Capture) -> None:
    """They are misses until their slots are written again; the new index does not name them."""
    damage_payload(path, 4)
    assert run(path, "--repair") == Exit.NEGATIVE
    assert "index made anew, with 9 blocks\nNOT SOUND\n" in capsys.readouterr().out


def test_path_of_a_running_daemon_is_left_alone(tmp_path: Path, capsys: Capture) -> None:
    rig = filled(tmp_path / "drive", 3)
    assert run(tmp_path / "drive") == Exit.TAKEN
    assert "is in use by another daemon" in capsys.readouterr().err
    assert run("--json", tmp_path / "drive") == Exit.TAKEN
    assert json.loads(capsys.readouterr().out)["error"] == "Busy"
    rig.close()


def test_what_is_no_drive_cannot_be_judged(tmp_path: Path, path: Path, capsys: Capture) -> None:
    assert run(tmp_path / "absent") == Exit.REFUSED
    assert "No such file" in capsys.readouterr().err
    (path / DATA_NAME).write_bytes(b"something else" * 1000)
    assert run(path) == Exit.REFUSED
    assert "it does not begin as a forebay data file" in capsys.readouterr().err


def test_repair_by_another_user_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert run(path, "--repair") == Exit.REFUSED
    assert "repair it as that user" in capsys.readouterr().err
