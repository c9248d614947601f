"""Masks against a brute force and the published formulas."""

import itertools

import pytest
import torch

from act24.errors import Act24Error
from act24.pruning.methods import METHODS, masked, prune_weight
from act24.pruning.pattern import (
    Pattern,
    dropped,
    follows,
    largest,
    mask_by_layer,
    mask_by_row,
    mask_cumulative,
    parse_pattern,
    stored_pattern,
)
from act24.pruning.sparsegpt import sparsegpt
from act24.pruning.statistics import gram, kept_tokens, squares


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(scores, keep):
    """Indices that stay, by repeatedly taking the largest; of equal ones the first."""
    left, kept = list(enumerate(scores)), []
    for _ in range(keep):
        best = max(left, key=lambda entry: (entry[1], -entry[0]))
        left.remove(best)
        kept.append(best[0])
    return [i in kept for i in range(len(scores))]


@pytest.mark.parametrize("distinct", [3, 10**6])  # many ties, and none
@pytest.mark.parametrize("text", ["0", "0.3", "0.5", "0.7", "1:4", "2:4", "4:8", "3:4"])
def test_masks_are_those_of_a_brute_force(text, distinct):
    scores = torch.randint(0, distinct, (5, 24), generator=torch.Generator().manual_seed(1)).float()
    pattern = parse_pattern(text)
    by_row = mask_by_row(scores, pattern)
    for row, mask in zip(scores.tolist(), by_row.tolist(), strict=True):
        if pattern.of:
            groups = [row[i : i + pattern.of] for i in range(0, 24, pattern.of)]
            assert mask == list(itertools.chain(*(brute_force(g, pattern.keep) for g in groups)))
        else:
            assert mask == brute_force(row, 24 - {"0": 0, "0.3": 7, "0.5": 12, "0.7": 16}[text])
    whole = mask_by_layer(scores, pattern)
    if not pattern.of:
        goes = {"0": 0, "0.3": 36, "0.5": 60, "0.7": 84}[text]
        assert whole.flatten().tolist() == brute_force(scores.flatten().tolist(), 120 - goes)
    assert follows(by_row, pattern)
    assert follows(whole, pattern)


def test_counts_do_not_depend_on_binary_fractions():
    assert [dropped(10, s / 10) for s in range(10)] == list(range(10))


def test_one_to_four_keeps_one():
    """The public code prunes one of four for "1:4"."""
    assert mask_by_row(drawn(8, 16), parse_pattern("1:4")).sum() == 8 * 4


def test_the_largest_of_equal_ones_are_the_first():
    assert largest(torch.ones(2, 5), 2).tolist() == [[True, True, False, False, False]] * 2


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9999999, 1 - 2**-40, 1e-9, 7 / 9, 1.0])
def test_what_is_stored_of_a_share_is_that_share(share):
    """As text beside a mask: rounded, it was another share, or none at all."""
    assert stored_pattern(str(Pattern(share))) == Pattern(share)


@pytest.mark.parametrize("text", ["1", "-0.1", "nan", "inf", "4:4", "0:4", "5:4", "2:", "half", "", "2:4:8"])
def test_what_is_no_pattern_is_refused(text):
    with pytest.raises(Act24Error, match="write the share that goes"):
        parse_pattern(text)


def test_groups_have_to_divide():
    assert not follows(torch.ones(2, 8, dtype=torch.bool), parse_pattern("2:5"))
    with pytest.raises(Act24Error, match=r"q_proj: pattern 2:4 needs .* multiple of 4, not 30"):
        parse_pattern("2:4").check((8, 30), "q_proj")


# ------------------------------------------------------------------------------------------ Wanda


def test_wanda_is_weight_times_norm_of_inputs():
    weight = torch.tensor([[1.0, -2.0, 0.5, 3.0], [4.0, 0.1, 0.2, -0.3]])
    x = torch.tensor([[1.0, 0.0, 10.0, 0.1], [2.0, 1.0, 10.0, 0.1]])
    scores = METHODS["wanda"].score(weight, squares(x))
    expected = weight.abs() * x.square().sum(0).sqrt()
    torch.testing.assert_close(scores, expected)
    pruned = prune_weight(weight, squares(x), METHODS["wanda"], parse_pattern("0.5"))
    # norms are √5, 1, √200, √0.02: rows score 2.24 2 7.07 0.42 and 8.94 0.1 2.83 0.04
    assert pruned.mask.tolist() == [[True, False, True, False], [True, False, True, False]]
    assert torch.equal(pruned.weight, torch.tensor([[1.0, 0, 0.5, 0], [4.0, 0, 0.2, 0]]))
    kept = (expected * pruned.mask).sum() / expected.sum()
    assert pruned.score_kept == pytest.approx(float(kept), rel=1e-6)


