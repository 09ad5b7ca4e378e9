"""Options from an engine's extra-config: defaults without any, and a typed error for every slip."""

from __future__ import annotations

from typing import Any

import pytest

from forebay.client import ClientOptions
from forebay.client.engine_options import client_of, client_options
from forebay.kvstore.errors import BadRequest


def test_nothing_need_be_set() -> None:
    assert client_options({}, name="n") == ClientOptions(name="n")


def test_every_key_arrives_at_the_client() -> None:
    given = {
        "runtime_dir": "/x",
        "budget_ms": 3,
        "timeout_ms": 50.5,
        "copy_threads": 2,
        "verify": "load",
        "plan": "never",
    }
    options = client_options(given, name="n")
    assert options == ClientOptions(
        "/x", "n", budget_ms=3, timeout_ms=50.5, copy_threads=2, verify="load", checksum_stores=True, plan="never"
    )
    with client_of(options) as client:
        assert client.options == options


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"budgetms": 3}, "budgetms"),
        ({"name": "x"}, "name"),
        ({"budget_ms": "3"}, "budget_ms"),
        ({"budget_ms": True}, "budget_ms"),
        ({"budget_ms": 0}, "budget_ms"),
        ({"budget_ms": 10, "timeout_ms": 5}, "timeout_ms"),
        ({"timeout_ms": None}, "timeout_ms"),
        ({"timeout_ms": float("inf")}, "timeout_ms"),
        ({"budget_ms": float("nan")}, "budget_ms"),
        ({"copy_threads": 1.5}, "copy_threads"),
        ({"copy_threads": True}, "copy_threads"),
        ({"copy_threads": -1}, "copy_threads"),
        ({"runtime_dir": 3}, "runtime_dir"),
        ({"verify": True}, "verify"),
        ({"verify": "always"}, "verify"),
        ({"plan": "sometimes"}, "plan"),
        ({"plan": 1}, "plan"),
    ],
)
def test_slips_are_named(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(BadRequest, match=named):
        client_options(extra, name="n")
