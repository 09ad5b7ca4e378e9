"""The status document as text for people. Reads the JSON that any daemon version sent, so absent keys are no error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NAMESPACES_MAX = 20
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


def render(document: Document) -> str:
    """The whole document, a screen of text."""
    store = document.get("store", {})
    lines = [*_head(document), *_tiers(document, store), *_activity(document, store), *_namespaces(document, store)]
    return "\n".join(lines)


def _head(document: Document) -> list[str]:
    process = document.get("process", {})
    name = f"forebay {document.get('version', '?')}  {document.get('state', '?')}  process {document.get('pid', '?')}"
    place = f"up {duration(document.get('uptime_s', 0))}  {printable(document.get('runtime_dir', ''), 200)}"
    memory = f"memory of the daemon {size(process.get('rss_bytes', 0))}, processor {process.get('cpu_s', 0):.1f} s"
    descriptors = f"descriptors {process.get('open_fds', 0)} of {process.get('fds_max', 0)}"
    reasons = [f"NOT READY: {printable(reason, 300)}" for reason in document.get("not_ready", [])]
    return [f"{name}  {place}", f"{memory}, {descriptors}", *reasons]


def _tiers(document: Document, store: Document) -> list[str]:
    memory = {tier.get("tier"): tier for tier in document.get("tiers", [])}
    lines = []
    for tier in store.get("tiers", []):
        about = memory.get(tier.get("tier"), {})
        lines.append(_tier(tier, about))
        lines += [f"  warning: {printable(warning, 300)}" for warning in about.get("warnings", ())]
    return lines


def _tier(tier: Document, about: Document) -> str:
    held, capacity = tier.get("resident_bytes", 0), tier.get("capacity_bytes", 0)
    filled = f"tier {tier.get('tier')}: {size(held)} of {size(capacity)} ({percent(held, capacity)})"
    slabs = f"slabs {tier.get('slabs_assigned', 0)} of {tier.get('slabs_total', 0)} x {size(tier.get('slab_bytes', 0))}"
    touched = f"populated {size(about.get('populated_bytes', 0))}, locked {size(about.get('locked_bytes', 0))}"
    return f"{filled}, {slabs}, pages {about.get('pages', '?')}, {touched}"


def _activity(document: Document, store: Document) -> list[str]:
    return [_held(store), _asked(document, store.get("counters", {})), _stored(store.get("counters", {}))]


def _held(store: Document) -> str:
    leases = f"leases {store.get('leases', 0)} ({store.get('leased_blocks', 0)} blocks)"
    rest = f"reservations {store.get('reservations', 0)}, pinned blocks {store.get('pinned_blocks', 0)}"
    return f"sessions {store.get('sessions', 0)}, {leases}, {rest}"


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


def _namespaces(document: Document, store: Document) -> list[str]:
    namespaces = store.get("namespaces", [])
    lines = [
        f"namespace {printable(str(each.get('fingerprint', '')), 12)}  {printable(str(each.get('model', '')), 48)}  "
        f"uid {each.get('uid')}  {each.get('blocks')} blocks x {each.get('block_tokens')} tokens  "
        f"{size(each.get('resident_bytes', 0))}"
        for each in namespaces[:NAMESPACES_MAX]
    ]
    more = len(namespaces) - len(lines) + document.get("namespaces_omitted", 0)
    return lines + ([f"and {more} more namespaces"] if more else [])
