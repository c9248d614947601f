"""The report: its text, its parameter counts, its FLOPs."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from slow import slow_after
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.flop_counter import FlopCounterMode
from toys import SwiGLU, Trunk, llama, tokens

from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    LowRank,
    Pass,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.pipeline import PartialWarning
from act24.passes.report import Report


def test_printed_table() -> None:
    """Two layers; the text as a user sees it."""
    report = apply_(llama(), [Relu2FFN(), Activation24(from_step=10, until_step=100)]).report
    assert str(report).splitlines() == [
        "in model.layers.{0..1}:",
        "pass          module  before                   after",
        "relu2_ffn     mlp     silu(gate)·up, F 48      relu2(up), F 128",
        "              9,216 → 16,384 parameters; fresh: up_proj.weight, down_proj.weight",
        "activation24  mlp     linear · relu2 · linear  2:4 naive, dense backward",
        "              from step 10 until 100",
        "parameters 23,776 → 30,944, FLOPs per token, forward 41,024 → 47,168",
        "relu2_ffn reaches 100% of the feed-forward matrices; left: lm_head (the head)",
        "activation24 reaches 100% of the feed-forward matrices; left: lm_head (the head)",
        "checked on input_ids [2, 8]: 2 regions compute what their modules do, before passes change them",
    ]


def test_equal_layers_are_one_line_and_others_are_not() -> None:
    model = Trunk(SwiGLU, layers=6)
    model.blocks[4].mlp = SwiGLU(inner=64)
    targets = tuple(f"blocks.{i}.mlp" for i in (0, 1, 2, 4, 5))
    _, _, one, other, below, *_ = str(plan(model, [Relu2FFN(targets=targets)])).splitlines()
    assert re.split(r"\s{2,}", one)[:3] == ["relu2_ffn", "{0..2,5}.mlp", "silu(gate)·up, F 32"]
    assert re.split(r"\s{2,}", other)[:3] == ["", "4.mlp", "silu(gate)·up, F 64"]
    assert below.split(";")[0].strip() == "9,216 → 20,480 parameters"
    assert len(plan(model, [Relu2FFN(targets=targets)]).rows) == 5  # as data each place is there


def test_misses_are_listed_below_the_table() -> None:
    model = Trunk(SwiGLU, layers=3)
    model.blocks[2].mlp.up.weight = model.blocks[0].mlp.up.weight
    report = plan(model, [Relu2FFN(width="keep")])
    common, head, row, _, *misses, total, covered, checked = str(report).splitlines()
    assert (common, head.split()) == ("in blocks.1:", ["pass", "module", "before", "after"])
    assert re.split(r"\s{2,}", row)[1] == "mlp"
    todo = "untie them, or leave it out with ignore"
    assert misses == [
        f"relu2_ffn leaves blocks.{i}.mlp as it is: blocks.{i}.mlp.up.weight is tied to "
        f"blocks.{2 - i}.mlp.up.weight: {todo}"
        for i in (0, 2)
    ]
    assert total.startswith("parameters ")
    assert covered.startswith("relu2_ffn reaches 38% of the feed-forward matrices; left: blocks.0.mlp.{gate,")
    assert f"(blocks.0.mlp.up.weight is tied to blocks.2.mlp.up.weight: {todo})" in covered
    assert checked.startswith("checked on [2, 8, 16]: 3 regions compute what their modules do, before ")


# What is left alone


class Optional(nn.Module):
    """Cannot be traced, and neither names nor classes say what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return self.b(F.silu(self.a(x)))


class ByFunction(Optional):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.ones(32, 16))
        self.table = nn.Embedding(32, 16)

    def forward(self, x: Tensor, flag: bool = False) -> Tensor:
        return self.b(F.silu(F.linear(x, self.c)))


class Both(nn.Module):
    def __init__(self, odd: type[nn.Module] = Optional) -> None:
        super().__init__()
        self.mlps = nn.ModuleList([SwiGLU(), SwiGLU()])
        self.odd = nn.ModuleList([odd(), odd()])
        self.lm_head = nn.Linear(16, 11)

    def forward(self, x: Tensor) -> Tensor:
        for mlp, odd in zip(self.mlps, self.odd, strict=True):
            x = x + mlp(x) + odd(x)
        return self.lm_head(x)


