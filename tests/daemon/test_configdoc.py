"""The configuration page and the printed file say what the code says."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from forebay.daemon import configdoc
from forebay.daemon.config import build, settings, values
from forebay.daemon.settings import Machine

MACHINE = Machine(memory_bytes=16 << 30, cpus=8)
ROOT = Path(__file__).resolve().parents[2]


def test_the_configuration_page_is_not_stale() -> None:
    assert (ROOT / configdoc.PAGE).read_text() == configdoc.page()


def test_the_page_lists_every_key() -> None:
    for path, _ in settings():
        assert f"| `{path}` |" in configdoc.page()


def test_the_check_fails_when_the_page_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    assert configdoc.main(["--check"]) == 1
    assert configdoc.main([]) == 0
    assert configdoc.main(["--check"]) == 0
    configdoc.PAGE.write_text("old")
    assert configdoc.main(["--check"]) == 1


def test_the_printed_default_file_reads_back_as_the_defaults() -> None:
    assert build(tomllib.loads(configdoc.default_toml()), MACHINE) == build({}, MACHINE)


def test_the_printed_effective_file_reads_back_as_itself() -> None:
    given = {"host": {"bytes": 123 * 4096 * 1000}, "access": {"allowed_uids": [5, 7]}, "runtime": {"dir": '/a "b\\'}}
    config = build(given, MACHINE)
    assert build(tomllib.loads(configdoc.effective_toml(values(config), {})), MACHINE) == config
