"""Converts, heals and measures the rows of README.md, or heals from several initialisations.

    python benchmarks/healing/run.py sample half-64-128 quarter --work WORK --perplexity wiki.test.raw \
        --perplexity alpaca-held-out.json [--results FOLDER] [-- options of care heal]
    python benchmarks/healing/run.py sample init --work WORK

Every step is kept in WORK, and the same command goes on from there, so that a limit on the time of a call
costs nothing but what came after the last checkpoint. Rows may run side by side, on GPUs of their own, each
with a WORK of its own, on the text that `sample` wrote in one of them: --data FILE.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from care_mla import console
from care_mla.checkpoint.opening import open_source
from care_mla.cli.main import main as care
from care_mla.evaluate.run import evaluate
from care_mla.evaluate_config import EvaluateConfig
from care_mla.heal.curves import healing_figure
from care_mla.heal.engine import make_accelerator
from care_mla.heal.sizes import Sizes
from care_mla.heal.texts import sample_text
from care_mla.heal_config import HealConfig
from care_mla.versions import versions
from care_mla.workspace import Workspace, read_json, write_json, write_text

HERE = Path(__file__).parent
ROW_FORMAT = "care-mla/healing-row/1"
KEEP_EVERY = 10
ROWS = sorted(path.parent.name for path in HERE.glob("*/convert.yaml") if path.parent.name != "init")
# Methods and their forms, at the same cached values.
INITIALISATIONS = {
    "fisher": "decoupled",
    "care-u": "decoupled",
    "transmla": "decoupled",
    "mha2mla-joint": "partial-rope",
}


def sample(options: argparse.Namespace) -> Path:
    """Let the original write text for all rows; returns its file."""
    config = HealConfig(model=options.work, output=options.work, teacher=options.model)
    sizes = Sizes(options.sequence_length, options.tokens, 0, 1, 1, 1, 1)
    accelerator = make_accelerator(config, options.work)
    return sample_text(open_source(options.model), config, Workspace(options.work), accelerator, sizes)


def convert_and_heal(name: str, options: argparse.Namespace, recipes: Path, *extra: str) -> dict[str, Any]:
    """Convert and heal by two recipes; what is done already is not done again.

    Args:
        name: of the folder in the work folder.
        recipes: the folder that holds them.
        extra: more options of the conversion.
    """
    work = options.work / name
    converted, healed = work / "converted", work / "healed"
    if not (work / "convert.json").exists():
        words = ("--work", str(options.work / "calibration"), "--json", str(work / "convert.json"), *extra)
        recipe = ("--recipe", str(recipes / "convert.yaml"), "--overwrite")
        run("convert", options.model, str(converted), *recipe, *options.convert, *words)
    if not (work / "heal.json").exists():
        words = tuple(word for text in options.data for word in ("--data", text))
        words = ("--teacher", options.model, "--json", str(work / "heal.json"), *words, *options.heal)
        recipe = ("--recipe", str(recipes / "heal.yaml"), "--overwrite")
        run("heal", str(converted), str(healed), *recipe, *words)
    return {"convert": read_json(work / "convert.json"), "heal": read_json(work / "heal.json")}


def run(command: str, *words: str) -> None:
    """A command of care, as a user types it.

    Raises:
        SystemExit: it did not end well.
    """
    console.current().step(f"care {command} {' '.join(words)}")
    if code := care([command, *words]):
        raise SystemExit(code)


def measure_row(name: str, options: argparse.Namespace) -> None:
    """One row of the table: the original, the conversion and the healed model measured in one run."""
    result = options.results / f"{name}.json" if options.results else HERE / name / "result.json"
    start = time.perf_counter()
    body: dict[str, Any] = {"format": ROW_FORMAT, "row": name, "versions": versions()}
    body |= convert_and_heal(name, options, HERE / name)
    write_json(result, kept(body, options))
    if options.perplexity:
        models = (options.model, *(str(options.work / name / kind) for kind in ("converted", "healed")))
        texts = tuple(options.perplexity)
        config = EvaluateConfig(
            models=models, perplexity=texts, block=options.block, max_tokens=options.max_tokens
        )
        body |= evaluate(config)
        rows = []
        for text in body["models"][0]["perplexity"]:
            values = [model["perplexity"][text]["value"] for model in body["models"]]
            rows.append([text, *values, *(value / values[0] for value in values[1:])])
        columns = ["text", "original", "converted", "healed", "converted, ratio", "healed, ratio"]
        console.current().table(name, columns, rows)
    body["seconds"] = round(time.perf_counter() - start, 3)
    write_json(result, kept(body, options))
    draw_rows(result.parent if options.results else HERE, options)
    console.current().note(f"Written: {result}")


def kept(body: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """What of a row is kept: every tenth step, nothing of single layers, and no places of a machine."""
    convert = {key: value for key, value in body["convert"].items() if key not in ("layers", "export")}
    heal = body["heal"] | {"steps": body["heal"]["steps"][::KEEP_EVERY]}
    text = json.dumps(body | {"convert": convert, "heal": heal})
    return json.loads(text.replace(f"{options.work}/", "").replace(options.model, Path(options.model).name))


def draw_rows(folder: Path, options: argparse.Namespace) -> None:
    """The learning curves of all rows that are there, in one figure."""
    pattern = "*.json" if options.results else "*/result.json"
    rows = [read_json(path) for path in sorted(folder.glob(pattern))]
    histories = {row["row"]: row["heal"] for row in rows if row["format"] == ROW_FORMAT}
    write_text(folder / "curves.svg", healing_figure(histories))


def compare_initialisations(options: argparse.Namespace) -> None:
    """Heal from several methods with the same steps, and draw all curves in one figure."""
    folder = options.results or HERE / "init"
    histories: dict[str, Any] = {}
    for method, form in INITIALISATIONS.items():
        done = convert_and_heal(f"init-{method}", options, HERE / "init", "--method", method, "--form", form)
        keys = ("tokens_per_step", "best_step", "held_out", "measurements", "training_seconds", "device")
        histories[method] = {
            "form": form,
            "kv_lora_rank": done["convert"]["kv_lora_rank"],
            "qk_rope_head_dim": done["convert"]["qk_rope_head_dim"],
            "cached_values": done["convert"]["cached_values"]["converted"],
            **{key: done["heal"][key] for key in keys},
        }
        versions = done["heal"]["versions"]
        body = {"format": "care-mla/healing-initialisations/1", "versions": versions, "methods": histories}
        write_json(folder / "init.json", body)
        write_text(folder / "init.svg", healing_figure(histories))


def main() -> None:
    """Do what is named, in order."""
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", nargs="+", choices=[*ROWS, "init", "sample"])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything that a run keeps")
    parser.add_argument("--results", type=Path, help="folder for JSON; default: each row's own")
    parser.add_argument("--perplexity", type=Path, action="append", default=[])
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--data", action="append", default=[], help="as in care heal; default: self")
    parser.add_argument("--tokens", type=int, default=4_194_304, help="of sample")
    parser.add_argument("--sequence-length", type=int, default=1024, help="of sample")
    parser.add_argument("--convert", action="append", default=[], help="a word more for care convert")
    options = parser.parse_args(words[:cut])
    options.heal = words[cut + 1 :]
    for what in options.what:
        if what == "sample":
            options.data.append(str(sample(options)))
        elif what == "init":
            compare_initialisations(options)
        else:
            measure_row(what, options)


if __name__ == "__main__":
    main()
