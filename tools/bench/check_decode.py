"""`python -m act24.tools.bench.check_decode`, by hand on a GPU: the kernels of decoding against their
references, generation in CUDA graphs against generation step by step, and the time of each kernel beside
cuBLAS with weights that no cache holds.

Prints what failed, and leaves with status 1 then.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from act24.inference.decoder import plan_text
from act24.inference.generator import Generator
from act24.inference.layer import DENSE, Choice
from act24.inference.sampling import Sampling
from act24.initialise import build_llama
from act24.llama import LlamaConfig
from act24.passes import Relu2FFN, apply_
from act24.sparse24.feed_forward.forms import network_of
from act24.sparse24.feed_forward.operation import activation24, form_of
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.format.products import feed_forward_products
from act24.sparse24.kernels.dense_decode import dense_decode
from act24.sparse24.kernels.packed_decode import Tiling, launch, packed_for_decode, tilings, unpacked
from act24.sparse24.kernels.skipping_product import skipping_product
from act24.sparse24.pattern.selection import top2_of_4
from act24.tools.bench.decode import copies_of, microseconds
from act24.tools.bench.rows import needed_gpu

#: Dense weights, [outputs, inputs], that are timed with one token.
DENSE_WEIGHTS = ((4096, 4096), (12288, 4096), (16512, 4096), (4096, 16512), (32000, 4096), (8192, 2048))

#: 2:4 weights, [outputs, inputs], that are timed.
PACKED = ((4096, 4096), (16512, 4096), (4096, 16512), (8192, 2048))


def main() -> None:
    device = needed_gpu()
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(device), torch.__version__, flush=True)
    failed = [name for name, found in _checks(device) if not found]
    for line in _times(device):
        print(line, flush=True)
    for name in failed:
        print(f"FAILED {name}")
    sys.exit(bool(failed))


def _checks(device: torch.device) -> Iterator[tuple[str, bool]]:
    for tokens in (1, 2, 3, 8, 16):
        for features, width in ((16512, 4096), (8192, 2048), (3072, 768), (1000, 300)):
            hidden = _active(tokens, features, 0.1, device)
            weight = torch.randn(features, width, device=device).bfloat16()
            y = skipping_product(hidden, weight, "relu2").sum(0)
            exact = hidden.relu().square().double() @ weight.double()
            yield f"skipping {tokens} {features} {width}", _close(y, exact, 1e-5)
    for outputs, inputs in (*DENSE_WEIGHTS, (768, 3072), (37, 300)):
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        x = torch.randn(1, inputs, device=device).bfloat16()
        yield (
            f"dense {outputs}×{inputs}",
            _close(dense_decode(x, weight), x.double() @ weight.double().T, 1e-5),
        )
    for outputs, inputs in (*PACKED, (768, 3072), (37, 640)):
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        weight = torch.where(top2_of_4(weight.abs()), weight, 0)
        packed = packed_for_decode(weight)
        yield f"unpacked {outputs} {inputs}", torch.equal(unpacked(*packed), weight)
        for tokens in (1, 2, 3, 8, 16):
            x = torch.randn(tokens, inputs, device=device).bfloat16()
            exact = x.double() @ weight.double().T
            for tiling in tilings(tokens, outputs, inputs):
                y, again = (launch(x, *packed, tiling).sum(0) for _ in range(2))
                found = _close(y, exact, 1e-5) and torch.equal(y, again)
                yield f"packed {outputs}×{inputs}, {tokens} tokens, {tiling}", found
    yield from _prompts(device)
    yield from _generation(device)


def _prompts(device: torch.device) -> Iterator[tuple[str, bool]]:
    """2:4 activations on tokens that are no multiple of a tile: each form beside plain PyTorch."""
    key = feed_forward_products(128, 768, 3072, 768, True)["y"]
    table: Any = (((*key,), (1, 1.0, 2.0)),)  # as if y were tuned to be faster from 128 tokens on
    up, down = (torch.randn(s, device=device).bfloat16() / 30 for s in ((3072, 768), (768, 3072)))
    for tokens in (1, 65, 130, 2047):
        x = torch.randn(2, tokens, 768, device=device).bfloat16()
        for options in (Options24(), Options24(algorithms=table), Options24(precision="fp8")):
            arguments = (x, up, None, down, None)
            network = network_of(arguments, inference=True)
            form = form_of(network, options)
            y, plain = (
                activation24(*arguments, options=options._replace(kernels=k))[0] for k in (True, False)
            )
            told = f"{options.precision}, {2 * tokens} tokens: {form.name if form else 'plain PyTorch'}"
            print(f"prompt, {told}", flush=True)
            yield f"prompt, {told}", _close(y, plain.double(), 5e-2 if options.precision == "fp8" else 4e-3)


def _generation(device: torch.device) -> Iterator[tuple[str, bool]]:
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
    config = LlamaConfig(
        256, 256, 512, 3, 8, num_key_value_heads=4, initializer_range=0.08, max_position_embeddings=4096
    )
    for sampling in (Sampling(0), Sampling(0.9, 40, 0.9)):
        for dtype in (torch.float32, torch.bfloat16):
            model = build_llama(config, 0, device)
            apply_(model, [Relu2FFN()])
            model.to(dtype)
            expected = Generator(model, compiled=False).generate_ids(prompts, 60, sampling)
            graphed = Generator(model, choice=DENSE)
            same = _share(graphed.generate_ids(prompts, 60, sampling), expected)
            again = _share(graphed.generate_ids(prompts, 60, sampling), expected)
            yield (
                f"graph {dtype} {sampling} {same:.2f} {again:.2f}",
                same == again and (same == 1 or dtype is torch.bfloat16),
            )
            print(f"graph {dtype} temperature {sampling.temperature}: {same:.2f} of the tokens", flush=True)
    expected = Generator(model, compiled=False).generate_ids(prompts, 60, Sampling(0))
    for choice in (Choice(fused=True), Choice(skipping=True), Choice(skipping=True, fused=True), None):
        generator = Generator(model, choice=choice)
        share = _share(generator.generate_ids(prompts, 60, Sampling(0)), expected)
        plan = plan_text(generator.decoder.plans[3])
        times = {
            plan_text(tried): f"{s * 1e6:.0f} µs" for tried, s in generator.decoder.times.get(3, {}).items()
        }
        print(f"{choice or 'measured'} in bfloat16: {plan}: {share:.2f} of the tokens {times}", flush=True)
    alone = Generator(model, compiled=False).generate_ids(prompts[:1], 60, Sampling(0))
    for choice in (Choice(streamed=True), None):
        generator = Generator(model, choice=choice)
        share = _share(generator.generate_ids(prompts[:1], 60, Sampling(0)), alone)
        plan = plan_text(generator.decoder.plans[1])
        print(f"one row, {choice or 'measured'} in bfloat16: {plan}: {share:.2f} of the tokens", flush=True)
    # In float32 rounding leaves every token what it is, whatever was measured and laid out before.
    model.float()
    expected = Generator(model, compiled=False).generate_ids(prompts, 60, Sampling(0))
    for choice in (Choice(fused=True), None):
        found = Generator(model, choice=choice).generate_ids(prompts, 60, Sampling(0))
        yield f"float32, {choice or 'measured'}", found == expected


def _share(rows: list[list[int]], others: list[list[int]]) -> float:
    same = [a == b for row, other in zip(rows, others, strict=True) for a, b in zip(row, other, strict=True)]
    return sum(same) / len(same)


def _active(tokens: int, features: int, density: float, device: torch.device) -> Tensor:
    """A pre-activation of which that share is positive."""
    hidden = torch.randn(tokens, features, device=device).abs().bfloat16() + 0.01
    return torch.where(torch.rand_like(hidden) < density, hidden, -hidden)


def _close(found: Tensor, exact: Tensor, tolerance: float) -> bool:
    error = float((found.double() - exact).norm() / exact.norm())
    if error >= tolerance:
        print(f"relative error {error:.2e}", flush=True)
    return error < tolerance


def _skip(hidden: Tensor, weight: Tensor) -> Tensor:
    return skipping_product(hidden, weight, "relu2")


def _times(device: torch.device) -> Iterator[str]:
    for outputs, inputs in DENSE_WEIGHTS:
        weights = copies_of(torch.randn(outputs, inputs, device=device).bfloat16())
        x = torch.randn(1, inputs, device=device).bfloat16()
        dense, ours = (microseconds(of, [(x, w) for w in weights]) for of in (F.linear, dense_decode))
        rates = [outputs * inputs * 2 / taken / 1e6 for taken in (dense, ours)]
        told = " and ".join(f"{rate:.2f}" for rate in rates)
        yield f"dense {outputs}×{inputs}, one token: cuBLAS {dense:.1f} µs, ours {ours:.1f}: {told} TB/s"
    for features, width in ((16512, 4096), (8192, 2048)):
        weight = torch.randn(features, width, device=device).bfloat16()
        plain, rows = copies_of(weight.T.contiguous()), copies_of(weight)
        for tokens in (1, 2, 4, 8, 16):
            x = _active(tokens, features, 0.1, device).relu()
            dense = microseconds(F.linear, [(x, w) for w in plain])
            other = microseconds(torch.mm, [(x, w) for w in rows])
            told = f"F {features} D {width} tokens {tokens}: dense {dense:.1f} µs, by feature {other:.1f}"
            for density in (0.05, 0.1, 0.2):
                hidden = _active(tokens, features, density, device)
                found = microseconds(_skip, [(hidden, w) for w in rows])
                told += f"; skipping at {density}: {found:.1f} ({dense / found:.2f})"
            yield told
    for outputs, inputs in PACKED:
        weight = torch.randn(outputs, inputs, device=device).bfloat16()
        plain = copies_of(torch.where(top2_of_4(weight.abs()), weight, 0))
        packed = [packed_for_decode(w) for w in plain]
        for tokens in (1, 2, 4, 8, 16):
            x = torch.randn(tokens, inputs, device=device).bfloat16()
            dense = microseconds(F.linear, [(x, w) for w in plain])
            found = {
                tiling: microseconds(launch, [(x, *parts, tiling) for parts in packed])
                for tiling in tilings(tokens, outputs, inputs)
            }
            taken, best = next(iter(found)), min(found, key=found.__getitem__)
            ours = found[taken]
            yield (
                f"2:4 {outputs}×{inputs}, {tokens} tokens: dense {dense:.1f} µs, packed {ours:.1f} "
                f"({dense / ours:.2f}), taken {_told(taken)}; fastest {_told(best)} {found[best]:.1f} "
                f"({dense / found[best]:.2f}); "
                + ", ".join(f"{_told(tiling)} {time:.1f}" for tiling, time in found.items())
            )


def _told(tiling: Tiling) -> str:
    return f"{tiling.rows}×{tiling.groups}/{tiling.splits} w{tiling.warps} s{tiling.stages}"


if __name__ == "__main__":
    main()
