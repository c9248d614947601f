"""The numbers of docs/findings.md: each defect as a few lines of arithmetic, and what act24 does instead.

The small functions that begin with `old_` restate formulas that were read in run_c4.py's sources, or in the
public repositories it builds on; nothing of that code runs here.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.low_rank.exact_step import refactor
from act24.passes import Activation24, Cola, LowRank, Relu2FFN, apply_
from act24.relu2 import relu2
from act24.schedules import cosine_restart, resets_without_rewarm
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.feature_wise import sparsify_feature_wise, token_permutation
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.selection import densest, top2_of_4
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.methods import weight_mask, weight_scale


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).detach().norm() / b.detach().norm())


def pre_activation(density: float, *shape: int) -> Tensor:
    """Gaussian, so that relu leaves this share of non-zeros."""
    return torch.randn(*shape) + torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density))


# ------------------------------------------------------------------------------------- the forward


def test_cola_under_relu2_was_plain_low_rank() -> None:
    """Finding 2. The dispatch by attribute names ran both projections without CoLA's SiLU."""
    config = LlamaConfig(97, 32, 48, 2, 4)
    ids = torch.arange(24).view(2, 12)
    models = []
    for method in (Cola(attn_rank=8, mlp_rank=8), LowRank(attn_rank=8, mlp_rank=8)):
        model = build_llama(config, 0)
        apply_(model, [Relu2FFN(), method, Activation24()])
        models.append(model)
    cola, plain = models
    plain.load_state_dict(cola.state_dict())  # the same parameters: only the SiLUs differ
    assert relative(plain(ids), cola(ids)) > 0.1


def old_mvue(x: Tensor) -> tuple[Tensor, Tensor]:
    """The public approximation: the inclusion probability p, and x/p where kept."""
    a = x.abs() + 2.0**-23
    total = a.sum(-1, keepdim=True)
    t = a / total
    k = t / (total - a)
    p = t + a * (k.sum(-1, keepdim=True) - k)
    return p, x / p


@pytest.mark.parametrize("value", [2.0, 4.0, 100.0])
def test_old_mvue_is_nan_on_one_large_value(value: float) -> None:
    """Finding 4. One non-zero of 2 or more and three zeros: total - a is 0 in float32."""
    x = torch.tensor([[value, 0.0, 0.0, 0.0]])
    assert old_mvue(x)[1].isnan().any()
    assert torch.equal(mvue24(x, 0), x)


def test_old_mvue_touches_every_row() -> None:
    """Finding 4. relu² of N(0, 1): some percent of the groups, hence nearly every token row."""
    x = torch.relu(torch.randn(500, 3072)).square()
    bad = old_mvue(x.view(-1, 4))[1].isnan().any(-1)
    assert 0.01 < float(bad.float().mean()) < 0.04
    assert float(bad.view(500, -1).any(-1).float().mean()) > 0.99
    assert bool(mvue24(x, 0).isfinite().all())


def old_naive(x: Tensor) -> Tensor:
    """The mask by equality with the first and second maximum."""
    groups = x.abs().unflatten(-1, (-1, 4))
    first = groups.amax(-1, keepdim=True)
    second = torch.where(groups == first, -1, groups).amax(-1, keepdim=True)
    second = torch.where((groups == first).sum(-1, keepdim=True) > 1, first, second)
    return ((groups == first) | (groups == second)).flatten(-2)


def test_old_naive_keeps_more_than_two_on_ties() -> None:
    """Finding 9. Its mask is no 2:4 mask; half precision makes ties common."""
    for group, kept in (([1.0, 1, 1, 1], 4), ([3.0, 2, 2, 2], 4), ([2.0, 1, 1, 0], 3)):
        assert int(old_naive(torch.tensor([group])).sum()) == kept
        assert int(top2_of_4(torch.tensor([group])).sum()) == 2
    tiny = (torch.randn(2000, 400) * 1e-7).half()  # gradients as the old casts left them
    crowded = (old_naive(tiny).view(-1, 4).sum(-1) > 2).float().mean()
    assert float(crowded) > 0.4


