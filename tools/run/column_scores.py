"""What `lost` with `method = "gradient"` asks of the shell: how much the first batch pulls at each column."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from act24.initialise import build_llama
from act24.loss import cross_entropy_sum
from act24.passes import Lost, apply_
from act24.recipes.schema import Recipe
from act24.tools.data import Batch
from act24.tools.run.build import model_config, parameter_dtype
from act24.tools.run.processes import Processes


def measure_column_scores(
    recipe: Recipe, names: Sequence[str], batch: Batch, processes: Processes
) -> dict[str, Tensor]:
    """The norm of each column of a dense weight's gradient on one batch, averaged over processes.

    The weights are those of the recipe's model before `lost`: what passes in front of it leave. Costs one
    forward and backward of a dense model that is thrown away.

    Args:
        names: weights `[out, in]`, from `Pipeline.needs_column_scores`.
        batch: the first of this process.

    Returns:
        float32 `[in]` for each, to be handed to `Pipeline.commit_`.
    """
    model = build_llama(model_config(recipe), recipe.train.seed, processes.device, parameter_dtype(recipe))
    before = next(i for i, p in enumerate(recipe.passes) if isinstance(p, Lost))
    apply_(model, recipe.passes[:before], seed=recipe.train.seed)
    autocast = recipe.train.dtype == "bfloat16_autocast"
    with torch.autocast(processes.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.model(batch.input_ids.to(processes.device))
        loss, count = cross_entropy_sum(hidden, model.head_weight, batch.labels.to(processes.device))
    (loss / count.clamp(min=1)).backward()
    scores = {}
    for name in names:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        scores[name] = processes.sum_(gradient.float().norm(dim=0)) / processes.world_size
    return scores
