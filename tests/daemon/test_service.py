"""The daemon as its operator meets it: files and modes, service manager, reload, endpoints, exit codes."""

from __future__ import annotations

import json
import os
import signal
import stat
import urllib.request

import pytest

from forebay.client import Client
from forebay.tiers.nvme_bandwidth import Bandwidth, write_bandwidth
from support.actor import SPEC, chain, payload
from support.live import LiveDaemon, eventually
from support.nvme_live import NvmeDaemon


def _mode(path: os.PathLike[str]) -> int:
    return stat.S_IMODE(os.stat(path).st_mode)


def test_sockets_and_folder_are_the_owners_alone() -> None:
    with LiveDaemon() as daemon:
        assert _mode(daemon.runtime_dir) == 0o750
        assert {name: _mode(daemon.runtime_dir / name) for name in ("control.sock", "session.sock", "daemon.lock")} == {
            "control.sock": 0o600,
            "session.sock": 0o600,
            "daemon.lock": 0o600,
        }
        assert daemon.stop() == 0


def test_leftovers_of_a_killed_daemon_do_not_stop_the_next() -> None:
    with LiveDaemon() as daemon:
        daemon.kill()
        assert (daemon.runtime_dir / "session.sock").exists()
        daemon.start()
        with Client(daemon.runtime_dir, strict=True) as client:
            assert client.ping()


def test_service_manager_hears_of_start_and_stop() -> None:
    with LiveDaemon() as daemon:
        assert any(b"READY=1" in message for message in daemon.messages)
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        daemon.wait_for(b"STOPPING=1")
        assert daemon.process.wait(10) == 0


def test_sighup_takes_over_what_is_safe_and_keeps_the_rest() -> None:
    with LiveDaemon() as daemon:
        daemon.config_path.write_text(
            '[leases]\nttl_ms = 1234\n[runtime]\nlog_level = "debug"\n[host]\nslab_bytes = "4MiB"\n'
        )
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for(b"RELOADING=1")
        daemon.wait_for(b"READY=1")
        log = daemon.log_path.read_text()
        assert "msg=reloaded key=leases.ttl_ms old=30000 new=1234" in log
        assert "needs a restart, kept" in log
        assert "host.slab_bytes" in log
        assert daemon.status()["store"]["tiers"][0]["slab_bytes"] == 2 << 20


def test_sighup_with_a_wrong_file_keeps_the_running_configuration() -> None:
    with LiveDaemon() as daemon:
        daemon.config_path.write_text("[leases]\nttl_sm = 1\n")
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for(b"READY=1")
        assert "leases.ttl_sm: unknown key" in daemon.log_path.read_text()
        assert daemon.status()["ready"]


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/readyz", "/healthz"])
def test_endpoints_answer_over_loopback(path: str) -> None:
    with LiveDaemon({"metrics.listen": "127.0.0.1:0"}) as daemon:
        with Client(daemon.runtime_dir, strict=True) as client:
            client.store(client.open_namespace(SPEC), chain(1, 2), payload(1, 2))
        address = next(part for part in daemon.log_path.read_text().split() if part.startswith("http="))[5:]
        with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
            body = answer.read().decode()
    assert answer.status == 200
    if path == "/metrics":
        assert "forebay_committed_blocks_total 2.0" in body
    if path == "/healthz":
        assert json.loads(body)["state"] == "serving"


def test_memory_is_populated_in_the_background_and_within_the_cap() -> None:
    with LiveDaemon(host_bytes="32MiB") as daemon:
        eventually(lambda: daemon.status()["tiers"][0]["populated_bytes"] == 32 << 20, "all memory is populated", 30)
        assert daemon.status()["tiers"][0]["capacity_bytes"] == 32 << 20


def test_idle_daemon_does_not_spin() -> None:
    """A loop that always finds something ready would turn thousands of times a second."""
    with LiveDaemon() as daemon, daemon.link():
        before = daemon.status()
        eventually(lambda: daemon.status()["uptime_s"] > before["uptime_s"] + 2, "two seconds pass")
        after = daemon.status()
        asked = sum(v["requests"] for v in after["verbs"]) - sum(v["requests"] for v in before["verbs"])
        turns = after["loop"]["turns"] - before["loop"]["turns"]
        assert turns < 10 * asked + 100, f"{turns} turns for {asked} requests"


def test_what_a_benchmark_measured_is_what_plans_begin_with() -> None:
    """And the configuration says more than the file, and a file that cannot be believed is named in the log."""

    def link() -> tuple[float, str]:
        _, nvme = daemon.store()["physics"]["links"]
        return nvme["gb_s"], nvme["origin"]

    with NvmeDaemon() as daemon:
        assert link() == (3.0, "assumed")
        file = daemon.paths[0] / "bandwidth.json"
        daemon.stop()
        write_bandwidth(daemon.paths[0], Bandwidth(7 * 10**9, 10**9, 2 << 20, 8, "2026-01-02T03:04:05Z"))
        daemon.start()
        assert link() == (7.0, "benched")
        daemon.stop()
        daemon.settings["economics.nvme_gb_s"] = 1.5
        daemon.start()
        assert link() == (1.5, "assumed")
        daemon.stop()
        del daemon.settings["economics.nvme_gb_s"]
        file.write_text(file.read_text().replace("7000000000", '"fast"'))
        daemon.start()
        assert link() == (3.0, "assumed")
        assert "bandwidth.json is not used: read_bytes_per_s is 'fast'" in daemon.log()
        assert daemon.status()["ready"]
