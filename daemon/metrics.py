"""A DaemonSnapshot as Prometheus text.

One table, FAMILIES, says which metrics exist and which field each reads; docs/metrics.md lists the same names and a
test compares the two. Counters are totals, never rates. Series are few: labels come from closed sets, and of
namespaces only the largest have series of their own. Rejected: prometheus_client's global registry and live metric
objects, which count on the owner thread and could disagree with the status document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from forebay.daemon.counters import LATENCY_BOUNDS_S
from forebay.daemon.status import SERVING, DaemonSnapshot, saved_dollars, write_dollars
from forebay.kvstore.physics import ETA_BOUNDS, SIZES_TOLD, LinkStats, PhysicsStats
from forebay.kvstore.stats import Counters, NamespaceStats, TierStats
from forebay.tiers import nvme_jobs
from forebay.tiers.nvme_jobs import DriveInfo

NAMESPACES_MAX = 32
REST = "rest"
FINGERPRINT_CHARS = 12

Samples = Iterable[tuple[tuple[str, ...], float]]


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name as Prometheus stores it (counters end in ``_total``) and how to read its samples."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    meaning: str
    read: Callable[[DaemonSnapshot], Samples]


def _gauge(name: str, meaning: str, read: Callable[[DaemonSnapshot], float]) -> Family:
    return Family(name, "gauge", (), meaning, lambda snapshot: [((), read(snapshot))])


def _counter(name: str, meaning: str, read: Callable[[DaemonSnapshot], float]) -> Family:
    return Family(name, "counter", (), meaning, lambda snapshot: [((), read(snapshot))])


def _core(field: str, meaning: str) -> Family:
    """A counter of the core: ``Counters.field`` as ``forebay_field_total``."""
    return _counter(f"forebay_{field}_total", meaning, lambda snapshot: getattr(snapshot.store.counters, field))


def _tier(field: str, meaning: str) -> Family:
    """A gauge of the core's accounting of each tier."""
    return Family(
        f"forebay_tier_{field}", "gauge", ("tier",), meaning,
        lambda snapshot: [((tier.tier,), getattr(tier, field)) for tier in snapshot.store.tiers],
    )  # fmt: skip


def _tier_memory(field: str, meaning: str) -> Family:
    """A gauge of what a tier says about its own memory."""
    return Family(
        f"forebay_tier_{field}", "gauge", ("tier",), meaning,
        lambda snapshot: [((tier.tier,), getattr(tier, field)) for tier in snapshot.tiers],
    )  # fmt: skip


def _movement(field: str, meaning: str) -> Family:
    """A gauge of what is between the tiers; nothing where there is no nvme tier."""
    return Family(
        f"forebay_nvme_{field}", "gauge", (), meaning,
        lambda snapshot: [((), getattr(snapshot.store.movement, field))] if snapshot.store.movement else [],
    )  # fmt: skip


def _drives(snapshot: DaemonSnapshot) -> tuple[DriveInfo, ...]:
    return snapshot.nvme.drives if snapshot.nvme else ()


def _drive(field: str, meaning: str) -> Family:
    """A gauge of each drive."""
    return Family(
        f"forebay_nvme_drive_{field}", "gauge", ("path",), meaning,
        lambda snapshot: [((drive.path,), getattr(drive, field)) for drive in _drives(snapshot)],
    )  # fmt: skip


def _nvme_counter(field: str, meaning: str) -> Family:
    return Family(
        f"forebay_nvme_{field}_total", "counter", (), meaning,
        lambda snapshot: [((), getattr(snapshot.nvme, field))] if snapshot.nvme else [],
    )  # fmt: skip


def _slots(tier: TierStats) -> dict[str, int]:
    return {
        "free": tier.slots_free,
        "reserved": tier.slots_reserved,
        "quarantined": tier.slots_quarantined,
        "resident": tier.slots_resident,
    }


