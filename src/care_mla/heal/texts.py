"""From the names that --data gives to files of token blocks: text is tokenised, or sampled from the teacher.

Writes `data/` in the work folder: one safetensors file per text, and the parts of a sampling as they come.
Each is named by what it depends on, so that another run finds it there, and may be given as `--data`.
"""
# Shapes: B blocks, L positions, T tokens of a text.

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from care_mla import console as terminal
from care_mla.calibrate.data import _start_token
from care_mla.calibrate.sample import TEMPERATURE, load_model, sample_sequences
from care_mla.calibrate.text import CHARACTERS_PER_TOKEN, read_text
from care_mla.errors import CalibrationError
from care_mla.heal.data import Corpus, split_corpus
from care_mla.heal_config import SELF, HealConfig
from care_mla.plan import SAMPLING_CACHE_BYTES
from care_mla.workspace import Workspace, fingerprint, save_tensors

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from care_mla.checkpoint.source import Source
    from care_mla.heal.sizes import Sizes

TOKENS = "tokens_BL"
STORED = ".safetensors"
# English has between four and five characters per token; a longer text gives blocks from all over it.
CHARACTERS = 8
# A text is tokenised in pieces of so many characters, and so many of them at once.
PIECE_CHARACTERS, PIECES_AT_ONCE = 2**16, 64


def load_corpora(
    teacher: Source, config: HealConfig, workspace: Workspace, accelerator: Accelerator, sizes: Sizes
) -> list[Corpus]:
    """Every text that the options name, in blocks, split; what is missing is tokenised or sampled first.

    The first process tokenises; all of them sample.

    Raises:
        CareError: a text cannot be read, is too short, or is another model's.
    """
    files: dict[str, Path] = {}
    with accelerator.main_process_first():
        for name, _ in config.sources():
            if name != SELF:
                files[name] = text_file(teacher, name, workspace, sizes, write=accelerator.is_main_process)
    if SELF in dict(config.sources()):
        files[SELF] = sample_text(teacher, config, workspace, accelerator, sizes)
    corpora = []
    for name, share in config.sources():
        label = name if name == SELF else Path(name).name
        if "test" in label.lower():
            terminal.current().warn(
                f"a text to train on is called {label}. A model that has seen a test set measures better on "
                "it than it is: train on other text, or measure on other text."
            )
        blocks_BL = read_blocks(files[name], teacher, sizes)
        held_out = round(sizes.held_out_tokens * share / sizes.sequence_length)
        corpora.append(split_corpus(label, share, blocks_BL, held_out, config.seed))
    return corpora


def text_file(source: Source, name: str, workspace: Workspace, sizes: Sizes, *, write: bool = True) -> Path:
    """The file with a text's blocks; it is written if it is not there.

    Args:
        name: of a text, or of a file of blocks, which is that file.
        write: whether this process writes; else another one has.

    Raises:
        CalibrationError: the text cannot be read or fills fewer than two blocks, or its tokens are not the
            model's.
    """
    path = Path(name)
    if path.suffix == STORED:
        return path
    content = name
    if path.is_file():
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
    key = fingerprint([source.fingerprint(), content, sizes.tokens, sizes.sequence_length])
    result = workspace.path("data", f"text-{key}{STORED}")
    if write and not result.exists():
        tokens_T = tokenise(source, name, sizes.tokens)
        blocks_BL = cut_blocks(tokens_T, sizes)
        split_corpus(name, 1.0, blocks_BL, 1, 0)  # refuses too short a text before it is written
        save_tensors(result, {TOKENS: blocks_BL})
    return result


