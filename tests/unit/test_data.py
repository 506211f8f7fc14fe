"""Calibration blocks: formats and their errors, where blocks come from, nothing padded, nothing shared."""
# Shapes: B blocks, L positions, T tokens of the text.

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from care_mla.calibrate.data import TokenBlocks, cut_runs, prepare_tokens
from care_mla.calibrate.text import PIECES, read_text, thin
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.console import Console
from care_mla.errors import CalibrationError, ResumeError
from care_mla.workspace import Workspace

from pico import pico_model, pico_text

POSITIONS = 96


@dataclass(frozen=True)
class Options:
    calibration: str
    seed: int = 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    folder = tmp_path_factory.mktemp("data") / "model"
    return open_source(str(pico_model(folder, max_position_embeddings=POSITIONS)))


def prepare(
    source: Source,
    calibration: str | Path,
    folder: Path,
    *,
    seed: int = 0,
    tokens: int = 200,
    length: int = 16,
    long: int = 64,
    **options: Any,
) -> tuple[TokenBlocks, Console]:
    console = Console(quiet=True)
    blocks = prepare_tokens(
        source,
        Options(str(calibration), seed),
        Workspace(folder),
        tokens=tokens,
        sequence_length=length,
        rotation_length=long,
        device=torch.device("cpu"),
        console=console,
        **options,
    )
    return blocks, console


def text_file(folder: Path, source: Source, num_tokens: int, name: str = "text.txt") -> tuple[Path, Tensor]:
    """A file that has exactly so many tokens, and its tokens."""
    tokenizer = source.tokenizer()
    ids = tokenizer(pico_text(num_tokens), add_special_tokens=False)["input_ids"]
    text = tokenizer.decode(ids[:num_tokens])
    tokens_T = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(tokens_T) == num_tokens
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path, tokens_T


def places(tokens_T: Tensor, blocks_BL: Tensor) -> list[range]:
    """Where each block lies in the text; each must lie in exactly one place."""
    windows = tokens_T.unfold(0, blocks_BL.shape[1], 1)
    found = []
    for block_L in blocks_BL:
        (start,) = (windows == block_L).all(1).nonzero().flatten().tolist()
        found.append(range(start, start + blocks_BL.shape[1]))
    return found


def disjoint(ranges: list[range]) -> bool:
    ordered = sorted(ranges, key=lambda r: r.start)
    return all(a.stop <= b.start for a, b in pairwise(ordered))


