"""Gated networks are found by what they compute, however they are spelled, and in no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import PassError, Relu2FFN, apply_, plan


class Fused(nn.Module):
    """One linear for gate and up; `f` is F, `h` what it gives."""

    spelling = ""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo = nn.Linear(16, 64), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(between(self.wi(x), x, self))


class Apart(Fused):
    """A linear each; `g` and `u` are what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.w3 = nn.Linear(16, 32), nn.Linear(16, 32)


def between(h: Tensor, x: Tensor, m: Any) -> Tensor:
    names = {"h": h, "x": x, "m": m, "f": 32, "F": F, "torch": torch}
    if isinstance(m, Apart):
        names |= {"g": h, "u": m.w3(x)}
    return eval(m.spelling, names)


def network(spelling: str, kind: type[Fused] = Fused) -> nn.Sequential:
    made = type("Net", (kind,), {"spelling": spelling})
    return nn.Sequential(made(), made())


FUSED = [
    "(lambda a, b: F.silu(a) * b)(*h.chunk(2, dim=-1))",
    "(lambda a, *b: F.silu(a) * b[0])(*h.split([f, f], 2))",
    "[F.silu(a) * b for a, b in [torch.tensor_split(h, 2, dim=2)]][0]",
    "(lambda p: p[1] * p[0] * torch.sigmoid(p[0]))([t.contiguous() for t in h.chunk(2, -1)])",
    "(lambda p: F.silu(p[0]) * p[1])(h.chunk(2, dim=2))",
    "(lambda p: F.silu(p[0]) * p[1])(torch.chunk(h, chunks=2, dim=h.dim() - 1))",
    "(lambda p: F.silu(p[0]) * p[1])(h.split_with_sizes([f, f], 2))",
    "F.silu(h[:, :, :f]) * h[:, :, f:]",
    "F.silu(h[..., :-f]) * h[..., -f:]",
    "F.silu(h.narrow(2, f, f)) * h.narrow(2, 0, f)",
    "F.silu(h[..., :f]) * m.wi(x)[..., f:]",
    "(lambda p: F.silu(p[0]) * p[1])(h.unflatten(2, (2, -1)).unbind(2))",
    "(lambda p: F.silu(p[0]) * p[1])(h.reshape(x.shape[0], x.shape[1], 2, f).unbind(-2))",
    "torch.einsum('bsf,bsf->bsf', F.silu(h[..., :f]), h[..., f:])",
]
APART = [
    "g * torch.sigmoid(g) * u",
    "u * g * g.sigmoid()",
    "torch.sigmoid(g) * (g * u)",
    "g / (1 + torch.exp(-g)) * u",
    "torch.addcmul(torch.zeros_like(g), F.silu(g.float()).to(u.dtype), u)",
    "F.glu(torch.cat([g, g], -1)) * u",
]
PAIRS = [*((Fused, text) for text in FUSED), *((Apart, text) for text in APART)]


@pytest.mark.parametrize(("kind", "spelling"), PAIRS)
def test_a_gated_network_is_found_in_any_spelling(kind: type[Fused], spelling: str) -> None:
    model, x = network(spelling, kind), features(2, 3, 16)
    assert model(x).shape == x.shape
    (reach,) = apply_(model, [Relu2FFN()], probe=x).report.coverage
    assert reach.reached == reach.total
    expected = x
    for part in model:
        found = dict(part.named_parameters())
        up = "w3" if "w3.weight" in found and "wi.weight" not in found else "wi"
        assert found[f"{up}.weight"].shape == (128, 16)
        h = F.linear(expected, found[f"{up}.weight"], found[f"{up}.bias"])
        expected = F.linear(h.clamp(min=0) ** 2, found["wo.weight"], found["wo.bias"])
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("kind", "spelling", "gate"),
    [
        (Fused, "F.glu(h)", "sigmoid"),
        (Fused, "F.glu(h, dim=2)", "sigmoid"),
        (Apart, "F.glu(torch.cat([u, g], -1))", "sigmoid"),
        (Apart, "torch.tanh(g) * u", "tanh"),
        (Fused, "(lambda p: F.relu(p[0]) * p[1])(h.chunk(2, dim=2))", "relu"),
        (Apart, "F.hardswish(u) * g", "hardswish"),
    ],
)
def test_another_gate_is_named_with_what_to_do(kind: type[Fused], spelling: str, gate: str) -> None:
    model = network(spelling, kind)
    with pytest.raises(
        PassError, match=f"gated by {gate}: give the gate silu or gelu, which this pass takes"
    ):
        plan(model, [Relu2FFN(gate="any")], check=False)
    (reach,) = plan(model, [Relu2FFN(optional=True)], check=False).coverage
    assert reach.left[0][2] == (
        f"gated by {gate}: give the gate silu or gelu, which this pass takes, or leave it out with ignore"
    )


