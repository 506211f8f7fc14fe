"""Perplexity of healed folders by transformers alone: blocks of 2,048 tokens, as in run.py.

    python benchmarks/healing/plain.py WORK wiki.test.raw alpaca-held-out.json

Checks the rows' figures from outside: only the text is read by our own code. Folders that need our own class
are not for it. Writes plain.json.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from care_mla.calibrate.text import read_text
from care_mla.workspace import write_json

HERE = Path(__file__).parent
BLOCK, TOGETHER = 2048, 4
ALL = 10**9


def perplexity(folder: Path, text: str) -> float:
    """That of all whole blocks, where the first token of each is not counted."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]
    blocks_BL = torch.tensor(ids[: len(ids) // BLOCK * BLOCK], device=device).view(-1, BLOCK)
    total = 0.0
    with torch.no_grad():
        for batch_BL in blocks_BL.split(TOGETHER):
            logits_TS = model(batch_BL, use_cache=False).logits[:, :-1].flatten(0, 1)
            labels_T = batch_BL[:, 1:].flatten()
            total += torch.nn.functional.cross_entropy(logits_TS, labels_T, reduction="sum").item()
    return math.exp(total / (len(blocks_BL) * (BLOCK - 1)))


def main() -> None:
    """All rows of a work folder that stock classes load."""
    work, *texts = map(Path, sys.argv[1:])
    rows = {}
    for folder in sorted(work.glob("*/healed")):
        if not list(folder.glob("*.py")):
            values = {text.stem: perplexity(folder, _read(text)) for text in texts}
            rows[folder.parent.name] = values
    write_json(HERE / "plain.json", {"format": "care-mla/healing-plain/1", "perplexity": rows})


def _read(path: Path) -> str:
    return read_text(str(path), tokens=ALL).text


if __name__ == "__main__":
    main()
