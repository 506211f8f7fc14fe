"""The real model: half of its cache, loaded by stock transformers, and still a language model."""

from __future__ import annotations

import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from e2e.command import ENVIRONMENT, care

STOCK = """
import sys
sys.modules["care_mla"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The capital of France is", return_tensors="pt")
text = tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0])
print(type(model).__name__, model.config.kv_lora_rank + model.config.qk_rope_head_dim, text, sep="|")
"""


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_demo_model_at_half_of_its_cache(tmp_path: Path) -> None:
    """A quarter of the default calibration, to save minutes; quality at full size is benchmarked."""
    text = files("care_mla") / "demo_text.txt"
    (tmp_path / "text.txt").write_text(text.read_text(encoding="utf-8"))
    options = ("--budget", "0.5", "--calibration-tokens", "2048", "--device", "cpu")
    done = care(tmp_path, "convert", "demo", "OUT", *options)
    assert done.code == 0, done.err
    assert done.json["cached_values"] == {"original": 384, "converted": 192}
    assert done.json["verify"]["relative_error"] < 1e-4
    assert done.json["verify"]["greedy_equal"]
    assert done.json["verify"]["cached_values"] == 192
    stock = subprocess.run(
        [sys.executable, "-I", "-c", STOCK, str(tmp_path / "OUT")],
        env=ENVIRONMENT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    name, cached, answer = stock.stdout.strip().split("|", 2)
    assert (name, cached) == ("DeepseekV3ForCausalLM", "192")
    assert "Paris" in answer
    measured = care(
        tmp_path, "evaluate", "demo", "OUT", "--perplexity", "text.txt", "--block", "512", "--device", "cpu"
    ).json["models"]
    original, converted = (row["perplexity"]["text"]["value"] for row in measured)
    # Plain SVD at this cache is a thousand times the original.
    assert original < converted < 2.5 * original
