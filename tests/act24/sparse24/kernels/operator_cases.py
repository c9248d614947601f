"""The table of operators, filled, and one call for each."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

import torch

from act24.sparse24 import kernels
from act24.sparse24.kernels.packed_decode import packed_for_decode
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.transposable import transposable_mask

for module in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}."):
    importlib.import_module(module.name)

TOKENS, FEATURES, WIDTH = 128, 128, 64


def operator_cases() -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator. Entries of products are multiples of 1/8, which add up exactly in any
    order, and the packed matrices come from the reference."""

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randint(-4, 5, shape) / 8).bfloat16()

    hidden, grad = torch.randn(2, TOKENS, FEATURES).bfloat16()
    real, order, index = torch.rand(TOKENS) < 0.7, torch.randperm(TOKENS), torch.tensor([3, 9, 120])
    drawn = (hidden, torch.tensor(3), real, "relu2", "mvue", True, False, True, True, order)
    packed, slope, _, _ = OPERATORS["pack_activation"].reference(*drawn)
    x, weight_in, weight_out = draw(TOKENS, WIDTH), draw(FEATURES, WIDTH), draw(WIDTH, FEATURES)
    grad_y = draw(TOKENS, WIDTH)
    _, values, fields = OPERATORS["linear_pack"].reference(x, weight_in, True)
    narrow = grad.to(torch.float8_e4m3fn)
    over = 2.0 ** torch.randint(-8, -4, (TOKENS,))
    first = (hidden, None, None, "relu2", "naive", False, False, False, False, None, over)
    saved, *_ = OPERATORS["pack_activation"].reference(*first)
    scales = (torch.rand(TOKENS) + 0.01, torch.rand(FEATURES) + 0.01, torch.rand(FEATURES) + 0.01)
    return {
        "pack_activation": drawn,
        "count_activation": (hidden, real, "relu"),
        "pack_gradient": (grad, packed, slope, real, index, "relu2"),
        "unpack_gradient": (grad, packed, slope, "relu2"),
        "activation_gradient": (grad, hidden.relu(), "relu2"),
        "gather_features": (packed, index, real, 64),
        "product24": (packed, weight_out.T.contiguous(), 0, True, draw(len(index), FEATURES), index),
        "largest_magnitudes": (grad, True, True),
        "cast_e4m3": (grad, torch.rand(TOKENS) + 0.01, torch.rand(FEATURES) + 0.01, True),
        "product_e4m3": (narrow, narrow.flip(0).contiguous(), torch.rand(TOKENS), torch.rand(TOKENS)),
        "pack_gradient_e4m3": (grad, saved, over, None, real, index, *scales, "relu2", True),
        "product24_e4m3": (saved, narrow, 0, True, narrow[: len(index)].clone(), index),
        "token_order": (grad, [2, TOKENS // 2], "sequence"),
        "linear_pack": (x, weight_in, True),
        "linear_gradient": (grad_y, weight_out, values, fields),
        "recompute_gradient": (x, weight_in, grad_y, weight_out),
        "pack_weight": (hidden, transposable_mask(hidden)),
        "pack_weight_rows": (hidden, top2_of_4(hidden)),
        "pack_drawn": (grad, torch.tensor(3)),
        "best_transposable_mask": (hidden,),
        "skipping_product": (hidden[:3], draw(FEATURES, WIDTH), "relu2"),
        "dense_decode": (x[:1], draw(7, WIDTH)),
        "packed_decode": (hidden[:1], *packed_for_decode(torch.where(top2_of_4(grad.abs()), grad, 0))),
    }
