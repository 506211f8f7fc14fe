"""How well a run uses its device: floating-point operations per token, and the device's peak."""
# Letters: L positions of a block, N query heads, K width of their keys, H head_dim (of values).

from __future__ import annotations

from torch import nn

from care_mla.facts import ModelFacts

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
# Dense bfloat16 products per second, from the makers' data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "MI300X": 1307e12,
}


def peak_flops(device_name: str) -> float | None:
    """Peak of a GPU by the name that its driver has for it; None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def flops_per_token(student: nn.Module, facts: ModelFacts, length: int, *, key_width: int) -> float:
    """Operations that a token of a block of `length` takes, two per multiply-add.

    A weight takes 2 in a forward pass, 2 more for the gradient of its inputs, and 2 more for its own if it
    trains; attention takes L N (K + H) forward, since a query meets half of the keys on average, and twice
    that backward. The teacher goes forward alone. What gradient checkpointing computes again does not count.

    Args:
        student: with its adapters, if it has any, and `requires_grad` set.
        facts: the original's, and so the teacher's.
        key_width: of the student, K.
    """
    heads, head_dim, layers = facts.num_attention_heads, facts.head_dim, facts.num_hidden_layers
    head = facts.vocab_size * facts.hidden_size
    attention = outside = trained = 0.0
    is_head_trained = False
    for name, parameter in student.named_parameters():
        if name in EMBEDDINGS:
            is_head_trained |= parameter.requires_grad
            continue
        if parameter.dim() < 2:
            continue
        is_expert = ".experts." in name
        share = facts.num_experts_per_tok / facts.num_experts if is_expert else 1.0
        count = share * parameter.numel()
        if ".self_attn." in name:
            attention += count
        else:
            outside += count
        trained += count if parameter.requires_grad else 0.0
    trained += head if is_head_trained else 0.0
    projections = layers * facts.hidden_size * (2 * heads * head_dim + facts.cached_values)
    teacher = 2 * (projections + outside + head) + layers * length * heads * 2 * head_dim
    products = 3 * layers * length * heads * (key_width + head_dim)
    return teacher + 4 * (attention + outside + head) + 2 * trained + products
