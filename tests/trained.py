"""A pico model with real statistics: Qwen3, trained for half a minute on the standard library's docstrings.

Random weights hide what text shows: outlier tokens, attention sinks, norms that matter. Nothing is
downloaded: every Python has this text.
"""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pico import pico_model

MODULES = (
    *("argparse", "collections/__init__", "datetime", "decimal", "email/message", "enum", "functools"),
    *(
        "inspect",
        "ipaddress",
        "logging/__init__",
        "os",
        "pathlib",
        "random",
        "shutil",
        "socket",
        "statistics",
    ),
    *("string", "subprocess", "tarfile", "textwrap", "threading", "turtle", "typing", "unittest/case"),
)
STEPS, BATCH, LENGTH, LEARNING_RATE = 600, 16, 128, 3e-3


def docstrings() -> str:
    """Documentation of modules, classes and functions of the standard library, in a fixed order."""
    library, texts = Path(sysconfig.get_path("stdlib")), []
    for name in MODULES:
        path = library / f"{name}.py"
        if not path.is_file():
            continue  # not in every Python
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                texts.append(ast.get_docstring(node) or "")
    return "\n\n".join(text for text in texts if len(text) > 40)


def trained_model(folder: Path) -> float:
    """Train the model, write it with its text (`text.txt`), and return its last loss, nats per token."""
    pico_model(folder, "qwen3", layers=3, vocab=510)
    text = docstrings()
    (folder / "text.txt").write_text(text, encoding="utf-8")
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(text, verbose=False)["input_ids"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    # From the random weights that the other tests want, training would have to unlearn first.
    model.apply(model._init_weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    losses = []
    for _ in range(STEPS):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,))
        tokens_BL = torch.stack([ids[start : start + LENGTH] for start in starts])
        loss = model(tokens_BL, labels=tokens_BL).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.save_pretrained(folder)
    return sum(losses[-20:]) / 20
