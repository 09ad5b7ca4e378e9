"""One record is one line, whatever is in it."""

from __future__ import annotations

import io
import json
import logging

import pytest

from forebay.daemon.logging import (
    FIELDS_MAX,
    MESSAGE_CHARS_MAX,
    VALUE_CHARS_MAX,
    JsonFormatter,
    LogfmtFormatter,
    fields,
    setup,
)


def record(message: str, *arguments: object, **named: object) -> logging.LogRecord:
    made = logging.LogRecord("forebay.daemon.owner", logging.INFO, "f.py", 1, message, arguments, None)
    made.created = 1_700_000_000.25
    made.__dict__.update(fields(**named))
    return made


def test_logfmt_quotes_only_what_needs_it() -> None:
    line = LogfmtFormatter().format(record("slab %d opened", 3, slab=3, path="/run/x", model="a b", ok=True, none=None))
    assert line == (
        "ts=2023-11-14T22:13:20.250Z level=info logger=daemon.owner "
        'msg="slab 3 opened" slab=3 path=/run/x model="a b" ok=true none=null'
    )


def test_json_carries_the_same_fields_typed() -> None:
    found = json.loads(JsonFormatter().format(record("x", slab=3, share=0.5, ok=False, token=b"\x01\xff")))
    assert found == {
        "ts": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "daemon.owner",
        "msg": "x",
        "slab": 3,
        "share": 0.5,
        "ok": False,
        "token": "01ff",
    }


@pytest.mark.parametrize("formatter", [LogfmtFormatter(), JsonFormatter()])
@pytest.mark.parametrize("hostile", ["a\nlevel=error msg=forged", "\x1b[2J", "\r", "\u2028", '"', "\ud800", "\0"])
def test_no_value_forges_a_line_or_reaches_the_terminal(formatter: logging.Formatter, hostile: str) -> None:
    line = formatter.format(record(hostile, model=hostile, **{hostile: 1}))
    assert line.isascii()
    assert line.isprintable()
    assert line.count("level=") <= 3 or "\\n" in line


def test_a_field_cannot_stand_for_the_records_own() -> None:
    found = json.loads(JsonFormatter().format(record("real", msg="forged", level="error")))
    assert (found["msg"], found["level"], found["msg_"], found["level_"]) == ("real", "info", "forged", "error")


def test_messages_values_and_fields_are_bounded() -> None:
    named = {f"field{number}": "v" * 10_000 for number in range(100)}
    line = LogfmtFormatter().format(record("m" * 10_000, **named))
    assert len(line) < MESSAGE_CHARS_MAX + FIELDS_MAX * (VALUE_CHARS_MAX + 64) + 256
    assert "(9488 more)" in line


def test_a_traceback_stays_in_its_line() -> None:
    try:
        raise ValueError("no\nway")
    except ValueError:
        made = record("failed")
        made.exc_info = __import__("sys").exc_info()
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert "ValueError" in json.loads(line)["traceback"]


def test_setup_twice_replaces_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger("forebay")
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(root, "propagate", root.propagate)
    first, second = io.StringIO(), io.StringIO()
    setup("info", "logfmt", first)
    setup("warning", "json", second)
    logging.getLogger("forebay.test").info("quiet")
    logging.getLogger("forebay.test").warning("loud")
    assert first.getvalue() == ""
    assert json.loads(second.getvalue())["msg"] == "loud"