def test_blocks_of_a_long_text(tmp_path: Path, source: Source) -> None:
    path, tokens_T = text_file(tmp_path, source, 3000)
    blocks, console = prepare(source, path, tmp_path / "work")
    assert blocks.short_BL.shape == (200 // 16, 16)
    assert blocks.long_BL.shape == (200 // 64, 64)
    assert blocks.held_out_BL.shape == (2, POSITIONS)
    found = [places(tokens_T, b) for b in (blocks.held_out_BL, blocks.long_BL, blocks.short_BL)]
    assert disjoint([*found[0], *found[1], *found[2]])
    # From all over the text, not from its beginning.
    assert min(r.start for r in found[2]) < 1000
    assert max(r.stop for r in found[2]) > 2000
    assert "12 blocks of 16 tokens" in blocks.description
    assert "text.txt (3,000 tokens)" in blocks.description
    assert str(tmp_path) not in blocks.description
    # The model has fewer positions than the held-out text should have.
    assert any("96 tokens in a row" in warning for warning in console.warnings)


@pytest.mark.parametrize(
    ("num_tokens", "held_out", "long"),
    [
        (192 + 192 + 192, (2, 96), (3, 64)),  # just enough for everything
        (192 + 192 + 191, (2, 96), (3, 64)),  # no separate long blocks
        (192 + 192, (2, 96), (3, 64)),
        (192 + 191, (1, 96), (3, 64)),  # one held-out block less
        (192 + 95, (1, 95), (3, 64)),  # a shorter one
        (192 + 16, (1, 16), (3, 64)),
    ],
)
def test_little_text_goes_to_the_statistics_first(
    tmp_path: Path, source: Source, num_tokens: int, held_out: tuple[int, int], long: tuple[int, int]
) -> None:
    path, tokens_T = text_file(tmp_path, source, num_tokens)
    blocks, _ = prepare(source, path, tmp_path / "work")
    assert (blocks.short_BL.shape, blocks.held_out_BL.shape, blocks.long_BL.shape) == (
        (12, 16),
        held_out,
        long,
    )
    found = {
        name: [i for r in places(tokens_T, getattr(blocks, f"{name}_BL")) for i in r]
        for name in ("short", "long", "held_out")
    }
    assert len(set(found["short"])) == 192
    assert not set(found["held_out"]) & {*found["short"], *found["long"]}
    if num_tokens >= 576:
        assert not set(found["long"]) & set(found["short"])
    else:
        # Long blocks are runs of the text too: the short ones beside each other.
        assert set(found["long"]) == set(found["short"])


def test_too_little_text_says_how_much_there_is_and_what_to_type(tmp_path: Path, source: Source) -> None:
    path, _ = text_file(tmp_path, source, 192 + 15)
    with pytest.raises(
        CalibrationError, match=r"has 207 tokens, and 208 are needed.*--calibration-tokens 176$"
    ):
        prepare(source, path, tmp_path / "work")
    blocks, _ = prepare(source, path, tmp_path / "work-2", tokens=176)
    assert blocks.short_BL.shape == (11, 16)
    path, _ = text_file(tmp_path, source, 20)
    with pytest.raises(CalibrationError, match=r"has 20 tokens.*give more text: --calibration FILE$"):
        prepare(source, path, tmp_path / "work-3")


def test_the_seed_decides_and_a_rerun_reads_what_is_there(tmp_path: Path, source: Source) -> None:
    path, _ = text_file(tmp_path, source, 2000)
    first, _ = prepare(source, path, tmp_path / "a")
    written = (tmp_path / "a" / "tokens.safetensors").read_bytes()
    again, _ = prepare(source, path, tmp_path / "b")
    assert written == (tmp_path / "b" / "tokens.safetensors").read_bytes()
    other, _ = prepare(source, path, tmp_path / "c", seed=1)
    assert first.content_hash == again.content_hash != other.content_hash
    resumed, _ = prepare(source, path, tmp_path / "a")
    assert resumed.content_hash == first.content_hash
    assert torch.equal(resumed.short_BL, first.short_BL)
    assert resumed.description == first.description


@pytest.mark.parametrize(("what", "options"), [("seed", {"seed": 1}), ("tokens", {"tokens": 176})])
def test_other_options_in_the_same_folder_are_refused(
    tmp_path: Path, source: Source, what: str, options: dict[str, Any]
) -> None:
    path, _ = text_file(tmp_path, source, 2000)
    prepare(source, path, tmp_path / "work")
    with pytest.raises(ResumeError, match=f"{what} was"):
        prepare(source, path, tmp_path / "work", **options)


def test_a_changed_text_is_refused(tmp_path: Path, source: Source) -> None:
    path, _ = text_file(tmp_path, source, 2000)
    prepare(source, path, tmp_path / "work")
    path.write_text(path.read_text() + " more")
    with pytest.raises(ResumeError, match="text was"):
        prepare(source, path, tmp_path / "work")


def test_a_test_set_is_warned_of(tmp_path: Path, source: Source) -> None:
    path, _ = text_file(tmp_path, source, 2000, name="wiki.test.raw")
    _, console = prepare(source, path, tmp_path / "work")
    assert any("wiki.test.raw" in warning for warning in console.warnings)


def test_the_model_writes_its_own_text(tmp_path: Path, source: Source) -> None:
    blocks, _ = prepare(source, "self", tmp_path / "work")
    assert (blocks.short_BL.shape, blocks.held_out_BL.shape) == ((12, 16), (2, POSITIONS))
    assert torch.equal(blocks.short_BL[:, 0], torch.zeros(12, dtype=torch.int64))  # bos_token_id
    assert torch.equal(blocks.long_BL.flatten(), blocks.short_BL.flatten())
    # Held out are sequences of their own, from the start token too.
    held_out_T = blocks.held_out_BL.flatten()
    assert torch.equal(held_out_T[::16], torch.zeros(12, dtype=torch.int64))
    short = {tuple(row) for row in blocks.short_BL.tolist()}
    assert not short & {tuple(row) for row in held_out_T.view(-1, 16).tolist()}
    assert "wrote itself" in blocks.description
    again, _ = prepare(source, "self", tmp_path / "again")
    assert again.content_hash == blocks.content_hash


def test_own_text_does_not_depend_on_how_many_sequences_fit(
    tmp_path: Path, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = prepare(source, "self", tmp_path / "whole")
    monkeypatch.setattr("care_mla.calibrate.data.SAMPLING_CACHE_BYTES", 1)
    one_by_one, _ = prepare(source, "self", tmp_path / "one-by-one")
    assert one_by_one.content_hash == whole.content_hash


@pytest.mark.parametrize(
    ("tokens", "start"),
    [
        ({"bos_token_id": 5, "eos_token_id": 6}, 5),
        ({"bos_token_id": None, "eos_token_id": [7, 8]}, 7),
        ({"bos_token_id": None, "eos_token_id": None}, 0),
    ],
)
def test_own_text_starts_from_the_start_token(tmp_path: Path, tokens: dict[str, Any], start: int) -> None:
    source = open_source(str(pico_model(tmp_path / "model", max_position_embeddings=32, **tokens)))
    blocks, _ = prepare(source, "self", tmp_path / "work", tokens=48, long=32)
    assert blocks.short_BL[:, 0].tolist() == [start] * 3
    # What fills no long block is left out of them.
    assert blocks.long_BL.shape == (1, 32)


def test_a_model_that_does_not_fit_cannot_write(tmp_path: Path, source: Source) -> None:
    with pytest.raises(CalibrationError, match=r"does not fit.*--calibration FILE$"):
        prepare(source, "self", tmp_path / "work", whole_model_fits=False)
    assert not (tmp_path / "work").exists()
    path, _ = text_file(tmp_path, source, 1000)
    prepare(source, path, tmp_path / "work", whole_model_fits=False)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = pico_model(tmp_path / "model", vocab=260)
    pico_model(tmp_path / "other", vocab=318)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).write_bytes((tmp_path / "other" / file).read_bytes())
    (tmp_path / "text.txt").write_text(pico_text(2000))
    with pytest.raises(CalibrationError, match=r"token \d+, but the model has 262"):
        prepare(open_source(str(folder)), tmp_path / "text.txt", tmp_path / "work")


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12), st.integers(0, 200), st.integers(0, 5))
def test_runs_never_overlap_and_leave_nothing_out_needlessly(sizes: list[int], slack: int, seed: int) -> None:
    tokens_T = torch.arange(sum(sizes) + slack)
    runs = cut_runs(tokens_T, sizes, seed)
    assert [len(run) for run in runs] == sizes
    ranges = [range(int(run[0]), int(run[-1]) + 1) for run in runs]
    assert all(len(r) == size for r, size in zip(ranges, sizes, strict=True))
    assert disjoint(ranges)


