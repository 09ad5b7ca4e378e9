"""What whoever calls an engine knows of a conversation: read from its request, told to the daemon once that has ended.

It comes from the outside, so it may be anything: what is wrong is counted, logged once, and without effect. A hint that
is well-formed and untrue costs hits, never bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from forebay.client.core import checked_priority, kept_blocks, within_ms
from forebay.kvstore.errors import BadRequest, ForebayError
from forebay.kvstore.outcome import StopReason

KEY = "forebay"
"""Of an engine's parameters for KV transfers, the one that is ours."""

STOP_REASONS = {reason.name.lower(): reason for reason in StopReason}

_log = logging.getLogger("forebay.client")

STOPPED_NAMES = 16
"""So many of a chain's last blocks are named where it is told how the answer stopped: one that is known is enough."""


@dataclass(frozen=True, slots=True)
class Hints:
    """Raises BadRequest where one is no value, or two contradict each other.

    Attributes:
        done: nobody will continue the prompt and its answer.
        keep_tokens: of a prompt that is done, so many leading tokens are what other prompts begin with too.
        expect_s: within so long it will be continued; 0: nothing is known of that.
        priority: that its blocks are stored with, 0 to 3.
        stop_reason: how its answer stopped, one of `STOP_REASONS` by name; empty: what the engine knows of that.
    """

    done: bool = False
    keep_tokens: int = 0
    expect_s: float = 0.0
    priority: int = 0
    stop_reason: str = ""

    @property
    def has_ending(self) -> bool:
        """There is something to `tell` once the request has ended."""
        return bool(self.done or self.expect_s or self.stop_reason)

    def __post_init__(self) -> None:
        if type(self.done) is not bool:
            raise BadRequest(f"done is true or false, not {self.done!r}")
        kept_blocks(self.keep_tokens)
        checked_priority(self.priority)
        if isinstance(self.expect_s, bool) or not isinstance(self.expect_s, int | float):
            raise BadRequest(f"expect_s is a number of seconds, not {self.expect_s!r}")
        if self.expect_s:
            within_ms(self.expect_s)
        if self.stop_reason not in ("", *STOP_REASONS):
            raise BadRequest(f"stop_reason is one of {', '.join(STOP_REASONS)}, not {self.stop_reason!r}")
        if self.done and self.expect_s:
            raise BadRequest("done says that nobody will continue it, expect_s that somebody will")


NO_HINTS = Hints()


class HintClient(Protocol):
    """What `tell` asks of a client; `forebay.client.Client` is one."""

    def stopped(self, ns: Any, hashes: Sequence[bytes], reason: StopReason) -> int: ...

    def done(self, ns: Any, hashes: Sequence[bytes], keep: int = 0) -> int: ...

    def expect(self, ns: Any, hashes: Sequence[bytes], within_s: float) -> int: ...


class HintReader:
    """Reads the hints of one engine's requests. `ignored` counts those that were wrong."""

    def __init__(self) -> None:
        self.ignored = 0

    def read(self, params: object) -> Hints:
        """Of an engine's parameters for KV transfers, whatever they are: ``{"forebay": {"done": true}}``."""
        given = params.get(KEY) if isinstance(params, Mapping) else None
        if given is None:
            return NO_HINTS
        try:
            if not isinstance(given, Mapping):
                raise BadRequest(f"hints are a mapping, not {given!r}")
            unknown = sorted(map(str, given.keys() - set(Hints.__match_args__)))
            if unknown:
                raise BadRequest(f"unknown hint {', '.join(unknown)}: there are {', '.join(Hints.__match_args__)}")
            return Hints(**given)
        except BadRequest as error:
            if not self.ignored:
                _log.warning("a request's hints are ignored, and others' that are wrong from now on: %.300s", error)
            self.ignored += 1
            return NO_HINTS


def tell(client: HintClient, ns: Any, hashes: Sequence[bytes], hints: Hints, keep: int) -> bool:
    """Tell the daemon, of a request that has ended; `keep` are the leading blocks that others begin with.

    Returns whether no error came of it.
    """
    try:
        if hints.stop_reason:
            client.stopped(ns, hashes[-STOPPED_NAMES:], STOP_REASONS[hints.stop_reason])
        if hints.done:
            client.done(ns, hashes, keep)
        if hints.expect_s:
            client.expect(ns, hashes, hints.expect_s)
    except ForebayError as error:
        _log.debug("a hint was not told: %s", error)
        return False
    return True
