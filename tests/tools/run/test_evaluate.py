"""The held-out measure against F.cross_entropy over all rows at once, on a model written by hand."""

import copy
import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from children import run_ranks
from tiny import load_tiny
from torch import nn

from act24.llama import LlamaForCausalLM
from act24.recipes.load import dump_recipe, parse_recipe
from act24.tools.data import heldout_rows, open_tokenizer
from act24.tools.run import evaluate as evaluate_module
from act24.tools.run.build import load, model_config
from act24.tools.run.evaluate import Evaluation, evaluate, evaluate_checkpoint, evaluate_forms
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.step import SummedLoss
from act24.tools.run.train import train

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def run_dir(tiny_file, tmp_path_factory):
    """A run of 8 steps, 2:4 from step 6 on; checkpoints before and after."""
    folder = tmp_path_factory.mktemp("run")
    overrides = ("train.steps=8", "passes.activation24.from_step=6", "checkpoint.every=4", "eval.tokens=512")
    train(load_tiny(tiny_file, *overrides), folder)
    return folder


class HandwrittenMLP(nn.Module):
    """relu² between two linears; of every 4 features the 2 largest if `sparse`."""

    def __init__(self, up, down, sparse):
        super().__init__()
        self.up_proj, self.down_proj, self.sparse = nn.Parameter(up), nn.Parameter(down), sparse

    def forward(self, x):
        activation = F.linear(x, self.up_proj).relu().square()
        if self.sparse:
            groups = activation.unflatten(-1, (-1, 4))
            kept = torch.zeros_like(groups).scatter_(-1, groups.topk(2).indices, 1.0)
            activation = (groups * kept).flatten(-2)
        return F.linear(activation, self.down_proj)


def handwritten(built, sparse):
    """The stock model in float64 with the weights of a checkpoint, its MLPs written by hand."""
    model = LlamaForCausalLM(model_config(built.recipe)).double()
    state = {name: value.double() for name, value in built.model.state_dict().items()}
    for index, layer in enumerate(model.model.layers):
        names = [f"model.layers.{index}.mlp.{name}.weight" for name in ("up_proj", "down_proj")]
        layer.mlp = HandwrittenMLP(*(state.pop(name) for name in names), sparse)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert all(".mlp." in name for name in missing)
    assert not unexpected
    return model


@torch.no_grad()
def loss_of_all_rows(model, rows):
    """One mean over everything."""
    (batch,) = rows.batches(rows.total_rows)
    logits = model(batch.input_ids).flatten(0, 1)
    return F.cross_entropy(logits, batch.labels.flatten(), ignore_index=-100).item()


def opened(run_dir, *overrides):
    built = load(run_dir)
    recipe = parse_recipe(dump_recipe(built.recipe), "test", overrides)
    tokenizer = open_tokenizer(recipe.data, built.tokenizer_section)
    return built, recipe, heldout_rows(recipe.data, tokenizer, recipe.eval.tokens, vocab_size=300), tokenizer


