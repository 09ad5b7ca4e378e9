"""What the GPU's benchmark does with its measurements. No GPU here: the sections are fed times of our own."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from forebay.bench import gpu
from forebay.bench.figures import Figure, passed
from forebay.bench.gpu import (
    LLAMA,
    LMCACHE_NAMES,
    MLA,
    ask_lmcache,
    beside_lmcache,
    in_turns,
    link_names,
    links,
    lmcache_command,
    measured,
    report,
    turn_ratio,
)
from forebay.transports.dma import Direction, Strategy
from forebay.transports.dma.tuning import Row, Tuning

GIGABYTE = 10**9
RATES = {
    shape.name: {
        (direction, strategy): rate
        for direction in Direction
        for strategy, rate in ((Strategy.DMA, 50.0), (Strategy.STAGED, 40.0), (Strategy.MAPPED, 20.0))
    }
    for shape in (LLAMA, MLA)
}
PATHS = {"direct": {"load": 25.0, "store": 30.0}, "staged": {"load": 40.0, "store": 62.5}}


def child(code: str) -> list[str]:
    """A process in the place of LMCache's copies."""
    return [sys.executable, "-c", f"import os, sys, time\n{code}"]


def answering(**changed: Any) -> list[str]:
    answer = {"reason": "", "rates": {"llama": PATHS, "mla": PATHS}, "errors": {}, **changed}
    return child(f"print('a warning'); print({json.dumps(answer)!r})")


def fake_rig() -> Any:
    """A plain copy takes 1 s, strategies take 1, 2, 3 s, for a gigabyte; each copy notes that it was made."""
    made: Any = SimpleNamespace(shape=LLAMA, bytes=GIGABYTE, cpu_s={}, rates={}, checked=[])
    seconds = dict(zip(Strategy, (1.0, 2.0, 3.0), strict=True))

    def moving(direction: Direction, strategy: Strategy) -> gpu.Action:
        def action() -> float:
            made.cpu_s.setdefault((direction, strategy), []).append(seconds[strategy] / 100)
            return seconds[strategy]

        return action

    made.moving = moving
    made.plain = lambda direction: lambda: 1.0
    made.check = lambda direction, strategy: made.checked.append((direction, strategy))
    return made


def test_actions_take_turns_and_the_rehearsal_does_not_count() -> None:
    """Bound and measurement meet the same machine."""
    calls: list[str] = []

    def action(name: str) -> gpu.Action:
        def act() -> float:
            calls.append(name)
            return float(len(calls))

        return act

    assert in_turns(action("a"), action("b"), turns=2) == [[3.0, 5.0], [4.0, 6.0]]
    assert calls == ["a", "b"] * 3


def test_ratio_is_the_median_of_the_turns_own_ratios() -> None:
    """A machine that is slow for one turn is slow for both."""
    assert turn_ratio([1.0, 10.0, 1.0], [2.0, 20.0, 1.0]) == 0.5


def test_links_name_the_fastest_strategy_and_leave_all_rates() -> None:
    """The rates are what LMCache is compared with later."""
    made = fake_rig()
    figures = list(links(cast(gpu.Rig, made)))
    assert tuple(figure.name for figure in figures) == link_names(LLAMA)
    assert [(figure.value, figure.bound) for figure in figures[::2]] == [(1.0, 1.0)] * 2
    assert figures[0].note.startswith("dma; dma 1.0 GB/s (1.000), staged 0.5 GB/s (0.500), mapped 0.3 GB/s (0.333)")
    assert made.checked == [(direction, strategy) for direction in Direction for strategy in Strategy]
    assert made.rates == {
        (direction, strategy): pytest.approx(1 / (index + 1))
        for direction in Direction
        for index, strategy in enumerate(Strategy)
    }


