"""What the demonstration shows: one row a request, the totals of an act, and both as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Row:
    """What one request showed; times in seconds to the first token.

    `by_tier` is where its stored prefix lay, in blocks; only the second act asks.
    """

    act: int
    engine: str
    chat: str
    turn: int
    prompt_tokens: int
    restored_tokens: int
    plain_ttft_s: float
    ttft_s: float
    restored_bytes: int
    gb_per_s: float
    stored_blocks: int
    identical: bool
    by_tier: Mapping[str, int]
    failure: str
    question: str
    answer: str


HEADER = (
    f"\n{'':19}{'prompt':>6}{'restored':>10}{'first token, s':>22}{'speed':>8}{'fetched':>9}{'rate':>8}    tokens\n"
    f"{'engine':<7}{'chat':<12}{'tokens':>6}{'tokens':>10}{'without':>13}{'forebay':>9}{'up':>8}{'MB':>9}{'GB/s':>8}"
    "    identical"
)


def row_text(row: Row) -> str:
    """A line of numbers under HEADER, and the question with its answer."""
    rate = f"{row.gb_per_s:.1f}" if row.restored_bytes else "-"
    speed_up = f"{row.plain_ttft_s / row.ttft_s:.1f}x" if row.restored_bytes else "-"
    numbers = (
        f"{row.engine:<7}{row.chat + '/' + str(row.turn):<12}{row.prompt_tokens:>6}{row.restored_tokens:>10}"
        f"{row.plain_ttft_s:>13.2f}{row.ttft_s:>9.2f}{speed_up:>8}{row.restored_bytes / 1e6:>9.0f}{rate:>8}"
        f"    {'yes' if row.identical else 'NO'}"
    )
    lines = [numbers, f"         {row.question} -> {row.answer[:80]!r}"]
    if row.act > 1:
        lines.append(f"         its prefix lay in: {tiers_text(row.by_tier)}")
    return "\n".join(lines + ([f"         not served: {row.failure}"] if row.failure else []))


def tiers_text(by_tier: Mapping[str, int]) -> str:
    return ", ".join(f"{tier} ({blocks} blocks)" for tier, blocks in by_tier.items()) or "no tier"


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """The totals; `speed_up` is over all requests, `speed_up_of_hits` over those that restored something.

    `nvme_tokens` are those of the restored tokens that lay on nvme.
    """
    hits = [row for row in rows if row.restored_tokens]
    plain_s, forebay_s = sum(row.plain_ttft_s for row in rows), sum(row.ttft_s for row in rows)
    hits_plain_s, hits_forebay_s = sum(row.plain_ttft_s for row in hits), sum(row.ttft_s for row in hits)
    return {
        "requests": len(rows),
        "identical": sum(row.identical for row in rows),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "restored_tokens": sum(row.restored_tokens for row in rows),
        "nvme_tokens": sum(map(_nvme_tokens, rows)),
        "plain_ttft_s": plain_s,
        "forebay_ttft_s": forebay_s,
        "saved_s": plain_s - forebay_s,
        "speed_up": plain_s / forebay_s if forebay_s else 0.0,
        "hits": len(hits),
        "speed_up_of_hits": hits_plain_s / hits_forebay_s if hits_forebay_s else 0.0,
        "restored_bytes": sum(row.restored_bytes for row in rows),
    }


def _nvme_tokens(row: Row) -> int:
    """Chats may begin alike, so that another one has brought the first blocks to memory already."""
    blocks = sum(row.by_tier.values())
    return row.restored_tokens * row.by_tier.get("nvme", 0) // blocks if blocks else 0


def summary_text(total: Mapping[str, Any]) -> str:
    share = 100 * total["restored_tokens"] / max(1, total["prompt_tokens"])
    return (
        f"\n{total['identical']} of {total['requests']} outputs identical to plain generate\n"
        f"{total['restored_tokens']} of {total['prompt_tokens']} prompt tokens not recomputed ({share:.0f} %), "
        f"{total['restored_bytes'] / 1e6:.0f} MB restored\n"
        f"waiting for first tokens: {total['plain_ttft_s']:.1f} s without, {total['forebay_ttft_s']:.1f} s with "
        f"forebay; {total['saved_s']:.1f} s saved, {total['speed_up']:.1f} times faster over all, "
        f"{total['speed_up_of_hits']:.1f} times over the {total['hits']} requests with a stored prefix"
    )


def failures(acts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the demonstration has failed; empty when it has not. `acts` are the totals of both, or of the first."""
    said = []
    if any(total["identical"] < total["requests"] for total in acts):
        said.append("an output differs")
    if not acts[0]["restored_tokens"]:
        said.append("no token was restored")
    if len(acts) > 1 and not acts[1]["nvme_tokens"]:
        said.append("nothing came from nvme after the daemon was killed")
    return said
