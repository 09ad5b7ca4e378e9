"""The file that tells a daemon what its drive was measured to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.bench.bandwidth import Bandwidth, write_bandwidth

MEASURED = Bandwidth(2_000_000_000, 1_000_000_000, 2 << 20, 8, "2026-01-02T03:04:05Z")


def test_file_says_what_was_measured_and_how(tmp_path: Path) -> None:
    """docs/layout.md has the same names."""
    write_bandwidth(tmp_path, MEASURED)
    assert json.loads((tmp_path / "bandwidth.json").read_text()) == {
        "version": 1,
        "read_bytes_per_s": 2_000_000_000,
        "write_bytes_per_s": 1_000_000_000,
        "block_bytes": 2 << 20,
        "queue_depth": 8,
        "measured_at": "2026-01-02T03:04:05Z",
    }


def test_another_run_replaces_the_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    """A reader sees one or the other, never half of each."""
    write_bandwidth(tmp_path, MEASURED)
    before = (tmp_path / "bandwidth.json").stat().st_ino
    write_bandwidth(tmp_path, MEASURED)
    assert (tmp_path / "bandwidth.json").stat().st_ino != before
    assert [path.name for path in tmp_path.iterdir()] == ["bandwidth.json"]


def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, say."""
    write_bandwidth(tmp_path, MEASURED)

    def fails(*_: object) -> None:
        raise OSError("full")

    monkeypatch.setattr("os.fsync", fails)
    with pytest.raises(OSError, match="full"):
        write_bandwidth(tmp_path, MEASURED)
    assert [path.name for path in tmp_path.iterdir()] == ["bandwidth.json"]
