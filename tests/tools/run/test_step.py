"""One optimizer step against F.cross_entropy and autograd over the whole batch, in float64."""

import functools

import pytest
import torch
import torch.nn.functional as F
from slow import slow_but
from torch._dynamo.testing import CompileCounterWithBackend

from act24 import apply_
from act24.errors import Act24Error
from act24.llama import LlamaConfig, LlamaForCausalLM
from act24.optim import AdamW, parameter_groups
from act24.passes import Lora
from act24.tools.data import Batch
from act24.tools.run.build import build
from act24.tools.run.processes import Processes
from act24.tools.run.step import TrainingStep, _checkpoint_blocks_, accumulation, uses_compile
from act24.tools.run.train import train
from act24.tools.watch.monitor import Monitor

ALONE = Processes(0, 1, torch.device("cpu"))


def batches_of(count, rows=4, seed=0, length=16):
    """Rows of unequal lengths, padded and ignored on the right; the last batch is nearly empty."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        ids = torch.randint(300, (rows, length), generator=generator)
        labels = torch.randint(300, (rows, length), generator=generator)
        longest = 2 if index == count - 1 else length + 1
        filled = torch.randint(1, longest, (rows, 1), generator=generator)
        made.append(Batch(ids, labels.where(torch.arange(length) < filled, -100)))
    return made


def whole_batch(batches):
    return torch.cat([b.input_ids for b in batches]), torch.cat([b.labels for b in batches])


def gradients_of_whole_batch(model, batches):
    """Loss and gradients of one mean over all tokens, without anything of `tools`."""
    ids, labels = whole_batch(batches)
    loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten(), ignore_index=-100)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def step_of(recipe, model, batches):
    """The result of a step of SGD at learning rate 1, and by how much it moved each parameter."""
    before = [p.detach().clone() for p in model.parameters()]
    step = TrainingStep(model, recipe.train, ALONE)
    result = step(batches, torch.optim.SGD(model.parameters(), lr=1.0))
    return result, [old - new.detach() for old, new in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("count", [1, 3])
def test_accumulation_is_one_mean_over_all_tokens(tiny, count):
    overrides = (f"train.total_batch_size={4 * count}", "train.grad_clip=0")
    recipe = tiny(*overrides, "passes.activation24.from_step=0")
    model = build(recipe, ALONE.device).model.double()
    batches = batches_of(count)
    loss, gradients = gradients_of_whole_batch(model, batches)
    result, moved = step_of(recipe, model, batches)
    torch.testing.assert_close(result.loss.double(), loss.detach())
    assert result.tokens == sum((b.labels >= 0).sum() for b in batches)
    for ours, theirs in zip(moved, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)  # 1 / tokens is float32


@pytest.mark.parametrize("limit", [0.0, 0.1, 1000.0])
def test_clipping_by_global_norm(tiny, limit):
    recipe = tiny(f"train.grad_clip={limit}")
    model = build(recipe, ALONE.device).model.double()
    batches = batches_of(2)
    _, gradients = gradients_of_whole_batch(model, batches)
    norm = torch.sqrt(sum(g.square().sum() for g in gradients))
    result, moved = step_of(recipe, model, batches)
    torch.testing.assert_close(result.grad_norm, norm)
    scale = limit / (norm + 1e-6) if 0 < limit < norm else 1.0
    assert (limit == 0.1) == (scale != 1.0)
    for ours, theirs in zip(moved, gradients, strict=True):
        torch.testing.assert_close(ours, theirs * scale)


def test_rows_that_cannot_be_shared_out(tiny):
    train = tiny("train.batch_size=4", "train.total_batch_size=12").train
    assert accumulation(train, 3) == 1
    assert accumulation(train, 1) == 3
    with pytest.raises(Act24Error, match=r"train\.total_batch_size \(12\) .* \(4 × 2 = 8\)"):
        accumulation(train, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16_autocast"])
def test_lower_precision_computes_nearly_the_same(tiny, dtype):
    overrides = ("train.grad_clip=0", "passes=[]")
    model = build(tiny(*overrides), ALONE.device).model
    batches = batches_of(2)
    exact, gradients = gradients_of_whole_batch(model, batches)
    recipe = tiny(*overrides, f"train.dtype={dtype}")
    lower = build(recipe, ALONE.device).model
    stored = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    assert {p.dtype for p in lower.parameters()} == {stored}
    result, moved = step_of(recipe, lower, batches)
    assert result.loss.dtype == torch.float32
    assert result.loss != exact  # it really is another precision
    torch.testing.assert_close(result.loss, exact.detach(), rtol=5e-3, atol=0)
    for ours, theirs in zip(moved, gradients, strict=True):
        if stored == torch.float32:
            assert (ours - theirs).norm() < 0.05 * theirs.norm()


def test_recomputed_activations_change_nothing(tiny):
    models = [build(tiny(), ALONE.device) for _ in range(2)]
    plain, recomputed = (
        TrainingStep(built.model, tiny(f"train.activation_checkpointing={flag}").train, ALONE)
        for built, flag in zip(models, ("false", "true"), strict=True)
    )
    optimizers = [torch.optim.SGD(built.model.parameters(), lr=0.1) for built in models]
    for step in (8, 9, 10, 11):  # past the boundary, where the graphs inside the wrappers change
        results = []
        for built, training_step, optimizer in zip(models, (plain, recomputed), optimizers, strict=True):
            assert built.pipeline.lower_(step) == (step == 10)
            results.append(training_step(batches_of(2, seed=step), optimizer))
        assert results[0] == results[1]
    states = [built.model.state_dict() for built in models]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_host_waits_for_nothing_between_logged_steps(tiny, reads):
    recipe = tiny("passes.activation24.from_step=0")
    built = build(recipe, ALONE.device)
    step = TrainingStep(built.model, recipe.train, ALONE)
    optimizer = AdamW(parameter_groups(built.model, 0.1), lr=0.01)
    monitor = Monitor(recipe, built, optimizer, ALONE, None, None, None)
    reads.count = 0  # to build reads the states of generators
    with reads:
        for index in range(1, 4):
            monitor.add(index, step(batches_of(2), optimizer), 0.1, 0.0)
        assert reads.count == 0
        window = monitor.flush(3)
        assert 0 < reads.count <= 3  # sums, statistics, weight sparsity: one transfer each
    assert window.tokens == 3 * sum(int((b.labels >= 0).sum()) for b in batches_of(2))
    assert len(monitor.sites) == 2


@pytest.fixture
def compiles(request, monkeypatch):
    """Counts compiled graphs, by a backend that takes seconds less than the usual one."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(getattr(request, "param", "aot_eager"))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("recompute", slow_but(("true",), ["false", "true"]))
