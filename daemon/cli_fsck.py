"""``forebay fsck PATH``: check a whole drive of the nvme tier without a daemon; make its index anew on request."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forebay.daemon.cli import Exit
from forebay.daemon.cli_status import printable, size
from forebay.kvstore.errors import Busy, Forbidden, ForebayError
from forebay.tiers.nvme_fsck import Report, SlabReport, check

_LEFT = ("bad_headers", "bad_payloads", "unreadable")
_COUNTS = ("sound", *_LEFT, "leftovers")


def fsck(arguments: argparse.Namespace) -> int:
    """Exit 1 when something is wrong, or with ``--repair`` still is; 5 when a daemon has the path; 4 when unable."""
    path = Path(arguments.path)
    try:
        _check_owner(path, arguments.repair)
        report = check(path, repair=arguments.repair, progress=_progress())
    except (ForebayError, OSError) as error:
        return _failed(arguments, error)
    print(json.dumps(_answer(report)) if arguments.json else "\n".join(_lines(report)))
    return Exit.OK if _is_well(report) else Exit.NEGATIVE


def _check_owner(path: Path, repair: bool) -> None:
    """A new index belongs to who made it, and the daemon could not open one of root's."""
    owner = path.stat().st_uid
    if repair and owner != os.geteuid():
        raise Forbidden(f"{path} belongs to user {owner}: repair it as that user, or its daemon cannot open the index")


def _failed(arguments: argparse.Namespace, error: ForebayError | OSError) -> int:
    if arguments.json:
        code = error.code if isinstance(error, ForebayError) else None
        print(json.dumps({"error": type(error).__name__, "code": code, "text": str(error)}))
    else:
        print(f"forebay fsck: {printable(str(error), 1024)}", file=sys.stderr)
    return Exit.TAKEN if isinstance(error, Busy) else Exit.REFUSED


def _progress() -> Any:
    """A line on a terminal that is redrawn; nothing elsewhere."""
    if not sys.stderr.isatty():
        return lambda fraction: None

    def show(fraction: float) -> None:
        end = "\r\x1b[K" if fraction >= 1 else ""
        print(f"\r\x1b[Kchecked {fraction:.0%}{end}", end="", file=sys.stderr, flush=True)

    return show


def _total(report: Report, count: str) -> int:
    return sum(getattr(slab, count) for slab in report.slabs)


def _is_well(report: Report) -> bool:
    """Sound, or with nothing left that a new index does not set right."""
    if not report.repaired:
        return report.is_sound
    return not report.damaged_slabs and not any(_total(report, count) for count in _LEFT)


def _answer(report: Report) -> dict[str, Any]:
    index = {name: getattr(report, name) for name in ("matching", "stale", "missing")}
    return {
        "path": report.path,
        "ok": _is_well(report),
        "repaired": report.repaired,
        "drive_id": report.header.drive_id.hex(),
        "epoch": report.header.epoch,
        "slab_bytes": report.header.slab_bytes,
        "slabs": report.header.slabs,
        "assigned_slabs": len(report.slabs),
        "damaged_slabs": report.damaged_slabs,
        **{count: _total(report, count) for count in _COUNTS},
        "index": {"reason": report.index_reason, **index},
        "slabs_in_error": [_slab(slab) for slab in report.slabs if _is_bad(slab)],
    }


def _slab(slab: SlabReport) -> dict[str, Any]:
    owner = {"fingerprint": slab.owner.group_fingerprint.hex(), "model": slab.owner.model, "uid": slab.owner.uid}
    return {"slab": slab.slab, **owner, **{count: getattr(slab, count) for count in _COUNTS}}


def _is_bad(slab: SlabReport) -> bool:
    return any(getattr(slab, count) for count in _LEFT)


def _lines(report: Report) -> Iterator[str]:
    header = report.header
    slabs = f"{len(report.slabs)} of {header.slabs} slabs of {size(header.slab_bytes)} in use"
    yield f"{printable(report.path, 200)}: {slabs}, {_total(report, 'sound')} blocks sound"
    for slab in filter(_is_bad, report.slabs):
        yield f"slab {slab.slab} ({printable(slab.owner.model, 48)}, uid {slab.owner.uid}): {_said(slab)}"
    if report.damaged_slabs:
        yield f"slabs whose header is damaged, with all that is in them: {', '.join(map(str, report.damaged_slabs))}"
    if report.index_reason:
        yield f"index: {printable(report.index_reason, 300)}"
    elif report.stale or report.missing:
        yield f"index: {report.stale} records of blocks that are not there, {report.missing} blocks without a record"
    if report.repaired:
        yield f"index made anew, with {_total(report, 'sound')} blocks"
    yield "ok" if _is_well(report) else "NOT SOUND" + ("" if report.repaired else "; --repair makes the index anew")


def _said(slab: SlabReport) -> str:
    named = {"bad_headers": "damaged headers", "bad_payloads": "damaged payloads", "unreadable": "unreadable"}
    return ", ".join(f"{getattr(slab, count)} {text}" for count, text in named.items() if getattr(slab, count))
