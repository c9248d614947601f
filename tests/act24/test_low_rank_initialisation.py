"""First values: their scale on the output against the formulas, and LoST's split against a plain SVD."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.initialise import generator_for
from act24.low_rank.initialisation import initial_factors
from act24.low_rank.lost import kept_columns, low_rank_and_scores, random_columns, top_columns
from act24.low_rank.truncation import right_spectrum, truncated_factors


def factors(init, out_features, in_features, rank, dense=None):
    generators = (generator_for(0, "weight_in"), generator_for(0, "weight_out"))
    dense = torch.empty(out_features, in_features) if dense is None else dense
    return initial_factors(init, dense, rank, *generators)


# Output standard deviation for inputs of unit variance, 768 → 768 and 768 → 2048, R 256: sqrt(in) times the
# standard deviation of the product's entries.
OUTPUT = {
    "xavier": (0.866, 0.577),  # sqrt(4 R in / ((in + R) (out + R)))
    "auto": (0.554, 0.554),  # 0.02 sqrt(in)
    "kaiming": (2.0, 2.0),  # two gains of sqrt(2)
    "cola": (0.707, 0.522),  # sqrt(in / (in + out))
    "orth": (0.577, 0.354),  # sqrt(R / out)
    "xavorth": (0.866, 0.577),
    "randn_0.05": (0.05**2 * math.sqrt(256 * 768),) * 2,
    "const_0.01": (0.01**2 * 256 * math.sqrt(768),) * 2,
}


@pytest.mark.parametrize("init", OUTPUT)
def test_the_scale_of_the_output(init):
    x = torch.randn(2048, 768, generator=torch.Generator().manual_seed(1))
    for out_features, expected in zip((768, 2048), OUTPUT[init], strict=True):
        weight_in, weight_out = factors(init, out_features, 768, 256)
        assert (weight_in.shape, weight_out.shape) == ((256, 768), (out_features, 256))
        measured = (x @ weight_in.T @ weight_out.T).square().mean().sqrt().item()
        assert measured == pytest.approx(expected, rel=0.03)


def test_orthogonal_factors_are_orthogonal():
    for init in ("orth", "xavorth"):
        weight_in, weight_out = factors(init, 40, 60, 8)
        for gram in (weight_in @ weight_in.T, weight_out.T @ weight_out):
            scale = gram.diagonal().mean()
            torch.testing.assert_close(gram / scale, torch.eye(8), rtol=0, atol=1e-5)


def test_each_factor_has_a_generator_of_its_own():
    one = factors("xavier", 12, 10, 3)
    other = initial_factors(
        "xavier", torch.empty(12, 10), 3, generator_for(0, "weight_in"), generator_for(1, "weight_out")
    )
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ("xavir", "did you mean 'xavier'"),
        ("randn_0", "above 0"),
        ("const_1e", "above 0"),
        ("", "choose from"),
    ],
)
def test_unknown_inits_are_named(init, message):
    with pytest.raises(Act24Error, match=message):
        factors(init, 4, 4, 2)


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def stack(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, *shape, generator=generator, dtype=torch.float64)


@given(shape=shapes, data=st.data())
def test_truncated_factors_are_the_best_approximation(shape, data):
    dense = stack(shape)
    rank = data.draw(st.integers(1, min(shape)))
    weight_in, weight_out = truncated_factors(dense, rank)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    torch.testing.assert_close(weight_out @ weight_in, best, rtol=0, atol=1e-6)
    # √s on each side: the factors are balanced.
    for gram in (weight_in @ weight_in.mT, weight_out.mT @ weight_out):
        torch.testing.assert_close(gram, torch.diag_embed(s[..., :rank]), rtol=0, atol=1e-6)


def test_truncated_factors_of_a_rank_deficient_weight_are_finite():
    dense = torch.ones(1, 6, 5)
    weight_in, weight_out = truncated_factors(dense, 3)
    assert weight_in.isfinite().all()
    torch.testing.assert_close(weight_out @ weight_in, dense, rtol=0, atol=1e-5)
    weight_in, weight_out = truncated_factors(0 * dense, 3)
    assert not weight_in.any()
    assert not weight_out.any()


@given(shape=shapes)
def test_the_right_spectrum_rebuilds_the_gram_matrix(shape):
    dense = stack(shape, seed=1)
    singular, scaled = right_spectrum(dense)
    torch.testing.assert_close(singular, torch.linalg.svdvals(dense), rtol=0, atol=1e-6)
    torch.testing.assert_close(scaled.mT @ scaled, dense.mT @ dense)


@given(shape=shapes, data=st.data(), window=st.integers(0, 6))
def test_lost_scores_are_the_column_norms_of_what_is_left(shape, data, window):
    dense = stack(shape, seed=2)
    rank = data.draw(st.integers(1, min(shape)))
    weight_in, weight_out, scores = low_rank_and_scores(dense, rank, window)
    u, s, vh = torch.linalg.svd(dense, full_matrices=False)
    end = rank + window if window else min(shape)
    rest = (u[..., rank:end] * s[..., None, rank:end]) @ vh[..., rank:end, :]
    torch.testing.assert_close(scores, rest.norm(dim=-2), rtol=0, atol=1e-6)
    if not window:
        torch.testing.assert_close(weight_out @ weight_in + rest, dense, rtol=0, atol=1e-6)
        top = top_columns(scores, 1)[..., 0]
        assert torch.equal(top, rest.norm(dim=-2).argmax(-1)) or rest.norm() < 1e-5


def test_top_columns_are_those_of_highest_score_in_ascending_order():
    scores = torch.tensor([[3.0, 1.0, 9.0, 4.0], [0.0, 5.0, 1.0, 2.0]])
    assert top_columns(scores, 2).tolist() == [[2, 3], [1, 3]]


def test_density_keeps_its_share_and_at_least_one():
    assert [kept_columns(512, share) for share in (0.01, 0.05, 1.0, 1e-6)] == [5, 25, 512, 1]


def test_random_columns_are_distinct_ascending_and_seeded():
    drawn = random_columns(100, 10, generator_for(0, "a"))
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == 10
    assert torch.equal(drawn, random_columns(100, 10, generator_for(0, "a")))
    assert not torch.equal(drawn, random_columns(100, 10, generator_for(0, "b")))


@pytest.mark.parametrize(
    "call",
    [
        lambda: initial_factors("svd", torch.zeros(4, 6), 5, torch.Generator(), torch.Generator()),
        lambda: initial_factors("xavier", torch.zeros(4, 6), 0, torch.Generator(), torch.Generator()),
        lambda: initial_factors("randn_1e999", torch.zeros(4, 6), 2, torch.Generator(), torch.Generator()),
        lambda: initial_factors(
            "auto", torch.zeros(4, 6), 2, torch.Generator(), torch.Generator(), initializer_range=math.inf
        ),
        lambda: truncated_factors(torch.zeros(1, 4, 6), 5),
        lambda: low_rank_and_scores(torch.zeros(1, 4, 6), 2, window=-1),
        lambda: kept_columns(8, 0.0),
        lambda: kept_columns(8, math.nan),
        lambda: top_columns(torch.zeros(1, 6), 7),
        lambda: random_columns(6, 7, torch.Generator()),
    ],
)
def test_numbers_out_of_range_are_refused(call):
    with pytest.raises(Act24Error):
        call()


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [0, 2])
def test_directions_of_a_weight_that_are_zero_can_train(shape, rank):
    """Of float32 weights of lower rank than asked, in float64 autograd: all rows of both factors move."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(side, rank, generator=generator) for side in shape)
    dense = left @ right.mT
    factors = initial_factors("svd", dense, 5, generator_for(0, "a"), generator_for(0, "b"))
    weight_in, weight_out = (factor.double().requires_grad_() for factor in factors)
    torch.testing.assert_close(weight_out @ weight_in, dense.double(), rtol=0, atol=1e-5)
    assert not weight_out[:, rank:].any()
    assert (weight_in.norm(dim=1) > 0.1).all()
    (weight_out @ weight_in).sin().sum().backward()
    assert (weight_out.grad.norm(dim=0) > 1e-3).all()
