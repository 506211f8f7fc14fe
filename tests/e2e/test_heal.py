"""`care heal` as a user types it: killed and resumed, in two processes, in every profile, with adapters."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from care_mla.checkpoint.opening import open_source
from care_mla.cli.main import main
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.profile import TARGETS
from care_mla.export.run import export_model
from care_mla.export.verify import store_reference
from care_mla.export_config import ExportConfig
from e2e.command import CARE, ENVIRONMENT, FAST, hashes
from export_cases import decoupled_layer, export, token_ids
from heal_cases import curve, run
from heal_processes import TERMS
from latent_models import exact_layer, load

from pico import pico_model, pico_text

STEPS = 30
HEAL = (
    *("--teacher", "model", "--data", "text.txt", "--sequence-length", "64", "--batch-size", "4"),
    *("--learning-rate", "2e-3", "--device", "cpu"),
)
LONG = (*HEAL, "--steps", str(STEPS), "--save-every", "3")


def heal(*words: str) -> tuple[int, dict[str, Any]]:
    """Run `care heal` in this process, which has torch loaded; its exit code and JSON."""
    Path("result.json").unlink(missing_ok=True)
    code = main(["heal", *words, "--json", "result.json"])
    return code, json.loads(Path("result.json").read_text()) if Path("result.json").exists() else {}


def convert(*words: str) -> None:
    assert main(["convert", "model", "OUT", "--calibration", "text.txt", *FAST, "--quiet", *words]) == 0


def tensors(folder: str | Path) -> dict[str, Tensor]:
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `model`, its conversion `OUT` in a stock profile, `text.txt`, and `HEALED`."""
    folder = tmp_path_factory.mktemp("heal")
    pico_model(folder / "model", kv_heads=1)
    (folder / "text.txt").write_text(pico_text(4000))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        convert("--budget", "0.75")
        code, body = heal("OUT", "HEALED", *LONG)
        assert code == 0
        Path("healed.json").write_text(json.dumps(body))
    return folder