def test_section_that_fails_leaves_its_figures_without_a_value_and_fails_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Silence must not pass; what was measured before stays."""

    def section() -> Iterator[Figure]:
        yield Figure("gpu_gather_ratio", 0.9, "x device copy")
        raise RuntimeError("no memory")

    figures = measured(gpu.KERNEL_NAMES, section())
    assert [(figure.name, figure.value) for figure in figures] == [
        ("gpu_gather_ratio", 0.9),
        ("gpu_scatter_ratio", None),
    ]
    assert figures[1].note == "RuntimeError: no memory"
    assert not passed(figures)
    assert "not measured: gpu_scatter_ratio: RuntimeError: no memory" in capsys.readouterr().err


def test_every_section_has_names_and_none_twice() -> None:
    """They are what fails when the section does."""
    names = [name for section in gpu.SECTIONS for name in section[0]]
    assert set(gpu.NAMES) == {*names, *link_names(MLA), *LMCACHE_NAMES}
    assert len(gpu.NAMES) == len(names) + len(link_names(MLA)) + len(LMCACHE_NAMES)


def test_report_is_a_table_with_a_line_a_figure_and_an_object(tmp_path: Path) -> None:
    """A note with line breaks or bars would break the table."""
    row = Row(Direction.LOAD, 32 << 10, 8 << 20, {"dma": 50e9, "staged": 40e9, "mapped": 20e9})
    figures = [
        Figure("gpu_gather_ratio", 0.8, "x device copy", 1000.0, note="several\nlines | and bars"),
        Figure("gpu_register_gb_per_s", None, ""),
    ]
    path = report(tmp_path / "new", "NVIDIA H100 80GB", figures, Tuning("an H100, driver 1", 0.0, (row,)), 60)
    text = path.read_text()
    assert path.name.startswith("gpu-nvidia-h100-80gb-")
    assert "| `gpu_gather_ratio` | 0.8 | x device copy | 1000 | >= 0.85 | FAILS | several lines / and bars |" in text
    assert "| `gpu_register_gb_per_s` | - |  | - |  |  |  |" in text
    assert "| load | 32 KiB | 8 MiB | 50.0 | 40.0 | 20.0 | dma |" in text
    document = json.loads(path.with_suffix(".json").read_text())
    assert document["device"] == "NVIDIA H100 80GB"
    assert document["figures"]["gpu_gather_ratio"]["ok"] is False
    assert document["figures"]["gpu_register_gb_per_s"]["value"] is None


def test_lmcache_figure_compares_the_fastest_of_both_and_names_all() -> None:
    """Its default would be the easier one to beat."""
    figures = list(beside_lmcache(RATES, answering()))
    assert tuple(figure.name for figure in figures) == LMCACHE_NAMES
    load, store = figures[:2]
    assert (load.value, load.bound, load.ok) == (1.25, 40.0, True)
    assert (store.value, store.bound, store.ok) == (0.8, 62.5, False)
    assert load.note == (
        "forebay dma 50.0, staged 40.0, mapped 20.0 GB/s; LMCache direct 25.0, staged 40.0 GB/s; its default is direct"
    )


def test_lmcache_path_that_failed_leaves_no_ratio() -> None:
    """It may have been the fastest; what the others reached is told."""
    paths = {"direct": PATHS["direct"]}
    failed = {"staged": "RuntimeError: wrong bytes"}
    answer = answering(rates={"llama": paths, "mla": PATHS}, errors={"llama": failed})
    llama, _, mla, _ = beside_lmcache(RATES, answer)
    assert (llama.value, llama.bound, llama.ok) == (None, None, False)
    assert "LMCache direct 25.0 GB/s" in llama.note
    assert "staged failed: RuntimeError: wrong bytes" in llama.note
    assert mla.value == 1.25


def test_without_rates_of_our_own_there_is_no_ratio() -> None:
    """`links` may have failed."""
    figures = list(beside_lmcache({"llama": {}, "mla": RATES["mla"]}, answering()))
    assert [figure.value is None for figure in figures] == [True, True, False, False]
    assert figures[0].note.startswith("forebay not measured; LMCache direct 25.0")


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (child("print('half', file=sys.stderr, flush=True); os.abort()"), "ended with status -6: half"),
        (child("print('{'); sys.exit(3)"), "ended with status 3"),
        (child(""), "ended with status 0"),
        (answering(reason="torch sees no CUDA device"), "cannot be run here: torch sees no CUDA device"),
        (child("print('no json')"), "JSONDecodeError"),
    ],
)
def test_child_without_an_answer_leaves_figures_that_say_why(command: list[str], text: str) -> None:
    """Foreign machine code may end its process, never the benchmark."""
    figures = measured(LMCACHE_NAMES, beside_lmcache(RATES, command))
    assert tuple(figure.name for figure in figures) == LMCACHE_NAMES
    assert all(figure.value is None and text in figure.note for figure in figures)
    assert not passed(figures)


def test_child_that_hangs_is_ended_at_its_deadline() -> None:
    with pytest.raises(RuntimeError, match=r"more than 0\.2 s"):
        ask_lmcache(child("sys.stdin = os.fdopen(os.pipe()[0]); sys.stdin.read()"), timeout_s=0.2)


def test_folder_without_the_wheel_is_named(tmp_path: Path) -> None:
    """The real child, as the benchmark starts it."""
    with pytest.raises(RuntimeError, match=r"cannot be run here: FileNotFoundError: .* holds no lmcache/cuda_ops"):
        ask_lmcache(lmcache_command(tmp_path))
