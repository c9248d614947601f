"""activation_statistics: counts beside the activation, and nothing else changes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Relu2MLP, SwiGLU, Trunk, features

from act24.passes import Activation24, ActivationStatistics, PassError, Relu2FFN, apply_
from act24.sparse24.feed_forward.statistics import STATISTICS


def counts(model: nn.Module) -> dict[str, dict[str, float]]:
    """Every statistics buffer, by site and entry."""
    return {
        name.removesuffix(".activation_statistics"): dict(zip(STATISTICS, buffer.tolist(), strict=True))
        for name, buffer in model.named_buffers()
        if name.endswith("activation_statistics")
    }


def by_hand(h: Tensor) -> dict[str, float]:
    """The entries that need no groups along the tokens, with a sort."""
    activation = h.relu().square().double()
    ranks = activation.unflatten(-1, (-1, 4)).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    dropped = (ranks >= 2).flatten(-2)
    return {
        "elements": activation.numel(),
        "zeros": (activation == 0).sum().item(),
        "dropped_nonzeros": ((activation > 0) & dropped).sum().item(),
        "energy": activation.square().sum().item(),
        "dropped_energy": activation.square()[dropped].sum().item(),
    }


SPARSE: list[list[Any]] = [[], [Activation24()], [Activation24(backward="split_gemm")]]


@pytest.mark.parametrize("passes", SPARSE, ids=["dense", "2:4", "2:4 split_gemm"])
def test_counts_what_flows_through(passes: list[Any]) -> None:
    model, plain = Trunk(Relu2MLP), Trunk(Relu2MLP)
    plain.load_state_dict(model.state_dict())
    apply_(model, [*passes, ActivationStatistics()])
    if passes:
        apply_(plain, passes)
    expected: dict[str, Counter[str]] = {f"blocks.{i}.mlp": Counter() for i in (0, 1)}
    for seed in range(3):
        x = features(2, 4, 16, seed=seed)
        y = model(x)
        for block, entries in zip(plain.blocks, expected.values(), strict=True):
            entries.update(by_hand(F.linear(block.norm(x), block.mlp.up.weight)))
            x = block(x)
        assert torch.equal(x, y)
    actual = counts(model)
    assert actual.keys() == expected.keys()
    for site, entries in expected.items():
        assert entries["dropped_nonzeros"] > 0
        for name, value in entries.items():
            assert actual[site][name] == pytest.approx(value, rel=1e-5)


def test_no_part_of_the_state_dict_and_of_the_report() -> None:
    model = Trunk(Relu2MLP)
    state = list(model.state_dict())
    report = apply_(model, [ActivationStatistics()]).report
    assert list(model.state_dict()) == state
    assert report.rows == ()
    assert report.parameters_before == report.parameters_after


def test_buffers_live_through_a_change_of_pipeline() -> None:
    model = Trunk(SwiGLU)
    pipeline = apply_(model, [Relu2FFN(), Activation24(from_step=1), ActivationStatistics()])
    model(features(2, 16))
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    dense = counts(model)
    assert dense["blocks.0.mlp"]["elements"] == 2 * 128
    pipeline.lower_(1)
    model(features(2, 16))
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert counts(model)["blocks.0.mlp"]["elements"] == 4 * 128


def test_backward_runs_through() -> None:
    model, plain = Trunk(Relu2MLP), Trunk(Relu2MLP)
    plain.load_state_dict(model.state_dict())
    apply_(model, [Activation24(), ActivationStatistics()])
    apply_(plain, [Activation24()])
    for network in (model, plain):
        network(features(4, 16)).square().sum().backward()
    for (name, p), (_, q) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_nothing_to_count() -> None:
    with pytest.raises(PassError, match="activation_statistics matches nothing"):
        apply_(Trunk(SwiGLU), [ActivationStatistics()])
    apply_(Trunk(SwiGLU), [ActivationStatistics(optional=True)])


def test_a_width_without_groups_is_counted_all_the_same() -> None:
    model = nn.ModuleList([Relu2MLP(16, 30)])
    apply_(model, [ActivationStatistics()])
    model[0](features(3, 16))
    entries = counts(model)["0"]
    assert entries["elements"] == 90
    assert 0 < entries["zeros"] < 90
    assert entries["dropped_nonzeros"] == entries["dropped_energy"] == 0


def test_two_calls_of_a_module_are_two_sites() -> None:
    class Twice(Relu2MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model, plain = nn.ModuleList([Twice()]), Relu2MLP()
    plain.load_state_dict(model[0].state_dict())
    apply_(model, [ActivationStatistics()])
    x = features(3, 16)
    model[0](x)
    for site in ("0.call_1", "0.call_2"):
        for name, value in by_hand(plain.up(x)).items():
            assert counts(model)[site][name] == pytest.approx(value, rel=1e-5)
        x = plain(x)
