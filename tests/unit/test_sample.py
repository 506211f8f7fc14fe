"""Text that the model writes itself: seeded, from the start token on, distributed as the model says."""
# Shapes: B sequences, L positions, S vocabulary, T draws.

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from care_mla.calibrate import sample
from care_mla.calibrate.sample import TEMPERATURE, draw, load_model, sample_sequences
from care_mla.checkpoint.opening import open_source

from pico import pico_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = {"sliding_window": 5, "tied": False} if request.param == "mistral" else {}
    return pico_model(tmp_path_factory.mktemp("sample") / "model", request.param, **options)


def test_loaded_model_is_the_stock_model(folder: Path) -> None:
    tokens_BL = torch.arange(24).view(2, 12)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens_BL).logits
    assert_close(load_model(open_source(str(folder)), device=CPU)(tokens_BL).logits, expected)


def test_sequences_do_not_depend_on_the_batch(folder: Path) -> None:
    model = load_model(open_source(str(folder)), device=CPU)

    def sequences(num_sequences: int, first_sequence: int = 0, seed: int = 4) -> torch.Tensor:
        return sample_sequences(
            model,
            start_token=7,
            num_sequences=num_sequences,
            length=20,
            seed=seed,
            first_sequence=first_sequence,
        )

    whole_BL = sequences(6)
    assert whole_BL.shape == (6, 20)
    assert torch.equal(torch.cat([sequences(2), sequences(1, 2), sequences(3, 3)]), whole_BL)
    assert torch.equal(whole_BL[:, 0], torch.full((6,), 7))
    assert len(set(map(tuple, whole_BL.tolist()))) == 6
    assert not torch.equal(sequences(6, seed=5), whole_BL)


def test_each_token_is_the_one_that_its_number_picks(folder: Path) -> None:
    model = load_model(open_source(str(folder)), device=CPU)
    tokens_BL = sample_sequences(model, start_token=0, num_sequences=3, length=16, seed=0)
    # The stock model on the whole text, without any cache.
    probs_BLS = (model(tokens_BL).logits.double() / TEMPERATURE).softmax(-1)
    for b in range(3):
        uniform_L = torch.rand(16, generator=sample._generator(0, b), dtype=torch.float64)
        for position in range(15):
            cumulative_S = probs_BLS[b, position].cumsum(-1)
            token = tokens_BL[b, position + 1]
            below = cumulative_S[token - 1] if token > 0 else 0.0
            assert below - 1e-5 <= uniform_L[position] < cumulative_S[token] + 1e-5


@pytest.mark.parametrize("vocab", [3, 256, 300, 1000])
def test_a_draw_inverts_the_distribution_function(vocab: int) -> None:
    probs_TS = (3 * torch.randn(400, vocab)).softmax(-1)
    uniform_T = torch.rand(400, dtype=torch.float64)
    cumulative_TS = probs_TS.double().cumsum(-1)
    expected_T = torch.searchsorted(cumulative_TS, (uniform_T * cumulative_TS[:, -1])[:, None], right=True)
    assert torch.equal(draw(probs_TS, uniform_T), expected_T[:, 0])


@pytest.mark.parametrize("vocab", [5, 256, 600])
def test_an_impossible_token_is_never_drawn(vocab: int) -> None:
    probs_TS = torch.zeros(4, vocab)
    probs_TS[:, vocab // 2] = 1.0
    uniform_T = torch.tensor([0.0, 1e-300, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert draw(probs_TS, uniform_T).tolist() == [vocab // 2] * 4


def test_draws_are_distributed_as_told() -> None:
    probs_S = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05])
    tokens_T = draw(probs_S.expand(20_000, -1), torch.rand(20_000, dtype=torch.float64))
    shares_S = torch.bincount(tokens_T, minlength=5) / 20_000
    # Five standard errors of the widest share.
    assert_close(shares_S, probs_S, rtol=0, atol=5 * 0.5 / 20_000**0.5)


def test_progress_counts_every_step(folder: Path) -> None:
    model = load_model(open_source(str(folder)), device=CPU)
    steps: list[int] = []
    sample_sequences(model, start_token=0, num_sequences=2, length=9, seed=0, advance=lambda: steps.append(1))
    assert len(steps) == 8
