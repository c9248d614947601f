"""Where the time of a 2:4 feed-forward network goes, kernel by kernel, and what a product costs the CPU.

    python -m act24.tools.experiments.ffn_profile

Forward and backward at 16384×4096×16384 between norm and residual, all-sparse and split, tokens in order and
permuted; then 100 products of 130m launched in a row, by PyTorch's call and with plans that are kept, on the
CPU's clock.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.format import cusparselt
from act24.sparse24.format.packed import random_packed
from act24.sparse24.format.products import feed_forward_products
from act24.sparse24.format.tuner import tuned
from act24.tools.bench.rows import graph_milliseconds, needed_gpu

_TOKENS, _WIDTH, _FEATURES = 16384, 4096, 16384


def profile_network(device: torch.device) -> None:
    """Print the kernels of ten forward and backward passes, longest first."""
    from torch.profiler import ProfilerActivity, profile

    draw = lambda *shape: torch.randn(shape, device=device).bfloat16()  # noqa: E731
    x, grad = draw(_TOKENS, _WIDTH).requires_grad_(), draw(_TOKENS, _WIDTH)
    weight_in = (draw(_FEATURES, _WIDTH) / _WIDTH**0.5).requires_grad_()
    weight_out = (draw(_WIDTH, _FEATURES) / _FEATURES**0.5).requires_grad_()
    leaves = (x, weight_in, weight_out)
    products = feed_forward_products(_TOKENS, _WIDTH, _FEATURES, _WIDTH, False).values()
    found = tuple((product, tuned(product, graph_milliseconds, device)[0]) for product in products)
    for order in ("none", "batch"):
        for backward in ("sparse", "split_gemm"):
            options = Options24(backward=backward, token_permutation=order, algorithms=found)

            def network(x: Tensor, w: Tensor, v: Tensor, options: Options24 = options) -> Tensor:
                return x + activation24(F.rms_norm(x, x.shape[-1:]), w, None, v, None, options=options)[0]

            compiled = torch.compile(network, fullgraph=True)
            for _ in range(5):
                torch.autograd.grad(compiled(*leaves), leaves, grad)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                for _ in range(10):
                    torch.autograd.grad(compiled(*leaves), leaves, grad)
                torch.cuda.synchronize()
            print(f"{backward}, permutation {order}")
            print(profiled.key_averages().table(sort_by="cuda_time_total", row_limit=20))


def time_launches(device: torch.device, calls: int = 100) -> None:
    """Print what one product costs the CPU, either way."""
    tokens, width, features = 32768, 768, 3072
    generator = torch.Generator(device).manual_seed(0)
    packed = random_packed(tokens, features, torch.bfloat16, generator).buffer
    weight = torch.randn(width, features, generator=generator, device=device).bfloat16()
    sides = {
        "PyTorch's call": lambda: torch.ops.aten._cslt_sparse_mm(packed, weight.T),
        "kept plans": lambda: cusparselt.multiply(packed, tokens, weight.T, 0, False),
    }
    for name, call in sides.items():
        call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        launched = 1e3 * (time.perf_counter() - began) / calls
        torch.cuda.synchronize()
        finished = 1e3 * (time.perf_counter() - began) / calls
        print(f"{name}: {launched:.3f} ms to launch, {finished:.3f} in all")


def main() -> None:
    """Profile, then time."""
    device = needed_gpu()
    profile_network(device)
    time_launches(device)


if __name__ == "__main__":
    main()