@pytest.fixture
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same without HEALED, where the command runs."""
    for name in ("model", "OUT"):
        (tmp_path / name).symlink_to(folder / name)
    shutil.copy(folder / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def without_time(steps: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in steps]


def test_what_it_tells_and_writes(folder: Path) -> None:
    body = json.loads((folder / "healed.json").read_text())
    assert body["format"] == "care-mla/heal/1"
    assert [row["step"] for row in body["steps"]] == list(range(1, STEPS + 1))
    assert {"step", "loss", "kl", "tokens_per_second"} <= set(body["steps"][0])
    assert set(body["held_out"]) == {"before", "after"}
    assert body["held_out"]["after"] < 0.95 * body["held_out"]["before"]
    assert body["held_out"]["after"] == min(row["kl"] for row in body["measurements"])
    assert body["flops_per_token"] > 1e5
    assert body["model_flop_utilisation"] is None
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert body["verify"]["relative_error"] < 1e-4
    assert body["profile"] == "deepseek-v3"
    names = {path.name for path in (folder / "HEALED").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml", "recipe-heal.yaml"} <= names
    assert not [name for name in names if name.endswith((".tmp", ".py"))]
    assert list((folder / "HEALED.work/trackers").rglob("events.out.tfevents.*"))
    card = (folder / "HEALED/README.md").read_text()
    assert "Attention's weights were then trained towards the original for" in card
    assert "care_reference/healing.svg" in card


def test_only_attention_changed(folder: Path) -> None:
    before, after = tensors(folder / "OUT"), tensors(folder / "HEALED")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        same = torch.equal(tensor, after[name])
        assert same is (".self_attn." not in name or "layernorm" in name), name


def test_the_learning_curve_is_text_that_can_be_read(folder: Path) -> None:
    svg = (folder / "HEALED/care_reference/healing.svg").read_text()
    words = " ".join(ElementTree.fromstring(svg).itertext())
    assert "tokens trained on" in words
    assert "KL to the original, nats per token" in words
    assert svg == (folder / "HEALED.work/healing.svg").read_text()
    history = json.loads((folder / "HEALED/care_reference/healing.json").read_text())
    body = json.loads((folder / "healed.json").read_text())
    assert history["measurements"] == body["measurements"]
    assert [row["loss"] for row in history["losses"]] == [row["loss"] for row in body["steps"]]


def test_killed_and_resumed_is_the_same(folder: Path, here: Path) -> None:
    process = subprocess.Popen(
        [CARE, "heal", "OUT", "HEALED", *LONG], env=ENVIRONMENT, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    checkpoints, end = here / "HEALED.work/checkpoints", time.monotonic() + 120
    while not (checkpoints / "step_00000006").exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, "training never came so far"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not Path("HEALED").exists()
    done = max(int(path.name[5:]) for path in checkpoints.glob("step_*"))
    assert done < STEPS, "it was killed too late"
    code, body = heal("OUT", "HEALED", *LONG)
    assert code == 0
    undisturbed = json.loads((folder / "healed.json").read_text())
    assert without_time(body["steps"]) == without_time(undisturbed["steps"])
    assert body["measurements"] == undisturbed["measurements"]
    assert hashes(here / "HEALED") == hashes(folder / "HEALED")


def test_two_processes_are_one(folder: Path, here: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *(str(Path(__file__).parents[1] / "heal_processes.py"), str(here), *LONG),
        ],
        env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for names, options in ((("ddp",), {}), (("ddp-terms", "fsdp-terms"), TERMS)):
        alone, _ = run(Path("OUT"), Path("model"), Path(f"{names[0]}-alone"), **options)
        for name in names:
            together = json.loads(Path(f"{name}.json").read_text())
            assert together["curve"] == pytest.approx(curve(alone), rel=1e-5), name
            assert together["step"] == alone.best[0]
    sharded = json.loads(Path("shard.json").read_text())
    assert sharded["processes"] == 2
    assert sharded["verify"]["passed"]
    single = json.loads((folder / "healed.json").read_text())
    for key in ("loss", "kl", "cross_entropy", "gradient_norm"):
        expected = [row[key] for row in single["steps"]]
        assert [row[key] for row in sharded["steps"]] == pytest.approx(expected, rel=1e-3), key
    assert sharded["held_out"] == pytest.approx(single["held_out"], rel=1e-4)
    one, two = tensors(folder / "HEALED"), tensors("SHARDED")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-3 * float(tensor.abs().max()))


def test_adapters_merge_into_a_stock_checkpoint(here: Path) -> None:
    code, body = heal("OUT", "HEALED", *HEAL, "--steps", "8", "--train", "lora", "--lora-rank", "4")
    assert code == 0
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert body["verify"]["class"] == "DeepseekV3ForCausalLM"
    assert body["held_out"]["after"] < body["held_out"]["before"]
    assert tensors("HEALED").keys() == tensors("OUT").keys()


def cut_exact_rope(folder: Path) -> None:
    """An original and, in the profile `care`, its exact-rope form with a quarter of the rank cut off."""
    source = open_source(str(pico_model(folder / "model")))
    model, layers = load(folder / "model"), []
    for layer_idx in range(2):
        layer = exact_layer(model, layer_idx)
        u_OO, s_O, v_OD = torch.linalg.svd(layer.down_RD, full_matrices=False)
        up_GHR = u_OO[:, :48].unflatten(0, (4, 16))
        down_RD = s_O[:48, None] * v_OD[:48]
        factors = {"down_RD": down_RD, "up_k_GMR": up_GHR[:2], "up_v_GHR": up_GHR[2:]}
        layers.append(replace(layer, **factors, inv_freq_JF=layer.inv_freq_JF.clone()))
    write_latent_checkpoint(source, layers.__getitem__, folder / "OUT", torch.float32)
    store_reference(folder / "OUT", source, layers.__getitem__, token_ids(), num_greedy=8)


def random_experts(folder: Path) -> None:
    """An original with experts and, in the profile `mistral4`, a model with its MLPs and random attention."""
    source = open_source(str(pico_model(folder / "model", "mixtral", tied=False)))
    layers = [decoupled_layer(source, seed) for seed in range(2)]
    TARGETS["mistral4"].write(source, layers.__getitem__, folder / "OUT", torch.float32, lambda: None)
    store_reference(folder / "OUT", source, layers.__getitem__, token_ids(), num_greedy=8)


@pytest.mark.parametrize(
    ("make", "profile", "options", "share"),
    [
        (cut_exact_rope, "care", ("--batch-size", "16"), 0.5),
        (random_experts, "mistral4", ("--train", "all"), 0.95),
    ],
    ids=["care", "mistral4"],
)
def test_thirty_steps_in_other_profiles(
    make: Callable[[Path], None],
    profile: str,
    options: tuple[str, ...],
    share: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    Path("text.txt").write_text(pico_text(12_000))
    code, body = heal("OUT", "HEALED", *LONG, *options, "--quiet")
    assert code == 0
    assert body["profile"] == profile
    assert body["verify"]["passed"], body["verify"]["problems"]
    assert body["verify"]["relative_error"] < 1e-4
    assert body["held_out"]["after"] < share * body["held_out"]["before"]


def test_padded_values_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Profile vllm: heal what it was made from, and export that."""
    folder = export(tmp_path, rms_norm_eps=1e-6, heads=2, kv_heads=2, head_dim=64).folder
    export_model(ExportConfig(model=folder, output=tmp_path / "vllm", profile="vllm", quiet=True))
    monkeypatch.chdir(tmp_path)
    before = hashes(tmp_path)
    assert main(["heal", "vllm", "HEALED", "--teacher", "source"]) == 2
    said = capsys.readouterr().err
    assert "padded" in said
    assert "Nothing was written" in said
    assert hashes(tmp_path) == before


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "OUT exists": (("OUT", "OUT2", "--teacher", "model"), "OUT2 exists already"),
    "no teacher": (("OUT", "HEALED"), "--teacher is missing"),
    "another teacher": (("OUT", "HEALED", "--teacher", "other"), "has vocab_size"),
    "the teacher is no model": (("OUT", "HEALED", "--teacher", "nowhere/at/all"), "nowhere/at/all"),
    "not converted": (("model", "HEALED", "--teacher", "model"), "source_config.json is missing"),
    "no such folder": (("nowhere", "HEALED", "--teacher", "model"), "nowhere is not a folder"),
    "no such text": (("OUT", "HEALED", "--teacher", "model", "--data", "no.txt"), "no.txt: there is no such"),
    "over its model": (("OUT", "OUT", "--teacher", "model", "--overwrite"), "lies in"),
    "over the teacher": (("OUT", "model", "--teacher", "model", "--overwrite"), "lies in"),
    "work in its output": (("OUT", "HEALED", "--teacher", "model", "--work", "HEALED/w"), "HEALED/w lies in"),
    "into its model": (("OUT", "OUT/in", "--teacher", "model"), "lies in"),
    "work in a model": (("OUT", "HEALED", "--teacher", "model", "--work", "model"), "--work model lies in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_and_writes_nothing(
    name: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[name]
    pico_model(here / "other", vocab=300, kv_heads=1)
    Path("OUT2").mkdir()
    before = hashes(here)
    capsys.readouterr()
    try:
        code = main(["heal", *words])
    except SystemExit as stopped:  # of the parser
        code = int(str(stopped.code))
    assert code == 2
    captured = capsys.readouterr()
    assert message in " ".join(captured.err.replace("│", " ").split())
    assert "Traceback" not in captured.err
    assert hashes(here) == before


def test_a_plan_writes_nothing(here: Path) -> None:
    code, body = heal("OUT", "HEALED", *LONG, "--plan")
    assert code == 0
    assert body["memory_bytes"] == sum(body["memory"].values())
    assert body["disk_bytes"] == sum(body["disk"].values())
    assert {path.name for path in here.iterdir()} == {"model", "OUT", "text.txt", "result.json"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (("--learning-rate", "1e-3"), "learning_rate was 0.002, now 0.001"),
        (("--train", "all"), "train was 'attention', now 'all'"),
        (("--data", "other.txt"), "data was"),
        (("--seed", "1"), "seed was 0, now 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_checkpoints_of_another_training_are_refused_by_name(
    change: tuple[str, ...], named: str, folder: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "HEALED.work", here / "HEALED.work")
    Path("other.txt").write_text(pico_text(4000, seed=9))
    words = [*LONG, *change]
    if change[0] == "--data":
        words.remove("text.txt")
        words.remove("--data")
    assert main(["heal", "OUT", "HEALED", *words]) == 2
    said = capsys.readouterr().err
    assert named in said
    assert "--work FOLDER" in said
    assert not Path("HEALED").exists()
