"""Compiled gradients against eager ones, for every operation with a hand-written backward, on this machine.

    python -m act24.tools.bench.check_operations [WORD…]

torch.compile inlines such backwards in its own way in each release, and can be wrong without an error: under
torch 2.11 an output that was accumulated in place got gradients of zero, and so did one behind a `.to` that
changed nothing. CI runs one release and no GPU, so this is a command, to be run on each machine and release
that matters. Exits with status 1 on a difference. Only operations with a WORD in their name, if given.

Behind them each that has kernels or a library's products runs on a batch without tokens, eager and compiled:
gradients of stock shapes, all zero. And those whose backward counts what becomes zero, with their counts.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from act24.document_attention import document_attention
from act24.fp8.casts import Scaling
from act24.fp8.linear import cast_weight, linear_fp8
from act24.loss import cross_entropy_sum
from act24.low_rank.columns import select_columns
from act24.sparse24.feed_forward.methods import ESTIMATORS, METHODS
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24, Precision
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.weight.forms import LinearOptions24
from act24.sparse24.weight.linear24 import linear24

Case = tuple[str, Callable[..., Tensor], tuple[Tensor, ...]]


class _Draw:
    """Draws tensors that get gradients, all from one seed."""

    def __init__(self, device: str) -> None:
        self.device, self.generator = device, torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device).requires_grad_()

    def coarse(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Multiples of 1/4, which bfloat16 holds: compilers leave out roundings between two operations, and
        what e4m3 makes of the difference is many times as large."""
        return (self(*shape).detach() * 4).round().div(4).to(dtype).requires_grad_()


def cases(device: str) -> Iterator[Case]:
    """Every operation at a small size, as a function of the tensors that get gradients."""
    draw = _Draw(device)
    yield from _losses(draw)
    indices = torch.tensor([3, 1, 17], device=device)
    yield "select_columns", lambda x: select_columns(x, indices).sin().sum(), (draw(4, 16, 32),)
    seed = torch.tensor(7, device=device)
    # What y is multiplied by for the sum. No function of y: what quantising rounds otherwise in a compiled
    # graph would come back in the gradients, many times as large.
    probe = draw.coarse(64, 32).detach()
    yield from _networks(draw, probe, seed)
    yield from _linears_fp8(draw, probe)
    yield from _linears24(draw, probe, seed)
    yield from _document_attentions(draw)

    def bottleneck(hidden: Tensor) -> Tensor:
        return activation24(hidden, None, None, None, None)[0].sin().sum()

    yield "activation24, no linear", bottleneck, (draw(64, 32),)


def _losses(draw: _Draw) -> Iterator[Case]:
    labels = torch.randint(50, (4, 64), generator=draw.generator).to(draw.device)
    yield (
        "cross_entropy_sum",
        lambda hidden, weight: cross_entropy_sum(hidden, weight, labels, 64)[0],
        (draw(4, 64, 32), draw(50, 32)),
    )
    for scaling in get_args(Scaling):
        yield (
            f"cross_entropy_sum, fp8, {scaling}",
            lambda hidden, weight, scaling=scaling: cross_entropy_sum(
                hidden, weight, labels % 48, 64, None, None, None, None, scaling
            )[0],
            (draw.coarse(4, 64, 32), draw.coarse(48, 32)),
        )


def _networks(draw: _Draw, probe: Tensor, seed: Tensor) -> Iterator[Case]:
    scale = torch.tensor(1.5, device=draw.device)
    for options in _variants():
        name = f"activation24, {options.method}, {options.backward}, {options.estimator}, {options.precision}"

        def network(x: Tensor, weight_in: Tensor, weight_out: Tensor, options: Options24 = options) -> Tensor:
            y, _ = activation24(x, weight_in, None, weight_out, None, scale, seed, options=options)
            return (y * probe).sum()

        made = draw.coarse if options.precision == "fp8" else draw
        yield name, network, (made(64, 32), made(128, 32), made(32, 128))


