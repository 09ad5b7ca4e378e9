"""The status document as text for people. Reads the JSON that any daemon version sent, so absent keys are no error."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

NAMESPACES_MAX = 20
_ORIGINS = {"benched": "by bandwidth.json", "assumed": "assumed", "measured": "measured"}
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")

Document = Mapping[str, Any]


def printable(text: str, chars_max: int) -> str:
    """Text from elsewhere, cut and without anything a terminal would obey."""
    return "".join(char if char.isprintable() else "?" for char in text[:chars_max])


def size(size_bytes: float) -> str:
    """1536 -> "1.5 KiB"."""
    power = 0
    while size_bytes >= 1024 and power < len(_UNITS) - 1:
        size_bytes /= 1024
        power += 1
    return f"{size_bytes:.0f} {_UNITS[power]}" if power == 0 else f"{size_bytes:.1f} {_UNITS[power]}"


def duration(seconds: float) -> str:
    """93784 -> "1 d 2 h"; the two largest units."""
    whole = int(seconds)
    parts = [(whole // 86400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while len(parts) > 1 and parts[0][0] == 0:
        parts.pop(0)
    return " ".join(f"{count} {unit}" for count, unit in parts[:2])


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def origin(link: Document) -> str:
    """Where the bandwidth of a link comes from, in words."""
    told = printable(str(link.get("origin", "?")), 16)
    return _ORIGINS.get(told, told)


def render(document: Document) -> str:
    """The whole document, a screen of text."""
    store = document.get("store", {})
    lines = [*_head(document), *_tiers(document, store), *_activity(document, store), *_work(document, store)]
    lines += _namespaces(document, store)
    return "\n".join(lines)


def _head(document: Document) -> list[str]:
    process = document.get("process", {})
    name = f"forebay {document.get('version', '?')}  {document.get('state', '?')}  process {document.get('pid', '?')}"
    place = f"up {duration(document.get('uptime_s', 0))}  {printable(document.get('runtime_dir', ''), 200)}"
    drives = ((document.get("nvme") or {}).get("drives")) or ()
    beside = sum(drive.get("io_memory_bytes", 0) for drive in drives)
    of_drives = f", of its drives' I/O {size(beside)}" if beside else ""
    memory = f"memory of the daemon {size(process.get('rss_bytes', 0))}{of_drives}"
    processor = f"processor {process.get('cpu_s', 0):.1f} s"
    descriptors = f"descriptors {process.get('open_fds', 0)} of {process.get('fds_max', 0)}"
    reasons = [f"NOT READY: {printable(reason, 300)}" for reason in document.get("not_ready", [])]
    return [f"{name}  {place}", f"{memory}, {processor}, {descriptors}", *reasons]


def _tiers(document: Document, store: Document) -> list[str]:
    memory = {tier.get("tier"): tier for tier in document.get("tiers", [])}
    lines = []
    for tier in store.get("tiers", []):
        about = memory.get(tier.get("tier"), {})
        lines.append(_tier(tier, about))
        detail = document.get("nvme") if tier.get("tier") == "nvme" else None
        lines += _nvme(detail, store) if detail else []
        lines += [f"  warning: {printable(text, 300)}" for text in store.get("warnings", ())] if detail else []
        said = {drive.get("reason") for drive in (detail or {}).get("drives", ())}
        lines += [f"  warning: {printable(text, 300)}" for text in about.get("warnings", ()) if text not in said]
    return lines


def _tier(tier: Document, about: Document) -> str:
    held, capacity = tier.get("resident_bytes", 0), tier.get("capacity_bytes", 0)
    filled = f"tier {tier.get('tier')}: {size(held)} of {size(capacity)} ({percent(held, capacity)})"
    slabs = f"slabs {tier.get('slabs_assigned', 0)} of {tier.get('slabs_total', 0)} x {size(tier.get('slab_bytes', 0))}"
    if tier.get("tier") == "nvme":
        return f"{filled}, {slabs}"
    touched = f"populated {size(about.get('populated_bytes', 0))}, locked {size(about.get('locked_bytes', 0))}"
    return f"{filled}, {slabs}, pages {about.get('pages', '?')}, {touched}"


def _nvme(detail: Document, store: Document) -> list[str]:
    """What only the nvme tier has to say: a line for each drive, then what all of them did and may still do."""
    movement, counters = store.get("movement") or {}, store.get("counters", {})
    lines = [f"  drive {printable(drive.get('path', '?'), 200)}: {_drive(drive)}" for drive in detail.get("drives", ())]
    moved = f"read {size(detail.get('read_bytes', 0))}, written {size(detail.get('written_bytes', 0))}"
    blocks = f"promoted {counters.get('promoted_blocks', 0)}, demoted {counters.get('demoted_blocks', 0)} blocks"
    lines.append(f"  {moved}, {blocks}, only in memory {movement.get('dirty_blocks', 0)}{_restored(detail, counters)}")
    said = (_wear(detail, movement), _declined(counters), _damage(detail, counters))
    return lines + [f"  {text}" for text in said if text]


def _drive(drive: Document) -> str:
    if not drive.get("up"):
        return f"DOWN: {printable(drive.get('reason', ''), 300)}"
    io = f"{drive.get('io', '?')} I/O" + _because(drive.get("io_reason"))
    reads = f"reads {drive.get('loading', 0)} + {drive.get('queued_load_blocks', 0)} queued"
    writes = f"writes {drive.get('storing', 0)} + {drive.get('queued_write_blocks', 0)} queued"
    paused = "" if drive.get("writing", True) else f", WRITING PAUSED{_because(drive.get('reason'))}"
    state = f"index {drive.get('index', '?')}{_because(drive.get('index_reason'))}"
    index = f"{state}, {drive.get('index_records', 0)} blocks"
    waiting = f", {drive['index_queue']} changes waiting" if drive.get("index_queue") else ""
    return f"up, {io}, {reads}, {writes}{paused}, {index}{waiting}{_ended(drive)}"


def _ended(drive: Document) -> str:
    """Empty where the drive's I/O process has never ended by itself."""
    ends = drive.get("io_process_ends", 0)
    return f", I/O PROCESS ENDED {ends} times{_because(drive.get('io_process_reason'))}" if ends else ""