@pytest.mark.parametrize("method", [*METHODS])
def test_masks_do_not_depend_on_the_scale_of_inputs(method):
    weight, x = drawn(12, 32), drawn(200, 32, seed=1) * drawn(32, seed=2).exp()
    statistic = {"none": lambda x: None, "squares": squares, "gram": gram}[METHODS[method].statistic]
    one, other = (
        prune_weight(weight, statistic(x * s), METHODS[method], parse_pattern("0.5")) for s in (1, 64.0)
    )
    assert torch.equal(one.mask, other.mask)


def test_statistics_do_not_depend_on_order_nor_batches():
    x, pads = drawn(4, 6, 16), torch.zeros(4, 6, dtype=torch.bool)
    pads[1, 4:] = pads[3, 1:] = True
    whole = squares(kept_tokens(x, pads))
    rows = [squares(kept_tokens(x[i : i + 1], pads[i : i + 1])) for i in (2, 0, 3, 1)]
    torch.testing.assert_close(sum(rows), whole, rtol=1e-6, atol=0)
    by_hand = sum(x[b, s].double().square() for b in range(4) for s in range(6) if not pads[b, s])
    torch.testing.assert_close(whole, by_hand, rtol=1e-5, atol=0)
    other = x.clone()
    other[pads] = 1e6
    torch.testing.assert_close(squares(kept_tokens(other, pads)), whole, rtol=0, atol=0)
    torch.testing.assert_close(gram(kept_tokens(x, pads)).diagonal(), whole.float(), rtol=1e-5, atol=0)


def test_float16_inputs_do_not_overflow():
    assert torch.isfinite(
        squares(kept_tokens(torch.full((300, 4), 60000.0, dtype=torch.float16), None))
    ).all()


@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.7])
def test_the_variant_meets_the_sparsity_with_rows_of_their_own(sparsity):
    scores = (drawn(64, 256) * drawn(64, 256, seed=1).exp()).abs() * drawn(64, 1, seed=3).exp()
    mask = mask_cumulative(scores, parse_pattern(str(sparsity)))
    assert abs(1 - float(mask.double().mean()) - sparsity) <= 1e-3
    assert mask.sum(1).unique().numel() > 5
    # What goes of a row is a prefix of its scores, and the mass that goes the same share in each but for one.
    shares = (scores * ~mask).sum(1) / scores.sum(1)
    least_kept = torch.where(mask, scores, torch.inf).amin(1)
    assert (torch.where(mask, 0, scores).amax(1) <= least_kept).all()
    alpha = shares.amax()
    assert ((shares * scores.sum(1) + least_kept) / scores.sum(1) >= alpha - 1e-6).all()


@pytest.mark.parametrize("dead", [40, 64])
def test_the_variant_takes_of_dead_inputs_no_more_than_shall_go(dead):
    """ReLU leaves inputs that are always zero: all of their weights cost nothing."""
    generator = torch.Generator().manual_seed(0)
    weight, sums = torch.randn(32, 64, generator=generator), torch.rand(64, generator=generator)
    sums[:dead] = 0
    pruned = prune_weight(weight, sums, METHODS["wanda_cumulative"], parse_pattern("0.5"))
    assert int(pruned.mask.sum()) == 32 * 32
    assert pruned.mask[:, dead:].all()


def test_the_variant_of_equal_scores_ends_below():
    """Every row goes from 5 to 6 of ten at once: 0.55 is between them."""
    mask = mask_cumulative(torch.ones(3, 10), parse_pattern("0.55"))
    assert int(mask.sum()) == 3 * 5
    assert mask[:, :5].all()
    assert follows(mask, parse_pattern("0.55"))


def test_the_variant_refuses_groups():
    with pytest.raises(Act24Error, match="own share"):
        mask_cumulative(drawn(4, 8), parse_pattern("2:4"))


# -------------------------------------------------------------------------------------- SparseGPT


