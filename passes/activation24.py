"""`activation24`: relu² (or relu) activations become 2:4 along the features.

    linear_out(relu2(linear_in(x)))   ==>   activation24(x, W_in, b_in, W_out, b_out, …)
    linear_out(relu2(h))              ==>   activation24(h, None, None, W_out, b_out, …)
    relu2(h), several consumers       ==>   activation24(h, None, None, None, None, …)

wherever the pattern came from: the feed-forward network of `relu2_ffn`, or a low-rank bottleneck. Where what
precedes relu2 is not one linear, or one that another 2:4 product owns, the operation starts at the
pre-activation; where relu2 has several consumers all of them see the same 2:4 activation. With no linear on
either side, as in LoST, there is no weight gradient in it, and `backward` is exact.

What a method needs is in its record (`act24.sparse24.feed_forward.methods`). State is in buffers under the
site's name. `<site>.activation24_scale`, β of the methods that have one, is persistent;
`<site>.activation24_seed`, of those that draw, is another for every micro-batch. `Pipeline.begin_update_`
writes both; the graph only reads them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import Argument

from act24.options import OneOf, OptionError, Range, Steps
from act24.passes.base import PYTHON_ONLY, Match, OperationalPass, Pass, Plan
from act24.passes.fp8 import PARTS, Fp8, add_cast_buffers, by_shape
from act24.passes.graph.activation_sites import (
    OF_ATTENTION,
    ActivationSite,
    activation_sites,
    adapters_beside,
    add_site_buffer,
    by_name_only,
    keep_site,
    obstacle,
    pads_node,
)
from act24.passes.graph.around_activation import spared
from act24.passes.graph.linear_sites import RESIZE
from act24.passes.graph.normal_form import nodes_of, place_of, replace_node, weight_name
from act24.passes.graph.region import Region
from act24.passes.relu2_ffn import gate_in
from act24.precision import Decided, Layer, decision
from act24.relu2 import relu2
from act24.sparse24.feed_forward.calibration import CALIBRATION
from act24.sparse24.feed_forward.methods import BACKWARDS, ESTIMATORS, METHODS, Method
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24, Precision, check_pair
from act24.sparse24.feed_forward.packed import PACKED
from act24.sparse24.feed_forward.packed_fp8 import PACKED_FP8
from act24.sparse24.format.products import Product, Table, feed_forward_products
from act24.sparse24.pattern.feature_wise import TokenPermutation
from act24.sparse24.weight.linear24 import linear24

#: Where the metadata of the operation's node has the pass that put it there.
TAKEN_BY = "activation24_pass"

#: Kinds of the buffers, and the last parts of their names.
SCALE, SEED, SUMS = "activation24_scale", "activation24_seed", "activation24_calibration"


#: What to do where there is no activation to make 2:4, by the gate of a network there (`gate_in`).
_NO_RELU = {
    "silu": "no relu² or relu: put relu2_ffn in front, which makes one of a gated network",
    "gelu": 'no relu² or relu: put relu2_ffn in front, with gate = "gelu"',
    "": "no relu² or relu: leave it to other passes, or make its activation relu² before, in one module with "
    "its linears",
}


@dataclass(frozen=True, kw_only=True)
class Activation24(OperationalPass):
    """Options of `activation24`.

    Attributes:
        method: a name in `act24.sparse24.feed_forward.methods.METHODS`. `"naive"` keeps the two largest of
            four. `"mvue"` draws two without bias, and is naive in evaluation. `"soft_dynamic"`
            soft-thresholds and scales by β = ⟨H, S⟩/⟨S, S⟩, measured on activations again and again.
            `"soft_threshold_weights"` does so with a β fixed at the first sparse update.
        scale_from: where the fixed β comes from. `"weight"`: the least squared error of the weights that
            read the activation, before and after soft thresholding. `"output"`: the least squared error of
            the layer's output.
        dynamic_steps: optimizer updates between two measurements of soft_dynamic's β; 0 for each update.
        calibration_samples: token rows, without padding, in one measurement, by each process.
        backward, estimator, dense_ratio, token_permutation: as in
            `act24.sparse24.feed_forward.options.Options24`.
        precision: as there; `"auto"`: `"fp8"` for the networks that are faster so: timed on the GPU when a
            run begins, and until then told by the shape. None: what the pass `fp8` says, for all steps, where
            it stands in the list, and `"bfloat16"` where it does not.
        kernels: run on this machine's kernels and 2:4 products where there are any; False for plain PyTorch.
            What is counted of a dense activation is not this pass's: a kernel may do it all the same.
        recompute: in networks with narrow linears keep nothing F-wide for backward, and make it again there.
        algorithms: what a tuner found for the products (`act24.sparse24.format.products`), of no meaning to
            the mathematics; no key of a recipe.
        keep_cast, decided: as in `act24.passes.fp8.Fp8`, of networks; no keys of a recipe.
    """

    name: ClassVar[str] = "activation24"
    takes_named: ClassVar[bool] = False
    spares: ClassVar[str] = "it stands at no relu² or relu: leave it out with ignore"

    method: Annotated[str, OneOf(METHODS)] = "naive"
    scale_from: Literal["weight", "output"] = "weight"
    dynamic_steps: Steps = 10
    calibration_samples: Annotated[int, Range(ge=1, le=10**8)] = 100
    backward: Annotated[str, OneOf(BACKWARDS)] = "dense"
    estimator: Annotated[str, OneOf(ESTIMATORS)] = "masked"
    precision: Precision | Literal["auto"] | None = None
    dense_ratio: Annotated[float, Range(ge=0, lt=1)] = 0.05
    token_permutation: TokenPermutation = "batch"
    kernels: bool = True
    recompute: bool = False
    algorithms: Table = field(default=(), repr=False, metadata=PYTHON_ONLY)
    keep_cast: bool = field(default=False, metadata=PYTHON_ONLY)
    decided: Decided = field(default=(), repr=False, metadata=PYTHON_ONLY)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair(self.estimator, self.backward, self.name)
        if self.recompute and self.precision == "fp8":
            raise OptionError(
                "activation24: recompute is of networks of narrow linears inside dense products, which have "
                'no fp8: set precision = "bfloat16", or recompute = false'
            )

    def beside(self, passes: tuple[Pass, ...]) -> Activation24:
        if self.precision is not None:
            return self
        return replace(self, precision=next((p.precision for p in passes if isinstance(p, Fp8)), "bfloat16"))

    @property
    def covers(self) -> tuple[str, ...]:
        return ("mlp",)

    @property
    def record(self) -> Method:
        """The record of the method."""
        return METHODS[self.method]

    @property
    def soft(self) -> bool:
        """Whether the method has a scale."""
        return self.record.scaled

    @property
    def draws(self) -> bool:
        """Whether the forward draws from a seed."""
        return self.record.draws

    @property
    def renews(self) -> bool:
        return self.record.draws or self.record.scaled or self.keep_cast

    def calibrates(self, step: int) -> bool:
        """Whether a scale is due once `step` updates are made."""
        since = step - self.from_step
        every = max(self.dynamic_steps, 1)
        return self.record.scaled and (since == 0 or (self.record.remeasured and since % every == 0))

    @property
    def fullest(self) -> Activation24:
        decides = self.precision == "auto" and not self.recompute
        return replace(self, precision="fp8") if decides else self

    def in_evaluation(self) -> Activation24:
        other = self.record.in_evaluation
        # What was cast for an update is not of the weights behind it.
        return replace(self, method=other or self.method, keep_cast=False)

    def products(self, match: Match, tokens: int) -> tuple[Product, ...]:
        """The products of a match that can be 2:4 (`act24.sparse24.format.products`), for micro-batches of so
        many tokens; none where the activation has no linear on both sides."""
        site: ActivationSite = match.nodes
        if not (site.width_in and site.width and site.width_out):
            return ()
        options, shape = self.options(site), (tokens, site.width_in, site.width, site.width_out)
        exact, found = not BACKWARDS[self.backward].along_tokens, []
        # Until it is decided, what either precision would have.
        for precision in (options.precision,) if match.layer is None else get_args(Precision):
            one = options._replace(precision=precision)
            if PACKED.knows(one) or PACKED_FP8.knows(one):
                found += feed_forward_products(*shape, exact, precision == "fp8").values()
        return tuple(found)

    def plan(self, region: Region) -> Plan:
        matches, misses, left = [], [], ""
        sites = list(activation_sites(region))
        taken = {linear for site in sites for linear in (site.before, site.after) if linear}
        for site in sites:
            linears = (site.before, site.after)
            weights = tuple(
                name for linear in linears if linear is not None and (name := weight_name(linear))
            )
            # Beside an activation inside of a linear that was factorised, a part is no module of its own.
            whole = () if any(region.parameters[name].factor for name in weights) else weights
            if not self.selects(region, site.path, whole):
                continue
            weights_before, why = by_name_only(region, site)
            if why and not any(self.names(region, p) for p in (site.path, *map(place_of, weights_before))):
                left = why
                continue
            if reason := self.split(region, whole):
                misses.append((site.path, reason))
                continue
            if site.width is not None and site.width % 4:
                misses.append((site.path, f"F is {site.width}, not a multiple of 4: {RESIZE}"))
                continue
            parts = ("linear" if site.before else "", site.function, "linear" if site.after else "")
            matches.append(
                Match(
                    path=site.path,
                    before=" · ".join(part for part in parts if part),
                    after=f"2:4 {self.method}, {self._backward(site)} backward" + self._fp8_text(site),
                    nodes=site,
                    parameters_before=site.parameters,
                    parameters_after=site.parameters,
                    note=self._note(region, site),
                    reaches=weights,
                    spared=spared(region, site, taken),
                    layer=self._layer(site),
                )
            )
        dense = (node for function in (F.relu, relu2) for node in nodes_of(region.graph, function))
        obstacles = dict.fromkeys(filter(None, (obstacle(region, node) for node in dense)))
        if "mlp" in region.roles.values():  # of which it says nothing
            obstacles.pop(OF_ATTENTION, None)
        absent = left or next(iter(obstacles), "") or _NO_RELU[gate_in(region)]
        return Plan(tuple(matches), tuple(misses), absent=absent)

    def _note(self, region: Region, site: ActivationSite) -> str:
        notes = []
        if adapted := adapters_beside(region, site):
            notes.append(
                f"{' and '.join(adapted)} carry LoRA and stay modules, so the products there are dense: "
                "merge_and_unload() before apply_ to have them in 2:4"
            )
        if self._backward(site) != self.backward:
            notes.append(
                f'backward = "{self.backward}" does nothing here: a weight gradient needs a linear that '
                "alone precedes or reads the activation"
            )
        elif BACKWARDS[self.backward].along_tokens and self.token_permutation == "none":
            notes.append(
                "no token permutation: neighbouring tokens crowd the weight gradients (2.919 beside 2.652)"
            )
        if self.precision in ("fp8", "auto") and not site.after:
            notes.append("no fp8: several read the activation, or one that is no linear")
        elif self.precision == "auto" and self.recompute:
            notes.append("no fp8: recompute is of products that have none")
        if unread := self._unread_options():
            notes.append(f'method = "{self.method}" does not look at {", ".join(unread)}')
        if "scale_from" in self.record.options:
            linears = sum(_reads_by_weight(user, site.node) for user in site.node.users)
            if not linears and not site.after:
                notes.append(
                    f'no linear reads it: β is from the activation, not scale_from "{self.scale_from}"'
                )
            elif not site.after and linears < len(site.node.users):
                notes.append(f'scale_from "{self.scale_from}" leaves out what reads it other than linears')
        return "; ".join(notes)

    def _precision(self, site: ActivationSite) -> Precision:
        """Of the products of a site."""
        if self.precision != "auto":
            return self.precision or "bfloat16"
        if (layer := self._layer(site)) is None:
            return "bfloat16"
        width, features, width_out = layer.sizes
        return decision(layer, self.decided) or by_shape((features, width), (width_out, features))

    def _layer(self, site: ActivationSite) -> Layer | None:
        """What is decided about a site under `"auto"`; None where it has no kernels in e4m3."""
        sizes = [size for size in (site.width_in, site.width, site.width_out) if size]
        if self.precision != "auto" or self.recompute or len(sizes) < 3 or not (site.before and site.after):
            return None
        backward = self._backward(site)
        if not PACKED_FP8.knows(self._options(site, "fp8")):
            return None
        words = [site.function, self.method, backward]
        if BACKWARDS[backward].along_tokens:
            words += [f"{self.dense_ratio:g}", self.token_permutation]
        return Layer("network", tuple(sizes), ", ".join(words if self.kernels else [*words, "plain"]))

    def _fp8_text(self, site: ActivationSite) -> str:
        """Which products are in e4m3."""
        options = self.options(site)
        if options.precision != "fp8" or not site.after:
            return ""
        return ", fp8" if site.before and PACKED_FP8.knows(options) else ", fp8 in y alone"

    def _unread_options(self) -> list[str]:
        """The options of other methods that were given all the same."""
        foreign = {name for method in METHODS.values() for name in method.options} - {*self.record.options}
        return [f.name for f in fields(self) if f.name in foreign and getattr(self, f.name) != f.default]

    def options(self, site: ActivationSite) -> Options24:
        """What the operation at a site is told."""
        return self._options(site, self._precision(site))

    def _options(self, site: ActivationSite, precision: Precision) -> Options24:
        return Options24(
            function=site.function,
            method=self.method,
            backward=self._backward(site),
            estimator=self.estimator,
            precision=precision,
            dense_ratio=self.dense_ratio,
            token_permutation=self.token_permutation,
            kernels=self.kernels,
            recompute=self.recompute,
            # Plain tuples: the graph's code has no names for their classes.
            algorithms=tuple((tuple(p), tuple(m)) for p, m in self.algorithms),  # type: ignore[misc]
        )

    def _cast_weights(self, site: ActivationSite) -> tuple[str, ...]:
        """The local names of W_in and W_out where all products are in e4m3; none elsewhere, and where one is
        stored transposed."""
        options = self.options(site)
        if not (site.before and site.after and options.precision == "fp8" and PACKED_FP8.knows(options)):
            return ()
        weights = [linear.args[1] for linear in (site.before, site.after)]
        nodes = [node for node in weights if isinstance(node, fx.Node) and node.op == "get_attr"]
        return tuple(str(node.target) for node in nodes) if len(nodes) == len(weights) else ()

    def _rewrite(self, region: Region, match: Match) -> None:
        site: ActivationSite = match.nodes
        graph = region.graph
        end = site.after or site.node
        with graph.inserting_before(end):
            x, weight_in, bias_in = site.before.args if site.before else (site.hidden, None, None)
            _, weight_out, bias_out = site.after.args if site.after else (None, None, None)
            linears = (x, weight_in, bias_in, weight_out, bias_out)
            state = (self._scale(region, site), self._seed(region, site), pads_node(region))
            arguments = (*linears, *state, self.options(site))
            weights = self._cast_weights(site)
            for name in weights:
                add_cast_buffers(region, name)
            # Only where they are read: a lowering that the plan did not foresee has no such buffers.
            names = [name + part for name in weights for part in PARTS if self.keep_cast]
            casts = tuple(graph.get_attr(name) for name in names)
            kept: dict[str, Argument] = {"casts": casts} if casts else {}
            sparse = graph.call_function(activation24, arguments, kept)
            keep_site(site.node, sparse)
            sparse.meta[TAKEN_BY] = self
            output = graph.call_function(operator.getitem, (sparse, 0))
        replace_node(graph, end, output)

    def _backward(self, site: ActivationSite) -> str:
        """Only a linear that the operation takes has weight gradients in it."""
        return self.backward if site.before or site.after else "dense"

    def _scale(self, region: Region, site: ActivationSite) -> fx.Node | None:
        if not self.soft:
            return None
        name = add_site_buffer(
            region, site.path, SCALE, (), torch.float32, persistent=True, initial=lambda _: torch.ones(())
        )
        add_site_buffer(region, site.path, SUMS, (len(CALIBRATION),), torch.float64)
        return region.graph.get_attr(name)

    def _seed(self, region: Region, site: ActivationSite) -> fx.Node | None:
        if not self.draws:
            return None
        return region.graph.get_attr(add_site_buffer(region, site.path, SEED, (), torch.int64))


def _reads_by_weight(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user is a linear of the node, or was one."""
    linears = (F.linear, linear24, activation24)
    return user.target in linears and user.args[0] is node and user.args[1] is not None
