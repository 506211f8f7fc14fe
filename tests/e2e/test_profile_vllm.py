"""`--profile vllm` as a user types it: from the original, and from a folder that was converted before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from care_mla.cli.main import main
from e2e.command import FAST

from pico import pico_model, pico_text

CONVERT = ("--calibration", "text.txt", *FAST)


def care(*words: str) -> tuple[int, dict[str, Any]]:
    """Run a command in this process, which has torch loaded; its exit code and JSON."""
    Path("result.json").unlink(missing_ok=True)
    code = main([*words, "--json", "result.json"])
    return code, json.loads(Path("result.json").read_text()) if Path("result.json").exists() else {}


def widths(folder: str) -> list[int]:
    config = json.loads((Path(folder) / "config.json").read_text())
    names = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return [config[name] for name in names]


def test_from_the_original_and_from_a_converted_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pico_model(tmp_path / "model", heads=2, kv_heads=2, head_dim=64, rms_norm_eps=1e-6)
    (tmp_path / "text.txt").write_text(pico_text(3000))
    monkeypatch.chdir(tmp_path)
    code, body = care("convert", "model", "OUT", "--profile", "vllm", "--budget", "0.4", *CONVERT)
    assert code == 0
    assert widths("OUT") == [38, 64, 64, 128]
    assert body["cached_values"] == {"original": 256, "converted": 102}
    assert body["verify"]["cached_values"] == 102
    assert "TRITON_MLA" in " ".join(body["warnings"])
    assert "DeepseekV3ForCausalLM" in Path("OUT/README.md").read_text()

    narrow = ("--budget", "0.25", "--qk-rope-head-dim", "32", "--work", "OUT.work")
    assert care("convert", "model", "B", *narrow, *CONVERT)[0] == 0
    assert care("export", "B", "C", "--profile", "vllm", "--kv-lora-rank", "256")[0] == 0
    assert widths("C") == [256, 64, 64, 128]
    code, body = care("verify", "C")
    assert (code, body["cached_values"]) == (0, 320)
    assert body["relative_error"] < 1e-5

    code, body = care("plan", "model", "--profile", "vllm", "--budget", "0.4")
    assert (code, body["vllm_kernels"]) == (0, ["TRITON_MLA"])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["convert", "model", "D", "--profile", "vllm", "--form", "exact-rope", *CONVERT])
    assert "--profile vllm cannot express --form exact-rope" in " ".join(capsys.readouterr().err.split())
