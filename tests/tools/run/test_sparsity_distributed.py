"""Two processes with rows of their own keep scales, masks and LoST's columns in common, and draw apart."""

import functools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from children import run_ranks
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from act24.recipes.load import dump_recipe, parse_recipe
from act24.tools.checkpoints import checkpoint
from act24.tools.data import Batch, HeldoutRows
from act24.tools.run import train as training
from act24.tools.run.build import build
from act24.tools.run.evaluate import evaluate
from act24.tools.run.measurements import measure
from act24.tools.run.processes import open_processes, whole
from act24.tools.run.step import TrainingStep
from act24.tools.watch.sparsity_watch import take_flip_rates_

SOFT = """
[[passes]]
use = "relu2_ffn"
[[passes]]
use = "activation24"
method = "soft_dynamic"
dynamic_steps = 2
calibration_samples = 200
from_step = 1
"""
WEIGHT = """
[[passes]]
use = "weight24"
mask_every = 2
from_step = 1
"""
MVUE = {
    "activations": '[[passes]]\nuse = "relu2_ffn"\n[[passes]]\nuse = "activation24"\nmethod = "mvue"\n',
    "weight gradients": '[[passes]]\nuse = "weight24"\nscope = "mlp"\n',
}
LOST = """
[[passes]]
use = "lost"
attn_rank = 8
mlp_rank = 8
sparsity = 0.25
"""


def recipe_of(tiny, passes, *overrides):
    text = dump_recipe(tiny("train.total_batch_size=16", "log.weight_sparsity_every=0"))
    return parse_recipe(text.partition("[[passes]]")[0] + passes, "test", overrides)


def batch_of(seed, words=300, shortest=16):
    """Four rows of the vocabulary's first words, filled up behind `shortest` tokens or more."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(words, (4, 17), generator=generator)
    length = torch.randint(shortest, 17, (4, 1), generator=generator)
    return Batch(ids[:, :-1], ids[:, 1:].where(torch.arange(16) < length, -100))


def own_batches(rank, step):
    """Two micro-batches; on the second rank of few words, and of fewer tokens."""
    narrow = {"words": 5, "shortest": 4} if rank else {}
    return [batch_of(100 * step + 10 * rank + index, **narrow) for index in (0, 1)]


def gathered(value):
    """What every rank has."""
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def is_common(tensors):
    """Whether tensors by name have the same bits on all ranks."""
    ranks = gathered({name: whole(tensor.detach()) for name, tensor in tensors.items()})
    assert len(ranks) == 2
    return all(torch.equal(tensor, ranks[1][name]) for name, tensor in ranks[0].items())


def buffers(model, kind):
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith(kind)}


def scales(model):
    return [float(scale) for scale in buffers(model, "activation24_scale").values()]


ADAM = functools.partial(torch.optim.AdamW, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=0.5)


class Trainer:
    """A model in training, and what its forwards see of the scales.

    Made in a function that returns before its processes part: behind that the destructor of data parallelism
    may hang (`TrainingRun.close`).
    """

    def __init__(self, recipe, processes, optimizer=ADAM, seed=0):
        built = build(recipe, processes.device)
        self.model, self.pipeline = built.model, built.pipeline
        self.pipeline._seed = seed  # of the draws only: the weights are there
        self.step = TrainingStep(self.model, recipe.train, processes, self.pipeline)
        self.optimizer = optimizer(self.model.parameters())

    def update(self, step, batches):
        """Make an update; the scales in force at each of its forwards."""
        seen = []
        handle = self.model.model.norm.register_forward_hook(lambda *_: seen.append(scales(self.model)))
        self.step(batches, self.optimizer, step)
        handle.remove()
        return seen

    def parameters(self):
        return {name: whole(p.detach()).clone() for name, p in self.model.named_parameters()}


def activations(trainer, batch):
    """By layer, relu² of the pre-activations of a batch's tokens, as the layers before it run now."""
    kept, layers = [], trainer.model.model.layers
    handles = [
        layer.post_attention_layernorm.register_forward_hook(lambda _m, _i, output: kept.append(output))
        for layer in layers
    ]
    with torch.no_grad():
        trainer.step.summed_loss(batch.input_ids, batch.labels)
    for handle in handles:
        handle.remove()
    tokens = torch.ones_like(batch.labels, dtype=torch.bool) if batch.pads is None else ~batch.pads
    ups = [whole(layer.get_parameter("mlp.up_proj.weight").detach()) for layer in layers]
    return [torch.relu(hidden[tokens] @ up.T) ** 2 for hidden, up in zip(kept, ups, strict=True)]


