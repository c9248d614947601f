"""activation24 in the forms of the kernels against its plain reference. On a CPU the operators are plain
PyTorch too, so all agrees to the last bit; tested is how they are put together."""

from __future__ import annotations

import itertools

import pytest
import torch
from small_network import FEATURES, FORCED, PACKED, TOKENS, WIDTH, network, outcome
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from act24.sparse24.feed_forward import masked, packed, statistics
from act24.sparse24.feed_forward.forms import network_of
from act24.sparse24.feed_forward.masked import MASKED
from act24.sparse24.feed_forward.narrow import NARROW
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.feed_forward.statistics import STATISTICS, dense_statistics
from act24.sparse24.kernels.shared import self_check

pytestmark = pytest.mark.usefixtures("capable_machine")


@pytest.mark.parametrize("method", ["naive", "soft_dynamic", "mvue"])
@pytest.mark.parametrize("backward", ["dense", "sparse", "split_gemm"])
def test_equals_the_reference(backward: str, method: str) -> None:
    pads = torch.zeros(2, TOKENS // 2, dtype=torch.bool)
    pads[1, 50:] = True
    scale = torch.tensor(1.25) if method == "soft_dynamic" else None
    seed = torch.tensor(77) if method == "mvue" else None
    tensors = network()
    for order, padding in itertools.product(("none", "batch", "sequence"), (None, pads)):
        options = PACKED._replace(method=method, backward=backward, token_permutation=order, statistics=True)
        expected = outcome(tensors, options._replace(kernels=False), scale, seed, padding)
        token_wise = STATISTICS.index("feature_nonzeros")
        statistics = expected.pop(1)[:token_wise]
        tried = [options]
        if (backward, method) == ("dense", "naive"):
            tried.append(options._replace(algorithms=()))  # products so narrow are dense without a table
            assert packed.PACKED.why_not(network_of(tensors), tried[1])
            assert not MASKED.why_not(network_of(tensors), tried[1])
        assert packed.PACKED.why_not(network_of(tensors), options) == ""
        for each in tried:
            ours = outcome(tensors, each, scale, seed, padding)
            torch.testing.assert_close(ours.pop(1)[:token_wise], statistics)
            for a, b in zip(ours, expected, strict=True):
                if a.ndim == 1:  # biases add up their rows in the order of these
                    torch.testing.assert_close(a, b, rtol=2**-7, atol=0)
                else:  # a CPU may add up permuted tokens in another order: one entry in thousands rounds so
                    assert (a != b).sum() <= a.numel() // 4096
                    torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("function", ["relu2", "relu"])
@pytest.mark.parametrize("missing", [(1, 2), (3, 4), (1, 2, 3, 4)], ids=["first", "second", "both"])
def test_where_a_linear_is_missing_kernels_make_the_activation(
    missing: tuple[int, ...], function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of half of a wider row, with a gradient that has no memory of its own: kernels cannot see strides."""
    seen = []
    for name in ("pack_activation", "activation_gradient"):
        operator = getattr(masked, name)
        look = lambda rows, *a, f=operator: seen.append(rows.is_contiguous()) or f(rows, *a)  # noqa: E731
        monkeypatch.setattr(masked, name, look)
    tensors = list(network())
    if 1 in missing:
        wide = torch.randn(2, TOKENS // 2, 2 * FEATURES).bfloat16().requires_grad_()
        tensors[0] = wide.chunk(2, -1)[1]
    for index in missing:
        tensors[index] = None
    options = Options24(function=function, statistics=True)  # type: ignore[arg-type]
    assert MASKED.why_not(network_of(tuple(tensors)), options) == ""
    leaves = [tensor for tensor in tensors if tensor is not None]
    outcomes = []
    for kernels in (True, False):
        y, statistics = activation24(*tensors, options=options._replace(kernels=kernels))
        gradients = torch.autograd.grad(y.sum() + (y * y).sum(), leaves, retain_graph=True)
        outcomes.append([y, statistics, *torch.autograd.grad(y.sum(), leaves), *gradients])
    assert seen == [True] * 3  # forward, and two gradients
    torch.testing.assert_close(outcomes[0][1], outcomes[1][1])
    for a, b in zip(*outcomes, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=0)


def test_an_activation_alone_saves_itself_and_nothing_else() -> None:
    hidden = torch.randn(TOKENS, FEATURES).bfloat16().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y, _ = activation24(hidden, None, None, None, None)
    assert [tensor.data_ptr() for tensor in saved] == [y.data_ptr()]


@pytest.mark.parametrize("order", ["batch", "sequence"])
@pytest.mark.parametrize(("training", "sampled"), [(True, 2048), (False, 2048), (True, TOKENS // 2)])
def test_statistics_along_the_tokens_are_an_estimate_of_the_reference(
    training: bool, sampled: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 64 of 4096 features; features that few neighbouring tokens have drop less in the order."""
    monkeypatch.setattr(statistics, "_SAMPLED_TOKENS", sampled)
    tensors = network(features=4096)
    bursts = torch.randn(2, TOKENS // 8, 1, WIDTH).expand(-1, -1, 4, -1).flatten(1, 2)
    tensors = (bursts.bfloat16().requires_grad_(), *tensors[1:])
    table = tuple((product._replace(features=4096), measured) for product, measured in FORCED)
    options = Options24(backward="sparse", statistics=True, algorithms=table, token_permutation=order)
    pads = torch.zeros(2, TOKENS // 2, dtype=torch.bool)
    pads[1, TOKENS // 4 :] = True
    with torch.set_grad_enabled(training):
        _, ours = activation24(*tensors, pads=pads, options=options)
        _, expected = activation24(*tensors, pads=pads, options=options._replace(kernels=False))
    assert expected[STATISTICS.index("feature_nonzeros")] > 0
    for name in ("feature_nonzeros", "feature_dropped_nonzeros", "feature_energy", "feature_dropped_energy"):
        assert 0.7 < ours[STATISTICS.index(name)] / expected[STATISTICS.index(name)] < 1.4


@pytest.mark.parametrize("function", ["relu2", "relu"])
def test_a_dense_activation_is_counted_by_the_same_rule(
    function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, pads = torch.randn(2, 64, 128).bfloat16(), torch.rand(2, 64) < 0.2
    calls = []
    operator = statistics.count_activation
    monkeypatch.setattr(statistics, "count_activation", lambda *a: calls.append(1) or operator(*a))
    counted = dense_statistics(hidden, pads, function)
    monkeypatch.setattr(self_check, "kernel_obstacle", lambda *_: "not here")
    torch.testing.assert_close(counted, dense_statistics(hidden, pads, function))
    assert calls == [1]


def test_narrow_equals_the_reference() -> None:
    tensors = network(bias=False, exact=True)
    options = Options24(statistics=True)
    assert NARROW.why_not(network_of(tensors), options) == ""
    expected = outcome(tensors, options._replace(kernels=False))
    for recompute in (False, True):
        ours = outcome(tensors, options._replace(recompute=recompute))
        for a, b in zip(ours[:1] + ours[2:], expected[:1] + expected[2:], strict=True):
            assert torch.equal(a, b)
        assert ours[1][0] == expected[1][0]
        assert 0.5 < ours[1][5] / expected[1][5] < 2  # energy, from every 16th token


@pytest.mark.parametrize(
    ("options", "share"),
    [
        (PACKED._replace(backward="sparse"), 1.125 / 4),
        (PACKED._replace(backward="sparse", token_permutation="none"), 1.125 / 4),
        (PACKED._replace(backward="sparse", method="soft_dynamic"), 2.125 / 4),
        (Options24(function="relu"), 2 / 4),
        (Options24(), 1.125 / 4),
        (Options24(recompute=True), 0.0),
    ],
    ids=[
        "packed",
        "packed in order",
        "packed with slope",
        "around dense products",
        "narrow",
        "narrow, made again",
    ],
)
def test_what_is_saved_beside_weights(options: Options24, share: float) -> None:
    """x once, as it is or in the order of the groups with that order and its inverse, 16 bytes a token; and a
    share of the 4 bytes a feature that relu and its square keep in a dense network."""
    tensors = network(bias=False)
    x, *weights = tensors
    known = {t.untyped_storage().data_ptr() for t in weights if t is not None}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        activation24(*tensors, options=options)
    permuted = options.backward != "dense" and options.token_permutation != "none"
    narrow = x.untyped_storage().nbytes() + (16 * TOKENS if permuted else 0)
    assert sum(kept.values()) == narrow + 4 * TOKENS * FEATURES * share


@pytest.mark.parametrize(
    "options", [PACKED._replace(backward="sparse"), Options24(function="relu")], ids=["packed", "masked"]
)
def test_per_sample_gradients_run_on_the_reference(options: Options24) -> None:
    """vmap over grad: the operators have no rule for it, the reference has."""
    _, weight_in, _, weight_out, _ = network(bias=False)
    rows = torch.randn(3, TOKENS, WIDTH).bfloat16()

    def loss(weight: Tensor, x: Tensor) -> Tensor:
        return activation24(x, weight, None, weight_out, None, None, None, None, options)[0].float().sum()

    ours = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weight_in.detach(), rows)
    for gradient, sample in zip(ours, rows, strict=True):
        expected = torch.func.grad(loss)(weight_in.detach(), sample)
        torch.testing.assert_close(gradient, expected, rtol=2e-2, atol=2e-2)


def test_recomputation_draws_the_same() -> None:
    """Activation checkpointing runs forward twice; mvue's draw is a function of its seed."""
    tensors = network()
    options = PACKED._replace(method="mvue", backward="sparse")
    run = lambda *t: activation24(*t, seed=torch.tensor(5), options=options)[0]  # noqa: E731
    leaves = [tensor for tensor in tensors if tensor is not None]
    plain = torch.autograd.grad(run(*tensors).sum(), leaves)
    again = torch.autograd.grad(checkpoint(run, *tensors, use_reentrant=False).sum(), leaves)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


def test_inference_saves_and_counts_nothing() -> None:
    tensors = network(bias=False)
    with torch.no_grad():
        y, statistics = activation24(*tensors, options=PACKED._replace(backward="split_gemm"))
        expected, _ = activation24(*tensors, options=Options24(kernels=False))
    assert torch.equal(y, expected)
    assert not statistics.any()
