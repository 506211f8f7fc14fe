"""Multiple-choice tasks from local files, so that tasks work offline: JSON lists, or JSON lines.

A record is one of

- a `question`, its `choices`, and the `answer`; with a `context` or `passage` before the question if it has
  one. Choices are a list of strings, a dictionary from label to text, or {"text": […], "label": […]}. The
  answer is an index from 0, a label, a letter, or the text of the choice itself;
- an `instruction` that lists its choices, and the `answer` as one of its words: "… question: Q Answer1: a
  Answer2: b … Answer format: answer1/answer2", or without a list, "… Answer format: true/false".

Every item is asked as "Question: Q" with "Answer:" in the next line, and each choice is scored as what
follows, as lm-eval asks ARC and PIQA. A list of choices is never shown to the model: picking a letter is
beyond small models, and scores of different files could not be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from care_mla.errors import TaskError

PROMPT = "Question: {question}\nAnswer:"
PROMPT_WITH_CONTEXT = "{context}\n\n" + PROMPT
QUESTIONS = ("question", "query", "goal", "question_stem")
CONTEXTS = ("context", "passage", "article", "support")
CHOICES = ("choices", "options", "endings", "answers")
ANSWERS = ("answer", "answerKey", "label", "gold", "correct")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Item:
    """A question as the model reads it, its choices, the index of the right one, and the prompt's form."""

    prompt: str
    choices: list[str]
    gold: int
    form: str = PROMPT


def read_task_file(path: Path) -> list[Item]:
    """All items of a file.

    Raises:
        TaskError: naming the file and the record that is not as the module's docstring says.
    """
    items = [_item(record, f"{path}: record {i}") for i, record in enumerate(_records(path), start=1)]
    if not items:
        raise TaskError(f"{path} has no records, so there is nothing to ask.")
    return items


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: byte {error.start} is not UTF-8. Convert the file to it first.") from error
    whole = path.suffix != ".jsonl" and text.lstrip().startswith("[")
    lines = [(1, text)] if whole else list(enumerate(text.splitlines(), start=1))
    records = []
    for number, line in lines:
        if not line.strip():
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise TaskError(
                f"{path}: line {number - 1 + error.lineno}, column {error.colno}: no JSON ({error.msg}). "
                "A task file is one JSON list, or a JSON object in each line."
            ) from error
    return records[0] if whole else records


def _item(record: Any, where: str) -> Item:
    if not isinstance(record, Mapping):
        raise TaskError(f"{where} is {repr(record)[:60]}, and not an object with keys.")
    key, answer = _first(record, ANSWERS, where)
    if answer is None or answer == "":
        raise TaskError(
            f"{where} has no answer: {key!r} is empty. An item without one cannot be scored. Fill it, or "
            "take the record out."
        )
    if "instruction" in record and not any(name in record for name in CHOICES):
        question, labels, choices = _listed(str(record["instruction"]), where)
        context = None
    else:
        question = str(_first(record, QUESTIONS, where)[1])
        labels, choices = _choices(_first(record, CHOICES, where)[1], where)
        context = next((str(record[name]) for name in CONTEXTS if record.get(name)), None)
    if len(choices) < 2:
        raise TaskError(f"{where} has {len(choices)} choices, and a choice needs two at least.")
    for number, choice in enumerate(choices, start=1):
        if not isinstance(choice, str) or not choice.strip():
            raise TaskError(f"{where}: choice {number} of {len(choices)} is missing ({choice!r}). Fill it.")
    gold = _gold(answer, labels, choices, where)
    if not question.strip():
        raise TaskError(f"{where}: its question is empty. Fill it, or take the record out.")
    form = PROMPT if context is None else PROMPT_WITH_CONTEXT
    prompt = form.format(question=question.strip(), context=(context or "").strip())
    return Item(prompt, [choice.strip() for choice in choices], gold, form)


def _first(record: Mapping[str, Any], names: tuple[str, ...], where: str) -> tuple[str, Any]:
    for name in names:
        if name in record:
            return name, record[name]
    raise TaskError(
        f"{where} has the keys {', '.join(map(str, record))}, and none of {', '.join(names)}. An item needs "
        "a question, choices and an answer. Rename the field."
    )


def _choices(found: Any, where: str) -> tuple[list[str], list[Any]]:
    """Labels, as many as there are, and texts."""
    if isinstance(found, Mapping) and isinstance(found.get("text"), list):
        labels = [str(label) for label in found.get("label", [])]
        if labels and len(labels) != len(found["text"]):
            counts = f"{len(labels)} labels for {len(found['text'])} choices"
            raise TaskError(f"{where}: {counts}. One of them is missing.")
        return labels, found["text"]
    if isinstance(found, Mapping):
        return [str(label) for label in found], list(found.values())
    if isinstance(found, list) and all(isinstance(each, Mapping) for each in found):
        labels = [str(each.get("label", "")) for each in found]
        return labels, [each.get("text") for each in found]
    if isinstance(found, list):
        return [], found
    raise TaskError(f"{where}: its choices are {repr(found)[:60]}, and not a list. Make one of them.")


def _listed(instruction: str, where: str) -> tuple[str, list[str], list[Any]]:
    """Question, labels and choices of an instruction that ends with 'Answer format: label/label'."""
    body, found, form = instruction.rpartition("Answer format:")
    labels = [label.strip() for label in form.strip().split("/")]
    if not found or len(labels) < 2:
        raise TaskError(
            f"{where}: its instruction does not end with 'Answer format: a/b', so its choices are not known. "
            "Give the record 'question' and 'choices' in its place."
        )
    if not all(re.fullmatch(r"[a-z]+\d", label) for label in labels):
        return body, labels, list(labels)
    marks = [re.search(rf"\b{label}:", body, re.IGNORECASE) for label in labels]
    if None in marks:
        raise TaskError(f"{where}: {labels[marks.index(None)]!r} is a choice, and its text is missing.")
    ends = [mark.end() for mark in marks if mark]
    starts = [mark.start() for mark in marks if mark]
    texts = [body[end:start] for end, start in zip(ends, [*starts[1:], len(body)], strict=True)]
    # "Please choose the correct answer to the question: …" speaks of a list that is not shown.
    question = re.sub(r"^Please [^:?.]*: ", "", body[: starts[0]])
    return question, labels, list(texts)


def _gold(answer: Any, labels: list[str], choices: list[Any], where: str) -> int:
    """Index of the right choice: a label or the text comes before a letter, and a letter before a number."""
    if isinstance(answer, bool):
        answer = str(answer).lower()
    if str(answer) in labels:
        place = labels.index(str(answer))
    elif isinstance(answer, int):
        place = answer
    elif answer in choices:
        place = choices.index(answer)
    elif len(str(answer)) == 1 and str(answer).upper() in LETTERS:
        place = LETTERS.index(str(answer).upper())
    else:
        place = int(answer) if str(answer).isdigit() else -1
    if not 0 <= place < len(choices):
        raise TaskError(
            f"{where}: its answer {answer!r} is none of its {len(choices)} choices. Give an index from 0, a "
            "label, a letter, or the choice itself."
        )
    return place
