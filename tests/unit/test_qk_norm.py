"""QK-norm: the linear map that stands in for it, forms that keep it or cannot, and what is told about it."""
# Shapes: T tokens, D hidden_size, N query heads, G KV heads, X heads, H head_dim.

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from care_mla import console
from care_mla.calibrate.statistics import QkNormSums
from care_mla.checkpoint.opening import open_source
from care_mla.cli.main import main
from care_mla.configs import METHODS, Form
from care_mla.decompose.layer_inputs import LayerInputs, damp
from care_mla.decompose.methods import ROPE_KEYS, Variant, method_function
from care_mla.decompose.qk_norm import AffineMap, LayerQkNorm, NormedMoments, nearest_map
from care_mla.errors import UnsupportedModelError
from care_mla.export import engine_transformers
from care_mla.export.hf import write_latent_checkpoint
from care_mla.export.verify import judge, read_reference, store_reference
from care_mla.factors import LatentLayer
from care_mla.forms import check_form, form_blocker, needs_healing
from care_mla.mla.reference import head_norm
from export_cases import token_ids
from latent_models import exact_layer, load, random_layer
from layer_cases import LayerCase, layer_case

from pico import pico_model, pico_text

EPS = 1e-6


@pytest.fixture(autouse=True)
def _talkative() -> None:
    console.set_quiet(False)


def projected(x_TD: Tensor, source: AffineMap) -> Tensor:
    y_TXH = torch.einsum("td,xhd->txh", x_TD, source.w_XHD)
    return y_TXH if source.b_XH is None else y_TXH + source.b_XH


def normed(x_TD: Tensor, source: AffineMap, norm_1H: Tensor) -> Tensor:
    y_TXH = projected(x_TD, source)
    return norm_1H * y_TXH / (y_TXH.square().mean(-1, keepdim=True) + EPS).sqrt()


def nearest(x_TD: Tensor, y_TXH: Tensor, source: AffineMap, norm_XH: Tensor, damping: float) -> AffineMap:
    """`nearest_map` from tokens in place of their moments."""
    tokens = len(x_TD)
    c_DD = x_TD.T @ x_TD / tokens
    return nearest_map(
        source,
        norm_XH,
        torch.einsum("txh,td->xhd", y_TXH, x_TD) / tokens,
        y_TXH.mean(0),
        c_DD=c_DD,
        damped_c_DD=damp(c_DD, damping),
        mean_D=x_TD.mean(0),
    )


def with_norm(case: LayerCase) -> LayerInputs:
    """The layer of a case as if its queries and keys were normalised head by head."""
    inputs, x_TD = case.inputs, case.x_TD
    q_norm_XH, k_norm_XH = 1 + 0.3 * torch.randn(2, 1, inputs.head_dim, dtype=torch.float64)
    q_TNH = normed(x_TD, AffineMap(inputs.w_q_NHD, inputs.b_q_NH), q_norm_XH)
    k_TGH = normed(x_TD, AffineMap(inputs.w_k_GHD, inputs.b_k_GH), k_norm_XH)
    moments = NormedMoments(
        q_x_NHD=torch.einsum("tnh,td->nhd", q_TNH, x_TD) / len(x_TD),
        k_x_GHD=torch.einsum("tgh,td->ghd", k_TGH, x_TD) / len(x_TD),
        q_NH=q_TNH.mean(0),
        k_GH=k_TGH.mean(0),
        felt_c_DD=2 * inputs.felt_c_DD,
    )
    return replace(inputs, qk_norm=LayerQkNorm(q_norm_XH=q_norm_XH, k_norm_XH=k_norm_XH, moments=moments))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("damping", [0.0, 0.01, 3.0])
