"""A generator of a model in somebody's own loop continues as the model in evaluation mode does, update by
update, whatever its passes renew."""

from __future__ import annotations

import pytest
import torch
from rewritten_llama import IDS, loss_of, rewritten
from torch import Tensor

import act24
from act24.inference.sampling import Sampling
from act24.passes import Activation24, Pass, Relu2FFN, Weight24


def likeliest(model: act24.LlamaForCausalLM, prompt: list[int], tokens: int) -> list[int]:
    ids = [*prompt]
    with torch.no_grad():
        for _ in range(tokens):
            logits: Tensor = model.eval()(torch.tensor([ids]))
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "passes",
    [
        pytest.param([Weight24(mask_every=3)], marks=pytest.mark.slow),
        [Weight24(method="ste")],
        [Relu2FFN(), Activation24(method="mvue")],
        pytest.param([Relu2FFN(), Activation24(method="soft_dynamic")], marks=pytest.mark.slow),
    ],
    ids=lambda passes: getattr(passes[-1], "method", ""),
)
def test_it_continues_as_the_model_in_evaluation_does(passes: list[Pass]) -> None:
    """It had the masks of the last renewal, and drew at random."""
    model, pipeline = rewritten(*passes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    generator = act24.Generator(model, compiled=False)
    prompts = [row[:4].tolist() for row in IDS[:2]]
    made = set()
    for step in range(4):
        pipeline.begin_update_(step, IDS)
        loss_of(model.train()).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        found = generator.generate_ids(prompts, 6, Sampling(0.0), until_end=False)
        assert found == [likeliest(model, prompt, 6) for prompt in prompts]
        state = model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in before.items())
        made.add(str(found))
    assert len(made) > 1, "updates change what is likeliest"
    late = act24.Generator(model, compiled=False)
    assert late.generate_ids(prompts, 6, Sampling(0.0), until_end=False) == found
