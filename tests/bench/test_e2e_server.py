"""One server of the end-to-end run: its command, its stream of events, its counters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.bench.demo_processes import ProcessError
from forebay.bench.e2e_server import command, read_answer, read_counters


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n"


def choice(text: str, ids: list[int] | None = None) -> list[dict[str, object]]:
    return [{"delta": {"content": text}, **({"token_ids": ids} if ids else {})}]


def test_first_token_is_the_first_event_that_brings_one() -> None:
    """The event before it tells the role only."""
    times = iter([12.5, 99.0])
    lines = [
        event(choices=choice(""), prompt_token_ids=[1, 2, 3]),
        b"\n",
        event(choices=choice("so", [4])),
        event(choices=choice(" on", [5, 6])),
        event(choices=[], usage={}),
        b"data: [DONE]\n",
    ]
    answer = read_answer(iter(lines), lambda: next(times))
    assert (answer.prompt, answer.ids, answer.text, answer.ttft_ms) == ((1, 2, 3), (4, 5, 6), "so on", 12.5)


@pytest.mark.parametrize("lines", [[event(error={"message": "no"})], [event(choices=choice("", None))], []])
def test_error_or_an_empty_answer_ends_the_run(lines: list[bytes]) -> None:
    with pytest.raises(ProcessError, match="the server answered"):
        read_answer(iter(lines), lambda: 0.0)


def test_counters_are_summed_by_source() -> None:
    text = (
        "# HELP vllm:prompt_tokens_by_source_total x\n"
        'vllm:prompt_tokens_by_source_total{engine="0",source="local_compute"} 35.0\n'
        'vllm:prompt_tokens_by_source_total{engine="1",source="local_compute"} 5.0\n'
        'vllm:prompt_tokens_by_source_total{engine="0",source="external_kv_transfer"} 32.0\n'
        'vllm:prompt_tokens_by_source_created{engine="0",source="local_compute"} 1.7e+09\n'
    )
    assert read_counters(text) == {"computed": 40, "restored": 32, "local": 0}


def test_reference_has_neither_forebay_nor_a_prefix_cache() -> None:
    without, with_ = command("m", 1, None), command("m", 1, Path("/run/x"))
    assert "--no-enable-prefix-caching" in without
    assert "--kv-transfer-config" not in without
    transfer = json.loads(with_[with_.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"] == {"runtime_dir": "/run/x"}
    assert transfer["kv_load_failure_policy"] == "recompute"
