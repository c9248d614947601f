"""What docs/findings.md says: the figures of its command, and what no figure shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from act24.initialise import build_llama
from act24.llama import LlamaConfig
from act24.low_rank.exact_step import refactor
from act24.passes import Activation24, Relu2FFN, apply_
from act24.recipes.schema import Train
from act24.sparse24.feed_forward.operation import activation24
from act24.sparse24.feed_forward.options import Options24
from act24.sparse24.pattern.mvue import mvue24
from act24.sparse24.pattern.selection import top2_of_4
from act24.sparse24.weight.methods import weight_mask
from act24.tools.data.batches import Batch
from act24.tools.experiments.findings import FIGURES, figures_of, line_of, old_mvue, old_naive, relative
from act24.tools.run.processes import Processes
from act24.tools.run.step import SummedLoss, TrainingStep

Figures = dict[int, dict[str, float]]


@pytest.fixture(scope="module")
def figures() -> Figures:
    """What the command prints, by section."""
    return {section: figures_of(section) for section in FIGURES}


@pytest.mark.parametrize("page", ["findings.md", "findings.zh.md"])
def test_the_document_has_the_figures_of_the_command(figures: Figures, page: str) -> None:
    """Every line of its output as it is, in its section, and no other."""
    document = (Path(__file__).parents[1] / "docs" / page).read_text(encoding="utf-8")
    lines = {section: line_of(section, values) for section, values in figures.items()}
    for section, line in lines.items():
        text = document.partition(f"\n## {section}. ")[2].partition("\n## ")[0]
        assert f"\n\n    {line}\n\n" in text + "\n"
    assert re.findall(r"^    (\d.*)$", document, re.M) == list(lines.values())


# ------------------------------------------------------------------------------------- the forward


def test_cola_under_relu2_was_plain_low_rank(figures: Figures) -> None:
    """Finding 2. The dispatch by attribute names ran both projections without CoLA's SiLU."""
    assert figures[2]["logits"] > 0.1


@pytest.mark.parametrize("value", [2.0, 4.0, 100.0])
def test_old_mvue_is_nan_on_one_large_value(value: float) -> None:
    """Finding 4. One non-zero of 2 or more and three zeros: total - a is 0 in float32."""
    x = torch.tensor([[value, 0.0, 0.0, 0.0]])
    assert old_mvue(x)[1].isnan().any()
    assert torch.equal(mvue24(x, 0), x)


def test_old_mvue_touches_every_row(figures: Figures) -> None:
    """Finding 4. relu² of N(0, 1): some percent of the groups, hence nearly every token row."""
    assert 0.01 < figures[4]["groups"] < 0.04
    assert figures[4]["rows"] > 0.99
    assert bool(mvue24(torch.relu(torch.randn(500, 3072)).square(), 0).isfinite().all())


def test_old_naive_keeps_more_than_two_on_ties(figures: Figures) -> None:
    """Finding 9. Its mask is no 2:4 mask; half precision makes ties common."""
    for group, kept in (([1.0, 1, 1, 1], 4), ([3.0, 2, 2, 2], 4), ([2.0, 1, 1, 0], 3)):
        assert int(old_naive(torch.tensor([group])).sum()) == kept
        assert int(top2_of_4(torch.tensor([group])).sum()) == 2
    assert figures[9]["more than two"] > 0.4


def test_old_widths_are_no_multiple_of_four(figures: Figures) -> None:
    """Finding 10. int(1.5 F) at 1b; act24 rounds to a multiple of 128."""
    old = {size: figures[10][size] for size in ("60m", "130m", "350m", "1b")}
    ours = {size: figures[10][f"{size} here"] for size in old}
    assert [size for size, width in old.items() if width % 4] == ["1b"]
    assert [size for size, width in old.items() if width % 128] == ["60m", "350m", "1b"]
    assert all(width % 128 == 0 for width in ours.values())
    assert [f"{ours[size] / old[size] - 1:.1%}" for size in ("60m", "350m")] == ["-0.8%", "-0.2%"]


def test_half_precision_overflows_on_squares() -> None:
    """Finding 6. relu(h) = 256 squares beyond float16; zero times the infinity is NaN."""
    square = torch.tensor([256.0]).square()
    assert square.half().isinf().all()
    assert (square.half() * 0).isnan().all()
    hidden = torch.full((1, 8), 256.0, dtype=torch.bfloat16)
    y, _ = activation24(hidden, None, None, hidden, None, None, None, None, Options24())
    assert y.isfinite().all()


def test_half_precision_flushes_gradients(figures: Figures) -> None:
    """Finding 6. The loss is a mean over 64 · 256 tokens and 8 micro-batches, and was cast unscaled."""
    assert 0.15 < figures[6]["zero, from"] < figures[6]["to"] < 0.5
    assert figures[6]["subnormal or zero"] > 0.999
    assert figures[6]["size of a gradient"] < 2**-14


def test_literal_weight_scale_inflates_sparse_activations(figures: Figures) -> None:
    """Finding 11. β of the weights is 1.48; at 90% zeros the best for the activations is 1.001."""
    found = figures[11]
    assert found["β of weights"] == pytest.approx(1.48, abs=0.01)
    assert 1 < found["best β"] < 1.002
    assert found["soft"] / found["naive"] == pytest.approx(1.7, abs=0.05)
    assert found["soft with β of weights"] == pytest.approx(found["β of weights"] - 1, abs=0.02)


# ------------------------------------------------------------------------------------- the backward