def both(batches):
    return Batch(*(torch.cat([getattr(b, part) for b in batches]) for part in ("input_ids", "labels")))


def scale_by_hand(rows):
    """β of non-negative activations in float64, the third of every four found by sorting."""
    groups = rows.double().unflatten(-1, (-1, 4))
    soft = (groups - groups.sort(dim=-1).values[..., 1:2]).clamp(min=0)
    return float((groups * soft).sum() / soft.square().sum())


def heldout(rank):
    rows = [np.asarray(row) for row in batch_of(1000 + rank).input_ids]
    return HeldoutRows(rows, 8, 120, 500, "", max_length=16, pad_id=0, world_size=2)


def scales_agree(recipe, folder):
    with open_processes() as processes:
        for parallel in ("ddp", "fsdp"):
            train = recipe.train.model_copy(update={"parallel": parallel})
            follow_scales(recipe.model_copy(update={"train": train}), folder / parallel, processes)


def follow_scales(recipe, folder, processes):
    trainer = Trainer(recipe, processes)
    sharded = {isinstance(p, DTensor) for p in trainer.model.parameters()}
    assert sharded == {recipe.train.parallel == "fsdp"}
    before, others = scales(trainer.model), []
    for step in range(6):
        batches, due = own_batches(processes.rank, step), step in (1, 3, 5)
        trainer.pipeline.lower_(step)
        measured = activations(trainer, both(batches))
        seen = trainer.update(step, batches)
        now = scales(trainer.model)
        assert gathered(now) == [now, now]
        # The forward that measures runs under the old ones, all micro-batches under the new ones.
        assert seen == [before] * due + [now, now]
        assert [a != b for a, b in zip(now, before, strict=True)] == [due, due]
        for scale, *ranks in zip(now, *gathered(measured), strict=True) if due else ():
            assert len(ranks[0]) > len(ranks[1]) > 10
            assert scale == pytest.approx(scale_by_hand(torch.cat(ranks)), rel=1e-5)
            each = [scale_by_hand(rows) for rows in ranks]
            others.append([abs(scale - other) for other in (*each, sum(each) / 2)])
        evaluate(trainer.step.summed_loss, heldout(processes.rank), recipe, processes, trainer.pipeline)
        assert scales(trainer.model) == now
        if step == 3:
            saved = save(trainer, recipe, folder, step + 1)
        before = now
    assert all(max(apart) > 1e-3 for apart in zip(*others, strict=True)), "a rank's β or a mean would show"
    assert is_common(dict(trainer.model.named_parameters()))
    again = Trainer(recipe, processes)
    checkpoint.restore_(checkpoint.load(saved), again.model, again.optimizer)
    assert is_common(buffers(again.model, "activation24_scale"))
    file = load_file(saved / "model.safetensors")
    assert [float(file[name]) for name in buffers(again.model, "activation24_scale")] == scales(again.model)
    for step in (4, 5):  # with the β of the checkpoint, and with one measured after it
        again.update(step, own_batches(processes.rank, step))
    assert scales(again.model) == before
    for name, value in again.parameters().items():
        assert torch.equal(value, trainer.parameters()[name]), name


def save(trainer, recipe, folder, step):
    texts = {"recipe_text": dump_recipe(recipe), "plan": {}, "tokenizer_json": "{}"}
    state = {"state": {}, "rank_state": {}}
    return checkpoint.save(
        folder, step, model=trainer.model, optimizer=trainer.optimizer, keep=1, **texts, **state
    )


def test_a_scale_is_that_of_the_rows_of_all_ranks(tiny, tmp_path):
    run_ranks(2, scales_agree, recipe_of(tiny, SOFT), tmp_path)


