"""`verify --engine vllm`: starts engine_vllm.py in a Python that has vLLM, and reads what it found.

vLLM pins its own torch and transformers, so it is seldom installed beside care: the environment variable
CARE_VLLM_PYTHON names the Python of its environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from care_mla import console
from care_mla.errors import CareError, CheckpointError
from care_mla.export.engine_transformers import METADATA_KEY
from care_mla.export.engine_vllm import NO_ENGINE, OLDEST
from care_mla.workspace import read_json

if TYPE_CHECKING:
    from care_mla.export.verify import StoredReference

PYTHON_VARIABLE = "CARE_VLLM_PYTHON"
ENGINE_SCRIPT = Path(__file__).with_name("engine_vllm.py")


def run_vllm(
    folder: Path, stored: StoredReference, *, model_impl: str | None = None, log: Path | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Logits and greedy tokens of vLLM, and what it says about the model; see `engine_vllm.run`.

    Args:
        folder: a converted model, with its reference.
        model_impl: `vllm` or `transformers`, as vLLM's option of that name; None: what the model needs.
        log: where to keep vLLM's output.

    Raises:
        CareError: there is no vLLM, it is too old, or it has no kernel for this size.
        CheckpointError: it cannot load or run the folder.
    """
    instead = f"Nothing was compared. Try care verify {folder} --engine transformers"
    if stored.runs_code:
        raise CareError(
            f"{folder} is of profile care, whose class runs in transformers alone, not in vLLM. {instead}"
        )
    if stored.is_slice:
        raise CareError(
            f"{folder}: its reference is of the first layers alone, since the model was too large to compute "
            f"whole, and vLLM runs whole models. {instead}"
        )
    if model_impl is None:
        reason = misread(read_json(folder / "config.json"))
        model_impl = "vllm" if reason is None else "transformers"
        if reason is not None:
            console.current().note(f"In vLLM with --model-impl transformers: {reason}.")
    python = os.environ.get(PYTHON_VARIABLE, sys.executable)
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.safetensors"
        # Isolated: neither this folder's vllm.py nor a PYTHONPATH of this environment may get in vLLM's way.
        command = [python, "-I", str(ENGINE_SCRIPT), str(folder.absolute()), str(result), model_impl]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(
                command, env=environment, cwd=temporary, capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise CareError(
                _no_engine(folder, f"{PYTHON_VARIABLE}={python} cannot be run ({error.strerror})")
            ) from None
        output = done.stdout + done.stderr
        if log is not None:
            log.write_text(output, encoding="utf-8")
        lines = output.strip().splitlines() or [f"exit code {done.returncode}"]
        if done.returncode == NO_ENGINE:
            raise CareError(_no_engine(folder, lines[-1]))
        if done.returncode != 0:
            raise CheckpointError(
                f"{folder}: vLLM cannot load or run it ({lines[-1]}). Which sizes its kernels take is in "
                f"docs/engines.md. {instead}"
            )
        with safe_open(result, "pt") as file:
            metadata = json.loads(file.metadata()[METADATA_KEY])
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118


def misread(config: Mapping[str, Any]) -> str | None:
    """What of a stock checkpoint vLLM's own class drops or misreads; transformers' class in vLLM does not."""
    if config["attention_bias"]:
        return "vLLM's own class drops attention biases"
    if config["rope_parameters"]["rope_type"] != "default":
        return f"vLLM's own class takes rope_type {config['rope_parameters']['rope_type']} for YaRN"
    if config["tie_word_embeddings"]:
        return "vLLM's own class does not tie the head to the embeddings"
    return None


def _no_engine(folder: Path, reason: str) -> str:
    if "kv_lora_rank" in reason:
        return (
            f"--engine vllm: {reason}. Nothing was compared. Write a copy with zeros in the rest: care "
            f"export {folder} {folder}-vllm --profile vllm --kv-lora-rank 512"
        )
    return (
        f"--engine vllm: {reason}. Nothing was compared. Install vLLM {'.'.join(map(str, OLDEST))} or later "
        f"in an environment of its own, and name its Python: {PYTHON_VARIABLE}=ENVIRONMENT/bin/python care "
        f"verify {folder} --engine vllm"
    )
