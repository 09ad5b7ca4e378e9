"""From a TOML file and flags to a checked Config, with the line of each mistake.

One precedence: defaults < the file < flags, later flags over earlier ones. Exactly one file is read; rejected: merging
the user's file with the system's (nobody can tell which of the two won).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forebay.daemon.config import Config, ConfigError, Environment, build, unknown
from forebay.daemon.settings import Machine, measure_machine

FILE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Loaded:
    """A tree and where it came from. ``origins`` names, per key that is not a default, the file or flag that set it."""

    config: Config
    file: Path | None
    flags: tuple[tuple[str, str], ...]
    origins: Mapping[str, str]
    machine: Machine

    def reload(self) -> Loaded:
        """The same file and flags read again, over the same machine. Raises ConfigError; the old tree stays valid."""
        return load(self.file, self.flags, self.machine)


def find_file(explicit: str | None, env: Environment, system: Path = Path("/etc")) -> Path | None:
    """The one file to read: the one named, else the user's, else the system's, else none. Files are never merged."""
    if explicit is not None:
        return Path(explicit).absolute()
    folders = [Path(env.config_home)] if env.config_home else []
    candidates = [folder / "forebay/forebay.toml" for folder in [*folders, system]]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def load(file: Path | None, flags: Sequence[tuple[str, str]] = (), machine: Machine | None = None) -> Loaded:
    """Defaults, then ``file`` (None: none), then ``flags`` (path, text), later flags winning. Raises ConfigError."""
    machine = measure_machine() if machine is None else machine
    text = _read_file(file) if file is not None else ""
    raw = _parse(text, file)
    origins = {f"{section}.{name}": str(file) for section, given in raw.items()
               if isinstance(given, dict) for name in given}  # fmt: skip
    try:
        config = build(_with_flags(raw, flags), machine)
    except ConfigError as error:
        flagged = {path for path, _ in flags}
        raise ConfigError([_with_line(problem, text, file, flagged) for problem in error.problems]) from None
    origins |= {path: "flag" for path, _ in flags}
    return Loaded(config, file, tuple(flags), origins, machine)


def _with_flags(raw: Mapping[str, Any], flags: Sequence[tuple[str, str]]) -> dict[str, Any]:
    merged = {section: dict(given) if isinstance(given, dict) else given for section, given in raw.items()}
    for path, text in flags:
        section, dot, name = path.partition(".")
        given = merged.setdefault(section, {}) if dot else None
        if not isinstance(given, dict):
            raise ConfigError([unknown(path, "key") if not dot else f"{section}: must be a section, [{section}]"])
        given[name] = text
    return merged


def _read_file(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from error
    if len(data) > FILE_BYTES_MAX:
        raise ConfigError([f"{file}: longer than {FILE_BYTES_MAX} bytes"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file}: not UTF-8 text: {error}"]) from error


def _parse(text: str, file: Path | None) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise ConfigError([f"{file}: not TOML: {error}"]) from error


def _with_line(problem: str, text: str, file: Path | None, flagged: set[str]) -> str:
    path = problem.partition(":")[0]
    if file is None or path in flagged:
        return problem
    line = line_of(text, path)
    return f"{problem} ({file}" + (f", line {line})" if line else ")")


def line_of(text: str, path: str) -> int | None:
    """The line that sets ``path`` in a TOML text, by a plain scan of headers and keys; None where it cannot tell."""
    section, _, name = path.partition(".")
    current = ""
    for number, line in enumerate(text.splitlines(), 1):
        stripped = line.strip()
        if stripped.startswith("["):
            current = stripped.strip("[]").strip()
            if current == path:
                return number
        else:
            key = stripped.partition("=")[0].strip()
            if (current, key) == (section, name) or (not current and key == path):
                return number
    return None
