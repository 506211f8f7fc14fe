"""Converts by the recipes matching-*.yaml, without and with block matching, and measures both.

    python benchmarks/healing/match.py mix --wiki wiki.valid.raw --alpaca alpaca.json --text mix.txt
    python benchmarks/healing/match.py decoupled-0.5 exact-rope-0.5 --text mix.txt --work WORK \
        --perplexity wiki.test.raw

A row ends in matching-ROW.json beside its recipe. All share one calibration in WORK, and the same command
goes on where it was stopped. Rows whose name ends in -self read no text: the model writes it.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from care_mla import ConvertConfig, console, convert
from care_mla.evaluate.agreement import room_for_states
from care_mla.evaluate.models import head_of, open_model
from care_mla.evaluate.perplexity import score_blocks, summarise, token_blocks
from care_mla.recipe import read_recipe
from care_mla.versions import versions
from care_mla.workspace import read_json, write_json

HERE = Path(__file__).parent
ROWS = sorted(path.stem.removeprefix("matching-") for path in HERE.glob("matching-*.yaml"))
KEPT = ("kv_lora_rank", "qk_rope_head_dim", "form", "method", "allocation", "profile", "cached_values")
ARTICLE = re.compile(r"\n(?= = [^=].*[^=] = \n)")


def mix(wiki: Path, alpaca: Path, text: Path) -> None:
    """Write a text of whole articles, each followed by as many characters of instructions and answers."""
    records: Iterator[str] = (
        "\n".join(part for part in (row["instruction"], row["input"], row["output"]) if part)
        for row in json.loads(alpaca.read_text(encoding="utf-8"))
    )
    parts = []
    for article in ARTICLE.split(wiki.read_text(encoding="utf-8-sig")):
        parts.append(article.strip())
        added = 0
        while added < len(article) and (record := next(records, None)) is not None:
            parts.append(record)
            added += len(record)
    text.write_text("\n\n".join(parts), encoding="utf-8")


def convert_once(output: Path, options: dict[str, Any]) -> dict[str, Any]:
    """The result of a conversion, with the seconds that it took and those of this process's threads."""
    path = output.with_name(f"{output.name}.json")
    if not path.exists():
        start, cpu_start = time.perf_counter(), time.process_time()
        body = convert(ConvertConfig(**options, output=output, overwrite=True))
        seconds = {
            "seconds": round(time.perf_counter() - start, 1),
            "cpu_seconds": round(time.process_time() - cpu_start, 1),
            "threads": torch.get_num_threads(),
        }
        write_json(path, body | seconds)
    return read_json(path)


def perplexities(models: tuple[str, ...], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Perplexity of every model, with KL and agreement to the first, as `care evaluate` has them."""
    found: list[dict[str, Any]] = []
    states, first = None, None
    with tempfile.TemporaryDirectory() as folder:
        for name in models:
            opened = open_model(name, device=torch.device("cpu"), trust_remote_code=False)
            model = opened.load()
            blocks_BL = token_blocks(
                opened.tokenizer, options.perplexity, block=1024, max_tokens=options.max_tokens
            )
            keep = (
                room_for_states(Path(folder) / "states", head_of(model), blocks_BL)
                if states is None
                else None
            )
            with console.current().progress(f"Perplexity of {name}", len(blocks_BL)) as progress:
                scores = score_blocks(model, blocks_BL, keep=keep, original=states, advance=progress.advance)
            found.append(summarise(scores, first))
            states, first = states or keep, first or scores
    return found


def measure_row(name: str, options: argparse.Namespace) -> None:
    """One row: the original and both conversions in one run."""
    recipe = read_recipe(HERE / f"matching-{name}.yaml")
    if not name.endswith("-self"):
        recipe["calibration"] = str(options.text)
    work = options.work / Path(recipe.get("calibration", "self")).stem
    folders = {kind: options.work / f"{name}-{kind}" for kind in ("before", "after")}
    common = {"model": options.model, "work": work}
    before = convert_once(folders["before"], recipe | common | {"match_steps": 0, "match_tokens": None})
    after = convert_once(folders["after"], recipe | common)
    models = (options.model, *map(str, folders.values()))
    original, *others = perplexities(models, options)
    body = {
        "format": "care-mla/matching-benchmark/2",
        "versions": versions(),
        "model": options.model,
        "calibration": "self" if "calibration" not in recipe else Path(recipe["calibration"]).name,
        **{key: after[key] for key in KEPT},
        "match": after["match"],
        "perplexity_text": f"{options.max_tokens:,} tokens of {options.perplexity.name}, blocks of 1,024",
        "original": original,
        "before": others[0],
        "after": others[1],
        "threads": after["threads"],
        # The second conversion reads the calibration of the first.
        **{
            key: {"without matching": before[key], "with matching": after[key]}
            for key in ("seconds", "cpu_seconds", "stages")
        },
        "layers": [row["match"] for row in after["layers"]],
    }
    write_json(HERE / f"matching-{name}.json", body)
    ratios = [row["value"] / original["value"] for row in others]
    console.current().note(f"{name}: {ratios[0]:.4f} before, {ratios[1]:.4f} after")


def main() -> None:
    """Do what is named, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*ROWS, "mix"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", type=Path, help="what mix writes and rows read")
    parser.add_argument("--wiki", type=Path)
    parser.add_argument("--alpaca", type=Path)
    parser.add_argument("--perplexity", type=Path, help="text to measure on")
    parser.add_argument("--max-tokens", type=int, default=16_384)
    parser.add_argument("--work", type=Path, help="folder for everything that a run keeps")
    options = parser.parse_args()
    for what in options.what:
        if what == "mix":
            mix(options.wiki, options.alpaca, options.text)
        else:
            measure_row(what, options)


if __name__ == "__main__":
    main()
