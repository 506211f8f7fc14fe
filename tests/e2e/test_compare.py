"""`care compare`: every method in every form at one budget, beside the original."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from care_mla.configs import METHOD_ALLOCATION, METHODS
from e2e.command import FAST, Done, care
from e2e.conftest import make_input

COMPARE = (
    "compare",
    "model",
    "--calibration",
    "calibration.txt",
    "--perplexity",
    "text.txt",
    "--block",
    "256",
    *FAST,
)
ROW = {
    *("method", "form", "allocation", "kv_lora_rank", "qk_rope_head_dim", "freqfold", "cached_values"),
    *("perplexity", "kl", "held_out_kl", "seconds"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_input(tmp_path_factory.mktemp("compared"))


@pytest.fixture(scope="session")
def compared(folder: Path) -> Done:
    return care(folder, *COMPARE)


def test_every_method_in_every_form(compared: Done) -> None:
    assert compared.code == 0, compared.err
    body = compared.json
    assert body["format"] == "care-mla/compare/1"
    assert set(body) == {
        *("format", "versions", "seconds", "warnings", "original", "rows", "text", "calibration")
    }
    assert set(body["original"]) == {"perplexity", "cached_values"}
    assert body["original"]["cached_values"] == 64
    assert body["text"]["name"] == "text.txt"
    assert {"tokens", "sequence_length", "damping", "seed"} < set(body["calibration"])
    assert [(row["method"], row["form"]) for row in body["rows"]] == [
        (method, form) for form, methods in METHODS.items() for method in methods
    ]
    for row in body["rows"]:
        assert set(row) == ROW
        assert math.isfinite(row["perplexity"])
        assert math.isfinite(row["kl"])
        assert row["kl"] > 0
        assert row["seconds"] > 0


def test_no_method_has_more_cache_than_the_budget(compared: Done) -> None:
    for row in compared.json["rows"]:
        assert 0.9 * 32 <= row["cached_values"] <= 32, row
        rank, keys = row["kv_lora_rank"], {"exact-rope": 0, "decoupled": 1, "partial-rope": 2}[row["form"]]
        ranks = rank if isinstance(rank, list) else [rank] * 3
        assert row["cached_values"] == sum(ranks) / 3 + keys * row["qk_rope_head_dim"]


def test_allocations_are_those_of_the_methods(compared: Done) -> None:
    for row in compared.json["rows"]:
        if row["method"] in METHOD_ALLOCATION:
            assert row["allocation"] == METHOD_ALLOCATION[row["method"]]
            assert isinstance(row["kv_lora_rank"], list)
        elif row["method"] not in ("joint", "fisher"):
            assert row["allocation"] == "uniform"


def test_care_u_is_svd_llm(compared: Done) -> None:
    care_u, svd_llm = (
        next(row for row in compared.json["rows"] if row["form"] == "exact-rope" and row["method"] == method)
        for method in ("care-u", "svd-llm")
    )
    assert care_u["perplexity"] == pytest.approx(svd_llm["perplexity"], rel=0.01)


def test_the_table_shows_every_row(compared: Done) -> None:
    lines = [line.split() for line in compared.out.splitlines()]
    shown = [(words[0], words[1]) for words in lines if len(words) == 9]
    assert ("original", "-") in shown
    assert {(row["method"], row["form"]) for row in compared.json["rows"]} <= set(shown)


@pytest.mark.parametrize("family", ["qwen3", "olmo2"])
def test_models_with_qk_norm(family: str, tmp_path: Path) -> None:
    done = care(make_input(tmp_path, family=family), *COMPARE)
    assert done.code == 0, done.err
    possible = METHODS if family == "qwen3" else {"exact-rope": METHODS["exact-rope"]}
    assert [(row["method"], row["form"]) for row in done.json["rows"]] == [
        (method, form) for form, methods in possible.items() for method in methods
    ]
    assert all(math.isfinite(row["kl"]) and row["kl"] > 0 for row in done.json["rows"])
    told = "need healing: the QK-norm" if family == "qwen3" else "is left out: its QK-norm"
    for form in ("decoupled", "partial-rope"):
        assert any(f"--form {form}" in text and told in text for text in done.json["warnings"])


def test_filters_and_the_same_numbers_again(folder: Path, compared: Done) -> None:
    done = care(folder, *COMPARE, "--methods", "fisher,svd,care-e", "--form", "exact-rope")
    assert done.code == 0, done.err
    assert [(row["method"], row["form"]) for row in done.json["rows"]] == [
        (method, "exact-rope") for method in ("fisher", "svd", "care-e")
    ]
    assert done.json["original"] == compared.json["original"]
    assert "Statistics, forward and backward 6/6" in done.err
    expected = {(row["method"], row["form"]): row for row in compared.json["rows"]}
    for row in done.json["rows"]:
        same = expected[(row["method"], row["form"])]
        assert {**row, "seconds": 0} == {**same, "seconds": 0}


def test_without_a_text_the_held_out_one_is_measured(folder: Path) -> None:
    done = care(folder, "compare", "model", "--calibration", "calibration.txt", *FAST, "--methods", "svd")
    assert done.code == 0, done.err
    assert done.json["text"]["name"] == "held-out calibration text"
    assert len(done.json["rows"]) == 1
