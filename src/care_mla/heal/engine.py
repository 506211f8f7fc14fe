"""Both models in one module, on one device or spread over many, and what of it a checkpoint holds."""
# Shapes: B blocks, L positions, T tokens (B * (L - 1)), D hidden_size.

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from care_mla.errors import OptionError
from care_mla.heal.attention_outputs import AttentionOutputs, relative_difference
from care_mla.heal.loss import Losses, LossWeights, distillation_loss, loss_of_chunk

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from care_mla.heal_config import HealConfig

STUDENT = "student."


class Distiller(nn.Module):
    """Student and teacher; the forward pass gives the losses of a batch of blocks.

    Args:
        student: trains in part.
        teacher: frozen; of the same vocabulary, and of the same sizes where hidden states are compared.
        weights: of the loss.
        hidden_states: weight of the relative squared difference of the residual streams, mean over layers.
        attention_outputs: likewise of what each layer's attention gives.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        weights: LossWeights,
        hidden_states: float = 0.0,
        attention_outputs: float = 0.0,
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.weights, self.hidden_states = weights, hidden_states
        self.attention_outputs = attention_outputs
        self.kept = [AttentionOutputs(model) for model in (student, teacher) if attention_outputs > 0]
        self.chunk_loss: Callable[..., tuple[Tensor, Tensor, Tensor]] = loss_of_chunk

    def train(self, mode: bool = True) -> Distiller:
        """Let the student train; the teacher stays as it is."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, tokens_BL: Tensor) -> Losses:
        """Mean losses over all tokens that have a next one; in evaluation KL is at temperature 1."""
        options = {"use_cache": False, "output_hidden_states": self.hidden_states > 0}
        with torch.no_grad():
            taught = self.teacher.model(tokens_BL, **options)
        learnt = self.student.model(tokens_BL, **options)
        states_TD, taught_TD = (out.last_hidden_state[:, :-1].flatten(0, 1) for out in (learnt, taught))
        if torch.is_autocast_enabled(tokens_BL.device.type):
            dtype = torch.get_autocast_dtype(tokens_BL.device.type)
            states_TD, taught_TD = states_TD.to(dtype), taught_TD.to(dtype)
        losses = distillation_loss(
            states_TD,
            self.student.lm_head.weight,
            taught_TD,
            self.teacher.lm_head.weight,
            tokens_BL[:, 1:].flatten(),
            self.weights if self.training else self.weights._replace(temperature=1.0),
            chunk_loss=self.chunk_loss,
        )
        if self.hidden_states > 0:
            apart = stream_difference(learnt.hidden_states, taught.hidden_states)
            losses = losses._replace(total=losses.total + self.hidden_states * apart)
        if self.attention_outputs > 0:
            apart = relative_difference(*(kept.take() for kept in self.kept))
            losses = losses._replace(total=losses.total + self.attention_outputs * apart)
        return losses


def stream_difference(learnt: tuple[Tensor, ...], taught: tuple[Tensor, ...]) -> Tensor:
    """The relative difference of the residual streams after every layer; the first entry is the embedding."""
    return relative_difference(learnt[1:], taught[1:])


def make_accelerator(config: HealConfig, logging_folder: Path) -> Accelerator:
    """Accelerate's view of devices and processes: bfloat16 autocast on GPUs, float32 on a CPU.

    Raises:
        OptionError: `accelerate launch` asks for a precision that training has not.
    """
    from accelerate import Accelerator
    from accelerate.utils import is_tensorboard_available

    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "bf16"):
        raise OptionError(
            f"accelerate launch --mixed_precision {asked}: healing runs in bfloat16 on GPUs, whose range "
            "needs no scaling of gradients, and in float32 on CPUs. Leave the option out."
        )
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    if config.device == "cuda" and not on_gpu:
        raise OptionError("--device cuda: torch finds no GPU on this machine. Try --device cpu")
    return Accelerator(
        cpu=not on_gpu,
        mixed_precision="bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no",
        log_with="tensorboard" if is_tensorboard_available() else None,
        project_dir=str(logging_folder),
    )


def is_sharded(config: HealConfig, accelerator: Accelerator) -> bool:
    """Whether weights are spread over processes: --shard, or `accelerate launch --use_fsdp`."""
    asked = config.shard or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and accelerator.num_processes > 1


