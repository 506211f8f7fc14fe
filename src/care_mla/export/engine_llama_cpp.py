"""What runs in a process of its own, without care_mla, to see what llama.cpp makes of a GGUF file.

    python -P engine_llama_cpp.py run MODEL.gguf REFERENCE RESULT
    python -P engine_llama_cpp.py quantize SOURCE.gguf RESULT.gguf TYPE

The first reads the file and the reference beside it, and writes one safetensors file: logits, greedy tokens,
and in its metadata what llama.cpp said about its cache. A crash of llama.cpp ends this process alone.
"""
# Shapes: B sequences, L positions, S vocabulary, T greedy steps.

from __future__ import annotations

import ctypes
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.modules["care_mla"] = None  # type: ignore[assignment]

import llama_cpp
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

METADATA_KEY = "care_reference"
# The cache is reported in MiB with two decimals; this large, they tell a single value per token.
CACHE_BYTES = 16 * 2**20
CACHE_LINE = re.compile(
    r"size = +[\d.]+ MiB \( *(\d+) cells, +(\d+) layers.*K \(f32\): +([\d.]+) MiB, V \(f32\): +([\d.]+) MiB"
)
GGML_TYPE_F32, GGML_TYPE_BF16 = 0, 30
FILE_TYPES = {
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


class Log:
    """Everything that llama.cpp says, kept instead of printed."""

    def __init__(self) -> None:
        self.text = ""
        self._callback = llama_cpp.llama_log_callback(self._take)
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _take(self, level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        self.text += text.decode("utf-8", "replace")


class Model:
    """A GGUF file on the CPU, with a float32 cache and without flash attention, which rounds to float16.

    Args:
        path: the file.
        num_cells: positions of the cache.
        num_batch: most positions that are given at once.
    """

    def __init__(self, path: Path, num_cells: int, num_batch: int) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), options)
        if not self.model:
            raise SystemExit("llama.cpp cannot load the file")
        vocabulary: Any = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary = vocabulary
        self.num_words = int(llama_cpp.llama_vocab_n_tokens(self.vocabulary))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = num_cells, num_batch, min(num_batch, 512)
        options.type_k = options.type_v = GGML_TYPE_F32
        options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context: Any = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise SystemExit("llama.cpp cannot make a context")
        self.batch = llama_cpp.llama_batch_init(num_batch, 0, 1)
        self.position = 0

    def clear(self) -> None:
        """Forget all positions."""
        memory: Any = llama_cpp.llama_get_memory(self.context)
        llama_cpp.llama_memory_clear(memory, True)
        self.position = 0

    def logits(self, tokens_L: Sequence[int]) -> np.ndarray:
        """Logits (L, S) of tokens that follow those given before."""
        self.batch.n_tokens = len(tokens_L)
        for i, token in enumerate(tokens_L):
            self.batch.token[i] = int(token)
            self.batch.pos[i] = self.position + i
            self.batch.n_seq_id[i] = 1
            self.batch.seq_id[i][0] = 0
            self.batch.logits[i] = True
        self.position += len(tokens_L)
        if llama_cpp.llama_decode(self.context, self.batch) != 0:
            raise SystemExit("llama.cpp cannot run the tokens")
        rows = [llama_cpp.llama_get_logits_ith(self.context, i) for i in range(len(tokens_L))]
        return np.stack([np.ctypeslib.as_array(row, shape=(self.num_words,)).copy() for row in rows])

    def greedy(self, prompt_L: Sequence[int], steps: int) -> np.ndarray:
        """Go on from a prompt with the most probable token: (T,)."""
        self.clear()
        tokens, chosen = list(prompt_L), []
        for _ in range(steps):
            chosen.append(int(self.logits(tokens)[-1].argmax()))
            tokens = chosen[-1:]
        return np.array(chosen, dtype=np.int64)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, with BOS and EOS where the file says so; special tokens are not looked for."""
        raw = text.encode()
        ids = (llama_cpp.llama_token * (len(raw) + 8))()
        count = llama_cpp.llama_tokenize(self.vocabulary, raw, len(raw), ids, len(ids), True, False)
        return list(ids[:count])


def run(path: Path, reference: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Load a file as a user would, and run the stored tokens through it.

    Returns:
        `logits_BLS` and `greedy_T`; and the architecture, values per token that the cache holds in each
        layer, and what is wrong with cache or tokenizer.
    """
    log = Log()
    with safe_open(reference, "np") as file:
        stored = json.loads(file.metadata()[METADATA_KEY])
        tokens_BL, steps = file.get_tensor("tokens_BL"), len(file.get_tensor("greedy_T"))
    cached = stored["cached_values"]
    num_cells = max(CACHE_BYTES // (4 * sum(cached)), tokens_BL.shape[1] + steps)
    model = Model(path, -(-num_cells // 256) * 256, tokens_BL.shape[1])
    rows = []
    for tokens_L in tokens_BL:
        model.clear()
        rows.append(model.logits(tokens_L))
    greedy_T = model.greedy(tokens_BL[0], steps)
    values, problems = cached_values(log.text)
    if (probe := stored.get("probe")) is not None:
        found = model.tokenize(probe["text"])
        if found != probe["ids"]:
            place = next((i for i, (a, b) in enumerate(zip(found, probe["ids"])) if a != b), "the end")  # noqa: B905
            problems.append(f"llama.cpp has other token ids than transformers, from number {place} on")
    return {"logits_BLS": np.stack(rows), "greedy_T": greedy_T}, {
        "class": "deepseek2",
        "cached_values": values,
        "problems": problems,
    }


def cached_values(log: str) -> tuple[list[int], list[str]]:
    """Values per token in each layer of the cache, as llama.cpp's log says, and what is wrong with it."""
    found = CACHE_LINE.findall(log)
    if len(found) != 1:
        return [], ["llama.cpp's log does not say how large its cache is"]
    cells, layers, keys, values = found[0]
    per_token = float(keys) * 2**20 / 4 / int(cells) / int(layers)
    problems = [] if float(values) == 0 else [f"the cache has a part for values ({values} MiB)"]
    return [round(per_token)] * int(layers), problems


def quantize(source: Path, output: Path, name: str) -> None:
    """Write a file again with quantised weights, by llama.cpp's own quantiser.

    The latent's down-projection stays bfloat16: it decides every key and value, and takes 1 % of the file.
    """
    log = Log()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = FILE_TYPES[name]
    overrides = (llama_cpp.llama_model_tensor_override * 2)()
    overrides[0].pattern, overrides[0].type = b"attn_kv_a_mqa", GGML_TYPE_BF16
    options.tt_overrides = ctypes.cast(overrides, type(options.tt_overrides))
    failed = llama_cpp.llama_model_quantize(
        str(source).encode(), str(output).encode(), ctypes.pointer(options)
    )
    if failed:
        raise SystemExit(f"llama.cpp cannot quantise the file: {log.text.strip().splitlines()[-1:]}")


if __name__ == "__main__":
    task, *words = sys.argv[1:]
    if task == "quantize":
        quantize(Path(words[0]), Path(words[1]), words[2])
    else:
        tensors, metadata = run(Path(words[0]), Path(words[1]))
        save_file(tensors, words[2], metadata={METADATA_KEY: json.dumps(metadata)})
