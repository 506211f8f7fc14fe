"""`care compare`: methods at one budget from one calibration, with the original in the same run.

Candidates of a method (width of the rope key, freqfold) are settled on held-out calibration text, then
everything is measured side by side on the text asked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from care_mla import console as terminal
from care_mla.calibrate.layers import LayerStack
from care_mla.calibrate.run import calibrate
from care_mla.checkpoint.finite import require_finite
from care_mla.checkpoint.opening import open_source
from care_mla.configs import CompareConfig, Form
from care_mla.decompose.layer_inputs import CalibratedLayers
from care_mla.decompose.methods import variants
from care_mla.device import pick_device
from care_mla.evaluate.perplexity import token_blocks
from care_mla.factors import LatentLayer
from care_mla.facts import ModelFacts
from care_mla.forms import check_form, form_blocker, needs_healing
from care_mla.mla.choose import Choice, candidates, choose
from care_mla.mla.divergence import measure
from care_mla.workspace import Workspace

# Variants of one method: they differ in what comes after the RoPE split, so they are measured on the same.
SAME_SPLIT = {"care-e": "care-u", "care-c": "care-u"}


def compare(config: CompareConfig) -> dict[str, Any]:
    """Measure every method asked for; rows in the order asked for.

    Raises:
        CareError: whatever stands in the way; before any work where it can be known.
    """
    config.check_paths()
    console = terminal.current()
    terminal.silence_transformers()
    source = open_source(config.model, trust_remote_code=config.trust_remote_code)
    facts = source.facts
    wanted = [
        variants(facts, config, form=form, method=method)
        for method, form in _possible(facts, config, console)
    ]
    source.check()
    device = pick_device(config.device)
    tokens_BL = None
    if config.perplexity is not None:
        tokens_BL = token_blocks(
            source.tokenizer(), config.perplexity, block=config.block, max_tokens=config.max_tokens
        )
    workspace = Workspace(config.work or Path("care-work"))
    require_finite(source, workspace)
    stack = LayerStack(source, device=device)
    blocks = calibrate(stack, config, workspace, console)
    if tokens_BL is None:
        # The first block chose among candidates; the others have been seen by nothing.
        tokens_BL = blocks.held_out_BL[1:] if len(blocks.held_out_BL) > 1 else blocks.held_out_BL
    inputs = CalibratedLayers(source, workspace, stack.inv_freq_F, damping=config.damping, device=device)
    # As `convert` would choose: uniform in the form that stock engines serve, free in our own class.
    groups = [
        candidates(group, config.allocation, inputs, per_layer=group[0].form != "decoupled")
        for group in wanted
    ]
    steps = stack.num_layers + 1
    leaders = [group if _leader(group[0], groups) is None else group[:1] for group in groups]
    with console.progress("Choosing rope widths and freqfolds on held-out text", steps) as progress:
        choices = choose(stack, inputs, leaders, blocks.held_out_BL, workspace, progress.advance)
    choices = [_follow(group, choice, choices) for group, choice in zip(groups, choices, strict=True)]
    timed = {choice.label: TimedChoice(choice, inputs) for choice in choices}
    with console.progress(f"Measuring {len(choices)} conversions", steps) as progress:
        original, measured = measure(stack, timed, tokens_BL, progress.advance)
    rows = [
        {
            "method": choice.variant.method,
            "form": choice.variant.form,
            "allocation": choice.allocation,
            "kv_lora_rank": choice.kv_lora_rank,
            "qk_rope_head_dim": choice.variant.qk_rope_head_dim,
            "freqfold": choice.variant.freqfold,
            "cached_values": timed[choice.label].cached_values,
            "perplexity": measured[choice.label].perplexity,
            "kl": measured[choice.label].mean_kl,
            "held_out_kl": choice.held_out_kl,
            "seconds": round(timed[choice.label].seconds, 3),
        }
        for choice in choices
    ]
    return {
        "original": {"perplexity": original.perplexity, "cached_values": facts.cached_values},
        "rows": rows,
        "text": {
            "name": config.perplexity.name if config.perplexity else "held-out calibration text",
            "tokens": original.tokens,
            "block": tokens_BL.shape[1],
        },
        "calibration": {
            "description": blocks.description,
            "content_hash": blocks.content_hash,
            "tokens": blocks.short_BL.numel(),
            "sequence_length": blocks.short_BL.shape[1],
            "damping": config.damping,
            "seed": config.seed,
        },
    }


def _possible(facts: ModelFacts, config: CompareConfig, console: terminal.Console) -> list[tuple[str, Form]]:
    """What was asked for, less the forms that the model has no conversion to; those are named.

    Raises:
        UnsupportedModelError: nothing is left.
    """
    asked = config.method_forms()
    possible = [(method, form) for method, form in asked if form_blocker(facts, form) is None]
    if not possible:
        check_form(facts, asked[0][1])
    for form in dict.fromkeys(form for _, form in asked):
        if (blocker := form_blocker(facts, form)) is not None:
            console.warn(f"--form {form} is left out: {blocker}")
        elif reasons := needs_healing(facts, form):
            console.warn(f"rows of --form {form} need healing: {'; '.join(reasons)}")
    return possible


def _leader(choice: Choice, groups: Sequence[Sequence[Choice]]) -> str | None:
    """The method whose RoPE split this one takes over, if that method is in the run."""
    leader = SAME_SPLIT.get(choice.variant.method) if choice.variant.form == "decoupled" else None
    present = {(group[0].variant.form, group[0].variant.method) for group in groups}
    return leader if ("decoupled", leader) in present else None


def _follow(group: Sequence[Choice], choice: Choice, choices: Sequence[Choice]) -> Choice:
    """The choice itself, or for a follower the one of its group with the leader's width and freqfold."""
    leader = _leader(choice, [[each] for each in choices])
    if leader is None:
        return choice
    (led,) = (c.variant for c in choices if (c.variant.form, c.variant.method) == ("decoupled", leader))
    split = (led.qk_rope_head_dim, led.freqfold)
    return next(c for c in group if (c.variant.qk_rope_head_dim, c.variant.freqfold) == split)


class TimedChoice:
    """Builds the layers of a choice, counting seconds and cached values on the way."""

    def __init__(self, choice: Choice, inputs: CalibratedLayers) -> None:
        self._layer = choice.layer(inputs)
        self._values: list[int] = []
        self.seconds = 0.0

    def __call__(self, layer_idx: int) -> LatentLayer:
        start = time.perf_counter()
        layer = self._layer(layer_idx)
        self.seconds += time.perf_counter() - start
        self._values.append(layer.cached_values)
        return layer

    @property
    def cached_values(self) -> float | int:
        """Mean over layers, per token."""
        mean = sum(self._values) / len(self._values)
        return int(mean) if mean.is_integer() else mean
