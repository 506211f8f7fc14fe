"""Our tasks and word-level perplexity against lm-eval's own runs, and against plain transformers."""
# Shapes: T tokens of a continuation.

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any, NamedTuple

import lm_eval.tasks
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from care_mla.errors import TaskError
from care_mla.evaluate.harness import about_named, load_named, score
from care_mla.evaluate.rolling import rolling_windows, word_perplexity
from care_mla.evaluate.task_files import Item, read_task_file
from care_mla.evaluate.tasks import PAPER_TASKS, Task, TaskScores, prepare_tasks, score_tasks, summarise_task

from pico import pico_model, pico_text

# The same items and prompts as our file's, written as lm-eval's users write a task.
OWN_TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
  cache_dir: {cache}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


class Setting(NamedTuple):
    """A model as plain transformers loads it, and a folder with `model`, `first.jsonl` and `second.jsonl`."""

    folder: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def questions(count: int, seed: int) -> list[dict[str, Any]]:
    """Random questions of two to five choices, of one token or of many."""
    rng = random.Random(seed)
    records = []
    for i in range(count):
        words = pico_text(40, seed=seed * 1000 + i).split()
        choices = [" ".join(words[j * 4 : j * 4 + rng.choice((1, 3))]) for j in range(rng.randint(2, 5))]
        choices = list(dict.fromkeys([*choices, "7"]))
        question = " ".join(words[25:35])
        records.append({"question": question, "choices": choices, "answer": rng.randrange(len(choices))})
    return records


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("tasks")
    pico_model(folder / "model")
    for seed, name in enumerate(("first", "second")):
        lines = [json.dumps(record) for record in questions(30 + 10 * seed, seed)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        values = {"name": name, "file": folder / f"{name}.jsonl", "cache": folder / "cache"}
        (folder / f"{name}.yaml").write_text(OWN_TASK.format(**values))
    group = {"group": "both", "task": ["first", "second"]}
    group["aggregate_metric_list"] = [{"metric": m, "weight_by_size": True} for m in ("acc", "acc_norm")]
    (folder / "both.yaml").write_text(json.dumps(group))
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    return Setting(folder, model, AutoTokenizer.from_pretrained(folder / "model"))


def ours(setting: Setting, *names: str, limit: int | None = None) -> dict[str, tuple[Task, TaskScores]]:
    tasks = prepare_tasks([str(setting.folder / name) for name in names])
    scores = score_tasks(tasks, setting.model, setting.tokenizer, max_length=1024, limit=limit)
    return {task.name: (task, scores[task.name]) for task in tasks}


def choice_log_likelihoods(setting: Setting, item: Item) -> list[float]:
    """By plain transformers: one forward for each choice."""
    context = setting.tokenizer(item.prompt)["input_ids"]
    found = []
    for choice in item.choices:
        ids = setting.tokenizer(f"{item.prompt} {choice}")["input_ids"]
        with torch.no_grad():
            log_LS = setting.model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        places_T = torch.arange(len(context), len(ids))
        found.append(log_LS[places_T - 1, torch.tensor(ids)[places_T]].sum().item())
    return found


def test_scores_are_those_of_lm_evals_own_run(setting: Setting) -> None:
    found = ours(setting, "first.jsonl", "second.jsonl")
    own = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(setting.folder / "model"), "dtype": "float32"},
        tasks=["first", "second"],
        task_manager=TaskManager(include_path=setting.folder, include_defaults=False),
        device="cpu",
        batch_size=1,
        verbosity="ERROR",
    )
    for name, (task, scores) in found.items():
        theirs = own["results"][name]
        summary = summarise_task(task, scores, scores)
        for metric in ("acc", "acc_norm"):
            assert scores.metrics[metric] == pytest.approx(theirs[f"{metric},none"], abs=1e-4)
            error = theirs[f"{metric}_stderr,none"]
            assert scores.metrics[f"{metric}_stderr"] == pytest.approx(error, abs=1e-4)
            samples = [sample[metric] for sample in own["samples"][name]]
            assert scores.correct[metric].tolist() == samples
            assert summary["difference"][metric] == {"value": 0, "stderr": 0}
        assert summary["items"] == own["n-samples"][name]["effective"]
        assert summary["example"]["prompt"] == own["samples"][name][0]["arguments"][0][0]
        assert summary["prompt"] == "Question: {question}\nAnswer:"


