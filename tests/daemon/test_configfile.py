"""Defaults < one file < flags, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.daemon.config import ConfigError, Environment
from forebay.daemon.configfile import FILE_BYTES_MAX, find_file, load
from forebay.daemon.settings import Machine

MACHINE = Machine(memory_bytes=16 << 30, cpus=8)


def problems(file: Path | None, flags: list[tuple[str, str]] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(file, flags or [], MACHINE)
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    file = folder / "forebay.toml"
    file.write_text(text)
    return file


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = write(tmp_path, '[host]\nbytes = "1GiB"\n[leases]\nttl_ms = 1000\n')
    loaded = load(file, [("host.bytes", "2GiB"), ("host.bytes", "3GiB")], MACHINE)
    assert loaded.config.host.bytes == 3 << 30
    assert loaded.config.leases.ttl_ms == 1000
    assert loaded.config.shutdown.drain_s == 5
    assert loaded.origins == {"host.bytes": "flag", "leases.ttl_ms": str(file)}


def test_a_mistake_in_the_file_is_shown_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "# mine\n[host]\n\nbyts = 5\n")
    assert problems(file) == (f"host.byts: unknown key; did you mean host.bytes? ({file}, line 4)",)


def test_an_unknown_section_is_shown_with_its_line(tmp_path: Path) -> None:
    file = write(tmp_path, "[hots]\nbytes = 5\n")
    assert problems(file) == (f"hots: unknown section; did you mean host? ({file}, line 1)",)


def test_a_mistake_in_a_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "[leases]\nttl_ms = 1000\n")
    assert problems(file, [("host.bytes", "8G")])[0].startswith("host.bytes: '8G': unknown unit")
    assert "line" not in problems(file, [("host.bytes", "8G")])[0]


def test_what_is_not_toml_is_shown_with_its_line(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "[host\n"))
    assert "not TOML" in found[0]
    assert "line 1" in found[0]


def test_a_missing_file_that_was_named_is_an_error(tmp_path: Path) -> None:
    assert "cannot be read" in problems(tmp_path / "absent.toml")[0]


def test_a_file_that_is_too_long_or_not_text_is_an_error(tmp_path: Path) -> None:
    assert "longer than" in problems(write(tmp_path, "#" * (FILE_BYTES_MAX + 1)))[0]
    (tmp_path / "forebay.toml").write_bytes(b"\xff\xfe")
    assert "UTF-8" in problems(tmp_path / "forebay.toml")[0]


def test_a_number_with_thousands_of_digits_is_an_error_not_a_crash(tmp_path: Path) -> None:
    assert problems(write(tmp_path, "[host]\nbytes = " + "9" * 5000))


def test_a_flag_needs_a_section() -> None:
    assert problems(None, [("bytes", "1")]) == ("bytes: unknown key; did you mean host.bytes?",)


def test_reload_reads_the_same_file_again_under_the_same_flags(tmp_path: Path) -> None:
    file = write(tmp_path, "[leases]\nttl_ms = 1000\n")
    loaded = load(file, [("shutdown.drain_s", "1.5")], MACHINE)
    write(tmp_path, "[leases]\nttl_ms = 2000\n")
    again = loaded.reload()
    assert again.config.leases.ttl_ms == 2000
    assert again.config.shutdown.drain_s == 1.5


def test_a_reload_with_a_mistake_raises_and_leaves_the_old_tree(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, "[leases]\nttl_ms = 1000\n"), [], MACHINE)
    write(tmp_path, "[leases]\nttl_ms = -1\n")
    with pytest.raises(ConfigError):
        loaded.reload()
    assert loaded.config.leases.ttl_ms == 1000


def test_the_file_is_the_named_one_else_the_users_else_the_systems(tmp_path: Path) -> None:
    env = Environment(str(tmp_path / "home"), None, None)
    system = tmp_path / "etc"
    assert find_file(None, env, system) is None
    (system / "forebay").mkdir(parents=True)
    (system / "forebay/forebay.toml").touch()
    assert find_file(None, env, system) == system / "forebay/forebay.toml"
    (tmp_path / "home/forebay").mkdir(parents=True)
    (tmp_path / "home/forebay/forebay.toml").touch()
    assert find_file(None, env, system) == tmp_path / "home/forebay/forebay.toml"
    assert find_file("/named.toml", env, system) == Path("/named.toml")
