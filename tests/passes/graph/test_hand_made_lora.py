"""LoRA that somebody has written by hand is known by what it computes, whatever it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Fp8, LowRank, SparseMask, Weight24, apply_, plan

X = features(2, 5, 16)
EVERY = [Weight24(), LowRank(attn_rank=4, mlp_rank=4), SparseMask(), Fp8()]


class Layer(nn.Module):
    """A linear, frozen or not, and a branch beside it."""

    def __init__(self, form: str, rank: int = 4, frozen: bool = True, width: int = 32) -> None:
        super().__init__()
        self.base, self.form = nn.Linear(16, width).requires_grad_(not frozen), form
        self.down, self.up = nn.Linear(16, rank, bias=False), nn.Linear(rank, width, bias=False)
        self.a, self.b = nn.Parameter(torch.randn(rank, 16)), nn.Parameter(torch.randn(width, rank))
        self.inner = nn.Linear(rank, rank)
        self.d, self.e = nn.Parameter(torch.ones(rank)), nn.Parameter(torch.ones(width))
        self.drop = nn.Dropout(0.1)
        if form == "scaled by vectors":  # VeRA
            self.down.requires_grad_(False)
            self.up.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return FORMS[self.form][0](self, x)


#: What it computes, and what its branch multiplies with.
FORMS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "modules": (lambda m, x: m.base(x) + m.up(m.down(x)) * 2.0, "down up"),
    "before": (lambda m, x: m.up(m.down(x)) / 4 + m.base(x), "down up"),
    "dropped and cast": (lambda m, x: m.base(x) + m.up(m.down(m.drop(x.float()))).to(x.dtype), "down up"),
    "subtracted": (lambda m, x: m.base(x) - m.up(m.down(x)), "down up"),
    "with alpha": (lambda m, x: torch.add(m.base(x), m.up(m.down(x)), alpha=2), "down up"),
    "parameters": (lambda m, x: m.base(x) + x @ m.a.T @ m.b.T, "a b"),
    "matmul": (lambda m, x: m.base(x) + torch.matmul(torch.matmul(x, m.a.transpose(0, 1)), m.b.mT), "a b"),
    "einsum": (
        lambda m, x: m.base(x) + torch.einsum("bsr,or->bso", torch.einsum("bsd,rd->bsr", x, m.a), m.b),
        "a b",
    ),
    "functions": (lambda m, x: m.base(x) + F.linear(F.linear(x, m.a), m.b), "a b"),
    "of a product": (lambda m, x: m.base(x) + F.linear(x, m.b @ m.a), "a b"),
    "into the weight": (lambda m, x: F.linear(x, m.base.weight + (m.b @ m.a) * 2.0, m.base.bias), "a b"),
    "scaled by vectors": (lambda m, x: m.base(x) + m.up(m.down(x) * m.d) * m.e, "down up"),
    "three": (lambda m, x: m.base(x) + m.up(m.inner(m.down(x))), "down inner up"),
    "twice": (lambda m, x: m.base(x) + m.up(m.down(x)) + 0.5 * (x @ m.a.T @ m.b.T), "down up a b"),
    "drawn": (lambda m, x: m.base(x) + m.up(m.down(F.dropout(x, 0.1, m.training))), "down up"),
}


class Network(nn.Module):
    def __init__(self, form: str, **options: Any) -> None:
        super().__init__()
        self.mlp_in, self.mlp_out = Layer(form, **options), nn.Linear(32, 16)
        unread = {"a", "b", "down", "up", "inner", "d", "e"} - {*FORMS[form][1].split()}
        for name in unread - ({"d", "e"} if form == "scaled by vectors" else set()):
            delattr(self.mlp_in, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp_out(F.relu(self.mlp_in(x)))


def networks(form: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(Network(form, **options), Network(form, **options))


def factors(form: str) -> set[str]:
    return {f"{n}.mlp_in.{name}" for n in (0, 1) for name in FORMS[form][1].split()}


@pytest.mark.parametrize("form", FORMS)
def test_it_is_left_alone_and_named(form: str) -> None:
    model = networks(form)
    (coverage,) = plan(model, [Weight24()], check=False).coverage
    names = FORMS[form][1].replace(" ", ",")
    said = {reason: text for text, _, reason in coverage.left}
    assert {*said["adapter of mlp_in"].removeprefix("{0..1}.mlp_in.").strip("{}").split(",")} == {
        *names.split(",")
    }
    assert coverage.reached == 2 * 32 * 16
    assert coverage.total == coverage.reached + 2 * 32 * 16  # the frozen ones


@pytest.mark.parametrize("one", EVERY, ids=lambda p: p.name)
@pytest.mark.parametrize("form", ["modules", "parameters", "drawn"])
def test_no_pass_takes_it_unless_it_is_named(one: Any, form: str) -> None:
    model = networks(form)
    expected = {row.fqn for row in plan(model, [one], check=False).rows}
    assert expected.isdisjoint(factors(form))
    if one.name == "fp8":  # which wants multiples of 16
        return
    named = type(one)(**{**vars(one), "targets": tuple(factors(form))})
    assert {row.fqn for row in plan(model, [named], check=False).rows} == factors(form)


@pytest.mark.parametrize("form", [f for f in FORMS if f not in ("scaled by vectors",)])
def test_a_branch_beside_a_linear_that_trains_is_none(form: str) -> None:
    (coverage,) = plan(networks(form, frozen=False), [Weight24()], check=False).coverage
    assert "adapter" not in str(coverage)


@pytest.mark.parametrize("rank", [16, 20])
def test_what_is_not_narrower_than_both_ends_is_none(rank: int) -> None:
    (coverage,) = plan(networks("modules", rank=rank), [Weight24()], check=False).coverage
    assert "adapter" not in str(coverage)
    assert coverage.reached == 2 * (32 * 16 + rank * 16 + 32 * rank)


class Other(nn.Module):
    """Looks like it, and is another thing."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.base = form, nn.Linear(16, 16).requires_grad_(False)
        self.down, self.up, self.last = nn.Linear(16, 4), nn.Linear(4, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        beside = {
            "activation": lambda: self.base(x) + self.up(F.relu(self.down(x))),
            "other input": lambda: self.base(x) + self.up(self.down(x.cumsum(1))),
            "behind": lambda: self.up(self.down(self.base(x))),
            "multiplied": lambda: self.base(x) * self.up(self.down(x)),
            "one": lambda: self.base(x) + self.down(x).sum(-1, keepdim=True) + self.up(x[..., :4]),
        }[self.form]()
        return self.last(F.gelu(beside))


@pytest.mark.parametrize("form", ["activation", "other input", "behind", "multiplied", "one"])
def test_what_computes_something_else_is_none(form: str) -> None:
    model = nn.Sequential(Other(form), Other(form))
    assert "adapter" not in str(plan(model, [Weight24(optional=True)], check=False).coverage[0])


def test_a_pair_that_does_not_train_is_none() -> None:
    model = networks("modules").requires_grad_(False)
    assert "adapter" not in str(plan(model, [Weight24(optional=True)], check=False).coverage[0])


def test_adapters_beside_each_other_have_each_its_linear() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("wq", "wk", "wv", "wo"):
                setattr(self, name, nn.Linear(16, 16, bias=False).requires_grad_(False))
            for name in ("wq", "wv"):
                setattr(self, f"{name}_1", nn.Linear(16, 4, bias=False))
                setattr(self, f"{name}_2", nn.Linear(4, 16, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            m: Any = self
            q, v = m.wq(x) + m.wq_2(m.wq_1(x)), m.wv(x) + m.wv_2(m.wv_1(x))
            return m.wo((q @ m.wk(x).mT).softmax(-1) @ v)

    report = plan(nn.Sequential(Attention(), Attention()), [Weight24(optional=True)], check=False)
    assert {text: reason for text, _, reason in report.coverage[0].left if "adapter" in reason} == {
        "{0..1}.{wq_1,wq_2}": "adapter of wq",
        "{0..1}.{wv_1,wv_2}": "adapter of wv",
    }
    # The frozen ones are attention's, as they would be without.
    named = LowRank(scope="attn", attn_rank=4, targets=("*.w?",))
    rows = plan(nn.Sequential(Attention(), Attention()), [named], check=False).rows
    assert {row.fqn for row in rows} == {f"{n}.{name}" for n in (0, 1) for name in ("wq", "wk", "wv", "wo")}


def test_the_numbers_stay_and_only_what_is_meant_changes() -> None:
    model = networks("modules")
    expected = model(X)
    apply_(model, [LowRank(attn_rank=16, mlp_rank=16, init="svd")], probe=X)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {f"{n}.mlp_in.{name}.weight" for n in (0, 1) for name in ("down", "up")} < trained