def _because(reason: str | None) -> str:
    return f" ({printable(reason, 200)})" if reason else ""


def _restored(detail: Document, counters: Document) -> str:
    found = f", restored {counters.get('restored_blocks', 0)}"
    if detail.get("restored", True):
        return found
    return f"{found}, RESTORING {percent(detail.get('restored_fraction', 0.0), 1.0)}"


def _wear(detail: Document, movement: Document) -> str:
    """Empty where nothing about wear is configured."""
    said = []
    per_day, life = movement.get("budget_bytes_per_day", 0), detail.get("life_bytes", 0)
    if per_day:
        said.append(f"write budget {size(per_day)} a day, {size(movement.get('budget_left_bytes', 0))} left at once")
    if life:
        written = sum(drive.get("lifetime_written_bytes", 0) for drive in detail.get("drives", ()))
        said.append(f"drive life left {percent(life - written, life)} ({size(written)} of {size(life)} written)")
    return ", ".join(said)


def _declined(counters: Document) -> str:
    """Empty where everything was worth writing."""
    cost, budget = counters.get("declined_cost_chains", 0), counters.get("declined_budget_chains", 0)
    blocks = counters.get("declined_blocks", 0)
    return f"not worth a write: {blocks} blocks, {cost} chains for the cost, {budget} for the budget" if blocks else ""


def _damage(detail: Document, counters: Document) -> str:
    """Empty where all is well."""
    counts = [(name, counters.get(f"{name}_blocks", 0)) for name in ("corrupt", "stale")]
    counts += [(printable(str(cause), 40), count) for cause, count in detail.get("errors", ())]
    said = ", ".join(f"{name} {count}" for name, count in counts if count)
    return f"blocks in error: {said}" if said else ""


def _activity(document: Document, store: Document) -> list[str]:
    counters = store.get("counters", {})
    return [_held(store), *_pinned(store), _asked(document, counters), _stored(counters)]


def _held(store: Document) -> str:
    leases = f"leases {store.get('leases', 0)} ({store.get('leased_blocks', 0)} blocks)"
    rest = f"reservations {store.get('reservations', 0)}, pinned blocks {store.get('pinned_blocks', 0)}"
    return f"sessions {store.get('sessions', 0)}, {leases}, {rest}"


def _pinned(store: Document) -> list[str]:
    """What clients' GPUs reach by themselves; nothing where no client has one."""
    reached, unpinned = store.get("gpu_pinned_bytes", 0), store.get("gpu_unpinned_sessions", 0)
    lines = [f"GPUs reach {size(reached)} by themselves"] if reached or unpinned else []
    reasons = "; ".join(printable(each, 200) for each in store.get("gpu_refusals", ()))
    warning = f"  warning: {unpinned} clients cannot pin memory and copy it once more: {reasons}"
    return [*lines, warning] if unpinned else lines