def _outcomes(counters: Counters) -> dict[str, int]:
    return {
        "write": counters.reserved_blocks,
        "present": counters.present_blocks,
        "in_flight": counters.in_flight_blocks,
        "full": counters.rejected_full_blocks,
        "orphan": counters.rejected_orphan_blocks,
        "draining": counters.rejected_draining_blocks,
        "bypassed": counters.bypassed_blocks,
    }


def _namespaces(field: str) -> Callable[[DaemonSnapshot], Samples]:
    """One gauge per namespace for the largest ones, the others summed, so that tenants cannot multiply series."""

    def read(snapshot: DaemonSnapshot) -> Samples:
        ordered = sorted(snapshot.store.namespaces, key=lambda each: (-each.resident_bytes, each.fingerprint))
        totals: dict[tuple[str, ...], float] = {}
        for position, each in enumerate(ordered):
            key = _namespace_labels(each) if position < NAMESPACES_MAX else (REST, "", "")
            totals[key] = totals.get(key, 0) + getattr(each, field)
        return totals.items()

    return read


def _namespace_labels(namespace: NamespaceStats) -> tuple[str, str, str]:
    return namespace.fingerprint[:FINGERPRINT_CHARS], namespace.model[:64], str(namespace.uid)


def _namespace(field: str, meaning: str) -> Family:
    return Family(f"forebay_namespace_{field}", "gauge", ("namespace", "model", "uid"), meaning, _namespaces(field))


def _each(physics: PhysicsStats | None) -> tuple[PhysicsStats, ...]:
    return () if physics is None else (physics,)


def _physics(
    name: str, kind: Literal["counter", "gauge"], meaning: str, read: Callable[[PhysicsStats], float]
) -> Family:
    return Family(
        f"forebay_{name}", kind, (), meaning,
        lambda snapshot: [((), read(physics)) for physics in _each(snapshot.store.physics)],
    )  # fmt: skip


def _links(snapshot: DaemonSnapshot) -> list[LinkStats]:
    """Those of the tiers that there are."""
    tiers = {tier.tier for tier in snapshot.store.tiers}
    return [link for physics in _each(snapshot.store.physics) for link in physics.links if link.tier in tiers]


def _dollars(snapshot: DaemonSnapshot, read: Callable[[DaemonSnapshot], float | None]) -> Samples:
    """Nothing without a price."""
    dollars = read(snapshot)
    return [] if dollars is None else [((), dollars)]


def _namespace_curves(snapshot: DaemonSnapshot) -> Samples:
    return [
        ((fingerprint[:FINGERPRINT_CHARS], f"{share:g}"), hit)
        for physics in _each(snapshot.store.physics)
        for fingerprint, points in physics.curves[:NAMESPACES_MAX]
        for share, (_, hit) in zip(SIZES_TOLD, points, strict=True)
    ]


