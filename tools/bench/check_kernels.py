"""`python -m act24.tools.bench.check_kernels [WORD]`, by hand on a Hopper GPU: every kernel against its
reference, bit for bit, and the whole operation against the reference, eager, compiled, in a CUDA graph and
under autocast. Only checks with WORD in their name, if given.

Prints what failed, and leaves with status 1 then.
"""

from __future__ import annotations

import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, get_args

import torch
from torch import Tensor

from act24.sparse24.feed_forward.forms import network_of
from act24.sparse24.feed_forward.methods import METHODS
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.packed import PACKED
from act24.sparse24.feed_forward.packed_fp8 import PACKED_FP8
from act24.sparse24.format.cusparselt import multiplies
from act24.sparse24.format.device import layout_error
from act24.sparse24.format.fp8 import largest_of, power_scales, scales_of
from act24.sparse24.format.multiply import FP8_TOLERANCE, relative_error
from act24.sparse24.format.packed import Packed24, random_packed, unpack
from act24.sparse24.format.products import (
    DEFAULT_ALGORITHMS,
    Measured,
    Table,
    feed_forward_products,
    linear_products,
)
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.kernels.shared.self_check import mismatch
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.token_wise import SPARSIFIERS, Function
from act24.sparse24.pattern.transposable import transposable_mask
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import linear24
from act24.sparse24.weight.methods import METHODS as WEIGHT_METHODS
from act24.sparse24.weight.methods import weight_mask, weight_scale
from act24.sparse24.weight.packed import packed_operands
from act24.tools.bench.rows import needed_gpu

#: Operators of generation, which `check_decode` checks.
CHECKED_BY_DECODE = {"dense_decode", "packed_decode", "skipping_product"}

Check = tuple[str, Callable[[], float]]  # what, and how far off it is


def _awkward(tokens: int, features: int, device: torch.device) -> Tensor:
    """Normal values with ties, zeros of both signs, an empty row and large numbers among them."""
    x = torch.randn(tokens, features, device=device)
    x = torch.where(torch.rand_like(x) < 0.3, (2 * x).round() / 2, x)
    x[3] = 0
    x[5, ::2] = -0.0
    x[7, :16] *= 1e6
    return x.bfloat16()


