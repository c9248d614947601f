"""The exact step against the truncated SVD of W - lr P_T(G), formed by brute force in float64."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.low_rank.diagnostics import balance, largest_singular_value
from act24.low_rank.exact_step import exact_step, refactor


def brute_force(weight_in, weight_out, gradient, lr):
    """W - lr P_T(G) for one module, with projectors from the pseudo-inverse, and its SVD."""
    onto_rows = torch.linalg.pinv(weight_in) @ weight_in
    onto_columns = weight_out @ torch.linalg.pinv(weight_out)
    tangent = onto_columns @ gradient + gradient @ onto_rows - onto_columns @ gradient @ onto_rows
    return torch.linalg.svd(weight_out @ weight_in - lr * tangent, full_matrices=False)


def problem(n, out_features, in_features, rank, seed, scale=1.0):
    """Factors, a gradient of their product, and the factors' gradients; float64."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(n, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight_in, weight_out = draw(rank, in_features), draw(out_features, rank)
    gradient = scale * draw(out_features, in_features)
    return weight_in, weight_out, gradient, weight_out.mT @ gradient, gradient @ weight_in.mT


def error(step, u, s, vh):
    """Largest entry of the difference to the best approximation, relative to its largest singular value."""
    rank = step.singular.shape[-1]
    best = (u[..., :rank] * s[..., None, :rank]) @ vh[..., :rank, :]
    return ((step.weight_out.double() @ step.weight_in.double() - best).abs().max() / s.max()).item()


