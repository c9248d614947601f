"""Which activation a graph computes, against the functions of PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Trunk, features

from act24.passes import PassError, Relu2FFN, apply_, plan

HALF = math.sqrt(2 / math.pi)

#: As transformers' ACT2FN and other code bases write them.
GELU: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh, new": lambda x: 0.5 * x * (1.0 + torch.tanh(HALF * (x + 0.044715 * torch.pow(x, 3.0)))),
    "tanh, fast": lambda x: 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))),
    "tanh, by methods": lambda x: x.mul(0.5) * (x.pow(3).mul(0.044715).add(x).mul(HALF).tanh() + 1),
    "erf": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "quick": lambda x: x * torch.sigmoid(1.702 * x),
    "clipped": lambda x: torch.clip(F.gelu(x), -10, 10),
    "in float32": lambda x: F.gelu(x.float()).to(x.dtype),
    "approximate": lambda x: F.gelu(x, approximate="tanh"),
}
SILU: dict[str, Callable[[Tensor], Tensor]] = {
    "by sigmoid": lambda x: x * torch.sigmoid(x),
    "by exp": lambda x: x / (1 + torch.exp(-x)),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "mish": F.mish,
    "mish, spelled": lambda x: x * torch.tanh(F.softplus(x)),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "scaled": lambda x: 2 * F.silu(x),
    "steeper": lambda x: F.gelu(2 * x),
    "of a sum": lambda x: F.gelu(x + x.mean(-1, keepdim=True)),
    "drawn": lambda x: F.rrelu(x),
    "soft": lambda x: x * torch.softmax(x, -1),
}


def gated(activation: Callable[[Tensor], Tensor], fused: bool, gate_first: bool = True) -> nn.Sequential:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(16, 64) if fused else nn.ModuleList([nn.Linear(16, 32), nn.Linear(16, 32)])
            self.down = nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            gate, up = self.first(x).chunk(2, -1) if fused else (self.first[0](x), self.first[1](x))
            value = activation(gate)
            return self.down(value * up if gate_first else up * value)

    return nn.Sequential(Gated(), Gated())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spelling", [*GELU, *SILU])
def test_a_gate_is_what_it_computes_however_it_is_spelled(spelling: str, fused: bool) -> None:
    kind, activation = ("gelu", GELU[spelling]) if spelling in GELU else ("silu", SILU[spelling])
    model, other = gated(activation, fused), "silu" if kind == "gelu" else "gelu"
    with pytest.raises(PassError, match=f'gated by {kind}: set gate = "{kind}" to take it'):
        plan(model, [Relu2FFN(gate=other)])
    report = apply_(model, [Relu2FFN(gate=kind, width="keep")]).report  # type: ignore[arg-type]
    assert [row.before for row in report.rows] == [f"{kind}(gate)·up, F 32"] * 2
    block, x = model[0], features(3, 16)
    up, down = (
        [block.get_parameter(f"{path}.{name}") for name in ("weight", "bias")]
        for path in ("first" if fused else "first.1", "down")
    )
    assert up[0].shape == (32, 16)
    torch.testing.assert_close(block(x), F.linear(F.relu(F.linear(x, *up)).square(), *down))


@pytest.mark.parametrize("spelling", OTHERS)
def test_what_is_neither_is_not_taken_for_one(spelling: str) -> None:
    model, drawn = gated(OTHERS[spelling], False), torch.get_rng_state()
    with pytest.raises(
        PassError,
        match=r"but no down\(silu|but \w+ lies between its product and|gated by \w+: give the gate",
    ):
        plan(model, [Relu2FFN(gate="any")], check=False)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_an_activation_that_something_else_reads_stays() -> None:
    class Reread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            gate = GELU["erf"](self.gate(x))
            return self.down(gate * self.up(x)) + gate.mean()

    with pytest.raises(PassError, match=r"the output of mlp\.gate\.weight is used elsewhere too"):
        plan(Trunk(Reread), [Relu2FFN(gate="gelu")])


def test_a_plain_network_is_named_by_its_activation() -> None:
    for activation in (F.gelu, GELU["tanh, new"], GELU["quick"]):
        parts = [nn.Linear(16, 32), _Function(activation), nn.Dropout(), nn.Linear(32, 16)]
        for network in (nn.Sequential(*parts), nn.Sequential(nn.Sequential(*parts[:2]), parts[3])):
            with pytest.raises(
                PassError, match="its activation is gelu, and nothing gates it: give it relu²"
            ):
                plan(network, [Relu2FFN(gate="gelu")])


class _Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)
