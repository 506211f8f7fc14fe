"""RoPE tables of the decoupled form: what engines read alike, plain tables for scaled sources, the choice."""
# Shapes: see care_mla/decompose/rope_blocks.py.

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    yarn_apply_mscale,
)

from care_mla.configs import PlanConfig, Profile
from care_mla.decompose.decouple import as_complex, decouple
from care_mla.decompose.methods import Variant, decoupled_variants, variants
from care_mla.decompose.rope_blocks import rope_blocks
from care_mla.engines import is_read_alike
from care_mla.errors import OptionError
from care_mla.facts import ModelFacts
from care_mla.families import facts_from_config, rotary_frequencies
from care_mla.families.effects import check_effects
from care_mla.families.rope import rope_amplitude
from care_mla.families.rope_table import has_choice, written_rope
from care_mla.mla.choose import PLAIN_FACTOR, Choice, _best
from care_mla.profiles import as_converted, check_profile, engine_verdicts, profile_blocker
from layer_cases import layer_case

from pico import LLAMA3_ROPE, ROPES, USUAL_YARN, YARN_ROPE


def facts_of(rope: dict, **change: object) -> ModelFacts:
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 320,
        "max_position_embeddings": 1024, "rope_parameters": rope,
    }  # fmt: skip
    return facts_from_config(config | change)


