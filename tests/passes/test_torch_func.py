"""torch.func over rewritten models: gradients, other weights, samples and models side by side, against
autograd one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from toys import SwiGLU, Trunk, features

from act24.errors import Act24Error
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    Pass,
    Pipeline,
    Recompute,
    Relu2FFN,
    Weight24,
    apply_,
)
from act24.passes.changed_weights import Unchanged

PASSES: dict[str, Callable[[], list[Pass]]] = {
    "transposable": lambda: [Weight24(scope="mlp")],
    "soft_threshold": lambda: [Weight24(scope="mlp", method="soft_threshold")],
    "sr_ste": lambda: [Weight24(scope="mlp", method="sr_ste")],
    "activation24": lambda: [Relu2FFN(), Activation24()],
    "mvue": lambda: [Relu2FFN(), Activation24(method="mvue")],
    "soft_dynamic": lambda: [Relu2FFN(), Activation24(method="soft_dynamic")],
    "low_rank": lambda: [LowRank(scope="mlp", mlp_rank=4)],
    "cola": lambda: [Cola(scope="mlp", mlp_rank=4, bottleneck="relu2"), Activation24()],
    "lost": lambda: [Lost(scope="mlp", mlp_rank=4)],
    "lora": lambda: [Lora(targets=("*.mlp.*",), dropout=0.0)],
}


class Case:
    """A rewritten model in one mode, and its function of weights and rows."""

    def __init__(self, passes: list[Pass], training: bool) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = Trunk(SwiGLU, layers=1).double()
        self.pipeline: Pipeline = apply_(self.model, passes)
        self.model.train(training)
        with torch.no_grad():
            for parameter in self.model.parameters():
                nn.init.normal_(parameter, std=0.3)
        self.x = features(3, 16).double()
        self.weights = {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def begin(self) -> None:
        """Each forward below draws what the first of an update draws."""
        if self.model.training:
            self.pipeline.begin_update_(0, self.x)

    def loss(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(self.model, dict(weights), (x,)).square().mean()

    def one_by_one(self, x: Tensor) -> dict[str, Tensor]:
        self.begin()
        loss = self.model(x).square().mean()
        return dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))


@pytest.fixture(params=[(name, mode) for name in PASSES for mode in ("eval", "train")], ids="-".join)
def case(request: pytest.FixtureRequest) -> Case:
    name, mode = request.param
    return Case(PASSES[name](), mode == "train")


def test_gradients(case: Case) -> None:
    expected = case.one_by_one(case.x)
    case.begin()
    detached = {name: p.detach() for name, p in case.weights.items()}
    torch.testing.assert_close(grad(case.loss)(detached, case.x), expected)


def test_gradients_of_samples(case: Case) -> None:
    expected = [case.one_by_one(row[None]) for row in case.x]
    case.begin()
    detached = {name: p.detach() for name, p in case.weights.items()}
    found = vmap(grad(lambda w, row: case.loss(w, row[None])), (None, 0))(detached, case.x)
    for index, one in enumerate(expected):
        torch.testing.assert_close({name: g[index] for name, g in found.items()}, one)


def others(case: Case) -> dict[str, Tensor]:
    return {name: 0.1 - 1.5 * p.detach() for name, p in case.weights.items()}


def test_other_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In evaluation masks are those of the weights that are there; an update's are those of its beginning."""
    monkeypatch.setattr(Unchanged, "violated", lambda self: False)  # written by hand, to compare with
    case.begin()
    found = case.loss(others(case), case.x)
    assert all(isinstance(p, nn.Parameter) for p in case.model.parameters())
    case.begin()
    with torch.no_grad():
        for name, value in others(case).items():
            case.model.get_parameter(name).copy_(value)
    torch.testing.assert_close(found, case.model(case.x).square().mean())


def test_models_side_by_side(case: Case) -> None:
    models = [{n: p.detach() for n, p in case.weights.items()}, others(case)]
    expected = []
    for weights in models:
        case.begin()
        expected.append(case.loss(weights, case.x))
    stacked = {name: torch.stack([m[name] for m in models]) for name in case.weights}
    buffers = {name: torch.stack([b, b]) for name, b in case.model.named_buffers()}
    case.begin()
    found = vmap(lambda w: case.loss(w, case.x))(stacked)
    torch.testing.assert_close(found, torch.stack(expected))
    case.begin()
    found = vmap(lambda w, b: case.loss({**w, **b}, case.x))(stacked, buffers)
    torch.testing.assert_close(found, torch.stack(expected))


def test_state_of_two_pipelines_side_by_side() -> None:
    models = [Case([Weight24(scope="mlp", method="ste")], training=False).model for _ in range(2)]
    with torch.no_grad():
        for parameter in models[1].parameters():
            parameter.mul_(-0.5)
    x = features(3, 16).double()
    weights, buffers = stack_module_state(models)  # type: ignore[arg-type]
    found = vmap(lambda w, b: functional_call(models[0], (w, b), (x,)))(weights, buffers)
    torch.testing.assert_close(found, torch.stack([model(x) for model in models]))


LEFT_OUT: dict[str, tuple[list[Pass], str]] = {
    "recompute": ([Cola(scope="mlp", mlp_rank=4), Recompute()], r"recompute keeps nothing .* without="),
    "activation_statistics": (
        [Relu2FFN(), ActivationStatistics()],
        r"activation_statistics cannot count inside of torch\.func: leave it out",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_what_cannot_be_in_it_says_so(name: str) -> None:
    passes, message = LEFT_OUT[name]
    case = Case(passes, training=True)
    expected = case.one_by_one(case.x)
    detached = {n: p.detach() for n, p in case.weights.items()}
    with pytest.raises(Act24Error, match=message):
        grad(case.loss)(detached, case.x)
    case.pipeline.lower_(0, without=[name])
    torch.testing.assert_close(grad(case.loss)(detached, case.x), expected)


def test_fp8_has_no_vmap() -> None:
    case = Case([Fp8()], training=True)
    case.begin()
    detached: dict[str, Any] = {n: p.detach() for n, p in case.weights.items()}
    assert grad(case.loss)(detached, case.x).keys() == detached.keys()
    with pytest.raises(Act24Error, match=r"linear_fp8 has no rule for torch\.func\.vmap"):
        vmap(case.model)(torch.stack([case.x, case.x]))
