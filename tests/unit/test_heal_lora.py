"""Adapters: they alone train, they start as nothing, and they merge into the weights of the plain model."""

from __future__ import annotations

from pathlib import Path

import torch

from care_mla.heal.lora import adapter_parameters, merged
from care_mla.heal.student import HealedFolder, StudentFolder, choose_weights
from care_mla.heal.writing import projections
from care_mla.mla.reference import Reference
from export_cases import export, relative_error, token_ids


def test_adapters_merge_into_what_the_student_computes(tmp_path: Path) -> None:
    folder = export(tmp_path, tokenizer=False, family="qwen2").folder
    student = StudentFolder(folder).load_student()
    with torch.no_grad():
        before = student(token_ids()).logits
    expected = adapter_parameters(student, 4)
    choose_weights(student, "lora", 4, seed=0)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == expected
    assert all(".self_attn." in name and ".lora_" in name for name in trained)
    with torch.no_grad():
        assert torch.equal(student(token_ids()).logits, before)
        for parameter in trained.values():
            parameter += 0.05 * torch.randn_like(parameter)
        adapted = student(token_ids()).logits
    assert relative_error(adapted, before) > 0.01
    weights = merged(projections(StudentFolder(folder)), trained)
    assert len(weights) == 10  # five projections in two layers
    healed = HealedFolder(folder, weights)
    assert relative_error(Reference(healed, healed.latent_layer).logits(token_ids()), adapted) < 5e-6


def test_one_seed_gives_the_same_adapters(tmp_path: Path) -> None:
    folder = export(tmp_path, tokenizer=False).folder

    def adapters(seed: int) -> torch.Tensor:
        student = StudentFolder(folder).load_student()
        choose_weights(student, "lora", 4, seed)
        return torch.cat([p.flatten() for n, p in student.named_parameters() if ".lora_A." in n])

    assert torch.equal(adapters(1), adapters(1))
    assert not torch.equal(adapters(1), adapters(2))
