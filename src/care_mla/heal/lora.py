"""Adapters on attention's projections, through peft: put in before training, merged after."""
# Shapes: O rows of a projection, I its columns.

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from care_mla.errors import OptionError

PROJECTIONS = ["q_proj", "kv_a_proj_with_mqa", "k_b_proj", "v_b_proj", "o_proj"]
ADAPTER = "default"


def require_peft() -> None:
    """Refuse --train lora where its library is missing.

    Raises:
        OptionError: peft is not installed.
    """
    if importlib.util.find_spec("peft") is None:
        raise OptionError(
            "--train lora: adapters are made by the library peft, which is not installed here. Nothing was "
            "written. Install it (pip install 'care-mla[heal]'), or choose --train attention."
        )


def add_adapters(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Put adapters of a rank on every projection of attention, in place; they alone train.

    Raises:
        OptionError: peft is not installed.
    """
    require_peft()
    peft = importlib.import_module("peft")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # alpha = rank: an adapter's scale is 1, so that the learning rate means what it says.
        config = peft.LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.0, target_modules=PROJECTIONS)
        peft.inject_adapter_in_model(config, model, adapter_name=ADAPTER)


def merged(projections: Mapping[str, Tensor], adapters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The projections with their adapters added: W + B A, under the names of the plain model.

    Args:
        projections: weights of the model without adapters, by name.
        adapters: the trained matrices, by name in the model with them.
    """
    result = {}
    for name, a_RI in adapters.items():
        if f".lora_A.{ADAPTER}." not in name:
            continue
        module = name.partition(".lora_A.")[0]
        b_OR = adapters[f"{module}.lora_B.{ADAPTER}.weight"]
        w_OI = projections[f"{module}.weight"]
        result[f"{module}.weight"] = (w_OI.double() + b_OR.double() @ a_RI.double()).float()
    return result


def adapter_parameters(model: nn.Module, rank: int) -> int:
    """Weights of the adapters that `add_adapters` would put into a model."""
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in PROJECTIONS
    )
