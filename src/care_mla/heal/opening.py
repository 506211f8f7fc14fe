"""What a healing works on: both models, opened and checked to belong together before any weight is read."""
# Shapes: B sequences, L positions, S vocabulary.

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from care_mla import console as terminal
from care_mla.checkpoint.opening import open_source
from care_mla.checkpoint.source import Source
from care_mla.checkpoint.writer import check_output
from care_mla.errors import CheckpointError, OptionError
from care_mla.export.card import CARD
from care_mla.export.profile import TARGETS, Target
from care_mla.export.verify import StoredReference, read_reference
from care_mla.heal.lora import require_peft
from care_mla.heal.student import StudentFolder
from care_mla.heal_config import HealConfig
from care_mla.workspace import read_json

# What a model and its original have in common.
COMMON = ("architecture", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim")


class Opened(NamedTuple):
    """The converted folder, its original, and how the result will be written."""

    folder: StudentFolder
    teacher: Source
    stored: StoredReference
    target: Target
    profile: str
    dtype: torch.dtype


def open_all(config: HealConfig) -> Opened:
    """Open both models and check, on configurations and headers alone, that they belong together.

    Raises:
        CareError: they do not, or the result could not be written.
    """
    if config.train == "lora":
        require_peft()
    folder = StudentFolder(config.model)
    folder.check()
    stored = read_reference(config.model)
    assert config.teacher is not None
    teacher = open_source(config.teacher, trust_remote_code=config.trust_remote_code)
    teacher.check()
    _check_teacher(config, folder, teacher)
    card = read_json(config.model / CARD) if (config.model / CARD).is_file() else {}
    profile = card.get("profile") or folder.config["model_type"].replace("_", "-")
    profile = "care" if folder.is_own else profile
    converted_from = card.get("fingerprints", {}).get("source weights")
    if converted_from not in (None, teacher.fingerprint()):
        terminal.current().warn(
            f"--teacher {config.teacher} has other weights than the model that {config.model} was converted "
            "from, or has them in another file format. It is healed towards the ones named"
        )
    target = TARGETS[profile]
    dtype: torch.dtype = getattr(torch, config.dtype or folder.facts.dtype)
    target.check(folder, dtype)
    check_output(config.output, config.overwrite)
    return Opened(folder, teacher, stored, target, profile, dtype)


def _check_teacher(config: HealConfig, folder: StudentFolder, teacher: Source) -> None:
    original = folder.training_facts
    for key in COMMON:
        ours, theirs = getattr(original, key), getattr(teacher.facts, key)
        if ours != theirs:
            raise OptionError(
                f"--teacher {config.teacher} has {key} {theirs}, and {config.model} was converted from a "
                f"model with {ours}, so it is not the original. Nothing was written. Name the model that it "
                "was converted from."
            )


def check_student(student: PreTrainedModel, stored: StoredReference, folder: Path) -> None:
    """Check that the student computes what the folder's reference says, before anything is trained.

    Raises:
        CheckpointError: it does not, so the folder's weights are not those of its reference.
    """
    if stored.is_slice:
        return
    with torch.no_grad():
        logits_BLS = student(stored.tokens_BL).logits
    error = ((logits_BLS - stored.reference_BLS).norm() / stored.reference_BLS.norm()).item()
    if not error <= stored.tolerance:
        raise CheckpointError(
            f"{folder}: its weights give logits {error:.2g} away from the stored reference (at most "
            f"{stored.tolerance:g} for {stored.dtype}): they were changed after the conversion. Nothing was "
            f"written. Convert the model again: care convert MODEL {folder} --overwrite"
        )
