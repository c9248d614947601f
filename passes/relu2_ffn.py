"""`relu2_ffn`: a gated feed-forward network becomes a plain one with squared ReLU.

    down(silu(gate(x)) * up(x))   ==>   down(relu(up(x))²)

Two matrices instead of three, so F grows to 1.5 F at equal parameters, rounded to the nearest multiple of
128, which the 2:4 kernels' tiles need (arXiv 2503.16672, section 1). The function changes and no weight of
the wider network comes from the old one: training starts anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from act24.options import Range
from act24.passes.base import Match, Plan, StateMap, StructuralPass
from act24.passes.graph.normal_form import (
    bias_name,
    common_path,
    is_call,
    is_product,
    is_transposed,
    nodes_of,
    readers,
    replace_node,
    weight_name,
)
from act24.passes.graph.region import ParameterSpec, Region
from act24.relu2 import relu2

_MULTIPLE = 128
_FUNCTIONS = {"relu2": relu2, "relu": F.relu}


@dataclass(frozen=True)
class _SwiGLU:
    """The three linears of a gated network, and the product between them."""

    product: fx.Node
    gate: fx.Node
    up: fx.Node
    down: fx.Node


@dataclass(frozen=True, kw_only=True)
class Relu2FFN(StructuralPass):
    """Options of `relu2_ffn`.

    Attributes:
        activation: `"relu"` gives down(relu(up(x))) instead, which is less sparse.
        width: `"parity"` takes F to 1.5 F, rounded to a multiple of 128, which keeps the parameter count;
            `"exact"` rounds down to a whole number, as the public scripts do, and takes only multiples of 4
            (kernels want more); `"keep"` leaves F, and then `up` and `down` keep their weights too.
        initializer_range: standard deviation of fresh weights (LLaMA's 0.02).
    """

    name: ClassVar[str] = "relu2_ffn"

    activation: Literal["relu2", "relu"] = "relu2"
    width: Literal["parity", "exact", "keep"] = "parity"
    initializer_range: Annotated[float, Range(gt=0)] = 0.02

    def plan(self, region: Region) -> Plan:
        matches, misses = [], []
        for node in nodes_of(region.graph, F.silu):
            found = _find(node)
            if found is None:
                continue
            names = [weight_name(linear) for linear in (found.gate, found.up, found.down)]
            path = common_path(*(name for name in names if name))
            if not self.selects(region, path):
                continue
            if reason := _obstacle(region, found) or self._unfit(region, found):
                misses.append((path, reason))
            else:
                matches.append(self._match(region, path, found))
        return Plan(tuple(matches), tuple(misses), absent=_describe(region))

    def _unfit(self, region: Region, found: _SwiGLU) -> str:
        """Why F cannot become what `width` says, or the empty string."""
        new = self._width(region.parameters[weight_name(found.up) or ""].shape[0])
        unfit = self.width == "exact" and new % 4
        return f'F would be {new}, not a multiple of 4: width = "parity" rounds it' if unfit else ""

    def _width(self, width: int) -> int:
        return {"keep": width, "exact": 3 * width // 2, "parity": parity_width(width)}[self.width]

    def _match(self, region: Region, path: str, found: _SwiGLU) -> Match:
        width = region.parameters[weight_name(found.up) or ""].shape[0]
        new = self._width(width)
        removed = _parameters(found.gate, found.up, found.down)
        kept = _parameters(found.up, found.down)
        before = sum(region.parameters[name].numel() for name in removed)
        fresh = () if new == width else tuple(n for n in kept if n != bias_name(found.down))
        specs = _resized(region, found, new)
        after = sum(spec.numel() for spec in specs.values())
        carried = tuple(name for name in kept if name not in fresh)
        return Match(
            path=path,
            before=f"silu(gate)·up, F {width}",
            after=f"{self.activation}(up), F {new}",
            nodes=(found, specs),
            parameters_before=before,
            parameters_after=after,
            state=StateMap(
                removes=tuple(name for name in removed if name not in carried),
                creates=fresh,
                from_stock=None if fresh else lambda removed: {},
                why="SwiGLU and relu² are different functions",
            ),
            note=f"fresh: {', '.join(name.removeprefix(path + '.') for name in fresh)}"
            if fresh
            else "weights kept",
        )

    def _rewrite(self, region: Region, match: Match) -> None:
        found, resized = match.nodes
        assert match.state is not None
        specs = {name: resized[name] for name in match.state.creates}
        region.create(specs, self._initialise(specs), replaces=match.state.removes)
        with region.graph.inserting_before(found.product):
            activation = region.graph.call_function(_FUNCTIONS[self.activation], (found.up,))
        replace_node(region.graph, found.product, activation)

    def _initialise(self, specs: Mapping[str, ParameterSpec]) -> Any:
        def initialise(old: Mapping[str, Tensor], generator: Any) -> dict[str, Tensor]:
            return {
                name: torch.zeros(spec.shape, device="cpu")
                if len(spec.shape) == 1
                else torch.empty(spec.shape, dtype=torch.float32, device="cpu").normal_(
                    0, self.initializer_range, generator=generator(name)
                )
                for name, spec in specs.items()
            }

        return initialise


def parity_width(width: int) -> int:
    """1.5 F, rounded to the nearest multiple of 128, and at least 128."""
    return max(1, (3 * width + _MULTIPLE) // (2 * _MULTIPLE)) * _MULTIPLE


def _find(silu: fx.Node) -> _SwiGLU | None:
    """The gated network around a silu, in either order of the product."""
    gate = silu.args[0]
    users = list(silu.users)
    if not is_call(gate, F.linear) or len(users) != 1:
        return None
    product = users[0]
    if not is_product(product):
        return None
    up = next((arg for arg in product.args if arg is not silu), None)
    down = next(iter(product.users), None)
    if not is_call(up, F.linear) or len(product.users) != 1 or not is_call(down, F.linear):
        return None
    return _SwiGLU(product, gate, up, down) if down.args[0] is product else None


def _obstacle(region: Region, found: _SwiGLU) -> str:
    """Why a gated network that was found cannot be rewritten, or the empty string."""
    linears = (found.gate, found.up, found.down)
    if found.gate.args[0] is not found.up.args[0]:
        return "gate and up read different inputs"
    for linear in (found.gate, found.up):
        if len(linear.users) != 1:
            return f"the output of {weight_name(linear)} is used elsewhere too"
    for linear in linears:
        name = weight_name(linear)
        if name is None or name not in region.parameters or is_transposed(linear):
            return "a weight is not a plain parameter"
    for name in (name for linear in linears for name in _parameters(linear)):
        if shared := region.parameters[name].shared:
            return f"{region.name(name)} is tied to {shared[0]}"
        if readers(region.graph, name) > 1:
            return f"{region.name(name)} is used more than once"
    return ""


def _parameters(*linears: fx.Node) -> tuple[str, ...]:
    names = [name for linear in linears for name in (weight_name(linear), bias_name(linear))]
    return tuple(name for name in names if name)


def _resized(region: Region, found: _SwiGLU, width: int) -> dict[str, ParameterSpec]:
    """The parameters of up and down for another F: rows of up, columns of down."""
    specs = {}
    for linear, dimension in ((found.up, 0), (found.down, 1)):
        for name in _parameters(linear):
            spec = region.parameters[name]
            shape = list(spec.shape)
            if dimension < len(shape):  # the bias of down has no F
                shape[dimension] = width
            specs[name] = replace(spec, shape=torch.Size(shape), shared=())
    return specs


def _describe(region: Region) -> str:
    """What the region has instead of a gated network."""
    linears = len(list(nodes_of(region.graph, F.linear)))
    return "a single linear" if linears == 1 else f"{linears} linears, but no down(silu(gate(x)) * up(x))"
