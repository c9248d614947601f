"""The numbers of docs/findings.md: each defect as a few lines of arithmetic, and what act24 does instead.

The small functions that begin with `old_` restate formulas that were read in run_c4.py's sources, or in the
public repositories it builds on; nothing of that code runs here.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from act24.initialise import build_llama
from act24.llama import PRESETS, LlamaConfig, LlamaForCausalLM
from act24.low_rank.exact_step import refactor
from act24.low_rank.lost import low_rank_and_scores
from act24.passes import Activation24, Cola, LowRank, Relu2FFN, apply_
from act24.passes.relu2_ffn import parity_width
from act24.recipes.schema import Train
from act24.relu2 import relu2
from act24.schedules import cosine_restart, resets_without_rewarm
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.feature_wise import sparsify_feature_wise
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.methods import weight_mask, weight_scale
from act24.tools.data.batches import Batch
from act24.tools.experiments.findings import (
    FIGURES,
    backward_errors,
    lines,
    moment_shares,
    padding_errors,
    permutation_errors,
    pre_activation,
    relative,
    split_errors,
)
from act24.tools.run.evaluate import legacy_mean
from act24.tools.run.processes import Processes
from act24.tools.run.step import SummedLoss, TrainingStep

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
    ours = {name: parity_width(PRESETS[f"llama-{name}"].intermediate_size) for name in old}
    assert ours == {"60m": 2048, "130m": 3072, "350m": 4096, "1b": 8192}
    assert [name for name, width in old.items() if width % 4] == ["1b"]
    assert [name for name, width in old.items() if width % 128] == ["60m", "350m", "1b"]


def test_half_precision_overflows_on_squares() -> None:
    """Finding 6. relu(h) = 256 squares beyond float16; zero times the infinity is NaN."""
    square = torch.tensor([256.0]).square()
    assert square.half().isinf().all()
    assert (square.half() * 0).isnan().all()
    hidden = torch.full((1, 8), 256.0, dtype=torch.bfloat16)
    y, _ = activation24(hidden, None, None, hidden, None, None, None, None, Options24())
    assert y.isfinite().all()


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


def test_the_document_has_the_figures_of_the_command() -> None:
    """Sections 3, 5, 7, 12 and 13: every line of its output, as it is."""
    document = (Path(__file__).parents[1] / "docs" / "findings.md").read_text(encoding="utf-8")
    found = list(lines())
    assert len(found) == len(FIGURES)
    for line in found:
        assert f"\n    {line}\n" in document
        title = f"\n## {line.split('.')[0]}. "
        section = document.partition(title)[2].partition("\n## ")[0]
        assert line in section


def test_split_of_the_wrong_features_is_no_split() -> None:
    """Finding 3. The sparsest 5%, or the last 5% by index, dense instead of the densest."""
    errors = split_errors()
    assert errors["densest"] < 0.05
    assert min(errors["sparsest"], errors["last"]) > 3 * errors["densest"]
    assert errors["sparsest"] == pytest.approx(errors["none"], rel=0.02)


def test_permutation_within_sequences_helps_less() -> None:
    """Finding 12. Neighbouring tokens, tokens of one sequence, tokens of all sequences."""
    errors = permutation_errors()
    assert errors["none"] > 2 * errors["sequence"]
    assert errors["sequence"] > errors["batch"]


def test_zeros_along_tokens_are_no_zeros_along_features() -> None:
    """Finding 3. dX reduces over features: 2:4 along the tokens leaves groups of features too full."""
    gradient = torch.randn(1024, 256)
    along_tokens = sparsify_feature_wise(gradient, None) != 0
    fit = (along_tokens.view(1024, 64, 4).sum(-1) <= 2).float().mean()
    assert float(fit) == pytest.approx(11 / 16, abs=0.01)


def test_a_backward_without_mask_or_scale_is_not_the_forward_s() -> None:
    """Finding 5. Straight through, and dW2 from the dense activation, beside the exact one; β left out."""
    errors = backward_errors()
    assert errors["dZ, 50% zeros"] > 0.15 > errors["dW2, 50% zeros"] > 0.05
    assert errors["dZ, 90% zeros"] > 0.03 > errors["dW2, 90% zeros"] > 0.01
    assert errors["without β = 2"] == pytest.approx(0.5, rel=1e-6)


def test_padding_competes_in_feature_wise_selection() -> None:
    """Finding 13. 30% padding, zeroed before selection or not."""
    errors = padding_errors()
    assert errors["competing"] > 1.2 * errors["left out"]


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
    """Finding 7. act24's AdamW with the old state and its own: with β₂ = 0.95 both shrink."""
    shares = moment_shares()
    assert shares["β₂ = 0.999, bfloat16"] == 1.0
    assert shares["β₂ = 0.999, float32"] == pytest.approx(0.999**1000, rel=1e-3)
    assert shares["β₂ = 0.95, bfloat16"] < 1e-20


