"""`precision = "auto"` in a run: layers are timed once, all processes decide alike, and a run that goes on
keeps what was decided. The timer is played: here there is no GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from tiny import Tiny

from act24.fp8.linear import linear_fp8
from act24.passes import Pipeline
from act24.passes.graph.normal_form import nodes_of
from act24.precision import Conditions, Timed
from act24.sparse24.feed_forward.operation import activation24
from act24.tools.checkpoints import checkpoint
from act24.tools.run import auto_precision, tuning
from act24.tools.run.build import build, load
from act24.tools.run.path import path_text
from act24.tools.run.processes import Processes
from act24.tools.run.saved import saved_state
from act24.tools.run.train import train
from act24.tools.run.tuning_cache import TuningError, cache_path

ALONE = Processes(0, 1, torch.device("cpu"))
RECIPE = (
    "train.dtype=bfloat16_autocast",
    "model.intermediate_size=64",
    "model.num_hidden_layers=1",
    "model.vocab_size=304",
    'passes=[{use="relu2_ffn"},{use="activation24",from_step=2},{use="fp8",precision="auto",head=true}]',
)
#: The network; q, k and v; o; the two linears of the network before it is 2:4; and the head.
SIZES = [(32, 128, 32), (32, 32, 32, 32), (32, 32), (32, 128), (128, 32), (32, 304)]
NARROW = Timed("fp8", 2.0, 1.0)
WIDE = Timed("bfloat16", 1.0, 2.0)


@dataclass(frozen=True)
class Second(Processes):
    """The second of two processes, the first of which has found this."""

    found: Any = None

    def gather(self, value: Any) -> list[Any]:
        assert value is None
        return [self.found, value]


class Timer:
    """Answers by a layer's sizes, and notes what it was asked."""

    def __init__(self, narrow: Callable[[tuple[int, ...]], bool]) -> None:
        self.narrow, self.asked = narrow, list[tuple[tuple[int, ...], Conditions]]()
        self._sizes: tuple[int, ...] = ()

    def __call__(self, sides: Any, conditions: Conditions, time: Any) -> Timed:
        leaves = sides["fp8"].step()
        (x, *weights) = [tuple(leaf.shape) for leaf in leaves]
        self.asked.append((((x[-1], *(out for out, _ in weights))), conditions))
        return NARROW if self.narrow(self.asked[-1][0]) else WIDE


@pytest.fixture
def timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timer:
    played = Timer(lambda sizes: len(sizes) > 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "why_not_timed", lambda device: "")
    monkeypatch.setattr(auto_precision, "machine", lambda device: "played")
    monkeypatch.setattr(auto_precision, "timed", played)
    return played


def narrow(pipeline: Pipeline, step: int) -> list[str]:
    """What is in e4m3 at a step."""
    pipeline.lower_(step)
    found = []
    for module in pipeline.modules:
        found += [str(cast(Any, n.args[1]).target) for n in nodes_of(module.graph, linear_fp8)]
        found += ["network" for n in nodes_of(module.graph, activation24) if n.args[-1].precision == "fp8"]
    return sorted(name.removesuffix(".weight").rpartition(".")[2] for name in found)


def test_counting_is_timed_where_every_step_counts(tiny: Tiny) -> None:
    for overrides, counted in (
        ([], True),
        (["log.activation_statistics=false"], False),
        (["log.activation_statistics_every=10"], False),
    ):
        recipe = tiny(*RECIPE, *overrides)
        assert auto_precision.conditions_of(recipe, 1, ALONE.device).counted is counted


def test_every_layer_is_timed_once_and_decided_for_all_intervals(tiny: Tiny, timer: Timer) -> None:
    recipe = tiny(*RECIPE)
    built = build(recipe, ALONE.device)
    assert narrow(built.pipeline, 0) == narrow(built.pipeline, 2) == []  # 32 wide
    found = json.loads(json.dumps(tuning.tune_(built.pipeline, recipe, ALONE)))
    assert sorted(sizes for sizes, _ in timer.asked) == sorted(SIZES)
    assert {given for _, given in timer.asked} == {
        Conditions(4, 16, "bfloat16_autocast", compiled=False, kept=True, micro_batches=2, counted=True)
    }
    attention = ["k_proj", "q_proj", "v_proj"]
    assert narrow(built.pipeline, 0) == attention
    assert narrow(built.pipeline, 2) == [attention[0], "network", *attention[1:]]
    assert built.pipeline.boundaries == (2,)
    built.pipeline.begin_update_(2, torch.zeros(4, 16, dtype=torch.long))
    built.model(torch.zeros(4, 16, dtype=torch.long)).sum().backward()  # the casts that it reads are there

    said = path_text(built.pipeline, recipe, ALONE.device)
    assert 'activation24, precision = "auto": 32→128→32 fp8 (fp8 1 ms, bfloat16 2)' in said
    assert "32→32 + 32 + 32 fp8 (fp8 1 ms, bfloat16 2), 32→32 bfloat16 (fp8 2 ms, bfloat16 1)" in said

    timer.asked.clear()  # from the cache
    assert tuning.tune_(built.pipeline, recipe, ALONE) == found
    assert not timer.asked

    # What a run holds stands, whatever the cache says, and where nothing can be timed.
    other = json.loads(json.dumps(found))
    for entry in other["layers"]:
        entry["precision"] = "bfloat16" if entry["precision"] == "fp8" else "fp8"
    for why in ("", "there is no GPU"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tuning, "why_not_timed", lambda device, why=why: why)
            assert tuning.tune_(built.pipeline, recipe, ALONE, other) == other
        assert narrow(built.pipeline, 2) == ["o_proj", "weight"]  # the head's
        assert not timer.asked

    # Another process takes what the first one found, and times nothing.
    second = Second(1, 2, ALONE.device, found=auto_precision.held_layers(other))
    assert tuning.tune_(built.pipeline, recipe, second) == other
    assert not timer.asked
    assert narrow(built.pipeline, 2) == ["o_proj", "weight"]  # the head's


def test_damage_is_named_with_the_file(tiny: Tiny, timer: Timer) -> None:
    recipe = tiny(*RECIPE)
    pipeline = build(recipe, ALONE.device).pipeline
    cache_path().parent.mkdir(parents=True)
    key = auto_precision.layers_key(ALONE.device)
    for content in (3, [3], [{"kind": "linears"}], [{"kind": "what", "sizes": [1], "options": ""}]):
        cache_path().write_text(json.dumps({key: content}))
        with pytest.raises(TuningError, match=r"products\.json holds an entry that is no timed layer"):
            tuning.tune_(pipeline, recipe, ALONE)


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_what_was_decided(tiny: Tiny, timer: Timer, tmp_path: Path) -> None:
    """Bit for bit, with a cache that says otherwise; and what is opened computes as it was trained."""
    recipe = tiny(*RECIPE, "train.steps=4", "schedule.warmup_steps=1", "checkpoint.every=2")
    whole = train(recipe, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "step-000002"
    state = saved_state(checkpoint.load(step))
    assert {entry["precision"] for entry in state["products"]["layers"]} == {"fp8", "bfloat16"}
    timer.narrow, timer.asked[:] = lambda sizes: len(sizes) == 2, []
    cache_path().unlink()
    again = train(recipe, tmp_path / "again", resume=str(step))
    assert not timer.asked
    assert again.evaluation == whole.evaluation
    opened = load(tmp_path / "run")
    served = [n.args[-1].precision for m in opened.pipeline.modules for n in nodes_of(m.graph, activation24)]
    assert served == ["fp8"]
