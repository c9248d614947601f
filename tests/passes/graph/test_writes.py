"""Writes in place become values, or are refused by name; what is rewritten computes what the module does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Activation24, Cola, PassError, Pipeline, Recompute, Weight24, apply_, plan, trace
from act24.passes.graph.check import Check
from act24.passes.graph.writes import written


class Net(nn.Module):
    """Two linears, and what a forward may write with or to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.wide = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 24)
        self.drop, self.capped = nn.Dropout(0.5, inplace=True), nn.ReLU6(inplace=True)
        self.act = nn.ReLU(inplace=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.ones(8))


class Mutes(nn.Module):
    """Writes into what it is given, and reads self.training: it stays a module."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if self.training else x.mul_(3)


def model_of(lines: str) -> nn.Module:
    """Two modules whose forward does what the lines say."""
    found: dict[str, Any] = {}
    body = "\n".join(f"    {line.strip()}" for line in lines.split(";"))
    exec(f"def forward(self, x):\n{body}", {"torch": torch, "F": F}, found)
    kind = type("Writing", (Net,), found)
    torch.manual_seed(0)
    return nn.Sequential(kind(), kind())


def run(model: nn.Module, training: bool) -> list[Tensor]:
    """The output, the gradients, and what is left of the argument and of the buffers."""
    x = features(5, 8).requires_grad_()
    given = x * 1
    torch.manual_seed(1)
    output = model.train(training)(given)
    gradients = torch.autograd.grad(output.sin().sum(), [x, *model.parameters()], allow_unused=True)
    used = [g for g in gradients if g is not None]
    return [output, given, *used, *(b.clone() for b in model.buffers())]


BECOME_VALUES = {
    "method without a reader": "h = self.a(x); h.mul_(2); return self.b(F.silu(h))",
    "augmented": "h = self.a(x); h += x; return self.b(h)",
    "seen under another name": "h = self.a(x); g = h; h += x; return self.b(g)",
    "another tensor": "h = self.a(x); h.add_(x, alpha=2); return self.b(h)",
    "itself": "h = self.a(x); h.add_(h); return self.b(h)",
    "chain": "return self.b(self.a(x).mul_(2).add_(1).relu_())",
    "copy_": "h = self.a(x); g = torch.zeros_like(h); g.copy_(F.silu(h)); return self.b(g) + x",
    "fill_": "h = self.a(x); g = torch.empty_like(h); g.fill_(2.0); return self.b(F.silu(g * h))",
    "zero_": "h = self.a(x); h.zero_(); return self.b(h) + x",
    "gt_": "h = self.a(x); h.gt_(0); return self.b(h) + x",
    "index_put_": "h = self.a(x); h.index_put_((self.count.long().view(1),), self.mean); return self.b(h)",
    "index_add_": "h = self.a(x); h.index_add_(0, self.count.long().view(1), x[:1]); return self.b(h)",
    "masked_fill_": "h = self.a(x); h.masked_fill_(h > 0, 0.5); return self.b(h)",
    "a view alone": "h = self.a(x); v = h.view(-1, 2, 4); v += 1; return self.b(v.flatten(1))",
    "another item": (
        "z = self.wide(x).view(-1, 3, 8).transpose(0, 1); q, k = z[0], z[1]; q *= 2; return self.b(q + k)"
    ),
    "relu_": "return self.b(torch.relu_(self.a(x)))",
    "elu_": "return self.b(F.elu_(self.a(x)))",
    "by position": "h = F.leaky_relu(self.a(x), 0.1, True); return self.b(h)",
    "by name": "h = F.hardtanh(self.a(x), -1.0, 1.0, inplace=True); return self.b(h)",
    "relu with a reader": "h = self.a(x); g = self.act(h); return self.b(g + h)",
    "a number": "n = x.shape[0]; m = n; n += 1; return self.b(F.silu(self.a(x)) * n + m)",
    "buffer": "self.count.add_(1); return self.b(F.silu(self.a(x)))",
    "chain into a buffer": (
        "h = self.a(x); self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1); return self.b(F.silu(h))"
    ),
    "part of a buffer": "self.mean[:4].add_(1); return self.b(F.silu(self.a(x)))",
}


@pytest.mark.parametrize("lines", BECOME_VALUES.values(), ids=BECOME_VALUES)
def test_writes_become_values(lines: str) -> None:
    """The same numbers, gradients and buffers as the module's, in both modes, recomputed or not."""
    stock, model = model_of(lines), model_of(lines)
    pipeline = Pipeline(model, [], keep_all=True)
    pipeline.commit_()
    assert list(pipeline.regions) == ["0", "1"]
    for training in (True, False):
        for expected, found in zip(run(stock, training), run(model, training), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)  # elu_ rounds its own way
    narrow = [Cola(scope="mlp", mlp_rank=2, targets=("*.a", "*.b"))]
    plain, repeated = model_of(lines), model_of(lines)
    apply_(plain, narrow)
    apply_(repeated, [*narrow, Recompute()])
    for expected, found in zip(run(plain, True), run(repeated, True), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize("lines", BECOME_VALUES.values(), ids=BECOME_VALUES)
def test_nothing_writes_into_what_another_node_reads(lines: str) -> None:
    model = model_of(lines)
    region = next(r for r in trace(model, Check(model, features(5, 8)))[0] if r.fqn == "0")
    for node in region.graph.nodes:
        if (value := written(node, region.module)) is not None:
            while value.op != "get_attr" and value.target != "clone":
                value = value.args[0]  # of a chain, or of a view of a buffer
            assert value.op == "get_attr" or len(value.users) == 1


@pytest.mark.parametrize("leaf", ["drop", "capped"])
def test_leaves_in_place_stay_leaves(leaf: str) -> None:
    lines = f"h = self.a(x); g = self.{leaf}(h); return self.b(g + h)"
    stock, model = model_of(lines), model_of(lines)
    Pipeline(model, [], keep_all=True).commit_()
    for training in (True, False):
        for expected, found in zip(run(stock, training), run(model, training), strict=True):
            assert torch.equal(expected, found)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("x += 1; return self.b(self.a(x))", "its argument 'x'"),
        ("y = x.view(-1, 8); y *= 2; return self.b(self.a(y))", "its argument 'x'"),
        ("y = F.dropout(x, 0.0); y *= 2; return self.b(self.a(y))", "its argument 'x'"),
        ("return self.b(self.a(self.drop(x)))", "its argument 'x'"),
        ("return self.b(self.a(self.act(x)))", "its argument 'x'"),
        ("h = self.a(x); v = h[:, :4]; v += 1; return self.b(h)", "which linear_1 sees by way of linear"),
        ("h = self.a(x); v = h.T; v += 1; return self.b(h)", "which linear_1 sees by way of linear"),
        ("h = self.a(x); h.data.mul_(2); return self.b(h)", "which linear_1 sees by way of linear"),
        ("h = self.a(x); v = h[:, :4]; h *= 2; return self.b(torch.cat([v, v], -1))", "cat sees"),
        ("h = self.a(x); h[:, 0] = 0; return self.b(h)", "writes into linear by index"),
        ("h = self.a(x); h[:, 0] += 1; return self.b(h)", "writes into linear by index"),
        ("h = self.a(x); h.data = h.data * 2; return self.b(h)", "sets data of the value linear"),
        ("x.kept = 1; return self.b(self.a(x))", "sets kept of the value x"),
        ("h = self.a(x); torch._foreach_mul_([h], 2.0); return self.b(h)", "into several values"),
        ("h = self.a(x); g = h * 1; torch.mul(h, 2, out=g); return self.b(g)", "out="),
        ("self.scale.data.mul_(2); return self.b(self.a(x))", "its parameter scale"),
        ("p = self.scale; p *= 2; return self.b(self.a(x))", "its parameter scale"),
        ("self.mean.add_(1); return self.b(self.a(x + F.linear(self.mean, self.b.weight)))", "linear reads"),
        ("self.count += 1; return self.b(self.a(x))", "forward writes Writing"),
    ],
)
def test_writes_that_others_see_are_refused(lines: str, reason: str) -> None:
    """Nothing has to run for it."""
    assert reason in trace(model_of(lines))[1]["0 [Writing]"]


