"""The options of `care export`; see configs.py, which they follow."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from care_mla.configs import CommonConfig, _choice
from care_mla.errors import OptionError

ExportProfile = Literal["deepseek-v3", "deepseek-v2", "mistral4", "vllm", "gguf"]
Quantization = Literal["f32", "bf16", "f16", "q8_0", "q6_k", "q4_k_m"]


@dataclass(frozen=True, kw_only=True)
class ExportConfig(CommonConfig):
    """Write a converted model again for another engine, from the converted folder alone, in seconds."""

    model: Path
    """A folder that care convert wrote, in the decoupled form."""
    output: Path
    """Folder to write, or a file NAME.gguf with --profile gguf. It appears only when it is complete."""
    profile: ExportProfile | None = None
    """What to write. None: gguf where OUTPUT ends in .gguf, else deepseek-v3."""
    quantization: Quantization | None = None
    """Of the weights; f16 and q types with --profile gguf alone. None: as MODEL stores them."""
    kv_lora_rank: int | None = None
    """With --profile vllm: zeros up to this rank, such as 512 for the kernels of 576 cached values."""
    overwrite: bool = False
    """Dangerous: replace OUTPUT, and the reference beside a .gguf file, if it exists."""

    def __post_init__(self) -> None:
        is_file = self.output.suffix == ".gguf"
        if self.profile is None:
            object.__setattr__(self, "profile", "gguf" if is_file else "deepseek-v3")
        assert self.profile is not None
        _choice("--profile", self.profile, get_args(ExportProfile))
        if self.quantization is not None:
            _choice("--quantization", self.quantization, get_args(Quantization))
        if self.kv_lora_rank is not None and self.profile != "vllm":
            raise OptionError(
                f"--kv-lora-rank {self.kv_lora_rank} widens the latent for vLLM's kernels, and --profile "
                f"{self.profile} has no use for it. Leave it out, or choose --profile vllm."
            )
        if self.profile == "gguf" and not is_file:
            raise OptionError(
                f"{self.output} does not end in .gguf, and --profile gguf writes one file that does. Nothing "
                f"was written. Name it {self.output.with_name(self.output.name + '.gguf')}"
            )
        if self.profile != "gguf" and is_file:
            raise OptionError(
                f"{self.output} is named like a file, and --profile {self.profile} writes a folder. Nothing "
                f"was written. Name it {self.output.with_suffix('')}, or choose --profile gguf."
            )
        if self.profile != "gguf" and self.quantization not in (None, "f32", "bf16"):
            raise OptionError(
                f"--quantization {self.quantization} cannot be written with --profile {self.profile}: its "
                "latent is scaled to 1e-7, which float16 and block scales round to zero. Nothing was "
                f"written. Choose f32 or bf16, or a file: care export {self.model} "
                f"{self.output.name}.gguf --profile gguf --quantization {self.quantization}"
            )

    def check_paths(self) -> None:
        super().check_paths()
        if not self.model.is_dir():
            raise OptionError(
                f"{self.model} is not a folder, but export reads one that care convert wrote. Make it "
                f"first: care convert MODEL {self.model}"
            )
        inside = self.model.resolve()
        if inside in (self.output.resolve(), *self.output.resolve().parents):
            raise OptionError(
                f"{self.output} lies in {self.model}, which stays as it is. Nothing was written. Name a "
                "place outside of it."
            )
        if self.output.exists() and not self.overwrite:
            raise OptionError(
                f"{self.output} exists already, and nothing in it was touched. Choose another name, or "
                "replace it with --overwrite"
            )