def weights_agree(recipes):
    with open_processes() as processes:
        for method, recipe in recipes.items():
            follow_masks(method, recipe, processes)


def follow_masks(method, recipe, processes):
    trainer = Trainer(recipe, processes)
    start = {name: mask.clone() for name, mask in buffers(trainer.model, "24_mask").items()}
    assert len(start) == 14
    for step in range(6):
        trainer.update(step, own_batches(processes.rank, step))
        assert is_common(dict(trainer.model.named_parameters()))
        for kind in ("24_mask", "24_scale", "24_flips"):
            found = buffers(trainer.model, kind)
            assert is_common(found)
            assert len(found) == (0 if kind == "24_scale" and method == "transposable" else 14)
        if step:
            assert not is_common(buffers(trainer.model, "24_seed")), "the gradients are drawn by rank"
    changed = [not torch.equal(mask, start[n]) for n, mask in buffers(trainer.model, "24_mask").items()]
    assert all(changed)
    rates = take_flip_rates_(trainer.pipeline, 6)
    assert gathered(rates) == [rates, rates]
    assert rates["min"] > 0


def test_masks_and_scales_of_weights_are_those_of_all_ranks(tiny):
    methods = ("transposable", "soft_threshold")
    passes = {m: f'[[passes]]\nuse = "weight24"\nfrom_step = 1\nmethod = "{m}"\n' for m in methods}
    passes["transposable"] += "mask_every = 2\n"
    run_ranks(2, weights_agree, {m: recipe_of(tiny, text) for m, text in passes.items()})


def updated(recipe, processes, seed=0):
    """Parameters after an update on the same rows everywhere, and after one more on each rank's own."""
    trainer = Trainer(recipe, processes, SGD, seed)
    found = []
    for step in (0, 1):
        trainer.update(step, own_batches(processes.rank if step else 0, step))
        found.append(trainer.parameters())
    return found


def draws_by_rank(recipes):
    with open_processes() as processes:
        for recipe in recipes.values():
            first, last = updated(recipe, processes)
            # A lone process may have any rank; SGD's update is linear in the gradient.
            train = recipe.train.model_copy(update={"total_batch_size": 8})
            single = recipe.model_copy(update={"train": train})
            alone = [updated(single, replace(processes, rank=r, world_size=1))[0] for r in (0, 1)]
            for name, value in first.items():
                torch.testing.assert_close(value, (alone[0][name] + alone[1][name]) / 2)
            drawn = [name for name in first if name.endswith(("up_proj.weight", "down_proj.weight"))]
            assert len(drawn) == 4
            for name in drawn:
                assert not torch.allclose(alone[0][name], alone[1][name], rtol=1e-3, atol=1e-5), name
            again = updated(recipe, processes)[1]
            assert all(torch.equal(value, last[name]) for name, value in again.items())
            other = updated(recipe, processes, seed=1)[1]
            assert not any(torch.equal(other[name], last[name]) for name in drawn)


def test_ranks_draw_apart_and_the_same_again(tiny):
    run_ranks(2, draws_by_rank, {k: recipe_of(tiny, text, "train.grad_clip=0") for k, text in MVUE.items()})


def state_after_four_updates(recipe, processes):
    trainer = Trainer(recipe, processes, SGD)
    for step in range(4):
        trainer.update(step, own_batches(processes.rank, step))
    sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    assert sharded == (recipe.train.parallel == "fsdp")
    assert is_common(buffers(trainer.model, "24_mask"))
    return {name: whole(value).detach() for name, value in trainer.model.state_dict().items()}