def test_a_leaf_that_writes_into_what_it_is_given_is_found_on_numbers() -> None:
    model = model_of("h = self.a(x); g = self.mutes(h); return self.b(h + g)")
    for module in model:
        module.mutes = Mutes()
    reason = trace(model, Check(model, features(5, 8)))[1]["0 [Writing]"]
    assert reason.endswith("mutes writes into what it is given: make a new tensor there")


def test_what_the_caller_sees_is_left_as_by_the_module() -> None:
    """The probe hands over what a caller has computed, which may be written to in training."""
    model = model_of("x += 1; return self.b(F.silu(self.a(x)))")
    stock, probe = copy.deepcopy(model), features(5, 8)
    report = apply_(model, [Weight24(targets=("*.a", "*.b"), from_step=9)], probe=probe).report
    assert "not checked" not in report.checked
    assert torch.equal(probe, features(5, 8))
    mine, theirs = features(5, 8), features(5, 8)
    assert torch.equal(model(mine), stock(theirs))
    assert torch.equal(mine, theirs)


def test_a_buffer_that_is_written_and_read_is_not_computed_again() -> None:
    model = model_of("self.count.add_(1); return self.b(F.silu(self.a(x)) * self.count)")
    passes = [Cola(scope="mlp", mlp_rank=2, targets=("*.a", "*.b")), Recompute()]
    with pytest.raises(PassError, match=r"writes into count, which it also reads"):
        plan(model, passes)


