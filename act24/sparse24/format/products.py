"""Products with a 2:4 operand: cuSPARSELt where it is faster, and what has to hold for it.

Which of the library's algorithms is best, and whether any beats the dense product, depends on the shape. The
shell measures it (`act24.tools.run.tuning`) and hands over a table; where the table has no answer one rule
decides, `choose`. Everything else in act24 asks there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from act24.sparse24.format import cusparselt
from act24.sparse24.format.packed import Packed24, pack, random_packed, unpack

#: The library's ids run from 0 to less than this; those that a GPU does not have raise an error.
ALGORITHMS = 32

#: How far off a product may be. Hopper's tensor cores keep about 14 bits of a running sum of e4m3.
TOLERANCE, FP8_TOLERANCE = 1e-2, 5e-2

#: For shapes that nobody tuned, from an H200 with cuSPARSELt 0.8: the smallest width and F at which a whole
#: step with 2:4 products was seen to be no slower (60m, T 65,536: 1.014 times as fast, the products 1.43),
#: and the smallest T at which the products alone were seen to be faster (1.42 to 1.51).
LEAST_WIDTH, LEAST_FEATURES, LEAST_TOKENS = 512, 2048, 16384

Kind = Literal["y", "grad_x", "grad_weight_in", "grad_weight_out", "y_fp8"]

#: And the algorithms that came out best most often there; which ids exist depends on the layouts involved.
DEFAULT_ALGORITHMS: dict[Kind, int] = {
    "y": 1,
    "grad_x": 3,
    "grad_weight_in": 3,
    "grad_weight_out": 0,
    "y_fp8": 21,
}
KINDS: tuple[Kind, ...] = tuple(DEFAULT_ALGORITHMS)


class Product(NamedTuple):
    """A product of a feed-forward network whose 2:4 operand is the activation a `[T, F]` or its gradient.

        y = a W_outᵀ          grad_x = dZ W_in          along the features
        dW_in = dZᵀ x         dW_outᵀ = aᵀ G            along the tokens

    Attributes:
        kind: which of the four; y_fp8 for y in e4m3 (`act24.sparse24.format.fp8`).
        tokens: T.
        features: F.
        width: of the dense operand, the input or output width of the network.
    """

    kind: Kind
    tokens: int
    features: int
    width: int

    @property
    def along_tokens(self) -> bool:
        """Whether the reduction, and with it 2:4, runs along the tokens."""
        return self.kind in ("grad_weight_in", "grad_weight_out")

    @property
    def sparse_shape(self) -> tuple[int, int]:
        """Of the 2:4 operand."""
        if self.along_tokens:
            return self.features, self.tokens
        return self.tokens, self.features

    @property
    def transposed(self) -> bool:
        """Whether the result is wanted transposed: the gradient of W_out `[D_out, F]`."""
        return self.kind == "grad_weight_out"


class Measured(NamedTuple):
    """What a tuner found for a product: the fastest algorithm, its milliseconds, and those of the dense
    product."""

    algorithm: int
    sparse: float
    dense: float


#: `(product, measured)` of each. As pairs, and any tuples will do, so that it can be a constant of a graph,
#: whose code has no names for the two classes.
Table = tuple[tuple[tuple[Kind, int, int, int], tuple[int, float, float]], ...]


def feed_forward_products(
    tokens: int, width: int, features: int, width_out: int, exact_weight_gradients: bool, fp8: bool = False
) -> dict[Kind, Product]:
    """The products of a feed-forward network that are 2:4: with exact weight gradients only the first two.

    Args:
        fp8: y is multiplied in e4m3.
    """
    products: dict[Kind, Product] = {
        "y": Product("y_fp8" if fp8 else "y", tokens, features, width_out),
        "grad_x": Product("grad_x", tokens, features, width),
    }
    if not exact_weight_gradients:
        products["grad_weight_in"] = Product("grad_weight_in", tokens, features, width)
        products["grad_weight_out"] = Product("grad_weight_out", tokens, features, width_out)
    return products


def choose(products: dict[Kind, Product], table: Table = (), always: bool = False) -> dict[Kind, int]:
    """The one rule between 2:4 and dense: all products of a network, or none.

    The passes that pack cost about what the elementwise passes of a dense network cost (with exact weight
    gradients 1.4 bytes an element more), so what decides is whether the products take less time together.

    Args:
        always: for a network whose only other form is the reference, which costs more than
            any slow product: none only where an algorithm is missing.

    Returns:
        the algorithm of each; empty where the dense ones are faster, as measured, or, where they are not all
        in the table, as far as one can tell from their shapes.
    """
    # As plain tuples: to torch.compile a named tuple is another key than the tuple it equals.
    known = {tuple(product): measured for product, measured in table}
    measured = {kind: Measured(*known[tuple(p)]) for kind, p in products.items() if tuple(p) in known}
    if len(measured) == len(products):
        chosen: dict[Kind, int] = {kind: measured[kind].algorithm for kind in products}
        sparse = sum(m.sparse for m in measured.values())
        pays = sparse < sum(m.dense for m in measured.values())
        return chosen if pays or (always and math.isfinite(sparse)) else {}
    if all(
        p.width >= LEAST_WIDTH and p.features >= LEAST_FEATURES and p.tokens >= LEAST_TOKENS
        for p in products.values()
    ):
        return {kind: DEFAULT_ALGORITHMS[product.kind] for kind, product in products.items()}
    return dict.fromkeys(products, 0) if always else {}  # every shape has the first one


def multiply24(packed: Tensor, dense: Tensor, algorithm: int, transposed: bool) -> Tensor:
    """A packed 2:4 matrix times a dense one, by cuSPARSELt.

    Args:
        packed: the buffer of a `Packed24` `[M, K]`, of bfloat16 or e4m3.
        dense: `[K, N]`, contiguous, or the transpose of a contiguous `[N, K]`; in e4m3 only the latter.
        algorithm: an id that the library has for this GPU.
        transposed: return `[N, M]`.

    Returns:
        `[M, N]` or `[N, M]`, contiguous, in bfloat16.

    Raises:
        ValueError: shapes or dtypes do not match, or the dense operand has another layout: the library would
            not notice, and read something else.
    """
    rows, inner = Packed24(packed).shape
    size, _ = dense.shape
    if size != inner or not packed.is_contiguous():
        raise ValueError(f"a packed {(rows, inner)} matrix cannot multiply {tuple(dense.shape)}")
    if packed.dtype not in (torch.bfloat16, torch.float8_e4m3fn) or dense.dtype is not packed.dtype:
        raise ValueError(
            f"2:4 products are of bfloat16 or e4m3 on both sides, not {packed.dtype} and {dense.dtype}"
        )
    if not (dense.T.is_contiguous() or (dense.is_contiguous() and packed.dtype is torch.bfloat16)):
        raise ValueError(
            f"the dense operand has to be contiguous (not in e4m3) or a contiguous matrix transposed; it is "
            f"{tuple(dense.shape)} with strides {dense.stride()}"
        )
    if cusparselt.multiplies(packed.device, packed.dtype):
        return cusparselt.multiply(packed, rows, dense, algorithm, transposed)
    return _library_product(packed, dense, algorithm, transposed)


def _library_product(packed: Tensor, dense: Tensor, algorithm: int = 0, transposed: bool = False) -> Tensor:
    """PyTorch's call, with a plan of its own."""
    out_dtype = torch.bfloat16 if packed.dtype is torch.float8_e4m3fn else None
    return torch.ops.aten._cslt_sparse_mm(
        packed, dense, out_dtype=out_dtype, transpose_result=transposed, alg_id=algorithm
    )