@pytest.mark.parametrize(
    ("kind", "spelling"),
    [
        (Apart, "F.silu(g) * u * 0.5"),
        (Apart, "F.silu(g - 0.05) * u"),
        (Apart, "F.silu(g) * (u + 1)"),
        (Apart, "F.silu(g) * u.flip(-1)"),
        (Apart, "F.silu(g) * u.cumsum(1)"),
        (Apart, "F.silu(g) * F.dropout(u, 0.0)"),
        (Apart, "F.silu(g) * u + x.mean()"),
        (Fused, "F.silu(h[..., :f]) * h[..., :f]"),
        (Fused, "F.silu(h[..., ::2]) * h[..., 1::2]"),
        (Fused, "F.silu(h[..., :f]) * h[..., f:] * m.wi.weight.mean()"),
    ],
)
def test_what_computes_something_else_is_left(kind: type[Fused], spelling: str) -> None:
    model, drawn = network(spelling, kind), torch.get_rng_state()
    with pytest.raises(PassError, match="relu2_ffn matches nothing"):
        plan(model, [Relu2FFN(gate="any")], check=False)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_parts_whose_number_depends_on_the_tokens_are_not_looped_over() -> None:
    for spelling in (
        "torch.cat([F.silu(p) for p in h.chunk(2, 1)], 1)[..., :f]",
        "sum(h.split(f, 1))[..., :f]",
    ):
        with pytest.raises(PassError, match=r"loops over .*: loop over a fixed number, and index it"):
            plan(network(spelling), [Relu2FFN()], check=False)


@pytest.mark.parametrize(
    ("spelling", "at"),
    [
        ("F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1]", 32),
        ("F.silu(h[..., f:]) * h[..., :f]", 0),
    ],
)
def test_a_width_that_is_kept_keeps_the_half_that_is_up(spelling: str, at: int) -> None:
    kind = type("Kept", (Fused,), {"spelling": spelling})
    torch.manual_seed(0)
    net, stock, x = nn.Sequential(kind(), kind()), nn.Sequential(kind(), kind()), features(3, 16)

    def by_hand(state: dict[str, Tensor]) -> Tensor:
        value = x
        for i in range(2):
            rows, bias = (state[f"{i}.wi.{name}"][at : at + 32] for name in ("weight", "bias"))
            hidden = F.linear(value, rows, bias).relu() ** 2
            value = F.linear(hidden, state[f"{i}.wo.weight"], state[f"{i}.wo.bias"])
        return value

    first, others = (
        by_hand({name: p.detach().clone() for name, p in net.state_dict().items()}),
        stock.state_dict(),
    )
    pipeline = apply_(net, [Relu2FFN(width="keep")], probe=x)
    assert [row.note for row in pipeline.report.rows] == ["weights kept, up's half of wi.weight, wi.bias"] * 2
    torch.testing.assert_close(net(x), first)
    mapped, fresh = pipeline.state_from_stock(others)
    assert fresh == ()
    net.load_state_dict(mapped)
    torch.testing.assert_close(net(x), by_hand(others))


def test_a_half_that_is_kept_stays_frozen_where_it_was() -> None:
    kind = type("Kept", (Fused,), {"spelling": "F.silu(h[..., f:]) * h[..., :f]"})
    net = nn.Sequential(kind(), kind())
    net[0].wi.requires_grad_(False)
    rows = apply_(net, [Relu2FFN(width="keep", targets=("0", "1"))], probe=features(3, 16)).report.rows
    assert rows[0].note == "weights kept, up's half of wi.weight, wi.bias; stay frozen: wi.weight, wi.bias"
    assert [net[i].get_parameter("wi.weight").requires_grad for i in (0, 1)] == [False, True]
