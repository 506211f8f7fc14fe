"""`care evaluate`: everything that is measured of several models in one run, the original first.

All inputs are read and checked before any weights; then one model at a time is in memory. What the JSON holds
beyond the contract:

- `models[i].cache_dtype`: of the cached tensors, which `cache_bytes_per_token` counts; weights are loaded in
  float32;
- `models[i].speed`: `prefill_tokens_per_second`, `decode_tokens_per_second` (speed.py);
- `models[i].perplexity[stem]`: `blocks`, `nll` with `nll_stderr` over blocks, `by_position` (rows with
  `start`, `end`, `value`, `tokens`, `nll_stderr`, `kl`), `word_level` (rolling.py); beside the original also
  `kl` and `top1_agreement` with `_stderr`, and `difference` (`nll`, `nll_stderr`, `perplexity_ratio`), paired
  by block;
- `models[i].tasks[name]`: `acc` and `acc_norm` with `_stderr`, as lm-eval gives them; `items`, `chance`,
  `prompt`, `choice`, `num_fewshot`, `source`, `example`; beside the original `difference` by metric, paired
  by item (`value`, `stderr`);
- `models[i].needle`, `models[i].passkey`: `score`, `found` and `trials` as grids with a row for each of
  `lengths` and a column for each of `depths`; `mean`, `mean_stderr`, `difference` as above; null where the
  option was not given.
"""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from care_mla import console as terminal
from care_mla.calibrate.text import read_text_file
from care_mla.device import pick_device
from care_mla.evaluate.agreement import OriginalStates, room_for_states
from care_mla.evaluate.cache import live_cache
from care_mla.evaluate.models import OpenedModel, head_of, open_model
from care_mla.evaluate.needle import Kind, Search, find, prepare_search, summarise_search
from care_mla.evaluate.perplexity import BlockScores, score_blocks, summarise, token_blocks
from care_mla.evaluate.rolling import first_tokens, num_windows, word_perplexity
from care_mla.evaluate.speed import REPEATS, speed
from care_mla.evaluate.tasks import Task, TaskScores, prepare_tasks, score_tasks, summarise_task
from care_mla.evaluate_config import EvaluateConfig


@dataclass(frozen=True)
class Text:
    """One text: for word-level perplexity, and as blocks of every model's own token ids."""

    path: Path
    text: str
    blocks: list[Tensor]


@dataclass
class Inputs:
    """What is asked of every model; prompts and blocks have an entry for each."""

    texts: list[Text]
    tasks: list[Task]
    searches: dict[Kind, list[Search]]
    window: int