def tokenise(source: Source, name: str, tokens: int) -> Tensor:
    """Ids of a text, (T,), int32: about as many as are wanted, or half as many again, from all over it."""
    try:
        text = read_text(name, tokens=-(-tokens * CHARACTERS // CHARACTERS_PER_TOKEN)).text
    except CalibrationError as error:
        # The texts of calibration and of healing are read by one function, under two names.
        raise CalibrationError(str(error).replace("--calibration", "--data")) from error
    tokenizer = source.tokenizer()
    pieces = list(_pieces(text))
    parts: list[Tensor] = []
    with terminal.current().progress(f"Tokenising {name}", len(pieces)) as progress:
        for start in range(0, len(pieces), PIECES_AT_ONCE):
            batch = pieces[start : start + PIECES_AT_ONCE]
            ids = tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            parts += [torch.tensor(piece_ids, dtype=torch.int32) for piece_ids in ids]
            progress.advance(len(batch))
    tokens_T = torch.cat(parts)
    if len(tokens_T) and int(tokens_T.max()) >= source.facts.vocab_size:
        raise CalibrationError(
            f"{source.name}: its tokenizer gives token {int(tokens_T.max())}, but the model has "
            f"{source.facts.vocab_size} (vocab_size). Tokenizer and weights do not belong together: download "
            "the model again."
        )
    return tokens_T


def _pieces(text: str) -> list[str]:
    """A text cut between words, so that no piece has many more than PIECE_CHARACTERS."""
    pieces, start = [], 0
    while start < len(text):
        # Tokens take the space before a word along, so the cut is in front of it.
        end = text.find(" ", start + PIECE_CHARACTERS)
        end = len(text) if end < 0 else end
        pieces.append(text[start:end])
        start = end
    return pieces


def cut_blocks(tokens_T: Tensor, sizes: Sizes) -> Tensor:
    """Packed blocks (B, L); of more than are wanted, ones from all over the text."""
    length = sizes.sequence_length
    blocks_BL = tokens_T[: len(tokens_T) // length * length].view(-1, length)
    wanted = max(2, sizes.tokens // length)
    if len(blocks_BL) <= wanted:
        return blocks_BL
    return blocks_BL[torch.arange(wanted) * len(blocks_BL) // wanted]


def read_blocks(path: Path, source: Source, sizes: Sizes) -> Tensor:
    """The blocks of a file, mapped into memory, cut again if they have another length.

    Raises:
        CalibrationError: it holds no blocks of this model.
    """
    try:
        with safe_open(path, "pt") as file:
            blocks_BL = file.get_tensor(TOKENS)
    except (SafetensorError, OSError) as error:
        raise CalibrationError(
            f"--data {path} holds no tokens that care heal wrote ({error}). Nothing was written. Give "
            "another text, or sample it again: --data self"
        ) from error
    largest = int(blocks_BL.max()) if blocks_BL.numel() else 0  # none is too few, and refused later
    if largest >= source.facts.vocab_size:
        raise CalibrationError(
            f"--data {path} holds token {largest}, and {source.name} has "
            f"{source.facts.vocab_size} (vocab_size): another model wrote it. Nothing was written."
        )
    is_same = blocks_BL.shape[1] == sizes.sequence_length
    return blocks_BL if is_same else cut_blocks(blocks_BL.flatten(), sizes)


class Sampling:
    """Text that the teacher writes itself, in parts, each of which is a file once it is complete.

    Args:
        source: the teacher.
        workspace: where the parts and the result go.
        sizes: how many tokens, in sequences of what length.
        device: where the teacher runs; it decides how many sequences are sampled together.
    """

    def __init__(
        self, source: Source, workspace: Workspace, sizes: Sizes, *, seed: int, device: torch.device
    ) -> None:
        self.source, self.workspace, self.seed = source, workspace, seed
        self.length = sizes.sequence_length
        self.sequences = max(2, sizes.tokens // self.length)
        key = fingerprint([source.fingerprint(), self.sequences, self.length, seed, TEMPERATURE])
        self.path = workspace.path("data", f"self-{key}{STORED}")
        self.part_folder = f"self-{key}"
        batch = min(self.sequences, sampled_together(source, self.length, device))
        self.parts = [(at, min(batch, self.sequences - at)) for at in range(0, self.sequences, batch)]

    def write_parts(self, model: PreTrainedModel, rank: int, ranks: int) -> None:
        """Sample the parts that are missing and that fall to this process."""
        mine = [part for part in self.parts if not self._part(*part).exists()][rank::ranks]
        first_token = _start_token(self.source, terminal.current())
        title = f"The teacher writes {self.sequences * self.length:,} tokens"
        with terminal.current().progress(title, len(mine) * (self.length - 1)) as progress:
            for start, count in mine:
                blocks_BL = sample_sequences(
                    model,
                    start_token=first_token,
                    num_sequences=count,
                    length=self.length,
                    seed=self.seed,
                    first_sequence=start,
                    advance=progress.advance,
                )
                save_tensors(self._part(start, count), {TOKENS: blocks_BL.int()})

    def join(self) -> None:
        """Make one file of all parts."""
        parts = []
        for part in self.parts:
            with safe_open(self._part(*part), "pt") as file:
                parts.append(file.get_tensor(TOKENS))
        save_tensors(self.path, {TOKENS: torch.cat(parts)})
        self.workspace.clear(f"data/{self.part_folder}")

    def _part(self, start: int, count: int) -> Path:
        return self.workspace.path("data", self.part_folder, f"from_{start:08}_{count}{STORED}")


def sampled_together(source: Source, length: int, device: torch.device) -> int:
    """Sequences that fit with keys, values and logits: half of a GPU, or what the plan allows on a CPU.

    A step of a small model takes a GPU about as long for thousands of sequences as for one.
    """
    facts = source.facts
    is_cuda = device.type == "cuda"
    room = torch.cuda.get_device_properties(device).total_memory // 2 if is_cuda else SAMPLING_CACHE_BYTES
    cache_bytes = length * facts.num_hidden_layers * facts.cached_values * (2 if is_cuda else 4)
    logit_bytes = 4 * 4 * facts.vocab_size  # float32, four times while one token is drawn
    return max(1, min(room // (cache_bytes + logit_bytes), 8192 if is_cuda else 256))


def sample_text(
    teacher: Source, config: HealConfig, workspace: Workspace, accelerator: Accelerator, sizes: Sizes
) -> Path:
    """The file with what the teacher wrote; all processes write their parts of it if it is not there."""
    device = accelerator.device
    sampling = Sampling(teacher, workspace, sizes, seed=config.seed, device=device)
    is_there = sampling.path.exists()
    accelerator.wait_for_everyone()
    if is_there:
        return sampling.path
    model = load_model(
        teacher, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
    )
    sampling.write_parts(model, accelerator.process_index, accelerator.num_processes)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sampling.join()
        terminal.current().note(f"Other runs may take this text with --data {sampling.path}")
    accelerator.wait_for_everyone()
    return sampling.path