def _linears_fp8(draw: _Draw, probe: Tensor) -> Iterator[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    for scaling, dtype, autocast in itertools.product(("rowwise", "tensorwise"), dtypes, (False, True)):

        def linear(
            x: Tensor, weight: Tensor, bias: Tensor, scaling: Scaling = scaling, autocast: bool = autocast
        ) -> Tensor:
            with torch.autocast(draw.device, torch.bfloat16, enabled=autocast):
                return (linear_fp8(x, weight, bias, scaling=scaling) * probe).sum()

        name = f"linear_fp8, {scaling}, {dtype}{', autocast' if autocast else ''}"
        yield name, linear, tuple(draw.coarse(*shape, dtype=dtype) for shape in ((64, 48), (32, 48), (32,)))


def _linears24(draw: _Draw, probe: Tensor, seed: Tensor) -> Iterator[Case]:
    for draws, narrow in itertools.product((False, True), repeat=2):
        given = LinearOptions24(precision="fp8" if narrow else "bfloat16")

        def sparse(x: Tensor, weight: Tensor, draws: bool = draws, given: LinearOptions24 = given) -> Tensor:
            mask = top2_of_4(weight.detach().abs())
            y = linear24(x, weight, None, mask, None, seed if draws else None, options=given)
            return (y * probe).sum()

        name = f"linear24, {given.precision}{', drawn gradient' if draws else ''}"
        yield name, sparse, (draw.coarse(64, 48), draw.coarse(32, 48))


def _document_attentions(draw: _Draw) -> Iterator[Case]:
    for width, heads, dtype in ((64, 4, torch.float32), (64, 2, torch.bfloat16), (48, 4, torch.bfloat16)):
        begins = torch.rand(2, 300, generator=draw.generator) < 0.02
        places = torch.arange(300).where(begins, 0).cummax(1).values
        starts = places.to(torch.int32).to(draw.device)

        def within(
            query: Tensor, key: Tensor, value: Tensor, starts: Tensor = starts, grouped: bool = heads < 4
        ) -> Tensor:
            return document_attention(query, key, value, starts, grouped).float().sin().sum()

        shapes = ((2, 4, 300, width), *[(2, heads, 300, width)] * 2)
        leaves = tuple(draw.coarse(*shape, dtype=dtype) for shape in shapes)
        yield f"document_attention, {heads} of 4 heads of {width}, {dtype}", within, leaves


def without_tokens(device: str) -> Iterator[Case]:
    """Operations on no tokens, in bfloat16, which their kernels take."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).bfloat16().requires_grad_()

    seed, scale = torch.tensor(7, device=device), torch.tensor(1.5, device=device)
    for options in _variants():
        name = f"activation24, {options.method}, {options.backward}, {options.estimator}, {options.precision}"

        def network(x: Tensor, weight_in: Tensor, weight_out: Tensor, options: Options24 = options) -> Tensor:
            return activation24(x, weight_in, None, weight_out, None, scale, seed, options=options)[0].sum()

        yield name, network, (draw(2, 0, 64), draw(128, 64), draw(64, 128))
    for scaling, kept in itertools.product(get_args(Scaling), (False, True)):
        leaves = (draw(2, 0, 48), draw(32, 48), draw(32))
        ready = cast_weight(leaves[1].detach(), scaling) if kept else (None,) * 4

        def linear(
            x: Tensor, weight: Tensor, bias: Tensor, scaling: Scaling = scaling, ready: tuple = ready
        ) -> Tensor:
            return linear_fp8(x, weight, bias, *ready, scaling=scaling).sum()

        yield f"linear_fp8, {scaling}{', weights cast before' if kept else ''}", linear, leaves
    for draws, precision in itertools.product((False, True), get_args(Precision)):
        given = LinearOptions24(both_ways=True, precision=precision)
        row, column = torch.arange(64, device=device), torch.arange(128, device=device)
        mask = (row[:, None] + column) % 4 < 2

        def sparse(
            x: Tensor,
            weight: Tensor,
            draws: bool = draws,
            given: LinearOptions24 = given,
            mask: Tensor = mask,
        ) -> Tensor:
            return linear24(x, weight, None, mask, None, seed if draws else None, options=given).sum()

        yield (
            f"linear24, {precision}{', drawn gradient' if draws else ''}",
            sparse,
            (draw(2, 0, 128), draw(64, 128)),
        )


def why_wrong_without_tokens(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> str:
    """What is wrong with gradients for no tokens, or with the call itself; empty if nothing."""
    torch._dynamo.reset()
    for name, call in (("eager", function), ("compiled", torch.compile(function, fullgraph=True))):
        try:
            found = gradients(call, inputs)
        except Exception as error:  # whatever a kernel or a library says of no rows
            return f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if any(g.shape != t.shape or bool(g.any()) for g, t in zip(found, inputs, strict=True)):
            return f"{name}: gradients are not zeros of the inputs' shapes"
    return ""


def counted(device: str) -> Iterator[tuple[str, Callable[..., Tensor], tuple[Tensor, ...], Tensor]]:
    """Operations whose backward counts what e4m3 makes zero of a gradient, and where it is counted."""

    def coarse(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).mul(4).round().div(4).bfloat16().requires_grad_()

    probe, counter = torch.randn(64, 128, device=device).bfloat16(), torch.zeros(2, device=device)
    probe *= torch.logspace(-8, 0, 128, device=device).bfloat16()
    weights = (coarse(128, 128), coarse(128, 128))
    mask = top2_of_4(weights[0].detach().abs())
    network = Options24(precision="fp8", backward="sparse", token_permutation="none")
    calls: dict[str, Callable[..., Tensor]] = {
        "linear_fp8": lambda x, w, v: linear_fp8(x, w, None, counter=counter) + linear_fp8(x, v, None),
        "linear24": lambda x, w, v: (
            linear24(x, w, None, mask, options=LinearOptions24(precision="fp8"), counter=counter)
            + linear_fp8(x, v, None)
        ),
        "activation24": lambda x, w, v: activation24(x, w, None, v, None, options=network, counter=counter)[
            0
        ],
    }
    for name, call in calls.items():
        yield (
            name,
            lambda *leaves, call=call: (call(*leaves) * probe).sum(),
            (coarse(64, 128), *weights),
            counter,
        )


def why_counted_wrong(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], counter: Tensor) -> str:
    """How eager and compiled counts, or gradients, of two backwards differ; empty if they do not."""
    torch._dynamo.reset()
    found = []
    for call in (function, torch.compile(function, fullgraph=True)):
        counter.zero_()
        both = [gradients(call, inputs) for _ in range(2)]
        found.append((counter.tolist(), both[1]))
    (counts, eager), (others, compiled) = found
    if counts != others or not 0 < counts[1] < counts[0]:
        return f"counts are {counts} eager, {others} compiled"
    worst = max(float((a - b).norm() / a.norm()) for a, b in zip(eager, compiled, strict=True))
    return "" if worst < 5e-3 else f"gradients differ by {worst:.1e}"


def _variants() -> Iterator[Options24]:
    """Every method, estimator, backward and precision, in every combination that there is."""
    for method, estimator, precision in itertools.product(METHODS, ESTIMATORS, get_args(Precision)):
        for backward in ESTIMATORS[estimator].backwards:
            yield Options24(method=method, estimator=estimator, backward=backward, precision=precision)


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of the scalar that `function` returns."""
    return torch.autograd.grad(function(*inputs), inputs)


def main() -> None:
    """Print one line an operation; the largest relative difference over its inputs."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"torch {torch.__version__} on {device}")
    failed = False
    for name, function, inputs in cases(device):
        if not any(word in name for word in sys.argv[1:] or ("",)):
            continue
        torch._dynamo.reset()
        eager = gradients(function, inputs)
        compiled = gradients(torch.compile(function, fullgraph=True), inputs)
        worst = max(float((a - b).norm() / a.norm()) for a, b in zip(eager, compiled, strict=True))
        # tf32 products differ by some 1e-4. A cast to e4m3 makes 6% of the last bit of a float32.
        # bfloat16 rounds probabilities in the one order or the other.
        wrong = not worst < (5e-3 if "fp8" in name else 2e-2 if "attention" in name else 1e-3)
        failed |= wrong
        print(f"{name:64} {worst:.1e} {'WRONG' if wrong else 'ok'}")
    for name, function, inputs in without_tokens(device):
        if any(word in f"no tokens, {name}" for word in sys.argv[1:] or ("",)):
            reason = why_wrong_without_tokens(function, inputs)
            failed |= bool(reason)
            print(f"{f'no tokens, {name}':72} {f'WRONG {reason}' if reason else 'ok'}")
    for name, function, inputs, counter in counted(device):
        if any(word in f"counted, {name}" for word in sys.argv[1:] or ("",)):
            reason = why_counted_wrong(function, inputs, counter)
            failed |= bool(reason)
            print(f"{f'counted, {name}':72} {f'WRONG {reason}' if reason else 'ok'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
