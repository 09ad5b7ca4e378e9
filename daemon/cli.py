"""``forebay``: the command line's grammar, exit codes and dispatch.

Only the standard library is imported here; each command imports what it needs when it runs, so that ``forebay version``
and ``--help`` answer at once. What the commands do is in ``cli_serve``, ``cli_config``, ``cli_tools``, ``cli_stat``.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from enum import IntEnum
from typing import NoReturn, TypeAlias


class Exit(IntEnum):
    """Exit codes, the same for every command; docs/cli.md lists them."""

    OK = 0
    NEGATIVE = 1
    USAGE = 2
    ABSENT = 3
    REFUSED = 4
    TAKEN = 5
    INTERRUPTED = 130


TIMEOUT_S = 2.0


def parser() -> argparse.ArgumentParser:
    """The whole grammar. ``run`` names the module and function that carry a command out."""
    top = argparse.ArgumentParser(
        prog="forebay",
        description="A KV-cache store for LLM inference.",
        epilog="exit codes: 0 ok, 1 negative answer, 2 usage or configuration, 3 no daemon, 4 refused or failed, "
        "5 another daemon runs here, or holds the path",
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_config(commands)
    _add_tools(commands)
    _add_fsck(commands)
    _add_model(commands)
    commands.add_parser("bench", help="measure this machine's daemon and its bounds", add_help=False)
    commands.add_parser("doctor", help="what this machine has for blocks of a GPU", add_help=False)
    commands.add_parser("replay", help="compare policies and sizes on recorded requests", add_help=False)
    version = commands.add_parser("version", help="print the version")
    version.add_argument("--json", action="store_true", help="one JSON object")
    version.set_defaults(run="forebay.daemon.cli:print_version")
    return top


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # argparse has no public name for it


def _add_serve(commands: Commands) -> None:
    serve = commands.add_parser("serve", help="run the daemon in the foreground")
    _add_config_flags(serve)
    serve.set_defaults(run="forebay.daemon.cli_serve:serve")


def _add_config_flags(command: argparse.ArgumentParser) -> None:
    command.add_argument("--config", metavar="FILE", help="the TOML file to read, instead of looking for one")
    command.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="any key: host.bytes=8GiB")
    for flag, key in NAMED_FLAGS.items():
        command.add_argument(flag, metavar="VALUE", dest=key, help=f"short for --set {key}=VALUE")


# One flag per key that people change by hand; all others go through --set.
NAMED_FLAGS = {
    "--runtime-dir": "runtime.dir",
    "--host-bytes": "host.bytes",
    "--metrics-listen": "metrics.listen",
    "--log-level": "runtime.log_level",
    "--log-format": "runtime.log_format",
}


def _add_config(commands: Commands) -> None:
    config = commands.add_parser("config", help="show, check or print the configuration")
    actions = config.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, text in (
        ("show", "print what would be in effect, and where each value came from"),
        ("check", "say what is wrong with the configuration"),
        ("default", "print a file with every key and its default"),
    ):
        action = actions.add_parser(name, help=text)
        if name != "default":
            _add_config_flags(action)
            action.add_argument("--json", action="store_true", help="one JSON object")
        action.set_defaults(run=f"forebay.daemon.cli_config:{name}")


def _add_tools(commands: Commands) -> None:
    _tool(commands, "status", "what the daemon says about itself")
    _tool(commands, "ping", "round trips to the daemon").add_argument(
        "-c", "--count", type=_count, default=1, metavar="N", help="round trips (default 1)"
    )
    _tool(commands, "check", "verify every invariant of the daemon's state")
    advise = _tool(
        commands, "advise", "what more memory or drives would hit, save and cost", "forebay.daemon.cli_advise:advise"
    )
    advise.add_argument("--plot", metavar="FILE", help="draw it too: .svg, or .png (matplotlib)")
    _block_tool(commands, "lookup", "how many leading blocks are stored")
    explain = _block_tool(commands, "explain", "why blocks are where they are, and what a plan would do with them")
    explain.set_defaults(run="forebay.daemon.cli_explain:explain")
    _add_record(commands)
    _add_evict(commands)
    _block_tool(commands, "pin", "keep blocks from being evicted")
    _block_tool(commands, "unpin", "let pinned blocks be evicted again")
    clear = _tool(commands, "clear", "remove every block of every namespace")
    clear.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    clear.add_argument("--yes", action="store_true", help="do not ask")
    stat = _tool(commands, "stat", "one line of activity per interval", function="forebay.daemon.cli_stat:stat")
    stat.add_argument("-i", "--interval", type=_interval, default=1.0, metavar="S", help="seconds (default 1)")
    stat.add_argument("-c", "--count", type=_count, default=0, metavar="N", help="lines, then stop (default: endless)")


def _add_record(commands: Commands) -> None:
    text = "write what clients ask for to a trace that `forebay replay` reads; Ctrl-C ends it"
    record = _tool(commands, "record", text, "forebay.daemon.cli_record:record")
    record.add_argument("namespace", metavar="NS", type=_hex, nargs="?", help="may be left out where there is but one")
    record.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="a new file; compressed if it ends in .gz"
    )
    record.add_argument("--seconds", type=_seconds, default=3600.0, metavar="S", help="at most (default 3600)")
    record.add_argument("--requests", type=_many, default=1_000_000, metavar="N", help="at most (default 1000000)")
    record.add_argument("--bytes", type=_many, default=1 << 30, metavar="N", help="of lines, at most (default 1 GiB)")


def _add_evict(commands: Commands) -> None:
    evict = _block_tool(commands, "evict", "remove blocks", hashes_required=False)
    scope = evict.add_mutually_exclusive_group()
    scope.add_argument("--prefix", action="store_true", help="also remove all that continues the blocks named")
    scope.add_argument("--all", action="store_true", help="remove the whole namespace; takes no hashes")
    evict.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _add_fsck(commands: Commands) -> None:
    text = "check a drive of the nvme tier that no daemon has open"
    fsck = commands.add_parser("fsck", help=text, description=text)
    fsck.add_argument("path", metavar="PATH", help="the folder, as nvme.paths names it")
    fsck.add_argument("--repair", action="store_true", help="make the index anew from the blocks that are sound")
    fsck.add_argument("--json", action="store_true", help="one JSON object")
    fsck.set_defaults(run="forebay.daemon.cli_fsck:fsck")


def _add_model(commands: Commands) -> None:
    text = "what a model's KV weighs, and when loading it beats computing it"
    model = commands.add_parser("model", help=text, description=text)
    model.add_argument("model", metavar="MODEL", nargs="?", help="a name, or a config.json; without it: the names")
    model.add_argument("--gpus", type=_count, default=1, metavar="N", help="GPUs of one replica (default 1)")
    model.add_argument(
        "--tflops", type=_positive, default=989.0, metavar="T", help="of one GPU (default 989: H100, bf16)"
    )
    model.add_argument("--mfu", type=_positive, default=0.5, metavar="S", help="share of that reached (default 0.5)")
    model.add_argument("--block-tokens", type=_count, default=16, metavar="N", help="tokens in a block (default 16)")
    model.add_argument("--kv-element-bytes", type=_count, metavar="N", help="1 for an fp8 cache (default: the model's)")
    model.add_argument("--active-weights", type=_positive, metavar="B", help="billions of weights that a token passes")
    model.add_argument("--json", action="store_true", help="one JSON object")
    model.set_defaults(run="forebay.daemon.cli_model:model")


def _tool(commands: Commands, name: str, text: str, function: str = "") -> argparse.ArgumentParser:
    tool = commands.add_parser(name, help=text, description=text)
    tool.add_argument("--runtime-dir", metavar="DIR", help="the daemon's runtime directory, instead of looking for it")
    tool.add_argument("--timeout", type=_interval, default=TIMEOUT_S, metavar="S", help="seconds (default 2)")
    tool.add_argument("--json", action="store_true", help="one JSON object per answer")
    tool.set_defaults(run=function or f"forebay.daemon.cli_tools:{name}")
    return tool


def _block_tool(commands: Commands, name: str, text: str, *, hashes_required: bool = True) -> argparse.ArgumentParser:
    tool = _tool(commands, name, text)
    tool.add_argument("--rank", type=_rank, default=0, metavar="N", help="the shard (default 0)")
    tool.add_argument("namespace", metavar="NS", type=_hex, help="namespace: first hex digits of its fingerprint")
    hashes = tool.add_argument("hashes", metavar="HASH", type=_hex, nargs="+", default=[], help="hex, in prompt order")
    hashes.required = hashes_required  # not nargs="*": that would end at the first flag between NS and HASH
    return tool


def _hex(text: str) -> bytes:
    try:
        found = bytes.fromhex(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not an even number of hex digits") from None
    if not 1 <= len(found) <= 32:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not 2 to 64 hex digits")
    return found


def _interval(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0.001 <= found <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0.001 to 3600")
    return found


def _seconds(text: str) -> float:
    found = _positive(text)
    if not 0.001 <= found <= 7 * 86_400:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number of seconds from 0.001 to a week")
    return found


def _many(text: str) -> int:
    return _whole(text, 1, 1 << 53)


def _positive(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1e9:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a number above 0 and at most 1e9")
    return found


def _count(text: str) -> int:
    return _whole(text, 1, 1_000_000)


def _rank(text: str) -> int:
    return _whole(text, 0, 1023)


def _whole(text: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 17 and low <= int(text) <= high):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a whole number from {low} to {high}")
    return int(text)


def print_version(arguments: argparse.Namespace) -> int:
    from forebay import __version__

    print(f'{{"version": "{__version__}"}}' if arguments.json else f"forebay {__version__}")
    return Exit.OK


def _become(module: str, arguments: Sequence[str]) -> NoReturn:
    """Become a module that stands above the daemon or beside it, and that the daemon must never load."""
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *arguments])


MODULES = {"bench": "forebay.bench", "doctor": "forebay.client.doctor", "replay": "forebay.bench.replay"}


def run(arguments: Sequence[str]) -> int:
    """Parse and carry out one command; argparse's own exits (usage, help) pass through as SystemExit."""
    if arguments and arguments[0] in MODULES:
        _become(MODULES[arguments[0]], arguments[1:])
    parsed = parser().parse_args(arguments)
    module, _, function = parsed.run.partition(":")
    return int(getattr(importlib.import_module(module), function)(parsed))


def main() -> int:
    """The console script's entry."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK
    except KeyboardInterrupt:
        return Exit.INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
