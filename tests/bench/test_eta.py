"""Loads are foreseen, made, and held against what was foreseen; a median that is too far off fails the run."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.bench import eta


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eta, "LENGTHS", (2, 4))
    monkeypatch.setattr(eta, "WARM_S", 0.2)
    monkeypatch.setattr(eta, "MEASURED_S", 0.0)
    monkeypatch.setattr(eta, "ROUNDS", 3)


@pytest.mark.usefixtures("brief")
def test_each_load_out_of_memory_has_an_error(tmp_path: Path) -> None:
    found = eta.host_errors(tmp_path / "run")
    assert len(found) == 3 * 2
    assert all(error >= 0 for error in found)


@pytest.mark.usefixtures("brief")
def test_loads_count_for_the_drive_where_memory_has_nothing_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chains of 40 blocks do not fit beside each other into memory for 64."""
    monkeypatch.setattr(eta, "LENGTHS", (40,))
    found = eta.nvme_errors(tmp_path / "run", tmp_path / "drive")
    assert 3 <= len(found) <= 3 * 3
    assert all(error >= 0 for error in found)


@pytest.mark.parametrize(("host", "nvme", "status"), [(0.1, 0.2, 0), (0.3, 0.1, 1), (0.1, 0.3, 1)])
def test_the_medians_decide(
    host: float,
    nvme: float,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(eta, "host_errors", lambda directory: [0.0, host, host, 9.0])
    monkeypatch.setattr(eta, "nvme_errors", lambda directory, drive: [nvme] * 4)
    assert eta.main(["--path", str(tmp_path)]) == status
    told = capsys.readouterr().out
    assert f"host: median error {100 * host:.1f} %" in told
    assert "of 4 loads" in told
    assert list(tmp_path.iterdir()) == []
