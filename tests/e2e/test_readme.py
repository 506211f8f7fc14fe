"""What README.md tells people to type is what the command understands."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from care_mla.cli.main import COMMANDS
from e2e.command import CARE, ENVIRONMENT, FAST, care
from e2e.conftest import Conversion

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").glob("*.md"))]


def commands(page: str) -> list[list[str]]:
    """Every `care …` in the page's blocks of shell and in its text, in words, comments off."""
    text = (ROOT / page).read_text(encoding="utf-8").replace("\\\n", " ")
    spans = re.findall(r"`(care [^`\n]+)`", text)
    lines = [line.strip().removeprefix("$ ") for line in text.splitlines()]
    found = [*spans, *(line for line in lines if line.startswith("care ") and line not in spans)]
    return [shlex.split(line, comments=True) for line in found]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    words_of = {tuple(words) for words in commands(page) if len(words) > 1 and words[1] in COMMANDS}
    unknown = {words[1] for words in commands(page)} - set(COMMANDS) - {"--help", "COMMAND", "--version"}
    assert not {word for word in unknown if re.fullmatch("[a-z]+", word)}, (
        f"{page}: no such commands: {unknown}"
    )
    for name in {words[1] for words in words_of}:
        done = subprocess.run(
            [CARE, name, "--help"], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        options = set(re.findall(r"--[a-z-]+", done.stdout))
        for words in words_of:
            if words[1] == name:
                used = {word.split("=")[0] for word in words if word.startswith("--")}
                assert used <= options | {"--help"}, f"{page}: care {name} has no {used - options}"


def test_the_three_commands_of_the_readme(converted: Conversion, tmp_path: Path) -> None:
    three = [words[1:] for words in commands("README.md") if {"MODEL", "--budget"} <= set(words)]
    assert [words[0] for words in three] == ["plan", "convert"]
    shutil.copytree(converted.folder / "model", tmp_path / "MODEL")
    for words in three:
        done = care(tmp_path, *words, *FAST)
        assert done.code == 0, done.err
    assert (tmp_path / "OUT" / "config.json").exists()
    (tmp_path / "t.txt").write_text((converted.folder / "text.txt").read_text())
    (evaluate,) = [words[1:] for words in commands("README.md") if words[1] == "evaluate"]
    done = care(tmp_path, *evaluate, "--block", "256")
    assert done.code == 0, done.err
    assert [model["model"] for model in done.json["models"]] == ["MODEL", "OUT"]
