"""``forebay model``, through the command line's own dispatch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from forebay.daemon import cli

QWEN = {
    "num_hidden_layers": 64,
    "hidden_size": 5120,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 25_600,
    "vocab_size": 151_936,
}


def test_json_holds_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["model", "llama-3-70b", "--gpus", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes_per_token"] == 327_680
    assert found["block_bytes"] == 16 * 327_680
    assert found["prefill_tokens_per_s"] == pytest.approx(14_000, rel=0.01)
    assert found["break_even_gb_s"] == pytest.approx([4.55, 4.42, 3.98, 3.52, 2.07], rel=0.005)
    ways = {way["tier"]: way for way in found["tiers"]}
    assert ways["host memory, PCIe 5"]["gb_s"] == 208
    assert ways["NVMe, Gen 5"]["break_even_tokens"] == 1
    assert ways["object store"]["break_even_tokens"] > 131_072


def test_text_marks_what_does_not_pay(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["model", "deepseek-ai/DeepSeek-V3", "--gpus", "16", "--tflops", "1979", "--mfu", "0.25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "on every rank" in lines[0]
    store = next(line for line in lines if line.startswith("object store"))
    assert store.split()[4:8] == ["76.0*", "184*", "616*", "1191*"]
    assert any(line.startswith("prefill_tokens_per_s = 106973") for line in lines)


def test_a_config_file_or_its_folder_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(QWEN))
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        assert cli.run(["model", name, "--json", "--kv-element-bytes", "1", "--active-weights", "32.8"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["kv_bytes_per_token"] == 131_072
        assert found["flops_per_token"] == pytest.approx(65.6e9)


def test_without_a_name_the_known_ones_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["model"]) == 0
    assert "llama-3-8b" in capsys.readouterr().out.split()


@pytest.mark.parametrize("content", ["[]", "{", "{}"])
def test_what_describes_no_model_is_a_usage_error(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    for name in ("no-such-model", str(path), str(tmp_path / "absent.json")):
        assert cli.run(["model", name]) == 2
        assert capsys.readouterr().err.startswith("forebay model: ")
