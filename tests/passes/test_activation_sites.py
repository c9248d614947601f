"""Sites have names of their own: two activations of one module share no scale, seed or statistic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import Relu2MLP, Trunk, features

from act24.passes import Activation24, ActivationStatistics, PassError, apply_, plan
from act24.passes.activation24 import SCALE, SEED
from act24.passes.activation_statistics import BUFFER
from act24.passes.graph.region import buffers_of
from act24.sparse24.feed_forward.statistics import STATISTICS
from act24.sparse24.pattern.soft_threshold import scale_from_sums, scale_sums, soft_threshold24


class TwoNetworks(nn.Module):
    """Two networks in one module, the first behind the second in the graph's order of their last products."""

    def __init__(self) -> None:
        super().__init__()
        self.first_up, self.second_up = nn.Linear(16, 32, bias=False), nn.Linear(16, 32, bias=False)
        self.first_down, self.second_down = nn.Linear(32, 16, bias=False), nn.Linear(32, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = F.relu(self.first_up(x)).square()
        second = F.relu(self.second_up(x)).square()
        behind = self.second_down(second)
        return self.first_down(first) + behind


SITES = [f"blocks.{i}.mlp.{name}" for i in (0, 1) for name in ("first_up", "second_up")]


def test_two_networks_of_a_module_have_two_scales_seeds_and_statistics() -> None:
    model = Trunk(TwoNetworks)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.second_up.weight[::4] *= 20  # of every four one that outweighs the others
    plain = Trunk(TwoNetworks)
    plain.load_state_dict(model.state_dict())
    x = features(2, 8, 16)
    soft = Activation24(method="soft_dynamic", calibration_samples=16)
    pipeline = apply_(model, [soft, ActivationStatistics()])
    pipeline.begin_update_(0, x)
    scales = buffers_of(pipeline.regions, SCALE)
    assert [*scales] == SITES
    rows = plain.blocks[0].norm(x).flatten(0, 1)
    for name in ("first_up", "second_up"):
        activation = torch.relu(rows.detach() @ getattr(plain.blocks[0].mlp, name).weight.detach().T) ** 2
        expected = scale_from_sums(scale_sums(activation.double(), soft_threshold24(activation.double())))
        assert float(scales[f"blocks.0.mlp.{name}"]) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(scales[SITES[0]]) - float(scales[SITES[1]])) > 0.02
    model(x)
    counts = buffers_of(dict(model.named_modules()), BUFFER)
    assert {*counts} == {*SITES}
    hidden = rows @ plain.blocks[0].mlp.first_up.weight.T
    assert counts[SITES[0]][STATISTICS.index("zeros")] == (hidden <= 0).sum()
    assert not torch.equal(counts[SITES[0]], counts[SITES[1]])
    assert [row.fqn for row in pipeline.report.rows] == SITES


def test_every_site_draws_by_a_seed_of_its_own() -> None:
    model = Trunk(TwoNetworks)
    pipeline = apply_(model, [Activation24(method="mvue")])
    seeds = buffers_of(pipeline.regions, SEED)
    assert [*seeds] == SITES
    pipeline.begin_update_(0)
    assert len({int(seed) for seed in seeds.values()}) == 4


def test_names_are_the_same_before_and_after_and_beside_other_passes() -> None:
    """Dense, 2:4, only one of them 2:4: the buffers are the same tensors."""
    first, second = (
        Activation24(targets=(f"*.{n}_up",), from_step=s) for n, s in (("first", 2), ("second", 1))
    )
    model = Trunk(TwoNetworks)
    pipeline = apply_(model, [first, second, ActivationStatistics()])
    counts = buffers_of(pipeline.regions, BUFFER)
    assert {*counts} == {*SITES}
    x = features(2, 8, 16)
    elements = STATISTICS.index("elements")
    for step in range(4):
        pipeline.lower_(step)
        model(x)
        assert [int(count[elements]) for count in counts.values()] == [16 * 32 * (step + 1)] * 4
    sparse = [m.path for p in pipeline.active[:2] for _, m in pipeline.matches(p)]  # type: ignore[arg-type]
    assert sparse == ["mlp.first_up"] * 2 + ["mlp.second_up"] * 2


