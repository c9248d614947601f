"""The names in a line of coverage are those of the modules that are left: each of them, and no other."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import Relu2MLP, SwiGLU

from act24.passes import LowRank, Relu2FFN, Weight24, plan

#: What stands between two names, outside of braces.
BETWEEN = r", (?![^{]*\})"
RANKS: Any = {"attn_rank": 2, "mlp_rank": 2}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q_proj(x) @ self.k_proj(x).mT
        return self.o_proj(scores.softmax(-1) @ self.v_proj(x))


class Layer(nn.Module):
    """Layers differ: some have one network, some two, and some a list of them."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.attn, self.kind = Attention(), kind
        if kind == 0:
            self.mlp: nn.Module = SwiGLU(8, 12)
        elif kind == 1:
            self.mlp = Relu2MLP(8, 12)
            self.beside = Relu2MLP(8, 12)
        else:
            self.mlp = nn.Sequential(*(Relu2MLP(8, 12) for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(x)
        return x + self.mlp(x) + (self.beside(x) if self.kind == 1 else 0)


class Model(nn.Module):
    def __init__(self, kinds: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(map(Layer, kinds))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def spelled(text: str) -> Iterator[str]:
    """What a text stands for, read as a person reads it."""
    parts = re.split(r"\{([^}]*)\}", text)
    choices = [[part] for part in parts]
    for at in range(1, len(parts), 2):
        choices[at] = []
        for one in parts[at].split(","):
            first, dots, last = one.partition("..")
            choices[at] += [str(n) for n in range(int(first), int(last) + 1)] if dots else [one]
    return map("".join, itertools.product(*choices))


def names_of(text: str) -> list[str]:
    """The names in a list of such."""
    return [name for one in re.split(BETWEEN, text) for name in spelled(one)]


def models(seed: int) -> tuple[Any, random.Random]:
    draw = random.Random(seed)
    with torch.device("meta"):
        return Model([draw.randrange(3) for _ in range(draw.randrange(3, 6))]), draw


@pytest.mark.parametrize("one", [LowRank(**RANKS), Weight24()], ids=lambda p: p.name)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_frozen_here_and_there_is_named_and_nothing_else(one: Any, seed: int) -> None:
    model, draw = models(seed)
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    frozen = {name for name in linears if draw.random() < (0.1, 0.5, 0.9, 0.5)[seed]}
    frozen |= {name for name in linears if name.endswith(".k_proj")} if seed % 2 else set()
    for name in frozen:
        linears[name].requires_grad_(False)
    (coverage,) = plan(model, [one], check=False).coverage
    ((text, _, reason),) = coverage.left
    assert reason.startswith("frozen")
    assert f"left: {text} " in str(coverage)
    assert sorted(names_of(text)) == sorted(frozen)
    # Whoever follows the line takes these, and no other.
    rows = plan(model, [replace(one, targets=tuple(re.split(BETWEEN, text)))], check=False).rows
    assert {row.fqn for row in rows} == frozen


@pytest.mark.parametrize("seed", range(3))
def test_networks_that_a_pass_does_not_take_are_named_and_nothing_else(seed: int) -> None:
    model, _ = models(seed)
    (coverage,) = plan(model, [Relu2FFN(optional=True)], check=False).coverage
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "attn" not in name}
    gated = {f"layers.{i}.mlp." for i, layer in enumerate(model.layers) if layer.kind == 0}
    said = [name for text, _, _ in coverage.left for name in names_of(text)]
    assert sorted(said) == sorted(name for name in linears if not name.startswith(tuple(gated)))


def test_a_remedy_names_them_too() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bsd,edf->bsf", x, self.up).relu()

    class Mixed(Relu2MLP):
        def __init__(self, stacked: bool) -> None:
            super().__init__(8, 12)
            self.experts = Experts() if stacked else SwiGLU(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.experts(x))

    model = nn.Sequential(*(Mixed(i in (0, 1, 4)) for i in range(6)))
    (coverage,) = plan(model, [Weight24()], check=False).coverage
    ((names, _, reason),) = coverage.left
    assert names == "{0..1,4}.experts.up"
    assert reason.endswith('ignore = ["{0..1,4}.experts"]')
    ignored = plan(model, [Weight24(ignore=("{0..1,4}.experts",))], check=False).coverage[0]
    assert (ignored.reached, ignored.total, ignored.left) == (coverage.reached, coverage.reached, ())


def test_a_reason_that_names_a_place_names_the_places_that_it_is_about() -> None:
    class Twice(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = nn.Sequential(*(Twice(8, 12) if i in (1, 2, 5) else SwiGLU(8, 12) for i in range(6)))
    lines = str(plan(model, [Relu2FFN()], check=False)).splitlines()
    said = [line for line in lines if line.startswith("relu2_ffn leaves")]
    assert [line.partition(":")[0] for line in said] == ["relu2_ffn leaves {1..2,5} as it is"]
    assert "as it is: {1..2,5}.gate.weight is used more than once" in said[0]
