"""The doctor on a machine with a GPU: what it measures is what the next client's engine follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.client import doctor
from forebay.client.device_copier import cuda_engine
from forebay.kernels.layout import Layout
from forebay.transports.dma import Direction, Tuning, tuning


def test_a_gpu_is_measured_and_clients_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FOREBAY_CACHE_DIR", str(tmp_path))
    assert doctor.main(["--tune", "--json"]) == 0
    found = {finding["name"]: finding["text"] for finding in json.loads(capsys.readouterr().out)["findings"]}
    assert found["GPU 0 measured"].startswith("in ")
    [path] = tmp_path.glob(doctor.TUNING_FILES)
    kept = Tuning.of_document(json.loads(path.read_text("utf-8")))
    assert tuning.load(tmp_path, kept.device) is not None
    assert {row.direction for row in kept.rows} == set(Direction)
    engine = cuda_engine(0)
    for row in kept.rows:
        layout = Layout.of(*([[number] for number in (4096, row.segment_bytes, row.segment_bytes)]))
        blocks = row.moved_bytes // row.segment_bytes
        assert engine.choose(layout, blocks, row.direction) is row.best
    engine.close(10)
