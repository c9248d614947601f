"""Evaluation, `load` and samples are of the weights that are read: masks and scales against other code."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
import torch
import torch.nn.functional as F
from slow import slow_after, slow_but

from act24.inference.sampling import Sampling
from act24.llama import LlamaForCausalLM
from act24.passes import Activation24, Relu2FFN, Weight24
from act24.passes.state import renew_to_read_
from act24.tools.commands.generate import Request, open_generator, open_model, sample_text
from act24.tools.data import heldout_rows, open_rows
from act24.tools.run.build import build, load, model_config
from act24.tools.run.evaluate import evaluate_checkpoint
from act24.tools.run.train import train

METHODS = ("transposable", "ste", "sr_ste", "soft_threshold")
#: Of the run below, in which 2:4 goes from update 4 to update 8.
FROM, UNTIL = 4, 8


@pytest.fixture(scope="module")
def runs(tiny_file, tmp_path_factory):
    """A run of 10 steps by method of `weight24`, with a checkpoint after every second one."""
    import tiny

    folder, made = tmp_path_factory.mktemp("served"), {}

    def run(method):
        if method not in made:
            made[method] = folder / method
            options = (
                "train.steps=10",
                "schedule.warmup_steps=1",
                "eval.every=2",
                "eval.tokens=256",
                "checkpoint.every=2",
            )
            recipe = tiny.load_tiny(tiny_file, *options, "checkpoint.keep=9")
            p = Weight24(method=method, from_step=FROM, until_step=UNTIL)
            train(recipe.model_copy(update={"passes": (p,)}), made[method])
        return made[method]

    return run


def two_of_four(weight: torch.Tensor) -> torch.Tensor:
    """The two largest magnitudes of every four in a row."""
    groups = weight.unflatten(1, (-1, 4))
    order = groups.abs().argsort(-1, descending=True)
    return torch.zeros_like(groups).scatter_(-1, order[..., :2], 1.0).flatten(1) * weight


def transposable(weight: torch.Tensor) -> torch.Tensor:
    """The best of the 90 masks of every 4 × 4 block that have two ones in each row and column."""
    rows = [[1.0 if i in pair else 0.0 for i in range(4)] for pair in itertools.combinations(range(4), 2)]
    masks = torch.tensor(list(itertools.product(rows, repeat=4)))
    masks = masks[(masks.sum(1) == 2).all(1)]
    assert len(masks) == 90
    blocks = weight.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2)  # [R, C, 4, 4]
    best = torch.einsum("rcij,mij->rcm", blocks.abs(), masks.to(weight)).argmax(-1)
    return (blocks * masks.to(weight)[best]).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def softened(weight: torch.Tensor) -> torch.Tensor:
    """Every magnitude less the second smallest of its four, without the scale."""
    groups = weight.unflatten(1, (-1, 4))
    threshold = groups.abs().sort(-1).values[..., 1:2]
    return (groups.sign() * (groups.abs() - threshold).clamp(min=0)).flatten(1)


def expected_loss(checkpoint, method) -> float:
    """Held-out loss of the stock model with the weights of a checkpoint, made 2:4 by the code above."""
    built = load(checkpoint)
    model = LlamaForCausalLM(model_config(built.recipe)).double()
    state = {
        n: v.double() for n, v in built.model.state_dict().items() if not n.endswith(("_mask", "_scale"))
    }
    for name, weight in state.items():
        if method == "dense" or ".layers." not in name or weight.ndim != 2:
            continue
        if method == "soft_threshold":
            soft = softened(weight)
            # S-STE's scale is that of the first sparse update, which stays; until then it is of the weights.
            fixed = {} if built.step <= FROM else built.model.state_dict()
            scale = fixed.get(f"{name}24_scale", (weight * soft).sum() / (soft * soft).sum())
            state[name] = scale * soft
        else:
            state[name] = transposable(weight) if method == "transposable" else two_of_four(weight)
    model.load_state_dict(state)
    rows = heldout_rows(built.recipe.data, built.open_tokenizer(), built.recipe.eval.tokens, vocab_size=300)
    (batch,) = rows.batches(rows.total_rows)
    with torch.no_grad():
        logits = model(batch.input_ids).flatten(0, 1)
    return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100).item()


@pytest.mark.parametrize(
    ("method", "step"),
    slow_but(
        [("transposable", 2), ("transposable", 6)],
        itertools.product(METHODS, (2, FROM, 6)),
    ),
)
def test_a_checkpoint_is_evaluated_with_masks_and_scales_of_its_weights(runs, method, step):
    checkpoint = runs(method) / "checkpoints" / f"step-{step:06d}"
    forms = evaluate_checkpoint(checkpoint)
    assert list(forms) == ["dense", "2:4"]
    assert forms["dense"].loss == pytest.approx(expected_loss(checkpoint, "dense"), rel=1e-5)
    assert forms["2:4"].loss == pytest.approx(expected_loss(checkpoint, method), rel=1e-5)
    assert abs(forms["2:4"].loss - forms["dense"].loss) > 1e-3


@pytest.mark.parametrize("step", [UNTIL, 10])
def test_after_its_range_there_is_only_the_dense_form(runs, step):
    assert list(evaluate_checkpoint(runs("transposable") / "checkpoints" / f"step-{step:06d}")) == ["dense"]


PASSES = {
    **{method: (Weight24(method=method, from_step=FROM),) for method in METHODS},
    "soft_dynamic": (Relu2FFN(), Activation24(method="soft_dynamic", from_step=FROM)),
    "scale_from_weight": (Relu2FFN(), Activation24(method="soft_threshold_weights", from_step=FROM)),
    "mvue": (Relu2FFN(), Activation24(method="mvue", from_step=FROM)),
    "dense finish": (Weight24(from_step=2, until_step=FROM),),
}


@pytest.mark.parametrize("steps", slow_but((FROM,), [FROM - 1, FROM, FROM + 2]))
@pytest.mark.parametrize("name", slow_but(("transposable", "soft_dynamic", "mvue", "dense finish"), PASSES))
def test_the_run_and_eval_see_the_same(tiny, tmp_path, name, steps):
    recipe = tiny("schedule.warmup_steps=1", f"train.steps={steps}", "eval.every=0", "eval.tokens=256")
    p = PASSES[name][-1]
    outcome = train(recipe.model_copy(update={"passes": PASSES[name]}), tmp_path)
    forms = evaluate_checkpoint(tmp_path)
    form = "2:4" if p.active(steps) else "dense"
    assert outcome.evaluation is not None
    assert forms[form].loss == pytest.approx(outcome.evaluation.loss, rel=1e-6)
    assert ("2:4" in forms) == (p.until_step is None or steps < p.until_step)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_takes_masks_of_the_weights_and_gives_the_state_back(tiny, method):
    recipe = tiny().model_copy(update={"passes": (Weight24(method=method),)})
    built = build(recipe, torch.device("cpu"))
    model, pipeline = built.model, built.pipeline
    ids = torch.arange(16)[None]
    pipeline.begin_update_(0, ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    masks = [b for name, b in model.named_buffers() if name.endswith("24_mask")]
    before = {name: (b.data_ptr(), b.clone()) for name, b in model.named_buffers()}
    weights = dict(model.named_parameters())
    with pipeline.evaluation():
        for name, buffer in model.named_buffers():
            if name.endswith("24_mask") and method != "soft_threshold":
                make = transposable if method == "transposable" else two_of_four
                kept = make(weights[name.removesuffix("24_mask")].detach().double()) != 0
                assert torch.equal(buffer, kept)
        changed = any(not torch.equal(b, before[name][1]) for name, b in model.named_buffers())
    assert masks
    assert changed or method == "soft_threshold"
    for name, buffer in model.named_buffers():
        assert buffer.data_ptr() == before[name][0]  # what a captured graph reads
        assert torch.equal(buffer, before[name][1])


@pytest.mark.parametrize("method", slow_after(1, ["transposable", "soft_threshold"]))
def test_evaluating_more_often_trains_the_same(tiny, tmp_path, method):
    states = []
    for every in (0, 1):
        recipe = tiny("schedule.warmup_steps=1", "train.steps=6", f"eval.every={every}", "eval.tokens=64")
        passes = (Relu2FFN(), Weight24(method=method, from_step=2))
        train(recipe.model_copy(update={"passes": passes}), tmp_path / str(every))
        folder = tmp_path / str(every) / "checkpoints" / "step-000006"
        (weights,) = folder.glob("*.safetensors")
        states.append(weights.read_bytes())
    assert states[0] == states[1]


def test_load_draws_nothing_under_mvue(tiny, tmp_path):
    recipe = tiny("schedule.warmup_steps=1", "train.steps=3", "eval.every=0")
    train(recipe.model_copy(update={"passes": (Relu2FFN(), Activation24(method="mvue"))}), tmp_path)
    built = load(tmp_path)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        plain = built.model(ids)
        built.model.train()
        built.pipeline.lower_(3)
        random = built.model(ids)
        built.pipeline.lower_(3, without=["activation24"])
        dense = built.model(ids)
        with built.pipeline.lowered([Activation24(method="naive")]):
            naive = built.model(ids)
    assert torch.equal(plain, naive)
    assert not torch.allclose(plain, random)
    assert not torch.allclose(plain, dense)


def scales_of(built):
    return {name: float(b) for name, b in built.model.named_buffers() if name.endswith("activation24_scale")}


def test_a_checkpoint_at_from_step_has_a_scale_from_the_rows_before_it(tiny, tmp_path, caplog):
    """And the run goes on as if there were none; a file without one is said to have none."""
    recipe = tiny("schedule.warmup_steps=1", "train.steps=4", "eval.every=2", "checkpoint.every=2")
    soft = Activation24(method="soft_dynamic", from_step=2)
    recipe = recipe.model_copy(update={"passes": (Relu2FFN(), soft)})
    train(recipe, tmp_path / "run")
    other = recipe.model_copy(
        update={
            "eval": recipe.eval.model_copy(update={"every": 0}),
            "checkpoint": recipe.checkpoint.model_copy(update={"every": 0}),
        }
    )
    train(other, tmp_path / "plain")
    state, plain = (load(tmp_path / name).model.state_dict() for name in ("run", "plain"))
    assert [name for name, value in state.items() if not torch.equal(value, plain[name])] == []

    saved = tmp_path / "run" / "checkpoints" / "step-000002"
    caplog.clear()
    with caplog.at_level(logging.WARNING, "act24"):
        built = load(saved)
    assert "from_step (2)" not in caplog.text
    found = scales_of(built)
    tokenizer = built.open_tokenizer(recipe.data)
    where = {"batch_size": 4, "vocab_size": 300, "rank": 0, "world_size": 1}
    with open_rows(recipe.data, tokenizer, **where) as rows:
        updates = [next(rows).input_ids for _ in range(4)]
    again = load(saved)
    again.pipeline.begin_update_(2, torch.cat(updates[2:]))
    assert found == pytest.approx(scales_of(again), rel=1e-6)
    assert min(found.values()) > 1
    measured = json.loads((saved / "manifest.json").read_text())["heldout"]["loss"]
    assert evaluate_checkpoint(saved)["2:4"].loss == pytest.approx(measured, rel=1e-5)

    with torch.no_grad():
        for name, buffer in again.model.named_buffers():
            if name.endswith("activation24_scale"):
                buffer.fill_(1)
    assert [due.of.name for due in renew_to_read_(again.pipeline, 2)] == ["activation24"]
    assert renew_to_read_(again.pipeline, 3) == []


def test_load_brings_a_tokenizer_and_samples_only_its_tokens(tiny, tmp_path):
    """Of the 400 entries of the model's vocabulary the tokenizer has 300 or fewer."""
    train(tiny("schedule.warmup_steps=1", "train.steps=2", "eval.every=0", "model.vocab_size=400"), tmp_path)
    tokenizer = load(tmp_path).open_tokenizer()
    assert tokenizer.decode(tokenizer.encode("low rank").tolist()) == "low rank"
    text = sample_text(tmp_path, "low rank", Request(200, Sampling(3.0, 400)))
    assert text.startswith("low rank")
    generator = open_generator(open_model(tmp_path))
    (drawn,) = generator.generate_ids([[1, 2, 3]], 200, Sampling(3.0, 400), until_end=False)
    assert max(drawn) < tokenizer.vocab_size <= 300
