"""The bound of a drive, with a fio of our own making."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from forebay.bench.fio import Fio
from forebay.bench.processes import BenchError

KIB = 1024


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Path:
    """A `fio` on the path that notes how it was called; returns where."""
    calls = tmp_path / "calls"
    script = tmp_path / "fio"
    noted = f"open({str(calls)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"
    script.write_text(f"#!{sys.executable} -S\nimport json, sys\n{noted}\n{body}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return calls


def told(**changed: object) -> str:
    job = {"error": 0, "usr_cpu": 2.0, "sys_cpu": 3.0, "read": {"bw_bytes": 2e9}, "write": {"bw_bytes": 1e9}, **changed}
    return f"print('a warning'); print({json.dumps(json.dumps({'jobs': [job]}))})"


def test_without_fio_the_reason_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes the note of the figures that could not be measured."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BenchError, match="fio is not installed"):
        Fio(tmp_path, KIB, "4k")


@pytest.mark.parametrize(
    ("pages", "memory"), [("4k", "mmapshared:/proc/"), ("thp", "mmapshared:/proc/"), ("hugetlb", "mmaphuge")]
)
def test_buffers_lie_on_the_daemons_kind_of_pages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: str, memory: str
) -> None:
    """On others fio would measure another disk."""
    calls = install(tmp_path, monkeypatch, told())
    Fio(tmp_path, KIB, pages).random("read", 64 * KIB, 8, 1.5)
    last = calls.read_text().splitlines()[-1].split()
    assert any(word.startswith(f"--mem={memory}") for word in last)
    assert {"--rw=randread", "--bs=65536", "--iodepth=8", "--direct=1", "--runtime=1500ms"} <= set(last)


def test_rate_and_cpu_are_those_of_the_direction_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, told())
    fio = Fio(tmp_path, KIB, "4k")
    assert fio.random("read", KIB, 1, 1).bytes_per_s == 2e9
    write = fio.random("write", KIB, 1, 1)
    assert (write.bytes_per_s, write.cpu_s_per_gb) == (1e9, pytest.approx(0.05))


def test_engine_that_does_not_work_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers forbid io_uring."""
    install(tmp_path, monkeypatch, f"sys.exit(1) if '--ioengine=io_uring' in sys.argv else None\n{told()}")
    assert Fio(tmp_path, KIB, "4k").describe() == "fio libaio, buffers on 4k pages"


@pytest.mark.parametrize("body", [told(error=5), "print('no json')", "sys.exit(1)"])
def test_what_fio_did_not_measure_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Never a rate of nothing."""
    install(tmp_path, monkeypatch, body)
    with pytest.raises(BenchError, match="fio"):
        Fio(tmp_path, KIB, "4k")
