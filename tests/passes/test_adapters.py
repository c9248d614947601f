"""Layers of PEFT's in a region stay modules: what PEFT does to them later has its effect. Here they are a
stand-in; the package itself is in `tests/tools/integrations/test_peft.py`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from act24 import apply_
from act24.passes import Activation24, LowRank, PassError, Weight24
from act24.relu2 import relu2

X = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))


class BaseTunerLayer:
    """PEFT's base class, by what tells it: its name and its module's."""

    __module__ = "peft.tuners.tuners_utils"


class Lora(nn.Module, BaseTunerLayer):
    """A linear and LoRA, which a flag switches off."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer, self.enabled = linear, True
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.lora_A = nn.Linear(linear.in_features, 2, bias=False)
        self.lora_B = nn.Linear(2, linear.out_features, bias=False)
        linear.requires_grad_(False)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        y = self.base_layer(x)
        return y + self.lora_B(self.lora_A(x)) if self.enabled else y


class FeedForward(nn.Module):
    def __init__(self, adapted: tuple[str, ...]) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        for name in adapted:
            setattr(self, name, Lora(getattr(self, name)))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


def networks(*adapted: str) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(FeedForward(adapted), FeedForward(adapted))


@pytest.mark.parametrize("adapted", [("up",), ("down",), ("up", "down")])
def test_activation24_takes_the_activation_and_leaves_what_can_be_switched(adapted: tuple[str, ...]) -> None:
    model = networks(*adapted)
    pipeline = apply_(model, [Activation24()], probe=X)
    (note,) = {row.note for row in pipeline.report.rows}
    assert note.startswith(" and ".join(adapted) + " carry LoRA")
    pipeline.begin_update_(0, X)
    model(X).sum().backward()
    for network in model:
        for name in adapted:
            assert getattr(network, name).lora_A.weight.grad.any()
            assert getattr(network, name).base_layer.weight.grad is None

    def by_hand(x: Tensor) -> Tensor:
        for network in model:
            h = relu2(network.up(x) if "up" in adapted else F.linear(x, network.up.weight, network.up.bias))
            ranks = h.unflatten(-1, (-1, 4)).argsort(-1, descending=True).argsort(-1)
            h = h * (ranks < 2).flatten(-2)  # naive: the two largest stay
            x = network.down(h) if "down" in adapted else F.linear(h, network.down.weight, network.down.bias)
        return x

    for enabled in (True, False):
        for module in model.modules():
            if isinstance(module, Lora):
                module.enabled = enabled
        torch.testing.assert_close(model(X), by_hand(X))


def test_a_width_that_2_of_4_does_not_divide_is_seen_through_the_adapter() -> None:
    model = networks("up", "down")
    model[0].up = Lora(nn.Linear(16, 30))
    model[0].down = Lora(nn.Linear(30, 16))
    report = apply_(model, [Activation24()], probe=X).report
    assert [(fqn, reason.partition(",")[0]) for _, fqn, reason in report.misses] == [("0", "F is 30")]


def test_linears_inside_of_adapters_are_regions_of_their_own() -> None:
    model = networks("up")
    before = model(X)
    with pytest.raises(PassError, match="frozen: name it in targets"):
        apply_(model, [Weight24(ignore=("*.down",))], probe=X)
    targets = ("*.up.base_layer", "*.down")
    low_rank = LowRank(attn_rank=2, mlp_rank=16, targets=targets, init="svd")
    pipeline = apply_(model, [low_rank, Activation24(from_step=9)], probe=X)
    assert {row.fqn for row in pipeline.report.rows if row.pass_name == "low_rank"} == {
        f"{n}.{place}" for n in (0, 1) for place in ("up.base_layer", "down")
    }
    assert pipeline.report.parameters_after == sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(model(X), before, rtol=1e-4, atol=1e-5)  # full rank: the same function
    trained = {name.rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.{place}" for n in (0, 1) for place in ("up.lora_A", "up.lora_B", "down")}


def test_nothing_takes_the_place_of_a_linear_that_a_graph_reads() -> None:
    model = networks()
    apply_(model, [LowRank(attn_rank=2, mlp_rank=2)], probe=X)
    with pytest.raises(PassError, match=r"a Linear in the place of up would not be called.*FeedForward"):
        model[0].up = nn.Linear(16, 32)


def test_a_train_method_of_its_own_is_not_lost() -> None:
    """As loralib's, which merges weights in evaluation mode."""

    class Merging(nn.Linear):
        def train(self, mode: bool = True) -> nn.Module:
            self.merged = not mode
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias)

    model = nn.Sequential(*(nn.Sequential(Merging(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)))
    with pytest.raises(PassError, match="has a train of its own"):
        apply_(model, [Activation24()], probe=X)
