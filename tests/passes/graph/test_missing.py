"""Arguments that are None: a forward that does something else then is no region."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from toys import Net

from act24.passes import trace


def net(signature: str, *lines: str) -> type[nn.Module]:
    """A class with a forward of these lines."""
    scope: dict[str, Any] = {"torch": torch, "F": F}
    body = "\n    ".join(lines)
    exec(f"def forward(self, {signature}):\n    {body}", scope)
    return type("Asking", (Net,), {"forward": scope["forward"]})


def why(kind: type[nn.Module]) -> str:
    found, reasons = trace(nn.ModuleList([kind(), kind()]))
    reason = reasons.get("0 [Asking]", "")
    assert len(reason) <= 300
    assert bool(reason) == ({type(region.module) for region in found} == {nn.Linear})
    return reason


ATTENDS = "return self.b(F.scaled_dot_product_attention(h, h, h, attn_mask={}, is_causal={}))"
BUILDS = (
    "if mask is None: mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()",
    "h = self.a(x)",
    ATTENDS.format("mask", False),
)
TWO = ("h = self.a(x)", ATTENDS.format("mask", "mask is None and pad is None"))
ITEM = ("h = self.a(x)", "mask = ctx['mask']", ATTENDS.format("mask", "mask is None"))
PART = ("h = self.a(x)", "mask, scale = ctx", ATTENDS.format("mask", "mask is None") + " * scale")
DEEP = ("h = self.a(x)", ATTENDS.format("ctx[0]['m']", "ctx[0]['m'] is None"))
FIRST = ("h = self.a(x)", ATTENDS.format("mask", "mask is None"))


@pytest.mark.parametrize(
    ("signature", "lines", "reason"),
    [
        ("x, mask", BUILDS, "'mask' is None, and what it does then cannot be traced"),
        ("x, mask, pad", TWO, "'mask' and 'pad' are None"),
        ("x, ctx", ITEM, "'ctx[\"mask\"]' is None"),
        ("x, ctx", PART, "'ctx[0]' is None"),
        ("x, ctx", DEEP, "'ctx[0][\"m\"]' is None"),
        ("mask, x", FIRST, "'mask' is None"),
        (
            "x, m",
            ("m = torch.zeros(x.shape[1], 1) if m is None else m", "return self.b(self.a(x)) + m"),
            "'m'",
        ),
    ],
)
def test_what_does_something_else_where_an_argument_is_none_is_refused(
    signature: str, lines: tuple[str, ...], reason: str
) -> None:
    assert reason in why(net(signature, *lines))


@pytest.mark.parametrize(
    ("signature", "lines"),
    [
        ("x, mask", ("if mask is None: raise ValueError('needs a mask')", "return self.b(self.a(x) * mask)")),
        ("x, mask", ("assert mask is not None", "return self.b(self.a(x) * mask)")),
        ("x, scale", ("missing = x is None", "return self.b(self.a(x) * (2 if missing else scale[0]))")),
        ("x, ctx", ("z = None if x is None else ctx[0]", "return self.b(self.a(x) * z)")),
        ("x, gate", ("h = self.a(x)", "h = None if h is None else h", "return self.b(h * gate.sigmoid())")),
    ],
)
def test_what_takes_no_none_is_traced(signature: str, lines: tuple[str, ...]) -> None:
    assert why(net(signature, *lines)) == ""


def test_what_is_written_shows_also_where_none_was_there_before() -> None:
    kind: Any = net("x, mask", "self.last = mask", "h = self.a(x)", ATTENDS.format("mask", "mask is None"))
    kind.last = None
    assert "forward writes Asking.last" in why(kind)
