"""``forebay model``: what a model's KV weighs, and from which bandwidth on loading it beats computing it.

Asks no daemon. All figures follow from the shape and the rates given on the command line; what a running daemon
measured is in ``forebay status`` and ``forebay advise``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from forebay.daemon.cli import Exit
from forebay.daemon.cli_status import printable, size
from forebay.kvstore.errors import BadRequest
from forebay.kvstore.shapes import SHAPES, ModelShape, from_config

PREFIXES = (1024, 4096, 16_384, 32_768, 131_072)
CONFIG_BYTES_MAX = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class Way:
    """A tier's link as this page assumes it. ``per_gpu``: every GPU of the replica has one of its own."""

    name: str
    gb_s: float
    latency_s: float = 0.0
    per_gpu: bool = False


WAYS = (
    Way("host memory, PCIe 5", 52.0, per_gpu=True),
    Way("NVMe, Gen 5", 13.0),
    Way("NVMe, Gen 4", 6.5),
    Way("network, 100 Gb/s", 11.0),
    Way("object store", 2.0, 0.04),
)


def model(arguments: argparse.Namespace) -> int:
    """Exit 2 for a model that nobody knows, or a file that describes none."""
    if not arguments.model:
        names = sorted(SHAPES)
        print(json.dumps({"models": names}) if arguments.json else "\n".join(names))
        return Exit.OK
    try:
        shape = read_shape(arguments.model)
    except (OSError, ValueError, BadRequest) as error:
        print(f"forebay model: {printable(str(error), 300)}", file=sys.stderr)
        return Exit.USAGE
    if arguments.active_weights:
        shape = dataclasses.replace(shape, active_weights=arguments.active_weights * 1e9)
    if arguments.kv_element_bytes:
        shape = dataclasses.replace(shape, kv_element_bytes=arguments.kv_element_bytes)
    flops_per_s = arguments.tflops * 1e12 * arguments.mfu * arguments.gpus
    found = figures(shape, flops_per_s, arguments.gpus, arguments.block_tokens)
    print(json.dumps(found) if arguments.json else render(found))
    return Exit.OK


def read_shape(name: str) -> ModelShape:
    """A model known by name, or a ``config.json``, or a folder with one. Raises BadRequest, OSError, ValueError."""
    path = Path(name)
    if path.is_dir():
        path /= "config.json"
    if path.suffix == ".json":
        if path.stat().st_size > CONFIG_BYTES_MAX:
            raise BadRequest(f"{path} is longer than {CONFIG_BYTES_MAX} bytes")
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise BadRequest(f"{path} holds no JSON object")
        return from_config(path.parent.name or path.name, config)
    known = SHAPES.get(name.lower().rpartition("/")[2])
    if known is None:
        raise BadRequest(f"{name!r} is none of {', '.join(sorted(SHAPES))}; or name a config.json")
    return known


def figures(shape: ModelShape, flops_per_s: float, gpus: int, block_tokens: int) -> dict[str, Any]:
    """Everything that is printed, as one JSON object."""
    ways = []
    for way in WAYS:
        gb_s = way.gb_s * (gpus if way.per_gpu and not shape.replicated else 1)
        ways.append(
            {
                "tier": way.name,
                "gb_s": gb_s,
                "latency_s": way.latency_s,
                "break_even_tokens": shape.break_even_tokens(gb_s, flops_per_s, way.latency_s),
                "load_s": [way.latency_s + shape.kv_token_bytes * tokens / gb_s / 1e9 for tokens in PREFIXES],
            }
        )
    return {
        "model": shape.name,
        "note": shape.note,
        "kv_bytes_per_token": shape.kv_token_bytes,
        "replicated": shape.replicated,
        "block_tokens": block_tokens,
        "block_bytes": shape.kv_token_bytes * block_tokens,
        "flops_per_token": shape.token_flops,
        "double_tokens": shape.double_tokens,
        "gpus": gpus,
        "flops_per_s": flops_per_s,
        "prefill_tokens_per_s": flops_per_s / shape.token_flops,
        "prefix_tokens": list(PREFIXES),
        "recompute_s": [shape.prefill_s(tokens, flops_per_s) for tokens in PREFIXES],
        "break_even_gb_s": [shape.break_even_gb_s(tokens, flops_per_s) for tokens in PREFIXES],
        "tiers": ways,
    }


def render(found: dict[str, Any]) -> str:
    """The same as text."""
    each = f"{size(found['kv_bytes_per_token'])} of KV a token, {size(found['block_bytes'])} a block"
    work = f"{found['flops_per_token'] / 1e9:.1f} GFLOP a token, twice that at depth {found['double_tokens']:.0f}"
    rate = f"{found['prefill_tokens_per_s']:.0f} tokens/s short, on {found['gpus']} x GPU"
    lines = [
        f"{printable(found['model'], 80)}: {each} of {found['block_tokens']}{', on every rank' * found['replicated']}",
        f"prefill: {work}; {rate} at {found['flops_per_s'] / 1e12:.0f} TFLOP/s",
    ]
    lines += [f"note: {found['note']}"] if found["note"] else []
    lines += ["", _row("prefix, tokens", [f"{tokens}" for tokens in found["prefix_tokens"]], "pays from")]
    lines.append(_row("compute, ms", _ms(found["recompute_s"])))
    lines.append(_row("break-even, GB/s", [f"{gb_s:.2f}" for gb_s in found["break_even_gb_s"]]))
    for way in found["tiers"]:
        tokens = way["break_even_tokens"]
        pays = "never" if tokens is None else f"{tokens} tokens"
        marked = [
            f"{ms}{'*' if load_s > compute_s else ''}"
            for ms, load_s, compute_s in zip(_ms(way["load_s"]), way["load_s"], found["recompute_s"], strict=True)
        ]
        lines.append(_row(f"{way['tier']}, {way['gb_s']:g} GB/s", marked, pays))
    return "\n".join([*lines, "", "* slower than computing. For [economics] in the configuration:", *_settings(found)])


def _settings(found: dict[str, Any]) -> list[str]:
    return [
        f"prefill_tokens_per_s = {found['prefill_tokens_per_s']:.0f}",
        f"prefill_double_tokens = {found['double_tokens']:.0f}",
        f"prefill_gflops_per_token = {found['flops_per_token'] / 1e9:.1f}",
        f"gpus = {found['gpus']}",
    ]


def _row(name: str, values: list[str], last: str = "") -> str:
    return f"{name:<30}" + "".join(f"{value:>10}" for value in values) + (f"  {last}" if last else "")


def _ms(seconds: list[float]) -> list[str]:
    return [f"{1000 * each:.1f}" if each < 0.1 else f"{1000 * each:.0f}" for each in seconds]
