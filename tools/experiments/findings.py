"""The figures of docs/findings.md, a line a section: `python -m act24.tools.experiments.findings`.

Each is computed with act24's own operations or beside them, from a fixed seed, on the CPU, in seconds. Text
and output are compared by tests/test_findings.py. The functions that begin with `old_` restate formulas that
were read in run_c4.py's sources, or in the public repositories it builds on; nothing of that code runs here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from act24.initialise import build_llama
from act24.llama import PRESETS, LlamaConfig, LlamaForCausalLM
from act24.low_rank.exact_step import refactor
from act24.low_rank.lost import low_rank_and_scores
from act24.optim import AdamW
from act24.passes import Activation24, Cola, LowRank, Relu2FFN, apply_
from act24.passes.relu2_ffn import parity_width
from act24.relu2 import relu2
from act24.schedules import cosine_restart, resets_without_rewarm
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.feature_wise import TokenPermutation, sparsify_feature_wise, token_permutation
from act24.sparse24.pattern.selection import densest, top2_of_4
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.sparse24.weight.methods import weight_mask, weight_scale
from act24.tools.run.evaluate import legacy_mean

_SEED = 0
_SMALL = LlamaConfig(97, 32, 48, 2, 4)


def relative(a: Tensor, b: Tensor) -> float:
    """‖a - b‖ / ‖b‖."""
    return float((a - b).detach().norm() / b.detach().norm())


def pre_activation(density: float, *shape: int) -> Tensor:
    """Gaussian, so that relu leaves this share of non-zeros."""
    return torch.randn(*shape) + torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(density))


def bursty(tokens: int = 2048, features: int = 256) -> Tensor:
    """relu² activations, 86% zeros, whose features are active on runs of tokens; 5% of them mostly active."""
    noise, state, rows = torch.randn(tokens, features), torch.zeros(features), []
    for row in noise:
        state = 0.9 * state + math.sqrt(1 - 0.81) * row
        rows.append(state)
    hidden = torch.stack(rows) - 1.28
    hidden[:, torch.randperm(features)[: features // 20]] += 2.5
    return torch.relu(hidden).square()


def low_rank_logits() -> dict[str, float]:
    """2. A network of CoLA beside the same parameters without its SiLUs."""
    models = []
    for method in (Cola(attn_rank=8, mlp_rank=8), LowRank(attn_rank=8, mlp_rank=8)):
        model = build_llama(_SMALL, 0)
        apply_(model, [Relu2FFN(), method, Activation24()])
        models.append(model)
    cola, plain = models
    plain.load_state_dict(cola.state_dict())  # the same parameters: only the SiLUs differ
    ids = torch.arange(24).view(2, 12)
    return {"logits": relative(plain(ids), cola(ids))}


def split_errors() -> dict[str, float]:
    """3. Of the weight gradient's operand, by which 5% of the features stay dense; and the groups along
    features that two of four along tokens leaves fit."""
    activation = bursty()
    counts = (activation > 0).sum(0)
    last = torch.arange(256) >= int(0.95 * 256)
    kept = {"densest": densest(counts, 0.05), "sparsest": densest(-counts, 0.05), "last": last, "none": None}
    errors = {name: _feature_wise_error(activation, dense, "batch") for name, dense in kept.items()}
    along_tokens = (sparsify_feature_wise(torch.randn(1024, 256), None) != 0).view(1024, 64, 4)
    return errors | {"fit along features": float((along_tokens.sum(-1) <= 2).float().mean())}


def old_mvue(x: Tensor) -> tuple[Tensor, Tensor]:
    """The public approximation: the inclusion probability p, and x/p where kept; x `[..., 4]`."""
    a = x.abs() + 2.0**-23
    total = a.sum(-1, keepdim=True)
    t = a / total
    k = t / (total - a)
    p = t + a * (k.sum(-1, keepdim=True) - k)
    return p, x / p


def shares_of_nan() -> dict[str, float]:
    """4. Of the groups, and of the token rows, of relu² of N(0, 1)."""
    bad = old_mvue(torch.relu(torch.randn(500, 3072)).square().view(-1, 4))[1].isnan().any(-1)
    return {"groups": float(bad.float().mean()), "rows": float(bad.view(500, -1).any(-1).float().mean())}


def backward_errors() -> dict[str, float]:
    """5. Straight through, and dW2 of the dense activation, beside the gradient of what ran; β left out."""
    found = {}
    for zeros, density in ((50, 0.5), (90, 0.1)):
        hidden = pre_activation(density, 4000, 64).requires_grad_()
        weight_out, grad = torch.randn(48, 64, requires_grad=True), torch.randn(4000, 48)
        exact = {}
        for estimator in ("masked", "ste"):
            y = _run(hidden, weight_out, None, Options24(estimator=estimator))
            exact[estimator] = torch.autograd.grad(y, (hidden, weight_out), grad)
        found[f"dZ, {zeros}% zeros"] = relative(exact["ste"][0], exact["masked"][0])
        dense = grad.T @ torch.relu(hidden.detach()).square()
        found[f"dW2, {zeros}% zeros"] = relative(dense, exact["masked"][1])
    hidden, weight_out = torch.randn(64, 32, requires_grad=True), torch.randn(16, 32)
    options = Options24(method="soft_dynamic")
    without, scaled = (
        torch.autograd.grad(_run(hidden, weight_out, scale, options).sum(), hidden)[0]
        for scale in (None, torch.tensor(2.0))
    )
    found["without β = 2"] = float(without.norm() / scaled.norm())
    return found


def gradients_of_pre_activations(model: LlamaForCausalLM, ids: Tensor, tokens: int) -> list[Tensor]:
    """d loss / d h in every layer, of a loss that is a mean over so many tokens."""
    kept: list[Tensor] = []

    def keep(hidden: Tensor) -> Tensor:
        hidden.retain_grad()
        kept.append(hidden)
        return hidden

    for layer in model.model.layers:
        graph: Any = layer.graph
        (node,) = [n for n in graph.nodes if n.target is relu2]
        with graph.inserting_before(node):
            node.args = (graph.call_function(keep, node.args),)
        layer.recompile()  # type: ignore[operator]
    (F.cross_entropy(model(ids).flatten(0, 1), ids.flatten(), reduction="sum") / tokens).backward()
    return [h.grad for h in kept if h.grad is not None]


def half_precision_losses() -> dict[str, float]:
    """6. Gradients of a loss that is a mean over 64 · 256 tokens and 8 micro-batches, in float16 without a
    scale: the share of a layer that becomes zero, least and largest, and the least below normal numbers."""
    model = build_llama(LlamaConfig(2000, 256, 688, 4, 4), 0)
    apply_(model, [Relu2FFN()])
    ids = torch.randint(2000, (8, 128))
    found = [g[g != 0] for g in gradients_of_pre_activations(model, ids, 64 * 256 * 8)]
    zeros = [float((g.half() == 0).float().mean()) for g in found]
    subnormal = [float((g.half().abs() < 2**-14).float().mean()) for g in found]
    return {
        "size of a gradient": float(torch.cat(found).abs().median()),
        "zero, from": min(zeros),
        "to": max(zeros),
        "subnormal or zero": min(subnormal),
    }


def moment_shares() -> dict[str, float]:
    """7. What is left of Adam's second moment after 1,000 updates whose gradients are zero."""
    found = {}
    for beta in (0.999, 0.95):
        for kept in ("parameter", "float32"):
            parameter = torch.nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
            optimizer = AdamW([parameter], lr=0.0, betas=(0.9, beta), state_dtype=kept)
            parameter.grad = torch.randn(1000).bfloat16()
            optimizer.step()
            before = optimizer.state[parameter]["exp_avg_sq"].float().clone()
            parameter.grad = torch.zeros_like(parameter)
            for _ in range(1000):
                optimizer.step()
            after = optimizer.state[parameter]["exp_avg_sq"].float()
            state = "bfloat16" if kept == "parameter" else "float32"
            found[f"β₂ = {beta}, {state}"] = float(after.sum() / before.sum())
    return found


