"""Attention from plain products equals torch's own, values and gradients, with and without a window."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from care_mla.mla.causal_blocks import ROWS, causal_blocks

SCALING = 0.3


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("length", [1, ROWS, ROWS + 37, 2 * ROWS])
@pytest.mark.parametrize("window", [None, 20])
def test_it_is_attention(groups: int, length: int, window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, length, 12), (2, groups, length, 12), (2, groups, length, 8)
    inputs = [
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes
    ]
    behind_LL = torch.arange(length)[:, None] - torch.arange(length)
    mask_LL = (behind_LL >= 0) & (behind_LL < (window or length))
    query, key, value = inputs
    wanted_BNLV = scaled_dot_product_attention(
        query, key, value, attn_mask=mask_LL, scale=SCALING, enable_gqa=True
    )
    mask = None if window is None else mask_LL[None, None]
    found_BLNV, _ = causal_blocks(nn.Identity(), query, key, value, mask, scaling=SCALING)
    assert_close(found_BLNV.transpose(1, 2), wanted_BNLV)
    weight_BNLV = torch.randn(wanted_BNLV.shape, generator=generator, dtype=torch.float64)
    wanted = torch.autograd.grad((weight_BNLV * wanted_BNLV).sum(), inputs)
    found = torch.autograd.grad((weight_BNLV * found_BLNV.transpose(1, 2)).sum(), inputs)
    assert_close(found, wanted)


def test_a_token_after_is_never_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, 2, ROWS + 5, 4, generator=generator, dtype=torch.bfloat16) for _ in range(3)
    )
    before, _ = causal_blocks(nn.Identity(), query, key, value, None, scaling=SCALING)
    key[:, :, -1], value[:, :, -1] = 100.0, 100.0
    after, _ = causal_blocks(nn.Identity(), query, key, value, None, scaling=SCALING)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
