"""What passes want to know of the model before they replace its weights (`Pipeline.measurements`).

Each measurement is one record of `MEASURES`, under the name that the pass asks by.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from act24.initialise import build_llama
from act24.loss import cross_entropy_sum
from act24.passes import Lost, apply_
from act24.passes.document_attention import set_starts_
from act24.passes.graph.measurements import Measurement
from act24.passes.lost import COLUMN_SCORES
from act24.recipes.schema import Recipe
from act24.records import Table
from act24.tools.data import Batch
from act24.tools.run.build import attention_passes, check_attention, model_config, parameter_dtype
from act24.tools.run.processes import Processes

#: (recipe, what is wanted by name, the first batch of this process, processes) -> results by name.
Make = Callable[[Recipe, Mapping[str, Measurement], Batch, Processes], dict[str, Tensor]]


@dataclass(frozen=True)
class Measure:
    """A measurement that a training loop can make."""

    name: str
    make: Make


def measure(
    recipe: Recipe, wanted: Mapping[str, Measurement], batch: Batch, processes: Processes
) -> dict[str, Tensor]:
    """Measure all that passes want. Collective; all processes get the same results.

    Args:
        wanted: `Pipeline.measurements`.
        batch: the first of this process.

    Returns:
        what `Pipeline.commit_` takes.

    Raises:
        OptionError: a pass asks for something that is not in `MEASURES`.
    """
    results: dict[str, Tensor] = {}
    for what in dict.fromkeys(one.what for one in wanted.values()):
        of_this_kind = {name: one for name, one in wanted.items() if one.what == what}
        results |= MEASURES[what].make(recipe, of_this_kind, batch, processes)
    return results


def column_scores(
    recipe: Recipe, wanted: Mapping[str, Measurement], batch: Batch, processes: Processes
) -> dict[str, Tensor]:
    """The norm of each column of a dense weight's gradient on one batch, averaged over processes.

    The weights are those of the recipe's model before `lost`, which passes in front of it may have changed.
    It costs one forward and backward of a dense model that is thrown away.

    Returns:
        float32 `[in]` for each weight `[out, in]`.
    """
    model = build_llama(model_config(recipe), recipe.train.seed, processes.device, parameter_dtype(recipe))
    before = next(i for i, p in enumerate(recipe.passes) if isinstance(p, Lost))
    pipeline = apply_(model, [*recipe.passes[:before], *attention_passes(recipe)], seed=recipe.train.seed)
    check_attention(recipe, pipeline)
    set_starts_(pipeline, None if batch.starts is None else batch.starts.to(processes.device))
    autocast = recipe.train.dtype == "bfloat16_autocast"
    with torch.autocast(processes.device.type, torch.bfloat16, enabled=autocast):
        hidden = model.model(batch.input_ids.to(processes.device))
        loss, count = cross_entropy_sum(hidden, model.head_weight, batch.labels.to(processes.device))
    (loss / count.clamp(min=1)).backward()
    scores = {}
    for name, one in wanted.items():
        gradient = model.get_parameter(one.parameter).grad
        assert gradient is not None
        scores[name] = processes.sum_(gradient.float().norm(dim=0)) / processes.world_size
    return scores


MEASURES: Table[Measure] = Table("measurement", Measure(COLUMN_SCORES, column_scores))