def perplexities() -> dict[str, float]:
    """8. What was reported of batches that all have the real loss: the legacy figure."""
    real = ((184, 34.72), (184, 25.02), (92, 19.57))
    return {
        f"{value:.2f} of {batches} batches": math.exp(
            legacy_mean(torch.full((batches,), math.log(value), dtype=torch.float64))
        )
        for batches, value in real
    }


def old_naive(x: Tensor) -> Tensor:
    """The mask by equality with the first and second maximum."""
    groups = x.abs().unflatten(-1, (-1, 4))
    first = groups.amax(-1, keepdim=True)
    second = torch.where(groups == first, -1, groups).amax(-1, keepdim=True)
    second = torch.where((groups == first).sum(-1, keepdim=True) > 1, first, second)
    return ((groups == first) | (groups == second)).flatten(-2)


def kept_on_ties() -> dict[str, float]:
    """9. Values kept of a group; the groups with more than two, of gradients as the old casts left them."""
    groups = {"1, 1, 1, 1": [1.0, 1, 1, 1], "2, 1, 1, 0": [2.0, 1, 1, 0]}
    kept = {name: float(old_naive(torch.tensor([group])).sum()) for name, group in groups.items()}
    tiny = (torch.randn(2000, 400) * 1e-7).half()
    return kept | {"more than two": float((old_naive(tiny).view(-1, 4).sum(-1) > 2).float().mean())}


