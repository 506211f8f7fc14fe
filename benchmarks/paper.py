"""The runs behind these folders that a CPU can do, as `care` commands: `make bench-paper` does them all.

    python benchmarks/paper.py --perplexity wiki.test.raw --alpaca alpaca.json --wikitext wiki.valid.txt
    python benchmarks/paper.py … --only allocation covariance   # some of the folders
    python benchmarks/paper.py … --list                         # print the commands, and do nothing

Writes to the folder `bench-paper` (--output): JSON under the names that it has here, calibration and models
under `work`. What is there already is not done again.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from care_mla.workspace import read_json, write_json

HERE = Path(__file__).parent
FOLDERS = ("one-shot", "allocation", "covariance", "calibration", "paper-table-1")
BUDGETS = (0.75, 0.5, 0.25, 0.125)
SEEDS = (0, 1, 2)
# Where one thing is varied, nothing else is chosen.
UNIFORM = ("--form", "exact-rope", "--allocation", "uniform")
# Methods of the paper's one-shot tables, and ours beside them. SVD-LLM is care-u at equal damping, and groups
# of heads (palu) make no difference to a model with three KV heads.
TABLE_1 = {
    "exact-rope": "svd,asvd,care-u,care-e,care-e-code,fisher",
    "partial-rope": "mha2mla-joint,mha2mla-split",
}
TASK_MODELS = ("svd", "asvd", "care-u", "care-e", "fisher")
# Source, tokens, tokens of a sequence.
CALIBRATIONS = (
    ("alpaca", 8192, 32),
    ("alpaca", 8192, 256),
    ("wikitext", 8192, 256),
    ("alpaca+wikitext", 8192, 256),
    ("alpaca", 2048, 256),
    ("alpaca", 8192, 1024),
    ("self+alpaca+wikitext", 8192, 256),
    ("alpaca", 16384, 256),
)


@dataclass(frozen=True)
class Texts:
    """Files that the project does not ship."""

    perplexity: Path
    alpaca: Path
    wikitext: Path
    tasks: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Run:
    """One command, the folder here that it is for, and what it leaves in the output folder."""

    folder: str
    target: str
    words: tuple[str, ...]


def runs(texts: Texts, output: Path) -> Iterator[Run]:
    """Every run, each after those whose results it reads."""
    yield from one_shot(texts, output)
    yield from allocation(texts, output)
    yield from damping(texts, output)
    yield from calibration(texts, output)
    yield from table_1(texts, output)
    yield from tasks(texts, output)


def compare(texts: Texts, output: Path, target: str, work: str, *words: str) -> Run:
    """`care compare` on the first 8,192 tokens of the test set, in blocks of 1,024."""
    measured = ("--perplexity", str(texts.perplexity), "--block", "1024", "--max-tokens", "8192")
    folders = ("--work", str(output / "work" / work), "--json", str(output / target))
    return Run(Path(target).parent.name, target, ("care", "compare", "demo", *words, *measured, *folders))


def calibrated(source: str, tokens: int = 8192, length: int = 256) -> tuple[str, ...]:
    """Options of a calibration, the same with a GPU and without."""
    lengths = ("--calibration-tokens", str(tokens), "--sequence-length", str(length))
    return ("--calibration", source, *lengths)


def one_shot(texts: Texts, output: Path) -> Iterator[Run]:
    """All methods in all forms."""
    for seed in SEEDS:
        for budget in BUDGETS:
            options = ("--budget", str(budget), *calibrated("self"), "--seed", str(seed))
            target = f"one-shot/compare-{budget}-seed{seed}.json"
            yield compare(texts, output, target, f"self-seed{seed}", *options)


def allocation(texts: Texts, output: Path) -> Iterator[Run]:
    """The same methods with ranks spread over layers in four ways."""
    for budget in (0.5, 0.25):
        for name in ("uniform", "care-eq1", "care-code", "greedy"):
            options = ("--budget", str(budget), "--allocation", name, *calibrated("self"))
            methods = ("--form", "exact-rope", "--methods", "fisher,care-u")
            yield compare(texts, output, f"allocation/{budget}-{name}.json", "self-seed0", *options, *methods)


def usual(texts: Texts, output: Path, folder: str) -> Run:
    """What others are compared with: text of the model's own, the usual damping, the same rank everywhere."""
    return replace(next(allocation(texts, output)), folder=folder)


def damping(texts: Texts, output: Path) -> Iterator[Run]:
    """How much is added to the diagonal of the covariance."""
    yield usual(texts, output, "covariance")
    for value in (0.0, 0.1, 1.0):
        options = ("--budget", "0.5", "--damping", str(value), *calibrated("self"), *UNIFORM)
        methods = ("--methods", "fisher,care-u")
        yield compare(texts, output, f"covariance/damping-{value}.json", "self-seed0", *options, *methods)


