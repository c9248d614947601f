"""What each pass takes, whatever other passes stand beside it, in any order, in force or left out."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rewritten_llama import IDS, llama, loss_of, rewritten, train
from slow import slow_but
from torch import Tensor, nn

from act24.passes import Activation24, Cola, Fp8, LowRank, OperationalPass, PassError, Relu2FFN, Weight24
from act24.passes.activation24 import SCALE as BETA
from act24.passes.graph.region import buffers_of
from act24.passes.served import served_weights
from act24.passes.state import refuse_exact_steps
from act24.passes.weight24 import MASK, SCALE
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.methods import weight_mask, weight_scale

pytestmark = pytest.mark.filterwarnings("ignore::act24.passes.PartialWarning")

ACTIVATION = Activation24(method="soft_dynamic", dynamic_steps=2)
WEIGHT = Weight24(targets=("*.q_proj", "*.up_proj"))
ORDERS = [
    order
    for length in (2, 3)
    for order in itertools.permutations((ACTIVATION, WEIGHT, Fp8()), length)
    if not any(isinstance(p, Fp8) for p in order[:-1])  # fp8 takes what others leave
]


#: One of each two, and one of all three.
QUICK = (ORDERS[0], ORDERS[1], ORDERS[3], ORDERS[-1])


@pytest.mark.parametrize("until", slow_but((2,), [None, 2]))
@pytest.mark.parametrize(
    "order",
    [order if order in QUICK else pytest.param(order, marks=pytest.mark.slow) for order in ORDERS],
    ids=lambda order: "-".join(p.name for p in order),
)
def test_every_order_trains_is_evaluated_and_each_pass_can_be_left_out(
    order: tuple[OperationalPass, ...], until: int | None
) -> None:
    first, *others = order
    model, pipeline = rewritten(Relu2FFN(), dataclasses.replace(first, until_step=until), *others)
    for step in range(3):
        train(model, pipeline, range(step, step + 1))
        for name in ("", *(p.name for p in order)):
            without = (name,) if name else ()
            with pipeline.evaluation(without, step=step + 1, forward=lambda: model(IDS)), torch.no_grad():
                assert model(IDS).isfinite().all()
            pipeline.begin_update_(step + 1, IDS, without=without)
            loss_of(model).backward()
            pipeline.lower_(step + 1, without=without)
            assert model.eval()(IDS).isfinite().all()
            model.train()


class Network(nn.Module):
    """down(function(relu²(up(x))))."""

    def __init__(self, up: Tensor, down: Tensor, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = up, down, function

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.function(F.relu(F.linear(x, self.up)).square()), self.down)


def by_hand(
    weights: dict[str, Tensor], sparse: tuple[str, ...], functions: list[Callable[[Tensor], Tensor]]
) -> Tensor:
    """Logits of a plain relu² LLaMA: weights of some names 2:4 by row, activations through functions."""
    made = {
        name: weight * weight_mask(weight, "ste") if any(part in name for part in sparse) else weight
        for name, weight in weights.items()
    }
    plain = llama()
    for index, layer in enumerate(plain.model.layers):
        up, down = (made[f"model.layers.{index}.mlp.{name}_proj.weight"] for name in ("up", "down"))
        layer.mlp = Network(up, down, functions[index])
    plain.load_state_dict({name: made[name] for name in plain.state_dict()})
    return plain(IDS)


@torch.no_grad()
def test_activations_that_come_first_keep_their_linears_from_weights_also_where_they_are_left_out() -> None:
    model, pipeline = rewritten(Relu2FFN(), ACTIVATION, Weight24(method="ste"))
    with torch.enable_grad():
        train(model, pipeline, range(3))
    weights = {n: p.clone() for n, p in model.named_parameters()}
    betas = list(buffers_of(pipeline.regions, BETA).values())
    assert all(1 < beta < 2 for beta in betas)
    functions: list[Any] = [lambda h, beta=beta: beta * soft_threshold24(h) for beta in betas]
    attention, everything = ("self_attn",), ("self_attn", "mlp")
    model.eval()
    torch.testing.assert_close(model(IDS), by_hand(weights, attention, functions), atol=1e-6, rtol=1e-5)
    dense: list[Any] = [lambda h: h] * 2
    with pipeline.evaluation(("activation24",)):
        torch.testing.assert_close(model(IDS), by_hand(weights, attention, dense), atol=1e-6, rtol=1e-5)
    with pipeline.evaluation(("activation24", "weight24")):
        torch.testing.assert_close(model(IDS), by_hand(weights, (), dense), atol=1e-6, rtol=1e-5)
    served = served_weights(pipeline)
    for name in weights:
        left = float((served[name] == 0).float().mean())
        assert (left == 0.5) == ("self_attn" in name), name
    other, pipeline = rewritten(Relu2FFN(), Weight24(method="ste"), ACTIVATION)
    pipeline.begin_update_(0, IDS)
    other.load_state_dict(weights, strict=False)
    for name, buffer in buffers_of(pipeline.regions, BETA).items():
        buffer.copy_(dict(zip(buffers_of(pipeline.regions, BETA), betas, strict=True))[name])
    expected = by_hand(weights, everything, functions)
    torch.testing.assert_close(other.eval()(IDS), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ["ste", "soft_threshold"])
def test_weights_that_another_pass_leaves_begin_there(method: str) -> None:
    """Where activations end, weight24 takes the linears that they had: with masks and scales of now."""
    passes = (Relu2FFN(), Activation24(until_step=3), Weight24(method=method, from_step=1))
    model, pipeline = rewritten(*passes)
    train(model, pipeline, range(3))
    name = "model.layers.1.mlp.up_proj.weight"
    attention = "model.layers.1.self_attn.q_proj.weight"
    weight = model.get_parameter(name).detach()
    if method == "soft_threshold":
        kept = model.get_buffer(attention + SCALE).clone()
        fresh = weight_scale(weight)
        assert model.get_buffer(name + SCALE) != fresh
        with pipeline.evaluation(step=3):
            assert model.get_buffer(name + SCALE) == fresh
            assert model.get_buffer(attention + SCALE) == kept
        pipeline.begin_update_(3, IDS)
        assert model.get_buffer(name + SCALE) == fresh
        assert model.get_buffer(attention + SCALE) == kept
        train(model, pipeline, range(3, 5))
        assert model.get_buffer(name + SCALE) == fresh, "fixed from there on"
        with pipeline.evaluation(step=5):
            assert model.get_buffer(name + SCALE) == fresh
    else:
        pipeline.begin_update_(3, IDS)
        assert torch.equal(model.get_buffer(name + MASK), weight_mask(weight, method))


def test_a_mask_that_is_kept_is_made_where_its_weight_is_taken() -> None:
    passes = (Relu2FFN(), Activation24(until_step=3), Weight24(method="transposable", mask_every=40))
    model, pipeline = rewritten(*passes)
    train(model, pipeline, range(3))
    name = "model.layers.1.mlp.up_proj.weight"
    attention = "model.layers.1.self_attn.q_proj.weight"
    kept = model.get_buffer(attention + MASK).clone()
    pipeline.begin_update_(3, IDS)
    expected = weight_mask(model.get_parameter(name), "transposable")
    assert torch.equal(model.get_buffer(name + MASK), expected)
    assert torch.equal(model.get_buffer(attention + MASK), kept)


def test_scales_of_two_passes_are_each_measured_by_their_own() -> None:
    """A fixed scale stays, also where the pass behind it, which would take the site too, measures its own;
    and where the first one ends, the second measures there."""
    fixed = Activation24(method="soft_threshold_weights", targets=("*.layers.0.*",), until_step=5)
    dynamic = Activation24(method="soft_dynamic", dynamic_steps=2)
    model, pipeline = rewritten(Relu2FFN(), fixed, dynamic)

    def betas() -> list[float]:
        return [float(beta) for beta in buffers_of(pipeline.regions, BETA).values()]

    seen = []
    for step in range(6):
        train(model, pipeline, range(step, step + 1))
        seen.append(betas())
    of_weights = seen[0][0]
    assert of_weights == pytest.approx(1.48, abs=0.05), "Gaussian weights"
    assert [at[0] == of_weights for at in seen] == [True] * 5 + [False]
    assert len({at[1] for at in seen}) == 3
    assert seen[4][1] == seen[5][1], "measured when its own time comes"


def test_exact_steps_know_which_factors_weights_take() -> None:
    """Those that activations have taken are none of them."""
    factors = LowRank(scope="mlp", attn_rank=8, mlp_rank=8)
    passes = (Relu2FFN(), factors, Activation24(), Weight24(ignore=("*.up_proj", "*.down_proj")))
    refuse_exact_steps(rewritten(*passes)[1])
    bottlenecks = Cola(scope="mlp", attn_rank=8, mlp_rank=8, bottleneck="relu2", mlp_activation="drop")
    pipeline = rewritten(bottlenecks, Activation24(), Weight24())[1]
    refuse_exact_steps(pipeline)


def test_a_name_of_nothing_that_can_be_left_out_is_refused() -> None:
    model, pipeline = rewritten(Relu2FFN(), Activation24(), Weight24(scope="attn", from_step=3))
    before = [type(module) for module in pipeline.modules]
    for wrong, text in {
        ("activaton24",): r"'activaton24' is no pass of the pipeline: name one of activation24, weight24",
        ("weight24", "relu2_ffn"): "'relu2_ffn' changes parameters, and so stays: name one of",
        "activation24": r"without takes a list of names: write \['activation24'\]",
    }.items():
        with pytest.raises(PassError, match=text):
            pipeline.lower_(0, without=wrong)
        with pytest.raises(PassError, match=text), pipeline.evaluation(wrong):
            pass
        with pytest.raises(PassError, match=text):
            pipeline.begin_update_(0, IDS, without=wrong)
    assert [type(module) for module in pipeline.modules] == before
    pipeline.lower_(0, without=["weight24"])  # which is not in force yet
    assert model(IDS).isfinite().all()
