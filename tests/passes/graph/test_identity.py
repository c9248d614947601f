"""Which object a value is, and what dtype it has, are questions that a graph cannot answer: they are refused,
but for casts that change nothing where they are not needed."""

from __future__ import annotations

import copy
import operator
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Net, features

from act24.passes import Cola, Pipeline, apply_, trace
from act24.passes.graph.identity import identity_questions

_OUTSIDE = {"torch": torch, "F": F, "Tensor": Tensor, "nn": nn, "operator": operator}


def why(lines: str, arguments: str = "x") -> str:
    """Why a module with this forward is no region, or the empty string. Nothing is run."""
    model = nn.ModuleList([asking(lines, arguments), asking(lines, arguments)])
    found, reasons = trace(model)
    assert ("0 [Asking]" in reasons) != any(region.fqn == "0" for region in found)
    return reasons.get("0 [Asking]", "")


def asking(lines: str, arguments: str = "x") -> nn.Module:
    found: dict[str, Any] = {}
    body = "\n".join(f"    {line}" for line in lines.split("; "))
    exec(f"def forward(self, {arguments}):\n{body}", dict(_OUTSIDE), found)
    return type("Asking", (Net,), found)()


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("h = self.a(x) * (2 if type(x) is Tensor else 1); return self.b(h)", "type() of 'x'"),
        ("h = self.a(x) * (2 if type(x) == Tensor else 1); return self.b(h)", "type() of 'x'"),
        ("h = self.a(x) * (2 if type(x) in (Tensor, int) else 1); return self.b(h)", "type() of 'x'"),
        ("h = self.a(x) * (2 if type(x).__name__ == 'Tensor' else 1); return self.b(h)", "type() of 'x'"),
        ("kind = x.__class__; return self.b(self.a(x) * (2 if kind == Tensor else 1))", "what kind of value"),
        ("h = self.a(x) * (2 if callable(x) else 1); return self.b(h)", "callable() of 'x'"),
        ("h = self.a(x) * (2 if id(x) in (1, 2) else 1); return self.b(h)", "id() of 'x'"),
        ("h = self.a(x) * len({x, x}); return self.b(h)", "looks x up"),
        ("h = self.a(x) * {torch.half: 3}.get(x.dtype, 1); return self.b(h)", "looks getattr_1 up"),
        ("h = self.a(x) * {'cpu': 3}.get(x.device.type, 1); return self.b(h)", "up in a dictionary"),
        ("h = self.a(x) * (2 if str(x.dtype) == 'torch.float16' else 1); return self.b(h)", "is written"),
        ("h = self.a(x) * (2 if operator.is_(x, x) else 1); return self.b(h)", "operator.is_()"),
        ("h = self.a(x) * (2 if x.grad_fn is None else 1); return self.b(h)", "x.grad_fn"),
        ("h = self.a(x); h = h * 2 if h.dtype is torch.float16 else h; return self.b(h)", "'is' of 'h'"),
        ("h = self.a(x); return self.b(h if h is not x else x)", "'is not' of 'x'"),
    ],
)
def test_which_object_a_value_is_cannot_be_asked(lines: str, reason: str) -> None:
    assert reason in why(lines)


def test_a_flag_and_an_argument_given_twice_are_asked_about() -> None:
    """A probe on False, or on two tensors, would say that the graph is right."""
    assert "'is' of 'flag'" in why("h = self.a(x) * (2 if flag is True else 1); return self.b(h)", "x, flag")
    assert "'is' of 'q'" in why("h = self.a(q) * (2 if q is k else 1); return self.b(h) + k", "q, k")


def test_a_class_pattern_is_a_question_too() -> None:
    class Matching(Net):
        def forward(self, x: Tensor) -> Tensor:
            match x:
                case Tensor():
                    return self.b(self.a(x) * 2)
                case _:
                    return self.b(self.a(x))

    assert "what kind of value x is" in trace(nn.ModuleList([Matching()]))[1]["0 [Matching]"]


