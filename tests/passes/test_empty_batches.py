"""A batch without tokens, as an expert gets that nothing is routed to: outputs of stock shapes and dtypes,
gradients of zero, and nothing that spoils the batch behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from toys import llama, tokens

from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    MaskedLora,
    Pass,
    Recompute,
    Relu2FFN,
    SparseMask,
    Weight24,
    apply_,
)
from act24.sparse24.feed_forward.methods import METHODS
from act24.sparse24.weight.methods import METHODS as WEIGHT_METHODS

RANKS = {"attn_rank": 8, "mlp_rank": 8}
SIZES = {"layers": 1, "intermediate_size": 64}
PASSES: dict[str, list[Pass]] = {
    "low_rank": [LowRank(**RANKS)],
    "cola": [Cola(**RANKS, bottleneck="relu2"), Activation24(), Recompute()],
    "lost": [Lost(**RANKS)],
    "sparse_mask": [SparseMask()],
    "lora": [Lora(targets=("*",), dropout=0.0)],
    "masked_lora": [MaskedLora()],
    "fp8": [Fp8(), ActivationStatistics()],
    "fp8 tensorwise": [Fp8(scaling="tensorwise"), ActivationStatistics()],
    "activation24 fp8": [Relu2FFN(), Activation24(precision="fp8"), ActivationStatistics()],
    "activation24 fp8 sparse": [Relu2FFN(), Activation24(precision="fp8", backward="sparse")],
    "activation24 split_gemm": [Relu2FFN(), Activation24(backward="split_gemm"), ActivationStatistics()],
    "weight24 fp8": [Weight24(precision="fp8")],
    "weight24 fp8 exact": [Weight24(precision="fp8", method="soft_threshold")],
    **{f"activation24 {method}": [Relu2FFN(), Activation24(method=method)] for method in METHODS},
    # SR-STE's gradient has a decay of what is masked, tokens or none.
    **{f"weight24 {method}": [Weight24(method=method)] for method in WEIGHT_METHODS if method != "sr_ste"},
}


@pytest.mark.parametrize("name", PASSES)
def test_no_tokens(name: str) -> None:
    stock, model = llama(**SIZES).train(), llama(**SIZES).train()
    pipeline = apply_(model, PASSES[name], check=False)
    for shape in ((0, 9), (2, 0)):
        nothing = torch.zeros(shape, dtype=torch.long)
        for dtype in (None, torch.bfloat16):
            pipeline.begin_update_(0, tokens())
            found, expected = (_logits(one, nothing, dtype) for one in (model, stock))
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            found.float().sum().backward()
            trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            assert all(g is not None and not g.any() for g in trained.values())
            model.zero_grad()
        with pipeline.evaluation(), torch.no_grad():
            assert _logits(model, nothing, None).shape == expected.shape
    assert all(b.isfinite().all() for b in model.buffers() if b.is_floating_point())
    _logits(model, tokens(), None).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def _logits(model: torch.nn.Module, ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return model(ids)
