"""What a run does to the weights, and when: against a loop of plain PyTorch, and by values that were met."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from slow import slow_but
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import text, write_recipe

from act24.recipes.load import load_recipe
from act24.tools.checkpoints import folder as checkpoint_folder
from act24.tools.data import open_rows, open_tokenizer
from act24.tools.run import train as train_module
from act24.tools.run.build import build
from act24.tools.run.train import train

SHORT = ("train.steps=8", "schedule.warmup_steps=2", "eval.every=0", "eval.tokens=100")


def logged(run_dir, tag):
    events = EventAccumulator(str(run_dir), {"scalars": 0}).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.fixture
def short_documents(tmp_path, tiny_file):
    """The tiny recipe on documents of one to twelve words, a row each."""
    recipe = write_recipe(tmp_path)
    lines = "".join(json.dumps({"text": text(1 + i * i % 12, i)}) + "\n" for i in range(400))
    (tmp_path / "train.jsonl").write_text(lines)
    return recipe, [*SHORT, f'data.train_files=["{tmp_path}/train.jsonl"]', 'data.rows="padded"']


def test_a_run_is_a_loop_of_plain_pytorch(short_documents, tmp_path):
    """Micro-batches are one mean over their tokens, gradients begin at nothing in each step, are clipped, and
    AdamW has the schedule's rate."""
    path, overrides = short_documents
    recipe = load_recipe(
        str(path), [*overrides, "passes=[]", "optimizer.weight_decay=0", "train.grad_clip=0.5"]
    )
    train(recipe, tmp_path / "run")
    model = build(recipe, torch.device("cpu")).model
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    losses, norms, tokens = [], [], 0
    with open_rows(
        recipe.data, open_tokenizer(recipe.data, recipe.tokenizer), batch_size=8, vocab_size=300
    ) as rows:
        for _, rate in logged(tmp_path / "run", "optim/lr"):
            batch = next(rows)
            loss = F.cross_entropy(model(batch.input_ids).flatten(0, 1), batch.labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            losses.append(float(loss.detach()))
            tokens += int((batch.labels != -100).sum())
    assert min(norms) > 0.5
    assert [value for _, value in logged(tmp_path / "run", "loss/train")] == pytest.approx(losses, rel=1e-4)
    assert [value for _, value in logged(tmp_path / "run", "optim/grad_norm")] == pytest.approx(
        norms, rel=1e-3
    )
    last = checkpoint_folder.latest(tmp_path / "run")
    assert json.loads((last / "state.json").read_text())["tokens"] == tokens
    for name, weight in load_file(last / "model.safetensors").items():
        torch.testing.assert_close(weight, model.get_parameter(name).detach(), rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("method", "clip"),
    slow_but(
        [("sr_ste", 0), ("transposable", 1e-3)], [("sr_ste", 0), ("transposable", 0), ("transposable", 1e-3)]
    ),
)
def test_masked_decay_is_in_the_gradient_of_the_update(tiny, tmp_path, monkeypatch, method, clip):
    """λ times the weights that the mask drops; that of `transposable` is not clipped."""
    make, decay = train_module.build_optimizer, 0.25
    met = []

    def watched(model, *arguments, **options):
        optimizer = make(model, *arguments, **options)

        def look(*_):
            named = {name: p for name, p in model.named_parameters() if name.endswith("up_proj.weight")}
            masks = {name: model.get_buffer(f"{name}24_mask").clone() for name in named}
            met.append({n: (p.grad.clone(), p.detach().clone(), masks[n]) for n, p in named.items()})

        optimizer.register_step_pre_hook(look)
        return optimizer

    monkeypatch.setattr(train_module, "build_optimizer", watched)
    for value in (0.0, decay):
        passes = f'passes=[{{use="weight24", method="{method}", decay={value}, weight_gradient="dense"}}]'
        train(
            tiny(*SHORT, "train.steps=1", "schedule.warmup_steps=0", f"train.grad_clip={clip}", passes),
            tmp_path / str(value),
        )
    without, with_decay = met
    for name, (gradient, weight, mask) in without.items():
        assert 0.4 < float((mask == 0).float().mean()) < 0.6
        expected = gradient + decay * weight * (mask == 0)
        torch.testing.assert_close(with_decay[name][0], expected, rtol=1e-4, atol=1e-6)


def test_masked_decay_that_is_a_part_of_the_gradient_is_clipped_with_it(tiny, tmp_path, monkeypatch):
    make, norms = train_module.build_optimizer, []

    def watched(model, *arguments, **options):
        optimizer = make(model, *arguments, **options)
        gradients = lambda: [p.grad for p in model.parameters() if p.grad is not None]  # noqa: E731
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.nn.utils.get_total_norm(gradients())))
        )
        return optimizer

    monkeypatch.setattr(train_module, "build_optimizer", watched)
    passes = 'passes=[{use="weight24", method="sr_ste", decay=0.25, weight_gradient="dense"}]'
    train(tiny(*SHORT, "train.steps=1", "schedule.warmup_steps=0", "train.grad_clip=1e-3", passes), tmp_path)
    assert norms == pytest.approx([1e-3], rel=1e-3)


def test_2_4_is_in_force_from_its_first_step_on(tiny, tmp_path):
    """from_step = 3: the first three updates are dense, and what is dropped shows from the fourth on."""
    train(tiny(*SHORT, "passes.activation24.from_step=3"), tmp_path)
    dropped = dict(logged(tmp_path, "sparsity_dropped_energy/mean_across_layers"))
    dense = tiny(*SHORT, "passes.activation24.from_step=8")
    train(dense, tmp_path / "dense")
    losses, without = (dict(logged(run, "loss/train")) for run in (tmp_path, tmp_path / "dense"))
    assert dropped.keys() == losses.keys()
    assert [losses[step] for step in (1, 2, 3)] == [without[step] for step in (1, 2, 3)]
    assert losses[4] != without[4]


def test_a_window_never_spans_a_checkpoint_or_an_evaluation(tiny, tmp_path):
    train(tiny(*SHORT, "train.steps=12", "log.every=8", "checkpoint.every=3", "eval.every=5"), tmp_path)
    assert [step for step, _ in logged(tmp_path, "loss/train")] == [3, 5, 6, 8, 9, 10, 12]
