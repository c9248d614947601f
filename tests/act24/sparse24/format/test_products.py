"""Choosing between 2:4 and dense products, and the tuner, with the library played by a few lines."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from act24.sparse24.format import products
from act24.sparse24.format.packed import Packed24, pack, unpack
from act24.sparse24.format.products import (
    DEFAULT_ALGORITHMS,
    Measured,
    Product,
    choose,
    feed_forward_products,
    multiply24,
    tuned,
)

WIDE = feed_forward_products(16384, 4096, 16384, 4096, exact_weight_gradients=False)
DEFAULTS = {kind: DEFAULT_ALGORITHMS[kind] for kind in WIDE}


def test_the_products_of_a_network() -> None:
    """Shapes by hand for T 4096, D 512, F 2048 and an output width of 256."""
    four = feed_forward_products(4096, 512, 2048, 256, exact_weight_gradients=False)
    assert {kind: (*p.sparse_shape, p.width, p.transposed) for kind, p in four.items()} == {
        "y": (4096, 2048, 256, False),
        "grad_x": (4096, 2048, 512, False),
        "grad_weight_in": (2048, 4096, 512, False),
        "grad_weight_out": (2048, 4096, 256, True),
    }
    assert list(feed_forward_products(4096, 512, 2048, 256, exact_weight_gradients=True)) == ["y", "grad_x"]
    narrow = feed_forward_products(4096, 512, 2048, 256, exact_weight_gradients=False, fp8=True)
    assert narrow == four | {"y": four["y"]._replace(kind="y_fp8")}


def test_untuned_shapes_go_by_their_width_and_extent() -> None:
    assert choose(WIDE) == DEFAULTS
    for narrow in ((16384, 256, 4096, 256), (8192, 4096, 16384, 4096), (16384, 4096, 1024, 4096)):
        assert choose(feed_forward_products(*narrow, exact_weight_gradients=False)) == {}


def test_measured_shapes_go_by_the_sum_of_their_times() -> None:
    """One product may lose as long as the four win together."""
    times = {
        "y": (1.0, 3.0),
        "grad_x": (1.0, 3.0),
        "grad_weight_in": (4.0, 3.0),
        "grad_weight_out": (3.0, 3.0),
    }
    table = tuple((WIDE[kind], Measured(7, *pair)) for kind, pair in times.items())
    assert choose(WIDE, table) == dict.fromkeys(WIDE, 7)
    slower = tuple((product, measured._replace(sparse=measured.dense + 0.1)) for product, measured in table)
    assert choose(WIDE, slower) == {}
    assert choose(WIDE, slower, always=True) == dict.fromkeys(WIDE, 7)
    impossible = tuple((product, Measured(0, float("inf"), 1.0)) for product in WIDE.values())
    assert choose(WIDE, impossible, always=True) == {}
    assert choose(WIDE, table[:3]) == DEFAULTS  # not all measured: as if none were


def play_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library with ids 0 to 4, of which 2 is wrong on one of two draws and 3 returns NaN."""

    def multiply(packed: Tensor, dense: Tensor, algorithm: int, transposed: bool) -> Tensor:
        if algorithm > 4:
            raise RuntimeError("invalid value")
        result = unpack(Packed24(packed)).bfloat16() @ dense.bfloat16()
        if algorithm == 3:
            result = result * float("nan")
        if algorithm == 2 and packed.flatten()[0].float() > 0:
            result = result.roll(1, 0)
        return result.T.contiguous() if transposed else result

    monkeypatch.setattr(products, "multiply24", multiply)