class _Operands(NamedTuple):
    """What a product multiplies, drawn at random: both sides as cuSPARSELt takes them, and as the dense
    product does, with the zeros filled in, in bfloat16."""

    packed: Packed24
    right: Tensor
    left: Tensor
    dense: Tensor


def _operands(product: Product, generator: torch.Generator) -> _Operands:
    rows, inner = product.sparse_shape
    forward = product.kind in ("y", "y_fp8")
    dtype = torch.float8_e4m3fn if product.kind == "y_fp8" else torch.bfloat16
    packed = random_packed(rows, inner, dtype, generator)
    shape = (product.width, inner) if forward else (inner, product.width)
    right = torch.randn(shape, generator=generator, device=generator.device).to(dtype)
    right = right.T if forward else right
    left = unpack(packed).bfloat16()
    # Along the tokens the dense network has the same matrix the other way round in memory.
    left = left.T.contiguous().T if product.along_tokens else left
    return _Operands(packed, right, left, right.bfloat16())


def dense_call(product: Product, generator: torch.Generator) -> Callable[[], Tensor]:
    """A call, to be timed, of the dense product, with its operands as a dense network has them."""
    _, _, left, dense = _operands(product, generator)
    return (lambda: dense.T @ left.T) if product.transposed else (lambda: left @ dense)