@torch.library.custom_op("act24_tests::counts", mutates_args=("seen",))
def counts(x: Tensor, seen: Tensor) -> Tensor:
    seen.add_(1)
    return x.clone()


@counts.register_fake
def _(x: Tensor, seen: Tensor) -> Tensor:
    return torch.empty_like(x)


RENEWING = {
    "F.batch_norm(h, self.mean, self.mean, training=True)": True,
    "F.batch_norm(h, self.mean, self.mean)": False,
    "F.instance_norm(h[None], self.mean, self.mean)[0]": True,
    "F.instance_norm(h[None])[0]": False,
    "torch.batch_norm(h, None, None, self.mean, self.mean, True, 0.1, 1e-5, False)": True,
    "torch.native_batch_norm(h, None, None, self.mean, self.mean, False, 0.1, 1e-5)[0]": False,
    "torch.ops.aten.native_batch_norm(h, None, None, self.mean, self.mean, True, 0.1, 1e-5)[0]": True,
    "torch.ops.act24_tests.counts(h, self.count)": True,
}


@pytest.mark.parametrize("value", RENEWING)
def test_a_function_that_also_writes_into_its_arguments_is_not_computed_again(value: str) -> None:
    """As torch's documentation has it: running statistics; and an operator, as its schema says."""
    model = model_of(f"h = self.a(x); return self.b(F.silu({value}))")
    passes = [Cola(scope="mlp", mlp_rank=2, targets=("*.a", "*.b")), Recompute()]
    if RENEWING[value]:
        with pytest.raises(PassError, match=r"would write into its arguments again"):
            plan(model, passes, check=False)  # which finds some of them, too
    else:
        assert any(row.pass_name == "recompute" for row in plan(model, passes, check=False).rows)


def test_activation24_reads_its_input_as_it_was() -> None:
    """The operation takes both linears, and stands where the second one stood: behind the write."""
    lines = "h = self.a(x); g = F.relu(self.wide(h)); {}; return self.narrow(g) + h"
    written_to, by_hand = model_of(lines.format("h.mul_(3)")), model_of(lines.format("h = h * 3"))
    for module, other in zip(written_to, by_hand, strict=True):
        module.narrow = other.narrow = nn.Linear(24, 8)
    for model in (written_to, by_hand):
        apply_(model, [Activation24(dense_ratio=0.0)])
    x = features(4, 8)
    assert torch.equal(written_to.eval()(x), by_hand.eval()(x))
