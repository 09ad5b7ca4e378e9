"""The process that copies with LMCache's code. No GPU here: what it prints, and that both sides move the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.bench import gpu, gpu_lmcache
from forebay.bench.figures import GIB
from forebay.bench.gpu_lmcache_copies import PATHS, KvShape

RATES = {"load": 40.0, "store": 50.0}


def told(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, object]:
    assert gpu_lmcache.main(["--lmcache", str(folder)]) == 0
    out, err = capsys.readouterr()
    answer: dict[str, object] = json.loads(out.splitlines()[-1])
    assert list(answer) == ["reason", "rates", "errors"]
    assert len(err.splitlines()) == (0 if answer["reason"] else len(gpu_lmcache.SHAPES) * len(PATHS))
    return answer


@pytest.mark.parametrize("shape", [gpu.LLAMA, gpu.MLA], ids=lambda shape: shape.name)
def test_both_sides_move_the_same_segments(shape: gpu.Shape) -> None:
    """About a GiB of them: LMCache in whole chunks of 16 blocks."""
    theirs = gpu_lmcache.SHAPES[shape.name]
    assert (theirs.layers * theirs.parts, theirs.block_tokens * theirs.token_bytes) == (
        shape.segments,
        shape.segment_bytes,
    )
    assert theirs.chunk_bytes == theirs.blocks_per_chunk * shape.block_bytes
    assert abs(-(-GIB // theirs.chunk_bytes) * theirs.chunk_bytes / GIB - 1) < 0.01


def test_default_that_is_named_is_a_path() -> None:
    assert gpu.LMCACHE_DEFAULT in PATHS


def test_wheel_that_is_not_there_is_the_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Asked before anything of a GPU, so that the text is the same everywhere."""
    answer = told(capsys, tmp_path)
    assert answer["reason"] == (
        f"FileNotFoundError: {tmp_path} holds no lmcache/cuda_ops*.so and lmcache/lmcache_native*.so"
    )
    assert (answer["rates"], answer["errors"]) == ({}, {})


def test_path_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its text stands where its rates would be."""

    def measure(folder: Path, shape: KvShape, path: str) -> dict[str, float]:
        if path == "staged" and shape.parts == 1:
            raise RuntimeError("wrong bytes")
        return RATES

    monkeypatch.setattr(gpu_lmcache, "unavailable", lambda folder: "")
    monkeypatch.setattr(gpu_lmcache, "measure", measure)
    answer = told(capsys, tmp_path)
    assert answer["reason"] == ""
    assert answer["errors"] == {"mla": {"staged": "RuntimeError: wrong bytes"}}
    assert answer["rates"] == {"llama": dict.fromkeys(PATHS, RATES), "mla": {"direct": RATES, "classic": RATES}}
