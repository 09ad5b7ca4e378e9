"""What waits in front of a vLLM engine, as its scheduler's hooks tell: the daemon weighs loads by it.

vLLM shows a connector no queue, but every request when it comes, what each step computes, and every end. Prompts are
taken for uncomputed until a step or a hit says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

from forebay.client.vllm_work import Prefill
from forebay.kvstore.planner import Backlog

PREFILL_TOKENS_MIN = 64
"""A step of fewer tokens tells more of the engine's overhead than of computing a prompt."""


class EngineBacklog:
    """For the scheduler's thread."""

    def __init__(self) -> None:
        self._waiting: dict[str, int] = {}
        self._begun: dict[str, int] = {}
        self._tokens = 0

    def __len__(self) -> int:
        """Requests whose prompts are not computed yet."""
        return len(self._waiting) + len(self._begun)

    def waits(self, id_: str, tokens: int) -> None:
        """A request, new or preempted, of which so many tokens are to be computed."""
        self.gone(id_)
        self._waiting[id_] = tokens
        self._tokens += tokens

    def ran(self, id_: str, left: int) -> None:
        """A step computes of a request all but `left` tokens."""
        if self.gone(id_) and left > 0:
            self._begun[id_] = left
            self._tokens += left

    def gone(self, id_: str) -> bool:
        """Whether it was there."""
        tokens = self._waiting.pop(id_, None)
        if tokens is None:
            tokens = self._begun.pop(id_, None)
        if tokens is None:
            return False
        self._tokens -= tokens
        return True

    def before(self, id_: str) -> Backlog:
        """What is to be computed beside that request."""
        own = self._waiting.get(id_)
        if own is None:
            return Backlog(len(self._waiting), self._tokens - self._begun.get(id_, 0))
        return Backlog(len(self._waiting) - 1, self._tokens - own)


def prefill_of(scheduled: Mapping[str, int], computed: Mapping[str, int]) -> Prefill | None:
    """The prompt that a step's time will be that of: one which has seven eighths of its tokens.

    Args:
        scheduled, computed: tokens of each request that the step computes, and that are there before.
    """
    if not scheduled:
        return None
    id_, tokens = max(scheduled.items(), key=itemgetter(1))
    if tokens < PREFILL_TOKENS_MIN or id_ not in computed or 8 * tokens < 7 * sum(scheduled.values()):
        return None
    return Prefill(tokens, computed[id_])
