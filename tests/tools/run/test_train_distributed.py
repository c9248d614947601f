"""Two processes do what one does with the whole batch; a run resumes, sharded or not, and one can read it."""

import functools
import json
from dataclasses import asdict

import pytest
import torch
from children import run_ranks
from safetensors.torch import load_file
from test_step import ALONE, batches_of
from tiny import load_tiny
from torch.distributed.tensor import DTensor

from act24.errors import Act24Error
from act24.tools.run.build import build
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.processes import open_processes, whole
from act24.tools.run.step import TrainingStep
from act24.tools.run.train import train
from act24.tools.watch.statistics import block_weights, read_activation_statistics_, weight_sparsity


def equals_one_process(path, parallel):
    """Three steps before and three after the passes change, of two micro-batches on each rank."""
    recipe = load_tiny(path, f"train.parallel={parallel}", "train.total_batch_size=16")
    alone = build(recipe, ALONE.device)
    reference = TrainingStep(alone.model, recipe.train, ALONE)
    reference_optimizer = torch.optim.SGD(alone.model.parameters(), lr=0.1)
    with open_processes() as processes:
        built = build(recipe, processes.device)
        step = TrainingStep(built.model, recipe.train, processes)
        sharded = [isinstance(p, DTensor) for p in built.model.parameters()]
        assert sharded == [parallel == "fsdp"] * len(sharded)
        optimizer = torch.optim.SGD(built.model.parameters(), lr=0.1)
        with torch.no_grad():  # zeros to be found; whole(): of a sharded weight too
            for model in (built.model, alone.model):
                for weight in block_weights(model).values():
                    weight.mul_((weight > 0.01).to(weight.dtype))
        assert weight_sparsity(built.model) == weight_sparsity(alone.model)
        assert min(weight_sparsity(built.model).values()) > 0.5
        for updates in range(7, 13):
            assert built.pipeline.lower_(updates) == alone.pipeline.lower_(updates) == (updates == 10)
            everything = batches_of(4, seed=updates)
            mine = everything[2 * processes.rank : 2 * processes.rank + 2]
            ours, theirs = step(mine, optimizer), reference(everything, reference_optimizer)
            assert ours.tokens == theirs.tokens
            torch.testing.assert_close(ours.loss, theirs.loss)
            torch.testing.assert_close(ours.grad_norm, theirs.grad_norm)
        for mine, other in zip(built.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(whole(mine.detach()), other.detach(), rtol=1e-4, atol=1e-6)
        sites = read_activation_statistics_(built.model, processes)
        for ours, theirs in zip(sites, read_activation_statistics_(alone.model, ALONE), strict=True):
            assert (ours.layer, ours.site) == (theirs.layer, theirs.site)
            assert ours.sparsity == pytest.approx(theirs.sparsity, rel=1e-3)
            assert ours.dropped_energy == pytest.approx(theirs.dropped_energy, rel=1e-3)
        del step  # before the processes part: see `act24.tools.run.train.TrainingRun.close`


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(tiny_file, parallel):
    run_ranks(2, equals_one_process, tiny_file, parallel)


def trains(path, run_dir, overrides, resume):
    torch.compile = functools.partial(torch.compile, backend="eager")  # the usual one takes a minute
    outcome = train(load_tiny(path, *overrides), run_dir, resume=resume)
    assert (outcome.step, outcome.tokens) == (20, 20 * 8 * 16)
    if outcome.is_main:
        (run_dir / "outcome.json").write_text(json.dumps(asdict(outcome.evaluation)))


_FP8 = [
    'passes=[{use="relu2_ffn"}, {use="activation24", backward="split_gemm", from_step=10}, '
    '{use="fp8", head=true}]',
    "model.vocab_size=304",
]

RUNS = {
    "ddp": ["train.parallel=ddp"],
    "fsdp": ["train.parallel=fsdp"],
    "fsdp, recomputed, tied": [
        "train.parallel=fsdp",
        "train.activation_checkpointing=true",
        "model.tie_word_embeddings=true",
    ],
    "ddp, compiled": ["train.compile=on"],
    "fsdp, compiled": ["train.parallel=fsdp", "train.compile=on"],
    "ddp, fp8": _FP8,
    "fsdp, fp8": [*_FP8, "train.parallel=fsdp", "train.dtype=bfloat16_autocast"],
}


#: Ten seconds and more, of what other tests have by itself.
_SLOW = ("ddp, compiled", "ddp, fp8", "fsdp, fp8")


@pytest.mark.parametrize(
    "overrides",
    [pytest.param(run, id=name, marks=[pytest.mark.slow] * (name in _SLOW)) for name, run in RUNS.items()],
)
def test_two_processes_train_and_resume(tiny_file, tmp_path, overrides):
    overrides = [*overrides, "checkpoint.every=9", "checkpoint.keep=3"]
    run_ranks(2, trains, tiny_file, tmp_path / "straight", overrides, "never")
    begun = tmp_path / "straight" / "checkpoints" / "step-000009"  # before the passes change
    run_ranks(2, trains, tiny_file, tmp_path / "resumed", overrides, str(begun))
    straight, resumed = (
        load_file(tmp_path / name / "checkpoints" / "step-000020" / "model.safetensors")
        for name in ("straight", "resumed")
    )
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    evaluations = [
        json.loads((tmp_path / name / "outcome.json").read_text()) for name in ("straight", "resumed")
    ]
    assert evaluations[0] == evaluations[1]
    alone = asdict(evaluate_checkpoint(tmp_path / "straight")["2:4"])
    assert alone["data"] == evaluations[0]["data"]
    assert alone["loss"] == pytest.approx(evaluations[0]["loss"], rel=1e-6)


def complains(path, folder):
    with pytest.raises(Act24Error, match=r"train\.total_batch_size \(8\) must be .* \(8 × 2 = 16\)"):
        train(load_tiny(path, "train.batch_size=8"), folder / "run")


def test_rows_that_two_processes_cannot_share(tiny_file, tmp_path):
    run_ranks(2, complains, tiny_file, tmp_path)
    assert list(tmp_path.iterdir()) == []
