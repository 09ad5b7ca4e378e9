"""Client options out of an engine's own extra-config: what may be set, and typed errors for all else.

Engines hand their connectors a mapping that came from JSON on a command line, so a wrong type or a mistyped key is an
operator's slip: it must be named when the engine starts, not met inside the serving loop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeGuard

from forebay.client.options import ClientOptions
from forebay.client.sync import Client
from forebay.kvstore.errors import BadRequest

CLIENT_KEYS = ("runtime_dir", "budget_ms", "timeout_ms", "copy_threads", "verify", "plan")


def client_options(extra: Mapping[str, object], *, name: str) -> ClientOptions:
    """Options of the client called `name`; keys that are not given have the client's defaults.

    Raises BadRequest: a key that is none of `CLIENT_KEYS`, or a value of the wrong type or out of bounds.
    """
    unknown = sorted(set(extra) - set(CLIENT_KEYS))
    if unknown:
        raise BadRequest(f"unknown option {', '.join(unknown)}: there are {', '.join(CLIENT_KEYS)}")
    values: dict[str, Any] = dict(extra)
    for key, value in values.items():
        if key in ("budget_ms", "timeout_ms") and not _is_number(value):
            raise BadRequest(f"{key} is a number of milliseconds, not {value!r}")
        if key == "copy_threads" and type(value) is not int:
            raise BadRequest(f"copy_threads is a whole number, not {value!r}")
        if key in ("runtime_dir", "verify", "plan") and not isinstance(value, str):
            raise BadRequest(f"{key} is text, not {value!r}")
    return ClientOptions(name=name, checksum_stores=values.get("verify") == "load", **values)


def client_of(options: ClientOptions) -> Client:
    """A client with these options; it does not connect yet."""
    return Client(**dataclasses.asdict(options))


def _is_number(value: object) -> TypeGuard[int | float]:
    """A finite one: JSON as Python reads it has Infinity, which would be a wait without end."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
