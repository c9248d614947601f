"""The products of a network, and the choice between 2:4 and dense."""

from __future__ import annotations

from act24.sparse24.format.products import (
    DEFAULT_ALGORITHMS,
    Measured,
    choose,
    feed_forward_products,
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
    assert {kind: p._replace(kind=kind) for kind, p in narrow.items()} == four
    assert [p.kind for p in narrow.values()] == [f"{kind}_fp8" for kind in four]
    for kind, p in narrow.items():
        assert (p.sparse_shape, p.transposed) == (four[kind].sparse_shape, four[kind].transposed)
        assert p.dense_transposed


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


def test_for_inference_a_product_tuned_for_fewer_tokens_answers() -> None:
    y = feed_forward_products(4096, 512, 2048, 256, exact_weight_gradients=True)["y"]
    table = tuple(
        (y._replace(tokens=tokens), Measured(tokens // 1024, sparse, 2.0))
        for tokens, sparse in ((1024, 3.0), (2048, 1.0), (8192, 1.5))
    )
    found = {
        tokens: choose({"y": y._replace(tokens=tokens)}, table, fewer_tokens=True)
        for tokens in (512, 1024, 2047, 2048, 4096, 8192, 65536)
    }
    assert found == {
        512: {}, 1024: {}, 2047: {}, 2048: {"y": 2}, 4096: {"y": 2}, 8192: {"y": 8}, 65536: {"y": 8}
    }  # fmt: skip
    assert choose({"y": y}, table) == {}, "in training every number of tokens is tuned"
    other = y._replace(features=4096)
    assert choose({"y": other}, table, fewer_tokens=True) == {}
