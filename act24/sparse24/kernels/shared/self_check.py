"""Whether kernels are right on a device: looked at on first use, against the references.

A kernel that was written and measured on one GPU may be refused by the compiler of another, or be wrong there
without an error. So each operator runs once on a small input, and its result is held against its
plain-PyTorch reference, before anything relies on it. What does not agree is not used, and the reason is what
`act24 doctor` and the plan of tuning show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from act24.compiler import triton
from act24.errors import Act24Error, ran_out_of_memory
from act24.operation import constant_when_compiled
from act24.sparse24.format.packed import Packed24, unpack, with_values
from act24.sparse24.kernels.packed_decode import INPUTS, TOKENS, packed_for_decode
from act24.sparse24.kernels.shared.registry import OPERATORS
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.token_wise import SPARSIFIERS
from act24.sparse24.pattern.transposable import transposable_mask

#: Share of the entries in which a kernel may differ: the draw of mvue rounds as the reference does but for
#: the order of a sum.
_TOLERANCE, _DRAW_TOLERANCE = 0.0, 1e-3

#: GPUs on which all of the kernels were run and checked (`act24.tools.bench.check_kernels`).
PROVEN = ("H100", "H200")

#: The operator `pack_activation` under mvue, whose draws are looked at apart: a GPU on which they are wrong
#: has the other methods all the same. What stands behind the colon only tells the two apart.
DRAWN_ACTIVATION = "pack_activation:mvue"

_SHAPE = 128, 256  # T and F

#: The least and the greatest width that the kernels of narrow networks take. Triton loads several steps of
#: a product ahead, for which the shared memory of a GPU may not do; at the least width there is one step.
_LEAST, _GREATEST = 64, 256


class _Case(NamedTuple):
    """One call of an operator, and how its results compare: see `mismatch`."""

    arguments: tuple[Any, ...]
    packed: int = 0
    slope: bool = False
    tolerance: float = _TOLERANCE


@functools.cache
def kernel_obstacle(device: torch.device, operators: tuple[str, ...]) -> str:
    """Why the kernels of these operators cannot be used on a device; empty if they can.

    Looked at once a process and device. It launches kernels and waits for them, so it cannot be asked for the
    first time while a CUDA graph is captured. Memory that runs out meanwhile tells nothing of the kernels: it
    is raised as it is.

    Raises:
        Act24Error: a CUDA graph is being captured.
    """
    if device.type != "cuda":
        return f"the kernels are for CUDA GPUs, this is {device.type}"
    if triton is None:
        return "Triton is not installed"
    if torch.cuda.is_current_stream_capturing():
        raise Act24Error(
            "kernels check themselves on first use, which a CUDA graph cannot capture: run the model once "
            "before it is captured"
        )
    for name in operators:
        if reason := check_operator(name, device):
            return reason
    return ""


@constant_when_compiled
def kernel_obstacle_on(device: torch.device, operators: tuple[str, ...]) -> str:
    """`kernel_obstacle`, as a constant of a compiled graph."""
    return kernel_obstacle(device, operators)


@torch.no_grad()
def check_operator(name: str, device: torch.device) -> str:
    """Run one operator on a device beside its reference; why not to use it there, or the empty string."""
    plain = name.partition(":")[0]
    operator, reference = getattr(torch.ops.act24, plain), OPERATORS[plain].reference
    try:
        with torch.autocast(device.type, enabled=False):
            for case in _CASES[name](device):
                results = [_tuple(of(*case.arguments)) for of in (operator, reference)]
                wrong = mismatch(results[0], results[1], case.packed, case.slope)
                if not wrong <= case.tolerance:
                    return (
                        f"the kernel {name} is wrong on this GPU ({100 * wrong:.2g}% of the entries differ)"
                    )
    except Exception as exception:  # compilers and drivers raise whatever they like
        if ran_out_of_memory(exception):
            raise
        first, *_ = str(exception).strip().splitlines() or [""]
        return f"the kernel {name} does not run on this GPU ({type(exception).__name__}: {first[:100]})"
    return ""


def _tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def mismatch(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], packed: int, slope: bool) -> float:
    """Share of the entries in which two results of an operator differ, the worst over its outputs, which
    have one shape on both sides.

    Args:
        packed: so many outputs, the first ones, are packed, and compared by what they stand for: groups with
            fewer than two non-zeros may name any places.
        slope: the output behind the first one holds the slope at its places, and is compared likewise.
    """
    pairs = []
    for side in (outputs, expected):
        side = list(side)
        if slope:
            side[1] = unpack(with_values(Packed24(side[0]), side[1]))
        pairs.append([unpack(Packed24(side[n])) if n < packed else side[n] for n in range(len(side))])
    worst = 0.0
    for a, b in zip(*pairs, strict=True):
        if a.dtype is torch.float32:  # sums, of activations that one side rounds first
            worst = max(worst, 0.0 if torch.allclose(a, b, rtol=1e-2) else 1.0)
        elif a.numel():
            if a.dtype is torch.float8_e4m3fn:  # which cannot be compared
                a, b = a.float(), b.float()
            worst = max(worst, (a != b).float().mean().item())
    return worst


def _draw(device: torch.device, *shape: int) -> Tensor:
    """Multiples of 1/4 between -1 and 1: their products add up exactly in any order."""
    values = torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(sum(shape)))
    return (values / 4).bfloat16().to(device)


def _pack_activation(device: torch.device) -> Iterator[_Case]:
    hidden = _draw(device, *_SHAPE)
    real = torch.arange(_SHAPE[0], device=device) % 5 != 0
    for method in SPARSIFIERS:
        if method != "mvue":
            slope = method != "naive"
            yield _Case((hidden, None, real, "relu2", method, slope, False, True, True), 1, slope)
    yield _Case((hidden, None, real, "relu2", "naive", False, True, True, True))


def _pack_drawn_activation(device: torch.device) -> Iterator[_Case]:
    hidden, seed = _draw(device, *_SHAPE), torch.tensor(2**40 + 17, device=device)
    yield _Case((hidden, seed, None, "relu2", "mvue", True, False, True, True), 1, True, _DRAW_TOLERANCE)


def _saved(device: torch.device) -> tuple[Tensor, Tensor]:
    """A gradient, and a packed activation as forward saves it."""
    hidden = _draw(device, *_SHAPE)
    saved, *_ = OPERATORS["pack_activation"].reference(
        hidden, None, None, "relu2", "naive", False, False, False, False
    )
    return _draw(device, *_SHAPE).flip(0), saved


def _pack_gradient(device: torch.device) -> Iterator[_Case]:
    grad, saved = _saved(device)
    real = torch.arange(_SHAPE[0], device=device) % 5 != 0
    yield _Case((grad, saved, None, real, torch.arange(0, _SHAPE[1], 9, device=device), "relu2"), 3)


def _unpack_gradient(device: torch.device) -> Iterator[_Case]:
    yield _Case((*_saved(device), None, "relu2"), 1)


def _activation_gradient(device: torch.device) -> Iterator[_Case]:
    grad, saved = _saved(device)
    for function in ("relu2", "relu"):
        yield _Case((grad, unpack(Packed24(saved)), function))


def _count_activation(device: torch.device) -> Iterator[_Case]:
    for function in ("relu2", "relu"):
        yield _Case((_draw(device, *_SHAPE), None, function))


def _gather_features(device: torch.device) -> Iterator[_Case]:
    _, saved = _saved(device)
    yield _Case((saved, torch.arange(0, _SHAPE[1], 9, device=device), None, _SHAPE[0] // 2))


def _saved_e4m3(device: torch.device) -> tuple[tuple[Any, ...], Tensor]:
    """Arguments of `pack_activation` in e4m3, and what it makes of them."""
    over = torch.tensor([2.0**-8, 2.0**-6], device=device).repeat(_SHAPE[0] // 2)
    arguments = (_draw(device, *_SHAPE), None, None, "relu2", "naive", False, False, True, False, None, over)
    return arguments, OPERATORS["pack_activation"].reference(*arguments)[0]


def _pack_activation_e4m3(device: torch.device) -> Iterator[_Case]:
    yield _Case(_saved_e4m3(device)[0], 1)


def _pack_gradient_e4m3(device: torch.device) -> Iterator[_Case]:
    arguments, saved = _saved_e4m3(device)
    real = torch.arange(_SHAPE[0], device=device) % 5 != 0
    index = torch.arange(0, _SHAPE[1], 9, device=device)
    by_token, by_feature = (torch.linspace(1e-3, 1, n, device=device) for n in _SHAPE)
    scales = (by_token, by_feature, by_feature.flip(0))
    given = (_draw(device, *_SHAPE).flip(0), saved, arguments[-1], None, real, index, *scales, "relu2")
    yield _Case((*given, True), 3)
    yield _Case((*given, False), 1)


def _gather_features_e4m3(device: torch.device) -> Iterator[_Case]:
    arguments, saved = _saved_e4m3(device)
    index = torch.arange(0, _SHAPE[1], 9, device=device)
    yield _Case((saved, index, None, _SHAPE[0] // 2, arguments[-1]))


def _largest_magnitudes(device: torch.device) -> Iterator[_Case]:
    yield _Case((_draw(device, *_SHAPE), True, True))


def _cast_e4m3(device: torch.device) -> Iterator[_Case]:
    rows, columns = (torch.linspace(1e-4, 1, n, device=device) for n in _SHAPE)
    yield _Case((_draw(device, *_SHAPE), rows, columns))
    yield _Case((_draw(device, *_SHAPE), rows[5:6], columns[5:6], True))


def _product_e4m3(device: torch.device) -> Iterator[_Case]:
    left, right = (_draw(device, *_SHAPE).to(torch.float8_e4m3fn) for _ in range(2))
    scales = [torch.linspace(0.5, 1, len(left), device=device).bfloat16().float() for _ in range(2)]
    yield _Case((left, right, scales[0][:1], scales[1][:1]))


def _single_entries(device: torch.device) -> Tensor:
    """Rows `[T, _GREATEST]` with one entry each, at places of every step: their products are single terms,
    so that no order and no precision of sums matters."""
    tokens, _ = _SHAPE
    places = torch.arange(tokens, device=device) * 67 % _GREATEST
    entries = _draw(device, tokens, 1)
    entries = torch.where(entries == 0, 1, entries)
    return entries.new_zeros(tokens, _GREATEST).scatter(1, places[:, None], entries)


def _linear_pack(device: torch.device) -> Iterator[_Case]:
    tokens, features = _SHAPE
    yield _Case((_draw(device, tokens, _LEAST), _draw(device, features, _LEAST), False))
    # Above zero, where every group has two non-zeros: of others what is saved may name any places.
    wide = _single_entries(device).abs(), _draw(device, features, _GREATEST).abs() + 1
    yield _Case((*wide, True))


def _linear_gradient(device: torch.device) -> Iterator[_Case]:
    tokens, features = _SHAPE
    # What the kernel saved: of groups with fewer than two non-zeros it may name other places.
    _, *saved = torch.ops.act24.linear_pack(
        _draw(device, tokens, _LEAST), _draw(device, features, _LEAST), True
    )
    yield _Case((_draw(device, tokens, _LEAST).flip(0), _draw(device, _LEAST, features), *saved))
    yield _Case((_single_entries(device), _draw(device, _GREATEST, features), *saved))


def _recompute_gradient(device: torch.device) -> Iterator[_Case]:
    tokens, features = _SHAPE
    weight_in, weight_out = _draw(device, features, _LEAST), _draw(device, _LEAST, features)
    rows = _draw(device, tokens, _LEAST)
    yield _Case((rows, weight_in, rows.flip(0), weight_out))
    rows = _single_entries(device)
    weight_in, weight_out = _draw(device, features, _GREATEST), _draw(device, _GREATEST, features)
    yield _Case((rows, weight_in, rows.flip(0), weight_out))


def _pack_weight(device: torch.device) -> Iterator[_Case]:
    weight = _draw(device, *_SHAPE)
    yield _Case((weight, transposable_mask(weight)), 2)


def _pack_weight_rows(device: torch.device) -> Iterator[_Case]:
    weight = _draw(device, *_SHAPE)
    yield _Case((weight, top2_of_4(weight.abs())), 1)


def _pack_drawn(device: torch.device) -> Iterator[_Case]:
    yield _Case((_draw(device, *_SHAPE), torch.tensor(2**40 + 17, device=device)), 1)


def _best_transposable_mask(device: torch.device) -> Iterator[_Case]:
    # Without ties: on a GPU the reference takes any of equally good patterns.
    weight = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    yield _Case((weight.to(device),))


def _dense_decode(device: torch.device) -> Iterator[_Case]:
    yield _Case((_draw(device, 1, 3000), _draw(device, 70, 3000)))


def _skipping_product(device: torch.device) -> Iterator[_Case]:
    features = 1024  # of several splits
    weight = _draw(device, features, 128)
    for tokens, function in ((1, "relu2"), (1, "none"), (8, "relu")):
        yield _Case((_draw(device, tokens, features), weight, function))


def _packed_decode(device: torch.device) -> Iterator[_Case]:
    inputs = 8 * INPUTS
    weight = _draw(device, 128, inputs)
    packed = packed_for_decode(torch.where(top2_of_4(weight.abs()), weight, 0))
    for tokens in (1, 8, TOKENS):
        yield _Case((_draw(device, tokens, inputs), *packed))


#: A small call, or several, of every operator that is looked at.
_CASES: dict[str, Callable[[torch.device], Iterator[_Case]]] = {
    "pack_activation": _pack_activation,
    DRAWN_ACTIVATION: _pack_drawn_activation,
    "pack_gradient": _pack_gradient,
    "unpack_gradient": _unpack_gradient,
    "activation_gradient": _activation_gradient,
    "count_activation": _count_activation,
    "gather_features": _gather_features,
    "largest_magnitudes": _largest_magnitudes,
    "cast_e4m3": _cast_e4m3,
    "product_e4m3": _product_e4m3,
    "pack_activation:e4m3": _pack_activation_e4m3,
    "pack_gradient_e4m3": _pack_gradient_e4m3,
    "gather_features:e4m3": _gather_features_e4m3,
    "linear_pack": _linear_pack,
    "linear_gradient": _linear_gradient,
    "recompute_gradient": _recompute_gradient,
    "pack_weight": _pack_weight,
    "pack_weight_rows": _pack_weight_rows,
    "pack_drawn": _pack_drawn,
    "best_transposable_mask": _best_transposable_mask,
    "dense_decode": _dense_decode,
    "skipping_product": _skipping_product,
    "packed_decode": _packed_decode,
}
