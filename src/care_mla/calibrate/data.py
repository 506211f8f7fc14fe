"""Calibration tokens: text from the model itself, a file or the hub, as blocks of ids without any padding.

Reads the text and the model's tokenizer, or for `self` the whole model; writes `tokens.safetensors` in the
work folder, which a rerun takes from there.
"""
# Shapes: B blocks, L positions, T tokens of the text.

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from care_mla.calibrate.text import Text, read_text
from care_mla.errors import CalibrationError
from care_mla.plan import SAMPLING_CACHE_BYTES
from care_mla.workspace import Workspace, save_tensors

if TYPE_CHECKING:
    from care_mla.checkpoint.source import Source
    from care_mla.console import Console

SELF = "self"
METADATA = "care-mla"
HELD_OUT_BLOCKS = 2
HELD_OUT_LENGTH = 2048  # the width of the RoPE key is never chosen on shorter text if it can be helped


class CalibrationOptions(Protocol):
    """The options that decide which tokens are used; see CalibrationConfig."""

    @property
    def calibration(self) -> str: ...
    @property
    def seed(self) -> int: ...


@dataclass(frozen=True)
class _Lengths:
    """Tokens for the statistics, of one block for each use, and how many blocks the statistics get."""

    tokens: int
    short: int
    num_short: int
    long: int
    held_out: int

    @classmethod
    def of(cls, source: Source, tokens: int, sequence_length: int, rotation_length: int) -> _Lengths:
        """For so many tokens in blocks of `sequence_length`."""
        positions = source.facts.max_position_embeddings
        assert tokens >= sequence_length, (tokens, sequence_length)
        return cls(
            tokens=tokens,
            short=sequence_length,
            num_short=tokens // sequence_length,
            long=min(rotation_length, positions),
            held_out=min(HELD_OUT_LENGTH, positions),
        )

    @property
    def needed(self) -> int:
        """Tokens of text to read."""
        return 2 * max(self.tokens, self.long) + HELD_OUT_BLOCKS * self.held_out

    @property
    def num_long(self) -> int:
        """As many tokens as the statistics have."""
        return max(1, self.num_short * self.short // self.long)

    @property
    def num_written(self) -> int:
        """Sequences that the model writes itself: for the statistics, and to be held out."""
        return self.num_short + -(-HELD_OUT_BLOCKS * self.held_out // self.short)


@dataclass(frozen=True)
class TokenBlocks:
    """Token ids on the CPU, for each use of them.

    Attributes:
        short_BL: for the statistics.
        long_BL: for gamma, which depends on length. Where there is little text, these are the short ones
        joined. held_out_BL: for choosing among candidates; no statistic sees them.
        description: where they come from, for people; without paths.
        content_hash: of all ids.
    """

    short_BL: Tensor
    long_BL: Tensor
    held_out_BL: Tensor
    description: str
    content_hash: str


def prepare_tokens(
    source: Source,
    config: CalibrationOptions,
    workspace: Workspace,
    *,
    tokens: int,
    sequence_length: int,
    rotation_length: int,
    device: torch.device,
    console: Console,
    whole_model_fits: bool = True,
) -> TokenBlocks:
    """The calibration blocks, made once and then read from the work folder.

    Args:
        tokens: for the statistics, in whole blocks of `sequence_length`.
        rotation_length: tokens of one block for gamma.
        whole_model_fits: whether the plan found room for the whole model, which `self` needs.

    Raises:
        CalibrationError: the text cannot be read or is too short, or the model is too large to write it.
        ResumeError: the work folder holds tokens of another run.
    """
    lengths = _Lengths.of(source, tokens, sequence_length, rotation_length)
    text = None
    if config.calibration != SELF:
        text = read_text(config.calibration, tokens=lengths.needed)
        _warn_of_test_set(text.name, console)
    elif not whole_model_fits:
        raise too_large_to_write(source)
    stamp = {
        "model": source.fingerprint(),
        "calibration": text.name if text else SELF,
        "text": text.content_hash if text else None,
        "seed": config.seed,
        "tokens": tokens,
        "sequence_length": sequence_length,
        "rotation_length": rotation_length,
    }
    path = workspace.path("tokens.safetensors")
    if workspace.path("tokens.stamp.json").exists():
        workspace.claim("tokens", stamp)
    if not path.exists():
        if text:
            blocks = _cut_blocks(_tokenize(source, text), text.name, config.seed, lengths)
        else:
            blocks = _sample_blocks(source, config.seed, lengths, device, console)
        # Not before: a text that is refused must not claim the folder for itself.
        workspace.claim("tokens", stamp)
        _save(path, blocks)
    blocks = _load(path)
    _warn_of_length(blocks, source, console)
    return blocks


def too_large_to_write(source: Source) -> CalibrationError:
    """What is said when a model cannot be held whole, and so cannot write its own text."""
    return CalibrationError(
        f"--calibration self: {source.name} would write its own text, which needs the whole model in "
        "memory, and it does not fit. Nothing was written. Give a text instead, and one layer at a time "
        "is enough: --calibration FILE"
    )


def _warn_of_test_set(name: str, console: Console) -> None:
    if "test" in name.lower():
        console.warn(
            f"The calibration text is called {name}. Statistics from a test set make every measurement on it "
            "look better than it is: use other text, or measure on other text."
        )


def _warn_of_length(blocks: TokenBlocks, source: Source, console: Console) -> None:
    if blocks.held_out_BL.shape[1] < HELD_OUT_LENGTH:
        console.warn(
            f"The held-out text has only {blocks.held_out_BL.shape[1]:,} tokens in a row. A width of the "
            f"RoPE key chosen on less than {HELD_OUT_LENGTH:,} is not trustworthy at greater lengths: give "
            "more text (--calibration FILE), or the width itself (--qk-rope-head-dim P)."
        )
    if blocks.long_BL.shape[1] < min(HELD_OUT_LENGTH, source.facts.max_position_embeddings):
        console.warn(
            f"What RoPE does is measured over only {blocks.long_BL.shape[1]:,} tokens in a row, so quality "
            f"at greater lengths is not known: give more text, or --calibration-tokens {HELD_OUT_LENGTH} or "
            "more."
        )


def _sample_blocks(
    source: Source,
    seed: int,
    lengths: _Lengths,
    device: torch.device,
    console: Console,
) -> TokenBlocks:
    """Blocks that the model writes itself, from its start token on.

    A small model loses its thread in long texts of its own, so the long blocks are short ones joined. The
    last one may lack a rest of them that fills no block.
    """
    from care_mla.calibrate.sample import TEMPERATURE

    num_extra = lengths.num_written - lengths.num_short
    start_token = _start_token(source, console)
    written = range(lengths.num_written)
    sequences_BL = _write_text(source, seed, start_token, written, lengths.short, device, console)
    short_BL, extra_BL = sequences_BL.split([lengths.num_short, num_extra])
    description = (
        f"{lengths.num_short} sequences of {lengths.short} tokens that the model wrote itself (temperature "
        f"{TEMPERATURE}, from token {start_token}, seed {seed})"
    )
    long_BL = _pack(short_BL, min(lengths.long, short_BL.numel()))
    return _token_blocks(short_BL, long_BL, _pack(extra_BL, lengths.held_out), description)


def _write_text(
    source: Source,
    seed: int,
    start_token: int,
    sequences: range,
    length: int,
    device: torch.device,
    console: Console,
) -> Tensor:
    """The sequences of these indices that the model writes itself, (B, L)."""
    from care_mla.calibrate.sample import load_model, sample_sequences

    dtype = torch.float32 if device.type == "cpu" else getattr(torch, source.facts.dtype)
    cache_bytes = length * source.facts.num_hidden_layers * source.facts.cached_values * dtype.itemsize
    batch = max(1, SAMPLING_CACHE_BYTES // cache_bytes)
    starts = range(sequences.start, sequences.stop, batch)
    model = load_model(source, device=device, dtype=dtype)
    with console.progress("The model writes its calibration text", len(starts) * (length - 1)) as progress:
        return torch.cat(
            [
                sample_sequences(
                    model,
                    start_token=start_token,
                    num_sequences=min(batch, sequences.stop - start),
                    length=length,
                    seed=seed,
                    first_sequence=start,
                    advance=progress.advance,
                )
                for start in starts
            ]
        )


def _start_token(source: Source, console: Console) -> int:
    for key in ("bos_token_id", "eos_token_id"):
        value = source.facts.config.get(key)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, int):
            return first
    console.note(f"{source.name} names no bos_token_id and no eos_token_id: its text starts from token 0.")
    return 0


def more_tokens(
    source: Source,
    config: CalibrationOptions,
    count: int,
    *,
    tokens: int,
    sequence_length: int,
    rotation_length: int,
    device: torch.device,
    console: Console,
) -> Tensor:
    """About `count` tokens (T,): written anew, or from all of the file but what is held out.

    Args:
        tokens: as `prepare_tokens` was given it; likewise `sequence_length` and `rotation_length`.

    Raises:
        CalibrationError: the text has fewer.
    """
    lengths = _Lengths.of(source, tokens, sequence_length, rotation_length)
    if config.calibration == SELF:
        sequences = range(lengths.num_written, lengths.num_written - (-count // lengths.short))
        start_token = _start_token(source, console)
        written_BL = _write_text(source, config.seed, start_token, sequences, lengths.short, device, console)
        return written_BL.flatten()[:count]
    text = read_text(config.calibration, tokens=lengths.needed)
    tokens_T = _tokenize(source, text)
    held_out, long, short = _shares(len(tokens_T), text.name, lengths)
    is_free_T = torch.ones_like(tokens_T, dtype=torch.bool)
    for taken in cut_runs(torch.arange(len(tokens_T)), held_out + long + short, config.seed)[: len(held_out)]:
        is_free_T[taken] = False
    free_T = tokens_T[is_free_T]
    if len(free_T) < count:
        raise CalibrationError(
            f"--calibration {text.name} has {len(free_T):,} tokens that are not held out, and --match-tokens "
            f"asks for {count:,}. Nothing is repeated, so give more text, or --match-tokens {len(free_T)}"
        )
    return torch.cat(
        cut_runs(free_T, [min(lengths.short, count)] * (count // lengths.short or 1), config.seed)
    )


def _tokenize(source: Source, text: Text) -> Tensor:
    """Ids of the whole text, without special tokens."""
    # One call: pieces of text would have other tokens where they meet.
    ids = source.tokenizer()(text.text, add_special_tokens=False, verbose=False)["input_ids"]
    if ids and max(ids) >= source.facts.vocab_size:
        raise CalibrationError(
            f"{source.name}: its tokenizer gives token {max(ids)}, but the model has "
            f"{source.facts.vocab_size} (vocab_size). Tokenizer and weights do not belong together: download "
            "the model again."
        )
    return torch.tensor(ids, dtype=torch.int64)


def _cut_blocks(tokens_T: Tensor, name: str, seed: int, lengths: _Lengths) -> TokenBlocks:
    """Blocks from all over the text, in an order that the seed decides."""
    held_out, long, short = _shares(len(tokens_T), name, lengths)
    runs = cut_runs(tokens_T, held_out + long + short, seed)
    held_out_runs, runs = runs[: len(held_out)], runs[len(held_out) :]
    long_runs, short_runs = runs[: len(long)], runs[len(long) :]
    if not long_runs:
        long_runs = [run for run in short_runs if len(run) == max(short)]
    description = (
        f"{lengths.num_short} blocks of {lengths.short} tokens from all over {name} ({len(tokens_T):,} "
        f"tokens), seed {seed}"
    )
    short_BL = torch.cat(short_runs).view(-1, lengths.short)
    return _token_blocks(short_BL, torch.stack(long_runs), torch.stack(held_out_runs), description)


def _shares(total: int, name: str, lengths: _Lengths) -> tuple[list[int], list[int], list[int]]:
    """Sizes of the runs of text for held-out, long and short blocks; the less text, the more modest.

    First the long blocks go: then short ones are neighbours, and their runs are the long blocks. Then one of
    the held-out blocks goes, then part of the other.
    """
    used = lengths.num_short * lengths.short
    per_run = max(1, lengths.long // lengths.short)
    full, rest = divmod(lengths.num_short, per_run)
    neighbours = [per_run * lengths.short] * full + ([rest * lengths.short] if rest else [])
    held_out = [lengths.held_out] * HELD_OUT_BLOCKS
    long = [lengths.long] * lengths.num_long
    if total >= used + sum(held_out) + sum(long):
        return held_out, long, [lengths.short] * lengths.num_short
    if total >= used + sum(held_out):
        return held_out, [], neighbours
    least = min(lengths.short, lengths.held_out)
    if total >= used + least:
        return [min(lengths.held_out, total - used)], [], neighbours
    enough = (total - least) // lengths.short * lengths.short
    advice = f"give more text, or less to do: --calibration-tokens {enough}"
    if enough < lengths.short:
        advice = "give more text: --calibration FILE"
    raise CalibrationError(
        f"--calibration {name} has {total:,} tokens, and {used + least:,} are needed: {used:,} for the "
        f"statistics, and {least:,} held out of them to judge by. Nothing is padded or repeated, so {advice}"
    )


def cut_runs(tokens_T: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Runs of the given sizes from all over the text, none overlapping; the seed decides which lies where."""
    slack = len(tokens_T) - sum(sizes)
    assert slack >= 0, (len(tokens_T), sizes)
    places = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).tolist()
    starts = [0] * len(sizes)
    used = 0
    for place, run_idx in enumerate(places, start=1):
        # What is left out lies in equal gaps before, between and behind the runs.
        starts[run_idx] = used + slack * place // (len(sizes) + 1)
        used += sizes[run_idx]
    return [tokens_T[start : start + size] for start, size in zip(starts, sizes, strict=True)]


def _pack(tokens_BL: Tensor, length: int) -> Tensor:
    """Sequences one after another in rows of the given length; what fills no row is left out."""
    tokens_T = tokens_BL.flatten()
    return tokens_T[: len(tokens_T) // length * length].view(-1, length)


def _token_blocks(short_BL: Tensor, long_BL: Tensor, held_out_BL: Tensor, description: str) -> TokenBlocks:
    held_out_BL = held_out_BL[:HELD_OUT_BLOCKS]
    digest = hashlib.sha256()
    for tokens_BL in (short_BL, long_BL, held_out_BL):
        digest.update(f"{tuple(tokens_BL.shape)}".encode())
        digest.update(tokens_BL.contiguous().numpy().tobytes())
    return TokenBlocks(short_BL, long_BL, held_out_BL, description, digest.hexdigest()[:16])


def _save(path: Path, blocks: TokenBlocks) -> None:
    # Clones, since long blocks may be another view of the short ones and safetensors wants each its own.
    tensors = {name: getattr(blocks, f"{name}_BL").clone() for name in ("short", "long", "held_out")}
    described = {"description": blocks.description, "content_hash": blocks.content_hash}
    save_tensors(path, tensors, {METADATA: json.dumps(described)})


def _load(path: Path) -> TokenBlocks:
    with safe_open(path, "pt") as file:
        tensors = {f"{name}_BL": file.get_tensor(name) for name in ("short", "long", "held_out")}
        return TokenBlocks(**tensors, **json.loads(file.metadata()[METADATA]))
