"""The statistics of calibration by definition: the whole model at once, float64, autograd, no tricks."""
# Shapes: B sequences, L positions, T tokens (B*L), D hidden_size, N query heads, G KV heads, H head_dim,
#         F frequencies (H/2), S vocabulary, O = 2*G*H rows [keys; values].

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel

from care_mla.calibrate.stream import sequence_generator


def eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Plain causal attention that keeps its logits, with their gradient, on the module."""
    repeat, length = query.shape[1] // key.shape[1], query.shape[2]
    module.key_BGLH = key
    logits_BNLL = query @ key.repeat_interleave(repeat, 1).transpose(-1, -2) * scaling
    seen_LL = torch.ones(length, length, dtype=torch.bool).tril()
    if (window := kwargs.get("sliding_window")) is not None:
        seen_LL &= ~torch.ones(length, length, dtype=torch.bool).tril(-window)
    module.logits_BNLL = logits_BNLL.masked_fill(~seen_LL, -math.inf)
    if logits_BNLL.requires_grad:
        module.logits_BNLL.retain_grad()
    output = module.logits_BNLL.softmax(-1) @ value.repeat_interleave(repeat, 1)
    return output.transpose(1, 2), None


AttentionInterface.register("slow_eager", eager)


class SlowModel:
    """A checkpoint folder's model in float64, with what its attention layers take and give kept on them."""

    def __init__(self, folder: Path) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="slow_eager"
        )
        self.layers = [layer.self_attn for layer in self.model.model.layers]
        for attention in self.layers:
            attention.register_forward_pre_hook(self._keep_input, with_kwargs=True)
            for name in ("q", "k", "v"):
                attention.get_submodule(f"{name}_proj").register_forward_hook(
                    self._keep_output(name, attention)
                )
                # What attention sees of queries and keys: the projection, or its norm where there is one.
                norm = f"{name}_norm" if hasattr(attention, f"{name}_norm") else f"{name}_proj"
                attention.get_submodule(norm).register_forward_hook(
                    self._keep_output(f"seen_{name}", attention)
                )
        config = self.model.config
        self.num_groups, self.head_dim = config.num_key_value_heads, config.head_dim
        self.inv_freq_F = self.model.model.rotary_emb.inv_freq.double()

    @staticmethod
    def _keep_input(attention: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        attention.x_TD = kwargs["hidden_states"].detach().flatten(0, 1)

    @staticmethod
    def _keep_output(name: str, attention: Any) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            if output.requires_grad:
                output.retain_grad()
            setattr(attention, name, output)

        return hook

    def pairs(self, x_BLX: Tensor) -> Tensor:
        """Heads as complex numbers (B, L, heads, F): half-split pairs."""
        real, imag = x_BLX.flatten(2).unflatten(-1, (-1, self.head_dim)).chunk(2, dim=-1)
        return torch.complex(real, imag)

    def gammas(self, tokens_BL: Tensor) -> list[Tensor]:
        """gamma of every layer, pair of positions by pair of positions: (N, F) each."""
        with torch.no_grad():
            self.model(tokens_BL)
        gammas = []
        self.leverages = []
        for attention in self.layers:
            prob_BNLL = attention.logits_BNLL.softmax(-1)
            # RoPE changes no lengths, so queries and keys before it do.
            query_BLNF, key_BLGF = self.pairs(attention.seen_q), self.pairs(attention.seen_k)
            repeat = query_BLNF.shape[2] // key_BLGF.shape[2]
            key_BLNF = key_BLGF.repeat_interleave(repeat, 2)
            turned = torch.zeros(query_BLNF.shape[2:], dtype=torch.complex128)
            weight = torch.zeros(query_BLNF.shape[2:], dtype=torch.float64)
            for t in range(tokens_BL.shape[1]):
                for s in range(t + 1):
                    a_BN1 = prob_BNLL[:, :, t, s, None]
                    w_NF = (
                        a_BN1 * (1 - a_BN1) * query_BLNF[:, t].abs() ** 2 * key_BLNF[:, s].abs() ** 2
                    ).sum(0)
                    turned += w_NF * torch.exp(1j * self.inv_freq_F * (s - t))
                    weight += w_NF
            gammas.append(turned / weight)
            self.leverages.append(self._leverage(attention, prob_BNLL.sum((1, 2)).flatten()))
        return gammas

    @staticmethod
    def _leverage(attention: Any, received_T: Tensor) -> Tensor:
        """Inverse, over D, of the covariance with weights 0.7 + 0.3 * attention received, damped by 1 %."""
        x_TD = attention.x_TD
        weight_T1 = 0.7 + 0.3 * received_T[:, None] / received_T.mean()
        covariance_DD = x_TD.T @ (weight_T1 * x_TD) / len(x_TD)
        size = len(covariance_DD)
        eye_DD = torch.eye(size, dtype=x_TD.dtype)
        return torch.linalg.inv(covariance_DD + 0.01 * covariance_DD.trace() / size * eye_DD) / size

    def statistics(self, tokens_BL: Tensor, gammas: list[Tensor], *, seed: int) -> list[dict[str, Tensor]]:
        """Sums over tokens of every layer, under the names of LayerSums."""
        logits_BLS = self.model(tokens_BL).logits
        loss = logits_BLS.new_zeros(())
        for b, logits_LS in enumerate(logits_BLS):
            uniform_L = torch.rand(len(logits_LS), generator=sequence_generator(seed, b), dtype=torch.float64)
            cumulative_LS = logits_LS.detach().softmax(-1).cumsum(-1)
            labels_L = (cumulative_LS < uniform_L[:, None]).sum(-1)
            loss = loss + torch.nn.functional.cross_entropy(logits_LS, labels_L, reduction="sum")
        loss.backward()
        return [self._sums(*each) for each in zip(self.layers, gammas, self.leverages, strict=True)]

    def _sums(self, attention: Any, gamma_NF: Tensor, leverage_DD: Tensor) -> dict[str, Tensor]:
        x_TD = attention.x_TD
        grad_k_TX, grad_v_TX = attention.k.grad.flatten(0, 1), attention.v.grad.flatten(0, 1)
        query_BLNF = self.pairs(attention.seen_q.detach())
        # The key without RoPE enters a logit as Re conj(q_h) gamma_h k / sqrt(H), times the square of RoPE's
        # amplitude.
        nope_BNLF = (
            torch.einsum("bnts,btnf->bnsf", attention.logits_BNLL.grad.to(torch.complex128), query_BLNF)
            * gamma_NF.conj()[:, None]
            * self.model.model.rotary_emb.attention_scaling**2
            / self.head_dim**0.5
        )
        nope_BGLF = nope_BNLF.unflatten(1, (self.num_groups, -1)).sum(2)
        nope_TX = torch.cat([nope_BGLF.real, nope_BGLF.imag], -1).transpose(1, 2).flatten(2).flatten(0, 1)

        leverage_T1 = torch.einsum("td,de,te->t", x_TD, leverage_DD, x_TD)[:, None]

        def second_moment(*parts: Tensor) -> Tensor:
            rows_TO = torch.cat(parts, -1)
            return rows_TO.T @ rows_TO

        def fisher(*parts: Tensor) -> Tensor:
            return second_moment(leverage_T1.sqrt() * torch.cat(parts, -1))

        sums = {
            "tokens": torch.tensor(float(len(x_TD)), dtype=torch.float64),
            "xx_DD": second_moment(x_TD),
            "x_D": x_TD.sum(0),
            "abs_x_D": x_TD.abs().sum(0),
            "q_energy_NF": query_BLNF.abs().square().sum((0, 1)),
            "fisher_exact_OO": fisher(grad_k_TX, grad_v_TX),
            "fisher_nope_OO": fisher(nope_TX, grad_v_TX),
            "key_felt_xx_DD": second_moment(grad_k_TX.norm(dim=-1, keepdim=True) * x_TD),
            "value_felt_xx_DD": second_moment(grad_v_TX.norm(dim=-1, keepdim=True) * x_TD),
        }
        if self.model.config.model_type == "qwen3":
            seen_grad_T1 = attention.seen_k.grad.flatten(0, 1).flatten(1).norm(dim=-1, keepdim=True)
            sums["normed_key_felt_xx_DD"] = second_moment(seen_grad_T1 * x_TD)
            for name, heads in (("q", "N"), ("k", "G")):
                y_TXH = getattr(attention, f"seen_{name}").detach().flatten(0, 1)
                sums[f"normed_{name}_{heads}H"] = y_TXH.sum(0)
                sums[f"normed_{name}_x_{heads}HD"] = torch.einsum("txh,td->xhd", y_TXH, x_TD)
        return sums
