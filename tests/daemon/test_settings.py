"""Values are read from what an operator writes; what does not fit says what would."""

from __future__ import annotations

from pathlib import Path

import pytest

from forebay.daemon.settings import (
    BadValue,
    Listen,
    Machine,
    Setting,
    measure_machine,
    read_listen,
    read_size,
    show_size,
)

MACHINE = Machine(memory_bytes=100 << 30, cpus=4)


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("8GiB", 8 << 30), ("512MiB", 512 << 20), ("1.5GB", 1_500_000_000), ("25%", 25 << 30), ("7 B", 7), ("0B", 0)],
)
def test_sizes_have_units_or_are_shares_of_memory(text: str, size_bytes: int) -> None:
    assert read_size(text, MACHINE) == size_bytes


@pytest.mark.parametrize("text", ["8G", "8 gib", "GiB", "-1MiB", "1e3", "", "9" * 400, "1GiB1", "\u0663MiB", "nan%"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(BadValue):
        read_size(text, MACHINE)


@pytest.mark.parametrize("size_bytes", [0, 1, 1000, 1024, 4096 + 1, 3 << 20, 5 << 30, 7 << 40])
def test_a_shown_size_reads_back_as_itself(size_bytes: int) -> None:
    assert read_size(show_size(size_bytes), MACHINE) == size_bytes


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("127.0.0.1:9471", Listen("tcp", "127.0.0.1", 9471)),
        ("[::1]:0", Listen("tcp", "::1", 0)),
        ("unix:/run/forebay/metrics.sock", Listen("unix", path="/run/forebay/metrics.sock")),
        ("off", Listen("off")),
    ],
)
def test_listen_addresses_are_tcp_unix_or_off(text: str, listen: Listen) -> None:
    assert read_listen(text) == listen


@pytest.mark.parametrize("text", ["", "9471", ":9471", "host:", "host:70000", "unix:relative", "host:\u00b2"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(BadValue):
        read_listen(text)


@pytest.mark.parametrize("value", [True, 1.5, "1.5", [], None, "9" * 30])
def test_a_whole_number_is_no_boolean_and_no_fraction(value: object) -> None:
    with pytest.raises(BadValue):
        Setting("integer", 1, "", "").read(value, MACHINE, {})


@pytest.mark.parametrize("value", [[True], [-1], [2**32 - 1], "a", "1,x", [1.0], list(range(65))])
def test_user_ids_are_numbers_of_users(value: object) -> None:
    with pytest.raises(BadValue):
        Setting("uids", [], "", "").read(value, MACHINE, {})


def test_user_ids_from_a_flag_are_separated_by_commas() -> None:
    assert Setting("uids", [], "", "").read("1000,5,1000", MACHINE, {}) == (5, 1000)


def test_text_holds_no_control_characters() -> None:
    with pytest.raises(BadValue):
        Setting("text", "", "", "").read("a\nb", MACHINE, {})


def test_the_smallest_memory_limit_of_the_cgroup_and_its_parents_counts(tmp_path: Path) -> None:
    group = tmp_path / "sys/fs/cgroup/pod/engine"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod/engine\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1048576\n")
    assert measure_machine(tmp_path).memory_bytes == 1048576


def test_without_cgroups_the_machine_counts(tmp_path: Path) -> None:
    machine = measure_machine(tmp_path)
    assert machine.memory_bytes > 1 << 26
    assert machine.cpus >= 1