GATED, ODD = 2 * 3 * 16 * 32, 2 * 2 * 16 * 32
LINEAR: list[Pass] = [Weight24(), LowRank(attn_rank=4, mlp_rank=4), Fp8()]


@pytest.mark.parametrize("p", [Relu2FFN(), *LINEAR], ids=lambda p: p.name)
def test_linears_of_which_nobody_knows_what_they_are_for_are_counted_and_named(p: Pass) -> None:
    (covered,) = plan(Both(), [p]).coverage
    assert (covered.reached, covered.total) == (GATED, GATED + ODD)
    (names, share, reason), head = covered.left
    assert head == ("lm_head", 0.0, "the head")
    assert (names, share) == ("odd.{0..1}.{a,b}", ODD / (GATED + ODD))
    assert reason.startswith(
        "not traced: argument 'flag' of its forward has a default: take the default away"
    )
    assert "feed-forward and other matrices; left: odd.{0..1}.{a,b} 40% (not traced" in str(covered)


def test_matrices_that_are_read_by_a_function_are_counted_too() -> None:
    (covered,) = plan(Both(ByFunction), [Weight24()]).coverage
    assert covered.total == GATED + ODD + 2 * 16 * 32  # and no embedding
    assert [names for names, *_ in covered.left] == ["odd.{0..1}.{c,a,b}", "lm_head"]


def test_linears_that_targets_name_are_counted() -> None:
    named, head = ("odd.*", "lm_head"), 16 * 11
    (covered,) = plan(Both(), [LowRank(attn_rank=4, mlp_rank=4, targets=named)]).coverage
    assert (covered.reached, covered.total, covered.left) == (ODD + head, ODD + head, ())
    with pytest.warns(
        PartialWarning, match=r"head and other matrices within.*; left: lm_head 8% \(its weight is 11 × 16"
    ):
        apply_(Both(), [Weight24(targets=named)])


def test_the_root_that_is_not_traced_gives_its_reason() -> None:
    (covered,) = plan(Optional(), [Weight24(targets=("a",))]).coverage
    assert (covered.reached, covered.total) == (ODD / 4, ODD / 4)
    (covered,) = plan(Optional(), [Weight24(targets=("a", "*.x", "?"), ignore=("b",))]).coverage
    assert covered.total == ODD / 4
    assert not covered.left


# Parameters


class Tied(nn.Module):
    def __init__(self, tie: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.trunk = Trunk(SwiGLU)
        self.head = nn.Linear(16, 11, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.trunk(self.embed(ids)))


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("passes", [[], [Relu2FFN()], [Relu2FFN(width="keep"), Activation24()]])
def test_parameters_are_those_of_the_model_tied_ones_once(tie: bool, passes: list[Any]) -> None:
    model = Tied(tie)
    before = sum(p.numel() for p in model.parameters())
    report = apply_(model, passes).report
    assert report.parameters_before == before
    assert report.parameters_after == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("shared", [False, True])
def test_a_shared_block_has_its_parameters_once_and_its_flops_twice(shared: bool) -> None:
    model = Trunk(SwiGLU)
    if shared:
        model.blocks[1] = model.blocks[0]
    report = apply_(model, [Relu2FFN(width="keep")]).report
    blocks = 1 if shared else 2
    assert report.parameters_before == blocks * (3 * 16 * 32 + 2 * 16)
    assert report.parameters_after == blocks * (2 * 16 * 32 + 2 * 16)
    assert report.flops_before == 2 * 2 * 3 * 16 * 32
    assert report.flops_after == 2 * 2 * 2 * 16 * 32


# FLOPs


def counted(model: nn.Module, *inputs: Tensor) -> int:
    """Forward FLOPs of matrix products by PyTorch's own counter, attention scores left out."""
    counter = FlopCounterMode(display=False)
    with counter:
        model(*inputs)
    products = ("mm", "addmm", "bmm")
    return sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if str(op).split(".")[-1] in products
    )


