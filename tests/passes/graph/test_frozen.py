"""What stands in an opened module's place: what can be read of it, and what can no longer be set."""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Relu2MLP, SwiGLU, Trunk, features

from act24.passes import Activation24, Fp8, LowRank, PassError, Relu2FFN, Weight24, apply_
from act24.passes.graph.region import RegionModule

MLP_RANK = {"scope": "mlp", "mlp_rank": 2}


# Parents that read what stands below them


class Reading(nn.Module):
    """Reads its child past its forward; the default argument keeps it from being traced."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.child = SwiGLU(4, 8)
        self.child.scale = 0.5
        self.how = how

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        if self.how == "weight":
            return self.child(F.linear(F.linear(x, self.child.up.weight), self.child.up.weight.T))
        if self.how == "gate":
            return self.child(x) + self.child.gate(x).sum()
        return self.child(x) * self.child.scale


def test_a_parent_that_reads_a_weight_of_its_child_is_found() -> None:
    model = nn.Sequential(Reading("weight"), Reading("weight"))
    report = apply_(model, [LowRank(targets=("*.child.*",), **MLP_RANK)]).report
    said = {place: why for _, place, why in report.misses}
    assert [*said] == ["0.child.up", "1.child.up"]
    assert said["0.child.up"].startswith("a Reading around it reads its weight past the linear: give each")
    assert model(features(3, 4)).shape == (3, 4)
    model = nn.Sequential(Reading("gate"), Reading("gate"))
    before = {name: id(p) for name, p in model.named_parameters()}
    with pytest.raises(PassError, match=r"fails where the stock one runs.*ignore"):
        apply_(model, [Relu2FFN()])
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert type(model[0].child) is SwiGLU


class Methods(SwiGLU):
    def project(self, x: Tensor) -> Tensor:
        return self.up(x)

    def weigh(self, x: Tensor) -> Tensor:
        return F.linear(x, self.up.weight)

    @property
    def first(self) -> nn.Module:
        return self.up


#: What a parent calls of its child besides its forward.
CALLS: dict[str, Any] = {
    "a method": lambda child, x: child.project(x),
    "a method that reads": lambda child, x: child.weigh(x),
    "a method of the class": lambda child, x: Methods.project(child, x),
    "a part": lambda child, x: child.first(x),
}


class Calling(nn.Module):
    def __init__(self, how: str, traced: bool) -> None:
        super().__init__()
        self.child, self.last, self.how, self.traced = Methods(4, 8), nn.Linear(8, 4), how, traced

    def forward(self, x: Tensor) -> Tensor:
        if not self.traced and x.sum() > 1e9:
            return x
        return self.child(x) + self.last(CALLS[self.how](self.child, x))


@pytest.mark.parametrize("how", CALLS)
def test_another_method_of_a_child_is_computed_as_it_was_or_refused_by_name(how: str) -> None:
    ranks = {"attn_rank": 4, "mlp_rank": 4, "init": "svd"}  # full, so that the numbers are the same
    x = features(3, 4)
    model = nn.Sequential(Calling(how, traced=True), Calling(how, traced=True))
    expected = model(x)
    apply_(model, [LowRank(**ranks)])  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    model = nn.Sequential(Calling(how, traced=False), Calling(how, traced=False))
    expected = model(x)
    before = {name: id(p) for name, p in model.named_parameters()}
    said = {
        "a method of the class": "a Linear that a pass has opened cannot be called",
        "a part": "first of a",
    }
    with pytest.raises(PassError, match=f"{said.get(how, r'(project|weigh) of a')}.*ignore"):
        apply_(model, [LowRank(**ranks)])  # type: ignore[arg-type]
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert torch.equal(model(x), expected)
    apply_(model, [LowRank(**ranks, targets=("*.last",), ignore=("*.child",))])  # type: ignore[arg-type]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_longer_there_says_so() -> None:
    class Block(SwiGLU):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.act = nn.SiLU()

        def norm(self) -> float:
            return float(self.up.weight.norm())

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.gate(x)) * self.up(x))

    model = nn.Sequential(Block(), Block())
    apply_(model, [Relu2FFN()])
    for name in ("norm", "act"):
        with pytest.raises(
            AttributeError, match=f"^{name} of a Block is not there: a pass has made one graph"
        ):
            getattr(model[0], name)
        assert not hasattr(model[0], name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = model[0].nothing


def test_sizes_of_a_linear_are_those_of_the_weight_that_stands_there() -> None:
    model = nn.Sequential(SwiGLU(4, 8), SwiGLU(4, 8))
    apply_(model, [Relu2FFN()])
    for linear in (model[0].up, model[0].down):
        assert (linear.out_features, linear.in_features) == tuple(linear.weight.shape)
    assert model[0].up.out_features != 8

    class Scaled(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.up.out_features**-0.5

    scaled = nn.Sequential(Scaled(4, 8), Scaled(4, 8))
    with pytest.raises(PassError, match=r"asks in forward for the shape of up\.weight"):
        apply_(scaled, [Relu2FFN()])
    apply_(scaled, [LowRank(**MLP_RANK)])  # which changes none of them
    assert (scaled[0].up.out_features, scaled[0].up.in_features) == (8, 4)


def test_plain_values_of_a_child_stay_readable_and_are_not_written() -> None:
    model = nn.Sequential(Reading("scale"), Reading("scale"))
    apply_(model, [Relu2FFN()])
    x = features(3, 4)
    assert torch.equal(model[0](x), model[0].child(x) * 0.5)
    assert isinstance(model[0].child, RegionModule)
    model[0].child.scale = 0.5  # as it is
    with pytest.raises(PassError, match="scale of a SwiGLU cannot be set any more"):
        model[0].child.scale = 0.25
    with pytest.raises(PassError, match="gate of a SwiGLU cannot be set"):
        model[0].child.gate = nn.Linear(4, 8)
    twin = copy.deepcopy(model)
    with pytest.raises(PassError, match="scale of a SwiGLU"):
        twin[1].child.scale = 0.25


class Holding(nn.Module):
    """Calls its blocks as `how` says; the default argument keeps it from being traced."""

    def __init__(self, how: str, block: type[nn.Module]) -> None:
        super().__init__()
        blocks = self.blocks = nn.ModuleList(block(16, 32) for _ in range(3))
        self.run: Any = {
            "list": [*blocks],
            "bound": [block.forward for block in blocks],
            "partial": [functools.partial(block) for block in blocks],
            "closure": [lambda x, block=block: block(x) for block in blocks],
            "twice": [blocks[0]],
        }.get(how, [])
        self.how = how

    def forward(self, x: Tensor, again: bool = False) -> Tensor:
        for block in self.run:
            x = x + block(x)
        for block in self.blocks if self.how in ("plain", "twice") else self.blocks[:2]:
            x = x if self.run and self.how != "twice" else x + block.forward(x)
        return x


@pytest.mark.parametrize(
    ("p", "block"),
    [
        (Relu2FFN(), SwiGLU),
        (Activation24(from_step=2), Relu2MLP),
        (Weight24(), Relu2MLP),
        (Fp8(precision="fp8"), Relu2MLP),
    ],
    ids=lambda p: getattr(p, "name", ""),
)
def test_a_module_that_is_held_outside_is_found(p: Any, block: type[nn.Module]) -> None:
    """By every pass, those too that make no parameter and replace none."""
    said = r"does not read it|all the same|reads its weight past the linear"
    for how in ("list", "bound", "partial", "closure", "twice"):
        model = nn.Sequential(Holding(how, block))
        with pytest.raises(PassError, match=said):
            apply_(model, [p])
        assert type(model[0].blocks[0]) is block
    assert "without it" not in apply_(Holding("plain", block), [p]).report.checked
    left = apply_(Holding("two", block), [p]).report.checked
    assert left.endswith("not checked: blocks.2: the model runs on the probe without it")


SWITCH = 2.0


class Settings:
    factor = 1.0

    def __init__(self) -> None:
        self.factor = 3.0
        self.other = 1


def test_values_outside_are_compared_at_every_call_and_lowering(monkeypatch: Any) -> None:
    class Configured(SwiGLU):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.settings = Settings()

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x)) * self.settings.factor * SWITCH

    model = nn.Sequential(Configured(), Configured())
    settings = model[0].settings
    pipeline = apply_(model, [Relu2FFN(), Weight24(scope="mlp", from_step=3)])
    settings.other = 2  # nobody reads it
    with pipeline.evaluation():
        twin = copy.deepcopy(model.eval())
    pipeline.lower_(3)
    settings.factor = 4.0
    with pytest.raises(PassError, match=r"settings\.factor was 3\.0 when the model was traced, and is 4\.0"):
        pipeline.lower_(0)
    x = torch.randn(2, 4)
    with pytest.raises(PassError, match=r"settings\.factor was 3\.0 when the model was traced, and is 4\.0"):
        model(x)
    assert twin(x).shape == x.shape  # whose values nobody knows
    settings.factor = 3.0
    assert model(x).shape == x.shape
    monkeypatch.setattr(sys.modules[__name__], "SWITCH", 5.0)
    with pytest.raises(PassError, match=r"SWITCH of .*test_frozen was 2\.0"):
        pipeline.begin_update_(0)


def test_values_outside_are_compared_where_a_part_of_the_model_is_called(monkeypatch: Any) -> None:
    """As who takes hidden states and multiplies with the head does; also of a copy with its pipeline."""

    class Scaled(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * SWITCH

    class WithHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = Trunk(Scaled)
            self.head = nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.model(x))

    model, x = WithHead(), features(3, 16)
    pipeline = apply_(model, [Weight24(scope="mlp", from_step=3)], probe=x)
    twin, its = copy.deepcopy((model, pipeline))
    assert torch.equal(twin(x), model(x))
    monkeypatch.setattr(sys.modules[__name__], "SWITCH", 5.0)
    for call in (model, model.model, model.forward, twin, twin.model, twin.forward):
        with pytest.raises(PassError, match=r"SWITCH of .*test_frozen was 2\.0"):
            call(x)
    with pytest.raises(PassError, match="SWITCH"):
        its.lower_(3)