FAMILIES: tuple[Family, ...] = (
    Family("forebay_build_info", "gauge", ("version",), "Always 1; the version is the label",
           lambda snapshot: [((snapshot.version,), 1)]),
    _gauge("forebay_uptime_seconds", "Time since the daemon started", lambda snapshot: snapshot.uptime_s),
    _gauge("forebay_draining", "1 while the daemon shuts down", lambda snapshot: snapshot.state != SERVING),
    # Sessions and rights
    _gauge("forebay_sessions", "Clients attached now", lambda snapshot: snapshot.store.sessions),
    _core("sessions_opened", "Sessions opened"),
    _core("sessions_closed", "Sessions ended, by the client or by its death"),
    Family("forebay_sessions_refused_total", "counter", ("reason",), "Clients turned away",
           lambda snapshot: [((reason,), count) for reason, count in sorted(snapshot.refused_sessions.items())]),
    _gauge("forebay_gpu_pinned_bytes", "Mapped memory that clients' GPUs reach by themselves, summed over clients",
           lambda snapshot: snapshot.store.gpu_pinned_bytes),
    _gauge("forebay_gpu_unpinned_sessions", "Clients that could not pin some of it and copy it once more",
           lambda snapshot: snapshot.store.gpu_unpinned_sessions),
    _gauge("forebay_leases", "Read leases alive", lambda snapshot: snapshot.store.leases),
    _gauge("forebay_leased_blocks", "Blocks under at least one lease", lambda snapshot: snapshot.store.leased_blocks),
    _gauge("forebay_reservations", "Reservations alive", lambda snapshot: snapshot.store.reservations),
    _gauge("forebay_quarantined_reservations", "Expired reservations whose writer may still be writing",
           lambda snapshot: snapshot.store.quarantined_reservations),
    _gauge("forebay_pinned_blocks", "Blocks pinned", lambda snapshot: snapshot.store.pinned_blocks),
    _core("expired_leases", "Leases ended by the clock"),
    _core("expired_reservations", "Reservations ended by the clock"),
    # Blocks
    _core("lookups", "Lookups answered"),
    _core("lookup_hashes", "Hashes asked for by lookups"),
    _core("lookup_hit_blocks", "Leading complete blocks that lookups found"),
    _core("acquired_blocks", "Blocks leased for reading"),
    _core("acquired_bytes", "Bytes of the blocks leased for reading"),
    Family("forebay_store_blocks_total", "counter", ("outcome",), "Blocks of stores, by what became of each",
           lambda snapshot: [((name,), count) for name, count in _outcomes(snapshot.store.counters).items()]),
    _core("committed_blocks", "Blocks made visible"),
    _core("committed_bytes", "Bytes of the blocks made visible"),
    _core("aborted_blocks", "Blocks reserved and given back unwritten"),
    _core("evicted_blocks", "Blocks dropped for space: no tier has them any more"),
    _core("removed_blocks", "Blocks dropped on request"),
    _core("done_hints", "Hints that a conversation is over"),
    _core("done_blocks", "Blocks that went first by them"),
    _core("stopped_hints", "Hints how an answer stopped"),
    _core("expect_hints", "Hints that a conversation will go on soon"),
    _core("expected_blocks", "Blocks kept by them"),
    _core("preferred_blocks", "Blocks stored with a priority above 0"),
    _core("unpreferred_blocks", "Blocks stored without the priority asked for: beyond the share that may have one"),
    _core("unexpected_blocks", "Blocks not kept although hinted at: beyond the share that hints may keep"),
    # Tiers
    _tier_memory("up", "1 while the tier works"),
    _tier("capacity_bytes", "Hard cap of the tier"),
    _tier("resident_bytes", "Bytes of the blocks in the tier"),
    Family("forebay_tier_slabs", "gauge", ("tier", "state"), "Slabs by whether a namespace has them",
           lambda snapshot: [((tier.tier, state), count) for tier in snapshot.store.tiers
                             for state, count in (("assigned", tier.slabs_assigned),
                                                  ("free", tier.slabs_total - tier.slabs_assigned))]),
    Family("forebay_tier_slots", "gauge", ("tier", "state"), "Slots of the assigned slabs, by state",
           lambda snapshot: [((tier.tier, state), count) for tier in snapshot.store.tiers
                             for state, count in _slots(tier).items()]),
    _tier_memory("populated_bytes", "Memory touched ahead of use"),
    _tier_memory("locked_bytes", "Memory that cannot be swapped"),
    Family("forebay_tier_warnings", "gauge", ("tier",), "Warnings the tier gives in the status",
           lambda snapshot: [((tier.tier,), len(tier.warnings)) for tier in snapshot.tiers]),
    # Between host memory and nvme
    _core("released_blocks", "Blocks that left host memory for space and stay on nvme"),
    _core("evicted_unwritten_blocks", "Of the blocks evicted, those that were never written to nvme although worth it"),
    _core("promoted_blocks", "Blocks brought from nvme to host memory"),
    _core("promoted_bytes", "Bytes of those"),
    _core("promotions_full_blocks", "Blocks not brought for want of room in host memory"),
    _core("promotions_cancelled_blocks", "Blocks not brought because nobody waited for them any more"),
    _core("promotions_failed_blocks", "Blocks that could not be read from nvme"),
    _core("corrupt_blocks", "Blocks whose checksum was wrong; none of them was served"),
    _core("stale_blocks", "Places on nvme that turned out to hold another block"),
    _core("demoted_blocks", "Blocks written to nvme"),
    _core("demoted_bytes", "Bytes of those"),
    _core("demotions_failed_blocks", "Blocks that could not be written to nvme"),
    _core("restored_blocks", "Blocks of an earlier life found on nvme"),
    _core("restored_dropped_blocks", "Blocks of an earlier life that were not taken in"),
    Family("forebay_nvme_declined_chains_total", "counter", ("reason",),
           "Parts of chains found not to be worth a write to nvme, for its cost or since the budget runs out",
           lambda snapshot: [((reason,), getattr(snapshot.store.counters, f"declined_{reason}_chains"))
                             for reason in ("cost", "budget")]),
    _core("declined_blocks", "Blocks of those"),
    _movement("loads", "Transfers from nvme under way"),
    _movement("loading_blocks", "Blocks on their way from nvme"),
    _movement("writes", "Transfers to nvme under way"),
    _movement("writing_blocks", "Blocks on their way to nvme"),
    _movement("writing_bytes", "Bytes on their way to nvme"),
    _movement("dirty_blocks", "Blocks that are in host memory only, where there is an nvme tier"),
    _movement("ready", "1 when the nvme tier has told which of its slabs are in use"),
    _movement("budget_bytes_per_day", "Bytes that may be written to nvme in a day; 0: any number"),
    _movement("budget_left_bytes", "Bytes that may be written to nvme at once; -1: any number"),
    _drive("up", "1 while the drive is used"),
    Family("forebay_nvme_drive_direct", "gauge", ("path",), "1 with direct I/O, 0 where the file system refused it",
           lambda snapshot: [((drive.path,), drive.io in ("direct", "staged")) for drive in _drives(snapshot)]),
    Family("forebay_nvme_drive_io_process_ends_total", "counter", ("path",),
           "I/O processes of the drive that ended by themselves",
           lambda snapshot: [((drive.path,), drive.io_process_ends) for drive in _drives(snapshot)]),
    _drive("io_memory_bytes", "Memory that the drive's I/O takes beside the host's slabs"),
    _drive("writing", "0 while writing pauses after errors"),
    _drive("queued_load_blocks", "Blocks waiting to be read"),
    _drive("queued_write_blocks", "Blocks waiting to be written"),
    _drive("loading", "Reads under way at the drive"),
    _drive("storing", "Writes under way at the drive"),
    _drive("index_records", "Blocks in the drive's index"),
    _drive("index_queue", "Changes waiting for the drive's index"),
    _drive("lifetime_written_bytes", "Bytes written to the drive's slots, over all restarts"),
    Family("forebay_nvme_index_up", "gauge", ("path",), "1 while the drive's index is read and written as it should be",
           lambda snapshot: [((drive.path,), drive.index == "up") for drive in _drives(snapshot)]),
    _nvme_counter("read_bytes", "Bytes read from the drives, header pages included"),
    _nvme_counter("written_bytes", "Bytes written to the drives, header pages included"),
    _nvme_counter("read_blocks", "Blocks read from the drives"),
    _nvme_counter("written_blocks", "Blocks written to the drives"),
    Family("forebay_nvme_errors_total", "counter", ("cause",), "Blocks that the nvme tier failed with, by cause",
           lambda snapshot: [((cause.lower(),), count)
                             for cause, count in (snapshot.nvme.errors if snapshot.nvme else ())]),
    Family("forebay_nvme_io_seconds", "histogram", ("direction",), "Time of one I/O call, several blocks in some",
           lambda snapshot: []),
    Family("forebay_nvme_life_bytes", "gauge", (), "Bytes that all drives together are rated for; 0: not configured",
           lambda snapshot: [((), snapshot.nvme.life_bytes)] if snapshot.nvme else []),
    Family("forebay_nvme_restored_fraction", "gauge", (), "How much of what is on nvme has been found since the start",
           lambda snapshot: [((), snapshot.nvme.restored_fraction)] if snapshot.nvme else []),
    _core("slabs_assigned", "Slabs given to a namespace"),
    _core("slabs_retired", "Slabs taken back from a namespace"),
    # Namespaces
    _gauge("forebay_namespaces", "Namespace groups known", lambda snapshot: len(snapshot.store.namespaces)),
    _namespace("blocks", "Complete or partial blocks of a namespace"),
    _namespace("pinned_blocks", "Pinned blocks of a namespace"),
    _namespace("resident_bytes", "Bytes of a namespace's blocks in host memory, all shards"),
    _namespace("nvme_resident_bytes", "Bytes of a namespace's blocks on nvme, all shards"),
    Family("forebay_namespace_curve_hit_ratio", "gauge", ("namespace", "size"),
           "Share of the blocks asked for that all tiers would hit, were they so many times as large",
           _namespace_curves),
    # Work and time
    _physics("saved_tokens_total", "counter", "Tokens of leased blocks: nobody had to compute them",
             lambda p: p.savings.tokens),
    _physics("prefill_flops_saved_total", "counter", "Operations that computing those would have taken",
             lambda p: p.savings.flops),
    _physics("gpu_seconds_saved_total", "counter", "GPU time that computing those would have taken",
             lambda p: p.savings.gpu_s),
    _physics("gpu_seconds_stalled_total", "counter", "GPU time that went into loading them, as the links are measured",
             lambda p: p.savings.stall_gpu_s),
    Family("forebay_cost_saved_dollars", "gauge", (), "Dollars saved, less those for loading and for writes",
           lambda snapshot: _dollars(snapshot, saved_dollars)),
    Family("forebay_write_cost_dollars_total", "counter", (), "Dollars of wear by what was written to nvme",
           lambda snapshot: _dollars(snapshot, write_dollars)),
    Family("forebay_plan_decisions_total", "counter", ("decision",), "Lookups that found something, by their advice",
           lambda snapshot: [((name,), getattr(physics.plans, name)) for physics in _each(snapshot.store.physics)
                             for name in ("load", "part", "recompute")]),
    _physics("plan_late_loads_total", "counter", "Loads that clients gave up at their soft deadline",
             lambda p: p.plans.late),
    Family("forebay_plan_eta_error_ratio", "histogram", ("tier",), "Error of predicted load times, relative",
           lambda snapshot: []),
    Family("forebay_link_bytes_per_second", "gauge", ("tier",), "Bandwidth that plans reckon with",
           lambda snapshot: [((link.tier,), link.gb_s * 1e9) for link in _links(snapshot)]),
    Family("forebay_link_latency_seconds", "gauge", ("tier",), "Time before the first byte that plans reckon with",
           lambda snapshot: [((link.tier,), link.latency_s) for link in _links(snapshot)]),
    Family("forebay_link_queued_bytes", "gauge", ("tier",), "Bytes on their way, or waiting to be",
           lambda snapshot: [((link.tier,), link.queued_bytes) for link in _links(snapshot)]),
    _physics("prefill_reports_total", "counter", "Prefills that engines have reported", lambda p: p.prefill_samples),
    Family("forebay_curve_hit_ratio", "gauge", ("size",),
           "Share of the tokens asked for that all tiers would hit, were they so many times as large",
           lambda snapshot: [((f"{share:g}",), point.hit_share) for physics in _each(snapshot.store.physics)
                             for share, point in zip(SIZES_TOLD, physics.curve, strict=True)]),
    _physics("curve_blocks", "gauge", "Blocks that the curve follows", lambda p: p.curve_keys),
    _physics("curve_skipped_total", "counter", "Requests that the curve left out, because too many came at once",
             lambda p: p.curve_skipped),
    # Requests
    Family("forebay_requests_total", "counter", ("verb",), "Requests answered, errors included",
           lambda snapshot: [((verb.verb,), verb.requests) for verb in snapshot.verbs]),
    Family("forebay_request_errors_total", "counter", ("verb", "error"), "Requests answered with an error",
           lambda snapshot: [((verb.verb, error), count) for verb in snapshot.verbs
                             for error, count in sorted(verb.errors.items())]),
    Family("forebay_request_seconds", "histogram", ("verb",), "Time from a request's arrival to its answer",
           lambda snapshot: []),
    # The owner loop and the process
    _counter("forebay_loop_turns_total", "Turns of the owner loop", lambda snapshot: snapshot.loop.turns),
    _counter("forebay_loop_busy_seconds_total", "Time the owner loop worked", lambda snapshot: snapshot.loop.busy_s),
    _gauge("forebay_loop_longest_turn_seconds", "Longest turn since start",
           lambda snapshot: snapshot.loop.longest_turn_s),
    _gauge("forebay_process_resident_bytes", "Memory of the daemon's process",
           lambda snapshot: snapshot.process.rss_bytes),
    _counter("forebay_process_cpu_seconds_total", "Processor time of the daemon",
             lambda snapshot: snapshot.process.cpu_s),
    _gauge("forebay_process_open_fds", "File descriptors open", lambda snapshot: snapshot.process.open_fds),
    _gauge("forebay_process_fds_max", "File descriptors allowed", lambda snapshot: snapshot.process.fds_max),
    _gauge("forebay_process_threads", "Threads of the daemon", lambda snapshot: snapshot.process.threads),
)  # fmt: skip


