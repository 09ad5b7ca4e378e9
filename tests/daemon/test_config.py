"""The tree is checked when built; what is wrong is named by its path."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest

from forebay.daemon import config
from forebay.daemon.config import ConfigError, build
from forebay.daemon.settings import Machine

GIB = 1 << 30
MACHINE = Machine(memory_bytes=16 * GIB, cpus=8)


def problems(raw: dict[str, Any], machine: Machine = MACHINE) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        build(raw, machine)
    return caught.value.problems


def test_defaults_need_nothing_and_fit_the_machine() -> None:
    built = build({}, MACHINE)
    assert built.host.bytes == 4 * GIB
    assert built.host.slab_bytes == 64 << 20
    assert config.derive(built).slabs == 64
    assert built.leases.ttl_ms == 30_000


def test_defaults_are_valid_on_this_machine() -> None:
    assert config.derive(build()).slabs > 0


@pytest.mark.parametrize("memory_bytes", [64 << 20, 512 << 20, GIB, 24 * GIB, 64 * GIB, 100 * GIB, 2048 * GIB, 1 << 45])
def test_automatic_sizes_are_valid_on_every_machine(memory_bytes: int) -> None:
    built = build({}, Machine(memory_bytes, 1))
    slabs = config.derive(built).slabs
    assert built.host.bytes <= memory_bytes * 0.51
    assert 1 <= slabs <= config.SLABS_MAX
    assert built.host.slab_bytes & (built.host.slab_bytes - 1) == 0


@pytest.mark.parametrize("host_bytes", ["2MiB", "16MiB", "100MiB", "3GiB", "50%"])
def test_the_automatic_slab_fits_a_given_tier(host_bytes: str) -> None:
    assert config.derive(build({"host": {"bytes": host_bytes}}, MACHINE)).slabs >= 1


def test_the_tree_is_frozen() -> None:
    built = build({}, MACHINE)
    with pytest.raises(dataclasses.FrozenInstanceError):
        built.host.bytes = 1  # type: ignore[misc]


def test_an_unknown_key_is_named_with_the_nearest_one() -> None:
    assert problems({"host": {"byts": 1}}) == ("host.byts: unknown key; did you mean host.bytes?",)


def test_an_unknown_section_is_named_with_the_nearest_one() -> None:
    assert problems({"hots": {}}) == ("hots: unknown section; did you mean host?",)


def test_a_key_outside_its_section_is_led_home() -> None:
    assert problems({"listen": "off"}) == ("listen: unknown key; did you mean metrics.listen?",)


def test_every_problem_is_reported_not_only_the_first() -> None:
    found = problems({"host": {"pages": "huge", "bytes": "8G"}, "limits": {"sessions": 0}, "x": 1})
    assert [problem.split(":")[0] for problem in found] == ["x", "host.bytes", "host.pages", "limits.sessions"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("host.bytes", "17GiB"),
        ("host.bytes", 1000),
        ("host.slab_bytes", "8GiB"),
        ("host.slab_bytes", 100_000),
        ("host.numa_node", -2),
        ("host.populate_threads", 0),
        ("limits.sessions", 10**9),
        ("limits.message_bytes", "1MiB"),
        ("leases.ttl_ms", 700_000),
        ("leases.pin_quota", 1.5),
        ("leases.pin_quota", float("nan")),
        ("leases.slab_idle_s", float("inf")),
        ("metrics.listen", "everywhere"),
        ("runtime.log_level", "loud"),
        ("access.allowed_uids", [-5]),
        ("shutdown.drain_s", "soon"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_its_path(path: str, value: object) -> None:
    section, name = path.split(".")
    assert problems({section: {name: value}})[0].startswith(f"{path}: ")


def test_huge_pages_need_slabs_of_whole_pages() -> None:
    assert "hugetlb" in problems({"host": {"pages": "hugetlb", "slab_bytes": "1028KiB"}})[0]


def test_a_section_must_be_a_section() -> None:
    assert problems({"host": 3}) == ("host: must be a section, [host]",)


def test_every_key_has_a_unit_or_a_closed_set_and_a_consequence() -> None:
    for path, known in config.settings():
        assert known.consequence.endswith("."), path
        assert known.unit or known.choices, path


def test_every_default_is_a_valid_value() -> None:
    for path, known in config.settings():
        section, name = path.split(".")
        build({section: {name: known.default}}, MACHINE)


def test_a_diff_splits_what_may_change_while_running_from_what_may_not() -> None:
    old = build({}, MACHINE)
    new = build({"leases": {"ttl_ms": 5000}, "host": {"bytes": "1GiB", "slab_bytes": "64MiB"}}, MACHINE)
    found = config.diff(old, new)
    assert [(change.path, change.old, change.new) for change in found.safe] == [("leases.ttl_ms", 30_000, 5000)]
    assert [change.path for change in found.unsafe] == ["host.bytes"]


def test_after_a_reload_the_unsafe_keys_keep_their_values() -> None:
    old = build({}, MACHINE)
    new = build({"leases": {"ttl_ms": 5000}, "host": {"bytes": "1GiB"}, "runtime": {"dir": "/x"}}, MACHINE)
    kept = config.keep_unsafe(old, new)
    assert kept == dataclasses.replace(old, leases=new.leases)
    assert config.diff(old, kept).unsafe == ()


def test_only_keys_that_can_be_applied_while_running_reload() -> None:
    assert "runtime.log_level" in config.reloadable()
    assert not {"host.bytes", "runtime.dir", "metrics.listen", "access.allowed_uids"} & set(config.reloadable())


def test_the_environment_is_read_into_a_record() -> None:
    own = str(os.getpid())
    env = config.environment({"HOME": "/h", "NOTIFY_SOCKET": "@n", "WATCHDOG_USEC": "15000000", "WATCHDOG_PID": own})
    assert env == config.Environment("/h/.config", "@n", 15_000_000)


@pytest.mark.parametrize("variables", [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"},
                                       {"WATCHDOG_USEC": "5", "WATCHDOG_PID": "1"}])  # fmt: skip
def test_a_watchdog_meant_for_nobody_or_another_process_is_none(variables: dict[str, str]) -> None:
    assert config.environment(variables).watchdog_usec is None
