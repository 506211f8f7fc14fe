"""Perplexity in both conventions, and agreement with the original, against their plain definitions."""
# Shapes: B blocks, L positions, T predicted tokens of a block, S vocabulary.

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from care_mla.errors import OptionError
from care_mla.evaluate.agreement import room_for_states
from care_mla.evaluate.models import head_of, open_model
from care_mla.evaluate.paired import difference, mean_of
from care_mla.evaluate.perplexity import BlockScores, score_blocks, summarise, token_blocks
from care_mla.evaluate.rolling import first_tokens, rolling_windows, word_perplexity
from export_cases import export

from pico import pico_text

CPU = torch.device("cpu")
TEXT = pico_text(500, seed=9)


class Pair(NamedTuple):
    """A model, a converted one that is not like it at all, and the text as blocks."""

    source: PreTrainedModel
    converted: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    tokens_BL: Tensor
    folder: Path


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("pair")
    exported = export(folder)
    (folder / "text.txt").write_text(TEXT)
    opened = open_model(str(folder / "source"), device=CPU, trust_remote_code=False)
    converted = open_model(str(exported.folder), device=CPU, trust_remote_code=False)
    tokens_BL = token_blocks(opened.tokenizer, folder / "text.txt", block=128, max_tokens=None)
    return Pair(opened.load(), converted.load(), opened.tokenizer, tokens_BL, folder)


