"""One setting: its kind, default, unit, bounds and consequence, and how a value of it is read.

``config.py`` declares the tree with these; ``configdoc.py`` prints them. A setting's default is written the way an
operator would write it (``"auto"``, ``"64MiB"``), so that documentation, file and code cannot disagree. Values come
from TOML (typed) or from a flag (text); both go through ``Setting.read``. Rejected: pydantic (a large import for
thirty keys) and defaults in the dataclass itself ("auto" depends on the machine, so it would be a second default).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Kind = Literal["text", "choice", "integer", "number", "size", "uids", "listen", "paths"]

UNITS: dict[str, int] = {
    "B": 1,
    "KiB": 1 << 10,
    "MiB": 1 << 20,
    "GiB": 1 << 30,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
PATHS_MAX = 64
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([A-Za-z%]{0,8})")


@dataclass(frozen=True, slots=True)
class Machine:
    """What sizes are derived from. ``memory_bytes`` is what this process may use: the machine's or the cgroup's."""

    memory_bytes: int
    cpus: int


def measure_machine(root: Path = Path("/")) -> Machine:
    """Read the machine once (sysconf, /proc and /sys; microseconds). ``root`` is replaced by tests."""
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limits = [memory_bytes, *_cgroup_memory_limits(root)]
    return Machine(min(limits), len(os.sched_getaffinity(0)))


def _cgroup_memory_limits(root: Path) -> list[int]:
    """Every ``memory.max`` (cgroup v2) from this process's group up to the top; none when unlimited or not mounted."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    names = [line[3:] for line in lines if line.startswith("0::")]
    top = root / "sys/fs/cgroup"
    group = top / names[0].lstrip("/") if names else top
    folders = [group, *(parent for parent in group.parents if parent.is_relative_to(top))]
    return [limit for limit in map(_memory_max, folders) if limit is not None]


def _memory_max(folder: Path) -> int | None:
    try:
        text = (folder / "memory.max").read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


class BadValue(ValueError):
    """A value does not fit its setting; the text says what would."""


def read_size(text: str, machine: Machine) -> int:
    """Bytes of ``"8GiB"``, ``"512MiB"``, ``"1.5GB"`` or ``"25%"`` (of the memory this process may use)."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadValue(f'{text!r} is not a size; write one like "8GiB", "512MiB" or "25%"')
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return int(machine.memory_bytes * number / 100)
    if unit not in UNITS:
        raise BadValue(f"{text!r}: unknown unit {unit!r}; known: %, {', '.join(UNITS)}")
    return int(number * UNITS[unit])


def show_size(size_bytes: int) -> str:
    """The shortest exact spelling of a size in binary units: 67108864 is ``64MiB``, 1000 is ``1000B``."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % UNITS[unit] == 0:
            return f"{size_bytes // UNITS[unit]}{unit}"
    return f"{size_bytes}B"


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the HTTP endpoint listens. ``tcp`` uses host and port (0: any free one), ``unix`` uses path."""

    kind: Literal["tcp", "unix", "off"]
    host: str = ""
    port: int = 0
    path: str = ""


def read_listen(text: str) -> Listen:
    """``"127.0.0.1:9471"``, ``"[::1]:9471"``, ``"unix:/run/forebay/metrics.sock"`` or ``"off"``."""
    if text == "off":
        return Listen("off")
    if text.startswith("unix:"):
        if not text[5:].startswith("/"):
            raise BadValue(f'{text!r}: the path after "unix:" must be absolute')
        return Listen("unix", path=text[5:])
    host, colon, port = text.rpartition(":")
    if not colon or not host or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise BadValue(f'{text!r} is not an address; write "HOST:PORT", "unix:/PATH" or "off"')
    return Listen("tcp", host.strip("[]"), int(port))


@dataclass(frozen=True, slots=True)
class Setting:
    """What is known about one key. ``auto`` computes what "auto" is, from the machine and the keys before it."""

    kind: Kind
    default: object
    unit: str
    consequence: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    auto: Callable[[Machine, Mapping[str, Any]], int] | None = None
    reloads: bool = False

    def read(self, value: object, machine: Machine, before: Mapping[str, Any]) -> object:
        """The typed value of a TOML value or a flag's text. Raises BadValue."""
        if self.auto is not None and value == "auto":
            return self.auto(machine, before)
        result = _READERS[self.kind](self, value, machine)
        self._check_bounds(result)
        return result

    def _check_bounds(self, value: object) -> None:
        if not isinstance(value, int | float):
            return
        if self.low is not None and value < self.low:
            raise BadValue(f"{self.show(value)} is below the least allowed, {self.show(self.low)}")
        if self.high is not None and value > self.high:
            raise BadValue(f"{self.show(value)} is above the most allowed, {self.show(self.high)}")

    def show(self, value: object) -> str:
        """A value as an operator would write it, without quotes."""
        if self.kind == "size" and isinstance(value, int | float):
            return show_size(int(value))
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(str, value)) + "]"
        return f"{value:.15g}" if isinstance(value, float) else str(value)