@pytest.mark.parametrize(
    ("batches", "reported", "real"),
    [(184, 34.06, 34.72), (184, 24.59, 25.02), (92, 18.95, 19.57), (367, 15.52, 15.64)],
)
def test_the_mean_that_counts_one_batch_too_many(batches: int, reported: float, real: float) -> None:
    """Finding 8. The legacy figure of batches that all have the real loss is the reported one."""
    legacy = legacy_mean(torch.full((batches,), math.log(real), dtype=torch.float64))
    assert math.exp(legacy) == pytest.approx(reported, abs=0.02)


def test_sum_of_norms_is_no_norm() -> None:
    """Finding 16. The logged gradient norm, a sum over tensors, is up to √n times the one of a step."""
    model = build_llama(LlamaConfig(97, 32, 48, 2, 4), 0)
    alone = Processes(0, 1, torch.device("cpu"))
    train = Train(steps=1, batch_size=2, total_batch_size=2, dtype="float32", grad_clip=0.0)
    ids = torch.arange(24).view(2, 12)
    step = TrainingStep(model, train, alone)
    result = step([Batch(ids, ids)], torch.optim.SGD(model.parameters(), lr=0.0), 0)
    model.zero_grad()
    loss, count = SummedLoss(model)(ids, ids)
    (loss / count).backward()
    norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    assert float(result.grad_norm) == pytest.approx(float(norms.norm()), rel=1e-4)
    assert 1.5 < float(norms.sum() / norms.norm()) <= math.sqrt(len(norms))


def test_restarts_miss_refreshes() -> None:
    """Finding 15. The 350m script: moments are zeroed at steps where the learning rate does not fall."""
    arguments = {"total_steps": 60_000, "warmup_steps": 2000, "min_lr_ratio": 0.1, "restart_every": 500}

    def multiplier(step: int) -> float:
        return cosine_restart(step, **arguments, lr_adjust_steps=-4000)

    missed = resets_without_rewarm(multiplier, every=500, total_steps=60_000)
    assert missed == tuple(range(2000, 4500, 500))


def test_the_residual_of_a_low_rank_product_is_rounding() -> None:
    """Finding 17. LoST's columns were chosen from what is left of M Nᵀ beyond its own rank; act24's from what
    is left of the dense weight."""
    product = (torch.randn(768, 64) @ torch.randn(64, 768))[None]
    dense = torch.randn(1, 768, 768)
    energy = [
        float(low_rank_and_scores(weight, 64)[2].square().sum() / weight.double().square().sum())
        for weight in (product, dense)
    ]
    assert energy[0] < 1e-11
    assert energy[1] > 0.5


def test_merging_an_adapter_fills_the_zeros() -> None:
    """Finding 18. W ∘ m + B A is dense."""
    weight = torch.randn(256, 256)
    sparse = weight * weight_mask(weight, "ste")
    merged = sparse + torch.randn(256, 8) @ torch.randn(8, 256) * 0.01
    assert float((sparse == 0).float().mean()) == 0.5
    assert float((merged == 0).float().mean()) == 0.0


def test_scales_belong_to_a_layer_by_name() -> None:
    """Finding 11. They were kept under id(ctx), an address that is soon another layer's."""
    assert len({id(object()) for _ in range(1000)}) < 1000
    model = build_llama(LlamaConfig(97, 32, 48, 2, 4), 0)
    apply_(model, [Relu2FFN(), Activation24(method="soft_dynamic")])
    scales = [name for name in model.state_dict() if name.endswith("activation24_scale")]
    assert [re.findall(r"layers\.(\d)", name) for name in scales] == [["0"], ["1"]]