def _asked(document: Document, counters: Document) -> str:
    asked, hit = counters.get("lookup_hashes", 0), counters.get("lookup_hit_blocks", 0)
    requests = sum(verb.get("requests", 0) for verb in document.get("verbs", []))
    errors = sum(sum(verb.get("errors", {}).values()) for verb in document.get("verbs", []))
    lookups = f"lookups {counters.get('lookups', 0)}: {hit} of {asked} blocks hit ({percent(hit, asked)})"
    return f"requests {requests} ({errors} errors), {lookups}"


def _stored(counters: Document) -> str:
    rejected = sum(count for name, count in counters.items() if name.startswith("rejected_"))
    stored = f"stored {counters.get('committed_blocks', 0)} blocks ({size(counters.get('committed_bytes', 0))})"
    refused = f"present {counters.get('present_blocks', 0)}, rejected {rejected}"
    gone = f"evicted {counters.get('evicted_blocks', 0)}, removed {counters.get('removed_blocks', 0)}"
    return f"{stored}, {refused}, {gone}"


def _work(document: Document, store: Document) -> list[str]:
    """What was saved, and what plans go by; nothing from a daemon that does not tell."""
    physics = store.get("physics")
    if not physics:
        return []
    tiers = {tier.get("tier") for tier in store.get("tiers", ())}
    return [
        _saved(document, physics.get("savings", {})),
        _planned(physics, tiers),
        *_curve(physics.get("curve", ())[1::2]),
    ]


def _saved(document: Document, savings: Document) -> str:
    tokens, flops = savings.get("tokens", 0), savings.get("flops", 0.0)
    said = [f"saved: {tokens} tokens not computed"]
    said += [f"{flops / 1e15:.1f} PFLOP"] if flops else []
    gpu_s, stall_s = savings.get("gpu_s", 0.0), savings.get("stall_gpu_s", 0.0)
    said += [f"{gpu_s - stall_s:.1f} GPU-seconds net of {stall_s:.1f} for loading"] if gpu_s else []
    dollars = document.get("saved_dollars")
    return ", ".join([*said, *([] if dollars is None else [f"${dollars:.2f}"])])


def _planned(physics: Document, tiers: Collection[str]) -> str:
    plans = physics.get("plans", {})
    decided = f"load {plans.get('load', 0)}, part {plans.get('part', 0)}, recompute {plans.get('recompute', 0)}"
    decided += f", {plans['late']} loads given up" if plans.get("late") else ""
    links = [
        f"{link.get('tier')} {link.get('gb_s', 0):.1f} GB/s ({origin(link)})"
        for link in physics.get("links", ())
        if link.get("tier") in tiers
    ]
    fixed, each, _ = physics.get("prefill_line", (0, 0, 0))
    rate = f"prefill {1 / each:.0f} tokens/s + {1000 * fixed:.1f} ms" if each else "prefill rate not known"
    return f"plans: {decided}; {', '.join(links)}; {rate} ({physics.get('prefill_samples', 0)} reports)"


def _curve(points: Sequence[Document]) -> list[str]:
    """What all tiers would hit, by size."""
    said = [f"{size(point.get('size_bytes', 0))} {point.get('hit_share', 0.0):.1%}" for point in points]
    return [f"would hit, by size of all tiers: {', '.join(said)}"] if any(p.get("hit_share") for p in points) else []


def _namespaces(document: Document, store: Document) -> list[str]:
    namespaces = store.get("namespaces", [])
    lines = [
        f"namespace {printable(str(each.get('fingerprint', '')), 12)}  {printable(str(each.get('model', '')), 48)}  "
        f"uid {each.get('uid')}  {each.get('blocks')} blocks x {each.get('block_tokens')} tokens  "
        f"{size(each.get('resident_bytes', 0))}{_in_memory_alone(each)}"
        for each in namespaces[:NAMESPACES_MAX]
    ]
    more = len(namespaces) - len(lines) + document.get("namespaces_omitted", 0)
    return lines + ([f"and {more} more namespaces"] if more else [])


def _in_memory_alone(namespace: Document) -> str:
    """Empty for a namespace whose blocks go to the drive too, or where there is none."""
    why = namespace.get("memory_only")
    return f"  IN MEMORY ALONE{_because(why)}" if why else ""
