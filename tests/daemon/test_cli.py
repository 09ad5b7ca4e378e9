"""The commands: their grammar, their answers, their exit codes; against a link that is a table of replies."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import pytest

from forebay.daemon import cli, cli_serve, cli_tools, status
from forebay.daemon.cli import Exit
from forebay.daemon.config import Config
from forebay.daemon.status import DaemonSnapshot
from forebay.kvstore.errors import Busy, Forbidden, ForebayError, PeerLost, Timeout, UnknownNamespace
from forebay.transports.messages import (
    CheckReply,
    CheckRequest,
    ClearReply,
    ClearRequest,
    EvictReply,
    EvictRequest,
    FindNamespaceReply,
    LookupReply,
    LookupRequest,
    PingReply,
    PingRequest,
    PinReply,
    PinRequest,
    Reply,
    Request,
    StatusReply,
    StatusRequest,
    UnpinReply,
    UnpinRequest,
)

ROOT = Path(__file__).resolve().parents[2]
NS = "abcd"
ONE, TWO = "11" * 32, "22" * 32
FOUND = FindNamespaceReply(7, b"f" * 32, 2048, 4096, 16, 32, 16)


class FakeLink:
    """Answers from a table by request type, and remembers what was asked."""

    boot_id = b"\xab" * 16

    def __init__(self, replies: dict[type[Request], Reply | ForebayError | list[Reply]]) -> None:
        self.replies = replies
        self.asked: list[Request] = []

    def __call__(self, runtime_dir: str | None, timeout_s: float) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def call(self, request: Request, reply_type: type[Reply]) -> Reply:
        request.check()
        self.asked.append(request)
        reply = self.replies[type(request)]
        if isinstance(reply, list):
            reply = reply.pop(0)
        if isinstance(reply, ForebayError):
            raise reply
        assert isinstance(reply, reply_type)
        return reply

    def find_namespace(self, fingerprint_prefix: bytes, rank: int) -> FindNamespaceReply:
        if fingerprint_prefix != bytes.fromhex(NS):
            raise UnknownNamespace("no such namespace")
        return FOUND


Connect = Callable[..., FakeLink]


@pytest.fixture
def connect(monkeypatch: pytest.MonkeyPatch) -> Connect:
    def made(**replies: Reply | ForebayError | list[Reply]) -> FakeLink:
        by_name: dict[str, type[Request]] = {
            "ping": PingRequest, "status": StatusRequest, "check": CheckRequest, "lookup": LookupRequest,
            "evict": EvictRequest, "pin": PinRequest, "unpin": UnpinRequest, "clear": ClearRequest,
        }  # fmt: skip
        link = FakeLink({by_name[name]: reply for name, reply in replies.items()})
        monkeypatch.setattr(cli_tools, "ControlLink", link)
        return link

    return made


def run(*words: str) -> int:
    return cli.run(words)


def usage_error(*words: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.run(words)
    assert caught.value.code == Exit.USAGE


def test_lookup_prints_what_is_stored(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    link = connect(lookup=LookupReply(1, (("host", 1),), 12, "load", 1))
    assert run("lookup", NS, ONE, TWO) == Exit.OK
    assert capsys.readouterr().out == "1 of 2 blocks (16 tokens): 1 in host\n"
    assert link.asked == [LookupRequest(7, bytes.fromhex(ONE + TWO))]


def test_lookup_tells_the_tiers_apart(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    connect(lookup=LookupReply(2, (("host", 1), ("nvme", 1)), 12, "load", 2))
    assert run("lookup", NS, ONE, TWO) == Exit.OK
    assert capsys.readouterr().out == "2 of 2 blocks (32 tokens): 1 in host, 1 in nvme\n"


def test_lookup_of_nothing_is_a_negative_answer(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    connect(lookup=LookupReply(0, (), 0, "", 0))
    assert run("lookup", "--json", NS, ONE) == Exit.NEGATIVE
    found = json.loads(capsys.readouterr().out)
    assert (found["blocks"], found["of"], found["by_tier"]) == (0, 1, {})


def test_hashes_of_the_wrong_length_are_refused_before_they_are_sent(connect: Connect) -> None:
    link = connect(lookup=LookupReply(0, (), 0, "", 0))
    assert run("lookup", NS, "11" * 16) == Exit.REFUSED
    assert link.asked == []


def test_an_unknown_namespace_is_refused(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    connect()
    assert run("lookup", "ffff", ONE) == Exit.REFUSED
    assert "no such namespace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "scope", "dry_run"), [([], 0, False), (["--prefix"], 1, False), (["--prefix", "--dry-run"], 1, True)]
)
def test_evict_names_its_scope(connect: Connect, flags: list[str], scope: int, dry_run: bool) -> None:
    link = connect(evict=EvictReply(3, 0))
    assert run("evict", *flags, NS, ONE) == Exit.OK
    assert run("evict", NS, *flags, ONE) == Exit.OK
    assert run("evict", NS, ONE, *flags) == Exit.OK
    assert link.asked == 3 * [EvictRequest(7, scope, bytes.fromhex(ONE), dry_run)]


def test_evict_of_a_whole_namespace_takes_no_hashes(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    link = connect(evict=EvictReply(0, 2))
    assert run("evict", NS, "--all") == Exit.NEGATIVE
    assert link.asked == [EvictRequest(7, 2, b"", False)]
    assert capsys.readouterr().out == "removed 0 blocks; kept 2 that are leased, pinned or being written\n"
    assert run("evict", NS, "--all", ONE) == Exit.USAGE
    assert run("evict", NS) == Exit.USAGE


@pytest.mark.parametrize(
    ("words", "requests"),
    [
        (
            ["evict", NS, "--prefix", ONE],
            [EvictRequest(7, 1, bytes.fromhex(ONE), False), EvictRequest(7, 1, b"", False, 5)],
        ),
        (["clear", "--yes"], [ClearRequest(False), ClearRequest(False, 5)]),
    ],
)
def test_long_removal_is_asked_for_until_it_is_done(
    connect: Connect, capsys: pytest.CaptureFixture[str], words: list[str], requests: list[Request]
) -> None:
    link = connect(evict=[EvictReply(400, 0, 5), EvictReply(700, 2)], clear=[ClearReply(400, 0, 5), ClearReply(700, 2)])
    assert run(*words) == Exit.OK
    assert link.asked == requests
    assert capsys.readouterr().out == "removed 700 blocks; kept 2 that are leased, pinned or being written\n"


def test_pin_and_unpin_count(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    connect(pin=PinReply(2), unpin=UnpinReply(1))
    assert run("pin", NS, ONE, TWO) == Exit.OK
    assert run("unpin", "--json", NS, ONE, TWO) == Exit.NEGATIVE
    text = capsys.readouterr().out.splitlines()
    assert text[0] == "pinned 2 of 2 blocks"
    assert json.loads(text[1]) == {"unpinned": 1, "of": 2}


def test_clear_without_yes_where_nobody_can_answer_does_nothing(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = connect(clear=ClearReply(9, 1))
    monkeypatch.setattr("sys.stdin", io.StringIO("yes\n"))
    assert run("clear") == Exit.USAGE
    assert link.asked == []
    assert run("clear", "--dry-run") == Exit.OK
    assert run("clear", "--yes") == Exit.OK
    assert link.asked == [ClearRequest(True), ClearRequest(False)]


def test_ping_reports_its_round_trips(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    link = connect(ping=PingReply())
    assert run("ping", "-c", "5", "--json") == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert len(link.asked) - 1 == found["count"] == 5
    assert found["min_us"] <= found["p50_us"] <= found["max_us"]
    assert found["boot_id"] == "ab" * 16


def test_check_lists_what_is_broken(connect: Connect, capsys: pytest.CaptureFixture[str]) -> None:
    connect(check=CheckReply(()))
    assert run("check") == Exit.OK
    connect(check=CheckReply(("slot 5 is in two places\x1b[2J",)))
    assert run("check") == Exit.NEGATIVE
    assert capsys.readouterr().out == "ok\nslot 5 is in two places?[2J\n"


def test_status_is_a_screen_of_text_or_the_document(
    connect: Connect, make_snapshot: Callable[..., DaemonSnapshot], capsys: pytest.CaptureFixture[str]
) -> None:
    connect(status=StatusReply(status.to_json(make_snapshot(namespaces=30))))
    assert run("status") == Exit.OK
    text = capsys.readouterr().out
    assert "forebay 9.9.9  serving  process 4242  up 1 d 2 h  /run/forebay" in text
    assert "tier host: 123.0 MiB of 1.0 GiB (12.0 %), slabs 10 of 64 x 16.0 MiB" in text
    assert "warning: memory is not locked" in text
    assert "and 10 more namespaces" in text
    assert run("status", "--json") == Exit.OK
    assert json.loads(capsys.readouterr().out)["pid"] == 4242


def test_status_of_a_daemon_that_is_not_ready_is_a_negative_answer(
    connect: Connect, make_snapshot: Callable[..., DaemonSnapshot], capsys: pytest.CaptureFixture[str]
) -> None:
    connect(status=StatusReply(status.to_json(make_snapshot(state="draining"))))
    assert run("status") == Exit.NEGATIVE
    assert "NOT READY: draining" in capsys.readouterr().out


def test_status_of_another_version_is_shown_as_far_as_it_is_known(connect: Connect) -> None:
    connect(status=StatusReply('{"ready": true, "store": {"tiers": [{}], "namespaces": [{}]}, "news": 1}'))
    assert run("status") == Exit.OK


@pytest.mark.parametrize(
    ("error", "code"),
    [(PeerLost("no daemon"), 3), (Timeout("silent"), 4), (Forbidden("not you"), 4), (Busy("full"), 4)],
)
def test_errors_are_exit_codes(
    connect: Connect, error: ForebayError, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    connect(ping=error)
    assert run("ping") == code
    assert str(error) in capsys.readouterr().err
    assert run("ping", "--json") == code
    assert json.loads(capsys.readouterr().out) == {
        "error": type(error).__name__,
        "code": error.code,
        "text": str(error),
    }


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["lookup", NS],
        ["lookup", "abc", ONE],
        ["lookup", NS, "xyz"],
        ["lookup", "--rank", "-1", NS, ONE],
        ["stat", "-i", "0"],
        ["stat", "-i", "nan"],
        ["stat", "-c", "0"],
        ["evict", NS, "--prefix", "--all"],
        ["ping", "--timeout", "x"],
        ["config"],
    ],
)
def test_wrong_usage_is_exit_2(words: list[str]) -> None:
    usage_error(*words)


def test_config_show_tells_where_values_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.toml"
    file.write_text('[host]\nbytes = "64MiB"\n')
    words = ["config", "show", "--config", str(file), "--set", "shutdown.drain_s=2", "--log-level", "debug"]
    assert run(*words) == Exit.OK
    text = capsys.readouterr().out
    assert f'# from {file}\nbytes = "64MiB"' in text
    assert "# from flag\ndrain_s = 2.0" in text
    assert run(*words, "--json") == Exit.OK
    found = json.loads(capsys.readouterr().out)
    assert found["values"]["host.bytes"] == 64 << 20
    assert found["origins"]["runtime.log_level"] == "flag"


def test_config_check_names_every_problem(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.toml"
    file.write_text('[host]\nbyts = "64MiB"\n')
    assert run("config", "check", "--config", str(file), "--set", "limits.sessions=0") == Exit.USAGE
    text = capsys.readouterr().err
    assert f"host.byts: unknown key; did you mean host.bytes? ({file}, line 2)" in text
    assert "limits.sessions: 0 is below the least allowed, 1" in text
    assert run("config", "check", "--json", "--config", str(file)) == Exit.USAGE
    assert json.loads(capsys.readouterr().out)["ok"] is False
    file.write_text("")
    assert run("config", "check", "--config", str(file)) == Exit.OK


def test_a_named_flag_wins_over_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "f.toml"
    file.write_text("")
    words = ["--config", str(file), "--host-bytes", "64MiB", "--set", "host.bytes=32MiB"]
    assert run("config", "show", "--json", *words) == Exit.OK
    assert json.loads(capsys.readouterr().out)["values"]["host.bytes"] == 64 << 20
    assert run("config", "check", "--config", str(file), "--set", "host.bytes") == Exit.USAGE


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Stands in for the daemon; ``started`` keeps what it was given, ``fails`` is what it raises."""
    fake = ModuleType("forebay.daemon.service")
    fake.started = []  # type: ignore[attr-defined]
    fake.fails = None  # type: ignore[attr-defined]

    def start(config: Config, **given: Any) -> None:
        fake.started.append((config, given))
        if fake.fails is not None:
            raise fake.fails

    fake.run = start  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "forebay.daemon.service", fake)
    monkeypatch.setattr("forebay.daemon.service", fake, raising=False)
    monkeypatch.setattr(cli_serve.daemon_logging, "setup", lambda *_: None)
    return fake


