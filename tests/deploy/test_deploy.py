"""What is handed to operators: unit, container file, scrape configuration, alerts, dashboard, example configuration.

None of it is Python, so nothing else would notice when a metric, a flag or a folder changes its name.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from forebay.daemon import cli, config, configfile
from forebay.daemon.metrics import FAMILIES
from forebay.daemon.settings import Machine, read_listen
from forebay.kvstore import errors
from forebay.transports import paths
from forebay.transports.messages import Verb

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
TOOL_TIMEOUT_S = 100
EXPOSURE_MAX = 1.5
STOP_MARGIN_S = 10
NODE = Machine(memory_bytes=64 << 30, cpus=16)

# --- systemd -------------------------------------------------------------------------------------------------------

needs_systemd = pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")


def unit_settings() -> dict[str, list[str]]:
    settings: dict[str, list[str]] = {}
    for line in (DEPLOY / "forebay.service").read_text().splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


def unit_copy(folder: Path) -> Path:
    """The unit with a program that exists: `verify` looks at the file, and nothing is installed in /opt here."""
    text = (DEPLOY / "forebay.service").read_text()
    assert "/opt/forebay/bin/forebay " in text
    copy = folder / "forebay.service"
    copy.write_text(text.replace("/opt/forebay/bin/forebay ", f"{shutil.which('true')} "))
    return copy


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)


@needs_systemd
def test_systemd_finds_nothing_to_complain_about(tmp_path: Path) -> None:
    """An unknown or misspelled directive is only a warning in the journal; here it is a failure."""
    done = analyze("verify", "--man=no", str(unit_copy(tmp_path)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_systemd
def test_exposure_of_the_unit_stays_low(tmp_path: Path) -> None:
    """0 is locked up, 10 is wide open; what is open on purpose is commented in the unit."""
    unit = str(unit_copy(tmp_path))
    done = analyze("security", "--offline=true", f"--threshold={EXPOSURE_MAX * 10:.0f}", "--no-pager", unit)
    if "--offline" in done.stderr:
        pytest.skip(f"this systemd-analyze cannot look at a file: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout[-500:]


def test_unit_starts_the_daemon_with_a_command_it_knows() -> None:
    """The grammar of the command line decides, not this file."""
    (command,) = unit_settings()["ExecStart"]
    parsed = cli.parser().parse_args(shlex.split(command)[1:])
    assert parsed.command == "serve"
    assert parsed.config == "/etc/forebay/forebay.toml"


def test_unit_agrees_with_the_daemon() -> None:
    """Times and places that both sides must have alike."""
    settings = unit_settings()
    assert settings["Type"] == ["notify"]
    assert settings["RuntimeDirectory"] == [paths.SYSTEM_DIRECTORY.name]
    assert int(settings["RuntimeDirectoryMode"][0], 8) == paths.DIRECTORY_MODE
    shutdown = config.build({}, NODE).shutdown
    assert int(settings["TimeoutStopSec"][0]) > shutdown.drain_s + shutdown.flush_s + STOP_MARGIN_S
    assert "PYTHONSAFEPATH=1" in settings["Environment"]
    assert "FOREBAY_RUNTIME_DIR=%t/forebay" in settings["Environment"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LimitMEMLOCK", "infinity"),
        ("LimitCORE", "0"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectSystem", "strict"),
        ("ExecReload", "/bin/kill -HUP $MAINPID"),
        ("WatchdogSec", "15"),
        ("User", "forebay"),
        ("StateDirectory", "forebay"),
        ("StateDirectoryMode", "0700"),
    ],
)
def test_unit_keeps_what_it_promises(name: str, value: str) -> None:
    """Each has a reason in the unit's comments; losing one silently is how hardening rots."""
    assert unit_settings()[name] == [value]


@pytest.mark.parametrize(
    "name", ["MemoryDenyWriteExecute", "PrivateDevices", "PrivateNetwork", "PrivateUsers", "ProcSubset"]
)
def test_directives_that_break_the_daemon_are_off_with_a_reason(name: str) -> None:
    assert name not in unit_settings()
    assert re.search(rf"^# {name}=\S*  +\S", (DEPLOY / "forebay.service").read_text(), flags=re.MULTILINE)


# --- configuration -------------------------------------------------------------------------------------------------