def test_compiles_once_and_once_more_at_a_boundary(tiny, compiles, recompute):
    overrides = (f"train.activation_checkpointing={recompute}",)
    recipe = tiny("train.compile=on", *overrides)
    built, plain = build(recipe, ALONE.device), build(recipe, ALONE.device)
    step = TrainingStep(built.model, recipe.train, ALONE)
    reference = TrainingStep(plain.model, tiny("train.compile=off", *overrides).train, ALONE)
    optimizers = [torch.optim.SGD(b.model.parameters(), lr=0.1) for b in (built, plain)]
    frames = []
    for updates in range(7, 15):
        built.pipeline.lower_(updates)
        plain.pipeline.lower_(updates)
        result = step(batches_of(2, seed=updates), optimizers[0])
        expected = reference(batches_of(2, seed=updates), optimizers[1])
        torch.testing.assert_close(result.loss, expected.loss)
        frames.append(compiles.frame_count)
    # Two equal blocks are one graph, and the loss is another; at step 10 the blocks' graph changes.
    assert frames == [2, 2, 2, 3, 3, 3, 3, 3]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("compiles", ["eager"], indirect=True)
def test_a_whole_run_compiles_each_graph_once(tiny, compiles, tmp_path):
    """Blocks and loss to train on; both to evaluate, in batches of another size; blocks again for 2:4."""
    train(tiny("train.compile=on", "eval.batch_size=3"), tmp_path)
    assert compiles.frame_count == 6
    inputs = [node.meta["example_value"] for graph in compiles.graphs for node in placeholders(graph)]
    assert all(isinstance(size, int) for value in inputs for size in value.shape)  # none is of any size