def test_the_nearest_map_is_the_weight_itself_without_a_norm(bias: bool, damping: float) -> None:
    case = layer_case(bias=bias)
    source = AffineMap(case.inputs.w_k_GHD, case.inputs.b_k_GH)
    ones_GH = torch.ones(source.w_XHD.shape[:2], dtype=torch.float64)
    found = nearest(case.x_TD, projected(case.x_TD, source), source, ones_GH, damping)
    assert_close(found.w_XHD, source.w_XHD, rtol=1e-8, atol=1e-9)
    assert (found.b_XH is None) == (not bias)
    if bias:
        assert_close(found.b_XH, source.b_XH, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_the_nearest_map_is_a_direct_solution_of_least_squares(bias: bool) -> None:
    case = layer_case(bias=bias)
    source = AffineMap(case.inputs.w_k_GHD, case.inputs.b_k_GH)
    norm_1H = 1 + 0.3 * torch.randn(1, 8, dtype=torch.float64)
    y_TXH = normed(case.x_TD, source, norm_1H)
    found = nearest(case.x_TD, y_TXH, source, norm_1H, 0.0)
    columns_TE = torch.cat([case.x_TD, torch.ones(len(case.x_TD), 1).double()], 1) if bias else case.x_TD
    expected_EO = torch.linalg.lstsq(columns_TE, y_TXH.flatten(1)).solution
    best_TO = columns_TE @ expected_EO
    assert_close(projected(case.x_TD, found).flatten(1), best_TO, rtol=1e-6, atol=1e-6)
    assert (best_TO - y_TXH.flatten(1)).square().mean() > 1e-3  # a norm is no linear map


def test_damping_pulls_the_nearest_map_to_the_source_not_to_zero() -> None:
    case = layer_case(bias=False)
    source = AffineMap(case.inputs.w_k_GHD, None)
    norm_1H = 1 + 0.3 * torch.randn(1, 8, dtype=torch.float64)
    y_TXH = normed(case.x_TD, source, norm_1H)
    far = nearest(case.x_TD, y_TXH, source, norm_1H, 1e9).w_XHD
    plain_TXH = projected(case.x_TD, AffineMap(norm_1H[..., None] * source.w_XHD, None))
    scale_X = (plain_TXH * y_TXH).sum((0, 2)) / plain_TXH.square().sum((0, 2))
    assert_close(far, scale_X[:, None, None] * norm_1H[..., None] * source.w_XHD, rtol=1e-6, atol=1e-9)


def test_a_layer_without_qk_norm_is_itself() -> None:
    inputs = layer_case().inputs
    assert inputs.without_qk_norm is inputs


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_with_qk_norm_gets_both_maps_and_its_own_weights_of_tokens(bias: bool) -> None:
    inputs = with_norm(layer_case(bias=bias))
    linear = inputs.without_qk_norm
    assert linear.qk_norm is None
    assert linear is inputs.without_qk_norm  # solved once
    for name in ("w_q_NHD", "w_k_GHD"):
        assert not torch.allclose(getattr(linear, name), getattr(inputs, name), rtol=0.1)
    assert (linear.b_k_GH is None) == (not bias)
    assert_close(linear.felt_c_DD, 2 * inputs.felt_c_DD)
    assert linear.w_v_GHD is inputs.w_v_GHD
    assert linear.fisher_nope_OO is inputs.fisher_nope_OO


@pytest.mark.parametrize(
    ("form", "method"),
    [(form, method) for form, methods in METHODS.items() for method in methods if form != "exact-rope"],
)
def test_other_forms_factor_the_linear_maps(form: Form, method: str) -> None:
    inputs = with_norm(layer_case())
    fold = 1 if method in ("transmla", "care-u", "care-e", "care-c") else None
    options = {"kv_lora_rank": 12, "qk_rope_head_dim": 8 if form == "decoupled" else 4, "freqfold": fold}
    variant = Variant(form=form, method=method, **options)
    found = method_function(variant)(inputs).cut((12,))
    arguments = {name: options[name] for name in ("qk_rope_head_dim", "freqfold") if options[name]}
    expected = ROPE_KEYS[form][method](inputs.without_qk_norm, **arguments).cut((12,))
    assert found.q_norm_XH is None
    assert found.k_norm_XH is None
    assert found.tensors().keys() == expected.tensors().keys()
    assert all(torch.equal(tensor, expected.tensors()[name]) for name, tensor in found.tensors().items())


@pytest.mark.parametrize("method", METHODS["exact-rope"])
def test_the_exact_form_keeps_the_norms_and_the_projections(method: str) -> None:
    inputs = with_norm(layer_case())
    assert inputs.qk_norm is not None
    variant = Variant(form="exact-rope", method=method, kv_lora_rank=32, qk_rope_head_dim=0)
    decomposition = method_function(variant)(inputs)
    layer = decomposition.cut((16,) * len(decomposition.spectra) if len(decomposition.spectra) > 1 else (32,))
    assert torch.equal(layer.q_norm_XH, inputs.qk_norm.q_norm_XH)
    assert torch.equal(layer.k_norm_XH, inputs.qk_norm.k_norm_XH)
    assert torch.equal(layer.q_rope_NPD, inputs.w_q_NHD)
    keys_GHD = torch.einsum("ghr,rd->ghd", layer.up_k_GMR, layer.down_RD)
    assert_close(keys_GHD, inputs.w_k_GHD, rtol=1e-6, atol=1e-6)  # full rank


def test_the_norm_over_all_heads_is_not_that_over_each() -> None:
    x_BXLH = torch.randn(1, 3, 2, 4, dtype=torch.float64)
    each = head_norm(x_BXLH, torch.ones(4).double(), EPS)
    together = head_norm(x_BXLH, torch.ones(12).double(), EPS)
    assert_close(each.square().mean(-1), torch.ones(1, 3, 2).double(), rtol=0, atol=1e-4)
    assert_close(together.square().mean((1, 3)), torch.ones(1, 2).double(), rtol=0, atol=1e-4)
    assert not torch.allclose(each, together)


def test_two_halves_of_the_sums_merge_into_the_whole() -> None:
    def sums(sequences: slice) -> QkNormSums:
        torch.manual_seed(0)
        x, q, k, grad_k = (torch.randn(4, 5, *shape).double() for shape in ((7,), (4, 2), (2, 2), (2, 2)))
        found = QkNormSums.zeros(
            hidden_size=7, num_heads=4, num_kv_heads=2, head_dim=2, device=torch.device("cpu")
        )
        found.add_normed(x[sequences], q[sequences], k[sequences], grad_k[sequences])
        return found

    whole, merged = sums(slice(None)), QkNormSums.merge([(sums(slice(1)), 1.0), (sums(slice(1, None)), 1.0)])
    assert_close(merged.normed_k_x_GHD, whole.normed_k_x_GHD)
    assert_close(merged.normed_q_NH, whole.normed_q_NH)
    assert_close(merged.normed_key_felt_xx_DD, whole.normed_key_felt_xx_DD)


@pytest.mark.parametrize("qk_norm", ["head", "full"])
def test_a_saved_layer_keeps_its_norms(tmp_path: Path, qk_norm: str) -> None:
    layer = random_layer(f"exact-rope qk-norm {qk_norm}", 8, 0)
    layer.save(tmp_path / "layer.safetensors")
    loaded = LatentLayer.load(tmp_path / "layer.safetensors")
    assert torch.equal(loaded.q_norm_XH, layer.q_norm_XH)
    assert torch.equal(loaded.k_norm_XH, layer.k_norm_XH)


def written(tmp: Path, family: str) -> Path:
    """An exact-rope checkpoint at full rank, with its reference."""
    path = pico_model(tmp / "source", family, tokenizer=False)
    source, model = open_source(str(path)), load(path)
    layers = [exact_layer(model, i).to(dtype=torch.float64) for i in range(2)]
    write_latent_checkpoint(source, layers.__getitem__, tmp / "out", torch.float32)
    store_reference(tmp / "out", source, layers.__getitem__, token_ids(), num_greedy=8)
    return tmp / "out"


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_a_lost_norm_fails_verification(tmp_path: Path, family: str) -> None:
    folder = written(tmp_path, family)
    body = judge(read_reference(folder), *engine_transformers.run(folder))
    assert body["passed"], body["problems"]
    assert body["relative_error"] < 1e-5
    assert abs(body["kl_to_original"]) < 1e-6
    weights = load_file(folder / "model.safetensors")
    for name in ("q_norm", "k_norm"):
        key = f"model.layers.1.self_attn.{name}.weight"
        unweighted = weights | {key: torch.ones_like(weights[key])}
        missing = {each: tensor for each, tensor in weights.items() if each != key}
        for changed, problem in ((unweighted, "relative error"), (missing, f"missing weight: {key}")):
            save_file(changed, folder / "model.safetensors", {"format": "pt"})
            body = judge(read_reference(folder), *engine_transformers.run(folder))
            assert not body["passed"]
            assert any(problem in each for each in body["problems"]), body["problems"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"qk_norm": None}))
    assert not judge(read_reference(folder), *engine_transformers.run(folder))["passed"]