class SnapshotCollector(Collector):
    """Yields every family of one snapshot."""

    def __init__(self, snapshot: DaemonSnapshot) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            yield _metric(family, self._snapshot)


def _metric(family: Family, snapshot: DaemonSnapshot) -> Metric:
    if family.kind == "histogram":
        return _histogram(family, snapshot)
    make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = make(family.name, family.meaning, labels=family.labels)
    for labels, value in family.read(snapshot):
        metric.add_metric(labels, float(value))
    return metric


def _histogram(family: Family, snapshot: DaemonSnapshot) -> Metric:
    metric = HistogramMetricFamily(family.name, family.meaning, labels=family.labels)
    bounds, series = _HISTOGRAMS[family.name](snapshot)
    edges = [str(bound) for bound in bounds] + ["+Inf"]
    for label, counts, total_s in series:
        metric.add_metric((label,), list(zip(edges, map(float, accumulate(counts)), strict=True)), total_s)
    return metric


Histogram = tuple[Sequence[float], Iterable[tuple[str, Sequence[int], float]]]


def _request_seconds(snapshot: DaemonSnapshot) -> Histogram:
    return LATENCY_BOUNDS_S, [(verb.verb, verb.latency_counts, verb.latency_sum_s) for verb in snapshot.verbs]


def _io_seconds(snapshot: DaemonSnapshot) -> Histogram:
    info = snapshot.nvme
    directions = (("load", info.load_latency), ("write", info.write_latency)) if info is not None else ()
    return nvme_jobs.LATENCY_BOUNDS_S, [(name, latency.counts, latency.sum_s) for name, latency in directions]


def _eta_errors(snapshot: DaemonSnapshot) -> Histogram:
    tiers = [tier.tier for tier in snapshot.store.tiers]
    errors = [zip(tiers, physics.plans.errors, strict=False) for physics in _each(snapshot.store.physics)]
    return ETA_BOUNDS, [(tier, found.counts, found.total) for each in errors for tier, found in each]


_HISTOGRAMS = {
    "forebay_request_seconds": _request_seconds,
    "forebay_nvme_io_seconds": _io_seconds,
    "forebay_plan_eta_error_ratio": _eta_errors,
}


def exposition(snapshot: DaemonSnapshot) -> bytes:
    """The snapshot in Prometheus's text format (a few milliseconds: never on the owner thread)."""
    registry = CollectorRegistry()
    registry.register(SnapshotCollector(snapshot))
    return generate_latest(registry)
