"""Hidden numbers: where they are, what counts as found, and that a broken model finds none."""
# Shapes: L positions of a prompt, X trials.

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from care_mla.errors import CalibrationError, OptionError
from care_mla.evaluate.models import OpenedModel, open_model
from care_mla.evaluate.needle import (
    DEPTHS,
    NEEDLES,
    Kind,
    Search,
    find,
    is_found,
    prepare_search,
    summarise_search,
)

from pico import pico_model, pico_text

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> OpenedModel:
    folder = tmp_path_factory.mktemp("needle")
    pico_model(folder / "model")
    (folder / "hay.txt").write_text(pico_text(2000))
    return open_model(str(folder / "model"), device=CPU, trust_remote_code=False)


def search(opened: OpenedModel, kind: Kind = "needle", **options: Any) -> Search:
    values = {"max_length": 1024, "lengths": None, "haystack": None, "num_seeds": 1, "seed": 0}
    return prepare_search(kind, opened.tokenizer, **(values | options))


@pytest.mark.parametrize("kind", NEEDLES)
def test_prompts_have_the_length_and_hide_the_number_once_at_its_depth(
    kind: Kind, opened: OpenedModel
) -> None:
    found = search(opened, kind, lengths=[320, 640])
    assert len(found.trials) == 2 * len(DEPTHS) * 3
    for trial in found.trials:
        assert len(trial.tokens_L) + found.answer_tokens == found.lengths[trial.length_idx]
        text = str(opened.tokenizer.decode(trial.tokens_L))
        body, question = text.rsplit("\n\n", 1)
        times = 1 if kind == "needle" else 2  # a pass key is said twice, in one sentence
        assert body.count(trial.value) == times
        assert trial.value not in question
        place, depth = body.index(trial.value) / len(body), DEPTHS[trial.depth_idx]
        assert abs(place - depth) < 0.4 if depth < 1 else place > 0.6
    values = [trial.value for trial in found.trials]
    assert len(set(values)) == len(values)


def test_depth_is_where_the_sentence_begins(opened: OpenedModel, tmp_path: Path) -> None:
    (tmp_path / "hay.txt").write_text(pico_text(1500))
    found = search(opened, lengths=[1024], haystack=tmp_path / "hay.txt")
    for trial in found.trials:
        text = str(opened.tokenizer.decode(trial.tokens_L)).rsplit("\n\n", 1)[0]
        (begin,) = [text.index(word) for word in ("The locker", "The ship", "The ticket") if word in text]
        assert begin / len(text) == pytest.approx(DEPTHS[trial.depth_idx], abs=0.12)
        # No sentence of the text is cut in two.
        assert begin < 3 or text[:begin].rstrip()[-1] in ".!?"


def test_the_same_seed_hides_the_same_numbers(opened: OpenedModel) -> None:
    first, again = search(opened, "passkey", lengths=[256]), search(opened, "passkey", lengths=[256])
    other = search(opened, "passkey", lengths=[256], seed=1)
    assert first.same_prompts(again)
    assert not first.same_prompts(other)
    assert len(search(opened, "passkey", lengths=[256], num_seeds=2).trials) == 2 * len(first.trials)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (" 48213.", True),
        ("the number is:48213, I think", True),
        ("148213", False),
        ("482133", False),
        ("4821", False),
        ("48 213", False),
        (" the number of the locker", False),
        ("", False),
    ],
)
def test_only_the_exact_number_counts(answer: str, found: bool) -> None:
    assert is_found(answer, "48213") is found


@pytest.mark.parametrize("kind", NEEDLES)
def test_a_model_with_random_weights_finds_nothing(kind: Kind, opened: OpenedModel) -> None:
    wanted = search(opened, kind, lengths=[256], num_seeds=2)
    answered: list[int] = []
    found_X = find(opened.load(), opened.tokenizer, wanted, answered.append)
    assert sum(answered) == len(found_X) == 30
    assert found_X.sum() == 0


def test_the_grid_counts_every_trial_in_its_cell(opened: OpenedModel) -> None:
    wanted = search(opened, "passkey", lengths=[128, 256])
    found_X = torch.tensor([float(t.depth_idx > 2 and t.length_idx == 0) for t in wanted.trials])
    grid = summarise_search(wanted, found_X, torch.ones(len(found_X)))
    assert grid["lengths"] == [128, 256]
    assert grid["score"] == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert grid["found"] == [[0, 0, 0, 3, 3], [0, 0, 0, 0, 0]]
    assert grid["trials"] == [[3] * 5] * 2
    assert grid["mean"] == pytest.approx(0.2)
    assert grid["difference"]["value"] == pytest.approx(-0.8)


def test_usual_lengths_end_at_the_context(opened: OpenedModel) -> None:
    assert search(opened).lengths == [1024]
    assert search(opened, max_length=5000).lengths == [1024, 2048, 4096]
    assert search(opened, "passkey").lengths == [128, 256, 512, 1024]


def test_what_does_not_fit_is_refused(opened: OpenedModel, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text(pico_text(100))
    with pytest.raises(OptionError, match=r"2048 tokens are longer than the models' context of 1024"):
        search(opened, lengths=[512, 2048])
    with pytest.raises(OptionError, match="1024 tokens are longer than the models' context of 600"):
        search(opened, max_length=600)
    with pytest.raises(OptionError, match="alone need"):
        search(opened, lengths=[64])
    with pytest.raises(CalibrationError, match=r"short\.txt.*longest prompt of 1024"):
        search(opened, haystack=short)


@pytest.mark.slow
def test_the_demo_model_finds_pass_keys_until_its_keys_are_broken() -> None:
    demo = open_model("demo", device=CPU, trust_remote_code=False)
    wanted = search(demo, "passkey", lengths=[128])
    wanted = replace(wanted, trials=wanted.trials[::3])  # one at each depth
    model = demo.load()
    assert find(model, demo.tokenizer, wanted).mean() >= 0.8
    for layer in model.model.layers:
        weight_OD = layer.self_attn.k_proj.weight
        weight_OD.copy_(torch.randn_like(weight_OD) * weight_OD.std())
    assert find(model, demo.tokenizer, wanted).sum() == 0