@pytest.mark.parametrize(
    "lines",
    [
        "h = self.a(x) * (2 if self.a is self.b else 1); return self.b(h)",
        "h = self.a(x) * (2 if type(self) is nn.Linear else 1); return self.b(h)",
        "h = self.a(x) * (2 if self.a.bias is None else 1); return self.b(h)",
        "missing = x is None; return self.b(self.a(x) * (2 if missing else 1))",
        "h = self.a(x); kind = F.relu; return self.b(h * 2 if kind is F.silu else h)",
    ],
)
def test_what_is_asked_of_other_objects_is_answered(lines: str) -> None:
    assert why(lines) == ""


def test_operands_are_found_in_the_bytecode() -> None:
    def function(q, k, v, kind):
        first = q is k
        second = k[0].T is not (v if first else kind)
        return first, second, type(v[1:2]), id, kind is None

    questions = dict(identity_questions(function.__code__))
    assert questions["'is'"] == ("q", "k")
    assert {"v", "kind"} & {*questions["'is not'"]}
    assert questions["type()"] == ("v",)
    assert len(questions) == 3


HALF_H = "two dtypes are one, that of linear and torch.float16"
HALF_X = "two dtypes are one, that of x and torch.float16"


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("h = self.a(x); h = h * 2 if h.dtype == torch.float16 else h; return self.b(h)", HALF_H),
        ("h = self.a(x); h = h * 2 if h.dtype != torch.float16 else h; return self.b(h)", HALF_H),
        (
            "h = self.a(x); narrow = h.dtype in (torch.float16, torch.bfloat16); "
            "return self.b(h.clamp(-9, 9) if narrow else h)",
            HALF_H,
        ),
        ("h = x.float() if x.dtype == torch.float16 else x; return self.b(self.a(h))", HALF_X),
        ("h = x.bfloat16() if x.dtype != torch.float16 else x; return self.b(self.a(h))", HALF_X),
        (
            "h = self.a(x); h = h * 2 if h.dtype != self.b.weight.dtype else h; return self.b(h)",
            "two dtypes are one, that of linear and that of b_weight",
        ),
        (
            "h = self.a(x); y = x.to(self.b.weight.dtype) if h.dtype != self.b.weight.dtype else x; "
            "return self.b(h + y)",
            "two dtypes are one, that of linear and that of b_weight",
        ),
    ],
)
def test_what_hangs_on_a_dtype_is_refused(lines: str, reason: str) -> None:
    assert reason in why(lines)


@pytest.mark.parametrize(
    "cast",
    [
        "h.float() if h.dtype != torch.float32 else h",
        "h.to(torch.float32) if h.dtype != torch.float32 else h",
        "h.to(dtype=torch.float32) if torch.float32 != h.dtype else h",
        "h.to(self.b.weight.dtype) if h.dtype != self.b.weight.dtype else h",
        "h.type_as(self.b.weight) if self.b.weight.dtype != h.dtype else h",
        "h if h.dtype == self.b.weight.dtype else h.to(dtype=self.b.weight.dtype)",
    ],
)
def test_a_cast_where_it_is_needed_is_one_where_it_is_not(cast: str) -> None:
    """As T5 has it. In bfloat16 with a second linear in float32 it is needed."""
    lines = f"h = self.a(x); h = {cast}; return self.b(h)"
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        model = nn.ModuleList([asking(lines)])
        model[0].a.to(dtype)
        expected = model[0](features(3, 4).to(dtype))
        Pipeline(model, [], keep_all=True).commit_()
        assert torch.equal(model[0](features(3, 4).to(dtype)), expected)


