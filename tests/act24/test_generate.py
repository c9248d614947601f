"""Sampling: greedy by hand, random draws by their distribution."""

from __future__ import annotations

import pytest
import torch

from act24.errors import Act24Error
from act24.generate import generate
from act24.initialise import build_llama
from act24.llama import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=31,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    initializer_range=0.5,
)
PROMPT = torch.tensor([[3, 1, 4], [1, 5, 9]])


def test_greedy_is_argmax_of_the_last_position() -> None:
    model = build_llama(CONFIG, seed=0)
    expected = PROMPT
    for _ in range(8):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    tokens = generate(model, PROMPT, max_new_tokens=8, temperature=0.0)
    assert torch.equal(tokens, expected)
    assert torch.equal(generate(model, PROMPT, 8, temperature=1.0, top_k=1), expected)


def test_the_generator_alone_decides() -> None:
    model = build_llama(CONFIG, seed=0)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(torch.seed())
        draws.append(generate(model, PROMPT, 12, generator=torch.Generator().manual_seed(seed)))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0][:, :3], PROMPT)


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (2.0, 3), (1.0, 99)])
def test_draws_follow_the_tempered_truncated_distribution(temperature: float, top_k: int | None) -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 1.5, 0.0])
    kept = logits.argsort(descending=True)[:top_k]
    expected = torch.zeros(5)
    expected[kept] = (logits[kept] / temperature).exp() / (logits[kept] / temperature).exp().sum()
    samples = 20000
    tokens = generate(
        lambda ids: logits.expand(*ids.shape, 5),
        torch.zeros(samples, 1, dtype=torch.int64),
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k,
        generator=torch.Generator().manual_seed(0),
    )
    frequency = tokens[:, 1].bincount(minlength=5) / samples
    assert torch.equal(frequency > 0, expected > 0)
    assert (frequency - expected).abs().max() < 4 * 0.5 / samples**0.5


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, None), (1.0, None), (1.0, 2), (1.0, 99)])
def test_what_is_not_allowed_is_never_drawn(temperature: float, top_k: int | None) -> None:
    logits = torch.tensor([0.3, 9.0, 2.0, 1.5, 9.0])
    allowed = torch.tensor([True, False, True, True, False])
    tokens = generate(
        lambda ids: logits.expand(*ids.shape, 5),
        torch.zeros(2000, 1, dtype=torch.int64),
        max_new_tokens=1,
        temperature=temperature,
        top_k=top_k,
        allowed=allowed,
    )
    drawn = {2} if temperature == 0 else {2, 3} if top_k == 2 else {0, 2, 3}
    assert set(tokens[:, 1].tolist()) == drawn


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"temperature": -0.1}, "-0.1"),
        ({"top_k": 0}, "top_k"),
        ({"allowed": torch.zeros(31, dtype=torch.bool)}, "no token"),
    ],
)
def test_bad_options_are_named(options: dict, told: str) -> None:
    with pytest.raises(Act24Error, match=told):
        generate(build_llama(CONFIG, seed=0), PROMPT, 1, **options)