def test_example_configuration_is_accepted() -> None:
    """With a node's memory, so that the test does not depend on the machine it runs on."""
    loaded = configfile.load(DEPLOY / "forebay.toml", (), NODE)
    assert loaded.config.host.bytes == 32 << 30


def test_example_of_an_nvme_tier_is_accepted_and_lies_where_the_unit_may_write(tmp_path: Path) -> None:
    """It is in comments, where nothing else reads it."""
    text = (DEPLOY / "forebay.toml").read_text()
    begun = text.index("# [nvme]")
    example = "\n".join(line.removeprefix("# ") for line in text[begun : text.index("\n[leases]")].splitlines())
    file = tmp_path / "nvme.toml"
    file.write_text(example)
    loaded = configfile.load(file, (), NODE).config
    assert loaded.nvme.drive_bytes == 1_920 * 10**9
    assert loaded.nvme.paths
    (state,) = unit_settings()["StateDirectory"]
    assert all(Path(path).is_relative_to(f"/var/lib/{state}") for path in loaded.nvme.paths)


def test_example_configuration_passes_the_check_command() -> None:
    """What the deployment's README tells operators to run."""
    forebay = Path(sys.executable).parent / "forebay"
    command = [forebay, "config", "check", "--config", DEPLOY / "forebay.toml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr


# --- container -----------------------------------------------------------------------------------------------------


def container_lines() -> Iterator[tuple[str, str]]:
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    for line in text.splitlines():
        if line and not line.startswith("#"):
            instruction, _, rest = line.partition(" ")
            yield instruction, rest.strip()


def container_values(wanted: str) -> list[str]:
    return [rest for instruction, rest in container_lines() if instruction == wanted]


def copied() -> list[str]:
    """Sources that the container file takes from the repository."""
    return [name for rest in container_values("COPY") if "--from" not in rest for name in shlex.split(rest)[:-1]]


def test_container_copies_everything_that_the_package_is_made_of() -> None:
    """src/forebay holds links: a folder that is not copied is a broken link, and a package without it still builds."""
    assert [name for name in copied() if not (ROOT / name).exists()] == []
    linked = {path.name for path in (ROOT / "src" / "forebay").iterdir() if path.is_symlink()}
    assert linked | {"src", "pyproject.toml", "README.md", "LICENSE"} == set(copied())
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert kept == set(copied())


def test_what_the_container_copies_installs_and_runs(tmp_path: Path) -> None:
    """The build's steps without a container engine: copy those files, install them, ask for the version."""
    context = tmp_path / "context"
    context.mkdir()
    for name in copied():
        source, ignore = ROOT / name, shutil.ignore_patterns("__pycache__", "*.egg-info")
        if source.is_dir():
            shutil.copytree(source, context / name, symlinks=True, ignore=ignore)
        else:
            shutil.copy(source, context / name)
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*install, "--target", target, context], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    program = f"import sys; sys.path.insert(0, {str(target)!r}); from forebay.daemon import cli; print(cli.__file__);"
    program += " sys.exit(cli.run(['version']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(target))


def test_container_runs_commands_that_exist() -> None:
    (entry,), (command,) = container_values("ENTRYPOINT"), container_values("CMD")
    assert json.loads(entry) == ["forebay"]
    assert cli.parser().parse_args(json.loads(command)).command == "serve"
    (health,) = container_values("HEALTHCHECK")
    program, *arguments = json.loads(health.partition("CMD ")[2])
    assert program == "forebay"
    assert cli.parser().parse_args(arguments).command == "ping"


def test_container_is_not_root_and_has_no_registry_of_its_own() -> None:
    """A numeric user, which Kubernetes can check; base images by name alone, so that a site's mirror is used."""
    uid, _, gid = container_values("USER")[-1].partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert all(re.match(r"python:[\w.-]+( AS \w+)?$", image) for image in container_values("FROM"))


# --- metrics -------------------------------------------------------------------------------------------------------

LABELS: dict[str, set[str]] = {"up": set()}
for family in FAMILIES:
    if family.kind == "histogram":
        LABELS |= {f"{family.name}_{part}": {*family.labels, "le"} for part in ("bucket", "sum", "count")}
    else:
        LABELS[family.name] = set(family.labels)

FROM_PROMETHEUS = {"instance", "job"}
WORDS = {"sum", "avg", "by", "topk", "rate", "increase", "resets", "min", "max", "histogram_quantile", "label_values"}