def widths() -> dict[str, float]:
    """10. int(1.5 F) of each size, and act24's."""
    found: dict[str, float] = {}
    for size, width in {"60m": 1376, "130m": 2048, "350m": 2736, "1b": 5461}.items():
        found[size] = int(1.5 * width)
        found[f"{size} here"] = parity_width(PRESETS[f"llama-{size}"].intermediate_size)
    return found


def scale_errors() -> dict[str, float]:
    """11. Of activations with 90% zeros: their best scale, the weights', and relative errors."""
    scale = float(weight_scale(torch.randn(512, 2048)))
    activation = torch.relu(pre_activation(0.1, 2000, 400)).square()
    soft = soft_threshold24(activation)
    return {
        "best β": float((activation * soft).sum() / soft.square().sum()),
        "β of weights": scale,
        "naive": relative(activation * top2_of_4(activation), activation),
        "soft": relative(soft, activation),
        "soft with β of weights": relative(scale * soft, activation),
    }


def permutation_errors() -> dict[str, float]:
    """12. Of the weight gradient's operand, the densest 5% dense, by the order of the tokens."""
    activation = bursty()
    dense = densest((activation > 0).sum(0), 0.05)
    kinds: tuple[TokenPermutation, ...] = ("none", "sequence", "batch")
    return {kind: _feature_wise_error(activation, dense, kind) for kind in kinds}


def padding_errors() -> dict[str, float]:
    """13. Of dW2, with 30% padding rows that compete in the selection along tokens, and that do not."""
    activation = torch.relu(pre_activation(0.1, 4096, 128)).square()
    grad, pads = torch.randn(4096, 32), torch.rand(4096) < 0.3
    grad[pads] = 0
    exact = grad.T @ activation
    rows = {"competing": activation, "left out": activation * ~pads[:, None]}
    return {name: relative(grad.T @ sparsify_feature_wise(r, None), exact) for name, r in rows.items()}


def factor_masks() -> dict[str, float]:
    """14. Groups along the input that fit where the rank has them; the scale as it was and the best one; the
    same product factored anew: mask entries that flip, and how far the masked product moves."""
    factor = torch.randn(768, 256)
    along_in = top2_of_4(factor.abs()).view(192, 4, 256).sum(1)
    weight = torch.randn(512, 2048)
    weight_in, weight_out = torch.randn(1, 64, 256).double(), torch.randn(1, 512, 64).double()
    new = refactor(weight_in, weight_out)
    factors = ((weight_in[0], weight_out[0]), (new.weight_in[0], new.weight_out[0]))
    masks = [[weight_mask(f, "ste") for f in pair] for pair in factors]
    before, after = (
        (out * mask_out) @ (inner * mask_in)
        for (inner, out), (mask_in, mask_out) in zip(factors, masks, strict=True)
    )
    flips = [float((old != now).float().mean()) for old, now in zip(*masks, strict=True)]
    return {
        "fit along the input": float((along_in <= 2).float().mean()),
        "norm ratio": float(weight.norm() / soft_threshold24(weight).norm()),
        "least squares": float(weight_scale(weight)),
        "flipped": sum(flips) / 2,
        "moved": relative(after, before),
    }


