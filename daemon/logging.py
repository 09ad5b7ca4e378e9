"""Log records as one line each, logfmt or JSON, on the standard library's logging.

Every value is bounded and escaped, because model names and error texts come from clients: no record can forge another
line or fill a disk. Fields are given as ``log.info("slab opened", extra=fields(slab=3))``. Rejected: structlog (a
dependency for two formatters).
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import TextIO

MESSAGE_CHARS_MAX = 1024
VALUE_CHARS_MAX = 512
TRACEBACK_CHARS_MAX = 8192
FIELDS_MAX = 32
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/%+@,*()[]<>#&;?!'~^$")

Scalar = str | int | float | bool | None


def fields(**named: object) -> dict[str, object]:
    """``extra=`` of a log call: named fields, printed in the order given."""
    return {"forebay_fields": named}


def setup(level: str, log_format: str, stream: TextIO | None = None) -> None:
    """Send the ``forebay`` loggers to ``stream`` (standard error); called again by SIGHUP, it replaces what it set."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if log_format == "json" else LogfmtFormatter())
    root = logging.getLogger("forebay")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False


def bounded(text: str, chars_max: int) -> str:
    """``text``, or its beginning and how much was cut."""
    return text if len(text) <= chars_max else f"{text[:chars_max]}...({len(text) - chars_max} more)"


def _items(record: logging.LogRecord) -> Iterator[tuple[str, Scalar]]:
    """The fields of a record in order: time, level, logger, message, the caller's fields, the traceback."""
    yield "ts", datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    yield "level", record.levelname.lower()
    yield "logger", record.name.removeprefix("forebay.")
    yield "msg", bounded(record.getMessage(), MESSAGE_CHARS_MAX)
    named = getattr(record, "forebay_fields", None)
    if isinstance(named, Mapping):
        for name, value in list(named.items())[:FIELDS_MAX]:
            yield _key(str(name)), _scalar(value)
    if record.exc_info:
        yield "traceback", logging.Formatter().formatException(record.exc_info)[-TRACEBACK_CHARS_MAX:]


def _key(name: str) -> str:
    """A field name that is safe unquoted and cannot stand for one of the record's own."""
    clean = "".join(char if char.isascii() and (char.isalnum() or char == "_") else "_" for char in name[:64])
    return clean + "_" if clean in ("ts", "level", "logger", "msg", "traceback") else clean


def _scalar(value: object) -> Scalar:
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 1 << 64 else "(a number beyond 64 bits)"
    text = value.hex() if isinstance(value, bytes) else str(value)
    return bounded(text, VALUE_CHARS_MAX)


class LogfmtFormatter(logging.Formatter):
    """``ts=... level=info logger=... msg="..." key=value``; values are quoted when they need to be."""

    def format(self, record: logging.LogRecord) -> str:
        return " ".join(f"{name}={_logfmt(value)}" for name, value in _items(record))


class JsonFormatter(logging.Formatter):
    """One JSON object a line, ASCII only."""

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(dict(_items(record)), ensure_ascii=True, separators=(",", ":"))


def _logfmt(value: Scalar) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    # JSON's escapes keep a newline, a quote or a terminal's escape sequence inside the value.
    return text if text and _PLAIN.issuperset(text) else json.dumps(text, ensure_ascii=True)
