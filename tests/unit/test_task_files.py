"""Task files: what a record may look like, and which mistake is named where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from care_mla.errors import TaskError
from care_mla.evaluate.task_files import read_task_file

SKY = {"question": "What is the sky?", "choices": ["red", "blue", "2"], "answer": 1}
LABELLED = [("A", "red"), ("B", "blue"), ("C", "2")]
LISTED = (
    "Please choose the correct answer to the question: Where does it rain: here or there?\n\n"
    "Answer1: here and now Answer2: there Answer3: nowhere, says Answer: me\n\n"
    "Answer format: answer1/answer2/answer3"
)


def write(folder: Path, *records: Any, name: str = "sky.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(
    ("record", "gold"),
    [
        (SKY, 1),
        (SKY | {"answer": "B"}, 1),
        (SKY | {"answer": "b"}, 1),
        (SKY | {"answer": "blue"}, 1),
        (SKY | {"answer": "1"}, 1),
        (SKY | {"answer": "2"}, 2),  # the text of a choice comes before an index
        (SKY | {"choices": {"text": ["red", "blue", "2"], "label": ["1", "2", "3"]}, "answer": "2"}, 1),
        (SKY | {"choices": {"1": "red", "2": "blue", "3": "2"}, "answer": "3"}, 2),
        (SKY | {"choices": {"1": "red", "2": "blue", "3": "2"}, "answer": 2}, 1),
        (SKY | {"choices": [{"label": x, "text": t} for x, t in LABELLED]}, 1),
        ({"query": SKY["question"], "options": SKY["choices"], "label": 0}, 0),
        ({"question_stem": SKY["question"], "choices": SKY["choices"], "answerKey": "C"}, 2),
    ],
)  # fmt: skip
def test_a_question_with_choices(record: dict[str, Any], gold: int, tmp_path: Path) -> None:
    (item,) = read_task_file(write(tmp_path, record))
    assert item.prompt == "Question: What is the sky?\nAnswer:"
    assert item.choices == ["red", "blue", "2"]
    assert item.gold == gold


def test_a_passage_comes_first(tmp_path: Path) -> None:
    (item,) = read_task_file(write(tmp_path, SKY | {"passage": " It was noon. {question} "}))
    assert item.prompt == "It was noon. {question}\n\nQuestion: What is the sky?\nAnswer:"


def test_an_instruction_that_lists_its_choices(tmp_path: Path) -> None:
    records = [{"instruction": LISTED, "input": "", "output": "…", "answer": "answer2"}]
    records.append({"instruction": "Is it true?\n\nAnswer format: true/false", "answer": "false"})
    listed, plain = read_task_file(write(tmp_path, *records))
    assert listed.prompt == "Question: Where does it rain: here or there?\nAnswer:"
    assert listed.choices == ["here and now", "there", "nowhere, says Answer: me"]
    assert listed.gold == 1
    assert (plain.prompt, plain.choices, plain.gold) == (
        "Question: Is it true?\nAnswer:",
        ["true", "false"],
        1,
    )


def test_json_lines(tmp_path: Path) -> None:
    for name in ("sky.jsonl", "sky.json"):
        path = tmp_path / name
        path.write_text(f"{json.dumps(SKY)}\n\n{json.dumps(SKY | {'answer': 0})}\n")
        assert [item.gold for item in read_task_file(path)] == [1, 0]


@pytest.mark.parametrize(
    ("record", "named"),
    [
        (SKY | {"answer": None}, "record 2 has no answer"),
        (SKY | {"answer": ""}, "record 2 has no answer"),
        ({"question": "?", "choices": ["a", "b"]}, "the keys question, choices, and none of answer"),
        ({"question": "?", "answer": 0}, "none of choices"),
        ({"choices": ["a", "b"], "answer": 0}, "none of question"),
        (SKY | {"question": " "}, "record 2: its question is empty"),
        (SKY | {"choices": ["red"]}, "record 2 has 1 choices"),
        (SKY | {"choices": ["red", ""]}, "record 2: choice 2 of 2 is missing"),
        (SKY | {"choices": ["red", None]}, "choice 2 of 2 is missing"),
        (SKY | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "1 labels for 2 choices"),
        (SKY | {"choices": "red or blue"}, "and not a list"),
        (SKY | {"answer": 3}, "record 2: its answer 3 is none of its 3 choices"),
        (SKY | {"answer": -1}, "its answer -1"),
        (SKY | {"answer": "green"}, "its answer 'green'"),
        (SKY | {"answer": "D"}, "its answer 'D'"),
        ({"instruction": "What?", "answer": "a"}, "does not end with 'Answer format"),
        ({"instruction": LISTED.replace("Answer2:", "and"), "answer": "answer1"}, "'answer2' is a choice"),
        ("sky", "record 2 is 'sky'"),
    ],
)  # fmt: skip
def test_mistakes_name_file_and_record(record: Any, named: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError) as refused:
        read_task_file(write(tmp_path, SKY, record))
    assert "sky.json" in str(refused.value)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"[]", "no records"),
        (b"", "no records"),
        (b'[{"question": "a"', "line 1, column 18"),
        (b'{"question": "a"}\n{"quest', "line 2, column"),
        (b"[\xff]", "byte 1 is not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(content: bytes, named: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(TaskError) as refused:
        read_task_file(path)
    assert "broken.json" in str(refused.value)
    assert named in str(refused.value)
