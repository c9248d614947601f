"""`document_attention`: causal attention that stays within the documents of a packed row.

    scaled_dot_product_attention(q, k, v, is_causal=True)   ==>   document_attention(q, k, v, starts)

Where documents begin lies in a buffer, which the shell fills for each micro-batch, always in the same memory.
The pass is about the rows that a model is trained and evaluated on. A model that is served has one text a
row, for which both are the same, and goes without (`act24.passes.served`). Recipes ask for it as
`data.attention = "document"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from act24.document_attention import document_attention
from act24.errors import Act24Error
from act24.passes.base import Match, OperationalPass, Plan
from act24.passes.graph.normal_form import replace_node
from act24.passes.graph.region import Region
from act24.passes.rewriting import Rewriting

#: A buffer at the root of a region, `document_attention`'s `starts`.
STARTS = "document_starts"


_ABSENT = (
    "no causal scaled_dot_product_attention(q, k, v, is_causal=True): write attention so, or set "
    'data.attention = "causal"'
)


@dataclass(frozen=True, kw_only=True)
class DocumentAttention(OperationalPass):
    """`document_attention` has no options of its own."""

    name: ClassVar[str] = "document_attention"
    of_rows: ClassVar[bool] = True

    def plan(self, region: Region) -> Plan:
        matches = tuple(
            Match("", "causal attention", "causal attention within documents", node, 0, 0)
            for node in region.graph.nodes
            if _is_causal(node) and self.selects(region, "")
        )
        return Plan(matches, absent=_ABSENT)

    def _rewrite(self, region: Region, match: Match) -> None:
        node, graph = match.nodes, region.graph
        region.add_buffer(STARTS, (), torch.int32, persistent=False)
        with graph.inserting_before(node):
            arguments = (*node.args, graph.get_attr(STARTS), node.kwargs.get("enable_gqa", False))
            replace_node(graph, node, graph.call_function(document_attention, arguments))


def _is_causal(node: fx.Node) -> bool:
    """Whether it is an attention that differs from `document_attention` in nothing but what is seen."""
    return (
        node.target is F.scaled_dot_product_attention
        and len(node.args) == 3
        and node.kwargs.get("is_causal") is True
        and node.kwargs.keys() <= {"is_causal", "enable_gqa"}
    )


def set_starts_(pipeline: Rewriting, starts: Tensor | None) -> None:
    """Say where documents begin in the rows of the next forward.

    Args:
        starts: int32 `[rows, tokens]` on the model's device, as `document_attention` takes it.

    Raises:
        Act24Error: attention is to stay within documents, and there are no beginnings.
    """
    for module in pipeline.modules:
        if STARTS in module._buffers:
            if starts is None:
                raise Act24Error(
                    'data.attention = "document": these rows come without the beginnings of their documents '
                    '(Batch.starts): take batches of open_rows, or set data.attention = "causal"'
                )
            module._buffers[STARTS] = starts
