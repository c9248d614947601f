"""`fp8`: linears that no other pass took multiply in e4m3, forward and backward.

    linear(x, W, b)   ==>   linear_fp8(x, W, b, narrow, scale, turned, turned_scale, …)

in attention and MLPs; the factors of low-rank linears count as linears, and the head does with `head = true`
or where `targets` names it. A loss that multiplies with the head's weight itself, as that of `act24 train`,
asks `head_arguments` how. W stays a parameter as it was. In training only: evaluation, samples and what is
saved are of the weights in their own dtype. Where the loop keeps them, W in e4m3 and its transpose are in
buffers beside it, made once an update (`act24.passes.state`): `<weight>_e4m3`, `<weight>_e4m3_turned`, and
their scales. Scales are of the values of now, so there is no state to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from act24.errors import Act24Error
from act24.fp8.casts import Scaling
from act24.fp8.linear import MULTIPLE, linear_fp8, underflow_counts
from act24.passes.base import PYTHON_ONLY, Match, OperationalPass, Plan
from act24.passes.graph.linear_sites import RESIZE, LinearSite, linear_sites, no_linear, takes
from act24.passes.graph.normal_form import parameter_name, replace_node
from act24.passes.graph.region import Region, RegionModule
from act24.precision import Decided, Layer, decision
from act24.sparse24.feed_forward.options import Precision

#: What the names of the buffers add to the weight's, in the order of `act24.fp8.casts.CastE4m3`.
NARROW, SCALE, TURNED, TURNED_SCALE = "_e4m3", "_e4m3_scale", "_e4m3_turned", "_e4m3_turned_scale"
PARTS = (NARROW, SCALE, TURNED, TURNED_SCALE)

#: The least in · out / (in + out) at which three products save in e4m3 what the casts of x and G take, by
#: times of 16384×4096×4096 on an H200: products 2.20 → 1.27 ms, casts 0.26, of which the former goes with
#: in · out and the latter with in + out (`docs/results/kernels.md`, *fp8*). Linears that share x have one
#: cast.
LEAST_SIZE = 512


def pays(out_features: int, in_features: int) -> bool:
    """Whether a linear gains by e4m3, as far as one can tell from its shape."""
    return out_features * in_features >= LEAST_SIZE * (out_features + in_features)


def by_shape(*shapes: tuple[int, int]) -> Precision:
    """What `"auto"` comes to for weights `(out, in)` that nobody has timed."""
    return "fp8" if all(pays(*shape) for shape in shapes) else "bfloat16"


_IGNORED = "ignore names it, which head = true asks for: take it out of ignore, or set head = false"


@dataclass(frozen=True, kw_only=True)
class Fp8(OperationalPass):
    """Options of `fp8`.

    Attributes:
        precision: `"fp8"`: every linear whose sides are multiples of 16. `"auto"`: of these the ones that are
            faster so: timed on the GPU when a run begins, and until then told by the shape; the plan names
            the others.
        head: also the linear from hidden states to logits, whatever `targets` names; its dX stays in
            bfloat16.
        scaling: as in `act24.fp8.linear.linear_fp8`.
        kernels: run on this machine's kernels and products where there are any; False for plain PyTorch.
        keep_cast: forward and backward read weights in e4m3 from buffers, which `begin_update_` fills for
            every update; else they cast them, in every micro-batch. For loops that call it without fail, and
            weights that are not sharded; no key of a recipe.
        decided: of `"auto"`, what was found on a GPU (`act24.precision`); no key of a recipe.
    """

    name: ClassVar[str] = "fp8"
    keeps_function: ClassVar[bool] = True
    remainder: ClassVar[bool] = True
    promises: ClassVar[bool] = False  # it takes what others leave

    precision: Literal["fp8", "auto"] = "fp8"
    head: bool = False
    scaling: Scaling = "rowwise"
    kernels: bool = True
    keep_cast: bool = field(default=False, metadata=PYTHON_ONLY)
    decided: Decided = field(default=(), repr=False, metadata=PYTHON_ONLY)

    @property
    def covers(self) -> tuple[str, ...]:
        return ("attn", "mlp", "head") if self.head else ("attn", "mlp")

    @property
    def renews(self) -> bool:
        return True

    @property
    def fullest(self) -> Fp8:
        return replace(self, precision="fp8") if self.precision == "auto" else self

    def in_evaluation(self) -> None:
        return None

    def plan(self, region: Region) -> Plan:
        matches, misses, taken = list[Match](), [], list[LinearSite]()
        for site in linear_sites(region, factors=True):
            if self.head and site.kind == "head":
                if not replace(self, targets=("*",)).selects(region, site.path):
                    misses.append((site.path, _IGNORED))
                    continue
            elif not takes(self, "all", region, site):
                continue
            if site.obstacle:
                misses.append((site.path, site.obstacle))
                continue
            if any(side % MULTIPLE for side in site.shape):
                shape = " × ".join(map(str, site.shape))
                misses.append(
                    (site.path, f"its weight is {shape}, and e4m3 wants multiples of {MULTIPLE}: {RESIZE}")
                )
            else:
                taken.append(site)
        for site in taken:
            size, layer = region.parameters[site.weight].numel(), self._layer(site, taken)
            match = Match(
                path=site.path,
                reaches=(site.weight,),
                before=f"linear {site.shape[1]}→{site.shape[0]}",
                after=f"e4m3 in y, {'' if site.kind == 'head' else 'dX, '}dW, {self.scaling}",
                nodes=site,
                parameters_before=size,
                parameters_after=size,
                note=_note(region, site),
                layer=layer,
            )
            if self.precision == "fp8" or (decision(layer, self.decided) or by_shape(site.shape)) == "fp8":
                matches.append(match)
                continue
            shape = " × ".join(map(str, site.shape))
            reason = f"its weight is {shape}, and casts would take what products gain, by its shape"
            todo = 'set precision = "fp8" to take it all the same; a run on a GPU times both'
            misses.append((site.path, f"{reason}: {todo}"))
        return Plan(tuple(matches), tuple(misses), absent=no_linear(self, region, factors=True))

    def _layer(self, site: LinearSite, taken: Sequence[LinearSite]) -> Layer:
        """With what else reads the same input, of which there is one cast."""
        of_input = [other for other in taken if other.nodes[0].args[0] is site.nodes[0].args[0]]
        sizes = (site.shape[1], *(other.shape[0] for other in of_input))
        options = self.scaling if self.kernels else f"{self.scaling}, plain"
        return Layer("head" if site.kind == "head" else "linears", sizes, options)

    def missing(self, regions: Sequence[Region]) -> str:
        sites = (site for region in regions for site in linear_sites(region))
        if not self.head or any(site.kind == "head" for site in sites):
            return ""
        return (
            "head = true, and the head is no linear that is left to it: the embedding is the head, or "
            "another pass has it; untie them, or set head = false"
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        site: LinearSite = match.nodes
        add_cast_buffers(region, site.weight)
        for node in site.nodes:
            with region.graph.inserting_before(node):
                ready = [
                    region.graph.get_attr(site.weight + part) if self.keep_cast else None for part in PARTS
                ]
                arguments = (*node.args, *ready, self.scaling, self.kernels)
                exact = {"exact_grad_x": True} if site.kind == "head" else {}
                narrow = region.graph.call_function(linear_fp8, arguments, exact)
            replace_node(region.graph, node, narrow)


def add_cast_buffers(region: Region, weight: str) -> None:
    """Buffers for a weight in e4m3, by its local name."""
    for part in PARTS:
        # As bytes: DDP broadcasts buffers when it begins, and process groups cannot send e4m3.
        dtype = torch.float32 if part in (SCALE, TURNED_SCALE) else torch.uint8
        # Empty until the first cast, so that a model that never casts pays nothing for them.
        region.add_buffer(weight + part, (0,), dtype, persistent=False, kind=part, of=weight)


def _note(region: Region, site: LinearSite) -> str:
    shared = region.parameters[site.weight].shared
    return f"tied to {shared[0]}, which is read as it is" if shared else ""


def head_arguments(head: nn.Module | None, hidden: Tensor) -> tuple[Any, ...]:
    """What `act24.loss.cross_entropy_sum` takes behind `chunk_tokens`, so that it multiplies as the head's
    region would; and count what that would. Nothing in evaluation mode, and where no pass has the head.

    Args:
        head: the module that makes logits of hidden states.
        hidden: what it reads, `[..., D]`.

    Raises:
        Act24Error: the region does not multiply with a weight of the model alone, as the loss does.
    """
    if not isinstance(head, RegionModule):
        return ()
    called = [node for node in head.graph.nodes if node.op == "call_function"]
    counted = [node for node in called if node.target is underflow_counts]
    sums = [node for count in counted for node in count.users]  # activation_statistics adds counts up
    linears = [node for node in called if node not in (*counted, *sums)]
    kinds = [node.target for node in linears]
    if kinds not in ([F.linear], [linear_fp8]):
        raise Act24Error(
            "the loss multiplies with the head's weight itself, and a pass has made something else of the "
            "head: leave the head out of its targets"
        )
    if kinds == [F.linear] or not head.training:
        return ()
    arguments: tuple[Any, ...] = linears[0].args[3:]
    *ready, scaling, kernels = arguments
    for node in sums:
        head.get_buffer(str(parameter_name(node.args[0]))).add_(underflow_counts(hidden, scaling))
    tensors = (None if part is None else head.get_buffer(part.target) for part in ready)
    counter = parameter_name(linears[0].kwargs.get("counter"))
    return (*tensors, scaling, kernels, head.get_buffer(counter) if counter else None)
