"""The student is the converted model in weights that train, and what it learns fits back into the folder."""
# Shapes: D hidden_size, N query heads, H head_dim, R kv_lora_rank, M qk_nope_head_dim, P qk_rope_head_dim.

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from care_mla.checkpoint.opening import open_source
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.profile import TARGETS
from care_mla.export.verify import read_reference, store_reference
from care_mla.factors import LatentLayer
from care_mla.heal.engine import Distiller
from care_mla.heal.loss import LossWeights
from care_mla.heal.student import HealedFolder, StudentFolder, choose_weights, is_trained
from care_mla.mla.reference import Reference
from export_cases import export, relative_error, token_ids
from latent_models import load, random_layer

from pico import LLAMA3_ROPE, pico_model

# What a stock profile does to a model: it scales the stream, the final norm, the latent, queries with biases.
STOCK: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-untied-eps-1e-6": {"tied": False, "rms_norm_eps": 1e-6},
    "llama3-rope-biases": {"rope": "llama3", "attention_bias": True},
    "mistral": {"family": "mistral", "tied": False, "head_dim": 32},
    "qwen2": {"family": "qwen2"},
}
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "exact-rope": ("exact-rope", {"attention_bias": True}),
    "exact-rope-qk-norm": ("exact-rope qk-norm head", {"family": "qwen3"}),
    "exact-rope-olmo2": ("exact-rope qk-norm full", {"family": "olmo2", "tied": False}),
    "exact-rope-llama3": ("exact-rope", {"rope": LLAMA3_ROPE, "attention_bias": True, "tied": False}),
    "decoupled": ("decoupled", {"attention_bias": True}),
    "partial-rope": ("partial-rope", {}),
    "mixtral": ("decoupled", {"family": "mixtral", "tied": False, "sliding_window": None}),
    "qwen3-moe": ("exact-rope qk-norm head", {"family": "qwen3_moe", "tied": False}),
}


def stock(folder: Path, name: str) -> Path:
    return export(folder, tokenizer=False, **STOCK[name]).folder


def own(folder: Path, name: str) -> Path:
    """A folder of the profile `care`, with factors of no source and a rank for each layer."""
    form, options = OWN[name]
    source = open_source(str(pico_model(folder / "source", tokenizer=False, **options)))
    biases = bool(options.get("attention_bias"))
    layers = [random_layer(form, rank, seed, biases=biases) for seed, rank in enumerate((20, 12))]
    write_latent_checkpoint(source, layers.__getitem__, folder / "out", torch.float32)
    store_reference(folder / "out", source, layers.__getitem__, token_ids(), num_greedy=4)
    return folder / "out"


CASES = [(stock, name) for name in STOCK] + [(own, name) for name in OWN]
case = pytest.mark.parametrize(("make", "name"), CASES, ids=[f"{m.__name__}-{n}" for m, n in CASES])


def trained_of(student: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def reference(model: HealedFolder | StudentFolder) -> Tensor:
    return Reference(model, model.latent_layer).logits(token_ids())


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids()).logits


@case
def test_the_student_is_the_folder_and_folds_back_to_it(make, name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name)
    student = StudentFolder(folder).load_student()
    assert relative_error(logits(student), read_reference(folder).reference_BLS) < 5e-6
    back = HealedFolder(folder, trained_of(student))
    assert relative_error(reference(back), read_reference(folder).reference_BLS) < 1e-6


