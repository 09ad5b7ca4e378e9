"""``forebay explain``: why blocks are where they are, and what a plan would do with the prompts that end with them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any

from forebay.daemon.cli import Exit
from forebay.daemon.cli_status import duration, origin, printable, size
from forebay.daemon.cli_tools import asking
from forebay.daemon.control_link import ControlLink
from forebay.kvstore.errors import BadRequest
from forebay.transports.messages import ExplainReply, ExplainRequest

Story = Mapping[str, Any]


@asking
def explain(arguments: argparse.Namespace, link: ControlLink) -> int:
    """Exit 1 when one of the blocks is not stored."""
    found = link.find_namespace(arguments.namespace, arguments.rank)
    if any(len(name) != found.hash_bytes for name in arguments.hashes):
        raise BadRequest(f"a hash of this namespace has {2 * found.hash_bytes} hex digits")
    all_stored = True
    for name in arguments.hashes:
        story: Story = json.loads(link.call(ExplainRequest(found.ns, name), ExplainReply).document)
        all_stored &= bool(story.get("stored"))
        print(json.dumps({"hash": name.hex(), "stored": False, **story}) if arguments.json else render(name, story))
    return Exit.OK if all_stored else Exit.NEGATIVE


def render(name: bytes, story: Story) -> str:
    """A block's story as text."""
    head = f"block {name.hex()}"
    if not story:
        return f"{head}: not stored, and nothing is known of it"
    if not story["stored"] and not story["holds"]:
        return "\n".join([f"{head}: not stored; it was, or was asked for", *_thought(story)])
    where = " and ".join(printable(tier, 32) for tier in story["tiers"]) or "nowhere whole yet"
    lines = [f"{head}: block {story['depth']} of its prompt, which has {story['tokens']} tokens up to its end"]
    return "\n".join([*lines, f"  lies in    {where}", *_users(story), *_thought(story), *_order(story), *_plan(story)])


def _users(story: Story) -> list[str]:
    leases = f"{story['leases']} leases"
    leases += f", the last for {story['lease_left_s']:.1f} s" if story["leases"] else ""
    marks = (", pinned" if story["pinned"] else "") + (f", priority {story['priority']}" if story["priority"] else "")
    return [f"  held by    {leases}, {story['holds']} holds in all{marks}"]


def _thought(story: Story) -> list[str]:
    age = "not known" if story["age_s"] is None else f"{duration(story['age_s'])} ago"
    lines, thought = [f"  asked for  {age}"], story["policy"]
    if thought is None:
        return [*lines, "  policy     least recently used goes first"]
    chances = f"{thought['within_1m']:.0%} in 1 min, {thought['within_10m']:.0%} in 10 min, {thought['within_1h']:.0%}"
    return [
        *lines,
        f"  class      {printable(thought['kind'], 64)}; left by {thought['shared']} other prompts",
        f"  expected   {chances} in 1 h; index {thought['value_hz']:.3g} hits a second",
        f"  policy     {printable(thought['reason'], 200)}",
    ]


def _order(story: Story) -> list[str]:
    order = "later than the next 1024" if story["order"] is None else f"after {story['order']} others"
    return [f"  leaves     {order}; may it now: {printable(story['leaving'], 100)}"]


def _plan(story: Story) -> list[str]:
    """The plan, what it goes by, and what was weighed."""
    plan, (fixed, each, deep) = story["plan"], story["prefill_line"]
    lines = [
        f"  plan       load {plan['blocks']} blocks in {1000 * plan['load_s']:.2f} ms: {printable(plan['reason'], 200)}"
    ]
    lines += [
        f"    link {printable(link['tier'], 16)}: {link['gb_s']:.2f} GB/s, {1000 * link['latency_s']:.2f} ms, "
        f"{size(link['queued_bytes'])} queued ({origin(link)})"
        for link in story["links"]
    ]
    rate = f"{1000 * fixed:.2f} ms + {1e6 * each:.2f} us a token + {1e9 * deep:.3f} ns a token and token before it"
    lines.append(f"    prefill: {rate}" if each or fixed else "    prefill: not known; engines have reported none")
    if plan["table"]:
        lines.append("    blocks  loaded after ms  first token after ms    score")
    return lines + [
        f"    {row['blocks']:6}  {1000 * row['load_s']:15.2f}  {1000 * row['finish_s']:20.2f}  {row['score']:7.4f}"
        + ("  <-" if row["blocks"] == plan["blocks"] else "")
        for row in plan["table"]
    ]
