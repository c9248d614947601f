"""The products that have a 2:4 operand, an activation, a weight or a gradient, and the choice between 2:4 and
dense.

Which of cuSPARSELt's algorithms is best, and whether any beats the dense product, depends on the shape. The
shell measures it (`act24.sparse24.format.tuner`) and hands over a table; where the table has no answer one
rule decides, `choose`. Everything else in act24 asks there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

from act24.options import Range

#: For shapes that nobody tuned, from an H200 with cuSPARSELt 0.8: the smallest width and F at which a whole
#: step with 2:4 products was seen to be no slower (60m, T 65,536: 1.014 times as fast, the products 1.43),
#: and the smallest T at which the products alone were seen to be faster (1.42 to 1.51).
LEAST_WIDTH, LEAST_FEATURES, LEAST_TOKENS = 512, 2048, 16384

Kind = Literal[
    "y",
    "grad_x",
    "grad_weight_in",
    "grad_weight_out",
    "y_fp8",
    "grad_x_fp8",
    "grad_weight_in_fp8",
    "grad_weight_out_fp8",
    "linear_y",
    "linear_grad_x",
    "linear_grad_weight",
]

#: And the algorithms that came out best most often there; which ids exist depends on the layouts involved.
DEFAULT_ALGORITHMS: dict[Kind, int] = {
    "y": 1,
    "grad_x": 3,
    "grad_weight_in": 3,
    "grad_weight_out": 0,
    "y_fp8": 21,
    "grad_x_fp8": 21,
    "grad_weight_in_fp8": 21,
    "grad_weight_out_fp8": 8,
    "linear_y": 17,
    "linear_grad_x": 17,
    "linear_grad_weight": 3,
}
KINDS: tuple[Kind, ...] = tuple(DEFAULT_ALGORITHMS)

#: What the products of a feed-forward network are called in e4m3.
_IN_FP8: dict[Kind, Kind] = {
    "y": "y_fp8",
    "grad_x": "grad_x_fp8",
    "grad_weight_in": "grad_weight_in_fp8",
    "grad_weight_out": "grad_weight_out_fp8",
}
_FP8_KINDS = tuple(_IN_FP8.values())
_ALONG_TOKENS: tuple[Kind, ...] = (
    "grad_weight_in",
    "grad_weight_out",
    "grad_weight_in_fp8",
    "grad_weight_out_fp8",
    "linear_grad_weight",
)


class Product(NamedTuple):
    """A product with a 2:4 operand. In a feed-forward network that is the activation a `[T, F]` or its
    gradient,

        y = a W_outᵀ          grad_x = dZ W_in          along the features
        dW_in = dZᵀ x         dW_outᵀ = aᵀ G            along the tokens

    in a linear with a 2:4 weight W `[out, in]` it is the weight or the output gradient G, and it comes first:

        linear_yᵀ = W xᵀ      linear_grad_xᵀ = Wᵀ Gᵀ    along the rows of W, and along its columns
        linear_grad_weight = Gᵀ x                       along the tokens

    Attributes:
        kind: which of them; with _fp8 behind it, in e4m3, where the dense operand always is the transpose of
            what lies in memory.
        tokens: T.
        features: F, or the outputs of the linear.
        width: the input or output width of the network, on the dense side, or the inputs of the linear.
    """

    kind: Kind
    tokens: int
    features: int
    width: int

    @property
    def fp8(self) -> bool:
        """Whether it is in e4m3."""
        return self.kind in _FP8_KINDS

    @property
    def along_tokens(self) -> bool:
        """Whether the reduction, and with it 2:4, runs along the tokens."""
        return self.kind in _ALONG_TOKENS

    @property
    def sparse_shape(self) -> tuple[int, int]:
        """Of the 2:4 operand."""
        if self.along_tokens:
            return self.features, self.tokens
        if self.kind == "linear_y":
            return self.features, self.width
        if self.kind == "linear_grad_x":
            return self.width, self.features
        return self.tokens, self.features

    @property
    def columns(self) -> int:
        """Of the dense operand."""
        return self.tokens if self.kind in ("linear_y", "linear_grad_x") else self.width

    @property
    def dense_transposed(self) -> bool:
        """Whether the dense operand is the transpose of what lies in memory."""
        return self.fp8 or self.kind in ("y", "linear_y", "linear_grad_x")

    @property
    def filled_transposed(self) -> bool:
        """Whether in a dense network the 2:4 operand is the transpose of what lies in memory."""
        return self.along_tokens or self.kind == "linear_grad_x"

    @property
    def transposed(self) -> bool:
        """Whether the result is wanted transposed: the gradient of W_out `[D_out, F]`, or of a linear with a
        2:4 weight `[T, out]` and `[T, in]`."""
        return self.kind in ("grad_weight_out", "grad_weight_out_fp8", "linear_y", "linear_grad_x")


class Measured(NamedTuple):
    """What a tuner found for a product: the fastest algorithm, its milliseconds, and those of the dense
    product."""

    algorithm: int
    sparse: float
    dense: float


#: `(product, measured)` of each. As pairs, and any tuples will do, so that it can be a constant of a graph,
#: whose code has no names for the two classes. Where no algorithm was right, its time is infinite.
Milliseconds = Annotated[float, Range(ge=0, infinite=True)]
Table = tuple[tuple[tuple[Kind, int, int, int], tuple[int, Milliseconds, Milliseconds]], ...]


def feed_forward_products(
    tokens: int, width: int, features: int, width_out: int, exact_weight_gradients: bool, fp8: bool = False
) -> dict[Kind, Product]:
    """The products of a feed-forward network that are 2:4: with exact weight gradients only the first two.

    Args:
        fp8: they are multiplied in e4m3.
    """
    widths: dict[Kind, int] = {"y": width_out, "grad_x": width}
    if not exact_weight_gradients:
        widths |= {"grad_weight_in": width, "grad_weight_out": width_out}
    return {
        kind: Product(_IN_FP8[kind] if fp8 else kind, tokens, features, size) for kind, size in widths.items()
    }


def linear_products(tokens: int, out_features: int, in_features: int) -> dict[Kind, Product]:
    """The products of a linear with a 2:4 weight `[out, in]` that may have a 2:4 operand: which of them do is
    up to the method (`act24.sparse24.weight.methods`)."""
    kinds: tuple[Kind, ...] = ("linear_y", "linear_grad_x", "linear_grad_weight")
    return {kind: Product(kind, tokens, out_features, in_features) for kind in kinds}


def choose(
    products: dict[Kind, Product],
    table: Table = (),
    always: bool = False,
    untuned: bool = True,
    fewer_tokens: bool = False,
) -> dict[Kind, int]:
    """The one rule between 2:4 and dense: all of these products, or none. A feed-forward network asks for all
    of its products together, a linear for each of its own.

    The passes that pack cost about what the elementwise passes of a dense network cost (with exact weight
    gradients 1.4 bytes an element more), so what decides is whether the products take less time together.

    Args:
        always: for a network whose only other form is the reference, which costs more than
            any slow product: none only where an algorithm is missing.
        untuned: the rule for shapes that nobody tuned may answer; it was measured on Hopper.
        fewer_tokens: where a product is not in the table, the same for the most tokens below it answers.

    Returns:
        the algorithm of each; empty where the dense ones are faster, as measured, or, where they are not all
        in the table, as far as one can tell from their shapes.
    """
    # As plain tuples: to torch.compile a named tuple is another key than the tuple it equals.
    known = {tuple(product): measured for product, measured in table}
    found = {kind: _with_fewer_tokens(p, known) if fewer_tokens else p for kind, p in products.items()}
    measured = {kind: Measured(*known[tuple(p)]) for kind, p in found.items() if tuple(p) in known}
    if len(measured) == len(products):
        chosen: dict[Kind, int] = {kind: measured[kind].algorithm for kind in products}
        sparse = sum(m.sparse for m in measured.values())
        pays = sparse < sum(m.dense for m in measured.values())
        return chosen if pays or (always and math.isfinite(sparse)) else {}
    if not untuned:
        return {}
    if all(
        p.width >= LEAST_WIDTH and p.features >= LEAST_FEATURES and p.tokens >= LEAST_TOKENS
        for p in products.values()
    ):
        return {kind: DEFAULT_ALGORITHMS[product.kind] for kind, product in products.items()}
    return dict.fromkeys(products, 0) if always else {}  # every shape has the first one


def _with_fewer_tokens(product: Product, known: Iterable[tuple[Any, ...]]) -> Product:
    """The product for as many tokens, or the most below them that are known; itself where none are."""
    kind, tokens, *shape = product
    fewer = [t for k, t, *s in known if k == kind and s == shape and t <= tokens]
    return product._replace(tokens=max(fewer)) if fewer else product
