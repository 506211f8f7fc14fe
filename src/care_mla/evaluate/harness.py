"""lm-eval's side of tasks: a model and items handed to it, and its scores taken back.

The only module that imports lm-eval; it is imported when tasks are asked for.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval.api.task
import lm_eval.tasks
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from care_mla import console
from care_mla.errors import TaskError
from care_mla.evaluate.paired import items as as_items
from care_mla.evaluate.paired import mean_of
from care_mla.evaluate.task_files import Item
from care_mla.evaluate.tasks import Task, TaskScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of log-probabilities that a batch of prompts takes; lm-eval makes them for every token of the vocabulary.
BATCH_BYTES = 2**29
MOST_PROMPTS = 16
METRICS = ("acc", "acc_norm")

logging.getLogger("lm_eval").setLevel(logging.ERROR)
# lm-eval has no switch for this bar, and progress is the console's.
lm_eval.api.task.tqdm = partial(tqdm, disable=True)


def load_items(name: str, items: Sequence[Item]) -> dict[str, Any]:
    """Items as a task of lm-eval, built in memory."""
    records = [{"prompt": item.prompt, "choices": item.choices, "gold": item.gold} for item in items]
    config = {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(records)},
        "test_split": "test",
        "output_type": "multiple_choice",
        # Names of fields, which lm-eval takes as they are; a template would read braces in a question.
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS
        ],
        "metadata": {"version": 1},
    }
    return {"tasks": {name: lm_eval.api.task.ConfigurableTask(config=config)}}


def load_named(name: str, folder: str | None) -> dict[str, Any]:
    """A task or group of lm-eval by its name; its data set is downloaded if it is not in the local cache.

    Args:
        folder: the one of lm-eval's folders that defines it; None: all are looked through.
    """
    root = Path(lm_eval.tasks.__file__).parent
    if folder is None:
        console.current().step(f"Looking for {name} among the tasks of lm-eval")
        manager = lm_eval.tasks.TaskManager()
    else:
        manager = lm_eval.tasks.TaskManager(include_path=root / folder, include_defaults=False)
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        raise TaskError(
            f"--tasks {name}: lm-eval has no such task, and there is no such file. "
            + (
                f"Perhaps you meant {' or '.join(near)}."
                if near
                else "A file's name ends in .json or .jsonl."
            )
        )
    try:
        return dict(manager.load([name]))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TaskError(
            f"--tasks {name}: its data set cannot be had ({_first_line(error)}). It comes from the hub: "
            "connect once, or give a file of items: --tasks FILE.json"
        ) from error


def about_named(loaded: dict[str, Any]) -> dict[str, Any]:
    """Where a task's items come from and how they are asked, by its first part."""
    first = next(iter(loaded["tasks"].values()))
    config = first.config
    return {
        "source": ":".join(filter(None, (config.dataset_path, config.dataset_name))),
        "version": str(first.VERSION),
        "prompt": config.doc_to_text if isinstance(config.doc_to_text, str) else "of lm-eval, see example",
        "choice": f"{config.target_delimiter}{{choice}}",
        "num_fewshot": config.num_fewshot or 0,
    }


def score(
    task: Task,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    limit: int | None,
) -> TaskScores:
    """Ask a model the items of a task, and take lm-eval's metrics."""
    for part in task.loaded["tasks"].values():
        part.set_fewshot_seed(0)
    language_model = _CountingModel(task.name, model, tokenizer, max_length)
    found = evaluate(language_model, task.loaded, limit=limit)
    # A group's own row is the mean over its items; lm-eval calls each metric "acc,none".
    groups = task.loaded.get("group_map") or {}
    inner = {child for children in groups.values() for child in children}
    (row,) = [found["results"][name] for name in (groups or task.loaded["tasks"]) if name not in inner]
    metrics = {key.split(",")[0]: value for key, value in row.items() if key.split(",")[0] != "alias"}
    kept = {
        name: float(value) if isinstance(value, int | float) else None
        for name, value in metrics.items()
        if name.removesuffix("_stderr") in METRICS
    }
    samples = [sample for part in found["samples"].values() for sample in part]
    correct = {name: as_items([sample[name] for sample in samples]) for name in METRICS if name in samples[0]}
    for name, correct_X in correct.items():
        if name not in kept:  # of a group that lm-eval gives no score
            kept[name], kept[f"{name}_stderr"] = mean_of(correct_X)
    chance = sum(1 / len(sample["arguments"]) for sample in samples) / len(samples)
    prompt = samples[0]["arguments"][0][0]
    example = {"prompt": prompt, "choices": [choice for _, choice in samples[0]["arguments"]]}
    return TaskScores(kept, correct, chance, example)


class _CountingModel(HFLM):
    """lm-eval's model over one of ours, with the console's progress and batches that fit in memory."""

    def __init__(
        self, title: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int
    ) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, backend="causal", max_length=max_length, batch_size=1
        )
        self._title = title
        self._advance: Callable[[int], None] = lambda n: None
        # lm-eval tells its hook of every choice that it has scored.
        self.set_cache_hook(_Hook())

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        longest = max(len(self.tok_encode("".join(request.args[:2]))) for request in requests)
        row_bytes = 4 * self.model.config.vocab_size * min(longest, self.max_length)
        self.batch_size_per_gpu = max(1, min(MOST_PROMPTS, BATCH_BYTES // row_bytes))
        with console.current().progress(self._title, len(requests)) as progress:
            self._advance = progress.advance
            scores = super().loglikelihood(requests, disable_tqdm=True)
            self._show()
        return scores

    def _model_call(self, *args: Any, **kwargs: Any) -> Any:
        self._show()
        return super()._model_call(*args, **kwargs)

    def _show(self) -> None:
        """Show what was scored since the last batch."""
        if self.cache_hook.scored:
            self._advance(self.cache_hook.scored)
            self.cache_hook.scored = 0


class _Hook:
    """Counts what lm-eval has scored; in lm-eval such a hook fills a cache."""

    def __init__(self) -> None:
        self.scored = 0

    def add_partial(self, attr: str, req: object, res: object) -> None:
        """Count one."""
        self.scored += 1


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
