"""The drop-in linear in a loop of one's own: training, resuming, moving between devices and dtypes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from act24.options import OptionError
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.methods import METHODS, weight_mask, weight_scale
from act24.sparse24.weight.module import SparseLinear24


def train(layer: SparseLinear24, steps: int, decay: float | None = None) -> list[float]:
    """A regression on random data; the flip rates."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(layer.out_features, layer.in_features, generator=generator)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.02, weight_decay=0.0)
    rates = []
    for _ in range(steps):
        for _ in range(2):  # accumulation
            x = torch.randn(32, layer.in_features, generator=generator)
            F.mse_loss(layer(x), x @ target.T).backward()
        layer.decay_gradient_(decay)
        optimizer.step()
        optimizer.zero_grad()
        rates.append(float(layer.update_()))
    return rates


@pytest.mark.parametrize("method", METHODS)
def test_sparse_linear_in_a_loop(method: Any) -> None:
    kept = METHODS[method].mask_every is not None
    decaying = METHODS[method].decay > 0
    layer = SparseLinear24(16, 8, method=method, mask_every=4 if kept else None, seed=5)
    x = torch.randn(50, 16)
    start = layer.mask.clone()
    rates = train(layer, 12, decay=1e-3 if decaying else None)
    if not kept:
        assert sum(rate > 0 for rate in rates) > 3, "masks are those of every update, as published"
    if METHODS[method].soft:
        assert torch.allclose(layer(x), F.linear(x, layer.scale * soft_threshold24(layer.weight), layer.bias))
    else:
        assert not kept or [i for i, rate in enumerate(rates) if rate > 0] in (
            [3, 7, 11],
            [3, 7],
            [3, 11],
            [7, 11],
            [3],
        )
        assert not torch.equal(layer.mask, start)
        assert torch.allclose(layer(x), F.linear(x, layer.weight * layer.mask, layer.bias))
    assert torch.equal(layer.mask, weight_mask(layer.weight, method))
    layer.sparse = False
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert float(layer.update_()) == 0.0


def test_sparse_linear_resumes_exactly() -> None:
    straight = SparseLinear24(16, 8, mask_every=3, seed=1)
    with torch.no_grad():
        twin = SparseLinear24(16, 8, mask_every=3)
        twin.load_state_dict(straight.state_dict())
    train(straight, 5)
    train(twin, 5)
    fresh = SparseLinear24(16, 8, mask_every=3)
    fresh.load_state_dict(twin.state_dict())
    assert train(fresh, 4) == train(straight, 4)
    assert torch.equal(fresh.weight, straight.weight)


def test_sparse_linear_takes_over_a_linear() -> None:
    linear = nn.Linear(8, 12)
    layer = SparseLinear24.from_linear(linear, method="ste", weight_gradient="dense")
    assert layer.weight is linear.weight
    assert torch.equal(layer.mask, weight_mask(linear.weight, "ste"))
    with pytest.raises(ValueError, match="multiple"):
        SparseLinear24(6, 8)


def test_the_documented_loops_run() -> None:
    text = (Path(__file__).parents[4] / "docs" / "own-training-loop.md").read_text(encoding="utf-8")
    weights, passes, *_ = re.findall(r"```python\n(.*?)```", text, re.S)  # others: tests/tools/integrations
    names: dict[str, Any] = {}
    exec(weights, names)
    assert not any(layer.sparse for layer in names["sparse_layers"])
    names = {}
    exec(passes, names)
    scales = [b for n, b in names["model"].named_buffers() if n.endswith("activation24_scale")]
    assert all(1 < float(scale) < 2 for scale in scales)
    assert len(scales) == 4


def test_what_it_does_in_training_is_in_its_state(tmp_path: Path) -> None:
    """Through safetensors, which takes tensors alone."""
    layer = SparseLinear24(16, 8, mask_every=3, seed=1)
    train(layer, 5)
    layer.sparse = False
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    other = SparseLinear24(16, 8, mask_every=7)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert (other.sparse, other.mask_every) == (False, 3)
    other.sparse = layer.sparse = True
    assert train(other, 4) == train(layer, 4)
    assert torch.equal(other.weight, layer.weight)


def test_nothing_is_drawn_in_evaluation() -> None:
    layer = SparseLinear24(16, 8, seed=5)
    layer.eval()
    layer(torch.randn(4, 16)).sum().backward()
    assert int(layer.seed) == 5
    layer.train()
    with torch.no_grad():
        layer(torch.randn(4, 16))
    assert int(layer.seed) == 5
    layer(torch.randn(4, 16))
    assert int(layer.seed) == 6


def test_the_scale_stays_float32() -> None:
    layer = SparseLinear24(64, 64, method="soft_threshold")
    before = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.scale, before)
    assert float(before) != float(before.bfloat16()), "else there is nothing to lose"
    layer.to(torch.float64)
    assert torch.equal(layer.scale, before)


@pytest.mark.parametrize("start", ["reset", "own", "load"])
@pytest.mark.parametrize("method", ["transposable", "soft_threshold"])
def test_it_starts_right_after_meta(method: Any, start: str) -> None:
    with torch.device("meta"):
        layer = SparseLinear24(64, 32, method=method, seed=9)
    layer.to_empty(device="cpu")
    if start == "reset":
        layer.reset_parameters()
    elif start == "own":  # as models do that initialise by hand
        with torch.no_grad():
            layer.weight.normal_()
            layer.bias.zero_()
    else:
        layer.load_state_dict(SparseLinear24(64, 32, method=method, seed=4).state_dict())
    y = layer(torch.randn(8, 64))
    assert bool(y.isfinite().all())
    assert torch.equal(layer.mask, weight_mask(layer.weight, method))
    assert float(layer.scale) == float(weight_scale(layer.weight))
    assert int(layer.seed) == (5 if start == "load" else 10)


def test_one_token_without_a_batch() -> None:
    layer = SparseLinear24(16, 8)
    x = torch.randn(16, requires_grad=True)
    y = layer(x)
    assert y.shape == (8,)
    y.sum().backward()
    assert torch.allclose(y, F.linear(x, layer.weight * layer.mask, layer.bias))
    assert layer.weight.grad is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "topk"}, "method has no 'topk'.*transposable"),
        ({"weight_gradient": "MVUE"}, "weight_gradient has no 'MVUE'.*mvue"),
        ({"mask_every": 0}, "mask_every has to be 1 or more"),
        ({"method": "ste", "mask_every": 40}, "every update"),
        ({"seed": 1.5}, "seed has to be an integer, got 1.5"),
    ],
)
def test_options_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        SparseLinear24(8, 8, **options)


def test_a_decay_where_there_is_none() -> None:
    layer = SparseLinear24(8, 8, method="soft_threshold")
    layer(torch.randn(4, 8)).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    layer.decay_gradient_()
    assert torch.equal(layer.weight.grad, before)
    with pytest.raises(OptionError, match=r"no masked decay; transposable, sr_ste have"):
        layer.decay_gradient_(1e-4)
    with pytest.raises(OptionError, match="0 or more"):
        SparseLinear24(8, 8).decay_gradient_(-1e-4)
