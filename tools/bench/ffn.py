"""`act24 bench ffn`: a whole relu² feed-forward network, 2:4 beside dense, both compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.fp8.linear import linear_fp8
from act24.relu2 import relu2
from act24.sparse24.feed_forward.forms import State
from act24.sparse24.feed_forward.masked import masked_activation24
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.packed import packed_activation24
from act24.sparse24.format.products import Table, feed_forward_products
from act24.sparse24.format.tuner import tuned
from act24.tools.bench.rows import Row, graph_milliseconds, milliseconds, needed_gpu

#: T, width, F, and what was promised of each row against the compiled dense network.
SHAPES: tuple[tuple[int, int, int, dict[str, float]], ...] = (
    (
        16384,
        4096,
        16384,
        {
            "inference": 1.20,
            "inference, fp8": 1.9,
            "all sparse": 1.25,
            "all sparse, fp8": 2.0,
            "all sparse, fp8, of dense fp8": 1.18,
            "95/5 split": 1.22,
            "95/5 split, fp8": 1.85,
        },
    ),
    (32768, 2048, 8192, {"all sparse": 1.20, "all sparse, fp8": 1.8}),
)


#: T, width, rank, F of LORO at 350m.
LOW_RANK = (65536, 1024, 256, 4096)


#: What stands on the other side of a row.
_ALONE = "six dense bf16 products alone"

Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def dense_ffn(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """linear → relu² → linear."""
    return F.linear(relu2(F.linear(x, weight_in)), weight_out)


def dense_fp8_ffn(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """The same with all products in e4m3."""
    return linear_fp8(relu2(linear_fp8(x, weight_in, None)), weight_out, None)


def dense_products(x: Tensor, weight_in: Tensor, weight_out: Tensor, grad: Tensor) -> float:
    """Milliseconds of the six dense products of forward and backward alone, which no dense network can
    beat, whatever it fuses."""
    hidden = x @ weight_in.T
    calls = (
        lambda: x @ weight_in.T,
        lambda: hidden @ weight_out.T,
        lambda: grad @ weight_out,
        lambda: hidden @ weight_in,
        lambda: hidden.T @ x,
        lambda: grad.T @ hidden,
    )
    return sum(graph_milliseconds(call) for call in calls)


def block(network: Network) -> Network:
    """A network between RMSNorm and residual, as models have it: putting tokens in order and back is part of
    their kernels there, and takes passes of its own around a network that stands alone."""
    return lambda x, weight_in, weight_out: x + network(F.rms_norm(x, x.shape[-1:]), weight_in, weight_out)


def pytorch_ffn(x: Tensor, weight_in: Tensor, weight_out: Tensor) -> Tensor:
    """The same in 2:4 with what PyTorch ships: the activation compressed by cuSPARSELt, every time."""
    from torch.sparse import to_sparse_semi_structured

    from act24.sparse24.pattern.selection import top2_of_4

    hidden = torch.relu(F.linear(x, weight_in))
    masked = torch.where(top2_of_4(hidden), hidden * hidden, 0)
    return torch.mm(to_sparse_semi_structured(masked), weight_out.T)


def saved_bytes(call: Callable[[], Any], *weights: Tensor) -> int:
    """Bytes that autograd keeps for backward, the input among them, without the storages of `weights`."""
    known = {tensor.untyped_storage().data_ptr() for tensor in weights}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = call()
    del result
    return sum(kept.values())


def bench_ffn(
    shapes: tuple[tuple[int, int, int, dict[str, float]], ...] = SHAPES,
    table: Table = (),
) -> list[Row]:
    """Forward for inference, and forward + backward under each backward, beside the compiled dense network.
    Times go to stderr as they come.

    Args:
        shapes: T, width, F, and the bars by row.
        table: tuned algorithms; empty to tune here.
    """
    device = needed_gpu()
    rows = []
    for tokens, width, features, bars in shapes:
        shape = tokens, width, features, width, False
        products = {p for fp8 in (False, True) for p in feed_forward_products(*shape, fp8).values()}
        found = table or tuple((p, tuned(p, graph_milliseconds, device)[0]) for p in sorted(products))
        rows += _rows(tokens, width, features, bars, found, device)
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    return rows


def _rows(
    tokens: int, width: int, features: int, bars: dict[str, float], found: Table, device: torch.device
) -> list[Row]:
    shape = f"{tokens}×{width}×{features}"
    draw = lambda *size: torch.randn(*size, device=device).bfloat16()  # noqa: E731
    x, grad = draw(tokens, width).requires_grad_(), draw(tokens, width)
    weight_in = (draw(features, width) / width**0.5).requires_grad_()
    weight_out = (draw(width, features) / features**0.5).requires_grad_()
    leaves = (x, weight_in, weight_out)

    def sparse(options: Options24) -> Network:
        return lambda x, w, v: activation24(x, w, None, v, None, None, None, None, options)[0]

    def compiled(network: Network) -> Callable[[], Tensor]:
        call = torch.compile(network, fullgraph=True)
        return lambda: call(*leaves)

    def training(call: Callable[[], Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(call(), leaves, grad)

    dense = compiled(dense_ffn)
    plain = Options24(token_permutation="none", algorithms=found)
    backward = {
        "all sparse": compiled(sparse(plain._replace(backward="sparse"))),
        "all sparse, fp8": compiled(sparse(plain._replace(backward="sparse", precision="fp8"))),
        "95/5 split": compiled(sparse(plain._replace(backward="split_gemm"))),
        "95/5 split, fp8": compiled(sparse(plain._replace(backward="split_gemm", precision="fp8"))),
        "dense weight gradients": compiled(sparse(plain)),
    }
    rows: list[Row] = []

    def add(title: str, ours: float, other: float, bar: str = "", note: str = "compiled dense") -> None:
        row = Row(f"FFN {title}, {shape}", ours, other, "ms", bars.get(bar), note)
        print(f"{row.name}: {ours:.3f} ms beside {other:.3f} of {note}", file=sys.stderr, flush=True)
        rows.append(row)

    alone = dense_products(x.detach(), weight_in.detach(), weight_out.detach(), grad)
    with torch.no_grad():
        other = milliseconds(dense)
        add("inference", milliseconds(backward["all sparse"]), other, "inference")
        add("inference, fp8", milliseconds(backward["all sparse, fp8"]), other, "inference, fp8")
        add("inference, PyTorch's 2:4", milliseconds(lambda: pytorch_ffn(*leaves)), other)
    other = milliseconds(training(dense), 300)
    add("forward + backward, dense", other, alone, note=_ALONE)
    times = {name: milliseconds(training(call), 300) for name, call in backward.items()}
    for name, ours in times.items():
        add(f"forward + backward, {name}", ours, other, name)
        add(f"forward + backward, {name}, beside products", ours, alone, note=_ALONE)
    fp8 = milliseconds(training(compiled(dense_fp8_ffn)), 300)
    add("forward + backward, dense fp8", fp8, other)
    title = "all sparse, fp8, of dense fp8"
    add(f"forward + backward, {title}", times["all sparse, fp8"], fp8, title, "compiled dense fp8")
    other = milliseconds(training(compiled(block(dense_ffn))), 300)
    for name, mode in (("all sparse", "sparse"), ("95/5 split", "split_gemm")):
        for how, order in (("", "none"), (", tokens permuted", "batch")):
            options = plain._replace(backward=mode, token_permutation=order)
            ours = milliseconds(training(compiled(block(sparse(options)))), 300)
            add(f"with norm and residual, forward + backward, {name}{how}", ours, other)
    for mode, bar in (("all sparse", 0.45), ("all sparse, fp8", 0.25)):
        ours = saved_bytes(backward[mode], weight_in, weight_out)
        for name, call, limit in (
            ("dense", lambda: dense_ffn(*leaves), bar),
            ("compiled dense", dense, None),
        ):
            other = saved_bytes(call, weight_in, weight_out)
            rows.append(
                Row(f"FFN bytes saved, {mode}, of {name}, {shape}", ours, other, "bytes", limit, name)
            )
    return rows


def bench_low_rank(shape: tuple[int, int, int, int] = LOW_RANK) -> list[Row]:
    """A low-rank (LORO) network, each linear two factors: the 2:4 activation inside the products around it,
    beside the compiled dense relu².

    Args:
        shape: T, width, rank and F.
    """
    device = needed_gpu()
    tokens, width, rank, features = shape
    draw = lambda *size: (torch.randn(*size, device=device) / size[-1] ** 0.5).bfloat16().requires_grad_()  # noqa: E731
    factors = draw(rank, width), draw(features, rank), draw(rank, features), draw(width, rank)
    x, grad = draw(tokens, width), draw(tokens, width).detach()

    def sparse(options: Options24) -> Callable[..., Tensor]:
        return lambda x, b, c: activation24(x, b, None, c, None, options=options)[0]

    products = feed_forward_products(tokens, rank, features, rank, False).values()
    # With products for free, so that it is packed whatever the products take.
    found = tuple((p, tuned(p, graph_milliseconds, device)[0]._replace(sparse=0.0)) for p in products)
    packed = Options24(token_permutation="none", algorithms=found)

    def with_packed(options: Options24) -> Callable[..., Tensor]:
        return lambda x, b, c: packed_activation24((x, b, None, c, None), State(), options)[0]

    modes: dict[str, tuple[Callable[..., Tensor], float | None, float | None]] = {
        "fast": (sparse(Options24()), 1.30, 0.50),
        "recompute": (sparse(Options24(recompute=True)), None, 0.10),
        "kernels around dense products": (
            lambda x, b, c: masked_activation24((x, b, None, c, None), State(), Options24())[0],
            None,
            None,
        ),
        "packed, exact weight gradients": (with_packed(packed), None, None),
        "packed, all sparse": (with_packed(packed._replace(backward="sparse")), None, None),
        "masked in plain PyTorch": (sparse(Options24(kernels=False)), None, None),
    }

    def network(inner: Callable[..., Tensor]) -> Callable[[], Tensor]:
        a, b, c, d = factors
        return lambda: F.linear(inner(F.linear(x, a), b, c), d)

    def training(inner: Callable[..., Tensor]) -> float:
        compiled = torch.compile(network(inner), fullgraph=True)
        return milliseconds(lambda: torch.autograd.grad(compiled(), (x, *factors), grad), 200)

    name = f"{tokens}×{width}×{rank}×{features}"
    other = training(dense_ffn)
    rows = []
    for mode, (inner, speed, bar) in modes.items():
        title = f"low-rank FFN forward + backward, {mode}, {name}"
        rows.append(Row(title, training(inner), other, "ms", speed, "compiled dense relu²"))
        for title, known, limit in (
            (f"low-rank FFN bytes saved, {mode}, {name}", factors, bar),
            (f"low-rank FFN bytes saved beside the input, {mode}, {name}", (x, *factors), None),
        ):
            ours, kept = (saved_bytes(network(f), *known) for f in (inner, dense_ffn))
            rows.append(Row(title, ours, kept, "bytes", limit, "dense relu²"))
    return rows
