"""Draws by their distribution."""

from __future__ import annotations

import pytest
import torch

from act24.errors import Act24Error
from act24.inference.sampling import Sampling, next_token

LOGITS = torch.tensor([0.3, -1.0, 2.0, 1.5, 0.0])
SAMPLES = 20_000


def draw(
    sampling: Sampling, allowed: torch.Tensor | None = None, logits: torch.Tensor = LOGITS
) -> torch.Tensor:
    """Frequencies over many positions and seeds."""
    seeds, positions = torch.arange(SAMPLES) % 100, torch.arange(SAMPLES) // 100
    tokens = next_token(logits.expand(SAMPLES, -1), sampling, seeds, positions, allowed)
    return tokens.bincount(minlength=len(logits)) / SAMPLES


def expected(temperature: float, kept: torch.Tensor) -> torch.Tensor:
    weights = torch.zeros(5, dtype=torch.float64)
    weights[kept] = (LOGITS[kept].double() / temperature).exp()
    return (weights / weights.sum()).float()


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 99), (1.0, 1)])
def test_draws_follow_the_tempered_truncated_distribution(temperature, top_k):
    wanted = expected(temperature, LOGITS.argsort(descending=True)[:top_k])
    frequency = draw(Sampling(temperature, top_k))
    assert torch.equal(frequency > 0, wanted > 0)
    assert (frequency - wanted).abs().max() < 4 * 0.5 / SAMPLES**0.5


@pytest.mark.parametrize(
    ("top_p", "temperature", "kept"),
    # softmax: 0.09, 0.02, 0.49, 0.30, 0.07
    [(0.01, 1.0, [2]), (0.48, 1.0, [2]), (0.6, 1.0, [2, 3]), (0.85, 1.0, [2, 3, 0]), (1.0, 1.0, range(5))],
)
def test_top_p_keeps_the_fewest_tokens_of_that_mass(top_p, temperature, kept):
    wanted = expected(temperature, torch.tensor(list(kept)))
    frequency = draw(Sampling(temperature, top_p=top_p))
    assert torch.equal(frequency > 0, wanted > 0)
    assert (frequency - wanted).abs().max() < 4 * 0.5 / SAMPLES**0.5


def test_top_p_counts_what_top_k_left():
    # Of 2.0 and 1.5 the first has 0.62.
    assert set(draw(Sampling(1.0, top_k=2, top_p=0.6)).nonzero().flatten().tolist()) == {2}
    assert set(draw(Sampling(1.0, top_k=2, top_p=0.63)).nonzero().flatten().tolist()) == {2, 3}


@pytest.mark.parametrize(
    "sampling", [Sampling(0.0), Sampling(1.0), Sampling(1.0, 2), Sampling(1.0, 99, 0.99)]
)
def test_what_is_not_allowed_is_never_drawn(sampling):
    allowed = torch.tensor([True, False, True, True, False])
    logits = torch.tensor([0.3, 9.0, 2.0, 1.5, 9.0])
    drawn = set(draw(sampling, allowed, logits).nonzero().flatten().tolist())
    assert drawn == ({2} if sampling.temperature == 0 else {2, 3} if sampling.top_k == 2 else {0, 2, 3})


@pytest.mark.parametrize("temperature", [1e-5, 1e-6, 1e-30, 1e-320])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_the_coldest_draws_are_greedy(temperature, top_p):
    assert draw(Sampling(temperature, top_p=top_p))[2] == 1
    assert draw(Sampling(temperature, top_p=top_p), logits=torch.tensor([0.0, -1e30, 5.0]))[2] == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -0.1}, "temperature has to be 0 or more, got -0.1"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k has to be 1 or more, got 0"),
        ({"top_p": 0.0}, "top_p has to be above 0"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_bad_options_are_named(options, told):
    with pytest.raises(Act24Error, match=told):
        Sampling(**options)
