"""Names that users type: public API, commands, and their options. A change here must be deliberate."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import care_mla
from care_mla.bench_config import BenchConfig
from care_mla.cli.main import COMMANDS, help_text
from care_mla.configs import (
    CompareConfig,
    ConvertConfig,
    DemoConfig,
    InspectConfig,
    PlanConfig,
    VerifyConfig,
)
from care_mla.evaluate_config import EvaluateConfig, GenerateConfig
from care_mla.export_config import ExportConfig
from care_mla.heal_config import HealConfig
from care_mla.report_config import ReportConfig

CONFIGS = {
    "inspect": InspectConfig,
    "plan": PlanConfig,
    "convert": ConvertConfig,
    "compare": CompareConfig,
    "evaluate": EvaluateConfig,
    "generate": GenerateConfig,
    "heal": HealConfig,
    "export": ExportConfig,
    "verify": VerifyConfig,
    "bench": BenchConfig,
    "report": ReportConfig,
    "demo": DemoConfig,
}
CALIBRATION = (
    "model budget kv_lora_rank qk_rope_head_dim allocation dtype recipe calibration calibration_tokens "
    "sequence_length work max_spool_gib damping seed device trust_remote_code quiet json"
)
MATCHING = "match_steps match_tokens"
OPTIONS = {
    "inspect": "quiet json model",
    "plan": f"{CALIBRATION} rope_table biases {MATCHING} form method profile",
    "convert": f"{CALIBRATION} rope_table biases {MATCHING} form method profile output overwrite",
    "compare": f"{CALIBRATION} methods form perplexity block max_tokens",
    "evaluate": (
        "quiet json models perplexity block window max_tokens tasks limit needle passkey haystack "
        "needle_lengths needle_seeds seed device trust_remote_code"
    ),
    "generate": (
        "quiet json models prompt max_new_tokens temperature seed chat_template device trust_remote_code"
    ),
    "heal": (
        "quiet json model output teacher data tokens held_out_tokens sequence_length train steps minutes "
        "batch_size micro_batch_size learning_rate warmup weight_decay max_grad_norm beta temperature "
        "cross_entropy hidden_states attention_outputs lora_rank save_every patience gradient_checkpointing "
        "compile shard plan dtype seed device work recipe overwrite trust_remote_code"
    ),
    "export": "quiet json model output profile quantization kv_lora_rank overwrite",
    "verify": "quiet json model engine",
    "bench": (
        "quiet json what models context batch_size new_tokens repeats dtype conversion scratch device "
        "trust_remote_code"
    ),
    "report": "quiet json folder",
    "demo": "quiet json folder overwrite",
}


def test_public_names() -> None:
    assert care_mla.__all__ == [
        "__version__",
        "CareError",
        "CompareConfig",
        "ConvertConfig",
        "ExportConfig",
        "HealConfig",
        "VerifyConfig",
        "compare",
        "convert",
        "export_model",
        "heal_model",
        "verify",
    ]


@pytest.mark.parametrize("name", care_mla.__all__)
def test_every_public_name_can_be_had(name: str) -> None:
    assert getattr(care_mla, name) is not None


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="ConvertConfig"):
        care_mla.transform  # noqa: B018


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_every_command(command: str) -> None:
    assert [f.name for f in fields(CONFIGS[command])] == OPTIONS[command].split()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_and_explains_every_option(command: str) -> None:
    code = "import sys; from care_mla.cli.main import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    text = " ".join(done.stdout.replace("│", " ").split())
    assert f"usage: care {command}" in text
    for f in fields(CONFIGS[command]):
        is_argument = f.name in ("what", "model", "models", "output", "folder")
        shown = f.name.removesuffix("s").upper() if is_argument else f"--{f.name.replace('_', '-')}"
        assert shown in text, f"{shown} is missing from the help"
    assert "(default: None) (default" not in text


def test_list_of_commands() -> None:
    lines = help_text().splitlines()
    assert all(len(line) < 100 for line in lines)
    assert [line.split()[0] for line in lines if line.startswith("  ")] == list(COMMANDS)
    files = {path.stem for path in (Path(care_mla.__file__).parent / "cli").glob("*.py")}
    assert files - {"__init__", "main", "options", "result"} == set(COMMANDS)


def test_modules_begin_with_what_they_are_for_and_stay_short() -> None:
    for path in Path(care_mla.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert text.startswith('"""'), f"{path}: no docstring"
        assert text.count("\n") <= 400, f"{path}: over 400 lines"
