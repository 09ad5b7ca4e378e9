"""``forebay config show|check|default``, and how ``serve`` gets its configuration from the same flags."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from forebay.daemon import configdoc
from forebay.daemon.cli import NAMED_FLAGS, Exit
from forebay.daemon.config import ConfigError, Environment, derive, environment, values
from forebay.daemon.configfile import Loaded, find_file, load


def load_from(arguments: argparse.Namespace, env: Environment) -> Loaded:
    """The configuration that the flags, the environment and the machine add up to. Raises ConfigError."""
    return load(find_file(arguments.config, env), flags_of(arguments))


def flags_of(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """(key, text) of --set in order, then of the named flags, which win. Raises ConfigError."""
    flags = []
    for given in arguments.set:
        key, equals, text = given.partition("=")
        if not equals:
            raise ConfigError([f"--set {given}: write it as section.key=value"])
        flags.append((key.strip(), text.strip()))
    named = vars(arguments)
    return flags + [(key, named[key]) for key in NAMED_FLAGS.values() if named[key] is not None]


def complain(problems: Sequence[str]) -> int:
    """Print each problem on a line of its own; the exit code of a wrong configuration."""
    for problem in problems:
        print(f"forebay: {problem}", file=sys.stderr)
    return Exit.USAGE


def show(arguments: argparse.Namespace) -> int:
    """Print the values in effect as TOML, with the origin of each that is not a default."""
    try:
        loaded = load_from(arguments, environment())
    except ConfigError as error:
        return complain(error.problems)
    effective = values(loaded.config)
    if arguments.json:
        print(json.dumps({"file": str(loaded.file or ""), "values": effective, "origins": dict(loaded.origins)}))
        return Exit.OK
    print(f"# file: {loaded.file or 'none'}")
    print(configdoc.effective_toml(effective, loaded.origins), end="")
    return Exit.OK


def check(arguments: argparse.Namespace) -> int:
    """Say whether the daemon would start with this configuration: exit 0, or 2 with every problem."""
    problems: Sequence[str] = ()
    file, slabs = "", 0
    try:
        loaded = load_from(arguments, environment())
        file, slabs = str(loaded.file or ""), derive(loaded.config).slabs
    except ConfigError as error:
        problems = error.problems
    if arguments.json:
        print(json.dumps({"ok": not problems, "file": file, "problems": list(problems)}))
        return Exit.USAGE if problems else Exit.OK
    if problems:
        return complain(problems)
    print(f"ok: {file or 'no file, all defaults'}; {slabs} slabs")
    return Exit.OK


def default(_: argparse.Namespace) -> int:
    """Print a file with every key at its default."""
    print(configdoc.default_toml(), end="")
    return Exit.OK