@case
def test_everything_that_trains_is_written(make, name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name)
    student = StudentFolder(folder).load_student()
    before = logits(student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.05 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    healed = HealedFolder(folder, trained_of(student))
    assert relative_error(before, logits(student)) > 0.02
    assert relative_error(reference(healed), logits(student)) < 5e-6
    # As an engine reads it, in the profile that it had.
    profile = "care" if make is own else "deepseek-v3"
    TARGETS[profile].write(healed, healed.latent_layer, tmp_path / "healed", torch.float32, lambda: None)
    engine = AutoModelForCausalLM.from_pretrained(
        tmp_path / "healed", trust_remote_code=make is own, dtype=torch.float32
    )
    assert relative_error(logits(engine.eval()), logits(student)) < 1e-4


@case
def test_what_does_not_train_stays_to_the_bit(make, name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, name)
    student, stored = StudentFolder(folder).load_student(), StudentFolder(folder)
    trained = {n: p for n, p in trained_of(student).items() if "layers.1.self_attn." in n}
    healed = HealedFolder(folder, trained)
    for tensor_name in stored.headers:
        if ".1.self_attn." not in tensor_name:
            assert torch.equal(healed.tensor(tensor_name), stored.tensor(tensor_name)), tensor_name
    found, expected = healed.latent_layer(0), stored.latent_layer(0)
    for field in vars(expected):
        value, other = getattr(expected, field), getattr(found, field)
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, field


@pytest.mark.parametrize("name", STOCK)
def test_the_student_is_well_scaled(name: str, tmp_path: Path) -> None:
    folder = stock(tmp_path, name)
    student = StudentFolder(folder).load_student()
    seen: list[Tensor] = []
    for layer in student.model.layers:
        layer.self_attn.kv_a_proj_with_mqa.register_forward_hook(lambda *a: seen.append(a[2][..., :20]))
    logits(student)
    for latent_BLR in seen:
        rms_R = latent_BLR.square().mean((0, 1)).sqrt()
        assert rms_R.min() > 0.1
        assert rms_R.max() < 10
    stock_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    small = stock_model.model.layers[0].self_attn.kv_a_proj_with_mqa.weight[:20].abs().max()
    assert small < 1e-6  # what Adam would move by 1e-3 at its first step


def without_rank(folder: Path) -> tuple[Path, Path]:
    """An original with one KV head, and its conversion with half of the values' rank cut off."""
    source = open_source(str(pico_model(folder / "source", tokenizer=False, kv_heads=1)))
    attention = [load(folder / "source").model.layers[i].self_attn for i in range(2)]
    layers = []
    for module in attention:
        u_HH, s_H, v_HD = torch.linalg.svd(module.v_proj.weight.detach().double(), full_matrices=False)
        q_NHD = module.q_proj.weight.detach().double().unflatten(0, (4, 16))
        layers.append(
            LatentLayer(
                form="decoupled",
                down_RD=s_H[:8, None] * v_HD[:8],
                up_k_GMR=torch.zeros(1, 16, 8, dtype=torch.float64),
                up_v_GHR=u_HH[None, :, :8],
                q_rope_NPD=q_NHD,
                q_nope_NMD=torch.zeros_like(q_NHD),
                k_rope_JPD=module.k_proj.weight.detach().double()[None],
                inv_freq_JF=10000.0 ** (-torch.arange(8, dtype=torch.float64) / 8)[None],
            )
        )
    TARGETS["deepseek-v3"].write(source, layers.__getitem__, folder / "out", torch.float32, lambda: None)
    store_reference(folder / "out", source, layers.__getitem__, token_ids(), num_greedy=4)
    return folder / "source", folder / "out"


def adam(model: PreTrainedModel, teacher: PreTrainedModel, learning_rate: float) -> tuple[float, float]:
    """KL on text that is not trained on, before and after 30 steps of Adam on attention."""
    distiller = Distiller(model, teacher, LossWeights(cross_entropy=0.0))
    parameters = [p for n, p in model.named_parameters() if is_trained(n, "attention")]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    held_out_BL = token_ids(16, 32, seed=99)

    def measure() -> float:
        with torch.no_grad():
            return distiller(held_out_BL).kl.item()

    before = measure()
    for step in range(30):
        distiller(token_ids(16, 32, seed=step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before, measure()


def test_adam_heals_the_student_and_destroys_the_exported_file(tmp_path: Path) -> None:
    original, folder = without_rank(tmp_path)
    student = StudentFolder(folder).load_student()
    before, after = adam(student, load(original), 1e-3)
    assert after < 0.85 * before
    for learning_rate in (1e-3, 1e-5, 1e-7):
        as_it_is = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        before_too, after = adam(as_it_is, load(original), learning_rate)
        assert before_too == pytest.approx(before, rel=1e-3)
        assert after > 1.5 * before, learning_rate


@pytest.mark.parametrize(
    ("train", "names"),
    [
        ("attention", {"q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj", "o_proj"}),
        (
            "attention+norms",
            {
                *("q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj", "o_proj", "q_norm", "k_norm"),
                *("input_layernorm", "post_attention_layernorm", "norm"),
            },
        ),
        ("all", None),
    ],
)
def test_what_trains(train: str, names: set[str] | None, tmp_path: Path) -> None:
    student = StudentFolder(own(tmp_path, "exact-rope-qk-norm")).load_student()
    choose_weights(student, train, 4, 0)
    trains = {name.split(".")[-2] for name, p in student.named_parameters() if p.requires_grad}
    everything = {name.split(".")[-2] for name, _ in student.named_parameters()}
    assert trains == (everything if names is None else names)


def test_a_student_does_nothing_at_random(tmp_path: Path) -> None:
    source = open_source(
        str(pico_model(tmp_path / "s", "phi3", tied=False, resid_pdrop=0.5, tokenizer=False))
    )
    layers = [random_layer("decoupled", 20, seed, biases=False) for seed in range(2)]
    write_latent_checkpoint(source, layers.__getitem__, tmp_path / "out", torch.float32)
    store_reference(tmp_path / "out", source, layers.__getitem__, token_ids(), num_greedy=4)
    student = StudentFolder(tmp_path / "out").load_student().train()
    assert torch.equal(logits(student), logits(student))
