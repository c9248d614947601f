"""A cast of a parameter is that parameter, as in modded-nanoGPT's `CastedLinear`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Activation24, Cola, Fp8, LowRank, PassError, Relu2FFN, Weight24, apply_, plan

CASTS = [
    "F.linear(x, w.type_as(x))",
    "F.linear(x, w.to(x))",
    "F.linear(x, w.to(x.dtype), b.to(x.dtype))",
    "F.linear(x, w.to(dtype=x.dtype), b.to(dtype=x.dtype))",
    "F.linear(x, w.type(x.dtype))",
    "F.linear(x.bfloat16(), w.bfloat16())",
    "F.linear(x.to(torch.bfloat16), w.to(torch.bfloat16), b.to(torch.bfloat16))",
    "x @ w.type_as(x).T",
    "x @ w.t().to(x.dtype)",
    "torch.matmul(x, w.mT.type_as(x)) + b.type_as(x)",
]


class Casted(nn.Linear):
    spelling = ""

    def forward(self, x: Tensor) -> Tensor:
        names = {"x": x, "w": self.weight, "b": self.bias, "F": F, "torch": torch}
        return eval(self.spelling, names)


class Network(nn.Module):
    def __init__(self, spelling: str, gated: bool = False) -> None:
        super().__init__()
        kind = type("CastedLinear", (Casted,), {"spelling": spelling})
        self.c_fc, self.c_proj = kind(16, 64), kind(64, 16)
        self.gate = kind(16, 64) if gated else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        return self.c_proj(F.relu(h).square() if self.gate is None else F.silu(self.gate(x)) * h)


def by_hand(x: Tensor, spelling: str, weight: Tensor, bias: Tensor) -> Tensor:
    y = F.linear(x, weight.bfloat16())
    return (
        y + bias.bfloat16()
        if "+ b" in spelling
        else F.linear(x, weight.bfloat16(), bias.bfloat16())
        if "b.to" in spelling
        else y
    )


@pytest.mark.parametrize("spelling", CASTS)
def test_factors_of_a_cast_weight_are_cast_as_it_was(spelling: str) -> None:
    """In bfloat16 over parameters in float32, bit for bit, and back to the dense weight."""
    model, x = nn.Sequential(Network(spelling)), features(2, 3, 16).bfloat16()
    report = apply_(model, [LowRank(attn_rank=4, mlp_rank=4)], probe=x).report
    assert [row.fqn for row in report.rows] == ["0.c_fc", "0.c_proj"]
    assert not report.partial
    found = dict(model[0].named_parameters())
    assert {p.dtype for p in found.values()} == {torch.float32}
    h = x
    for name in ("c_fc", "c_proj"):
        low = F.linear(h, found[f"{name}.weight_in"].bfloat16())
        h = by_hand(low, spelling, found[f"{name}.weight_out"], found[f"{name}.bias"])
        h = F.relu(h).square() if name == "c_fc" else h
    actual = model(x)
    assert actual.dtype == torch.bfloat16
    assert torch.equal(actual, h)
    grads = torch.autograd.grad(actual.float().sum(), [p for n, p in found.items() if "weight" in n])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("spelling", CASTS[:5])
def test_a_gated_network_of_cast_weights_becomes_a_plain_one(spelling: str) -> None:
    model, x = nn.Sequential(Network(spelling, gated=True)), features(2, 3, 16).bfloat16()
    (reach,) = apply_(model, [Relu2FFN(width="keep")], probe=x).report.coverage
    assert reach.reached == reach.total
    found = dict(model[0].named_parameters())
    assert "gate.weight" not in found
    h = F.relu(by_hand(x, spelling, found["c_fc.weight"], found["c_fc.bias"])).square()
    assert torch.equal(model(x), by_hand(h, spelling, found["c_proj.weight"], found["c_proj.bias"]))


@pytest.mark.parametrize("spelling", [CASTS[0], CASTS[2], CASTS[8]])
def test_passes_that_do_not_keep_a_cast_say_so(spelling: str) -> None:
    said = "its weight is cast in forward, which this pass does not keep: read it as it is"
    for one in (Weight24(), Fp8()):
        with pytest.raises(PassError, match=said) as error:
            plan(nn.Sequential(Network(spelling)), [one], check=False)
        assert len(str(error.value)) < 300
    model, x = nn.Sequential(Network(spelling)), features(2, 3, 16)
    before = model(x)
    pipeline = apply_(model, [Activation24(from_step=1)], probe=x)
    (reach,) = pipeline.report.coverage
    assert (reach.reached, reach.left[0][2].startswith(said)) == (0, True)
    assert torch.equal(model(x), before)
    pipeline.lower_(1)
    h = F.relu(F.linear(x, model[0].c_fc.weight)).square()  # type: ignore[union-attr,arg-type]
    kept = torch.zeros_like(h).unflatten(-1, (-1, 4))
    kept.scatter_(-1, (groups := h.unflatten(-1, (-1, 4))).topk(2, -1).indices, 1)
    plain = F.linear((groups * kept).flatten(-2), model[0].c_proj.weight)  # type: ignore[union-attr,arg-type]
    if "b.to" not in spelling:
        with pipeline.evaluation():
            torch.testing.assert_close(model(x), plain)


def test_a_bottleneck_of_cast_factors_becomes_sparse() -> None:
    model, x = nn.Sequential(Network(CASTS[0], gated=True)), features(2, 3, 16).bfloat16()
    passes: list[Any] = [Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2"), Activation24(from_step=1)]
    pipeline = apply_(model, passes, probe=x)
    before = model(x)
    pipeline.lower_(1)
    with pipeline.evaluation():
        assert model(x).dtype == before.dtype == torch.bfloat16


def test_a_cast_and_another_reader_are_two_purposes() -> None:
    class Read(Network):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.c_fc.weight.to(x.dtype).mean()

    report = plan(nn.Sequential(Read(CASTS[0])), [LowRank(attn_rank=4, mlp_rank=4)], check=False)
    assert [row.fqn for row in report.rows] == ["0.c_proj"]
    assert "something else than linears reads it too" in report.coverage[0].left[0][2]


@pytest.mark.parametrize(
    "spelling", ["w.to(torch.int8).to(x.dtype)", "w.to(torch.float8_e4m3fn).type_as(x)", "w.int().to(x)"]
)
def test_a_cast_that_quantises_is_a_computation(spelling: str) -> None:
    with pytest.raises(PassError, match="low_rank matches nothing"):
        plan(
            nn.Sequential(Network(f"F.linear(x, {spelling})")),
            [LowRank(attn_rank=4, mlp_rank=4)],
            check=False,
        )