RECORDS = [{"text": "One."}, {"instruction": "Add.", "input": "1 2", "output": "3"}]
RECORDS += [
    {"instruction": "Go.", "output": "Gone."},
    {"text": "", "id": 4},
    {"text": "Last.", "output": "x"},
]
JOINED = "One.\n\nAdd.\n1 2\n3\n\nGo.\nGone.\n\nLast."


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.txt", " As it is.\n\n", " As it is.\n\n"),
        ("a.raw", "\ufeffNo mark.", "No mark."),
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS)) + "\n", JOINED),
        ("a.json", json.dumps(RECORDS), JOINED),
        ("a.json", json.dumps(RECORDS[1], indent=2), "Add.\n1 2\n3"),
        ("lines.json", "\n\n".join(map(json.dumps, RECORDS)), JOINED),
    ],
)
def test_formats(tmp_path: Path, name: str, content: str, text: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    read = read_text(str(tmp_path / name), tokens=100)
    assert (read.name, read.text) == (name, text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\n", "is empty"),
        ("a.jsonl", b'{"text": " "}', "is empty"),
        ("a.txt", b"abc\xe9", r"byte 3 is not UTF-8.*iconv"),
        ("a.md", b"text", r"\.md.*rename it: mv"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2, column 10"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b", "id": 3}', r"record 2 has the keys body, id"),
        ("a.jsonl", b'{"text": 3}', r"record 1 has the keys text"),
        ("a.json", b'[{"instruction": "a"}]', r"record 1 has the keys instruction"),
        ("a.json", b'["a", "b"]', r"record 1 has 'a'"),
    ],
)
def test_unreadable_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=message):
        read_text(str(tmp_path / name), tokens=100)


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl", "missing.parquet", "./missing", "/missing"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(CalibrationError, match=r"no such file\. .*--calibration FILE$"):
        read_text(name, tokens=100)


def test_the_hub_needs_its_library_and_a_network() -> None:
    # Without the library the message says how to install it; with it, that nothing is there (tests are
    # offline).
    installed = importlib.util.find_spec("datasets") is not None
    message = "the hub gives no data set" if installed else r"pip install 'care-mla\[eval\]'"
    with pytest.raises(CalibrationError, match=message):
        read_text("nobody/no-such-set", tokens=100)


def test_parquet_needs_its_library(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no parquet")
    installed = importlib.util.find_spec("pyarrow") is not None
    with pytest.raises(CalibrationError, match="no Parquet file" if installed else "pip install pyarrow"):
        read_text(str(tmp_path / "a.parquet"), tokens=100)


def test_a_huge_text_is_read_in_pieces_from_all_over_it(tmp_path: Path) -> None:
    words = [f"w{i:06}" for i in range(20_000)]
    text = " ".join(words)
    assert thin(text, len(text)) == text
    pieces = thin(text, 32_000).split("\n\n")
    assert len(pieces) == PIECES
    assert sum(map(len, pieces)) <= 32_000
    numbers = [int(piece.split()[0][1:]) for piece in pieces]
    assert numbers == sorted(numbers)
    assert numbers[-1] > 18_000
    assert all(piece.split()[0] in words for piece in pieces)