def setting(kind: Kind, default: object, unit: str, consequence: str, **more: Any) -> Any:
    """A dataclass field that carries its Setting, and no default of its own (the module's docstring says why)."""
    return field(metadata={"setting": Setting(kind, default, unit, consequence, **more)})


def _read_text(_: Setting, value: object, __: Machine) -> str:
    if not isinstance(value, str):
        raise BadValue(f"{value!r} is not a string")
    if len(value) > 1024 or not value.isprintable():
        raise BadValue("longer than 1024 characters, or holds a control character")
    return value


def _read_choice(known: Setting, value: object, _: Machine) -> str:
    if value not in known.choices:
        raise BadValue(f"{value!r} is not one of {', '.join(known.choices)}")
    return str(value)


def _read_integer(_: Setting, value: object, __: Machine) -> int:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadValue(f"{value!r} is not a whole number")
    return value


def _read_number(_: Setting, value: object, __: Machine) -> float:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}(\.[0-9]{1,18})?", value):
        return float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        raise BadValue(f"{value!r} is not a number")
    return float(value)


def _read_size(_: Setting, value: object, machine: Machine) -> int:
    if isinstance(value, str):
        return int(value) if re.fullmatch("[0-9]{1,18}", value) else read_size(value, machine)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadValue(f'{value!r} is not a size; write one like "8GiB", "512MiB" or "25%"')
    return value


def _read_uids(_: Setting, value: object, __: Machine) -> tuple[int, ...]:
    if isinstance(value, str):
        value = [int(part) if re.fullmatch("[0-9]{1,10}", part) else part for part in value.split(",") if part]
    if not isinstance(value, list) or not all(type(uid) is int and 0 <= uid < 2**32 - 1 for uid in value):
        raise BadValue(f"{value!r} is not a list of numeric user ids")
    if len(value) > 64:
        raise BadValue("more than 64 user ids")
    return tuple(sorted(set(value)))


def _read_paths(known: Setting, value: object, machine: Machine) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part for part in value.split(",") if part]
    if not isinstance(value, list) or len(value) > PATHS_MAX:
        raise BadValue(f"{value!r} is not a list of at most {PATHS_MAX} paths")
    read = tuple(_read_text(known, path, machine) for path in value)
    for path in read:
        if not path.startswith("/"):
            raise BadValue(f"{path!r} is not an absolute path")
    if len({os.path.normpath(path) for path in read}) != len(read):
        raise BadValue("the same path twice")
    return read


def _read_listen(known: Setting, value: object, machine: Machine) -> str:
    text = _read_text(known, value, machine)
    read_listen(text)
    return text


_READERS: dict[str, Callable[[Setting, object, Machine], object]] = {
    "text": _read_text,
    "choice": _read_choice,
    "integer": _read_integer,
    "number": _read_number,
    "size": _read_size,
    "uids": _read_uids,
    "listen": _read_listen,
    "paths": _read_paths,
}