def test_forms_of_each_family(tmp_path: Path) -> None:
    qwen3, olmo2, llama = (
        open_source(str(pico_model(tmp_path / family, family, tokenizer=False))).facts
        for family in ("qwen3", "olmo2", "llama")
    )
    for form in METHODS:
        check_form(qwen3, form)
        check_form(llama, form)
        assert needs_healing(llama, form) == needs_healing(olmo2, form) == []
        assert bool(needs_healing(qwen3, form)) == (form != "exact-rope")
        assert (form_blocker(olmo2, form) is None) == (form == "exact-rope")
    with pytest.raises(UnsupportedModelError, match=r"--form decoupled .*QK-norm.*--form exact-rope"):
        check_form(olmo2, "decoupled")
    # Norms after the blocks alone stop the stock class, whatever happens to queries and keys.
    with pytest.raises(UnsupportedModelError, match="norms come after attention and MLP"):
        check_form(replace(olmo2, qk_norm=None), "decoupled")


@pytest.mark.parametrize("command", ["plan", "convert", "compare"])
def test_the_decoupled_form_of_olmo2_is_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_model(tmp_path / "model", "olmo2")
    before = set(tmp_path.iterdir())
    words = [command, "model", *(["OUT"] if command == "convert" else []), "--form", "decoupled"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "--form decoupled cannot express this olmo2 model" in error
    assert "--form exact-rope" in error
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_inspect_and_plan_tell_beforehand(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_model(tmp_path / "model", family, tied=False)
    assert main(["inspect", "model", "--json", "inspect.json"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    body = json.loads(Path("inspect.json").read_text())
    forms = {row["form"]: row for row in body["forms"]}
    assert forms["exact-rope"] == {
        "form": "exact-rope", "possible": True, "blocked_by": None, "needs_healing": [],
    }  # fmt: skip
    assert "yes, exact but for the rank" in out
    is_qwen3 = family == "qwen3"
    assert body["qk_norm"] == ("head" if is_qwen3 else "full")
    assert forms["decoupled"]["possible"] is is_qwen3
    assert bool(forms["decoupled"]["needs_healing"]) is is_qwen3
    assert ("approximate, needs healing" in out) is is_qwen3
    assert {row["form"] for row in body["ranks"]} == {"decoupled" if is_qwen3 else "exact-rope"}
    stock = [row["possible"] for row in body["profiles"] if row["profile"] == "deepseek-v3"]
    assert stock == [is_qwen3] * 3
    form = "decoupled" if is_qwen3 else "exact-rope"
    assert main(["plan", "model", "--form", form, "--json", "plan.json"]) == 0
    assert ("needs healing: --form decoupled is approximate" in capsys.readouterr().err) is is_qwen3
    assert bool(json.loads(Path("plan.json").read_text())["needs_healing"]) is is_qwen3


def test_conversion_says_what_needs_healing_and_by_how_much(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit 0, though only one width of the RoPE key is possible and nothing had to be chosen."""
    monkeypatch.chdir(tmp_path)
    pico_model(tmp_path / "model", "qwen3")
    Path("text.txt").write_text(pico_text(5000))
    options = "--calibration text.txt --calibration-tokens 1024 --sequence-length 128 --device cpu --quiet"
    words = ["convert", "model", "OUT", *options.split(), "--qk-rope-head-dim", "8", "--json", "out.json"]
    assert main(words) == 0
    error = " ".join(capsys.readouterr().err.split())
    body = json.loads(Path("out.json").read_text())
    assert body["profile"] == "deepseek-v3"
    assert body["verify"]["passed"]
    assert len(body["needs_healing"]) == 1
    assert "QK-norm" in body["needs_healing"][0]
    assert body["held_out_kl"] > 0
    told = f"KL to the original on held-out text is {body['held_out_kl']:.4g} nats per token"
    assert "needs healing: the QK-norm" in error
    assert told in error
    card = Path("OUT", "README.md").read_text()
    assert card.count("needs healing: the QK-norm") == 1
    assert told in card
