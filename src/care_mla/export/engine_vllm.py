"""What runs in a process of its own, in the environment that has vLLM, to see what vLLM makes of a folder.

Reads the folder and the reference inside; writes one safetensors file: logits, greedy tokens, and in its
metadata the cache that vLLM lays out. Run as a script: python -I engine_vllm.py FOLDER RESULT [MODEL_IMPL].
Imports nothing of care_mla, which need not be installed there.
"""
# Shapes: B sequences, L positions, S vocabulary, T greedy steps.

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# As in engine_transformers.py, which this environment cannot import.
REFERENCE = Path("care_reference") / "reference.safetensors"
METADATA_KEY = "care_reference"
# The oldest version that was run. Older ones cannot read transformers 5's rope_parameters.
OLDEST = (0, 32)
# Exit code of the script where vLLM cannot be asked, with the reason as the last line of its output.
NO_ENGINE = 4

# Before vLLM is imported: the model in this process, and the little cache that the check needs.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def engine_problem() -> str | None:
    """Why this Python cannot run the check; None where it can."""
    try:
        import vllm
    except ImportError as error:
        return f"{sys.executable} has no vLLM ({error})"
    version = vllm.__version__
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        return f"vLLM {version} is older than {'.'.join(map(str, OLDEST))}"
    return None


def size_problem(folder: Path) -> str | None:
    """Why this vLLM has no kernel for the folder's cache; None where it has one."""
    from vllm.platforms import current_platform

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    size = config.get("kv_lora_rank"), config.get("qk_rope_head_dim")
    if not current_platform.is_cpu() or size == (512, 64):
        return None
    return (
        "vLLM's CPU build takes kv_lora_rank 512 with qk_rope_head_dim 64 only, and here they are "
        f"{size[0]} and {size[1]}"
    )


def run(folder: Path, model_impl: str = "auto") -> tuple[dict[str, Any], dict[str, Any]]:
    """Load a folder as vLLM's users do, and run the stored tokens through it.

    On a CPU in float32; on a GPU, whose MLA kernels know 16 bits only, in bfloat16.

    Args:
        model_impl: vLLM's own class (`vllm`), the one of transformers (`transformers`), or vLLM's choice.

    Returns:
        `logits_BLS` and `greedy_T`; and the class, what is cached per token in each layer, the kind of cache,
        the dtype, whether vLLM says that it uses MLA, versions, and what is wrong.
    """
    import torch
    from safetensors import safe_open
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    with safe_open(folder / REFERENCE, "pt") as file:
        stored = json.loads(file.metadata()[METADATA_KEY])
        tokens_BL, reference_BLS = file.get_tensor("tokens_BL"), file.get_tensor("reference_BLS")
        steps = len(file.get_tensor("greedy_T"))
    assert not stored["is_slice"], "vLLM runs whole models"
    is_cpu = current_platform.is_cpu()
    options: dict[str, Any] = {}
    if is_cpu:
        # The rotary kernel of CPU builds gives wrong queries for MLA; vLLM's PyTorch code gives right ones.
        options["compilation_config"] = {"custom_ops": ["none"]}
    engine = LLM(
        model=str(folder),
        dtype="float32" if is_cpu else "bfloat16",
        model_impl=model_impl,
        max_model_len=tokens_BL.shape[1] + steps + 1,
        max_logprobs=-1,
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **options,
    )
    every = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, prompt_logprobs=-1, detokenize=False)
    prompts = [{"prompt_token_ids": row} for row in tokens_BL.tolist()]
    outputs = engine.generate(prompts, every, use_tqdm=False)
    log_probs_BLS = torch.stack([_log_probs(output, reference_BLS.shape[-1]) for output in outputs])
    go_on = SamplingParams(temperature=0, max_tokens=steps, ignore_eos=True, detokenize=False)
    (greedy,) = engine.generate(prompts[:1], go_on, use_tqdm=False)
    config = engine.llm_engine.model_config
    specs = [spec for worker in engine.collective_rpc("get_kv_cache_spec") for spec in worker.values()]
    problems = [] if config.use_mla else ["vLLM does not use MLA for this model"]
    # vLLM gives log probabilities; softmax drops the constant that is missing, so the reference's is as good.
    return {
        "logits_BLS": log_probs_BLS + reference_BLS.logsumexp(-1, keepdim=True),
        "greedy_T": torch.tensor(greedy.outputs[0].token_ids),
    }, {
        "class": engine.apply_model(_class_name)[0],
        "cached_values": [_cached_values(spec) for spec in specs],
        "problems": problems,
        "dtype": str(config.dtype).removeprefix("torch."),
        "uses_mla": bool(config.use_mla),
        "cache": sorted({type(spec).__name__ for spec in specs}),
        "versions": _versions(),
    }


def _versions() -> dict[str, str]:
    import torch
    import transformers
    import vllm

    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _class_name(model: Any) -> str:
    return type(model).__name__


def _log_probs(output: Any, vocab_size: int) -> Any:
    """Log probabilities after every token of a prompt: (L, S). The last are those of the token written."""
    import torch

    rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    log_probs_LS = torch.full((len(rows), vocab_size), float("nan"))
    for row_S, found in zip(log_probs_LS, rows, strict=True):
        row_S[list(found)] = torch.tensor([entry.logprob for entry in found.values()])
    return log_probs_LS


def _cached_values(spec: Any) -> int:
    """Values per token in one layer, from the bytes that vLLM gives a block of its cache."""
    import torch

    itemsize = torch.empty((), dtype=spec.dtype).element_size()
    return spec.page_size_bytes // (spec.block_size * itemsize)


if __name__ == "__main__":
    problem = engine_problem() or size_problem(Path(sys.argv[1]))
    if problem is not None:
        sys.stderr.write(problem)
        sys.exit(NO_ENGINE)
    from safetensors.torch import save_file

    tensors, metadata = run(Path(sys.argv[1]), *sys.argv[3:])
    save_file(tensors, sys.argv[2], metadata={METADATA_KEY: json.dumps(metadata)})
