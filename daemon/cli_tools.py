"""The tools that ask a running daemon one thing: status, ping, check, lookup, evict, pin, unpin, clear.

Each is a function of its parsed arguments that prints an answer, as text or as one JSON object, and returns an exit
code. Errors of the daemon become exit codes in ``_asking`` alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import Any

from forebay.daemon import cli_status
from forebay.daemon.cli import Exit
from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import ForebayError, PeerLost
from forebay.transports.messages import (
    CheckReply,
    CheckRequest,
    ClearReply,
    ClearRequest,
    EvictReply,
    EvictRequest,
    EvictScope,
    FindNamespaceReply,
    LookupReply,
    LookupRequest,
    PingReply,
    PingRequest,
    PinReply,
    PinRequest,
    StatusReply,
    StatusRequest,
    UnpinReply,
    UnpinRequest,
    join_hashes,
)

Tool = Callable[[argparse.Namespace, ControlLink], int]


def asking(tool: Tool) -> Callable[[argparse.Namespace], int]:
    """Give a tool its link, and turn what the daemon raises into an exit code and a message."""

    @wraps(tool)
    def run(arguments: argparse.Namespace) -> int:
        try:
            with ControlLink(arguments.runtime_dir, arguments.timeout) as link:
                return tool(arguments, link)
        except ForebayError as error:
            return _failed(arguments, error)

    return run


def _failed(arguments: argparse.Namespace, error: ForebayError) -> int:
    if arguments.json:
        print(json.dumps({"error": type(error).__name__, "code": error.code, "text": str(error)}))
    else:
        print(f"forebay: {cli_status.printable(str(error), 1024)}", file=sys.stderr)
    return Exit.ABSENT if isinstance(error, PeerLost) else Exit.REFUSED


def _print(arguments: argparse.Namespace, answer: dict[str, Any], text: str) -> None:
    print(json.dumps(answer) if arguments.json else text)


@asking
def status(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Exit 1 when the daemon says that it is not ready."""
    document = fetch_status(link)
    print(json.dumps(document) if arguments.json else cli_status.render(document))
    return Exit.OK if document.get("ready") else Exit.NEGATIVE


def fetch_status(link: ControlLink) -> dict[str, Any]:
    """The status document of the daemon."""
    document: dict[str, Any] = json.loads(link.call(StatusRequest(), StatusReply).document)
    return document


@asking
def ping(arguments: argparse.Namespace, link: ControlLink) -> int:
    times_us = []
    link.call(PingRequest(), PingReply)  # the first one also waits for the connection
    for _ in range(arguments.count):
        begun = time.perf_counter()
        link.call(PingRequest(), PingReply)
        times_us.append((time.perf_counter() - begun) * 1e6)
    times_us.sort()
    answer = {
        "boot_id": link.boot_id.hex(),
        "count": len(times_us),
        "min_us": round(times_us[0], 1),
        "p50_us": round(times_us[len(times_us) // 2], 1),
        "max_us": round(times_us[-1], 1),
    }
    spread = f"min {answer['min_us']} us, p50 {answer['p50_us']} us, max {answer['max_us']} us"
    _print(arguments, answer, f"{answer['count']} round trips: {spread}")
    return Exit.OK


@asking
def check(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Exit 1 when an invariant is broken."""
    problems = link.call(CheckRequest(), CheckReply).problems
    shown = [cli_status.printable(problem, 1024) for problem in problems]
    _print(arguments, {"ok": not problems, "problems": list(problems)}, "\n".join(shown) if shown else "ok")
    return Exit.NEGATIVE if problems else Exit.OK


@asking
def lookup(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Exit 1 when not even the first block is there."""
    found = link.find_namespace(arguments.namespace, arguments.rank)
    reply = link.call(LookupRequest(found.ns, _blob(arguments.hashes, found)), LookupReply)
    answer = {
        "blocks": reply.blocks,
        "of": len(arguments.hashes),
        "tokens": reply.blocks * found.block_tokens,
        "bytes": reply.blocks * found.block_bytes,
        "by_tier": dict(reply.by_tier),
        "load_us": reply.load_us,
        "advice": reply.advice,
    }
    tiers = ", ".join(f"{count} in {cli_status.printable(tier, 32)}" for tier, count in reply.by_tier) or "miss"
    _print(arguments, answer, f"{reply.blocks} of {len(arguments.hashes)} blocks ({answer['tokens']} tokens): {tiers}")
    return Exit.OK if reply.blocks else Exit.NEGATIVE


def _blob(hashes: Sequence[bytes], found: FindNamespaceReply) -> bytes:
    return join_hashes(hashes, found.hash_bytes)


def evict(arguments: argparse.Namespace) -> int:
    """Exit 1 when nothing was removed."""
    if arguments.all == bool(arguments.hashes):
        print("forebay evict: name hashes, or --all without hashes", file=sys.stderr)
        return Exit.USAGE
    return _evict(arguments)


@asking
def _evict(arguments: argparse.Namespace, link: ControlLink) -> int:
    found = link.find_namespace(arguments.namespace, arguments.rank)
    scope = EvictScope.NAMESPACE if arguments.all else EvictScope.PREFIX if arguments.prefix else EvictScope.BLOCKS
    request = EvictRequest(found.ns, int(scope), _blob(arguments.hashes, found), arguments.dry_run)
    reply = link.call(request, EvictReply)
    while reply.more:
        reply = link.call(replace(request, blob=b"", resume=reply.more), EvictReply)
    return _removed(arguments, reply)


def _removed(arguments: argparse.Namespace, reply: EvictReply | ClearReply) -> int:
    answer = {"removed": reply.removed, "kept": reply.kept, "dry_run": arguments.dry_run}
    verb = "would remove" if arguments.dry_run else "removed"
    kept = f"; kept {reply.kept} that are leased, pinned or being written" if reply.kept else ""
    _print(arguments, answer, f"{verb} {reply.removed} blocks{kept}")
    return Exit.OK if reply.removed else Exit.NEGATIVE


@asking
def pin(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Exit 1 when fewer blocks than named were there to pin."""
    found = link.find_namespace(arguments.namespace, arguments.rank)
    count = link.call(PinRequest(found.ns, _blob(arguments.hashes, found)), PinReply).count
    return _counted(arguments, "pinned", count)


@asking
def unpin(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Exit 1 when fewer blocks than named were pinned."""
    found = link.find_namespace(arguments.namespace, arguments.rank)
    count = link.call(UnpinRequest(found.ns, _blob(arguments.hashes, found)), UnpinReply).count
    return _counted(arguments, "unpinned", count)


def _counted(arguments: argparse.Namespace, verb: str, count: int) -> int:
    asked = len(arguments.hashes)
    _print(arguments, {verb: count, "of": asked}, f"{verb} {count} of {asked} blocks")
    return Exit.OK if count == asked else Exit.NEGATIVE


def clear(arguments: argparse.Namespace) -> int:
    """Remove everything; asks first, and refuses to where nobody can answer."""
    if not arguments.dry_run and not arguments.yes and not _confirmed():
        print("forebay clear: not done; --yes confirms, --dry-run only looks", file=sys.stderr)
        return Exit.USAGE
    return _clear(arguments)


@asking
def _clear(arguments: argparse.Namespace, link: ControlLink) -> int:
    reply = link.call(ClearRequest(arguments.dry_run), ClearReply)
    while reply.more:
        reply = link.call(ClearRequest(arguments.dry_run, reply.more), ClearReply)
    _removed(arguments, reply)
    return Exit.OK


def _confirmed() -> bool:
    if not sys.stdin.isatty():
        return False
    print("Remove every block of every namespace? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