dashboard: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
alerts: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"] for rule in group["rules"]
]


def queries() -> list[tuple[str, str]]:
    """Every PromQL expression handed out, with a name for it."""
    found = [(f"alert {rule['alert']}", rule["expr"]) for rule in alerts]
    for panel in dashboard["panels"]:
        found += [(f"panel {panel['title']}: {target['refId']}", target["expr"]) for target in panel.get("targets", [])]
    found += [
        (f"variable {variable['name']}", variable["query"]["query"])
        for variable in dashboard["templating"]["list"]
        if variable["type"] == "query"
    ]
    return found


def problems(query: str) -> list[str]:
    """What a query asks for that the daemon does not expose: metrics, and labels in matchers and groupings."""
    bare = re.sub(r'"[^"]*"', '""', query)
    names = set(re.findall(r"[a-zA-Z_]\w*", re.sub(r"\{[^}]*\}|\[[^\]]*\]|\bby \([^)]*\)|, *instance\)", "", bare)))
    metrics = names - WORDS
    found = [f"no metric {name}" for name in metrics if name not in LABELS]
    known = set().union(FROM_PROMETHEUS, *(LABELS.get(name, set()) for name in metrics))
    for part in re.findall(r"\{([^}]*)\}", bare):
        found += [f"no label {label}" for label in re.findall(r"(\w+) *[=!]", part) if label not in known]
    for part in re.findall(r"\bby \(([^)]*)\)", bare):
        found += [f"no label {label}" for label in re.split(r", *", part) if label not in known]
    if not metrics or bare.count("(") != bare.count(")") or bare.count("{") != bare.count("}"):
        found.append("malformed")
    return found


@pytest.mark.parametrize("query", [pytest.param(query, id=name) for name, query in queries()])
def test_query_asks_for_what_the_daemon_exposes(query: str) -> None:
    assert problems(query) == []


@pytest.mark.parametrize(
    "query",
    [
        "rate(forebay_nothing_total[5m])",
        "sum by (tire) (forebay_tier_up)",
        'forebay_tier_up{teir="host"}',
        "sum(forebay_tier_up",
        "sum(rate(forebay_request_seconds[5m]))",
    ],
)
def test_wrong_query_is_found(query: str) -> None:
    """The check above, checked."""
    assert problems(query)


def test_label_values_in_alerts_exist() -> None:
    """A matcher for a value that never comes makes an alert that never fires."""
    text = (DEPLOY / "alerts.yml").read_text()
    verbs = {verb.name.lower() for verb in Verb}
    names = {error.__name__ for error in errors.BY_CODE.values()}
    outcomes = {"write", "present", "in_flight", "full", "orphan", "draining"}
    for label, known in (("verb", verbs), ("error", names), ("outcome", outcomes)):
        used = re.findall(rf'\b{label}="([^"]+)"', text)
        assert used
        assert set(used) <= known


def test_dashboard_shows_each_panel_once() -> None:
    """Panels have their own number, a description, and a place that no other panel covers."""
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not covered & cells
        covered |= cells
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or (panel["description"] and panel["targets"])


@pytest.mark.parametrize(
    "metric",
    [
        "forebay_saved_tokens_total",
        "forebay_gpu_seconds_saved_total",
        "forebay_gpu_seconds_stalled_total",
        "forebay_cost_saved_dollars",
        "forebay_write_cost_dollars_total",
        "forebay_curve_hit_ratio",
        "forebay_nvme_declined_chains_total",
        "forebay_plan_decisions_total",
        "forebay_plan_eta_error_ratio_bucket",
    ],
)
def test_dashboard_shows_what_the_daemon_is_worth(metric: str) -> None:
    """Of a panel that names a metric the test above proves that it exists."""
    assert any(re.search(rf"\b{metric}\b", query) for name, query in queries() if name.startswith("panel "))


def test_prometheus_scrapes_where_the_daemon_listens() -> None:
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = scrape["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    assert job["job_name"] == "forebay"
    assert read_listen(target) == read_listen(config.build({}, NODE).metrics.listen)
    assert [name for name in scrape["rule_files"] if not (DEPLOY / name).exists()] == []


def test_alerts_say_what_to_do() -> None:
    assert len({rule["alert"] for rule in alerts}) == len(alerts)
    for rule in alerts:
        assert rule["annotations"]["summary"]
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