@pytest.mark.parametrize("kind", products.KINDS)
def test_the_tuner_takes_the_fastest_of_those_that_are_right(
    monkeypatch: pytest.MonkeyPatch, kind: products.Kind
) -> None:
    play_library(monkeypatch)
    signs = [
        products._operands(Product(kind, 128, 64, 32), torch.Generator().manual_seed(seed))
        .packed.buffer.flatten()[0]
        .float()
        .sign()
        .item()
        for seed in (0, 1)
    ]
    assert 1 in signs, "the wrong algorithm has to show on one of the draws"
    milliseconds = {0: 5.0, 1: 4.0, 2: 1.0, 3: 1.0, 4: 6.0}

    def time(call: Callable[[], Tensor]) -> float:
        call()
        return milliseconds[call.args[2]] if hasattr(call, "args") else 4.5  # type: ignore[attr-defined]

    measured, times = tuned(Product(kind, 128, 64, 32), time, torch.device("cpu"))
    assert measured == Measured(1, 4.0, 4.5)
    assert times == {0: 5.0, 1: 4.0, 4: 6.0}


def test_a_library_without_a_right_algorithm_never_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(*_: object) -> Tensor:
        raise RuntimeError("not supported")

    monkeypatch.setattr(products, "multiply24", multiply)
    measured, times = tuned(Product("y", 64, 64, 32), lambda _: 1.0, torch.device("cpu"))
    assert measured.sparse == float("inf")
    assert times == {}


def test_operands_in_other_layouts_are_refused() -> None:
    """The library would read something else without an error."""
    packed = pack(torch.randn(64, 64).bfloat16()).buffer
    wide = torch.randn(64, 256).bfloat16()
    with pytest.raises(ValueError, match=r"strides \(256, 1\)"):
        multiply24(packed, wide[:, :128], 0, False)
    narrow = pack(torch.randn(64, 64).to(torch.float8_e4m3fn)).buffer
    with pytest.raises(ValueError, match="not in e4m3"):
        multiply24(narrow, torch.randn(64, 64).to(torch.float8_e4m3fn), 0, False)
    with pytest.raises(ValueError, match="cannot multiply"):
        multiply24(packed, torch.randn(32, 8).bfloat16(), 0, False)


def test_a_cpu_says_why_it_has_no_packed_products() -> None:
    assert "CUDA" in products.obstacle(torch.device("cpu"))
    assert "CUDA" in products.fp8_obstacle(torch.device("cpu"))


def test_products_look_at_nothing_that_a_check_has_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking waits for the device, which breaks the capture of a graph: the cache has to have it by then."""
    asked = []
    monkeypatch.setattr(products.cusparselt, "multiplies", lambda _, *key: asked.append(key) or True)
    monkeypatch.setattr(products.cusparselt, "multiply", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(products, "layout_error", lambda *_: 0.0)
    gpu = torch.device("cuda", 0)
    assert products.obstacle.__wrapped__(gpu) == ""
    monkeypatch.setattr(products, "obstacle", lambda _: "")
    assert products.fp8_obstacle.__wrapped__(gpu) == ""
    looked_at = set(asked)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        multiply24(pack(torch.randn(64, 64).to(dtype)).buffer, torch.randn(8, 64).to(dtype).T, 0, False)
    assert set(asked[-2:]) == looked_at


def flipped(buffer: Tensor) -> Tensor:
    return buffer.view(torch.uint8).flip(-1).view(buffer.dtype)


@pytest.mark.parametrize("said", ["", "another 8-bit layout", "does not multiply e4m3"])
def test_the_8_bit_layout_is_told_from_a_product(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    """With a library that has our layout, one that has another, and one without e4m3."""
    own = flipped if said == "another 8-bit layout" else lambda buffer: buffer

    def compress(dense: Tensor) -> Tensor:
        return own(pack(dense, dense.float() != 0).buffer).flatten()

    def multiply(packed: Tensor, dense: Tensor) -> Tensor:
        if said == "does not multiply e4m3":
            raise RuntimeError("not supported")
        return unpack(Packed24(own(packed))).bfloat16() @ dense.bfloat16()

    monkeypatch.setattr(torch.ops.aten, "_cslt_compress", compress)
    monkeypatch.setattr(products, "_library_product", multiply)
    monkeypatch.setattr(products, "obstacle", lambda _: "")
    reason = products.fp8_obstacle.__wrapped__(torch.device("cpu"))
    assert (said in reason) if said else not reason
