"""Mixes texts in equal parts for calibration; a work folder stands for the text that the model wrote there.

    python benchmarks/calibration/mix.py alpaca.json wiki.valid.txt --output mixed.txt

`care` cuts calibration blocks evenly from all over a text, so each part gives as many blocks, and the
covariance is the mean of the parts' covariances.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors import safe_open

from care_mla.calibrate.text import read_text_file, thin
from care_mla.checkpoint.opening import open_source


def written_text(work: Path, model: str) -> str:
    """What the model wrote itself in a work folder, a blank line between two sequences."""
    with safe_open(work / "tokens.safetensors", "pt") as file:
        sequences = file.get_tensor("short").tolist()
    tokenizer = open_source(model).tokenizer()
    return "\n\n".join(tokenizer.decode(sequence, skip_special_tokens=True) for sequence in sequences)


def main() -> None:
    """Cut every text down to the length of the shortest, from all over it, and write them one by one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", type=Path, nargs="+")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    texts = [
        written_text(path, arguments.model) if path.is_dir() else read_text_file(path)
        for path in arguments.parts
    ]
    length = min(map(len, texts))
    parts = [thin(text, length) for text in texts]
    arguments.output.write_text("\n\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
