"""Processes of a benchmark: cores, ends and deadlines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forebay.bench.processes import BenchError, Cores, Process, wait_until


def test_client_and_daemon_have_a_core_each_where_there_are_two() -> None:
    """Sharing one, they would time each other."""
    cores = Cores.of([3, 1, 2])
    assert (cores.client, cores.daemon, cores.free) == ({1}, {2}, {1, 2, 3})
    one = Cores.of([5])
    assert one.client == one.daemon == one.others == one.free == {5}


@pytest.mark.parametrize(("available", "client", "others"), [([1, 2], {2}, {1}), ([1, 2, 3, 4], {1}, {3, 4})])
def test_busy_others_leave_the_core_of_the_daemon_alone(
    available: list[int], client: set[int], others: set[int]
) -> None:
    """Else the kernel's time slices would be measured."""
    cores = Cores.of(available)
    assert (cores.busy_client, cores.others) == (client, others)
    assert cores.daemon == {2}


def test_wait_ends_with_an_error_at_its_deadline() -> None:
    """No wait of a benchmark is for ever."""
    with pytest.raises(BenchError, match=r"the moon: not within 0\.01 s"):
        wait_until(lambda: False, 0.01, "the moon")


def test_process_is_gone_when_its_context_ends(tmp_path: Path) -> None:
    """Whatever happened meanwhile."""
    command = [sys.executable, "-P", "-c", "import sys; sys.stdin.read()"]
    with pytest.raises(ZeroDivisionError), Process("reader", command, tmp_path / "log", pipes=True) as process:
        raise ZeroDivisionError
    assert process.child.returncode is not None


def test_failure_shows_the_end_of_the_log(tmp_path: Path) -> None:
    """The log is removed with the run's directory."""
    command = [sys.executable, "-P", "-c", "import sys; sys.exit('no such thing')"]
    with Process("reader", command, tmp_path / "log") as process:
        process.child.wait(10)
        with pytest.raises(BenchError, match=r"reader ended with status 1 \| no such thing"):
            process.check()