@given(
    out_features=st.integers(2, 24),
    in_features=st.integers(2, 24),
    data=st.data(),
    lr=st.sampled_from([1e-3, 0.1, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_truncated_svd(out_features, in_features, data, lr, seed):
    """Any shape and rank, 2R above a side of W too; balanced factors, in order of the singular values."""
    rank = data.draw(st.integers(1, min(out_features, in_features)))
    weight_in, weight_out, gradient, grad_in, grad_out = problem(2, out_features, in_features, rank, seed)
    u, s, vh = brute_force(weight_in, weight_out, gradient, lr)
    following = s[..., rank] if rank < s.shape[-1] else torch.zeros(2)
    assume((s[..., rank - 1] > 1.01 * following).all())  # else the best approximation is not unique
    assume((s[..., 0] < 300 * s[..., rank - 1]).all())
    step = exact_step(weight_in, weight_out, grad_in, grad_out, lr)
    assert step.valid.all()
    assert error(step, u, s, vh) < 1e-12
    torch.testing.assert_close(step.singular, s[..., :rank], rtol=1e-9, atol=1e-12)
    diagonal = torch.diag_embed(step.singular)
    for gram in (step.weight_in @ step.weight_in.mT, step.weight_out.mT @ step.weight_out):
        assert (gram - diagonal).abs().max() < 1e-9 * step.singular.max()


def test_float32_factors_lose_one_rounding():
    weight_in, weight_out, gradient, grad_in, grad_out = problem(3, 96, 64, 16, seed=0)
    single = [t.float() for t in (weight_in, weight_out, grad_in, grad_out)]
    step = exact_step(*single, 0.05)
    assert step.weight_in.dtype == step.weight_out.dtype == torch.float32
    exact = [t.double() for t in single[:2]]
    assert error(step, *brute_force(*exact, gradient, 0.05)) < 1e-5


@given(seed=st.integers(0, 1000))
def test_the_result_does_not_depend_on_how_the_product_is_split(seed):
    weight_in, weight_out, gradient, grad_in, grad_out = problem(1, 14, 11, 4, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    change = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    assume(torch.linalg.cond(change) < 50)
    step = exact_step(weight_in, weight_out, grad_in, grad_out, 0.1)
    assume(step.singular[0, 0] < 100 * step.singular[0, -1])
    other_in, other_out = torch.linalg.solve(change, weight_in), weight_out @ change
    other = exact_step(other_in, other_out, other_out.mT @ gradient, gradient @ other_in.mT, 0.1)
    torch.testing.assert_close(
        other.weight_out @ other.weight_in, step.weight_out @ step.weight_in, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("what", ["no step", "zero gradient"])
def test_without_a_step_the_product_stays(what):
    weight_in, weight_out, _, grad_in, grad_out = problem(2, 20, 16, 5, seed=1)
    if what == "zero gradient":
        step = exact_step(weight_in, weight_out, 0 * grad_in, 0 * grad_out, 0.1)
    else:
        step = exact_step(weight_in, weight_out, grad_in, grad_out, 0.0)
    assert step.valid.all()
    torch.testing.assert_close(
        step.weight_out @ step.weight_in, weight_out @ weight_in, rtol=1e-12, atol=1e-12
    )


def test_a_rank_deficient_residual_is_no_obstacle():
    """G has rank one, so Y₁ and Y₂ have: a QR basis of them would be noise."""
    weight_in, weight_out, _, _, _ = problem(2, 30, 20, 6, seed=2)
    generator = torch.Generator().manual_seed(3)
    left = torch.randn(2, 30, 1, generator=generator, dtype=torch.float64)
    right = torch.randn(2, 1, 20, generator=generator, dtype=torch.float64)
    gradient = left @ right
    step = exact_step(weight_in, weight_out, weight_out.mT @ gradient, gradient @ weight_in.mT, 0.3)
    assert error(step, *brute_force(weight_in, weight_out, gradient, 0.3)) < 1e-12


def test_adams_directions_follow_the_published_formulas():
    """Directions that belong to no common gradient: the 2R x 2R core of LORO's Algorithm 2, with QR."""
    weight_in, weight_out, _, direction_in, direction_out = (t[0] for t in problem(1, 18, 15, 4, seed=4))
    direction_in, direction_out, lr, rank = direction_in.sign(), direction_out.sign(), 0.2, 4
    u, r_out = torch.linalg.qr(weight_out)
    v, r_in = torch.linalg.qr(weight_in.T)
    gv = torch.linalg.solve(r_in.T, direction_out.T).T
    utg = torch.linalg.solve(r_out.T, direction_in)
    q1, k1 = torch.linalg.qr((utg - utg @ v @ v.T).T)
    q2, k2 = torch.linalg.qr(gv - u @ (u.T @ gv))
    core = torch.cat(
        (
            torch.cat((r_out @ r_in.T - lr * utg @ v, -lr * k1.T), 1),
            torch.cat((-lr * k2, torch.zeros(rank, rank, dtype=torch.float64)), 1),
        )
    )
    a, s, bh = torch.linalg.svd(core)
    expected = torch.cat((u, q2), 1) @ a[:, :rank] * s[:rank] @ bh[:rank] @ torch.cat((v, q1), 1).T
    step = exact_step(weight_in[None], weight_out[None], direction_in[None], direction_out[None], lr)
    torch.testing.assert_close(step.weight_out[0] @ step.weight_in[0], expected, rtol=1e-11, atol=1e-11)


def test_modules_of_a_stack_do_not_touch_each_other():
    tensors = problem(3, 12, 10, 3, seed=5)
    together = exact_step(*(tensors[i] for i in (0, 1, 3, 4)), 0.1)
    alone = exact_step(*(tensors[i][1:2] for i in (0, 1, 3, 4)), 0.1)
    torch.testing.assert_close(
        together.weight_out[1] @ together.weight_in[1], alone.weight_out[0] @ alone.weight_in[0]
    )


def ill_conditioned(weight_in, weight_out, grad_in, grad_out):
    weight_out[1, :, 2] = weight_out[1, :, 0] * (1 + 1e-9)


def constant(weight_in, weight_out, grad_in, grad_out):
    weight_out[1] = weight_in[1] = 0.1


def zero(weight_in, weight_out, grad_in, grad_out):
    weight_in[1] = 0


def not_finite(weight_in, weight_out, grad_in, grad_out):
    grad_in[1, 0, 0] = torch.nan


@pytest.mark.parametrize("spoil", [ill_conditioned, constant, zero, not_finite])
def test_bad_factors_are_reported_and_spoil_no_others(spoil):
    weight_in, weight_out, gradient, grad_in, grad_out = problem(3, 12, 10, 3, seed=6)
    good = [t[::2].clone() for t in (weight_in, weight_out, gradient)]
    spoil(weight_in, weight_out, grad_in, grad_out)
    step = exact_step(weight_in, weight_out, grad_in, grad_out, 0.1)
    assert step.valid.tolist() == [True, False, True]
    rest = type(step)(*(t[::2] for t in (step.weight_in, step.weight_out, step.singular, step.valid)))
    assert error(rest, *brute_force(*good, 0.1)) < 1e-12


@given(seed=st.integers(0, 1000), rank=st.integers(1, 6))
def test_refactoring_keeps_the_product_and_balances(seed, rank):
    weight_in, weight_out, _, _, _ = problem(2, 9, 7, rank, seed)
    s = torch.linalg.svdvals(weight_out @ weight_in)[..., :rank]
    assume((s[..., 0] < 300 * s[..., -1]).all())
    new = refactor(weight_in, 5 * weight_out)
    torch.testing.assert_close(new.weight_out @ new.weight_in, 5 * weight_out @ weight_in)
    torch.testing.assert_close(new.singular, 5 * s)
    torch.testing.assert_close(balance(new.weight_in, new.weight_out), torch.ones(2))
    gram = new.weight_in @ new.weight_in.mT
    torch.testing.assert_close(gram, torch.diag_embed(new.singular), rtol=0, atol=1e-9 * s.max().item())


def test_the_largest_singular_value_is_that_of_the_product():
    weight_in, weight_out, _, _, _ = problem(3, 40, 30, 8, seed=7)
    expected = torch.linalg.matrix_norm(weight_out @ weight_in, ord=2).float()
    torch.testing.assert_close(largest_singular_value(weight_in, weight_out), expected, rtol=1e-2, atol=0)
    many = largest_singular_value(weight_in, weight_out, iterations=300)
    torch.testing.assert_close(many, expected, rtol=1e-5, atol=0)
    assert largest_singular_value(0 * weight_in, weight_out).tolist() == [0, 0, 0]


def test_balance_is_the_ratio_of_norms():
    weight_in, weight_out, _, _, _ = problem(2, 5, 6, 2, seed=8)
    expected = torch.tensor(
        [(o.norm() / i.norm()).item() for i, o in zip(weight_in, weight_out, strict=True)]
    )
    torch.testing.assert_close(balance(weight_in, weight_out), expected)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"weight_in": torch.zeros(3, 5)}, r"\[n, R, in\] and \[n, out, R\], got \[3, 5\]"),
        ({"weight_in": torch.zeros(2, 4, 5)}, r"got \[2, 4, 5\] and \[2, 7, 3\]"),
        ({"weight_in": torch.zeros(1, 3, 5)}, r"got \[1, 3, 5\]"),
        ({"direction_in": torch.zeros(2, 5, 3)}, r"as the factors are, got \[2, 5, 3\]"),
        ({"direction_out": torch.zeros(7, 3)}, r"and \[7, 3\]"),
        ({"lr": -0.1}, "lr has to be 0 or more"),
        ({"lr": float("nan")}, "lr has to be finite and 0 or more, got nan"),
    ],
)
def test_what_does_not_belong_together_is_refused(change, named):
    weight_in, weight_out, _, direction_in, direction_out = problem(2, 7, 5, 3, seed=0)
    good = {
        "weight_in": weight_in,
        "weight_out": weight_out,
        "direction_in": direction_in,
        "direction_out": direction_out,
        "lr": 0.1,
    }
    assert exact_step(**good).valid.all()
    with pytest.raises(Act24Error, match=named):
        exact_step(**{**good, **change})