def test_split_of_the_wrong_features_is_no_split(figures: Figures) -> None:
    """Finding 3. The sparsest 5%, or the last 5% by index, dense instead of the densest."""
    errors = figures[3]
    assert errors["densest"] < 0.05
    assert min(errors["sparsest"], errors["last"]) > 3 * errors["densest"]
    assert errors["sparsest"] == pytest.approx(errors["none"], rel=0.02)


def test_permutation_within_sequences_helps_less(figures: Figures) -> None:
    """Finding 12. Neighbouring tokens, tokens of one sequence, tokens of all sequences."""
    errors = figures[12]
    assert errors["none"] > 2 * errors["sequence"]
    assert errors["sequence"] > errors["batch"]


def test_zeros_along_tokens_are_no_zeros_along_features(figures: Figures) -> None:
    """Finding 3. dX reduces over features: 2:4 along the tokens leaves groups of features too full, of four
    values that stay with probability 1/2 three or four in 5 cases of 16."""
    assert figures[3]["fit along features"] == pytest.approx(11 / 16, abs=0.01)


def test_a_backward_without_mask_or_scale_is_not_the_forward_s(figures: Figures) -> None:
    """Finding 5. Straight through, and dW2 from the dense activation, beside the exact one; β left out."""
    errors = figures[5]
    assert errors["dZ, 50% zeros"] > 0.15 > errors["dW2, 50% zeros"] > 0.05
    assert errors["dZ, 90% zeros"] > 0.03 > errors["dW2, 90% zeros"] > 0.01
    assert errors["without β = 2"] == pytest.approx(0.5, rel=1e-6)


def test_padding_competes_in_feature_wise_selection(figures: Figures) -> None:
    """Finding 13. 30% padding, zeroed before selection or not."""
    assert figures[13]["competing"] > 1.2 * figures[13]["left out"]


# -------------------------------------------------------------------------------------- 2:4 weights


def test_groups_along_the_rank_do_not_serve_the_product(figures: Figures) -> None:
    """Finding 14. 2:4 along the rank of [in, r] leaves 11 of 16 groups along `in` with two or fewer."""
    assert figures[14]["fit along the input"] == pytest.approx(11 / 16, abs=0.01)
    factor = torch.randn(768, 256)
    assert bool((weight_mask(factor.T.contiguous(), "ste").view(256, 192, 4).sum(-1) == 2).all())


def test_the_norm_ratio_is_not_the_least_squares_scale(figures: Figures) -> None:
    """Finding 14. ‖W‖/‖S‖ beside <W, S>/<S, S>."""
    assert figures[14]["norm ratio"] > figures[14]["least squares"] + 0.2


def test_an_exact_step_tears_the_masks_of_factors(figures: Figures) -> None:
    """Finding 14. The same product, factored anew: half of the mask flips, and the masked product jumps."""
    weight_in, weight_out = torch.randn(1, 64, 256).double(), torch.randn(1, 512, 64).double()
    new = refactor(weight_in, weight_out)
    assert relative(new.weight_out[0] @ new.weight_in[0], weight_out[0] @ weight_in[0]) < 1e-8
    assert figures[14]["flipped"] == pytest.approx(0.5, abs=0.02)
    assert figures[14]["moved"] > 0.5


# ---------------------------------------------------------------------------- training and measuring


def test_bfloat16_second_moments_cannot_shrink(figures: Figures) -> None:
    """Finding 7. act24's AdamW with the old state and its own: with β₂ = 0.95 both shrink."""
    shares = figures[7]
    assert shares["β₂ = 0.999, bfloat16"] == 1.0
    assert shares["β₂ = 0.999, float32"] == pytest.approx(0.999**1000, rel=1e-3)
    assert shares["β₂ = 0.95, bfloat16"] < 1e-20


def test_the_mean_that_counts_one_batch_too_many(figures: Figures) -> None:
    """Finding 8. Of batches that all have the real loss, real^(n / (n + 1)) was reported."""
    for name, reported in figures[8].items():
        real, _, batches, _ = name.split()
        assert reported == pytest.approx(float(real) ** (int(batches) / (int(batches) + 1)), rel=1e-6)


def test_sum_of_norms_is_no_norm(figures: Figures) -> None:
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
    assert 1.5 < figures[16]["times too large"] <= figures[16]["tensors"] ** 0.5


def test_restarts_miss_refreshes(figures: Figures) -> None:
    """Finding 15. The 350m script: moments are zeroed at steps where the learning rate does not fall."""
    assert figures[15] == {"steps": len(range(2000, 4500, 500)), "first": 2000, "last": 4000}


def test_the_residual_of_a_low_rank_product_is_rounding(figures: Figures) -> None:
    """Finding 17. LoST's columns were chosen from what is left of M Nᵀ beyond its own rank; act24's from what
    is left of the dense weight."""
    assert figures[17]["low-rank product, at most"] == 1e-11
    assert figures[17]["dense"] > 0.5


def test_merging_an_adapter_fills_the_zeros(figures: Figures) -> None:
    """Finding 22. W ∘ m + B A is dense."""
    assert figures[22] == {"zeros": 0.5, "merged": 0.0}


def test_scales_belong_to_a_layer_by_name() -> None:
    """Finding 11. They were kept under id(ctx), an address that is soon another layer's."""
    assert len({id(object()) for _ in range(1000)}) < 1000
    model = build_llama(LlamaConfig(97, 32, 48, 2, 4), 0)
    apply_(model, [Relu2FFN(), Activation24(method="soft_dynamic")])
    scales = [name for name in model.state_dict() if name.endswith("activation24_scale")]
    assert [re.findall(r"layers\.(\d)", name) for name in scales] == [["0"], ["1"]]