@dataclass
class Original:
    """What is kept of the first model for the others."""

    states: dict[str, OriginalStates] = field(default_factory=dict)
    blocks: dict[str, BlockScores] = field(default_factory=dict)
    tasks: dict[str, TaskScores] = field(default_factory=dict)
    found: dict[Kind, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """The model that is in memory; the one of index 0 is the original."""

    idx: int
    opened: OpenedModel
    model: PreTrainedModel


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every model; the first one is the original that the others are compared with.

    Raises:
        CareError: an option, a model, a text or a task is not as it should be; before any weights are read.
    """
    config.check_paths()
    terminal.silence_transformers()
    device = pick_device(config.device)
    opened = [
        open_model(name, device=device, trust_remote_code=config.trust_remote_code) for name in config.models
    ]
    inputs = _read_inputs(config, opened)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="care-evaluate-") as folder:
        run = _Run(config, inputs, Path(folder))
        for i, each in enumerate(opened):
            terminal.current().step(f"Loading {each.name}")
            rows.append(run.measure(Subject(i, each, each.load())))
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        run.original.states.clear()
    return {"models": rows, "seed": config.seed, "limit": config.limit}


def _read_inputs(config: EvaluateConfig, opened: list[OpenedModel]) -> Inputs:
    context = min(model.max_length for model in opened)
    texts = []
    for path in config.perplexity:
        blocks = [
            token_blocks(model.tokenizer, path, block=config.block, max_tokens=config.max_tokens)
            for model in opened
        ]
        # One text for all, cut where the original's tokens end: words are counted in it.
        text = first_tokens(opened[0].tokenizer, read_text_file(path), config.max_tokens)
        texts.append(Text(path, text, blocks))
    if config.perplexity and config.block > context:
        terminal.current().warn(
            f"--block {config.block} is longer than the context of {context} that the models were made for."
        )
    tasks = prepare_tasks(config.task_names())
    wanted: dict[Kind, bool] = {"needle": config.needle, "passkey": config.passkey}
    searches = {
        kind: [
            prepare_search(
                kind,
                model.tokenizer,
                max_length=context,
                lengths=config.lengths(),
                haystack=config.haystack,
                num_seeds=config.needle_seeds,
                seed=config.seed,
            )
            for model in opened
        ]
        for kind, is_wanted in wanted.items()
        if is_wanted
    }
    return Inputs(texts, tasks, searches, config.window or context)


class _Run:
    """Measures models one after another; `original` is filled by the first."""

    def __init__(self, config: EvaluateConfig, inputs: Inputs, folder: Path) -> None:
        self.config, self.inputs, self.folder = config, inputs, folder
        self.original = Original()
        self.console = terminal.current()

    def measure(self, subject: Subject) -> dict[str, Any]:
        """All of one model."""
        opened, model = subject.opened, subject.model
        cache = live_cache(model)
        with self.console.progress("Speed", REPEATS) as progress:
            timed = speed(model, max_length=opened.max_length, advance=progress.advance)
        return {
            "model": opened.name,
            "cached_values": cache.cached_values,
            "cache_bytes_per_token": cache.bytes_per_token,
            "cache_dtype": cache.dtype,
            "speed": timed,
            "perplexity": {text.path.stem: self._text(subject, text) for text in self.inputs.texts},
            "tasks": self._tasks(subject),
            "needle": self._search(subject, "needle"),
            "passkey": self._search(subject, "passkey"),
        }

    def _text(self, subject: Subject, text: Text) -> dict[str, Any]:
        stem, blocks_BL, head = text.path.stem, text.blocks[subject.idx], head_of(subject.model)
        keep, states = None, self.original.states.get(stem)
        if subject.idx == 0 and len(self.config.models) > 1:
            keep = room_for_states(self.folder / stem, head, blocks_BL)
            self.original.states[stem] = keep
        elif states is not None and not states.comparable(head, blocks_BL):
            states = None
        with self.console.progress(f"Perplexity on {text.path.name}", len(blocks_BL)) as progress:
            scores = score_blocks(
                subject.model, blocks_BL, keep=keep, original=states, advance=progress.advance
            )
        if subject.idx == 0:
            self.original.blocks[stem] = scores
        summary = summarise(scores, self.original.blocks[stem] if states is not None else None)
        tokenizer, window = subject.opened.tokenizer, self.inputs.window
        total = num_windows(tokenizer, text.text, window)
        with self.console.progress(f"Word-level perplexity on {text.path.name}", total) as progress:
            summary["word_level"] = word_perplexity(
                subject.model, tokenizer, text.text, window=window, advance=progress.advance
            )
        return summary

    def _tasks(self, subject: Subject) -> dict[str, Any]:
        if not self.inputs.tasks:
            return {}
        opened = subject.opened
        scores = score_tasks(
            self.inputs.tasks,
            subject.model,
            opened.tokenizer,
            max_length=opened.max_length,
            limit=self.config.limit,
        )
        if subject.idx == 0:
            self.original.tasks = scores
        return {
            task.name: summarise_task(
                task, scores[task.name], self.original.tasks[task.name] if subject.idx else None
            )
            for task in self.inputs.tasks
        }

    def _search(self, subject: Subject, kind: Kind) -> dict[str, Any] | None:
        if kind not in self.inputs.searches:
            return None
        first, search = self.inputs.searches[kind][0], self.inputs.searches[kind][subject.idx]
        with self.console.progress(f"Looking for numbers ({kind})", len(search.trials)) as progress:
            found_X = find(subject.model, subject.opened.tokenizer, search, progress.advance)
        if subject.idx == 0:
            self.original.found[kind] = found_X
        same = subject.idx > 0 and search.same_prompts(first)
        return summarise_search(search, found_X, self.original.found[kind] if same else None)
