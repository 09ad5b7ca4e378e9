"""What is exposed is what docs/metrics.md lists, and the numbers are the snapshot's."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from forebay.daemon import metrics
from forebay.daemon.status import DaemonSnapshot
from forebay.kvstore.stats import Counters, StoreStats, TierStats

MakeSnapshot = Callable[..., DaemonSnapshot]
PAGE = Path(__file__).resolve().parents[2] / "docs/metrics.md"
ROW = re.compile(r"^\| `(forebay_\w+)` \| (\w+) \| ([\w, ]*?) ?\| ([^|]+) \| ?([^|]*) ?\|$", re.MULTILINE)


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = ROW.findall(PAGE.read_text())
    return {name: (kind, tuple(filter(None, labels.split(", ")))) for name, kind, labels, _, _ in rows}


def samples(snapshot: DaemonSnapshot) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = metrics.exposition(snapshot).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(snapshot: DaemonSnapshot, name: str, **labels: str) -> float:
    return samples(snapshot)[name, tuple(sorted(labels.items()))]


def test_the_page_lists_every_row_that_names_a_metric() -> None:
    assert len(documented()) == PAGE.read_text().count("\n| `forebay_")


def test_the_page_and_the_code_name_the_same_metrics_types_and_labels() -> None:
    assert documented() == {family.name: (family.kind, family.labels) for family in metrics.FAMILIES}


def test_the_page_and_the_exposition_name_the_same_metrics(make_snapshot: MakeSnapshot) -> None:
    text = metrics.exposition(make_snapshot()).decode()
    exposed = {}
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            exposed[name] = kind
    assert exposed == {name: kind for name, (kind, _) in documented().items()}


def test_every_family_has_a_sample_with_its_labels(make_snapshot: MakeSnapshot) -> None:
    found = samples(make_snapshot())
    for name, (kind, labels) in documented().items():
        sample = f"{name}_bucket" if kind == "histogram" else name
        wanted = {*labels, "le"} if kind == "histogram" else set(labels)
        assert any(each == sample and {key for key, _ in pairs} == wanted for each, pairs in found), name


def test_names_carry_the_prefix_and_units() -> None:
    for family in metrics.FAMILIES:
        assert family.name.startswith("forebay_")
        assert family.name.endswith("_total") == (family.kind == "counter")
        assert not re.search(r"_(ms|us|kb|mib|s)(_total)?$", family.name), "base units only: seconds, bytes"


@pytest.mark.parametrize("field", [each.name for each in fields(Counters)])
def test_every_counter_of_the_core_is_exposed_once(make_snapshot: MakeSnapshot, field: str) -> None:
    snapshot = make_snapshot()
    wanted = float(getattr(snapshot.store.counters, field))
    assert list(samples(snapshot).values()).count(wanted) == 1


@pytest.mark.parametrize("record", [StoreStats, TierStats])
def test_every_number_of_the_core_is_read_by_some_family(record: type) -> None:
    source = Path(metrics.__file__).read_text()
    skipped = {"tier", "draining", "slab_bytes", "slots_total", "gpu_refusals"}
    for each in fields(record):
        assert each.name in skipped or each.name in source, each.name


def test_numbers_are_the_snapshots(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot()
    assert value(snapshot, "forebay_build_info", version="9.9.9") == 1
    assert value(snapshot, "forebay_tier_slots", tier="host", state="quarantined") == 3
    assert value(snapshot, "forebay_tier_slabs", tier="host", state="free") == 54
    assert value(snapshot, "forebay_request_errors_total", verb="reserve", error="Busy") == 1
    assert value(snapshot, "forebay_sessions_refused_total", reason="Forbidden") == 2
    assert value(snapshot, "forebay_process_cpu_seconds_total") == 12.5


def test_latency_buckets_are_cumulative(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot()
    assert value(snapshot, "forebay_request_seconds_bucket", verb="lookup", le="2e-05") == 0
    assert value(snapshot, "forebay_request_seconds_bucket", verb="lookup", le="5e-05") == 1
    assert value(snapshot, "forebay_request_seconds_bucket", verb="lookup", le="1.0") == 1
    assert value(snapshot, "forebay_request_seconds_bucket", verb="lookup", le="+Inf") == 2
    assert value(snapshot, "forebay_request_seconds_count", verb="lookup") == 2
    assert value(snapshot, "forebay_request_seconds_sum", verb="lookup") == pytest.approx(2.00003)


def test_tenants_cannot_multiply_series(make_snapshot: MakeSnapshot) -> None:
    found = samples(make_snapshot(namespaces=500))
    blocks = {labels: amount for (name, labels), amount in found.items() if name == "forebay_namespace_blocks"}
    assert len(blocks) == metrics.NAMESPACES_MAX + 1
    assert sum(blocks.values()) == sum(range(100, 600))


def test_a_hostile_model_name_stays_in_its_label(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot()
    object.__setattr__(snapshot.store.namespaces[0], "model", 'x"} 1\nforged_metric 7\n\\')
    assert not any(name == "forged_metric" for name, _ in samples(snapshot))


def test_how_well_load_times_are_foreseen_is_told_by_tier(make_snapshot: MakeSnapshot) -> None:
    snapshot = make_snapshot()
    assert value(snapshot, "forebay_plan_eta_error_ratio_sum", tier="host") == 1.5
    assert value(snapshot, "forebay_plan_eta_error_ratio_sum", tier="nvme") == 3.0
    assert value(snapshot, "forebay_plan_eta_error_ratio_count", tier="host") == sum(range(1, 9))