def obs_by_definition(weight, hessian, mask_of):
    """Optimal brain surgeon, a column at a time with the inverse of what is left, in float64: no Cholesky."""
    w, hessian = weight.double().clone(), hessian.double()
    mask = torch.ones_like(w, dtype=torch.bool)
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(hessian[j:, j:])
        mask_of(j, w, inverse, mask)
        error = torch.where(mask[:, j], 0, w[:, j]) / inverse[0, 0]
        w[:, j:] -= error[:, None] * inverse[0]
        w[:, j][~mask[:, j]] = 0
    return w, mask


@pytest.mark.parametrize("of", [4, 8])
def test_sparsegpt_is_optimal_brain_surgery(of):
    weight, x = drawn(6, 24), drawn(100, 24, seed=1) @ drawn(24, 24, seed=2)
    hessian = gram(x)
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(24)

    def choose(j, w, inverse, mask):
        if j % of == 0:
            # U_jj of the columns behind: the inverse of each trailing block has it at its head.
            diagonal = torch.stack([torch.linalg.inv(damped[i:, i:])[0, 0] for i in range(j, j + of)])
            scores = w[:, j : j + of].square() / diagonal
            for row in range(len(w)):
                mask[row, j : j + of] = torch.tensor(brute_force(scores[row].tolist(), of // 2))

    expected, expected_mask = obs_by_definition(weight, damped, choose)
    new, mask = sparsegpt(weight, hessian, parse_pattern(f"{of // 2}:{of}"))
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(new.double(), expected, rtol=2e-3, atol=2e-3)


def test_sparsegpt_of_independent_inputs_is_magnitude():
    """H = cI: nothing can make up for anything (T5)."""
    weight = drawn(8, 64)
    for text in ("0.5", "2:4"):
        new, mask = sparsegpt(weight, 7.0 * torch.eye(64), parse_pattern(text))
        by_magnitude = METHODS["magnitude"].mask(weight.abs(), parse_pattern(text))
        assert torch.equal(mask, by_magnitude)
        torch.testing.assert_close(new, masked(weight, mask))


def test_by_input_all_scores_agree():
    """Within one input column the factor of the activations is constant (T5)."""
    weight, x = drawn(32, 16), drawn(100, 16, seed=1)
    for method in ("wanda", "sparsegpt"):
        statistic = squares(x) if method == "wanda" else gram(x)
        scores = METHODS[method].score(weight, statistic)
        assert torch.equal(largest(scores.T, 16), largest(weight.abs().T, 16))


def test_sparsegpt_changes_outputs_less_than_wanda():
    # Inputs that say much the same: what is dropped can be made up for.
    weight, x = drawn(32, 256), drawn(2000, 64, seed=1) @ drawn(64, 256, seed=2) + drawn(2000, 256, seed=3)
    change = {}
    for method, statistic in (("wanda", squares(x)), ("sparsegpt", gram(x)), ("magnitude", None)):
        for text in ("0.5", "2:4"):
            pruned = prune_weight(weight, statistic, METHODS[method], parse_pattern(text))
            change[method, text] = float((x @ (weight - pruned.weight).T).norm())
            assert follows(pruned.mask, parse_pattern(text))
    for text in ("0.5", "2:4"):
        assert change["sparsegpt", text] < 0.7 * change["wanda", text]


def test_dead_inputs_are_no_fault():
    x = drawn(100, 16)
    x[:, 3] = 0
    new, mask = sparsegpt(drawn(4, 16), gram(x), parse_pattern("2:4"))
    assert torch.isfinite(new).all()
    assert (new[:, 3] == 0).all()
    assert follows(mask, parse_pattern("2:4"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [*METHODS])
def test_what_is_pruned_is_plus_zero(method, dtype):
    weight, x = drawn(8, 32).to(dtype), drawn(100, 32, seed=1)
    statistic = {"none": None, "squares": squares(x), "gram": gram(x)}[METHODS[method].statistic]
    weight[0, 0] = -0.0
    pruned = prune_weight(weight, statistic, METHODS[method], parse_pattern("0.5"))
    assert pruned.weight.dtype is dtype
    assert not torch.signbit(pruned.weight[pruned.weight == 0]).any()
    assert (pruned.weight[~pruned.mask] == 0).all()


def test_an_unknown_method_is_refused_with_the_nearest():
    with pytest.raises(Act24Error, match="did you mean 'wanda'"):
        METHODS["wand"]
    with pytest.raises(Act24Error, match="choose from"):
        METHODS["search"]  # which the public code takes and ignores