def candidates(
    product: Product, generators: Iterable[torch.Generator]
) -> Iterator[tuple[int, Callable[[], Tensor]]]:
    """Every algorithm that runs this product and gets it right, with a call to be timed.

    Some ids return wrong numbers without an error (pytorch issue 155333), so each has to agree with the dense
    product on one draw of each generator, all seeded differently, before it is offered.
    """
    tolerance = FP8_TOLERANCE if product.kind == "y_fp8" else TOLERANCE
    draws = [_operands(product, generator) for generator in generators]
    expected = [left @ dense for _, _, left, dense in draws]
    for algorithm in range(ALGORITHMS):
        calls = [
            functools.partial(multiply24, packed.buffer, right, algorithm, product.transposed)
            for packed, right, _, _ in draws
        ]
        try:
            results = [call().T if product.transposed else call() for call in calls]
        except RuntimeError:  # this GPU does not have the id, or not for this shape
            continue
        if max(map(relative_error, results, expected)) < tolerance:
            yield algorithm, calls[0]


def tuned(
    product: Product, time: Callable[[Callable[[], Tensor]], float], device: torch.device
) -> tuple[Measured, dict[int, float]]:
    """The fastest valid algorithm of a product.

    Args:
        product: what to measure.
        time: milliseconds that a call takes.
        device: where.

    Returns:
        what the table holds, and the times of all valid algorithms. Where none is, an infinite time.
    """
    seeded = [torch.Generator(device).manual_seed(seed) for seed in (0, 1)]
    times = {algorithm: time(call) for algorithm, call in candidates(product, seeded)}
    best = min(times, key=times.__getitem__, default=0)
    dense = time(dense_call(product, seeded[0]))
    return Measured(best, times.get(best, float("inf")), dense), times


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; NaN counts as infinite."""
    expected = expected.float()
    error = ((found.float() - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")


def layout_error(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> float:
    """How far a product with our packing is from one with cuSPARSELt's own compressor, on a small matrix.

    Relative to the result: rounding apart zero, as long as the library reads the layout of
    `act24.sparse24.format.packed` for values of this dtype, bfloat16 or e4m3.
    """
    generator = torch.Generator(device).manual_seed(0)
    packed = pack(torch.randn(128, 256, generator=generator, device=device).to(dtype))
    dense = torch.randn(64, 256, generator=generator, device=device).to(dtype).T
    own = torch.ops.aten._cslt_compress(unpack(packed)).view_as(packed.buffer)
    ours, expected = (_library_product(buffer, dense) for buffer in (packed.buffer, own))
    return relative_error(ours, expected)


@functools.cache
def obstacle(device: torch.device) -> str:
    """Why this device cannot run packed products; empty if it can. Looked at once a process: it is a fact
    about the machine. Whether the library still reads our layout is told from a product, not from its
    version."""
    if device.type != "cuda":
        return f"the kernels are for CUDA GPUs, this is {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return f"the packed layout is Hopper's (compute capability 9.0), this GPU has {major}.{minor}"
    if not torch.backends.cusparselt.is_available():
        return "this build of PyTorch has no cuSPARSELt"
    from act24.compiler import triton

    if triton is None:
        return "Triton is not installed"
    error = layout_error(device)
    if not error < TOLERANCE:
        version = torch.backends.cusparselt.version()
        return f"cuSPARSELt {version} reads another layout than ours (relative error {error:.2g})"
    # Waits for the device: now, and not while a graph is captured.
    cusparselt.multiplies(device, torch.bfloat16)
    return ""


@functools.cache
def fp8_obstacle(device: torch.device) -> str:
    """Why this device cannot run packed products in e4m3, as `obstacle` does."""
    if reason := obstacle(device):
        return reason
    version = torch.backends.cusparselt.version()
    try:
        error = layout_error(device, torch.float8_e4m3fn)
    except RuntimeError as exception:
        return f"cuSPARSELt {version} does not multiply e4m3 here ({str(exception).splitlines()[0]})"
    if not error < TOLERANCE:
        return f"cuSPARSELt {version} reads another 8-bit layout than ours (relative error {error:.2g})"
    cusparselt.multiplies(device, torch.float8_e4m3fn)
    return ""