def place(distiller: Distiller, accelerator: Accelerator, config: HealConfig) -> nn.Module:
    """The module on its device or devices, in the types in which it computes.

    Without sharding, what is frozen is kept in autocast's type, and weights that both models have are kept
    once. With it (FSDP2, of torch itself, so that it works on CPUs too) all are float32 and are cast as they
    are gathered.
    """
    student, teacher, device = distiller.student, distiller.teacher, accelerator.device
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    distiller.train()
    reduced = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    if is_sharded(config, accelerator):
        _shard(distiller, device, reduced)
    else:
        share_frozen_weights(student, teacher)
        moved: dict[int, Tensor] = {}  # by the address of the weight, which both models may hold
        for parameter in distiller.parameters():
            dtype = parameter.dtype if parameter.requires_grad else reduced or parameter.dtype
            address = parameter.data_ptr()
            if address not in moved:
                moved[address] = parameter.data.to(device, dtype)
            parameter.data = moved[address]
        distiller.to(device)  # buffers
    if config.compile:
        compile_parts(distiller)
    is_copied = accelerator.num_processes > 1 and not is_sharded(config, accelerator)
    return accelerator.prepare_model(distiller) if is_copied else distiller


def compile_parts(distiller: Distiller) -> None:
    """Compile every layer and the loss: one compilation serves all layers that have the same sizes.

    Where ranks differ by layer, each would want one of its own, for minutes: there the student's attention
    stays as it is.
    """
    student, teacher = distiller.student, distiller.teacher
    parts: list[nn.Module] = [*teacher.model.layers]
    for layer in student.model.layers:
        if len(set(student.config.kv_lora_rank)) == 1:
            parts.append(layer)
        else:
            parts += [part for name, part in layer.named_children() if name != "self_attn"]
    # Of both models, in training and measuring.
    torch._dynamo.config.recompile_limit = max(64, 4 * len(parts))
    for part in parts:
        part.compile()
    distiller.chunk_loss = torch.compile(loss_of_chunk)


def _shard(distiller: Distiller, device: torch.device, reduced: torch.dtype | None) -> None:
    from torch.distributed import get_world_size
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=reduced, reduce_dtype=torch.float32)
    # Weights that are gathered together must have one type.
    distiller.float()
    for layer in distiller.teacher.model.layers:
        layer.to(reduced)
    for layer in (*distiller.student.model.layers, *distiller.teacher.model.layers):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embeddings, final norms and heads are gathered for the whole forward pass, where the loss needs them.
    fully_shard(distiller, mesh=mesh, mp_policy=policy)
    for buffer in distiller.buffers():
        buffer.data = buffer.data.to(device)


@contextmanager
def gradients_stay(model: nn.Module, accelerator: Accelerator, *, stay: bool) -> Iterator[None]:
    """Within it, gradients of a backward pass are not yet summed over processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not stay)
        yield
    elif stay:
        with accelerator.no_sync(model):
            yield
    else:
        yield


def share_frozen_weights(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Let both models hold one copy of what is frozen in the student and but for rounding the teacher's.

    The scale of a stock profile's residual stream, taken out again, leaves the last bit of a float32 open;
    weights that were rounded to bfloat16 there are others, and stay.
    """
    taught = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        other = taught.get(name.replace(".base_layer", ""))
        if parameter.requires_grad or other is None or other.shape != parameter.shape:
            continue
        if torch.allclose(parameter.float(), other.float(), rtol=1e-6, atol=0.0):
            parameter.data = other.data


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by its name in the student."""
    return {
        name.removeprefix("module.").removeprefix(STUDENT): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole(tensor: Tensor) -> Tensor:
    """The tensor gathered from all processes, if it is spread over them; all of them must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copies(tensors: Mapping[str, Tensor], accelerator: Accelerator) -> dict[str, Tensor]:
    """Whole copies on the CPU in the first process, nothing in the others; all of them must call it."""
    result = {}
    for name, tensor in tensors.items():
        gathered = whole(tensor).detach()
        if accelerator.is_main_process:
            result[name] = gathered.cpu().clone()
    return result


def _like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    if isinstance(parameter, DTensor) and value.dim():
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value.to(parameter.device)


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimiser's state, as `NAME::KEY`; empty before its first step."""
    return {
        f"{name}::{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }


def restore(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    """Put weights and the optimiser's state of a checkpoint where they belong."""
    assert weights.keys() == parameters.keys(), sorted(weights.keys() ^ parameters.keys())[:3]
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(_like(weights[name], parameter))
    for name, value in state.items():
        name, _, key = name.partition("::")
        parameter = parameters[name]
        # A fused optimiser counts its steps on the device, any other on the CPU.
        is_count = value.dim() == 0 and not optimizer.defaults.get("fused")
        kept: dict[str, Any] = optimizer.state[parameter]
        kept[key] = value if is_count else _like(value, parameter)