@pytest.mark.parametrize(
    "sizes", slow_after(1, [{}, {"num_key_value_heads": 2}, {"attention_bias": True, "mlp_bias": True}])
)
def test_dense_flops_against_torchs_counter(sizes: dict[str, Any]) -> None:
    ids = tokens(2, 8)
    model = llama(3, **sizes)
    assert counted(model, ids) == plan(model, []).flops_before * ids.numel()
    report = apply_(model, [Relu2FFN()]).report
    assert counted(model, ids) == report.flops_after * ids.numel()
    assert report.flops_before == plan(llama(3, **sizes), []).flops_after


def test_2_4_halves_the_product_behind_it() -> None:
    dense = plan(llama(), [Relu2FFN()])
    sparse = plan(llama(), [Relu2FFN(), Activation24()])
    assert sparse.flops_before == dense.flops_before
    assert dense.flops_after - sparse.flops_after == 2 * 32 * 128  # of 2 · D · F a layer, half, in two layers


@pytest.mark.parametrize("until", [None, 20])
def test_flops_are_those_of_the_last_interval_with_a_pass_in_force(until: int | None) -> None:
    """A dense warm-up before and a dense finish behind it are not what a run is about."""
    passes = [Relu2FFN(), Activation24(from_step=10, until_step=until)]
    expected = plan(llama(), [Relu2FFN(), Activation24()]).flops_after
    assert plan(llama(), passes).flops_after == expected
    assert plan(llama(), [*passes, ActivationStatistics()]).flops_after == expected


def test_the_report_is_data() -> None:
    with torch.device("meta"):
        model = Trunk(SwiGLU)
    report: Report = plan(model, [Relu2FFN()])
    row = report.rows[0]
    assert (row.pass_name, row.fqn) == ("relu2_ffn", "blocks.0.mlp")
    assert all(type(n) is int for n in (report.parameters_after, report.flops_after, row.parameters_after))


def test_what_flops_leave_out_is_named() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.network = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x + self.attention(x, x, x)[0])

    report = plan(nn.Sequential(Mixed(), Mixed()), [Activation24()])
    assert report.uncounted == ("{0..1}.attention.{in_proj_weight,out_proj}",)
    assert "FLOPs leave out {0..1}.attention.{in_proj_weight,out_proj}: no linear" in str(report)
    assert plan(llama(), [Relu2FFN()]).uncounted == ()


def test_a_weight_that_is_computed_counts_by_its_shape_or_is_named() -> None:
    """Two operations an element of what the linear multiplies with, whatever it is made of."""

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(32, 4)), nn.Parameter(torch.randn(4, 16))
            self.c = nn.Parameter(torch.randn(32, 16))
            self.register_buffer("scale", torch.ones(32, 1))
            self.down, self.normed = nn.Linear(32, 16), weight_norm(nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(x, self.a @ self.b) + F.linear(x, self.c * self.scale) + F.linear(x, self.c)
            return self.normed(self.down(F.relu(h)))

    class Open(Computed):
        def forward(self, x: Tensor) -> Tensor:
            h = F.linear(x, self.a @ self.b) + F.linear(x, self.c[self.c.amax(-1) > -9.0])
            return self.normed(self.down(F.relu(h)))

    report = plan(nn.Sequential(Computed(), Computed()), [Activation24(from_step=2)])
    assert report.flops_before == 2 * 2 * (3 * 32 * 16 + 16 * 32 + 16 * 16)
    assert report.uncounted == ()
    report = plan(nn.Sequential(Open(), Open()), [Activation24(from_step=2)])
    assert report.flops_before == 2 * 2 * (32 * 16 + 16 * 32 + 16 * 16)
    assert report.uncounted == ("{0..1}.c",)


def test_factors_of_another_pass_stand_for_the_matrix_that_was_there() -> None:
    passes = [Cola(scope="mlp", mlp_rank=4, bottleneck="relu2"), Activation24()]
    made, dropped = plan(llama(), passes).coverage
    assert made.reached == made.total
    assert dropped.reached == dropped.total > 0
