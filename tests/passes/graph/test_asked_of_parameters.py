"""Attributes that somebody gives to a parameter or buffer, and the process's default device: no graph reads
them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import PassError, Weight24, plan


class Block(nn.Module):
    def __init__(self, factor: Callable[[Any], float]) -> None:
        super().__init__()
        self.up, self.down, self.factor = nn.Linear(8, 16), nn.Linear(16, 8), factor
        self.register_buffer("scale", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)) * self.factor(self))


ASKS: dict[str, tuple[Callable[[Any], float], str]] = {
    "getattr": (lambda m: 3.0 if getattr(m.up.weight, "boost", False) else 1.0, r"boost of up\.weight"),
    "hasattr": (lambda m: 3.0 if hasattr(m.down.bias, "boost") else 1.0, r"boost of down\.bias"),
    "buffer": (lambda m: 3.0 if hasattr(m.scale, "boost") else 1.0, "boost of scale"),
    "device": (lambda m: 1.0 if torch.get_default_device().type == "cpu" else 3.0, "get_default_device"),
}


@pytest.mark.parametrize("ask", ASKS)
def test_what_is_asked_of_them_leaves_the_block(ask: str) -> None:
    factor, said = ASKS[ask]
    with pytest.raises(PassError, match=f"Not traced: 0 .* asks .*{said}.* would freeze"):
        plan(nn.Sequential(Block(factor), Block(factor)), [Weight24()], probe=features(3, 8))


def test_what_every_tensor_has_may_be_asked_for() -> None:
    report = plan(
        nn.Sequential(*(Block(lambda m: m.up.weight.shape[0] / m.up.weight.ndim) for _ in range(2))),
        [Weight24()],
        probe=features(3, 8),
    )
    assert "100%" in str(report)
