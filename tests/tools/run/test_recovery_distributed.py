"""Two processes train what a pruned model kept, replicated or sharded, and keep its zeros."""

import pytest
import torch
from children import run_ranks
from safetensors.torch import load_file

from act24.tools.pruning.folder import prune_model
from act24.tools.pruning.masks import read_masks
from act24.tools.run.build import load
from act24.tools.run.train import train
from tests.tools.run.test_pretrained import DENSE, branch, recipe
from tests.tools.tiny import write_recipe

pytestmark = pytest.mark.slow  # two processes each, for ten seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from act24.tools.commands.recovery import calibration_data

    folder = tmp_path_factory.mktemp("distributed")
    write_recipe(folder)
    train(recipe(folder, "train.steps=6", DENSE), folder / "warm")
    data = calibration_data(str(folder / "train-*.txt"), ())
    prune_model(str(folder / "warm"), folder / "pruned", data=data, samples=8, seqlen=16)
    return folder


def run(folder, use, parallel, out):
    batch = ("train.batch_size=4", "train.total_batch_size=8", f"train.parallel={parallel}")
    train(branch(folder, folder / "pruned", [{"use": use}], "train.steps=4", *batch), out)


@pytest.mark.parametrize("use", ["sparse_mask", "lora", "masked_lora"])
def test_two_processes_keep_the_zeros(use, folder, tmp_path):
    """Sharded parameters take their part of each mask: they end where replicas do."""
    for parallel in ("ddp", "fsdp"):
        run_ranks(2, run, folder, use, parallel, tmp_path / parallel)
    replicas, shards = (load(tmp_path / name).model.state_dict() for name in ("ddp", "fsdp"))
    before, masks = load_file(folder / "pruned" / "model.safetensors"), read_masks(folder / "pruned").masks
    for name, mask in masks.items():
        for state in (replicas, shards):
            assert (state[name][~mask] == 0).all()
            assert torch.equal(state[name], before[name]) is (use != "sparse_mask")
    for name, value in replicas.items():
        if value.is_floating_point():
            torch.testing.assert_close(shards[name], value, rtol=1e-3, atol=1e-4)
