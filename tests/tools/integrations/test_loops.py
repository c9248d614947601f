"""The same six updates in three loops, stopped in the middle and gone on: equal weights, whatever the
method."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from slow import slow_after
from torch import Tensor, nn

import act24
from act24.passes import (
    REGISTRY,
    Activation24,
    ActivationStatistics,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    MaskedLora,
    Pass,
    Recompute,
    Relu2FFN,
    SparseMask,
    Weight24,
)
from act24.passes.recovery import has_masks, keep_zeros_
from act24.tools.data import open_rows, open_tokenizer
from act24.tools.run import pretrained
from act24.tools.run.build import Built, build, load
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.train import train

SPLIT = {"backward": "split_gemm"}
RANKS = {"attn_rank": 8, "mlp_rank": 8}
METHODS: dict[str, tuple[Pass, ...]] = {
    "naive": (Relu2FFN(), Activation24(from_step=1)),
    "mvue": (Relu2FFN(), Activation24(method="mvue", from_step=1)),
    "soft_dynamic": (
        Relu2FFN(),
        Activation24(method="soft_dynamic", from_step=1, dynamic_steps=2, calibration_samples=4, **SPLIT),
    ),
    "transposable": (Weight24(from_step=1, mask_every=2, decay=1e-2),),
    "sr_ste": (Weight24(method="sr_ste", until_step=5, decay=1e-2),),
    "low_rank": (Relu2FFN(), LowRank(**RANKS), Activation24(from_step=1, until_step=5)),
    "relu2": (Relu2FFN(), ActivationStatistics()),
    "cola": (Cola(**RANKS), Recompute()),
    "lost": (Relu2FFN(), Lost(**RANKS), Activation24(method="mvue", from_step=1)),
    "fp8": (Fp8(from_step=1),),
    "sparse_mask": (SparseMask(masks="zeros"),),
    "lora": (Lora(dropout=0.0),),  # which draws from the process
    "masked_lora": (MaskedLora(),),
}
#: In the fast suite, where there is accelerate.
FAST = ("naive", "mvue", "soft_dynamic", "transposable", "sr_ste")
STEPS, STOP = 6, 3


def recipe_of(tiny, name):
    recipe = tiny(
        "train.steps=6",
        "eval.every=0",
        "checkpoint.every=3",
        "checkpoint.keep=4",
        "schedule.name=constant",
        "schedule.warmup_steps=0",
        "optimizer.lr=1e-3",
        "train.seed=5",
    )
    return recipe.model_copy(update={"passes": METHODS[name]})


def updates_of(recipe) -> list[list[tuple[Tensor, Tensor]]]:
    """The micro-batches of each update, as `act24 train` has them."""
    tokenizer = open_tokenizer(recipe.data, recipe.tokenizer)
    where = {"batch_size": recipe.train.batch_size, "vocab_size": 300, "rank": 0, "world_size": 1}
    with open_rows(recipe.data, tokenizer, **where) as rows:
        batches = [next(rows) for _ in range(2 * STEPS)]
    assert all(batch.pads is None for batch in batches)
    rows_ = [(batch.input_ids, batch.labels) for batch in batches]
    return [rows_[i : i + 2] for i in range(0, len(rows_), 2)]


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())


def own_loop(recipe, updates, state: Any = None) -> tuple[Built, torch.optim.Optimizer]:
    """From the start to STOP, or from a state to the end, in plain PyTorch."""
    built = build(recipe, torch.device("cpu"))
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr
    if state:
        built.model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    end = keep_zeros_(built.pipeline) if has_masks(built.pipeline) else lambda: None
    for step in range(STOP, STEPS) if state else range(STOP):
        built.pipeline.begin_update_(step, torch.cat([ids for ids, _ in updates[step]]))
        for ids, labels in updates[step]:
            (loss_of(built.model, ids, labels) / len(updates[step])).backward()
        nn.utils.clip_grad_norm_(built.model.parameters(), recipe.train.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
    end()
    return built, optimizer


class WithLoss(nn.Module):
    """What the Trainer wants of a model: the loss, too."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": loss_of(self.model, input_ids, labels)}