def test_serve_runs_the_service_with_its_configuration(
    service: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "f.toml"
    file.write_text("[leases]\nttl_ms = 1000\n")
    monkeypatch.setenv("NOTIFY_SOCKET", "@n")
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    assert run("serve", "--config", str(file), "--runtime-dir", str(tmp_path)) == Exit.OK
    ((config, given),) = service.started
    assert (config.leases.ttl_ms, config.runtime.dir) == (1000, str(tmp_path))
    assert (given["notify_socket"], given["watchdog_usec"]) == ("@n", 2_000_000)
    file.write_text("[leases]\nttl_ms = 2000\n")
    assert given["reload"]().leases.ttl_ms == 2000
    assert given["reload"]().runtime.dir == str(tmp_path)


@pytest.mark.parametrize(
    ("error", "code"), [(Busy("another daemon (process 5)"), 5), (Forbidden("not ours"), 4), (OSError("no port"), 4)]
)
def test_serve_says_why_it_cannot_start(
    service: ModuleType, error: Exception, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.fails = error  # type: ignore[attr-defined]
    (tmp_path / "f.toml").write_text("")
    assert run("serve", "--config", str(tmp_path / "f.toml")) == code
    assert str(error) in capsys.readouterr().err


def test_serve_with_a_wrong_configuration_does_not_start(service: ModuleType, tmp_path: Path) -> None:
    assert run("serve", "--config", str(tmp_path / "absent.toml")) == Exit.USAGE
    assert service.started == []


def test_bench_replaces_this_process_with_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def replace(program: str, arguments: list[str]) -> None:
        seen.append([program, *arguments])
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", replace)
    with pytest.raises(SystemExit):
        run("bench", "--quick", "--json", "--help")
    assert seen == [[sys.executable, sys.executable, "-P", "-m", "forebay.bench", "--quick", "--json", "--help"]]


def in_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_version_loads_nothing_it_does_not_need() -> None:
    out = in_process(
        "import sys; from forebay.daemon import cli; cli.run(['version'])\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'zmq', 'prometheus_client', 'psutil', 'msgpack', 'numpy', 'torch', 'asyncio'}))"
    )
    assert out.splitlines()[1] == "[]"


def test_the_edges_load_no_array_library() -> None:
    out = in_process(
        "import sys\n"
        "import forebay.daemon.cli_stat, forebay.daemon.cli_serve, forebay.daemon.http, forebay.daemon.metrics\n"
        "import forebay.daemon.sdnotify\n"
        "print(sorted({name.split('.')[0] for name in sys.modules} & {'numpy', 'torch', 'cupy', 'lmdb'}))"
    )
    assert out == "[]\n"


def test_a_reader_that_has_enough_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -P -m forebay.daemon.cli config default | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_every_command_and_exit_code_is_on_the_page() -> None:
    page = (ROOT / "docs/cli.md").read_text()
    for code in Exit:
        assert f"\n| {int(code)} |" in page
    help_text = cli.parser().format_help()
    commands = [line.split()[0] for line in help_text.splitlines() if line.startswith("    ") and line[4] != " "]
    assert {"serve", "stat", "bench"} <= set(commands)
    for command in commands:
        assert f"`forebay {command}" in page, command
    for flag, key in cli.NAMED_FLAGS.items():
        assert f"| `{flag} " in page
        assert f"`{key}`" in page
