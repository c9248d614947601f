"""What a model is called with: refused where it is nothing of the kind, and guessed where nobody says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from act24.passes import Activation24, LowRank, PassError, apply_, plan


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("probe", [5, "text"])
def test_a_probe_that_is_none_is_refused(probe: Any) -> None:
    with pytest.raises(PassError, match=r"^probe is .*: give what model\(…\) takes"):
        plan(network(), [Activation24()], probe=probe)


def test_a_probe_without_a_tensor_of_its_own_has_a_name_in_the_report() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.inner(batch["x"])

    report = plan(Batched(), [Activation24()], probe=({"x": torch.randn(2, 8)},))
    assert report.checked.startswith("checked on the probe: ")


def test_tokens_are_tried_though_blocks_are_registered_first() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.embedding = nn.ModuleList([network(), network()]), nn.Embedding(50, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return x

    assert "as a whole was not checked" not in plan(Model(), [Activation24()]).checked


def test_a_guess_that_does_not_fit_is_not_called_a_failure_of_the_module() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(144, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.conv(x)).flatten(1))))

    checked = plan(Pictures(), [Activation24()]).checked
    assert "not checked: Pictures: no input was found that it takes" in checked
    assert "fails" not in checked
    given = plan(Pictures(), [Activation24()], probe=torch.randn(2, 3, 8, 8)).checked
    assert given == "checked on [2, 3, 8, 8]: 1 region computes what its module does"


def test_the_text_of_a_pass_is_no_pass() -> None:
    with pytest.raises(PassError, match="'activation24' is text: write the pass"):
        apply_(network(), ["activation24"])  # type: ignore[list-item]


def test_what_is_left_alone_has_its_own_name() -> None:
    model = network()
    model[0].requires_grad_(False)
    (coverage,) = plan(model, [LowRank(attn_rank=2, mlp_rank=2)]).coverage
    assert coverage.left[0][0] == "0"


def test_rows_of_one_module_are_printed() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = torch.relu(x @ w)
            return self.inner(x)

    report = plan(Listed(), [LowRank(attn_rank=2, mlp_rank=2)])
    assert str(report).splitlines()[1].split()[:2] == ["low_rank", "w"]
    assert [(row.parameters_before, row.parameters_after) for row in report.rows if row.fqn == "w"] == [
        (64, 32)
    ] * 3
