"""A 2:4 method from outside: this file adds one record, and everything else has it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from act24.recipes.load import RecipeError
from act24.sparse24.feed_forward import operation
from act24.sparse24.feed_forward.methods import METHODS, Method
from act24.sparse24.format import device
from act24.sparse24.kernels.shared import self_check
from act24.sparse24.pattern.token_wise import Dense, Selected
from act24.tools.commands import doctor
from act24.tools.run.build import load, plan_recipe
from act24.tools.run.train import train


def one_in_two(dense: Dense, seed: Tensor | None) -> Selected:
    """Of every two features one stays, drawn at random, doubled."""
    assert seed is not None
    pairs = dense.value.unflatten(-1, (-1, 2))
    drawn = (torch.arange(pairs.shape[-2]) + seed) % 2
    mask = torch.stack((drawn == 0, drawn == 1), dim=-1).flatten().expand_as(dense.value)
    return Selected(mask, 2 * dense.value * mask, 2 * dense.derivative * mask)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Method:
    monkeypatch.setattr(METHODS, "_records", {**METHODS})
    record = Method(
        name="one_in_two",
        summary="one of every two, drawn at random",
        sparsifier=one_in_two,
        draws=True,
        scaled=True,
        remeasured=True,
        in_evaluation="naive",
        options=("dynamic_steps",),
    )
    return METHODS.add(record)


OVERRIDES = (
    'passes=[{use="relu2_ffn"}, {use="activation24", from_step=3, method="one_in_two", dynamic_steps=2}]',
    "train.steps=8",
    "eval.every=4",
)


def test_it_is_trained_by_recipe_evaluated_and_resumed(toy, tiny, tmp_path) -> None:
    recipe = tiny(*OVERRIDES, "checkpoint.every=5", "checkpoint.keep=4")
    assert train(recipe, tmp_path / "whole").finished
    middle = tmp_path / "whole" / "checkpoints" / "step-000005"
    assert train(recipe, tmp_path / "resumed", resume=str(middle)).finished
    whole, resumed = load(tmp_path / "whole"), load(tmp_path / "resumed")
    then, now = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(then[name], now[name]) for name in then)
    scales = [float(t) for name, t in then.items() if name.endswith("mlp.activation24_scale")]
    assert len(scales) == 2
    assert all(scale > 1 for scale in scales), "measured, and kept in checkpoints"
    ids = torch.randint(300, (2, 16))
    served = whole.model(ids)
    whole.model.train()
    whole.pipeline.begin_update_(8)
    assert not torch.equal(whole.model(ids), served), "naive in evaluation, which `load` brings"
    with whole.pipeline.lowered([p.in_evaluation() for p in whole.pipeline.active if not p.observes]):
        assert torch.equal(whole.model(ids), served)


def test_it_is_planned_shown_by_doctor_and_refused_without_its_record(toy, tiny, monkeypatch) -> None:
    report = str(plan_recipe(tiny(*OVERRIDES)))
    assert "2:4 one_in_two" in report
    monkeypatch.setattr(self_check, "kernel_obstacle", lambda *_: "")
    monkeypatch.setattr(device, "obstacle", lambda *_: "")
    (line,) = (f.finding for f in doctor.examine(torch.device("cpu")) if f.subject == "method one_in_two")
    assert toy.summary in line
    assert "a seed for each micro-batch and a scale" in line
    assert 'plain PyTorch (no kernel knows the method "one_in_two")' in line
    monkeypatch.setattr(METHODS, "_records", {n: m for n, m in METHODS.items() if n != toy.name})
    with pytest.raises(RecipeError, match=r"passes\.1.*one_in_two"):
        tiny(*OVERRIDES)


def test_on_a_capable_machine_it_never_runs_a_kernel_of_another_method(
    toy, tiny, tmp_path, monkeypatch
) -> None:
    """Networks in bfloat16 that forms serve: they run its evaluation, which is naive, and nothing else."""
    ran = []

    def watched(form):
        def run(tensors, state, options):
            ran.append(options.method)
            return form.run(tensors, state, options)

        return replace(form, run=run)

    monkeypatch.setattr(self_check, "kernel_obstacle", lambda *_: "")
    for name in ("obstacle", "fp8_obstacle"):
        monkeypatch.setattr(device, name, lambda *_: "")
    monkeypatch.setattr(operation, "FORMS", tuple(map(watched, operation.FORMS)))
    shape = ("model.hidden_size=64", "model.intermediate_size=128", "data.max_length=64")
    overrides = (*OVERRIDES, *shape, "train.dtype=bfloat16_autocast", "train.steps=6")
    assert train(tiny(*overrides), tmp_path / "toy").finished
    assert {*ran} == {"naive"}
    ran.clear()
    assert train(tiny(*overrides, "passes.activation24.method=soft_dynamic"), tmp_path / "soft").finished
    assert "soft_dynamic" in ran, "packed, as a method that a kernel knows"