def shards_train_as_replicas(recipes):
    """Masks are of whole weights and decay is of every shard: updates give the weights that DDP has."""
    with open_processes() as processes:
        ends = {p: state_after_four_updates(recipe, processes) for p, recipe in recipes.items()}
    assert sum(name.endswith("24_mask") for name in ends["ddp"]) == 14
    for name, value in ends["ddp"].items():
        torch.testing.assert_close(ends["fsdp"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["transposable", "sr_ste", "soft_threshold"])
def test_shards_train_as_replicas(tiny, method):
    """With a decay that shows, and masks that are renewed."""
    decay = "" if method == "soft_threshold" else "decay = 0.5\n"
    every = "mask_every = 2\n" if method == "transposable" else ""
    passes = f'[[passes]]\nuse = "weight24"\nmethod = "{method}"\nweight_gradient = "dense"\n{decay}{every}'
    recipes = {p: recipe_of(tiny, passes, f"train.parallel={p}") for p in ("ddp", "fsdp")}
    run_ranks(2, shards_train_as_replicas, recipes)


def columns_agree(recipes):
    with open_processes() as processes:
        batch = own_batches(processes.rank, 0)[0]
        for method, recipe in recipes.items():
            asked = {}

            def note(wanted, recipe=recipe, asked=asked):
                asked.update(wanted)
                return measure(recipe, wanted, batch, processes)

            model = build(recipe, processes.device, measure=note).model
            indices = buffers(model, "column_indices")
            assert len(indices) == 14
            assert is_common(indices)
            assert len({tuple(chosen.tolist()) for chosen in indices.values()}) == 14
            if method == "gradient":
                names = {n: n.replace("column_indices", "column_scores") for n in indices}
                ranks = gathered(measure(recipe, asked, batch, replace(processes, world_size=1)))
                for name, chosen in indices.items():
                    mine, theirs = (scores[names[name]] for scores in ranks)
                    assert set(chosen.tolist()) == best(mine + theirs, len(chosen))
                assert any(best(ranks[0][n], 8) != best(ranks[1][n], 8) for n in names.values())


def best(scores, count):
    return set(scores.argsort(descending=True)[:count].tolist())


def test_lost_keeps_the_same_columns_everywhere(tiny):
    methods = ("random", "gradient", "svd")
    run_ranks(2, columns_agree, {m: recipe_of(tiny, f'{LOST}method = "{m}"\n') for m in methods})


MIXED = """
[[passes]]
use = "relu2_ffn"
[[passes]]
use = "activation24"
method = "mvue"
targets = ["*.layers.0.*"]
[[passes]]
use = "activation24"
method = "soft_dynamic"
backward = "sparse"
dynamic_steps = 4
targets = ["*.layers.1.*"]
[[passes]]
use = "weight24"
scope = "attn"
mask_every = 3
"""
RUNS = {
    # β is due where the run resumes, and must not depend on what the layer before it drew last.
    "soft_dynamic behind mvue, beside weight24": (MIXED, ["log.gradient_cosine_every=3"]),
    # A replica would get the columns of the first rank in any case; a shard keeps its own.
    "transposable masks, sharded": (WEIGHT, ["train.parallel=fsdp", "log.weight_sparsity_every=2"]),
    "SR-STE, sharded": (
        '[[passes]]\nuse = "weight24"\nmethod = "sr_ste"\nscope = "mlp"\n',
        ["train.parallel=fsdp"],
    ),
    "lost, sharded": (f'{LOST}method = "gradient"\n', ["train.parallel=fsdp"]),
}


def trains(recipe, run_dir, resume):
    def checked(model, *arguments):
        assert is_common(buffers(model, "column_indices"))
        return TrainingStep(model, *arguments)

    training.TrainingStep = checked
    outcome = training.train(recipe, run_dir, resume=resume)
    if outcome.is_main:
        (run_dir / "outcome.json").write_text(json.dumps(asdict(outcome.evaluation)))


@pytest.mark.parametrize(("passes", "overrides"), RUNS.values(), ids=RUNS.keys())
def test_a_whole_run_resumes(tiny, tmp_path, passes, overrides):
    overrides = [*overrides, "train.steps=8", "eval.every=2", "checkpoint.every=4", "checkpoint.keep=2"]
    recipe = recipe_of(tiny, passes, *overrides)
    run_ranks(2, trains, recipe, tmp_path / "straight", "never")
    begun = tmp_path / "straight" / "checkpoints" / "step-000004"
    run_ranks(2, trains, recipe, tmp_path / "resumed", str(begun))
    ends = [tmp_path / name for name in ("straight", "resumed")]
    straight, resumed = (load_file(end / "checkpoints/step-000008/model.safetensors") for end in ends)
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    evaluations = [json.loads((end / "outcome.json").read_text()) for end in ends]
    assert evaluations[0] == evaluations[1]
