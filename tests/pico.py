"""Pico models for the tests: real transformers models, tokenizer and GGUF files, random but not degenerate.

`pico_model` writes a checkpoint folder, `pico_gguf` the same model as a GGUF file, `pico_text` gives text.
"""
# Shapes: S vocabulary, D hidden_size, N query heads, H head_dim, O rows of a projection.

from __future__ import annotations

import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
# Few experts, but more than a token uses.
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True,
    },
}  # fmt: skip
# Wavelengths of 16-wide heads lie in all three regions of the scaling: kept, interpolated, divided.
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
# Of 16-wide heads, YaRN's own table at P = 8 is not every second frequency; at P = 16 it is the source's.
YARN_ROPE: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
}
# The betas that every engine has.
USUAL_YARN: dict[str, Any] = YARN_ROPE | {"beta_fast": 32.0, "beta_slow": 1.0}
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.3, 1.8, 2.5, 4.0, 6.0, 8.0, 9.0],
}
# Phi-3's: three quarters of a 16-wide head, and an amplitude of its own.
PARTIAL_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "attention_factor": 1.3,
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.3, 1.5],
    "long_factor": [1.0, 1.3, 1.8, 2.5, 4.0, 6.0],
}
LINEAR_ROPE: dict[str, Any] = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
ROPES = {"llama3": LLAMA3_ROPE, "yarn": YARN_ROPE, "longrope": LONGROPE, "linear": LINEAR_ROPE}
# Qwen2's tokenizer class would add `<|endoftext|>` beyond the vocabulary if it were not one of ours.
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|endoftext|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|endoftext|>assistant\n' }}{% endif %}"
)


def pico_model(
    folder: Path,
    family: str = "llama",
    *,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    vocab: int = 318,
    tied: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    rope: dict[str, Any] | str | None = None,
    tokenizer: bool = True,
    **config_overrides: Any,
) -> Path:
    """Write a checkpoint folder and return it.

    Args:
        folder: created.
        family: a key of `CLASSES`.
        vocab: pieces of the byte-level BPE, at least 256; `vocab_size` is this plus the two special tokens.
        shards: about how many safetensors files.
        rope: `rope_parameters`, or a name in ROPES; default is plain RoPE with theta 10000.
        tokenizer: whether a tokenizer is saved too.
        **config_overrides: any other key of the configuration, such as `attention_bias=True`.
    """
    config_class, model_class = CLASSES[family]
    options: dict[str, Any] = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab + len(SPECIAL_TOKENS),
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "rope_parameters": dict(
            ROPES[rope] if isinstance(rope, str) else rope or {"rope_type": "default", "rope_theta": 1e4}
        ),
    }
    if family == "mistral":
        options["sliding_window"] = None
    if family == "phi3":
        options["pad_token_id"] = 1  # the default lies beyond the vocabulary
    options |= EXPERTS.get(family, {})
    model = model_class(config_class(**(options | config_overrides)))
    _fill(model, seed)
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=size if shards == 1 else int(1.05 * size / shards))
    if tokenizer:
        pico_tokenizer(vocab).save_pretrained(folder)
    return folder


def _fill(model: torch.nn.Module, seed: int) -> None:
    """Random weights: attention neither uniform nor one-hot, inputs far from isotropic."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.hidden_size
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("embed_tokens.weight"):
                # A scale per dimension gives the activations' second moment a steep spectrum.
                value = 0.25 * noise * torch.exp(0.7 * torch.randn(hidden, generator=generator))
            elif name.endswith(("q_norm.weight", "k_norm.weight")):
                # Attention logits as below; the norm takes out what its projection does to their size.
                value = 1.6 * (1 + 0.2 * noise)
            elif name.endswith("norm.weight"):
                value = 1 + 0.2 * noise
            elif name.endswith(".bias"):
                value = 0.3 * noise
            elif "q_proj" in name or "k_proj" in name:
                # Attention logits have a standard deviation of about 2.5, whatever the width.
                value = 1.6 * noise / hidden**0.5
            elif "qkv_proj" in name:
                value = noise / hidden**0.5
                value[: -model.config.num_key_value_heads * model.config.head_dim] *= 1.6
            elif name.endswith("mlp.gate.weight"):
                # A router that is neither undecided nor always sure.
                value = 2 * noise / hidden**0.5
            else:
                value = noise / parameter.shape[-1] ** 0.5
            parameter.copy_(value)


@lru_cache
def _tokenizer_json(vocab: int) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab + len(SPECIAL_TOKENS),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([pico_text(4000)], trainer)
    return tokenizer.to_str()


def pico_tokenizer(vocab: int = 318) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on our own text; digits are split, as in llama.cpp's `smollm`."""
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(vocab)),
        bos_token=SPECIAL_TOKENS[0],
        eos_token=SPECIAL_TOKENS[1],
        pad_token=SPECIAL_TOKENS[1],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _words(text: str) -> list[str]:
    return text.split()


