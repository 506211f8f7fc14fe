"""Choosing between the ways to run a method: width of the rope key, freqfold, and how ranks are spread.

Every candidate is measured against the original on held-out calibration text (mean KL), never on test text.
Writes `choice_….json` in the work folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
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

# A plain RoPE table runs in every engine; it is taken unless held-out text diverges more than so many times
# as much as with the source's own table, which transformers alone reads.
PLAIN_FACTOR = 1.5
# Methods whose spectrum predicts the loss on one scale for all layers, so that `auto` may spread ranks by it.
SPREADABLE = ("fisher", "joint")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One fully determined conversion: a variant and the ranks of every layer, one for each latent.

    `held_out_kl` is what was measured of it, `table_kl` and `bias_kl` of the best conversions with either
    RoPE table, and of this one with biases kept and absorbed; None where there was nothing to decide.
    `candidates_kl` is everything that it was measured beside, by label.
    """

    variant: Variant
    allocation: Allocation
    ranks: tuple[tuple[int, ...], ...]
    held_out_kl: float | None = field(default=None, compare=False)
    table_kl: dict[str, float] | None = field(default=None, compare=False)
    bias_kl: dict[str, float] | None = field(default=None, compare=False)
    candidates_kl: dict[str, float] | None = field(default=None, compare=False)

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

    A candidate that pays for running in more engines is measured beside the same one that does not.

    Args:
        groups: candidates of each method; a group of one with nothing to compare is not measured.
        advance: called after each layer.
        measure_all: whether a group of one is measured too, though it leaves no choice.
    """
    compared = [
        list(dict.fromkeys(c for choice in group for c in (choice, *_twins(choice)))) for group in groups
    ]
    open_groups = [group for group in compared if measure_all or len(group) > 1]
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
    return [_best(group, beside, kl) for group, beside in zip(groups, compared, strict=True)]


def _twins(choice: Choice) -> list[Choice]:
    """The same conversion with the source's own RoPE table, and with its biases, where it has neither."""
    variant, twins = choice.variant, []
    if variant.rope_table == "plain":
        twins.append(replace(choice, variant=replace(variant, rope_table="scaled")))
    if variant.absorbs_biases:
        twins.append(replace(choice, variant=replace(variant, absorbs_biases=False)))
    return twins


def _best(group: Sequence[Choice], beside: Sequence[Choice], kl: Mapping[str, float]) -> Choice:
    """What diverges least of a group, or what runs in more engines and diverges little more.

    Args:
        beside: the group with the twins that it was measured with.
        kl: by label; empty where nothing was measured.
    """
    if len(beside) == 1:
        return replace(group[0], held_out_kl=kl.get(group[0].label))
    best = min(group, key=lambda choice: kl[choice.label])
    plain = [choice for choice in group if choice.variant.rope_table == "plain"]
    if plain:
        other = min(plain, key=lambda choice: kl[choice.label])
        best = other if kl[other.label] <= PLAIN_FACTOR * kl[best.label] else best
    table_kl: dict[str, float] = {}
    for choice in beside:
        table = choice.variant.rope_table
        if table is not None and choice.variant.absorbs_biases == best.variant.absorbs_biases:
            table_kl[table] = min(kl[choice.label], table_kl.get(table, math.inf))
    bias_kl = None
    if best.variant.absorbs_biases:
        kept = replace(best, variant=replace(best.variant, absorbs_biases=False))
        bias_kl = {"keep": kl[kept.label], "absorb": kl[best.label]}
    return replace(
        best,
        held_out_kl=kl[best.label],
        table_kl=table_kl or None,
        bias_kl=bias_kl,
        candidates_kl={choice.label: kl[choice.label] for choice in beside},
    )
