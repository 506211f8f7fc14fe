"""llama.cpp as an engine: is it there, its quantiser, and `verify` of a GGUF file in a process of its own.

The reference lies beside the file, as `NAME.reference.safetensors`.
"""
# Shapes: B sequences, L positions, S vocabulary, T greedy steps.

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import safe_open

from care_mla.errors import CareError, CheckpointError, OptionError
from care_mla.export.engine_transformers import METADATA_KEY, REFERENCE
from care_mla.export.gguf_vocabulary import PROBE
from care_mla.export.verify import judge, load_reference, read_result
from care_mla.workspace import save_tensors

SCRIPT = Path(__file__).with_name("engine_llama_cpp.py")
# The oldest version that was tested.
MINIMUM = (0, 3, 36)
INSTALL = "pip install 'care-mla[llama-cpp]' (built from source: it needs a C++ compiler and cmake)"
# Largest relative error of logits by the type of the weights. Float32's tells any mistake of an export; of
# the others only what is larger than their own rounding. So check a file in f32 first: its weights are the
# same.
TOLERANCES = {"f32": 1e-4, "f16": 1e-2, "bf16": 5e-2, "q8_0": 0.15, "q6_k": 0.3, "q4_k_m": 0.7}


def require_llama_cpp(purpose: str) -> None:
    """Check that llama.cpp can be used, without loading it.

    Args:
        purpose: what needs it, as the user typed it.

    Raises:
        CareError: it is absent or too old; the message says what to install.
    """
    if importlib.util.find_spec("llama_cpp") is None:
        raise CareError(
            f"{purpose} needs llama.cpp, and Python finds no llama_cpp here. Nothing was done. Install it: "
            f"{INSTALL}"
        )
    try:
        found = version("llama-cpp-python")
    except PackageNotFoundError:
        found = "unknown"
    numbers = found.split("+")[0].split(".")[:3]
    if not all(part.isdigit() for part in numbers) or tuple(map(int, numbers)) < MINIMUM:
        raise CareError(
            f"{purpose} needs llama-cpp-python {'.'.join(map(str, MINIMUM))} or newer, and {found} is "
            "installed: older ones may read a deepseek2 file otherwise. Nothing was done. Install it: "
            f"{INSTALL}"
        )


def reference_path(file: Path) -> Path:
    """Where the reference of a GGUF file lies."""
    return file.with_suffix(".reference.safetensors")


def write_reference(converted: Path, path: Path, quantization: str, tokenizer: Any | None) -> None:
    """Write the reference of a converted folder for a GGUF file, with text to compare token ids on.

    Args:
        path: the file to write.
        quantization: of the GGUF file.
        tokenizer: of the folder; None if it has none.
    """
    with safe_open(converted / REFERENCE, "pt") as file:
        stored = json.loads(file.metadata()[METADATA_KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # What was rounded once stays so, whatever type it is written in.
    is_finer = TOLERANCES[quantization] < stored["tolerance"]
    metadata = stored | ({} if is_finer else {"dtype": quantization, "tolerance": TOLERANCES[quantization]})
    if tokenizer is not None:
        metadata["probe"] = {"text": PROBE, "ids": tokenizer(PROBE)["input_ids"]}
    save_tensors(path, tensors, metadata={METADATA_KEY: json.dumps(metadata)})


def quantize(source: Path, output: Path, quantization: str) -> None:
    """Write a GGUF file again with quantised weights, by llama.cpp's own quantiser.

    Raises:
        CareError: it fails, for which the message gives its reason.
    """
    _run_script(["quantize", str(source), str(output), quantization], f"{output}: llama.cpp cannot quantise")


def verify_gguf(path: Path) -> dict[str, Any]:
    """Run a GGUF file in llama.cpp and compare it with the reference beside it.

    Returns:
        See `verify.judge`.

    Raises:
        CareError: llama.cpp is absent or too old, or a file cannot be used; the message says what to type.
    """
    if path.suffix != ".gguf" or not path.is_file():
        raise OptionError(
            f"{path} is no .gguf file, which llama.cpp reads. Make one, and check it: care export {path} "
            f"{path.stem}.gguf && care verify {path.stem}.gguf --engine llama.cpp"
        )
    require_llama_cpp("care verify --engine llama.cpp")
    again = f"Export it again: care export FOLDER {path} --profile gguf --overwrite"
    stored = load_reference(reference_path(path), again)
    if stored.is_slice:
        raise CheckpointError(
            f"{reference_path(path)}: the model was too large to run whole when it was converted, so the "
            f"reference has its first {len(stored.cached_values)} layers, and llama.cpp runs all of them. "
            "Check the folder that it was exported from: care verify FOLDER --engine transformers"
        )
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.safetensors"
        words = ["run", str(path.absolute()), str(reference_path(path).absolute()), str(result)]
        _run_script(words, f"{path}: llama.cpp cannot load or run it", again)
        return {"engine": "llama.cpp", **judge(stored, *read_result(result))}


def _run_script(words: list[str], what: str, again: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), *words],
        env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(
            f"{what} ({lines[-1]}). The file is damaged or was changed, or this machine has too little "
            f"memory or disk. {again}".rstrip()
        )
