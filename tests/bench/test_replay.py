"""The command: what it prints, where, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

from forebay.bench.replay import JSON_KEYS, Size, main
from forebay.bench.trace import Trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """40 conversations of up to 5 turns, one block longer each time."""
    lines = []
    for number in range(200):
        talk, turn = number % 40, number // 40
        ids = [0, *(1000 * (talk + 1) + at for at in range(turn + 2))]
        lines.append({"timestamp": 1000 * number, "input_length": 512 * len(ids), "hash_ids": ids})
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_json_has_one_object_a_run_with_these_keys(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order asked for, whatever finished first; nothing but JSON on standard output."""
    arguments = [str(trace), "--policy", "lru,hazard,belady", "--capacity", "10%,50%", "--json", "--jobs", "1"]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    results = json.loads(printed.out)
    assert [(r["policy"], r["capacity_percent"]) for r in results] == [
        (policy, pytest.approx(percent, abs=0.5)) for policy in ("lru", "hazard", "belady") for percent in (10, 50)
    ]
    assert {tuple(result) for result in results} == {JSON_KEYS}
    assert all(result["trace"] == "talks" for result in results)
    assert "6" in printed.err


def test_processes_change_nothing(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for jobs in ("1", "2"):
        arguments = [str(trace), "--policy", "hazard", "--capacity", "10%,30%", "--json", "--jobs", jobs]
        assert main(arguments) == 0
        results.append(capsys.readouterr().out)
    assert results[0] == results[1]


def test_table_names_tiers_work_and_money(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prices = ["--price-per-gpu-hour", "2.35", "--price-per-tb-written", "0.08"]
    assert main([str(trace), "--policy", "lru", "--host", "5%", "--nvme", "60%", *prices]) == 0
    head, line = capsys.readouterr().out.splitlines()
    for word in (
        "token hit",
        "FLOPs saved",
        "writes/new",
        "occupancy",
        "demoted",
        "GPU-h saved",
        "nvme",
        "$ saved",
        "$ writes",
    ):
        assert word in head
    assert line.startswith("talks          lru")


def test_budget_in_percent_is_for_the_whole_trace(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table says how much of it was used; without one there is no such column."""
    arguments = [str(trace), "--policy", "hazard", "--host", "5%", "--nvme", "60%", "--jobs", "1"]
    assert main([*arguments, "--write-budget", "30%"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.endswith("budget used")
    assert 30 < float(line.split()[-1].rstrip("%")) <= 105
    assert main(arguments) == 0
    assert "budget used" not in capsys.readouterr().out


def test_trace_tells_the_size_of_its_blocks_unless_it_is_told(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of 320 KiB of KV a token, 64 GiB hold so many of each size."""
    sized = trace.with_name("sized.jsonl")
    lines = [json.loads(line) for line in trace.read_text().splitlines()]
    sized.write_text("".join(json.dumps(line | {"block_size": 16}) + "\n" for line in lines))
    blocks = []
    for words in ([str(trace)], [str(sized)], [str(sized), "--block-tokens", "32"]):
        assert main([*words, "--policy", "lru", "--capacity", "64GiB", "--jobs", "1", "--json"]) == 0
        blocks.append(json.loads(capsys.readouterr().out)[0]["capacity_blocks"])
    assert blocks == [(64 << 30) // (327_680 * tokens) for tokens in (512, 16, 32)]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_who_looks_sees_how_far_it_has_come(
    trace: Path, jobs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By requests, not by runs: one run may take a minute."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([str(trace), "--policy", "lru", "--capacity", "10%,20%", "--jobs", jobs]) == 0
    drawn = re.findall(r"\rreplay \[([#.]{30})\] (\d+) % of 2 runs", capsys.readouterr().err)
    assert (drawn[0], drawn[-1]) == (("." * 30, "0"), ("#" * 30, "100"))
    assert [int(percent) for _, percent in drawn] == sorted(int(percent) for _, percent in drawn)
    if jobs == "1":  # two processes may have done all before anybody looked
        assert ("#" * 9 + "." * 21, "32") in drawn, "128 of 400 requests"


def test_plot_is_written_as_svg(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line a policy; no library is needed for it."""
    drawn = tmp_path / "plot.svg"
    arguments = [str(trace), "--policy", "lru,fifo", "--capacity", "5%,50%", "--jobs", "1", "--plot", str(drawn)]
    assert main(arguments) == 0
    text = drawn.read_text()
    assert text.count("<polyline") == 2
    assert ">fifo<" in text
    assert ">talks: token hit rate, %<" in text


def test_png_needs_matplotlib_and_says_so(trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything has run."""
    drawn = tmp_path / "plot.png"
    status = main([str(trace), "--policy", "lru", "--capacity", "5%", "--jobs", "1", "--plot", str(drawn)])
    if importlib.util.find_spec("matplotlib") is None:
        assert status == 2
        assert "forebay[plot]" in capsys.readouterr().err
    else:
        assert status == 0
        assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--policy", "best"], "unknown policy 'best'"),
        (["--capacity", "5 apples"], "is not a size"),
        (["--capacity", "0%"], "is not a size"),
        (["--warm-up", "100"], "is not a percentage"),
        (["--hints", "101"], "is not a percentage"),
        (["--block-tokens", "0"], "is not a whole number"),
        (["--host", "5%", "--capacity", "5%"], "not allowed with"),
    ],
)
def test_usage_is_refused(trace: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(trace), *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err


def test_what_is_no_trace_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.jsonl"
    assert main([str(path), "--jobs", "1"]) == 2
    path.write_text("{}\n")
    assert main([str(path), "--jobs", "1"]) == 2
    assert "x.jsonl:1:" in capsys.readouterr().err


def test_bytes_are_turned_into_blocks_by_the_models_shape() -> None:
    """64 GiB of a 70B model's KV are 409 blocks of 512 tokens; shares are cut off, and at least one block is left."""
    nothing = Trace("t", (), 183)
    assert Size(size_bytes=64 << 30).blocks(nothing, 512 * 327_680) == 409
    assert Size(percent=1).blocks(nothing, 1) == 1
    assert Size(percent=50).blocks(nothing, 1) == 91
    assert Size(percent=0.001).blocks(nothing, 1) == 1