def test_old_widths_are_no_multiple_of_four() -> None:
    """Finding 10. int(1.5 F) at 1b; act24 rounds to a multiple of 128."""
    old = {
        name: int(1.5 * width)
        for name, width in {"60m": 1376, "130m": 2048, "350m": 2736, "1b": 5461}.items()
    }
    assert old == {"60m": 2064, "130m": 3072, "350m": 4104, "1b": 8191}
    assert [name for name, width in old.items() if width % 4] == ["1b"]
    assert [name for name, width in old.items() if width % 128] == ["60m", "350m", "1b"]


def test_half_precision_overflows_on_squares() -> None:
    """Finding 6. relu(h) = 256 squares beyond float16; zero times the infinity is NaN."""
    square = torch.tensor([256.0]).square()
    assert square.half().isinf().all()
    assert (square.half() * 0).isnan().all()
    assert square.bfloat16().isfinite().all()


def gradients_of_pre_activations(model: LlamaForCausalLM, ids: Tensor, tokens: int) -> list[Tensor]:
    """d loss / d h in every layer, of a loss that is a mean over so many tokens."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        kept.append(hidden)
        return hidden

    for layer in model.model.layers:
        graph = layer.graph
        (node,) = [n for n in graph.nodes if n.target is relu2]
        with graph.inserting_before(node):
            node.args = (graph.call_function(keep, node.args),)
        layer.recompile()
    logits = model(ids)
    (
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum") / tokens
    ).backward()
    return [h.grad for h in kept if h.grad is not None]


def test_half_precision_flushes_gradients() -> None:
    """Finding 6. The loss is a mean over 64 · 256 tokens and 8 micro-batches, and was cast unscaled."""
    model = build_llama(LlamaConfig(2000, 256, 688, 4, 4), 0)
    apply_(model, [Relu2FFN()])
    ids = torch.randint(2000, (8, 128))
    for gradient in gradients_of_pre_activations(model, ids, 64 * 256 * 8):
        gradient = gradient[gradient != 0]
        lost = (gradient.half() == 0).float().mean()
        subnormal = (gradient.half().abs() < 2**-14).float().mean()
        assert 0.15 < float(lost) < 0.5
        assert float(subnormal) > 0.999
        assert relative(gradient.bfloat16().float(), gradient) < 0.003


def test_literal_weight_scale_inflates_sparse_activations() -> None:
    """Finding 11. β of the weights is 1.48; at 90% zeros the best for the activations is 1.001."""
    scale = float(weight_scale(torch.randn(512, 2048)))
    assert scale == pytest.approx(1.48, abs=0.01)
    activation = torch.relu(pre_activation(0.1, 2000, 400)).square()
    soft = soft_threshold24(activation)
    naive = activation * top2_of_4(activation)
    assert relative(naive, activation) == pytest.approx(0.016, abs=0.002)
    assert relative(soft, activation) == pytest.approx(0.028, abs=0.003)
    assert relative(scale * soft, activation) == pytest.approx(0.48, abs=0.02)


# ------------------------------------------------------------------------------------- the backward


def bursty(tokens: int = 2048, features: int = 256) -> Tensor:
    """relu² activations, 90% zeros, whose features are active on runs of tokens; 5% of them mostly active."""
    noise = torch.randn(tokens + 1, features)
    state = torch.zeros(features)
    rows = []
    for row in noise:
        state = 0.9 * state + math.sqrt(1 - 0.81) * row
        rows.append(state)
    hidden = torch.stack(rows[1:]) - 1.28
    hidden[:, torch.randperm(features)[: features // 20]] += 2.5
    return torch.relu(hidden).square()


def feature_wise_error(activation: Tensor, dense: Tensor | None, kind: Any) -> float:
    order = token_permutation((8, len(activation) // 8), kind, activation.device)
    rows = activation if order is None else activation[order]
    return relative(sparsify_feature_wise(rows, dense), rows)


def test_split_of_the_wrong_features_is_no_split() -> None:
    """Finding 3. The sparsest 5%, or the last 5% by index, dense instead of the densest."""
    activation = bursty()
    counts = (activation > 0).sum(0)
    right = feature_wise_error(activation, densest(counts, 0.05), "batch")
    inverted = feature_wise_error(activation, densest(-counts, 0.05), "batch")
    last = torch.zeros(256, dtype=torch.bool)
    last[int(0.95 * 256) :] = True
    by_index = feature_wise_error(activation, last, "batch")
    none = feature_wise_error(activation, None, "batch")
    assert right < 0.05
    assert min(inverted, by_index) > 3 * right
    assert inverted == pytest.approx(none, rel=0.02)


def test_permutation_within_sequences_helps_less() -> None:
    """Finding 12. Neighbouring tokens, tokens of one sequence, tokens of all sequences."""
    activation = bursty()
    dense = densest((activation > 0).sum(0), 0.05)
    none, within, batch = (feature_wise_error(activation, dense, k) for k in ("none", "sequence", "batch"))
    assert none > 2 * within
    assert within > batch


def test_zeros_along_tokens_are_no_zeros_along_features() -> None:
    """Finding 3. dX reduces over features: 2:4 along the tokens leaves groups of features too full."""
    gradient = torch.randn(1024, 256)
    along_tokens = sparsify_feature_wise(gradient, None) != 0
    fit = (along_tokens.view(1024, 64, 4).sum(-1) <= 2).float().mean()
    assert float(fit) == pytest.approx(11 / 16, abs=0.01)


@pytest.mark.parametrize(("density", "x", "w2"), [(0.5, 0.20, 0.10), (0.1, 0.043, 0.018)])
def test_a_backward_without_mask_is_not_the_forward_s(density: float, x: float, w2: float) -> None:
    """Finding 5. Straight through, and dW2 from the dense activation, beside the exact gradient."""
    hidden = pre_activation(density, 4000, 64).requires_grad_()
    weight_out = torch.randn(48, 64, requires_grad=True)
    grad = torch.randn(4000, 48)
    exact = {}
    for estimator in ("masked", "ste"):
        y, _ = activation24(
            hidden, None, None, weight_out, None, None, None, None, Options24(estimator=estimator)
        )
        exact[estimator] = torch.autograd.grad(y, (hidden, weight_out), grad)
    assert relative(exact["ste"][0], exact["masked"][0]) == pytest.approx(x, rel=0.25)
    dense_w2 = grad.T @ torch.relu(hidden.detach()).square()
    assert relative(dense_w2, exact["masked"][1]) == pytest.approx(w2, rel=0.35)


def test_a_backward_without_scale_is_too_small() -> None:
    """Finding 5. β multiplies the forward and, in the old backward, not the gradient."""
    hidden = torch.randn(64, 32, requires_grad=True)
    weight_out = torch.randn(16, 32)
    gradients = []
    for scale in (None, torch.tensor(2.0)):
        options = Options24(method="soft_dynamic")
        y, _ = activation24(hidden, None, None, weight_out, None, scale, None, None, options)
        gradients.append(torch.autograd.grad(y.sum(), hidden)[0])
    assert torch.allclose(gradients[1], 2 * gradients[0])


def test_padding_competes_in_feature_wise_selection() -> None:
    """Finding 13. 30% padding, zeroed before selection or not."""
    tokens, features = 4096, 128
    activation = torch.relu(pre_activation(0.1, tokens, features)).square()
    grad = torch.randn(tokens, 32)
    pads = torch.rand(tokens) < 0.3
    grad[pads] = 0
    exact = grad.T @ activation
    errors = {}
    for name, rows in (("competing", activation), ("zeroed", activation * ~pads[:, None])):
        errors[name] = relative(grad.T @ sparsify_feature_wise(rows, None), exact)
    assert errors["competing"] > 1.2 * errors["zeroed"]


# -------------------------------------------------------------------------------------- 2:4 weights


def test_groups_along_the_rank_do_not_serve_the_product() -> None:
    """Finding 14. 2:4 along the rank of [in, r] leaves 69% of the groups along `in` with two or fewer."""
    factor = torch.randn(768, 256)
    mask = top2_of_4(factor.abs())
    along_in = mask.view(192, 4, 256).sum(1)
    assert float((along_in <= 2).float().mean()) == pytest.approx(0.69, abs=0.01)
    assert bool((weight_mask(factor.T.contiguous(), "ste").view(256, 192, 4).sum(-1) == 2).all())


def test_the_norm_ratio_is_not_the_least_squares_scale() -> None:
    """Finding 14. ‖W‖/‖S‖ beside <W, S>/<S, S>."""
    weight = torch.randn(512, 2048)
    soft = soft_threshold24(weight)
    ratio = float(weight.norm() / soft.norm())
    assert ratio == pytest.approx(1.72, abs=0.03)
    best = float(weight_scale(weight))
    assert relative(best * soft, weight) < relative(ratio * soft, weight)


def test_an_exact_step_tears_the_masks_of_factors() -> None:
    """Finding 14. The same product, factored anew: half of the mask flips, and the masked product jumps."""
    weight_in, weight_out = torch.randn(1, 64, 256).double(), torch.randn(1, 512, 64).double()
    new = refactor(weight_in, weight_out)
    before, after = (weight_in[0], weight_out[0]), (new.weight_in[0], new.weight_out[0])
    assert relative(after[1] @ after[0], before[1] @ before[0]) < 1e-8
    masks = [[weight_mask(factor, "ste") for factor in factors] for factors in (before, after)]
    for old, now in zip(*masks, strict=True):
        assert float((old != now).float().mean()) == pytest.approx(0.5, abs=0.02)
    sparse = [
        (out * mask_out) @ (inner * mask_in)
        for (inner, out), (mask_in, mask_out) in zip((before, after), masks, strict=True)
    ]
    assert relative(sparse[1], sparse[0]) > 0.5


# ---------------------------------------------------------------------------- training and measuring


def test_bfloat16_second_moments_cannot_shrink() -> None:
    """Finding 7. v · 0.999 rounds back to v for every bfloat16 value; 0.99 never does."""
    v = torch.rand(200_000).bfloat16()
    v = v[v > 0]
    assert bool((v * 0.999 == v).all())
    assert bool((v * 0.99 != v).all())


@pytest.mark.parametrize(
    ("batches", "reported", "real"),
    [(184, 34.06, 34.72), (184, 24.59, 25.02), (92, 18.95, 19.57), (367, 15.52, 15.64)],
)
def test_the_mean_that_counts_one_batch_too_many(batches: int, reported: float, real: float) -> None:
    """Finding 8. sum/(n+1): the perplexity depends on how many batches the held-out tokens make."""
    loss = math.log(reported) * (batches + 1) / batches
    assert math.exp(loss) == pytest.approx(real, abs=0.02)


def test_sum_of_norms_is_no_norm() -> None:
    """Finding 16. The logged gradient norm: a sum over tensors, up to √n times the global norm."""
    gradients = [torch.randn(1000) for _ in range(86)]
    total = sum(float(g.norm()) for g in gradients)
    whole = float(torch.cat(gradients).norm())
    assert total / whole == pytest.approx(math.sqrt(86), rel=0.02)


def test_restarts_miss_refreshes() -> None:
    """Finding 15. The 350m script: moments are zeroed at steps where the learning rate does not fall."""
    arguments = {"total_steps": 60_000, "warmup_steps": 2000, "min_lr_ratio": 0.1, "restart_every": 500}

    def multiplier(step: int) -> float:
        return cosine_restart(step, **arguments, lr_adjust_steps=-4000)

    missed = resets_without_rewarm(multiplier, every=500, total_steps=60_000)
    assert missed == tuple(range(2000, 4500, 500))


def test_the_residual_of_a_low_rank_product_is_rounding() -> None:
    """Finding 17. LoST's columns were chosen from what is left of M Nᵀ beyond its own rank."""
    product = torch.randn(768, 64) @ torch.randn(64, 768)
    values = torch.linalg.svdvals(product)
    assert float(values[64:].square().sum() / values.square().sum()) < 1e-11
    dense = torch.linalg.svdvals(torch.randn(768, 768))
    assert float(dense[64:].square().sum() / dense.square().sum()) > 0.5


def test_merging_an_adapter_fills_the_zeros() -> None:
    """Finding 18. W ∘ m + B A is dense."""
    weight = torch.randn(256, 256)
    sparse = weight * weight_mask(weight, "ste")
    merged = sparse + torch.randn(256, 8) @ torch.randn(8, 256) * 0.01
    assert float((sparse == 0).float().mean()) == 0.5
    assert float((merged == 0).float().mean()) == 0.0


def test_addresses_come_back() -> None:
    """Finding 11. Scales were kept under id(ctx): a freed address is soon another layer's."""
    addresses = {id(object()) for _ in range(1000)}
    assert len(addresses) < 1000