def test_a_single_network_keeps_the_name_that_checkpoints_have() -> None:
    model = Trunk(Relu2MLP)
    apply_(model, [Activation24(method="soft_dynamic"), ActivationStatistics()])
    assert [n for n in model.state_dict() if n.endswith(SCALE)] == [
        f"blocks.{i}.mlp.activation24_scale" for i in (0, 1)
    ]


def test_where_names_cannot_be_told_apart_the_plan_refuses() -> None:
    """Calls are numbered, and a module that has the name of a call already is in the way."""

    class InTheWay(Relu2MLP):
        def __init__(self) -> None:
            super().__init__()
            self.call_1 = Relu2MLP()

        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(super().forward(x))
            return self.call_1(x)

    for p in (Activation24(), ActivationStatistics()):
        with pytest.raises(PassError, match="could not be told apart"):
            apply_(Trunk(InTheWay), [p])


@pytest.mark.parametrize("copied", [False, True])
def test_regions_know_buffers_by_kind_not_by_the_end_of_a_name(copied: bool) -> None:
    import copy

    class Named(Relu2MLP):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("my_activation24_scale", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.my_activation24_scale.sum()

    model: Any = Trunk(Named)
    apply_(model, [Activation24(method="soft_dynamic")])
    model = copy.deepcopy(model) if copied else model
    found = buffers_of(dict(model.named_modules()), SCALE)
    assert [*found] == ["blocks.0.mlp", "blocks.1.mlp"]


ALONG_TOKENS = [
    "torch.einsum('btf->bft', {})",
    "{}.adjoint()",
    "{}.rot90(1, (1, 2))",
    "{}.mT",
    "{}.unsqueeze(-1)",
    "{}.reshape(2, 16, 5)",
    "{}.reshape(2, -1)",
    "{}[:, :, 0]",
    "torch.einsum('btf,st->bsf', {}, self.mix.weight).mT",
]
STAY = ["F.dropout({} * 2 + 1, 0.0)", "{}.view(2, 5, 4, 4).flatten(1, 2)", "torch.einsum('btf->tbf', {})"]
STAY += ["torch.cat({}.chunk(2, -1), 1)", "F.pad({}[:, 1:], (0, 4)).to(torch.float32)", "self.norm({})"]


def test_a_relu_is_a_site_only_where_features_are_known_to_be_last() -> None:
    """Along the tokens 2:4 would let each see the ones behind it."""

    class Moved(nn.Module):
        move = "{}"

        def __init__(self) -> None:
            super().__init__()
            self.up, self.mix, self.norm = nn.Linear(8, 16), nn.Linear(5, 5), nn.LayerNorm(16)

        def forward(self, x: Tensor) -> Tensor:
            h = eval(self.move.format("self.up(x)"))
            return torch.tanh(F.relu(h).square())

    for moves, taken in ((ALONG_TOKENS, False), (STAY, True)):
        for move in moves:
            kind = type("Moved", (Moved,), {"move": move})
            rows = plan(kind(), [Activation24(optional=True)], check=False).rows
            assert bool(rows) is taken, move


def test_a_product_with_a_weight_tells_where_its_features_are() -> None:
    class Product(nn.Module):
        equation = ""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(features(16, 8))
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.einsum(self.equation, self.head(x).tanh(), self.weight)).mean()

    for equation, taken in (("btd,fd->btf", True), ("btd,fd->bft", False), ("btd,ft->bfd", False)):
        kind = type("Product", (Product,), {"equation": equation})
        rows = plan(kind(), [Activation24(optional=True)], check=False).rows
        assert bool(rows) is taken, equation


@pytest.mark.parametrize(
    ("hidden", "gates"),
    [
        (lambda h, u: 0.5 * F.relu(h) ** 2, False),
        (lambda h, u: h * F.relu(h), False),
        (lambda h, u: u * F.relu(h), True),
        (lambda h, u: F.relu(h) * h.roll(1, -1), True),
        (lambda h, u: (lambda g, v: torch.cat([F.relu(g) * v, g], -1))(*h.chunk(2, -1)), True),
    ],
)
def test_a_product_gates_where_another_value_is_its_factor(hidden: Any, gates: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.beside, self.back = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.back(hidden(self.wide(x), self.beside(x)))

    ((_, _, reason),) = [
        group
        for group in plan(nn.Sequential(Net(), Net()), [Activation24(optional=True)]).coverage[0].left
        if "back" in group[0]
    ]
    assert reason.startswith("the activation gates it" if gates else "mul stands between it"), reason
