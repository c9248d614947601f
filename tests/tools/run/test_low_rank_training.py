"""Low-rank runs as a whole: resumed in the middle of a cycle, on two processes, and scored on first data."""

import shutil

import children
import pytest
import torch
from safetensors.torch import load_file
from slow import slow_but

from act24.recipes.load import dump_recipe, parse_recipe
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.data import Batch
from act24.tools.run.build import build
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.step import TrainingStep
from act24.tools.run.train import train

RANKS = "attn_rank = 8\nmlp_rank = 12\n"
METHODS = {
    "loro": ('use = "low_rank"\n', ["optimizer.name=loro_adamw", "optimizer.exact_every=4"]),
    "loro, its factors refreshed": (
        'use = "low_rank"\n',
        ["optimizer.name=loro_adamw", "optimizer.exact_every=3", "optimizer.refresh=lrk"],
    ),
    "restarts": (
        'use = "low_rank"\n',
        ["optimizer.name=loro_adamw", "optimizer.type=eucl", "optimizer.restarts=4"],
    ),
    "cola": ('use = "cola"\n', ["optimizer.name=cola_adamw", "optimizer.momentum_reset_steps=4"]),
    "lost": ('use = "lost"\nsparsity = 0.1\nmethod = "gradient"\n', ["optimizer.name=adamw_lost"]),
}


def recipe_of(tiny, method, *overrides):
    options, optimizer = METHODS[method]
    text = dump_recipe(tiny("train.steps=10", "eval.every=0", "log.weight_sparsity_every=0"))
    text = text.partition("[[passes]]")[0] + f"[[passes]]\n{options}{RANKS}"
    return parse_recipe(text, "test", [*optimizer, *overrides])


def weights(run_dir):
    return load_file(checkpoint_folder.latest(run_dir) / "model.safetensors")


@pytest.mark.parametrize("method", slow_but(("loro, its factors refreshed", "cola"), METHODS))
def test_a_run_resumed_in_the_middle_of_a_cycle_is_bit_exact(tiny, tmp_path, method):
    recipe = recipe_of(tiny, method, "checkpoint.every=6")
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "parts")
    *_, last = checkpoint_folder.complete(tmp_path / "parts")
    shutil.rmtree(last)  # as if the run had been lost after the sixth step
    again = train(recipe, tmp_path / "parts", resume="auto")
    assert again.step == whole.step == 10
    assert again.evaluation.loss == whole.evaluation.loss
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def steps_on(recipe, processes, per_process):
    """Weights after training steps on the same rows, shared out over the processes, and their losses."""
    built = build(recipe, processes.device)
    step = TrainingStep(built.model, recipe.train, processes, built.pipeline)
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline, processes=processes)
    losses = []
    for index in range(5):
        ids = torch.randint(300, (2, 4, 17), generator=torch.Generator().manual_seed(index))
        batches = [Batch(rows[:, :-1], rows[:, 1:]) for rows in ids]
        mine = batches[processes.rank * per_process :][:per_process]
        losses.append(step(mine, optimizer).loss.item())
    state = {
        n: v.full_tensor() if hasattr(v, "full_tensor") else v for n, v in built.model.state_dict().items()
    }
    return state, losses


def compare(recipe, expected, losses):
    with open_processes() as processes:
        state, mine = steps_on(recipe, processes, per_process=1)
        assert mine == pytest.approx(losses, rel=1e-5)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            if name.endswith("weight_in"):  # factors may differ by the signs of singular vectors
                out = name.replace("weight_in", "weight_out")
                value, wanted = state[out] @ value, expected[out] @ expected[name]
            elif name.endswith("weight_out"):
                continue
            else:
                wanted = expected[name]
            torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", ["loro", "cola"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_train_like_one(tiny, method, parallel):
    """Losses and weights, with an exact update or a reset of moments among the steps."""
    recipe = recipe_of(tiny, method, f"train.parallel={parallel}", "log.activation_statistics=false")
    alone = Processes(0, 1, torch.device("cpu"))
    children.run_ranks(2, compare, recipe, *steps_on(recipe, alone, per_process=2))
