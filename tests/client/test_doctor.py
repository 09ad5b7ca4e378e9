"""The doctor: what it says of machines with and without a GPU."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from forebay.client import doctor
from forebay.transports.dma import Direction, DmaEngine, Tuning, tuning
from forebay.transports.dma.device import Device
from forebay.transports.dma.tuning import Row
from support.late_device import LateDevice


def cupy_of(gpus: int) -> ModuleType:
    """What the doctor reads of cupy on a machine with so many GPUs."""
    module: Any = ModuleType("cupy")
    module.__version__ = "14.0"
    module.cuda = SimpleNamespace(
        nvrtc=SimpleNamespace(getVersion=lambda: (13, 1)),
        runtime=SimpleNamespace(
            driverGetVersion=lambda: 13010,
            runtimeGetVersion=lambda: 13000,
            getDeviceCount=lambda: gpus,
            getDeviceProperties=lambda index: {"major": 9, "minor": 0, "totalGlobalMem": 80 << 30},
            deviceGetPCIBusId=lambda index: f"0000:0{index}:0A.0",
        ),
    )
    return module


def texts(found: list[doctor.Finding], name: str) -> list[str]:
    return [finding.text for finding in found if finding.name == name]


def test_a_machine_with_gpus_is_told_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(2))
    monkeypatch.setattr(
        "forebay.transports.dma.cuda_device.CudaDevice", lambda index, cache: SimpleNamespace(name=f"card {index}")
    )
    monkeypatch.setattr(doctor, "_PCI_DEVICES", tmp_path)
    (tmp_path / "0000:01:0a.0").mkdir()
    (tmp_path / "0000:01:0a.0" / "numa_node").write_text("1\n")
    (tmp_path / "0-sm_90.cubin").write_bytes(bytes(2048))
    row = Row(Direction.LOAD, 32 << 10, 8 << 20, {"dma": 20e9, "staged": 40e9})
    tuning.save(Tuning("card", 86400.0, (row,)), tmp_path)
    (tmp_path / "dma-tuning-other.json").write_text("{}")
    found, usable = doctor.findings(tmp_path)
    assert usable
    assert (texts(found, "driver"), texts(found, "NVRTC"), texts(found, "GPUs")) == (["CUDA 13.1"], ["13.1"], ["2"])
    assert [texts(found, f"GPU {index}")[0].rpartition(" in ")[0] for index in range(2)] == [
        f"card {index}, sm_90, 80.0 GiB, NUMA node {node}, kernels loaded" for index, node in enumerate(("unknown", 1))
    ]
    assert texts(found, "kernel cache") == [f"{tmp_path}: 1 compiled, 2.0 KiB"]
    measured, torn = texts(found, "tuning")
    assert measured == "card, measured 1970-01-02"
    assert torn.startswith("dma-tuning-other.json cannot be used: ")
    rows = texts(found, "  load of 8.0 MiB in segments of 32.0 KiB")
    assert rows == ["staged (dma 20.0, staged 40.0 GB/s)"]


def test_measuring_a_gpu_keeps_its_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the device of host memory: what is kept is what an engine finds at its next start."""

    def device(index: int, cache: Path) -> LateDevice:
        late: Any = LateDevice(1)
        late.name, late.key = "card", "card, driver 1"
        return late

    def measure(engine: DmaEngine, device: Device, name: str) -> Tuning:
        return whole(engine, device, name, segment_bytes=(2 << 10,), moved_bytes=(64 << 10,))

    whole = tuning.measure
    monkeypatch.setitem(sys.modules, "cupy", cupy_of(1))
    monkeypatch.setattr("forebay.transports.dma.cuda_device.CudaDevice", device)
    monkeypatch.setattr(tuning, "measure", measure)
    found, usable = doctor.findings(tmp_path, tune=True)
    assert usable
    assert texts(found, "GPU 0 measured")[0].startswith("in ")
    kept = tuning.load(tmp_path, "card, driver 1")
    assert kept is not None
    assert [row.direction for row in kept.rows] == list(Direction)
    assert texts(found, "tuning")[0].startswith("card, driver 1, measured ")


def test_a_gpu_on_which_the_kernels_do_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(index: int, cache: Path) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setitem(sys.modules, "cupy", cupy_of(1))
    monkeypatch.setattr("forebay.transports.dma.cuda_device.CudaDevice", refuse)
    found, usable = doctor.findings(tmp_path / "none")
    assert not usable
    assert texts(found, "GPU 0") == ["RuntimeError: no kernel image"]
    assert texts(found, "kernel cache") == [f"{tmp_path / 'none'}: not made yet"]
    assert texts(found, "tuning") == ["nothing measured: strategies are chosen by rule"]


@pytest.mark.parametrize("cupy", [None, cupy_of(0)], ids=["no cupy", "no GPU"])
def test_without_a_gpu_the_answer_is_no(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cupy: ModuleType | None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(doctor, "cache_directory", lambda: tmp_path)
    assert doctor.main(["--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document["usable"] is False
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert "cannot be moved here" in out
    assert ("! cupy: " in out) == (cupy is None)
    assert "! GPUs: " in out
    if cupy is None:
        assert "pip install 'forebay[cuda13]'" in out


@pytest.mark.parametrize(("soft", "good"), [(resource.RLIM_INFINITY, True), (8 << 20, False), (64 << 30, True)])
def test_a_memlock_limit_below_a_few_slabs_is_marked(monkeypatch: pytest.MonkeyPatch, soft: int, good: bool) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, resource.RLIM_INFINITY))
    assert doctor._memlock().good == good


def test_a_cache_that_cannot_be_written_to_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert not doctor._kernel_cache(tmp_path).good


def test_the_command_is_run_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Whatever this machine has: an answer, in JSON, and an exit code that fits it."""
    command = [sys.executable, "-P", "-m", "forebay.daemon.cli", "doctor", "--json"]
    environment = {**os.environ, "FOREBAY_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    document = json.loads(done.stdout)
    assert done.returncode == (0 if document["usable"] else 1)
    assert {"memlock limit", "kernel cache", "tuning"} <= {finding["name"] for finding in document["findings"]}