def with_trainer(recipe, updates, folder, resume: bool) -> Built:
    transformers = pytest.importorskip("transformers")
    built = build(recipe, torch.device("cpu"))
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    for group in optimizer.param_groups:
        group["lr"] = recipe.optimizer.lr
    rows = [
        {"input_ids": ids, "labels": labels}
        for update in updates
        for batch in update
        for ids, labels in zip(*batch, strict=True)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.train.batch_size,
        gradient_accumulation_steps=2,
        max_steps=STEPS if resume else STOP,
        max_grad_norm=recipe.train.grad_clip,
        train_sampling_strategy="sequential",
        save_steps=STOP,
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(
        WithLoss(built.model),
        arguments,
        train_dataset=rows,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)),
        callbacks=[act24.integrations.TrainerCallback(built.pipeline)],
    )
    trainer.train(resume_from_checkpoint=resume)
    return built


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    state, other = ours.state_dict(), theirs.state_dict()
    assert state.keys() == other.keys()
    for name, value in state.items():
        torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-6, msg=name)


@pytest.fixture(scope="module")
def trained(tiny_file, tmp_path_factory):
    """`act24 train`, stopped after STOP and gone on from there, by method."""
    import functools

    import tiny as tiny_recipe

    folder, made = tmp_path_factory.mktemp("trained"), {}

    def run(name):
        if name not in made:
            recipe = recipe_of(functools.partial(tiny_recipe.load_tiny, tiny_file), name)
            resumed = folder / f"{name}-resumed"
            middle = folder / name / "checkpoints" / f"step-{STOP:06d}"
            with pytest.MonkeyPatch.context() as patch:
                # Adapters on a model that starts fresh are refused; what the weights are is nothing here.
                patch.setattr(pretrained, "_refuse_untrained", lambda recipe: None)
                assert train(recipe, folder / name).finished
                assert train(recipe, resumed, resume=str(middle)).finished
            whole, again = load(folder / name), load(resumed)
            state = whole.model.state_dict()
            assert all(torch.equal(value, state[n]) for n, value in again.model.state_dict().items())
            made[name] = recipe, again
        return made[name]

    return run


def test_every_pass_is_in_some_loop() -> None:
    assert {p.name for passes in METHODS.values() for p in passes} == {*REGISTRY}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_an_own_loop_trains_as_act24_train_does(name, trained):
    recipe, theirs = trained(name)
    updates = updates_of(recipe)
    built, optimizer = own_loop(recipe, updates)
    state = copy.deepcopy((built.model.state_dict(), optimizer.state_dict()))
    built, _ = own_loop(recipe, updates, state)
    start = build(recipe, torch.device("cpu")).model
    pairs = zip(start.parameters(), built.model.parameters(), strict=True)
    assert sum(not torch.allclose(before, after) for before, after in pairs) >= 8
    with built.pipeline.evaluation():  # masks of the weights as they are, as `load` has them
        assert_same(built.model, theirs.model)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in METHODS]
)
def test_the_trainer_of_transformers_trains_as_act24_train_does(name, trained, tmp_path):
    pytest.importorskip("accelerate")  # without which there is no Trainer
    recipe, theirs = trained(name)
    updates = updates_of(recipe)
    with_trainer(recipe, updates, tmp_path, resume=False)
    built = with_trainer(recipe, updates, tmp_path, resume=True)
    with built.pipeline.evaluation():
        assert_same(built.model, theirs.model)


@pytest.mark.parametrize("rows", slow_after(1, [1, 2, 4]))
def test_a_scale_does_not_depend_on_how_an_update_is_split(tiny, rows):
    from act24.tools.data import Batch
    from act24.tools.run.processes import Processes
    from act24.tools.run.step import TrainingStep

    def scales(batch_size):
        recipe = recipe_of(tiny, "soft_dynamic")
        split = recipe.train.model_copy(update={"batch_size": batch_size, "total_batch_size": 8})
        built = build(recipe, torch.device("cpu"))
        step = TrainingStep(built.model, split, Processes(0, 1, torch.device("cpu")), built.pipeline)
        ids = torch.randint(300, (8, 16), generator=torch.Generator().manual_seed(0))
        batches = [Batch(part, part) for part in ids.split(batch_size)]
        step(batches, torch.optim.SGD(built.model.parameters(), lr=0.0), 1)
        return [float(b) for n, b in built.model.named_buffers() if n.endswith("activation24_scale")]

    assert scales(rows) == scales(8)
    assert min(scales(rows)) > 1