@pytest.mark.parametrize("width", [16, 8, 4])
@pytest.mark.parametrize("name", ROPES)
def test_deepseeks_class_makes_the_sources_table(name: str, width: int) -> None:
    facts = facts_of(ROPES[name])
    expected = rotary_frequencies(facts)[:: 16 // width]
    rope = written_rope(facts, expected)
    assert rope is not None
    config = DeepseekV3Config(
        qk_rope_head_dim=width, max_position_embeddings=1024, rope_parameters=dict(rope.parameters)
    )
    rotary = DeepseekV3RotaryEmbedding(config)
    assert_close(rotary.inv_freq, torch.tensor(expected), rtol=1e-6, atol=0)
    logits = rotary.attention_scaling**2 * yarn_apply_mscale(config.rope_parameters, 1.0)
    assert logits * rope.query_scale == pytest.approx(rope_amplitude(facts) ** 2)


def test_yarn_is_read_alike_where_its_ramp_divides() -> None:
    facts = facts_of(YARN_ROPE)
    own, other = (written_rope(facts, rotary_frequencies(facts)[::fold]) for fold in (1, 2))
    assert own is not None
    assert other is not None
    assert own.parameters["rope_type"] == "yarn"
    assert not is_read_alike(own.parameters)  # llama.cpp does not read the betas of DeepSeek models
    usual = written_rope(facts_of(USUAL_YARN), rotary_frequencies(facts_of(USUAL_YARN)))
    assert usual is not None
    assert is_read_alike(usual.parameters)
    assert other.parameters["rope_type"] == "longrope"
    assert not is_read_alike(other.parameters)
    # A ramp between whole numbers is transformers' alone.
    assert not is_read_alike(usual.parameters | {"truncate": False})
    found = engine_verdicts(facts_of(YARN_ROPE, tie_word_embeddings=False), "deepseek-v3")
    assert [name for name, said in found.items() if said is not True] == ["llama.cpp"]
    assert "beta_fast 16 and beta_slow 2" in str(found["llama.cpp"])


def test_engines_that_leave_something_out_say_what() -> None:
    plain = facts_of({"rope_type": "default"}, tie_word_embeddings=False)
    assert set(engine_verdicts(plain, "deepseek-v3").values()) == {True}
    biased = engine_verdicts(replace(plain, q_bias=True), "deepseek-v3")
    assert biased["transformers"] is True
    assert all("biases" in str(biased[name]) for name in ("vllm", "sglang", "llama.cpp"))
    scaled = engine_verdicts(facts_of(LLAMA3_ROPE, tie_word_embeddings=False), "deepseek-v3")
    assert all("llama3" in str(scaled[name]) for name in ("vllm", "sglang", "llama.cpp"))
    own = engine_verdicts(plain, "care")
    assert own.pop("llama.cpp") is True  # by way of `care export`
    assert own.pop("transformers") is True
    assert all("our own class" in str(said) for said in own.values())


@pytest.mark.parametrize("profile", ["deepseek-v3", "mistral4", "vllm"])
def test_profiles_are_judged_by_what_the_options_leave(profile: Profile) -> None:
    change = {"tie_word_embeddings": False, "attention_bias": True, "head_dim": 64}
    if profile == "mistral4":
        change |= {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    facts = replace(facts_of(LLAMA3_ROPE, **change), q_bias=True, o_bias=False)
    plain = PlanConfig(model="", profile=profile, rope_table="plain", biases="absorb")
    check_profile(as_converted(facts, plain), profile)
    for left in (replace(plain, rope_table="scaled"), replace(plain, biases="keep")):
        blocker = profile_blocker(as_converted(facts, left), profile, engine="llama.cpp")
        assert re.search("llama3|biases|Mistral 4", str(blocker))
    # vLLM's own class reads no other table, so that there `auto` is plain.
    auto = as_converted(facts, replace(plain, rope_table="auto"))
    assert (auto.rope_type == "default") == (profile == "vllm")


def test_longrope_has_the_table_of_its_short_context() -> None:
    rope = ROPES["longrope"]
    facts = facts_of(rope)
    assert facts.max_position_embeddings == 256
    assert facts.config["max_position_embeddings"] == 256
    one_table = facts_of(rope | {"long_factor": rope["short_factor"]})
    assert one_table.max_position_embeddings == 1024
    # Its amplitude follows from the ratio of the two lengths, which must outlive the shorter one.
    derived = facts_of({key: value for key, value in rope.items() if key != "factor"})
    assert rope_amplitude(derived) == pytest.approx(rope_amplitude(facts))
    assert rope_amplitude(facts) == pytest.approx((1 + torch.tensor(4.0).log() / 5.545177) ** 0.5)


def test_scaled_frequencies_go_to_the_nearest_plain_angle() -> None:
    case = layer_case(head_dim=16)
    facts = facts_of(LLAMA3_ROPE)
    scaled_F = torch.tensor(rotary_frequencies(facts), dtype=torch.float64)
    unscaled_F = torch.tensor([True, True, True, False, False, False, False, False])
    inputs = replace(case.inputs, inv_freq_F=scaled_F, unscaled_F=unscaled_F)
    blocks = rope_blocks(inputs, 8, plain_table=True)
    assert_close(blocks.inv_freq_B, 1e4 ** (-torch.arange(8).double() / 8))
    place = dict.fromkeys(range(8))
    for block, (members_K, held_K) in enumerate(zip(blocks.members_BK, blocks.held_BK, strict=True)):
        place |= dict.fromkeys(members_K[held_K].tolist(), block)
    for f, block in place.items():
        distance_B = (blocks.inv_freq_B.log() - scaled_F[f].log()).abs()
        nearest = int(distance_B.argmin())
        within = distance_B[nearest] <= torch.tensor(1e4).log() / 16
        assert block == (nearest if within else None), f
    assert place[7] is None  # 8 times slower than the slowest plain angle
    split = decouple(inputs, 16, plain_table=True)
    assert_close(as_complex(split.nope_GMD, dim=1)[:, 7], as_complex(inputs.w_k_GHD, dim=1)[:, 7])
    assert_close(split.inv_freq_F, blocks.inv_freq_B)


def test_blocks_put_back_what_they_take() -> None:
    inputs = layer_case(head_dim=16).inputs
    for num_blocks in (8, 4, 2):
        blocks = rope_blocks(inputs, num_blocks)
        x_GF = torch.randn(2, 8, dtype=torch.float64)
        assert_close(blocks.unstack(blocks.stack(x_GF), x_GF), x_GF)
        assert blocks.stack(x_GF).shape == (num_blocks, 2 * 8 // num_blocks)
        assert_close(blocks.inv_freq_B, inputs.inv_freq_F[:: 8 // num_blocks])


def tables(facts: ModelFacts, *, for_engines: bool = True, **options: str) -> list[str | None]:
    config = PlanConfig(model="", qk_rope_head_dim=16, kv_lora_rank=16, **options)
    found = variants(facts, config, form="decoupled", method=config.method)
    return [v.rope_table for v in decoupled_variants(found, facts, config, for_engines=for_engines)]


def test_tables_to_choose_between() -> None:
    llama3 = facts_of(LLAMA3_ROPE)
    assert tables(llama3) == ["plain", "scaled"]
    assert tables(llama3, rope_table="plain") == ["plain"]
    assert tables(llama3, rope_table="scaled") == ["scaled"]
    assert tables(llama3, for_engines=False) == [None]
    assert set(tables(llama3, method="transmla")) == {None}
    assert tables(facts_of(USUAL_YARN)) == ["scaled"]
    assert tables(facts_of(YARN_ROPE)) == ["plain", "scaled"]
    assert tables(facts_of({"rope_type": "default"})) == [None]
    assert not has_choice(facts_of({"rope_type": "default"}))
    # Kept biases leave transformers alone to run it, so that a plain table would gain nothing.
    assert tables(facts_of(LLAMA3_ROPE, architectures=["Qwen2ForCausalLM"])) == [None]
    assert tables(facts_of(LLAMA3_ROPE, architectures=["Qwen2ForCausalLM"]), biases="absorb") == [
        "plain",
        "scaled",
    ]


def test_plain_table_is_taken_up_to_a_stated_factor() -> None:
    variant = Variant(form="decoupled", method="fisher", kv_lora_rank=16, qk_rope_head_dim=16)
    plain, scaled = (
        Choice(variant=replace(variant, rope_table=table), allocation="uniform", ranks=((16,),))
        for table in ("plain", "scaled")
    )
    for ratio, expected in ((0.99 * PLAIN_FACTOR, plain), (1.01 * PLAIN_FACTOR, scaled)):
        kl = {plain.label: 0.2 * ratio, scaled.label: 0.2}
        chosen = _best([plain, scaled], [plain, scaled], kl)
        assert chosen == expected
        assert chosen.table_kl == {"plain": 0.2 * ratio, "scaled": 0.2}
        assert chosen.held_out_kl == kl[expected.label]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_table": "plain", "form": "exact-rope"}, "no effect with --form exact-rope"),
        ({"biases": "absorb", "form": "partial-rope", "method": "mha2mla-joint"}, "--biases absorb has no"),
        ({"rope_table": "plain", "method": "transmla"}, "transmla.*--method fisher"),
        ({"rope_table": "other"}, "'other' is unknown.*auto, scaled, plain"),
        ({"biases": "drop"}, "'drop' is unknown.*keep, absorb"),
    ],
)
def test_options_that_do_nothing(options: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        PlanConfig(model="", **options)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"rope_table": "scaled"}, "--rope-table scaled has no effect.*plain already"),
        ({}, {"biases": "absorb"}, "--biases absorb has no effect"),
        ({"attention_bias": True}, {"biases": "absorb"}, "bias on o_proj"),
    ],
)
def test_options_that_do_nothing_to_this_model(change: dict, options: dict, message: str) -> None:
    facts = facts_of({"rope_type": "default"}, **change)
    with pytest.raises(OptionError, match=message):
        check_effects(facts, PlanConfig(model=str(Path("m")), **options))
