"""Choosing between the ways to run a method: width of the rope key, freqfold, and how ranks are spread.

Every candidate is measured against the original on held-out calibration text (mean KL), never on test text.
Writes `choice_….json` in the work folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

from torch import Tensor

from care_mla.allocate import allocate_ranks
from care_mla.calibrate.layers import LayerStack
from care_mla.configs import METHOD_ALLOCATION, SEPARATE_METHODS, Allocation
from care_mla.decompose.layer_inputs import CalibratedLayers
from care_mla.decompose.methods import Variant, method_function
from care_mla.factors import LatentLayer
from care_mla.mla.divergence import measure
from care_mla.workspace import Workspace, fingerprint, write_json

# Methods whose spectrum predicts the loss on one scale for all layers, so that `auto` may spread ranks by it.
SPREADABLE = ("fisher", "joint")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One fully determined conversion: a variant and the ranks of every layer, one for each latent."""

    variant: Variant
    allocation: Allocation
    ranks: tuple[tuple[int, ...], ...]
    held_out_kl: float | None = field(default=None, compare=False)

    @property
    def kv_lora_rank(self) -> int | list[int]:
        """Total latent width: one number if all layers agree."""
        widths = [sum(ranks) for ranks in self.ranks]
        return widths[0] if len(set(widths)) == 1 else widths

    @property
    def label(self) -> str:
        return f"{self.variant.label} {self.allocation}"

    def layer(self, inputs: CalibratedLayers) -> Callable[[int], LatentLayer]:
        """The converted layer of an index."""
        factor = method_function(self.variant)
        return lambda layer_idx: factor(inputs[layer_idx]).cut(self.ranks[layer_idx])


def spectra_of(variant: Variant, inputs: CalibratedLayers) -> list[tuple[Tensor, ...]]:
    """What every component of every layer is worth, on the CPU."""
    factor = method_function(variant)
    return [
        tuple(spectrum.cpu() for spectrum in factor(inputs[layer_idx]).spectra)
        for layer_idx in range(len(inputs))
    ]


def spread(variant: Variant, allocation: Allocation, spectra: Sequence[tuple[Tensor, ...]] | int) -> Choice:
    """Ranks of every layer under an allocation.

    Keys and values that are cut separately have half of the budget each (the paper's protocol).

    Args:
        spectra: of every layer, or for `uniform` just the number of layers.
    """
    latents = 2 if variant.method in SEPARATE_METHODS[variant.form] and variant.form == "exact-rope" else 1
    rank = variant.kv_lora_rank // latents
    if allocation == "uniform":
        num_layers = spectra if isinstance(spectra, int) else len(spectra)
        return Choice(variant=variant, allocation=allocation, ranks=((rank,) * latents,) * num_layers)
    assert not isinstance(spectra, int)
    low = rank // 2 if allocation == "care-code" else max(1, rank // 4)
    per_latent = [
        allocate_ranks(
            allocation, [layer[i] for layer in spectra], rank * len(spectra), low=low, high=2 * rank
        )
        for i in range(latents)
    ]
    return Choice(variant=variant, allocation=allocation, ranks=tuple(zip(*per_latent, strict=True)))


def candidates(
    variants: Sequence[Variant], allocation: Allocation, inputs: CalibratedLayers, *, per_layer: bool
) -> list[Choice]:
    """Everything that an option leaves open.

    Args:
        variants: of one method in one form.
        allocation: what the user asked for.
        per_layer: whether the profile can have ranks that differ by layer.
    """
    found = []
    for variant in variants:
        wanted = METHOD_ALLOCATION.get(variant.method, allocation)
        tried: list[Allocation] = [wanted]
        if wanted == "auto":
            tried = ["uniform", "greedy"] if per_layer and variant.method in SPREADABLE else ["uniform"]
        spectra = len(inputs) if tried == ["uniform"] else spectra_of(variant, inputs)
        found += [spread(variant, each, spectra) for each in tried]
    return found


def choose(
    stack: LayerStack,
    inputs: CalibratedLayers,
    groups: Sequence[Sequence[Choice]],
    held_out_BL: Tensor,
    workspace: Workspace,
    advance: Callable[[], None] = lambda: None,
    *,
    measure_all: bool = False,
) -> list[Choice]:
    """The best of each group on the first held-out block; all groups are measured in one sweep.

    Args:
        groups: candidates of each method.
        advance: called after each layer.
        measure_all: whether a group of one is measured too, though it leaves no choice.
    """
    open_groups = [group for group in groups if measure_all or len(group) > 1]
    key = {
        "groups": [[asdict(choice) for choice in group] for group in open_groups],
        "tokens": held_out_BL.tolist(),
        "damping": inputs.damping,
    }
    path = workspace.path(f"choice_{fingerprint(key)}.json")
    if not path.exists():
        named = {choice.label: choice.layer(inputs) for group in open_groups for choice in group}
        measured = measure(stack, named, held_out_BL[:1], advance)[1] if named else {}
        write_json(path, {label: found.mean_kl for label, found in measured.items()})
    kl = json.loads(path.read_text(encoding="utf-8"))
    best = [min(group, key=lambda choice: kl.get(choice.label, 0.0)) for group in groups]
    return [replace(choice, held_out_kl=kl.get(choice.label)) for choice in best]
