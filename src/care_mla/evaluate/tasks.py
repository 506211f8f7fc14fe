"""Multiple-choice tasks: the paper's set by name, any other of lm-eval's, and local files.

Whatever a task comes from, lm-eval builds its prompts, scores its choices and computes its metrics
(harness.py), so scores are lm-eval's own. lm-eval is imported only when tasks are asked for.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from care_mla.errors import OptionError, TaskError
from care_mla.evaluate.paired import difference
from care_mla.evaluate.task_files import Item, read_task_file
from care_mla.evaluate_config import TASK_SUFFIXES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The paper's names, lm-eval's, and lm-eval's folder of each: its whole index takes nine seconds to read.
PAPER_TASKS: dict[str, tuple[str, str]] = {
    "arc-challenge": ("arc_challenge", "arc"),
    "arc-easy": ("arc_easy", "arc"),
    "hellaswag": ("hellaswag", "hellaswag"),
    "piqa": ("piqa", "piqa"),
    "mmlu": ("mmlu", "mmlu/default"),
    "openbookqa": ("openbookqa", "openbookqa"),
    "race": ("race", "race"),
    "winogrande": ("winogrande", "winogrande"),
}


@dataclass(frozen=True)
class Task:
    """A task whose items have been read, ready to be asked.

    Attributes:
        name: as results call it.
        loaded: what lm-eval's `TaskManager.load` gives: its tasks, and the groups of a group.
        about: what the JSON tells of it: where its items come from, and how they are asked.
    """

    name: str
    loaded: dict[str, Any]
    about: dict[str, Any]


@dataclass(frozen=True)
class TaskScores:
    """One model on one task.

    Attributes:
        metrics: by lm-eval's names, `acc` and `acc_norm` among them, each with its `_stderr`.
        correct: by the same names, 1 or 0 for each item (X,).
        chance: what guessing would score.
        example: the first item as the model read it.
    """

    metrics: dict[str, float | None]
    correct: dict[str, Tensor]
    chance: float
    example: dict[str, Any] = field(default_factory=dict)


def prepare_tasks(names: Sequence[str]) -> list[Task]:
    """Read the items of all tasks, before any model is loaded.

    Raises:
        OptionError: lm-eval is not installed.
        TaskError: a file or a record of it is not as it should be, or there is no such task.
    """
    if not names:
        return []
    # One message for whatever of it is missing: lm-eval needs datasets itself.
    if importlib.util.find_spec("lm_eval") is None or importlib.util.find_spec("datasets") is None:
        raise OptionError(
            f"--tasks {','.join(names)}: tasks are scored by lm-eval, which is not installed here. "
            "Install the extra 'eval' (some 600 MB): pip install 'care-mla[eval]'"
        )
    files = {name: read_task_file(Path(name)) for name in names if Path(name).suffix in TASK_SUFFIXES}
    return [_file_task(Path(name), files[name]) if name in files else _named_task(name) for name in names]


def score_tasks(
    tasks: Sequence[Task],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: int | None,
) -> dict[str, TaskScores]:
    """Ask a model all tasks.

    Args:
        max_length: longer prompts are cut from the left, as lm-eval does.
        limit: the first so many items of each task, and of each part of a group.
    """
    from care_mla.evaluate.harness import score

    return {task.name: score(task, model, tokenizer, max_length=max_length, limit=limit) for task in tasks}


def summarise_task(task: Task, scores: TaskScores, original: TaskScores | None) -> dict[str, Any]:
    """What the JSON says of a model and a task; differences are over the same items."""
    summary: dict[str, Any] = dict(scores.metrics)
    summary["items"] = max(len(correct_X) for correct_X in scores.correct.values())
    summary["chance"] = scores.chance
    if original is not None:
        summary["difference"] = {
            name: difference(correct_X, original.correct[name]) for name, correct_X in scores.correct.items()
        }
    return summary | task.about | {"example": scores.example}


def _file_task(path: Path, items: list[Item]) -> Task:
    from care_mla.evaluate.harness import load_items

    about = {
        "source": path.name,
        "content_hash": hashlib.sha256(path.read_bytes()).hexdigest()[:16],
        "prompt": " or ".join(dict.fromkeys(item.form for item in items)),
        "choice": " {choice}",
        "num_fewshot": 0,
    }
    return Task(path.stem, load_items(path.stem, items), about)


def _named_task(name: str) -> Task:
    from care_mla.evaluate.harness import about_named, load_named

    known = PAPER_TASKS.get(name.lower().replace("_", "-"))
    loaded = load_named(*known) if known else load_named(name, None)
    wrong = [key for key, task in loaded["tasks"].items() if task.OUTPUT_TYPE != "multiple_choice"]
    if wrong:
        raise TaskError(
            f"--tasks {name}: {', '.join(wrong[:3])} is not multiple choice, and only that is scored here. "
            "Run it with lm-eval itself."
        )
    if len(loaded["tasks"]) > 1 and not loaded.get("groups"):
        raise TaskError(
            f"--tasks {name} stands for several tasks without a score of its own. Name those you want: "
            f"--tasks {','.join(loaded['tasks'])}"
        )
    return Task(name, loaded, about_named(loaded))
