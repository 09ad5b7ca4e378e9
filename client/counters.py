"""What a client counts about itself. Increments are not locked: a lost one costs a digit in a log line."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from forebay.client.copier import Copier
from forebay.client.device_copier import pinned_by
from forebay.client.results import ClientStats, FetchResult, StoreResult, reason_of
from forebay.kvstore.errors import ForebayError, PeerLost, Timeout

_RESULTS = ("", "miss", "stale", "failed", "late")
_UNAVAILABLE = (reason_of(PeerLost()), reason_of(Timeout()))


@dataclass(slots=True)
class Counters:
    """Totals since the client was made."""

    calls: int = 0
    unavailable: int = 0
    attachments: int = 0
    fetched_blocks: int = 0
    fetched_bytes: int = 0
    stored_blocks: int = 0
    stored_bytes: int = 0
    stale_fetches: int = 0
    corrupt_fetches: int = 0
    late_fetches: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def failed(self, error: ForebayError) -> None:
        self._note(reason_of(error))

    def _note(self, reason: str) -> None:
        self.errors[reason] += 1
        self.unavailable += reason in _UNAVAILABLE

    def fetched(self, result: FetchResult) -> None:
        if result.reason not in _RESULTS:
            self._note(result.reason)
        self.fetched_blocks += result.blocks
        self.fetched_bytes += result.bytes
        self.stale_fetches += result.reason == "stale"
        self.corrupt_fetches += result.reason == "corrupt"
        self.late_fetches += result.reason == "late"

    def stored(self, result: StoreResult) -> None:
        if result.reason not in _RESULTS:
            self._note(result.reason)
        self.stored_blocks += result.committed
        self.stored_bytes += result.bytes

    def snapshot(self, copier: Copier, *, breaker: str, attached: bool) -> ClientStats:
        pinned = pinned_by(copier)
        return ClientStats(
            calls=self.calls,
            unavailable=self.unavailable,
            attachments=self.attachments,
            fetched_blocks=self.fetched_blocks,
            fetched_bytes=self.fetched_bytes,
            stored_blocks=self.stored_blocks,
            stored_bytes=self.stored_bytes,
            stale_fetches=self.stale_fetches,
            corrupt_fetches=self.corrupt_fetches,
            late_fetches=self.late_fetches,
            pinned_bytes=pinned.size_bytes,
            pin_refused=pinned.refused,
            errors=dict(self.errors),
            breaker=breaker,
            attached=attached,
        )
