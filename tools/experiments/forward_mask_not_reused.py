"""What arXiv 2503.16672 warns of, for the experiment that shows it: a backward without the forward's mask.

The forward is that of naive 2:4. The backward goes straight through it, and every product that should be 2:4
selects for itself by the magnitude of a gradient that is dense again: values dropped in forward come back.
The paper's run diverges (3.735 beside 2.651). No recipe can name this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.operation import cast_for_autocast, operation
from act24.passes import Activation24, Match, Region
from act24.passes.graph.normal_form import replace_node
from act24.sparse24.pattern.feature_wise import sparsify_feature_wise, token_permutation
from act24.sparse24.pattern.selection import densest, top2_of_4


class _Forgetful(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight_in: Tensor, weight_out: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
        positive = torch.relu(F.linear(x, weight_in))
        sparse = torch.where(top2_of_4(positive), positive * positive, 0)
        return F.linear(sparse, weight_out), positive

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight_in, weight_out, ctx.ratio = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight_in, weight_out, output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, weight_in, weight_out, positive = ctx.saved_tensors
        grad_hidden = 2 * positive * (grad_y @ weight_out)
        grad_x = torch.where(top2_of_4(grad_hidden.abs()), grad_hidden, 0) @ weight_in
        order = token_permutation(positive.shape[:-1], "batch", x.device)
        rows = lambda tensor: tensor.flatten(0, -2)[order]  # noqa: E731
        dense = densest((positive.flatten(0, -2) > 0).sum(0), ctx.ratio)
        grad_in = sparsify_feature_wise(rows(grad_hidden), dense).T @ rows(x)
        grad_out = rows(grad_y).T @ sparsify_feature_wise(rows(positive * positive), dense)
        return grad_x, grad_in, grad_out, None


@operation
def forgetful_ffn(x: Tensor, weight_in: Tensor, weight_out: Tensor, dense_ratio: float) -> Tensor:
    """linear → relu² → 2:4 → linear, with split GEMMs that select on the dense gradient. No biases."""
    return _Forgetful.apply(*cast_for_autocast(x, weight_in, weight_out), dense_ratio)[0]


@dataclass(frozen=True, kw_only=True)
class ForwardMaskNotReused(Activation24):
    """`activation24` with that backward; of its options only `dense_ratio` and the steps have an effect."""

    def _rewrite(self, region: Region, match: Match) -> None:
        site, graph = match.nodes, region.graph
        with graph.inserting_before(site.after):
            x, weight_in, _ = site.before.args
            arguments = (x, weight_in, site.after.args[1], self.dense_ratio)
            output = graph.call_function(forgetful_ffn, arguments)
        replace_node(graph, site.after, output)
