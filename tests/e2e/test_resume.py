"""Killed and run again, cut into other chunks, or run twice: the same bytes."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from e2e.command import CARE, ENVIRONMENT, FAST, care, hashes
from e2e.conftest import make_input

# Long enough for a signal to arrive in the middle, in two chunks of 1 MiB.
CONVERT = (
    *("convert", "model", "OUT", "--calibration", "calibration.txt", "--calibration-tokens", "4096"),
    *("--sequence-length", "128", "--device", "cpu"),
)
CHUNKED = (*CONVERT, "--max-spool-gib", "0.001")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """sha256 of every file of the output of a run that nothing disturbed, in one chunk."""
    folder = make_input(tmp_path_factory.mktemp("undisturbed"))
    done = care(folder, *CONVERT)
    assert done.code == 0, done.err
    return hashes(folder / "OUT")


def kill_when_there(folder: Path, path: Path, delay: float) -> None:
    """Start the conversion, and kill it some time after a file has appeared."""
    process = subprocess.Popen(
        [CARE, *CHUNKED], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    end = time.monotonic() + 60
    while not path.exists():
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < end, f"{path} never came"
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    "moment",
    ["tokens.safetensors", "rotation/layer_001.safetensors", "statistics/layer_001.safetensors"],
)
def test_killed_during_calibration(moment: str, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    folder = make_input(tmp_path)
    delay = random.uniform(0, 0.02)
    kill_when_there(folder, folder / "OUT.work" / moment, delay)
    assert not (folder / "OUT").exists()
    done = care(folder, *CHUNKED)
    assert done.code == 0, f"killed {delay:.4f} s after {moment}: {done.err}"
    same_model(hashes(folder / "OUT"), undisturbed)


def test_killed_while_it_verifies(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    folder = make_input(tmp_path)
    kill_when_there(folder, folder / ".OUT.partial" / "recipe.yaml", 0.5)
    assert not (folder / "OUT").exists()  # it would be there without its card
    done = care(folder, *CHUNKED)
    assert done.code == 0, done.err
    same_model(hashes(folder / "OUT"), undisturbed)
    assert not (folder / ".OUT.partial").exists()


def same_model(found: dict[str, str], expected: dict[str, str]) -> None:
    """Every file is the same but the three that quote --max-spool-gib."""
    differing = {name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)}
    assert differing <= {"README.md", "recipe.yaml", "care_reference/card.json"}


def test_one_seed_twice_gives_the_same_files(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    folder = make_input(tmp_path)
    assert care(folder, *CONVERT).code == 0
    assert hashes(folder / "OUT") == undisturbed


def test_chunks_of_another_size_give_the_same_model(tmp_path: Path, undisturbed: dict[str, str]) -> None:
    folder = make_input(tmp_path)
    done = care(folder, *CHUNKED)
    assert done.code == 0, done.err
    assert "Statistics, forward and backward 12/" in done.err  # up and down three layers, twice
    same_model(hashes(folder / "OUT"), undisturbed)


def test_own_text_of_one_seed_is_the_same(tmp_path: Path) -> None:
    folder = make_input(tmp_path)
    for name in ("A", "B"):
        done = care(folder, "convert", "model", name, *FAST, "--qk-rope-head-dim", "8")
        assert done.code == 0, done.err
    assert hashes(folder / "A")["model.safetensors"] == hashes(folder / "B")["model.safetensors"]