def missed_restarts() -> dict[str, float]:
    """15. The steps of the 350m script, with an adjustment of -4000, at which moments are zeroed and the
    learning rate does not fall."""
    arguments = {"total_steps": 60_000, "warmup_steps": 2000, "min_lr_ratio": 0.1, "restart_every": 500}

    def multiplier(step: int) -> float:
        return cosine_restart(step, **arguments, lr_adjust_steps=-4000)

    missed = resets_without_rewarm(multiplier, every=500, total_steps=60_000)
    return {"steps": len(missed), "first": missed[0], "last": missed[-1]}


def norms() -> dict[str, float]:
    """16. The sum over tensors that was logged beside the global norm, of a model's gradients."""
    model = build_llama(_SMALL, 0)
    ids = torch.arange(24).view(2, 12)
    F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
    sizes = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
    return {"times too large": float(sizes.sum() / sizes.norm()), "tensors": len(sizes)}


def residual_energies() -> dict[str, float]:
    """17. What a weight has beyond a rank of 64, as a share of its energy: a product of such factors
    (rounding noise, so that only a bound is told), and a dense one."""
    product = (torch.randn(768, 64) @ torch.randn(64, 768))[None]
    dense = torch.randn(1, 768, 768)
    low, whole = (
        float(low_rank_and_scores(weight, 64)[2].square().sum() / weight.double().square().sum())
        for weight in (product, dense)
    )
    return {"low-rank product, at most": max(low, 1e-11), "dense": whole}


def zeros_after_merging() -> dict[str, float]:
    """22. Shares of zeros in a 2:4 weight and in its sum with an adapter."""
    weight = torch.randn(256, 256)
    sparse = weight * weight_mask(weight, "ste")
    merged = sparse + torch.randn(256, 8) @ torch.randn(8, 256) * 0.01
    return {"zeros": float((sparse == 0).float().mean()), "merged": float((merged == 0).float().mean())}


#: By section of docs/findings.md.
FIGURES: dict[int, Callable[[], dict[str, float]]] = {
    2: low_rank_logits,
    3: split_errors,
    4: shares_of_nan,
    5: backward_errors,
    6: half_precision_losses,
    7: moment_shares,
    8: perplexities,
    9: kept_on_ties,
    10: widths,
    11: scale_errors,
    12: permutation_errors,
    13: padding_errors,
    14: factor_masks,
    15: missed_restarts,
    16: norms,
    17: residual_energies,
    22: zeros_after_merging,
}

#: Where two digits do not show it.
_DIGITS = {8: 4, 10: 4, 11: 4, 14: 3, 15: 4}


def figures_of(section: int) -> dict[str, float]:
    """The figures of a section, from its own seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return FIGURES[section]()


def line_of(section: int, figures: dict[str, float]) -> str:
    """Figures as the document has them."""
    digits = _DIGITS.get(section, 2)
    return f"{section}. {'; '.join(f'{name}: {value:.{digits}g}' for name, value in figures.items())}"


def lines() -> Iterator[str]:
    """One line a section."""
    for section in FIGURES:
        yield line_of(section, figures_of(section))


def _run(hidden: Tensor, weight_out: Tensor, scale: Tensor | None, options: Options24) -> Tensor:
    return activation24(hidden, None, None, weight_out, None, scale, None, None, options)[0]


def _feature_wise_error(activation: Tensor, dense: Tensor | None, kind: TokenPermutation) -> float:
    order = token_permutation((8, len(activation) // 8), kind, activation.device)
    rows = activation if order is None else activation[order]
    return relative(sparsify_feature_wise(rows, dense), rows)


if __name__ == "__main__":
    for line in lines():
        print(line)