def _kernels(device: torch.device) -> Iterator[Check]:
    for tokens, features in ((192, 128), (128, 320), (1024, 4096)):
        hidden, grad = _awkward(tokens, features, device), _awkward(tokens, features, device)
        real = torch.rand(tokens, device=device) < 0.8
        order = torch.randperm(tokens, device=device)
        index = torch.randperm(features, device=device)[: features // 20 + 1]
        seed = torch.tensor(2**40 + 17, device=device)
        for function, method in itertools.product(get_args(Function), SPARSIFIERS):
            case = f"{tokens}×{features} {function} {method}"
            slope = method != "naive"
            arguments = (hidden, seed, real, function, method, slope, False, True, True)
            yield f"pack_activation {case}", _same("pack_activation", 1, arguments, slope)
            dense = (*arguments[:5], False, True, True, True)
            yield f"pack_activation {case} with zeros", _same("pack_activation", 0, dense)
            if method == "mvue":
                numbered = (*arguments, order)
                yield f"pack_activation {case} numbered", _same("pack_activation", 1, numbered, slope)
            if method == "naive":
                yield f"count_activation {case}", _same("count_activation", 0, (hidden, real, function))
            saved, slopes, _, _ = OPERATORS["pack_activation"].reference(*arguments)
            slopes = slopes if slope else None
            for where in ((None, None), (real, index)):
                arguments = (grad, saved, slopes, *where, function)
                yield f"pack_gradient {case} {where[0] is not None}", _same("pack_gradient", 3, arguments)
            yield (
                f"unpack_gradient {case}",
                _same("unpack_gradient", 1, (grad, saved, slopes, function)),
            )
            if method == "naive":
                value = unpack(Packed24(saved))
                yield f"activation_gradient {case}", _same("activation_gradient", 0, (grad, value, function))
            yield (
                f"gather_features {case}",
                _same("gather_features", 0, (saved, index, real, saved.shape[0] // 2)),
            )
            yield from _e4m3_kernels(case, function, method, (hidden, grad), (real, index, seed))
        yield f"largest_magnitudes {tokens}×{features}", _same("largest_magnitudes", 0, (hidden, True, True))
        scales = scales_of(largest_of(hidden, 1)), scales_of(largest_of(hidden, 0))
        for name, given in (("by rows", scales), ("one", (scales[0][:1], scales[1][:1]))):
            for count in (False, True):
                title = f"cast_e4m3 {tokens}×{features} {name}{', counted' if count else ''}"
                yield title, _same("cast_e4m3", 0, (hidden, *given, count))


def _e4m3_kernels(
    case: str, function: str, method: str, rows: tuple[Tensor, Tensor], state: tuple[Tensor, Tensor, Tensor]
) -> Iterator[Check]:
    """Those that pack in e4m3."""
    (hidden, grad), (real, index, seed) = rows, state
    over, slope = power_scales(largest_of(hidden, 1).square()), method != "naive"
    arguments = (hidden, seed, real, function, method, slope, False, True, True, None, over)
    yield f"pack_activation e4m3 {case}", _same("pack_activation", 1, arguments, slope)
    saved, slopes, *_ = OPERATORS["pack_activation"].reference(*arguments)
    scales = (
        scales_of(largest_of(grad, 1) * 9),
        power_scales(largest_of(hidden, 0).square()),
        scales_of(largest_of(grad, 0) * 9),
    )
    for sparse, where in itertools.product((True, False), ((None, None), (real, index))):
        arguments = (grad, saved, over, slopes if slope else None, *where, *scales, function, sparse)
        name = f"pack_gradient_e4m3 {case} {sparse} {where[0] is not None}"
        yield name, _same("pack_gradient_e4m3", 3 if sparse else 1, arguments)
    given = (saved, index, real, saved.shape[0] // 2, over)
    yield f"gather_features e4m3 {case}", _same("gather_features", 0, given)


def _narrow_kernels(device: torch.device) -> Iterator[Check]:
    """Products of multiples of 1/4, which add up exactly in any order, so that selections agree."""

    def draw(*shape: int) -> Tensor:
        return (torch.randint(-2, 3, shape, device=device) / 4).bfloat16()

    for tokens, width, features in ((256, 64, 128), (1024, 256, 4096)):
        x, weight_in = draw(tokens, width), draw(features, width)
        grad, weight_out = draw(tokens, width), draw(width, features)
        case = f"{tokens}×{width}×{features}"
        yield f"linear_pack {case}", _same("linear_pack", 0, (x, weight_in, False))
        yield f"linear_pack, linear_gradient {case}", _both_ways(x, weight_in, grad, weight_out)
        arguments = (x, weight_in, grad, weight_out)
        yield f"recompute_gradient {case}", _same("recompute_gradient", 0, arguments)
        arguments = (weight_in, transposable_mask(weight_in))
        yield f"pack_weight {case}", _same("pack_weight", 2, arguments)


def _products(device: torch.device) -> Iterator[Check]:
    """The library's product with dense rows put in, and the order of tokens, which is no kernel."""
    generator = torch.Generator(device).manual_seed(0)
    packed = random_packed(256, 512, torch.bfloat16, generator).buffer
    dense, rows = (torch.randn(512, n, device=device).bfloat16() for n in (128, 40))
    index = torch.randperm(256, device=device)[:40]
    for transposed in (False, True):
        arguments = (packed, dense, 0, transposed, rows.T.contiguous(), index)
        found, expected = (form(*arguments) for form in _both("product24"))
        yield f"product24 transposed {transposed}", functools.partial(relative_error, found, expected)
    left, right = (random_packed(256, 512, torch.float8_e4m3fn, generator).buffer for _ in range(2))
    narrow = unpack(Packed24(right))[:128].contiguous()
    scale, rows_8 = torch.rand(256, device=device), unpack(Packed24(left))[:40].contiguous()
    arguments = (unpack(Packed24(left)), narrow, scale, scale[:1])
    found, expected = (form(*arguments) for form in _both("product_e4m3"))
    yield "product_e4m3", functools.partial(relative_error, found, expected)
    for transposed in (False, True):
        arguments = (left, narrow, 8 if transposed else 21, transposed, rows_8, index)
        found, expected = (form(*arguments) for form in _both("product24_e4m3"))
        yield f"product24_e4m3 transposed {transposed}", functools.partial(relative_error, found, expected)
    orders = [form(dense, [4, 64], "sequence") for form in _both("token_order")]
    yield "token_order", lambda: float(not all(map(torch.equal, *orders)))


def _both_ways(x: Tensor, weight_in: Tensor, grad: Tensor, weight_out: Tensor) -> Callable[[], float]:
    """What forward saves is compared by what backward makes of it: see `mismatch`."""

    def check() -> float:
        made = []
        for forward, backward in zip(_both("linear_pack"), _both("linear_gradient"), strict=True):
            _, *saved = forward(x, weight_in, True)
            made.append(backward(grad, weight_out, *saved))
        return mismatch(*made, 0, False)

    return check


def _both(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """An operator, and its reference."""
    return getattr(torch.ops.act24, name), OPERATORS[name].reference


def _same(name: str, packed: int, arguments: tuple, slope: bool = False) -> Callable[[], float]:
    def check() -> float:
        outputs, expected = (form(*arguments) for form in _both(name))
        if isinstance(outputs, Tensor):
            outputs, expected = (outputs,), (expected,)
        return mismatch(outputs, expected, packed, slope)

    return check


def _same_mask(weight: Tensor) -> Callable[[], float]:
    """Of equally good patterns the first one wins, as on a CPU: on a GPU `argmax` takes any."""

    def check() -> float:
        mask = torch.ops.act24.best_transposable_mask(weight)
        return (mask.cpu() != transposable_mask(weight.cpu())).float().mean().item()

    return check


def _operation(device: torch.device) -> Iterator[Check]:
    tokens, width, features = 512, 256, 1024
    draw = lambda *size: torch.randn(*size, device=device).bfloat16()  # noqa: E731
    x, grad = draw(2, tokens // 2, width).requires_grad_(), draw(2, tokens // 2, width)
    weight_in = (draw(features, width) / width**0.5).requires_grad_()
    weight_out = (draw(width, features) / features**0.5).requires_grad_()
    bias_in, bias_out = draw(features).requires_grad_(), draw(width).requires_grad_()
    leaves = (x, weight_in, bias_in, weight_out, bias_out)
    shape = (tokens, width, features, width, False)
    forced = tuple((product, Measured(0, 0, 1)) for product in feed_forward_products(*shape).values())
    # In e4m3 not every layout has the first algorithm.
    narrow = feed_forward_products(*shape, True).values()
    forced += tuple((p, Measured(DEFAULT_ALGORITHMS[p.kind], 0, 1)) for p in narrow)
    seed, scale = torch.tensor(5, device=device), torch.tensor(1.25, device=device)
    for backward, record, precision in itertools.product(
        PACKED.backwards,
        [m for m in METHODS.values() if m.kernel in PACKED.sparsifiers],
        ("bfloat16", "fp8"),
    ):
        packed = PACKED_FP8 if precision == "fp8" else PACKED
        method = record.name
        options = Options24(method=method, backward=backward, precision=precision, algorithms=forced)
        state = (scale if record.scaled else None, seed, None)

        def run(
            options: Options24, function: Callable[..., Any] = activation24, state: tuple = state
        ) -> tuple[Tensor, ...]:
            y, _ = function(*leaves, *state, options)
            return y.detach(), *torch.autograd.grad(y, leaves, grad)

        expected = run(options._replace(kernels=False))

        def error(call: Callable[[], tuple[Tensor, ...]], expected: tuple = expected) -> float:
            return max(map(relative_error, call(), expected))

        case = f"{backward} {method} {precision}"
        if reason := packed.why_not(network_of(leaves, record.scaled), options):
            yield f"operation {case} runs on the reference: {reason}", lambda: float("inf")
            continue
        yield f"operation {case} eager", lambda run=run, o=options, e=error: e(lambda: run(o))
        if (backward, method, precision) == ("dense", "naive", "bfloat16"):
            around = options._replace(algorithms=())  # too narrow to pay without a table
            yield (
                f"operation {case} around dense products",
                lambda run=run, o=around, e=error: e(lambda: run(o)),
            )
        if method == "naive":
            compiled = torch.compile(activation24, fullgraph=True)
            yield (
                f"operation {case} compiled",
                lambda run=run, o=options, e=error, c=compiled: e(lambda: run(o, c)),
            )
            yield (
                f"operation {case} graph",
                lambda run=run, o=options, e=error: e(lambda: _replayed(lambda: run(o))),
            )

    hidden, above = draw(tokens, features).requires_grad_(), draw(tokens, features)
    yield "operation without its linears", lambda: _alone(hidden, above)
    yield "operation under autocast", lambda: _under_autocast(leaves, grad, forced)


def _alone(hidden: Tensor, above: Tensor) -> float:
    results = []
    for kernels in (True, False):
        y, _ = activation24(hidden, None, None, None, None, options=Options24(kernels=kernels))
        results.append((y.detach(), *torch.autograd.grad(y, hidden, above)))
    return max(map(relative_error, *results))


def _under_autocast(leaves: tuple[Tensor, ...], grad: Tensor, algorithms: Table) -> float:
    options = Options24(backward="split_gemm", algorithms=algorithms)
    single = [leaf.detach().float().requires_grad_() for leaf in leaves]
    results = []
    for kernels in (True, False):
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = activation24(*single, options=options._replace(kernels=kernels))
        results.append((y, *torch.autograd.grad(y, single, grad)))
    return max(map(relative_error, *results))


def _weights(device: torch.device) -> Iterator[Check]:
    """The kernels of 2:4 weights, and `linear24` on 2:4 products against its reference under every method."""
    for rows, columns in ((64, 128), (192, 64), (1024, 4096)):
        weight, case = _awkward(rows, columns, device), f"{rows}×{columns}"
        for dtype in (torch.bfloat16, torch.float32):
            yield f"best_transposable_mask {case} {dtype}", _same_mask(weight.to(dtype))
        yield f"pack_weight_rows {case}", _same("pack_weight_rows", 1, (weight, top2_of_4(weight.abs())))
        seed = torch.tensor(2**40 + 17, device=device)
        yield f"pack_drawn {case}", _same("pack_drawn", 1, (weight, seed))
    tokens, width, features = 512, 256, 1024
    draw = lambda *size: torch.randn(*size, device=device).bfloat16()  # noqa: E731
    x, grad = draw(2, tokens // 2, width).requires_grad_(), draw(2, tokens // 2, features)
    weight, bias = (draw(features, width) / 16).requires_grad_(), draw(features).requires_grad_()
    products = linear_products(tokens, features, width).values()
    forced = tuple((product, Measured(0, 0.0, 1.0)) for product in products)
    for method, seed in itertools.product(WEIGHT_METHODS, (None, torch.tensor(5, device=device))):
        record = WEIGHT_METHODS[method]
        scale = weight_scale(weight) if record.soft else None
        state = (None if record.soft else weight_mask(weight, method), scale, seed)
        kept = packed_operands(weight.detach(), *state[:2], record.both_ways)
        options = LinearOptions24(record.both_ways, True, forced)

        def run(options: LinearOptions24, packed: Any, call: Any = linear24, state: Any = state) -> Any:
            y = call(x, weight, bias, *state, *packed, options)
            return y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)

        expected = run(options._replace(kernels=False), (None, None))

        def compiled(*arguments: Any) -> Tensor:
            torch._dynamo.reset()  # else too many forms of one function
            return torch.compile(linear24, fullgraph=True)(*arguments)

        for name, call in (
            ("eager", lambda run=run, o=options: run(o, (None, None))),
            ("packed before", lambda run=run, o=options, k=kept: run(o, k)),
            ("compiled", lambda run=run, o=options, k=kept, c=compiled: run(o, k, c)),
            ("graph", lambda run=run, o=options, k=kept: _replayed(lambda: run(o, k))),
        ):
            yield (
                f"linear24 {method}{' drawn' if seed is not None else ''} {name}",
                lambda call=call, e=expected: max(map(relative_error, call(), e)),
            )


def _replayed(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What a call gives when it is replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    for tensor in result:
        tensor.fill_(float("nan"))
    graph.replay()
    return result


def main(word: str = "") -> int:
    """Run the checks with this word in their names; the number of those that failed."""
    device = needed_gpu()
    torch.manual_seed(0)
    checks: list[tuple[str, Callable[[], float], float]] = [
        ("layout against cuSPARSELt's compressor", lambda: layout_error(device), 1e-2),
        ("layout of fp8 against it", lambda: layout_error(device, torch.float8_e4m3fn), 1e-2),
        ("kept plans against PyTorch's call", lambda: float(not multiplies(device, torch.bfloat16)), 0.0),
        ("kept plans of fp8 against it", lambda: float(not multiplies(device, torch.float8_e4m3fn)), 0.0),
    ]
    checks += [(name, check, 0.0) for name, check in _kernels(device)]
    checks += [(name, check, 0.0) for name, check in _narrow_kernels(device)]
    checks += [(name, check, 1e-2) for name, check in _products(device)]
    weights = _weights(device)
    checks += [(name, check, 1e-2 if "linear24" in name else 0.0) for name, check in weights]
    named = set(re.findall(r"\w+", " ".join(name for name, *_ in checks)))
    unchecked = {*OPERATORS} - named - CHECKED_BY_DECODE
    checks.append(("every operator has a check", lambda: float(len(unchecked)), 0.0))
    for name, check in _operation(device):
        # In e4m3 a sum that is rounded otherwise may be another number, 6% away, and another selection.
        checks.append((name, check, FP8_TOLERANCE if "fp8" in name else 1e-2))
    failed = 0
    checks = [check for check in checks if word in check[0]]
    for name, check, allowed in checks:
        try:
            error = check()
            message = f"{error:.2g}"
        except Exception as exception:
            error, message = float("inf"), f"{type(exception).__name__}: {exception}"
        passed = error <= allowed
        failed += not passed
        if not passed or allowed > 1e-3:
            print(f"{'ok    ' if passed else 'FAILED'} {name}: {message[:300]}", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main(*sys.argv[1:]) else 0)
