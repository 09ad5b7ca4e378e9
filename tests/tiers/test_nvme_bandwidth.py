"""The file that tells a daemon what its drive was measured to do."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest

from forebay.tiers.nvme_bandwidth import SIZE_MAX, BadBandwidth, Bandwidth, read_bandwidth, write_bandwidth

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


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_bandwidth(tmp_path) is None
    write_bandwidth(tmp_path, MEASURED)
    assert read_bandwidth(tmp_path) == MEASURED


def whole(**changed: object) -> bytes:
    """A sound file but for what is changed; None leaves a key out."""
    found = {"version": 1, **asdict(MEASURED), **changed}
    return json.dumps({key: value for key, value in found.items() if value is not None}).encode()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"\xff\xfe", "no JSON"),
        (b"[" * SIZE_MAX, "no JSON"),
        (b"[1]", "no JSON object"),
        (b" " * (SIZE_MAX + 1), "longer than"),
        (whole(version=2), "version is 2"),
        (whole(version=True), "version is True"),
        (whole(version=None), "version is None"),
        (whole(read_bytes_per_s=None), "read_bytes_per_s is None"),
        (whole(read_bytes_per_s="fast"), "read_bytes_per_s is 'fast'"),
        (whole(read_bytes_per_s=2e9), "no whole number"),
        (whole(read_bytes_per_s=float("nan")), "no whole number"),
        (whole(read_bytes_per_s=-1), "no whole number"),
        (whole(read_bytes_per_s=10**15), "no whole number"),
        (whole(write_bytes_per_s=0), "write_bytes_per_s"),
        (whole(block_bytes=0), "block_bytes"),
        (whole(queue_depth=True), "queue_depth"),
        (whole(measured_at="yesterday"), "measured_at"),
        (whole(measured_at=5), "measured_at"),
    ],
)
def test_file_that_cannot_be_believed_is_refused_with_a_reason(tmp_path: Path, text: bytes, reason: str) -> None:
    (tmp_path / "bandwidth.json").write_bytes(text)
    with pytest.raises(BadBandwidth, match=reason):
        read_bandwidth(tmp_path)


def test_nothing_but_a_plain_file_is_read(tmp_path: Path) -> None:
    """A link may lead anywhere, and a pipe would make the daemon wait."""
    path = tmp_path / "bandwidth.json"
    os.mkfifo(path)
    with pytest.raises(BadBandwidth, match="plain file"):
        read_bandwidth(tmp_path)
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(whole())
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        read_bandwidth(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises((BadBandwidth, OSError)):
        read_bandwidth(tmp_path)