def test_scores_are_those_of_plain_transformers(setting: Setting) -> None:
    _, scores = ours(setting, "first.jsonl")["first"]
    items = read_task_file(setting.folder / "first.jsonl")
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for item in items:
        found = choice_log_likelihoods(setting, item)
        normed = [value / len(choice) for value, choice in zip(found, item.choices, strict=True)]
        for metric, values in (("acc", found), ("acc_norm", normed)):
            right[metric].append(float(values.index(max(values)) == item.gold))
    for metric, values in right.items():
        assert scores.correct[metric].tolist() == values
        assert scores.metrics[metric] == pytest.approx(sum(values) / len(values), abs=1e-4)
    assert scores.chance == pytest.approx(sum(1 / len(item.choices) for item in items) / len(items))


def test_permuted_answers_score_at_chance(setting: Setting) -> None:
    """Answers of the model's own choosing score 1; each of them put at a random choice, they do not."""
    items = [four_choices(record) for record in questions(120, 5)]
    best = [max(range(4), key=choice_log_likelihoods(setting, item).__getitem__) for item in items]
    rng = random.Random(0)
    for name, gold in (("own", best), ("permuted", [(b + rng.randrange(4)) % 4 for b in best])):
        lines = [
            json.dumps({"question": item.prompt[10:-8], "choices": item.choices, "answer": answer})
            for item, answer in zip(items, gold, strict=True)
        ]
        (setting.folder / f"{name}.jsonl").write_text("\n".join(lines))
    found = ours(setting, "own.jsonl", "permuted.jsonl")
    assert found["own"][1].metrics["acc"] == 1
    scores = found["permuted"][1]
    assert scores.chance == 0.25
    assert scores.metrics["acc"] == pytest.approx(0.25, abs=2.5 * scores.metrics["acc_stderr"])


def four_choices(record: dict[str, Any]) -> Item:
    choices = [*record["choices"], "the old river", "a bridge", "3"]
    return Item(f"Question: {record['question']}\nAnswer:", choices[:4], 0)


def test_a_limit_takes_the_first_items(setting: Setting) -> None:
    whole = ours(setting, "first.jsonl")["first"][1]
    part = ours(setting, "first.jsonl", limit=7)["first"][1]
    assert part.correct["acc"].tolist() == whole.correct["acc"].tolist()[:7]
    single = ours(setting, "first.jsonl", limit=1)["first"][1]
    assert single.metrics["acc_stderr"] is None


def test_a_group_scores_all_its_items(setting: Setting) -> None:
    loaded = TaskManager(include_path=setting.folder, include_defaults=False).load(["both"])
    task = Task("both", dict(loaded), about_named(dict(loaded)))
    scores = score(task, setting.model, setting.tokenizer, max_length=1024, limit=None)
    parts = ours(setting, "first.jsonl", "second.jsonl")
    correct = [parts[name][1].correct["acc"] for name in ("first", "second")]
    assert scores.correct["acc"].tolist() == torch.cat(correct).tolist()
    assert scores.metrics["acc"] == pytest.approx(torch.cat(correct).mean().item())


def test_a_mistyped_task_names_its_neighbours() -> None:
    with pytest.raises(TaskError, match=r"no such task.*openbookqa"):
        load_named("openbokqa", "openbookqa")


@pytest.mark.parametrize("name", PAPER_TASKS)
def test_the_papers_tasks_are_where_we_look_for_them(name: str) -> None:
    task, folder = PAPER_TASKS[name]
    root = Path(lm_eval.tasks.__file__).parent
    assert task in TaskManager(include_path=root / folder, include_defaults=False).all_tasks
    with pytest.raises(TaskError, match=r"cannot be had.*It comes from the hub"):
        prepare_tasks([name])


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_windows_are_lm_evals(count: int) -> None:
    ids = list(range(count))
    windows = get_rolling_token_windows(ids, prefix_token=-1, max_seq_len=32, context_len=1)
    theirs = [(context + targets, len(targets)) for context, targets in map(make_disjoint_window, windows)]
    assert list(rolling_windows(ids, -1, 32)) == theirs


def test_word_perplexity_is_lm_evals(setting: Setting) -> None:
    text = pico_text(300, seed=4) + "\n"
    language_model = HFLM(setting.model, tokenizer=setting.tokenizer, backend="causal", max_length=200)
    (theirs,) = language_model.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True
    )
    found = word_perplexity(setting.model, setting.tokenizer, text, window=200)
    assert found["tokens"] > 2 * 200
    assert found["log_likelihood"] == pytest.approx(theirs, rel=1e-6)
    words = lm_eval.api.task.PerplexityTask.count_words(text)
    assert found["words"] == words
    assert found["word_perplexity"] == pytest.approx(math.exp(-theirs / words), rel=1e-5)
