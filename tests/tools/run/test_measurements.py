"""Column scores against gradients taken by hand, on one process and averaged over two."""

import children
import pytest
import torch
from torch.nn import functional as F

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.passes import Pipeline
from act24.passes.graph.measurements import Measurement
from act24.recipes.load import dump_recipe, parse_recipe
from act24.tools.data import Batch
from act24.tools.run.build import model_config
from act24.tools.run.measurements import measure
from act24.tools.run.processes import Processes, open_processes

LOST = """
[[passes]]
use = "lost"
attn_rank = 8
mlp_rank = 8
method = "gradient"
"""


def recipe_of(tiny):

    text = dump_recipe(tiny())
    return parse_recipe(text.partition("[[passes]]")[0] + LOST, "test")


def batch_of(rank):
    ids = torch.randint(300, (4, 17), generator=torch.Generator().manual_seed(rank))
    labels = ids[:, 1:].clone()
    labels[0, :3] = -100
    return Batch(ids[:, :-1], labels)


def by_hand(recipe, rank):
    model = build_llama(model_config(recipe), recipe.train.seed)
    batch = batch_of(rank)
    F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.labels.flatten()).backward()
    return {name: p.grad.norm(dim=0) for name, p in model.named_parameters() if p.ndim == 2}


def check(recipe, expected):
    with open_processes() as processes:
        model = build_llama(model_config(recipe), recipe.train.seed)
        pipeline = Pipeline(model, recipe.passes)
        wanted = pipeline.measurements
        scores = measure(recipe, wanted, batch_of(processes.rank), processes)
        assert len(scores) == 14
        for name, value in scores.items():
            torch.testing.assert_close(value, expected[wanted[name].parameter], rtol=1e-4, atol=1e-7)
        pipeline.commit_(scores)


def test_scores_are_the_column_norms_of_the_dense_gradient(tiny):
    recipe = recipe_of(tiny)
    expected = by_hand(recipe, 0)
    single = Processes(0, 1, torch.device("cpu"))
    names = [name for name in expected if "proj" in name]
    wanted = {name: Measurement("column_scores", name, tuple(expected[name].shape)) for name in names}
    for name, value in measure(recipe, wanted, batch_of(0), single).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7)


def test_a_measurement_that_nobody_makes_is_named(tiny):
    wanted = {"x": Measurement("column_score", "x", (4,))}
    with pytest.raises(Act24Error, match="no measurement named 'column_score': did you mean 'column_scores'"):
        measure(recipe_of(tiny), wanted, batch_of(0), Processes(0, 1, torch.device("cpu")))


def test_two_processes_average(tiny):
    recipe = recipe_of(tiny)
    first, second = by_hand(recipe, 0), by_hand(recipe, 1)
    children.run_ranks(2, check, recipe, {name: (first[name] + second[name]) / 2 for name in first})
