"""`care bench`: rows with medians, of original and converted side by side."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest

from e2e.command import CARE, ENVIRONMENT, Done, care
from e2e.conftest import Conversion


def measured(converted: Conversion, *words: str) -> Done:
    done = care(converted.folder, "bench", *words, "--device", "cpu")
    assert done.code == 0, done.err
    assert done.json["format"] == "care-mla/bench/1"
    for row in done.json["rows"]:
        assert row["median"] == median(row["values"])
        assert row["spread"] >= 0
    return done


def test_decode_times_both_models_in_one_run(converted: Conversion) -> None:
    words = ("--context", "16,64", "--new-tokens", "4", "--repeats", "3", "--batch-size", "2")
    done = measured(converted, "decode", "model", "OUT", *words)
    rows = done.json["rows"]
    found = [(row["model"], row["context"], row["metric"]) for row in rows]
    models, contexts, metrics = ("model", "OUT"), (16, 64), ("prefill", "decode")
    assert sorted(found) == sorted((m, c, k) for m in models for c in contexts for k in metrics)
    assert all(len(row["values"]) == 3 and row["median"] > 0 for row in rows)
    assert all(row["ratio"] == 1 for row in rows if row["model"] == "model")
    assert "tokens per second" in done.out


def test_memory_counts_what_is_cached(converted: Conversion) -> None:
    done = measured(converted, "memory", "model", "OUT", "--context", "16,64", "--batch-size", "2")
    found = {(row["model"], row["context"], row["metric"]): row for row in done.json["rows"]}
    cached = converted.done.json["cached_values"]
    layers = len(converted.done.json["layers"])
    for name, kind in (("model", "original"), ("OUT", "converted")):
        for context in (16, 64):
            # float32, two sequences
            assert found[name, context, "cache"]["median"] == 2 * context * layers * cached[kind] * 4
            assert found[name, context, "peak"]["median"] > 2**20
    assert found["OUT", 64, "cache"]["ratio"] == cached["converted"] / cached["original"]


def test_convert_times_every_stage_and_leaves_nothing(converted: Conversion, tmp_path: Path) -> None:
    recipe = tmp_path / "fast.yaml"
    recipe.write_text(f"calibration: {converted.folder}/calibration.txt\ncalibration-tokens: 1024\n")
    words = ("--conversion", str(recipe), "--scratch", str(tmp_path))
    done = measured(converted, "convert", "model", *words)
    rows = done.json["rows"]
    assert done.json["conversion"] == recipe.read_text()
    seconds = {row["metric"]: row["median"] for row in rows if row["unit"] == "seconds"}
    assert {"calibrate", "factor", "export", "verify"} <= seconds.keys()
    assert seconds["all"] == pytest.approx(sum(seconds.values()) - seconds["all"])
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_conversion_that_cannot_be_made_names_its_option(converted: Conversion, tmp_path: Path) -> None:
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("bugdet: 0.5\n")
    done = care(converted.folder, "bench", "convert", "model", "--conversion", str(recipe))
    assert done.code == 2
    assert f"--conversion {recipe}" in done.err
    assert "'budget'" in done.err


def test_an_interrupted_measurement_leaves_nothing_and_says_so(converted: Conversion, tmp_path: Path) -> None:
    words = ("bench", "convert", "model", "--scratch", str(tmp_path), "--device", "cpu")
    process = subprocess.Popen(
        [CARE, *words], cwd=converted.folder, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
        # Background jobs of a shell ignore the signal, and hand that on to their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing was kept" in err
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_says_what_to_try(converted: Conversion) -> None:
    done = care(converted.folder, "bench", "memory", "model", "--context", "64", "--batch-size", "999999999")
    assert done.code == 2
    assert "--context" in done.err


def test_decode_that_does_not_fit_says_what_to_try(converted: Conversion) -> None:
    done = care(converted.folder, "bench", "decode", "model", "--context", "64", "--batch-size", "999999999")
    assert done.code == 2
    assert "--batch-size 999999999" in done.err
    assert "Traceback" not in done.err


def test_more_new_tokens_than_a_model_has_are_refused(converted: Conversion) -> None:
    done = care(converted.folder, "bench", "decode", "model", "--new-tokens", "1024")
    assert done.code == 2
    assert "--new-tokens 1024" in done.err


def test_memory_goes_to_the_end_of_the_context_and_says_what_it_measured(
    converted: Conversion, tmp_path: Path
) -> None:
    # Of the same last name, in another folder, and with a file that no process may take for a module.
    (tmp_path / "elsewhere").mkdir()
    for name in ("OUT", "elsewhere/OUT"):
        (tmp_path / name).symlink_to(converted.output)
    (tmp_path / "random.py").write_text("raise SystemExit('not a module')")
    here = replace(converted, folder=tmp_path)
    done = measured(here, "memory", "OUT", "elsewhere/OUT", "--context", "1024", "--dtype", "bfloat16")
    assert done.json["dtype"] == "bfloat16"
    assert "elsewhere/OUT" in done.out
    assert "Measured once" in done.out