DETERMINERS = _words("the a this every some another no each that one")
ADJECTIVES = _words(
    "old small bright quiet heavy green distant careful broken patient northern empty warm early"
)
NOUNS = _words(
    "river teacher engine village letter harbour window forest student machine garden story mountain number "
    "captain kitchen signal bridge winter painter market library question island"
)
VERBS = _words(
    "found carried watched repaired painted crossed remembered followed opened measured counted answered "
    "left described built moved"
)
ADVERBS = _words("slowly often never quickly again together almost carefully")
PREPOSITIONS = _words("near under beyond with behind before without across")
CONNECTIVES = _words("and but because while so although")


def pico_text(tokens: int, seed: int = 0) -> str:
    """English-like text of at least `tokens` words, hence as many tokens; the same for the same seed."""
    rng = random.Random(seed)
    topic = rng.sample(NOUNS, 6)
    words: list[str] = []

    def phrase() -> list[str]:
        # A slowly changing topic makes what came before useful for what comes next.
        noun = rng.choice(topic) if rng.random() < 0.7 else rng.choice(NOUNS)
        adjective = [rng.choice(ADJECTIVES)] if rng.random() < 0.5 else []
        return [rng.choice(DETERMINERS), *adjective, noun]

    def clause() -> list[str]:
        tail = [rng.choice(PREPOSITIONS), *phrase()] if rng.random() < 0.5 else [rng.choice(ADVERBS)]
        return [*phrase(), rng.choice(VERBS), *phrase(), *tail]

    while len(words) < tokens:
        sentence = clause()
        if rng.random() < 0.4:
            sentence += [rng.choice(CONNECTIVES), *clause()]
        if rng.random() < 0.15:
            sentence += ["in", str(rng.randint(1000, 2030))]
        sentence[0] = sentence[0].capitalize()
        sentence[-1] += rng.choice([".", ".", ".", "!", "?"]) + ("\n\n" if rng.random() < 0.1 else "")
        words += sentence
        if rng.random() < 0.1:
            topic[rng.randrange(6)] = rng.choice(NOUNS)
    return " ".join(words).replace("\n\n ", "\n\n")


GGUF_NAMES: dict[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def interleave_rows(w_OD: Tensor, num_heads: int) -> Tensor:
    """Rows (i, i + H/2) of each head become neighbours (2i, 2i + 1), ggml's layout for llama."""
    head_dim = w_OD.shape[0] // num_heads
    half = head_dim // 2
    order = [
        head * head_dim + start + i for head in range(num_heads) for i in range(half) for start in (0, half)
    ]
    return w_OD[order]


def pico_gguf(folder: Path, *, quantization: str = "f32") -> Path:
    """Write the model in `folder` as a GGUF file beside it (`NAME.gguf`) and return its path.

    Args:
        folder: a folder that `pico_model` wrote as one shard, with its tokenizer.
        quantization: of the matrices: `f32`, `f16`, `bf16`, `q8_0` or `q4_1` (rows must be multiples of 32).
    """
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    architecture = "qwen2" if config["model_type"] == "qwen2" else "llama"
    path = folder.with_name(folder.name + ".gguf")
    writer = gguf.GGUFWriter(path, architecture)
    _gguf_metadata(writer, config, json.loads((folder / "tokenizer.json").read_text()))
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    kind = gguf.GGMLQuantizationType[quantization.upper()]
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, suffix = name.rsplit(".", 1)
        module = stem.rsplit(".", 1)[-1]
        if architecture == "llama" and module in heads:
            tensor = interleave_rows(tensor, heads[module])
        prefix = ""
        if stem.startswith("model.layers."):
            _, _, layer_idx, stem = stem.split(".", 3)
            prefix = f"blk.{layer_idx}."
        array = tensor.float().numpy()
        if array.ndim == 1 or kind is gguf.GGMLQuantizationType.F32:
            writer.add_tensor(f"{prefix}{GGUF_NAMES[stem]}.{suffix}", array)
        else:
            packed = gguf.quants.quantize(array, kind)
            writer.add_tensor(f"{prefix}{GGUF_NAMES[stem]}.{suffix}", packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _gguf_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    writer.add_name("pico")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(np.float32(config["rms_norm_eps"]).item())
    writer.add_vocab_size(config["vocab_size"])
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = sorted(vocabulary, key=vocabulary.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([3 if piece in special else 1 for piece in pieces])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["model"]["merges"]] or ["Ġ t"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