def calibration(texts: Texts, output: Path) -> Iterator[Run]:
    """Other texts, fewer and more tokens, shorter and longer sequences."""
    yield usual(texts, output, "calibration")
    sources = {"alpaca": str(texts.alpaca), "wikitext": str(texts.wikitext)}
    written = str(output / "work" / "self-seed0")
    for source, tokens, length in CALIBRATIONS:
        if "+" in source and source not in sources:
            parts = [written if part == "self" else sources[part] for part in source.split("+")]
            sources[source] = str(output / "work" / f"{source}.txt")
            mix = (sys.executable, str(HERE / "calibration" / "mix.py"), *parts)
            yield Run("calibration", f"work/{source}.txt", (*mix, "--output", sources[source]))
        name = f"{source}-{tokens}x{length}"
        options = ("--budget", "0.5", *calibrated(sources[source], tokens, length), *UNIFORM)
        methods = ("--methods", "fisher,care-u")
        yield compare(texts, output, f"calibration/{name}.json", name, *options, *methods)


def table_1(texts: Texts, output: Path) -> Iterator[Run]:
    """The paper's one-shot protocol: 256 samples of 32 tokens of Alpaca, RoPE exact, K and V apart."""
    options = calibrated(str(texts.alpaca), 8192, 32)
    for budget in (0.5, 0.25):
        for form, methods in TABLE_1.items():
            words = ("--budget", str(budget), *options, "--form", form, "--methods", methods)
            yield compare(texts, output, f"paper-table-1/{form}-{budget}.json", "alpaca-8192x32", *words)


def tasks(texts: Texts, output: Path) -> Iterator[Run]:
    """Accuracies of the paper's protocol at half of the cache, if there are files of questions."""
    if not texts.tasks:
        return
    folders = []
    for method in TASK_MODELS:
        folder = f"work/models/{method}"
        words = ("--budget", "0.5", "--form", "exact-rope", "--method", method, "--profile", "care")
        work = ("--work", str(output / "work" / "alpaca-8192x32"))
        calibration_of = calibrated(str(texts.alpaca), 8192, 32)
        folders.append(str(output / folder))
        yield Run(
            "paper-table-1", folder, ("care", "convert", "demo", folders[-1], *words, *calibration_of, *work)
        )
    target = "paper-table-1/tasks.json"
    files = ",".join(map(str, texts.tasks))
    measured = ("--tasks", files, "--limit", "100", "--json", str(output / target))
    yield Run("paper-table-1", target, ("care", "evaluate", "demo", *folders, *measured))


def remove_questions(path: Path) -> None:
    """Take the examples out of a result of `care evaluate`: questions are not ours to publish."""
    result = read_json(path)
    for model in result["models"]:
        for task in model["tasks"].values():
            del task["example"]
    write_json(path, result)


def main() -> int:
    """Do, or print, the runs asked for; stops at the first that fails and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--perplexity", type=Path, required=True, help="WikiText-2, raw test set")
    parser.add_argument("--alpaca", type=Path, required=True, help="records of Alpaca, JSON")
    parser.add_argument("--wikitext", type=Path, required=True, help="WikiText-2, validation set")
    parser.add_argument("--tasks", type=Path, nargs="*", default=[], help="questions for care evaluate, JSON")
    parser.add_argument("--output", type=Path, default=Path("bench-paper"))
    parser.add_argument("--only", nargs="*", choices=FOLDERS, default=FOLDERS, help="folders of benchmarks")
    parser.add_argument("--list", action="store_true", help="print the commands, and do nothing")
    arguments = parser.parse_args()
    texts = Texts(arguments.perplexity, arguments.alpaca, arguments.wikitext, tuple(arguments.tasks))
    for path in (texts.perplexity, texts.alpaca, texts.wikitext, *texts.tasks):
        if not arguments.list and not path.is_file():
            parser.error(f"{path}: there is no such file. benchmarks/README.md says which files are needed.")
    for run in runs(texts, arguments.output):
        if run.folder not in arguments.only or (arguments.output / run.target).exists():
            continue
        sys.stderr.write(f"{shlex.join(run.words)}\n")
        if arguments.list:
            continue
        (arguments.output / run.target).parent.mkdir(parents=True, exist_ok=True)
        program = [sys.executable, "-m", "care_mla"] if run.words[0] == "care" else [run.words[0]]
        done = subprocess.run([*program, *run.words[1:]], check=False)
        if done.returncode:
            return done.returncode
        if run.words[1] == "evaluate":
            remove_questions(arguments.output / run.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
