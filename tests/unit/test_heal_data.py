"""Tokens to heal on: texts of every kind, their mixture, what is held out, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

from care_mla import console
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.errors import CalibrationError, OptionError
from care_mla.heal.data import Blocks, Corpus, split_corpus
from care_mla.heal.sizes import Sizes
from care_mla.heal.texts import TOKENS, Sampling, cut_blocks, load_corpora, read_blocks, text_file, tokenise
from care_mla.heal_config import HealConfig
from care_mla.workspace import Workspace

from pico import pico_model, pico_text


def sizes_of(length: int, tokens: int, held_out: int) -> Sizes:
    return Sizes(length, tokens, held_out, batch_size=4, micro_batch=4, steps=10, save_every=5)


SIZES = sizes_of(16, 4096, 256)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(pico_model(tmp_path_factory.mktemp("data") / "model")))


def corpora(source: Source, folder: Path, *data: str, sizes: Sizes = SIZES, seed: int = 0) -> list[Corpus]:
    config = HealConfig(model=folder, output=folder / "OUT", teacher="demo", data=data, seed=seed)
    return load_corpora(source, config, Workspace(folder / "work"), Accelerator(cpu=True), sizes)


def numbered(count: int, first: int = 0, length: int = 4) -> Tensor:
    """Blocks that tell their number."""
    return (torch.arange(count, dtype=torch.int32)[:, None] + first).expand(-1, length).contiguous()


def text_of_blocks(source: Source, blocks_BL: Tensor) -> str:
    return source.tokenizer().decode(blocks_BL.flatten().tolist())


def write(folder: Path, text: str) -> dict[str, Path]:
    """The same text in every kind of file."""
    records = text.split("\n\n")
    (folder / "a.txt").write_text(text)
    (folder / "a.raw").write_text(text)
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": record}) for record in records))
    (folder / "a.json").write_text(json.dumps([{"instruction": r, "output": ""} for r in records]))
    return {path.suffix: path for path in folder.glob("a.*")}


def test_every_kind_of_text_gives_the_same_tokens(source: Source, tmp_path: Path) -> None:
    files = write(tmp_path, pico_text(1500))
    wanted_T = source.tokenizer()(pico_text(1500), add_special_tokens=False, return_tensors="pt")[
        "input_ids"
    ][0]
    assert set(files) == {".txt", ".raw", ".json", ".jsonl"}
    for path in files.values():
        torch.testing.assert_close(tokenise(source, str(path), 10**6).long(), wanted_T)


def test_parquet_is_read_or_its_library_is_named(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    if importlib.util.find_spec("pyarrow") is None:
        path.write_bytes(b"PAR1")
        with pytest.raises(CalibrationError, match="pip install pyarrow"):
            tokenise(source, str(path), 1000)
        return
    table = importlib.import_module("pyarrow").table({"text": pico_text(1500).split("\n\n")})
    importlib.import_module("pyarrow.parquet").write_table(table, path)
    (tmp_path / "a.txt").write_text(pico_text(1500))
    assert torch.equal(tokenise(source, str(path), 10**6), tokenise(source, str(tmp_path / "a.txt"), 10**6))


def test_a_data_set_of_the_hub_needs_its_library(source: Source) -> None:
    installed = importlib.util.find_spec("datasets") is not None
    message = "the hub gives no data set" if installed else r"pip install 'care-mla\[eval\]'"
    with pytest.raises(CalibrationError, match=f"--data nobody/nothing: .*{message}") as refused:
        tokenise(source, "nobody/nothing", 1000)
    assert "--calibration" not in str(refused.value)


def test_a_long_text_is_tokenised_in_pieces_that_lose_nothing(source: Source, tmp_path: Path) -> None:
    text = pico_text(40_000)
    assert len(text) > 3 * 2**16
    (tmp_path / "long.txt").write_text(text)
    tokens_T = tokenise(source, str(tmp_path / "long.txt"), 10**6)
    assert source.tokenizer().decode(tokens_T.tolist()) == text


def test_more_text_than_wanted_gives_blocks_from_all_over_it() -> None:
    blocks_BL = cut_blocks(torch.arange(100_000), sizes_of(10, 1000, 10))
    assert blocks_BL.shape == (100, 10)
    assert blocks_BL[:, 0].diff().unique().tolist() == [1000]
    # What fills no block is left out, and nothing is padded.
    assert cut_blocks(torch.arange(49), sizes_of(10, 1000, 10)).shape == (4, 10)


def test_the_blocks_of_a_text_are_kept_and_found_again(source: Source, tmp_path: Path) -> None:
    path, workspace = tmp_path / "a.txt", Workspace(tmp_path / "work")
    path.write_text(pico_text(1500))
    stored = text_file(source, str(path), workspace, SIZES)
    before = stored.stat().st_mtime_ns
    assert text_file(source, str(path), workspace, SIZES) == stored
    assert stored.stat().st_mtime_ns == before
    path.write_text(pico_text(1500, seed=1))
    assert text_file(source, str(path), workspace, SIZES) != stored


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Only a few words.", r"--data few\.txt has no block of 16 tokens.*--sequence-length, such as 4"),
        ("Some old river slowly crossed the garden.", "has one block of 16 tokens"),
        (" \n", "is empty"),
    ],
    ids=["none", "one", "blank"],
)
def test_too_short_a_text_is_refused_and_not_stored(
    text: str, message: str, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.txt").write_text(text)
    with pytest.raises(CalibrationError, match=message):
        corpora(source, tmp_path, "few.txt")
    assert not list(Path("work").rglob("*.safetensors"))


def test_training_and_held_out_blocks_never_overlap(source: Source, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(pico_text(1500))
    (tmp_path / "b.txt").write_text(pico_text(900, seed=1))
    found = corpora(source, tmp_path, str(tmp_path / "a.txt"), str(tmp_path / "b.txt"))
    blocks = Blocks(found, 0)
    for corpus in found:
        together = torch.cat((corpus.train_I, corpus.held_out_I)).sort().values
        assert torch.equal(together, torch.arange(len(corpus.blocks_BL)))
        assert len(corpus.held_out_I) == min(8, len(corpus.blocks_BL) // 10)
    held_out = {tuple(block) for block in blocks.held_out_BL.tolist()}
    trained = {tuple(blocks[place].tolist()) for place in range(3 * sum(blocks.quotas))}
    assert trained.isdisjoint(held_out)
    assert len(trained) == sum(len(corpus.train_I) for corpus in found)


def test_what_is_held_out_of_a_text_depends_on_nothing_else(source: Source, tmp_path: Path) -> None:
    alone = split_corpus("a", 1.0, numbered(100), 5, 0)
    beside = split_corpus("a", 0.3, numbered(100), 5, 0)
    assert torch.equal(alone.held_out_I, beside.held_out_I)
    assert not torch.equal(alone.held_out_I, split_corpus("a", 1.0, numbered(100), 5, 1).held_out_I)


def test_weights_say_how_often_each_text_comes() -> None:
    found = [split_corpus("a", 0.25, numbered(30), 3, 0), split_corpus("b", 0.75, numbered(90, 1000), 3, 0)]
    blocks = Blocks(found, 7)
    rounds = 4
    seen = [int(blocks[place][0]) for place in range(rounds * sum(blocks.quotas))]
    share = sum(number >= 1000 for number in seen) / len(seen)
    assert share == pytest.approx(0.75, abs=0.01)
    for first in (0, 1000):
        times = Counter(number for number in seen if (number >= 1000) == bool(first))
        # No block comes again before all have come.
        assert max(times.values()) - min(times.values()) <= 1
    assert seen[: len(seen) // rounds] != seen[len(seen) // rounds : 2 * (len(seen) // rounds)]


def test_the_order_is_a_function_of_seed_and_place() -> None:
    found = [split_corpus("a", 1.0, numbered(50), 5, 0)]
    blocks, again = Blocks(found, 3), Blocks(found, 3)
    assert torch.equal(again.batch(120, 10), blocks.batch(120, 10))  # without what comes before
    assert torch.equal(blocks.batch(0, 10), again.batch(0, 10))
    assert not torch.equal(blocks.batch(0, 10), Blocks(found, 4).batch(0, 10))


def test_the_hash_tells_ids_splits_and_shares_apart() -> None:
    def hashed(seed: int = 0, share: float = 1.0, first: int = 0) -> str:
        return Blocks([split_corpus("a", share, numbered(50, first), 5, seed)], 0).content_hash

    assert hashed() == hashed()
    assert len({hashed(), hashed(seed=1), hashed(share=0.5), hashed(first=1)}) == 4


def test_the_teacher_writes_what_it_is_asked_for_and_goes_on_after_a_stop(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sizes_of(8, 48, 8)
    whole = corpora(source, tmp_path / "whole", "self", sizes=sizes)[0].blocks_BL
    assert whole.shape == (6, 8)
    assert not list((tmp_path / "whole/work/data").glob("self-*/"))
    # Two sequences at once in place of six give the same text, since each has a generator of its own.
    monkeypatch.setattr("care_mla.heal.texts.sampled_together", lambda *_: 2)
    workspace = Workspace(tmp_path / "parts/work")
    sampling = Sampling(source, workspace, sizes, seed=0, device=torch.device("cpu"))
    lost = sampling._part(2, 2)
    found = corpora(source, tmp_path / "parts", "self", sizes=sizes)[0].blocks_BL
    torch.testing.assert_close(found, whole)
    # Of a stopped sampling, only what is missing is written again.
    kept = {TOKENS: numbered(2, 7, 8)}
    sampling.path.unlink()
    lost.parent.mkdir()
    save_file(kept, lost)
    again = corpora(source, tmp_path / "parts", "self", sizes=sizes)[0].blocks_BL
    torch.testing.assert_close(again, torch.cat((whole[:2], kept[TOKENS], whole[4:])))


def test_sampled_text_serves_another_run_in_blocks_of_another_length(source: Source, tmp_path: Path) -> None:
    save_file({TOKENS: numbered(10, 0, 8)}, tmp_path / "self.safetensors")
    (corpus,) = corpora(source, tmp_path, str(tmp_path / "self.safetensors"))
    assert corpus.blocks_BL.tolist() == numbered(10, 0, 8).view(5, 16).tolist()


def test_files_of_another_model_or_of_something_else_are_refused(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({TOKENS: numbered(4, 318, 16)}, path)
    with pytest.raises(CalibrationError, match=r"holds token 321, and .* has 320"):
        read_blocks(path, source, SIZES)
    save_file({"weights": numbered(4)}, path)
    with pytest.raises(CalibrationError, match="holds no tokens that care heal wrote"):
        read_blocks(path, source, SIZES)
    save_file({TOKENS: numbered(4)[:0]}, path)
    with pytest.raises(CalibrationError, match="has no block"):
        corpora(source, tmp_path, str(path))


def test_a_text_called_test_is_warned_of(source: Source, tmp_path: Path) -> None:
    console.current().warnings.clear()
    (tmp_path / "wiki.test.raw").write_text(pico_text(1500))
    corpora(source, tmp_path, str(tmp_path / "wiki.test.raw"))
    assert "wiki.test.raw" in console.current().warnings[0]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ((), [("self", 1.0)]),
        (("self:3", "a.txt"), [("self", 0.75), ("a.txt", 0.25)]),
        (("a.txt:0.5", "org/set:config:1.5"), [("a.txt", 0.25), ("org/set:config", 0.75)]),
        (("org/set:config",), [("org/set:config", 1.0)]),
    ],
)
def test_names_and_weights(data: tuple[str, ...], expected: list[tuple[str, float]], tmp_path: Path) -> None:
    config = HealConfig(model=tmp_path, output=tmp_path / "OUT", teacher="demo", data=data)
    assert config.sources() == expected


@pytest.mark.parametrize(
    ("data", "named"), [(("a.txt:0",), "'a.txt:0'"), ((":2",), "':2'"), (("a.txt", "a.txt:2"), "twice")]
)
def test_weights_that_mean_nothing_are_refused(data: tuple[str, ...], named: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=named):
        HealConfig(model=tmp_path, output=tmp_path / "OUT", teacher="demo", data=data)