def plain_log_probs(folder: Path, tokens_BL: Tensor) -> Tensor:
    """(B, T, S) as transformers alone gives them, loaded as a user would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens_BL).logits[:, :-1].double().log_softmax(-1)


def test_perplexity_is_that_of_plain_transformers(pair: Pair) -> None:
    scores = score_blocks(pair.source, pair.tokens_BL)
    model = AutoModelForCausalLM.from_pretrained(pair.folder / "source", dtype=torch.float32).eval()
    losses = [model(row_1L, labels=row_1L).loss.item() for row_1L in pair.tokens_BL.split(1)]
    found = summarise(scores, None)
    assert found["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert found["value"] == pytest.approx(math.exp(found["nll"]))
    assert found["tokens"] == pair.tokens_BL.shape[0] * 127
    assert (found["block"], found["blocks"]) == (128, len(pair.tokens_BL))
    spread = torch.tensor(losses).std().item()
    assert found["nll_stderr"] == pytest.approx(spread / len(losses) ** 0.5, rel=1e-4)
    assert "kl" not in found


def test_kl_and_agreement_are_their_definitions(pair: Pair) -> None:
    keep = room_for_states(pair.folder / "states", head_of(pair.source), pair.tokens_BL)
    original = score_blocks(pair.source, pair.tokens_BL, keep=keep)
    scores = score_blocks(pair.converted, pair.tokens_BL, original=keep)
    p_BTS = plain_log_probs(pair.folder / "source", pair.tokens_BL)
    q_BTS = plain_log_probs(pair.folder / "out", pair.tokens_BL)
    kl_BT = (p_BTS.exp() * (p_BTS - q_BTS)).sum(-1)
    found = summarise(scores, original)
    assert found["kl"] == pytest.approx(kl_BT.mean().item(), rel=1e-5)
    assert found["kl_stderr"] == pytest.approx(mean_of(kl_BT.mean(1)).stderr, rel=1e-4)
    agrees_BT = (p_BTS.argmax(-1) == q_BTS.argmax(-1)).double()
    assert found["top1_agreement"] == pytest.approx(agrees_BT.mean().item(), abs=1e-3)
    targets_BT1 = pair.tokens_BL[:, 1:, None]
    change_B = (p_BTS - q_BTS).gather(2, targets_BT1).mean((1, 2))
    assert found["difference"]["nll"] == pytest.approx(change_B.mean().item(), abs=1e-6)
    assert found["difference"]["nll_stderr"] == pytest.approx(mean_of(change_B).stderr, rel=1e-4)
    ratio = found["value"] / summarise(original, None)["value"]
    assert found["difference"]["perplexity_ratio"] == pytest.approx(ratio)


def test_a_model_agrees_with_itself(pair: Pair) -> None:
    keep = room_for_states(pair.folder / "self", head_of(pair.source), pair.tokens_BL)
    original = score_blocks(pair.source, pair.tokens_BL, keep=keep)
    found = summarise(score_blocks(pair.source, pair.tokens_BL, original=keep), original)
    assert abs(found["kl"]) < 1e-6
    assert found["top1_agreement"] == 1
    assert found["difference"] == {"nll": 0, "nll_stderr": 0, "perplexity_ratio": 1}
    assert keep.comparable(head_of(pair.source), pair.tokens_BL)
    assert not keep.comparable(head_of(pair.source), pair.tokens_BL.flip(1))
    assert not keep.comparable(torch.nn.Linear(64, 300), pair.tokens_BL)


def test_a_disk_that_is_too_small_for_the_states_is_named(tmp_path: Path) -> None:
    many_BL = torch.zeros(1).expand(10**6, 10**6)
    with pytest.raises(OptionError, match="GiB are needed"):
        room_for_states(tmp_path / "states", torch.nn.Linear(64, 300), many_BL)
    assert not (tmp_path / "states").exists()


def test_positions_of_long_blocks_are_told_apart() -> None:
    nll_BT = torch.arange(2 * 2047, dtype=torch.float64).view(2, 2047) / 1000
    rows = summarise(BlockScores(nll_BT), None)["by_position"]
    assert [(row["start"], row["end"], row["tokens"]) for row in rows] == [
        (0, 1024, 2048),
        (1024, 2047, 2046),
    ]
    assert rows[1]["value"] == pytest.approx(math.exp(nll_BT[:, 1024:].mean().item()))


def test_a_paired_difference_is_sharper_than_the_means() -> None:
    hard_X = torch.randn(50)
    noise_X = 0.01 * torch.randn(50)
    found = difference(hard_X + 0.5 + noise_X, hard_X)
    assert found["value"] == pytest.approx(0.5, abs=0.01)
    assert found["stderr"] < 0.02 * mean_of(hard_X).stderr
    assert mean_of(torch.ones(1)).stderr is None


@pytest.mark.parametrize("count", [1, 6, 7, 8, 13, 14, 20])
def test_windows_predict_every_token_once_with_all_the_context_that_fits(count: int) -> None:
    ids, window = list(range(count)), 7
    seen: list[int] = []
    for inputs, predicted in rolling_windows(ids, -1, window):
        context, targets = inputs[:-predicted], inputs[-predicted:]
        assert len(inputs) - 1 <= window
        assert len(context) == 1 or len(inputs) - 1 == window
        assert context[-1] == targets[0] - 1
        seen += targets
    assert seen == ids


def test_word_perplexity_of_one_window_is_the_plain_sum(pair: Pair) -> None:
    text = TEXT[:400]
    ids = pair.tokenizer(text)["input_ids"]
    log_TS = plain_log_probs(pair.folder / "source", torch.tensor([[0, *ids]]))[0]
    total = log_TS.gather(1, torch.tensor(ids)[:, None]).sum().item()
    found = word_perplexity(pair.source, pair.tokenizer, text, window=1024)
    assert found["log_likelihood"] == pytest.approx(total, rel=1e-6)
    assert found["words"] == len(text.split(" ")) + text.count("\n\n")
    assert found["word_perplexity"] == pytest.approx(math.exp(-total / found["words"]))
    assert found["bits_per_byte"] == pytest.approx(-total / math.log(2) / len(text.encode()))


def test_the_first_tokens_of_a_text(pair: Pair) -> None:
    ids = pair.tokenizer(TEXT)["input_ids"]
    cut = first_tokens(pair.tokenizer, TEXT, 100)
    assert TEXT.startswith(cut)
    assert pair.tokenizer(cut)["input_ids"] == ids[:100]
    assert first_tokens(pair.tokenizer, TEXT, None) == first_tokens(pair.tokenizer, TEXT, 10**6) == TEXT