def placeholders(graph):
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def test_a_step_by_inductor_computes_the_same(tiny, monkeypatch):
    """One step of one block, 2:4 in force, compiled as on a GPU but for the device: weights after it, too.
    Without vectors: to find out which there are, programs are compiled that take as long as the step's."""
    monkeypatch.setattr(torch._inductor.config.cpp, "vec_isa_ok", False)
    recipe = tiny("train.compile=on", "passes.activation24.from_step=0", "model.num_hidden_layers=1")
    states = []
    for train_section in (recipe.train, recipe.train.model_copy(update={"compile": "off"})):
        built = build(recipe, ALONE.device)
        step = TrainingStep(built.model, train_section, ALONE)
        result = step(batches_of(2, seed=0), torch.optim.SGD(built.model.parameters(), lr=0.1))
        states.append({"loss": result.loss, "norm": result.grad_norm, **built.model.state_dict()})
    torch.testing.assert_close(*states)
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_for_real_it_computes_the_same(tiny):
    recipe = tiny("train.compile=on", "passes.activation24.from_step=0")
    built, plain = build(recipe, ALONE.device), build(recipe, ALONE.device)
    ours = TrainingStep(built.model, recipe.train, ALONE)
    theirs = TrainingStep(plain.model, tiny("train.compile=off").train, ALONE)
    optimizers = [torch.optim.SGD(b.model.parameters(), lr=0.1) for b in (built, plain)]
    for seed in range(3):
        found = ours(batches_of(2, seed=seed), optimizers[0])
        expected = theirs(batches_of(2, seed=seed), optimizers[1])
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.grad_norm, expected.grad_norm, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("choice", "device", "compiled"),
    [("auto", "cpu", False), ("auto", "cuda", True), ("on", "cpu", True), ("off", "cuda", False)],
)
def test_auto_compiles_for_gpus(tiny, choice, device, compiled):
    assert uses_compile(tiny(f"train.compile={choice}").train, torch.device(device)) == compiled


def test_gradient_cosines_see_the_padding_of_their_own_batch(tiny):
    """After a step over other rows they are what a fresh start gives."""
    recipe = tiny("passes.activation24.from_step=0", "passes.activation24.backward=sparse")
    batches, found = batches_of(3), []
    for before in ([], batches[1:]):
        built = build(recipe, ALONE.device)
        step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
        if before:
            step(before, torch.optim.SGD(built.model.parameters(), lr=0.0))
        found.append(step.gradient_cosines(batches[0], step=1))
    assert len(found[0]) == 4
    for name, cosine in found[0].items():
        assert torch.equal(cosine, found[1][name]), name


def test_recomputed_dropout_draws_what_the_forward_drew():
    """An adapter's dropout draws from PyTorch's generator, and recomputation comes after other draws."""
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(64, 32, 64, num_hidden_layers=2, num_attention_heads=2))
        apply_(model, [Lora(dropout=0.5)])
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.data.fill_(0.1)
        if recomputed:
            _checkpoint_blocks_(model)
        torch.manual_seed(1)
        model(torch.arange(24).reshape(2, 12)).square().sum().backward()
        named = {n.replace("_checkpoint_wrapped_module.", ""): p for n, p in model.named_parameters()}
        gradients.append({n: p.grad for n, p in named.items() if p.grad is not None})
    assert any(name.endswith("lora_A") and gradient.any() for name, gradient in gradients[0].items())
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name])