def test_the_shape_of_a_weight_is_what_it_was_when_the_weight_is_another() -> None:
    sizes = "self.a.weight.shape[0] + self.a.weight.size(1) + self.a.weight.dim() + self.a.weight.numel()"
    model = nn.ModuleList([asking(f"return self.b(self.a(x)) * 0 + {sizes}")])
    expected = model[0](features(3, 4))
    apply_(model, [Cola(scope="mlp", mlp_rank=1, targets=("*.a",))])
    assert torch.equal(model[0](features(3, 4)), expected)


class Holder:
    """Holds a value under a name."""


class Typed(Net):
    """With a dtype of its own, as transformers' modules have, and one that is none of a tensor's."""

    kept = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.listed, self.weak = [self.a.bias], weakref.ref(self.a)

    @property
    def dtype(self) -> torch.dtype:
        return next(p.dtype for p in self.parameters() if p.is_floating_point())


@pytest.mark.parametrize(
    "question",
    [
        "self.dtype == torch.bfloat16",
        "self.dtype is torch.bfloat16",
        "next(self.parameters()).dtype == torch.bfloat16",
        "next(self.parameters()).dtype is torch.bfloat16",
        "next(self.parameters()).requires_grad",
        "[*self.named_parameters()][0][1].requires_grad",
        "self.a.weight.dtype is torch.bfloat16",
        "self.a._parameters['weight'].dtype == torch.bfloat16",
        "{**self.a._parameters}['weight'].dtype == torch.bfloat16",
        "self.a._parameters.copy().get('weight').requires_grad",
        "self.a.get_parameter('weight').dtype == torch.bfloat16",
        "(x.dtype,)[0] is torch.bfloat16",
        "[torch.bfloat16, x.dtype][1] is torch.bfloat16",
        "any(d is torch.bfloat16 for d in [x.dtype])",
        "any(map(operator.is_, [x.dtype], [torch.bfloat16]))",
        "(d := x.dtype) is torch.bfloat16",
        "held(x).d is torch.bfloat16",
        "self.a.weight.device is torch.device('cpu')",
        "self.listed[0].dtype == torch.bfloat16",
        "self.listed[0].requires_grad",
        "self.weak().weight.dtype == torch.bfloat16",
    ],
)
def test_the_dtype_of_a_parameter_is_not_frozen(question: str) -> None:
    found: dict[str, Any] = {}
    scope = {**_OUTSIDE, "held": _held}
    exec(f"def forward(self, x):\n    return self.b(self.a(x)) * (2 if {question} else 1)", scope, found)
    kind = type("Asking", (Typed,), found)
    assert "0 [Asking]" in trace(nn.ModuleList([kind(), kind()]))[1]


def _held(x: Tensor) -> Holder:
    holder = Holder()
    holder.d = x.dtype  # type: ignore[attr-defined]
    return holder


def test_a_parameter_is_asked_for_its_dtype_by_the_graph() -> None:
    """And what is asked of others is answered."""
    lines = (
        "t = next(self.parameters()); h = self.b(self.a(x.to(self.dtype))).to(t.dtype); "
        "h = h * (1 if self.kept is torch.float32 else 2); h = h * (1 if t.is_floating_point() else 2); "
        "return h + torch.zeros(h.shape[-1], dtype=self.a._parameters['weight'].dtype, device=t.device)"
    )
    found: dict[str, Any] = {}
    exec("def forward(self, x):\n    " + "\n    ".join(lines.split("; ")), dict(_OUTSIDE), found)
    kind = type("Asking", (Typed,), found)
    model = nn.ModuleList([kind()])
    expected = copy.deepcopy(model).bfloat16()[0](features(3, 4))
    Pipeline(model, [], keep_all=True).commit_()
    assert torch.equal(model.bfloat16()[0](features(3, 4)), expected)
    assert expected.dtype == torch.bfloat16
    low = nn.ModuleList([kind()])
    apply_(low, [Cola(scope="mlp", mlp_rank=1, targets=("*.a",))])
    assert low.bfloat16()[0](features(3, 4)).dtype == torch.bfloat16