def measure(built, recipe, rows, **options):
    return evaluate(SummedLoss(built.model), rows, recipe, ALONE, built.pipeline, **options)


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_the_mean_is_over_tokens_whatever_the_batch(run_dir, layout, batch_size):
    overrides = (f"data.rows={layout}", f"eval.batch_size={batch_size}", "data.max_length=24")
    built, recipe, rows, _ = opened(run_dir, *overrides)
    if layout == "padded":  # rows of very unequal lengths
        rows = dataclasses.replace(rows, rows=[row[: 2 + 5 * i] for i, row in enumerate(rows.rows * 4)])
        rows = dataclasses.replace(rows, total_rows=len(rows.rows))
    found = measure(built, recipe, rows)
    assert found.tokens == sum(len(row) - 1 for row in rows.rows)
    assert found.loss == pytest.approx(loss_of_all_rows(handwritten(built, sparse=True), rows), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_bits_per_byte(run_dir):
    built, recipe, rows, tokenizer = opened(run_dir)
    text = "".join(tokenizer.decode(row[1:].tolist()) for row in rows.rows)
    found = measure(built, recipe, rows)
    assert found.tokens < len(text.encode()) < 10 * found.tokens
    bits = found.loss * found.tokens / math.log(2)
    assert found.bits_per_byte == pytest.approx(bits / len(text.encode()))


def test_the_legacy_average_depends_on_the_batch(run_dir):
    for batch_size, batches in ((8, 4), (16, 2), (32, 1)):
        built, recipe, rows, _ = opened(run_dir, f"eval.batch_size={batch_size}", "eval.tokens=512")
        found = measure(built, recipe, rows)
        assert (rows.total_rows, found.tokens) == (32, 512)  # of batches of equal size
        assert found.legacy_loss == pytest.approx(found.loss * batches / (batches + 1))
        assert found.legacy_perplexity == pytest.approx(math.exp(found.loss * batches / (batches + 1)))


def test_the_same_weights_dense_and_sparse(run_dir):
    for step in (8, 4):  # at 4 the weights have not seen 2:4 yet; it is applied to them all the same
        folder = run_dir / "checkpoints" / f"step-00000{step}"
        built, _, rows, _ = opened(folder)
        forms = evaluate_checkpoint(folder)
        assert list(forms) == ["dense", "2:4"]
        for name, sparse in (("dense", False), ("2:4", True)):
            expected = loss_of_all_rows(handwritten(built, sparse), rows)
            assert forms[name].loss == pytest.approx(expected, rel=1e-6)
        assert forms["dense"].loss != forms["2:4"].loss
        assert forms["dense"].data == forms["2:4"].data


def test_a_dense_recipe_has_one_form(tiny, tmp_path):
    train(tiny("train.steps=5", "passes=[]"), tmp_path)
    assert list(evaluate_checkpoint(tmp_path)) == ["dense"]


def test_nothing_is_different_afterwards(run_dir):
    built, recipe, rows, _ = opened(run_dir)
    built.pipeline.lower_(8)  # `load` brings the operations of evaluation, which do not count
    model = built.model.train()
    SummedLoss(model)(torch.arange(16)[None], torch.arange(16)[None])  # something is counted
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = copy.deepcopy(model.state_dict())
    assert any(buffer.any() for buffer in buffers.values())
    evaluate_forms(built, rows, recipe, ALONE)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not built.pipeline.lower_(8)  # it was lowered back
    assert all(p.requires_grad for p in model.parameters())


def test_other_rows_have_another_fingerprint(run_dir):
    same = evaluate_checkpoint(run_dir, ["eval.batch_size=3"])["2:4"]
    fewer = evaluate_checkpoint(run_dir, ["eval.tokens=100"])["2:4"]
    assert same.data == evaluate_checkpoint(run_dir)["2:4"].data != fewer.data
    assert fewer.tokens == 112  # whole rows of 16


def measures(run_dir, out):
    with open_processes() as processes:
        built = load(run_dir)
        recipe = built.recipe
        where = {"vocab_size": 300, "rank": processes.rank, "world_size": processes.world_size}
        rows = heldout_rows(recipe.data, open_tokenizer(recipe.data, built.tokenizer_section), 500, **where)
        found = evaluate(SummedLoss(built.model), rows, recipe, processes, built.pipeline)
    (out / f"{processes.rank}.json").write_text(json.dumps(dataclasses.asdict(found)))


def test_processes_share_the_rows(run_dir, tmp_path):
    run_ranks(3, measures, run_dir, tmp_path)  # 32 rows: not the same number for each
    found = [Evaluation(**json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(3)]
    alone = evaluate_checkpoint(run_dir)["2:4"]
    assert found[0] == found[1] == found[2]
    assert (found[0].tokens, found[0].data) == (alone.tokens, alone.data)
    assert found[0].loss == pytest.approx(alone.loss, rel=1e-6)
    assert found[0].bits_per_byte == pytest.approx(alone.bits_per_byte, rel=1e-6)


def test_a_loss_beyond_measure_can_still_be_shown():
    assert Evaluation(1e4, 1e4, 512, 512, 1, 1e4, "").perplexity == math.exp(700)
    assert math.isnan(Evaluation(math.nan, 1.0, 512, 512, 1, 1.0, "").perplexity)


class Clock:
    """Seconds that pass only where a batch was measured: three a batch."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        self.now += 3.0
        return self.now


def test_it_ends_early_and_says_so(run_dir, monkeypatch):
    """Ten seconds are enough for the batches that end after 3, 6 and 9, and for the one that passes them."""
    built, recipe, rows, _ = opened(run_dir, "eval.batch_size=4", "eval.tokens=512", "eval.max_seconds=10")
    monkeypatch.setattr(evaluate_module, "time", Clock())
    found = evaluate(SummedLoss(built.model), rows, recipe, ALONE, built.pipeline)
    monkeypatch.undo()
    assert (found.batches, found.tokens, found.asked) == (4, 4 * 4 * 16, 512)
    assert found.extent == "256 tokens of 512: eval.max_seconds ended it"
    first = dataclasses.replace(rows, rows=rows.rows[:16], total_rows=16, tokens=256)
    free = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"max_seconds": None})})
    alone = evaluate(SummedLoss(built.model), first, free, ALONE, built.pipeline)
    assert found.loss == pytest.approx(alone.loss, rel=1e-6)
    assert alone.extent == "256 tokens"


def test_both_forms_are_of_the_same_rows_when_time_is_short(run_dir, monkeypatch):
    built, recipe, rows, _ = opened(run_dir, "eval.batch_size=4", "eval.tokens=512", "eval.max_seconds=10")
    monkeypatch.setattr(evaluate_module, "time", Clock())
    forms = evaluate_forms(built, rows, recipe, ALONE)
    assert forms["dense"].tokens == forms["2:4"].tokens == 256


def _late_on_one(folder, recipe_text, path):
    """Rank 1's clock is far behind, so that it alone finds the time over."""
    with open_processes() as processes:
        built = load(path, processes.device)
        recipe = parse_recipe(recipe_text, "test")
        rows = heldout_rows(
            recipe.data,
            built.open_tokenizer(recipe.data),
            recipe.eval.tokens,
            vocab_size=300,
            rank=processes.rank,
            world_size=processes.world_size,
        )
        clock = Clock()
        if processes.rank == 0:
            clock.perf_counter = lambda: 0.0
        evaluate_module.time = clock
        found = evaluate(SummedLoss(built.model), rows, recipe, processes, built.pipeline)
        (folder / f"{processes.rank}.json").write_text(json.dumps(dataclasses.asdict(found)))


def test_processes_end_at_the_same_batch(run_dir, tmp_path):
    _, recipe, _, _ = opened(run_dir, "eval.batch_size=4", "eval.tokens=512", "eval.max_seconds=4")
    run_ranks(2, _late_on_one, tmp_path, dump_recipe(recipe), run_dir)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert (first["batches"], first["tokens"]) == (2, 2 * 2 * 4 * 16)
