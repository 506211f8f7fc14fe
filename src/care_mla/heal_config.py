"""The options of `care heal`; see configs.py, which they follow."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from care_mla.configs import CommonConfig, _at_least, _check_file, _choice
from care_mla.errors import OptionError

Train = Literal["attention", "attention+norms", "all", "lora"]
SELF = "self"
TEXT_SUFFIXES = (".txt", ".raw", ".json", ".jsonl", ".parquet", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class HealConfig(CommonConfig):
    """Train a converted model towards its original, and write it again in the same profile.

    The loss per token is CROSS-ENTROPY * CE + BETA * TEMPERATURE^2 * KL(teacher || student).
    """

    model: Path
    """A folder that care convert wrote."""
    output: Path
    """Folder to write. It appears only when it is complete."""
    teacher: str | None = None
    """The original: a folder, a hub id, a .gguf file, or 'demo'. Required."""
    data: tuple[str, ...] = field(default_factory=tuple)
    """'self' (the teacher writes it), a file (.txt, .raw, .json, .jsonl, .parquet) or a hub data set; may be
    given several times. FILE:0.7 gives it a share: weights are relative, 1 if left out. None: self."""
    tokens: int | None = None
    """Distinct tokens to take from each text, or to sample. None: what the steps use, at most 65,536 on a
    CPU and 4,194,304 with a GPU."""
    held_out_tokens: int | None = None
    """Tokens that are measured and never trained on. None: a tenth, at most 4,096 on a CPU, 65,536 with a
    GPU."""
    sequence_length: int | None = None
    """Tokens per block. None: 256 on a CPU, 1,024 with a GPU."""
    train: Train = "attention"
    """What trains; lora trains adapters on attention's projections, which are merged at the end."""
    steps: int | None = None
    """Steps of the optimiser. None: 200, or as many as --minutes allow."""
    minutes: float | None = None
    """Minutes of training (sampling and writing not counted), after which it ends, by the schedule."""
    batch_size: int | None = None
    """Blocks per step, over all processes; the result does not depend on how many processes share them. None:
    8 on a CPU, 32 with a GPU."""
    micro_batch_size: int | None = None
    """Blocks per forward pass of one process. None: 2,048 tokens on a CPU, 16,384 with a GPU."""
    learning_rate: float = 5e-4
    """Highest learning rate; it warms up, then falls to 0 by a cosine."""
    warmup: float = 0.05
    """Share of the steps that warm up."""
    weight_decay: float = 0.0
    """Of AdamW, on matrices."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to it."""
    beta: float = 1.0
    """Weight of the KL divergence to the teacher."""
    temperature: float = 1.0
    """Divides both models' logits in the KL divergence."""
    cross_entropy: float = 0.0
    """Weight of the cross-entropy with the text's own next tokens; the paper's loss has 1."""
    hidden_states: float = 0.0
    """Weight of the relative squared difference between the residual streams after every layer."""
    attention_outputs: float = 0.0
    """Weight of the relative squared difference between what attention adds to the stream in every layer."""
    lora_rank: int = 16
    """Of the adapters, with --train lora."""
    save_every: int | None = None
    """Steps between checkpoints, each with a measurement on the held-out part. None: a tenth of the steps, at
    least 5."""
    patience: int = 5
    """Measurements without a better one before training ends early; 0: never."""
    gradient_checkpointing: bool = False
    """Compute activations twice and keep few of them: less memory, a third more time."""
    compile: bool = False
    """Compile the layers and the loss with torch.compile: slow to start, then faster."""
    shard: bool = False
    """With several processes, spread weights of both models over them (FSDP2) in place of a copy in each."""
    plan: bool = False
    """Say what it needs (memory, tokens, disk) and end; nothing is written."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights written. None: that of MODEL."""
    seed: int = 0
    """One seed for everything random: the same seed gives the same files."""
    device: Literal["cpu", "cuda"] | None = None
    """None: GPUs if there are any. CUDA_VISIBLE_DEVICES picks among them."""
    work: Path | None = None
    """Folder for sampled text and checkpoints; the same command goes on from there. None: OUT.work"""
    recipe: Path | None = None
    """YAML file of these options; flags given here win over it."""
    overwrite: bool = False
    """Dangerous: replace OUTPUT if it exists."""
    trust_remote_code: bool = False
    """Dangerous: run Python code that comes with the teacher's tokenizer. Off, such a model is refused."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise OptionError(
                "--teacher is missing: healing brings a converted model back to its original, which must be "
                f"named. For example: care heal {self.model} {self.output} --teacher demo"
            )
        _choice("--train", self.train, get_args(Train))
        for flag, value, minimum in (
            ("--tokens", self.tokens, 2),
            ("--held-out-tokens", self.held_out_tokens, 2),
            ("--sequence-length", self.sequence_length, 2),
            ("--steps", self.steps, 1),
            ("--minutes", self.minutes, 0.001),
            ("--batch-size", self.batch_size, 1),
            ("--micro-batch-size", self.micro_batch_size, 1),
            ("--learning-rate", self.learning_rate, 0),
            ("--weight-decay", self.weight_decay, 0),
            ("--max-grad-norm", self.max_grad_norm, 1e-9),
            ("--beta", self.beta, 0),
            ("--temperature", self.temperature, 1e-3),
            ("--cross-entropy", self.cross_entropy, 0),
            ("--hidden-states", self.hidden_states, 0),
            ("--attention-outputs", self.attention_outputs, 0),
            ("--lora-rank", self.lora_rank, 1),
            ("--save-every", self.save_every, 1),
            ("--patience", self.patience, 0),
            ("--seed", self.seed, 0),
        ):
            _at_least(flag, value, minimum)
        if not 0 <= self.warmup <= 1:
            raise OptionError(f"--warmup {self.warmup} is a share of the steps, from 0 to 1. Try 0.05")
        if self.beta == self.cross_entropy == self.hidden_states == self.attention_outputs == 0:
            raise OptionError(
                "--beta, --cross-entropy, --hidden-states and --attention-outputs are all 0, so that there "
                "is nothing to train for. Give one of them: --beta 1"
            )
        if self.train != "lora" and self.lora_rank != HealConfig.lora_rank:
            raise OptionError(
                f"--lora-rank {self.lora_rank} has no effect with --train {self.train}. Leave it out, or "
                "add --train lora."
            )
        self.sources()

    def sources(self) -> list[tuple[str, float]]:
        """Every text with its share of what is trained on; the shares sum to 1.

        Raises:
            OptionError: a weight is no positive number, or a text is named twice.
        """
        pairs = [_split_weight(text) for text in self.data or (SELF,)]
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            raise OptionError(f"--data: {', '.join(names)} names a text twice. Give it once, with a weight.")
        total = sum(weight for _, weight in pairs)
        return [(name, weight / total) for name, weight in pairs]

    @property
    def work_folder(self) -> Path:
        """Where sampled text and checkpoints go."""
        return self.work or self.output.with_name(self.output.name + ".work")

    def check_paths(self) -> None:
        super().check_paths()
        if not self.model.is_dir():
            raise OptionError(
                f"{self.model} is not a folder, but heal reads one that care convert wrote. Make it first: "
                f"care convert {self.teacher} {self.model}"
            )
        if self.output.exists() and not self.overwrite:
            raise OptionError(
                f"{self.output} exists already, and nothing in it was touched. Name another folder, or "
                "replace it with --overwrite"
            )
        self._check_places()
        for name, _ in self.sources():
            # A hub data set has no suffix of a text file, so a mistyped file is not looked up on the hub.
            if Path(name).suffix in TEXT_SUFFIXES:
                _check_file("--data", Path(name))

    def _check_places(self) -> None:
        """Refuse to write into a folder that holds a model and nothing else."""
        model, output, teacher = (Path(p).resolve() for p in (self.model, self.output, self.teacher or ""))
        places = [("OUTPUT", self.output, model), ("--work", self.work_folder, model)]
        places.append(("--work", self.work_folder, output))
        if teacher.is_dir() and teacher != Path.cwd():
            places += [("OUTPUT", self.output, teacher), ("--work", self.work_folder, teacher)]
        for flag, path, holder in places:
            if holder == path.resolve() or holder in path.resolve().parents:
                raise OptionError(
                    f"{flag} {path} lies in {holder}, which holds a model and nothing else. Nothing was "
                    "written. Name a place outside of it."
                )


def _split_weight(text: str) -> tuple[str, float]:
    """`FILE:0.7` in its two parts; `NAME:CONFIG` of a hub data set stays whole."""
    name, colon, weight = text.rpartition(":")
    if not colon or not weight.replace(".", "", 1).isdigit():
        return text, 1.0
    if not name or not float(weight) > 0:
        raise OptionError(f"--data {text!r}: a weight is a number above 0 behind a text. Try FILE:0.7")
    return name, float(weight)
