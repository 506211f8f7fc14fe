"""A source model in a GGUF file, under transformers' names and layout; quantised weights come out as float32.

Reads the file through a memory map. The dequantised model is "the original" in every comparison.
"""
# Shapes: N heads of a projection (query or KV), H head_dim, F H/2, D hidden_size, O rows (N*H).

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import torch
from torch import Tensor

from care_mla.checkpoint.fingerprint import file_digest
from care_mla.checkpoint.source import Source, TensorHeader
from care_mla.errors import CheckpointError, UnsupportedModelError
from care_mla.families import facts_from_config
from care_mla.families.rope import llama3_frequency
from care_mla.workspace import fingerprint, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}
# Only llama's converter reorders the rows of queries and keys for ggml's interleaved RoPE.
INTERLEAVED = ("llama",)
MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
# Llama 3.1 and 3.2: GGUF keeps the resulting factors alone, these are the only published parameters.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class GgufSource(Source):
    """A GGUF file. Its metadata is parsed on opening; weights are dequantised when asked for.

    Args:
        name: as the user typed it.
        path: the file.
    """

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: truncated, corrupt or no GGUF file ({error}). Nothing in it can be trusted. "
                "Download it again."
            ) from error
        self.stored = {tensor.name: tensor for tensor in self.reader.tensors}
        self.facts = facts_from_config(self._config())

    def metadata(self, key: str, default: Any = None) -> Any:
        """A value of the file's metadata; arrays come as lists."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def _config(self) -> dict[str, Any]:
        """The metadata as the `config.json` that the model would have in transformers."""
        architecture = self.metadata("general.architecture")
        if architecture not in ARCHITECTURES:
            raise UnsupportedModelError(
                f"{self.path}: GGUF architecture {architecture!r} cannot be converted. Supported in GGUF "
                f"files: {', '.join(ARCHITECTURES)}. Use the model's safetensors folder if its family is "
                "supported."
            )

        def get(key: str, default: Any = None) -> Any:
            value = self.metadata(f"{architecture}.{key}", default)
            # The file holds float32; its shortest decimal is what was meant (1e-05, not 9.99999975e-06).
            return float(str(np.float32(value))) if isinstance(value, float) else value

        heads, hidden = get("attention.head_count"), get("embedding_length")
        if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
            raise UnsupportedModelError(
                f"{self.path}: {architecture}.attention.head_count is {heads!r} and "
                f"{architecture}.embedding_length is {hidden!r}; one number each is needed, the same for all "
                "layers."
            )
        head_dim = get("attention.key_length", hidden // heads)
        self._refuse(get, architecture, head_dim)
        embedding = self.stored.get("token_embd.weight")
        config: dict[str, Any] = {
            "architectures": [ARCHITECTURES[architecture]],
            "model_type": architecture,
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": int(embedding.shape[-1]) if embedding is not None else get("vocab_size"),
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope(get("rope.freq_base", 10000.0), head_dim),
            "tie_word_embeddings": "output.weight" not in self.stored,
            "dtype": "float32",
        }
        if architecture == "llama":
            config["attention_bias"] = any(name.endswith("attn_q.bias") for name in self.stored)
            config["mlp_bias"] = any(name.endswith("ffn_gate.bias") for name in self.stored)
        for key, name in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            config[f"{key}_token_id"] = self.metadata(f"tokenizer.ggml.{name}_token_id")
        return config

    def _refuse(self, get: Any, architecture: str, head_dim: int) -> None:
        """Refuse what llama.cpp would compute differently from the plain transformers class."""
        features = {
            f"it is one of {self.metadata('split.count')} split files; join them with llama-gguf-split "
            "--merge": ((self.metadata("split.count") or 1) > 1),
            "it is a mixture of experts (expert_count)": bool(get("expert_count")),
            f"its RoPE is scaled ({get('rope.scaling.type')})": get("rope.scaling.type")
            not in (None, "none"),
            f"it rotates {get('rope.dimension_count')} of {head_dim} dimensions of each head": (
                get("rope.dimension_count", head_dim) != head_dim
            ),
            "its values are not as wide as its keys": get("attention.value_length", head_dim) != head_dim,
            "it scales logits (logit_scale)": get("logit_scale") not in (None, 0, 1),
            "it scales residuals (residual_scale)": get("residual_scale") not in (None, 0, 1),
            "it scales embeddings (embedding_scale)": get("embedding_scale") not in (None, 0, 1),
            "its attention has its own scale (attention.scale)": get("attention.scale") not in (None, 0),
        }
        if reasons := [reason for reason, found in features.items() if found]:
            raise UnsupportedModelError(
                f"{self.path} ({architecture}): {'; '.join(reasons)}. Nothing was written. Use the model's "
                "safetensors folder, or another model."
            )

    def _rope(self, theta: float, head_dim: int) -> dict[str, Any]:
        """`rope_parameters`; frequency factors in the file are accepted if llama3's formula gives them."""
        factors_F = self.stored.get(ROPE_FREQS)
        if factors_F is None:
            return {"rope_type": "default", "rope_theta": theta}
        found_F = np.asarray(factors_F.data, dtype=np.float64)
        parameters = {"rope_type": "llama3", "rope_theta": theta, "factor": float(found_F.max()), **LLAMA3}
        angles_F = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
        expected_F = np.array([angle / llama3_frequency(angle, parameters) for angle in angles_F])
        if found_F.shape != expected_F.shape or not np.allclose(found_F, expected_F, rtol=1e-5, atol=0):
            raise UnsupportedModelError(
                f"{self.path}: {ROPE_FREQS} holds frequency factors that are not Llama 3.1's, and "
                "config.json has no other way to say them. Use the model's safetensors folder."
            )
        return parameters

    @cached_property
    def _gguf_names(self) -> dict[str, str]:
        """Transformers names to names in the file; unknown ones stay as they are, for `check` to refuse."""
        names = {}
        for stored in self.stored:
            if stored == ROPE_FREQS:
                continue
            module, _, suffix = stored.rpartition(".")
            prefix = ""
            if module.startswith("blk."):
                _, layer_idx, module = module.split(".", 2)
                prefix = f"model.layers.{layer_idx}."
            names[f"{prefix}{MODULES[module]}.{suffix}" if module in MODULES else stored] = stored
        return names

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        headers = {}
        for name, stored in self._gguf_names.items():
            tensor = self.stored[stored]
            shape = tuple(int(size) for size in reversed(tensor.shape))
            headers[name] = TensorHeader(shape, torch.float32)
        return headers

    def check(self) -> None:
        super().check()
        for kind in {tensor.tensor_type for tensor in self.stored.values()}:
            _, type_size = gguf.GGML_QUANT_SIZES[kind]
            try:
                gguf.quants.dequantize(np.zeros((1, type_size), dtype=np.uint8), kind)
            except NotImplementedError as error:
                raise UnsupportedModelError(
                    f"{self.path}: weights quantised as {kind.name} cannot be read. Use the model's "
                    "safetensors folder, or a GGUF file in F16 or Q8_0."
                ) from error

    def _read(self, name: str) -> Tensor:
        tensor = self.stored[self._gguf_names[name]]
        # A copy, because the memory map is read-only and float32 tensors would share it.
        w_OD = torch.from_numpy(
            np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        )
        heads = {
            "q_proj": self.facts.num_attention_heads,
            "k_proj": self.facts.num_key_value_heads,
        }.get(name.split(".")[-2] if "." in name else "")
        if heads is None or self.metadata("general.architecture") not in INTERLEAVED:
            return w_OD
        return deinterleave(w_OD, heads)

    def fingerprint(self) -> str:
        regions = [(int(t.data_offset), int(t.data_offset + t.n_bytes)) for t in self.stored.values()]
        return fingerprint({"gguf": file_digest(self.path, int(self.reader.data_offset), regions)})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        from care_mla.checkpoint.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.name, self.metadata, self.facts.max_position_embeddings)

    def save_side_files(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if self.metadata("tokenizer.ggml.model") is not None:
            self.tokenizer().save_pretrained(folder)
            # The class's own name is known to transformers 5 only; this older one to every version.
            path = folder / "tokenizer_config.json"
            settings = json.loads(path.read_text(encoding="utf-8"))
            write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
        self._save_generation_config(folder)


def deinterleave(w_OD: Tensor, num_heads: int) -> Tensor:
    """Undo ggml's row order: the neighbours (2i, 2i + 1) of each head become the pair (i, i + H/2)."""
    w_NF2 = w_OD.unflatten(0, (num_heads, -1, 2))
    return w_NF2.transpose(1, 2).flatten(0, 2).contiguous()
