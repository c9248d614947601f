"""What a captured step does, with graphs that only remember (`fake_graphs`). What a GPU does is checked by
`act24.tools.bench.check_graphs`, by hand."""

from dataclasses import replace

import pytest
import torch
from children import run_ranks
from fake_graphs import use_fake_graphs
from slow import slow_but
from test_step import ALONE, batches_of
from tiny import load_tiny

from act24.errors import Act24Error
from act24.tools.data import Batch
from act24.tools.run.build import build
from act24.tools.run.graphs import WARM_UP, FixedInputs, GraphedCalls, why_not_captured
from act24.tools.run.optimizers import build_optimizer
from act24.tools.run.processes import Processes, open_processes
from act24.tools.run.step import TrainingStep
from act24.tools.run.train import train


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("choice", ["auto", "on", "off"])
def test_what_prevents_capture(tiny, choice, device, world_size, parallel):
    recipe = tiny(f"train.cuda_graphs={choice}", f"train.parallel={parallel}")
    arguments = (recipe.train, torch.device(device), world_size)
    sharded = parallel == "fsdp" and world_size == 2
    if choice == "off":
        assert "off" in why_not_captured(*arguments)
    elif device == "cuda" and not sharded:
        assert why_not_captured(*arguments) == ""
        if choice == "auto":
            assert "given no pipeline" in why_not_captured(*arguments, has_pipeline=False)
    elif choice == "on":
        named = "no CUDA GPU" if device == "cpu" else "train.parallel"
        with pytest.raises(Act24Error, match=rf'train\.cuda_graphs = "on" cannot be: .*{named}'):
            why_not_captured(*arguments)
    else:
        assert ("no CUDA GPU" if device == "cpu" else "fsdp") in why_not_captured(*arguments)


def test_a_run_on_a_cpu_refuses_graphs(tiny, tmp_path):
    with pytest.raises(Act24Error, match="no CUDA GPU, this is cpu"):
        train(tiny("train.cuda_graphs=on"), tmp_path / "run")


def test_inputs_lie_where_they_lay():
    inputs = FixedInputs(ALONE.device)
    first = inputs.fill("ids", torch.arange(6).view(2, 3))
    other = inputs.fill("labels", torch.arange(6).view(2, 3))
    wider = inputs.fill("ids", torch.arange(8).view(2, 4))
    again = inputs.fill("ids", torch.arange(6, 12).view(2, 3))
    assert again.data_ptr() == first.data_ptr()
    assert len({first.data_ptr(), other.data_ptr(), wider.data_ptr()}) == 3
    assert first.tolist() == [[6, 7, 8], [9, 10, 11]]
    assert other.tolist() == [[0, 1, 2], [3, 4, 5]]


class Counted:
    """A graph that counts its replays."""

    def __init__(self):
        self.replays, self.gone = 0, False

    def replay(self):
        self.replays += 1

    def reset(self):
        self.gone = True

    def pool(self):
        return self


def test_calls_are_warmed_up_captured_and_replayed_by_key():
    made, pools, ran = [], [], []

    def capture(function, stream, pool):
        made.append(Counted())
        pools.append(pool)
        return made[-1], (torch.tensor(float(len(made))),)

    calls = GraphedCalls(ALONE.device, capture=capture)
    for key in ("a", "b") * 5:
        calls(key, lambda key=key: ran.append(key) or (torch.zeros(()),))
    assert ran == ["a", "b"] * WARM_UP
    assert [graph.replays for graph in made] == [5 - WARM_UP] * 2
    assert pools == [None, made[0]]  # one pool for all
    assert calls("b", lambda: (torch.zeros(()),))[0] == 2
    calls.drop()
    assert all(graph.gone for graph in made)
    for _ in range(WARM_UP + 1):
        calls("a", lambda: (torch.zeros(()),))
    assert len(made) == 3
    assert pools[-1] is None


def test_graphs_give_their_memory_up_for_a_call_that_runs_as_it_is():
    """One kind again and again, others now and then: at no time has a launched call the memory of graphs
    beside its own. What was warm is captured anew when it is next called, and all kinds are in the end."""
    held, captured, beside = set(), [], []

    class Holding(Counted):
        def reset(self):
            held.remove(self)

    def capture(function, stream, pool):
        captured.append(function.__doc__)
        held.add(graph := Holding())
        return graph, (torch.tensor(0.0),)

    def of_kind(kind):
        def function():
            beside.append(len(held))
            return (torch.tensor(0.0),)

        function.__doc__ = kind
        return function

    calls = GraphedCalls(ALONE.device, capture=capture)
    for number in range(60):
        for kind in ["train"] * 4 + ["evaluate"] * (number % 10 == 9) + ["padded"] * (number % 20 == 19):
            calls(kind, of_kind(kind))
    assert beside == [0] * (3 * WARM_UP)
    # Training behind the first evaluation and the second, with padded rows behind it; both kinds behind the
    # second padded rows; and these.
    assert captured == ["train", "train", "train", "evaluate", "train", "evaluate", "padded"]
    assert len(held) == 3


def test_padding_is_a_kind_of_its_own_only_where_it_is_read(tiny, monkeypatch):
    """The micro-batch in which an epoch ends: a dense model computes the same with it."""
    plain = [Batch(b.input_ids, b.input_ids.roll(-1, 1)) for b in batches_of(2)]
    kinds = {}
    for passes in ("", '{use="relu2_ffn"},{use="activation24",from_step=0}'):
        fake = use_fake_graphs(monkeypatch)
        recipe = tiny(f"passes=[{passes}]", "log.activation_statistics=false")
        built = build(recipe, ALONE.device)
        step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
        optimizer = build_optimizer(built.model, recipe.optimizer)
        for number, batches in enumerate([plain, plain, batches_of(2), batches_of(2), plain]):
            step(batches, optimizer, number)
        kinds[passes] = [graph.replays for graph in fake.made]
    # With padding read: captured before, behind two padded micro-batches, and for those.
    assert list(kinds.values()) == [[8], [2, 2, 2]]


@pytest.mark.parametrize("must", [False, True])
def test_a_capture_that_fails_is_said_once_or_an_error(must):
    attempts = []

    def capture(function, stream, pool):
        attempts.append(function)
        raise RuntimeError("operation not permitted when stream is capturing\nand more lines")

    calls = GraphedCalls(ALONE.device, must, capture)
    for _ in range(WARM_UP):
        calls("a", lambda: (torch.ones(()),))
    assert not calls.problem
    if must:
        with pytest.raises(
            Act24Error, match="RuntimeError: operation not permitted when stream is capturing\\."
        ):
            calls("a", lambda: (torch.ones(()),))
        return
    for _ in range(3):
        assert calls("a", lambda: (torch.ones(()),))[0] == 1
    assert len(attempts) == 1
    assert calls.problem == "RuntimeError: operation not permitted when stream is capturing"


def trained(recipe, pads, updates=6, evaluated=True, kept=False):
    """Losses and parameters after some updates, past a boundary at the third. `kept`: weights in e4m3 and
    packed ones are made once an update, as where there are kernels."""
    built = build(recipe, ALONE.device)
    if kept:
        # As where a tuner found 2:4 products faster.
        table = tuple(
            ((f"linear_{kind}", 64, *shape), (1, 1.0, 2.0))
            for kind in ("y", "grad_x")
            for shape in ((64, 64), (128, 64), (64, 128))
        )
        for p in built.pipeline.passes:
            if p.name == "weight24":
                built.pipeline.exchange_(p, replace(p, algorithms=table, keep_packed=True))
            elif p.name in ("fp8", "activation24"):
                built.pipeline.exchange_(p, replace(p, keep_cast=True))
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    found = []
    for number in range(updates):
        built.pipeline.lower_(number)
        batches = batches_of(2, seed=number)
        if not pads:
            batches = [Batch(b.input_ids, b.input_ids.roll(-1, 1)) for b in batches]
        found.append(step(batches, optimizer, number).loss)
        if evaluated:
            found += step.evaluation_loss(batches[0])
    return step, [*found, *(p.detach() for p in built.model.parameters())]


PASSES = {
    "naive": '{use="activation24",from_step=2}',
    "mvue": '{use="activation24",from_step=2,method="mvue"}',
    "soft": '{use="activation24",from_step=2,method="soft_dynamic",dynamic_steps=1,calibration_samples=4}',
    "weight24": '{use="weight24",from_step=2,mask_every=2}',
    "fp8": '{use="activation24",from_step=2,backward="split_gemm"},{use="fp8",from_step=2,head=true}',
}


@pytest.mark.parametrize("pads", slow_but((True,), [False, True]))
@pytest.mark.parametrize(
    "passes", slow_but([PASSES[name] for name in ("mvue", "weight24", "fp8")], PASSES.values()), ids=PASSES
)
def test_replayed_steps_are_the_launched_ones_bit_for_bit(tiny, monkeypatch, passes, pads):
    overrides = (
        "train.dtype=bfloat16_autocast",
        "model.vocab_size=304",  # of which e4m3 has products
        f'passes=[{{use="relu2_ffn"}},{passes}]',
    )
    launched = tiny(*overrides, "train.cuda_graphs=off")
    _, expected = trained(launched, pads)
    fake = use_fake_graphs(monkeypatch)
    step, found = trained(tiny(*overrides), pads)
    assert not step.not_captured
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    # Two states, each with a graph for training, captured again behind the second held-out batch, which was
    # launched, and from the third held-out batch on one for evaluation.
    made = [(graph.name, graph.replays) for graph in fake.made]
    assert made == [("accumulate", 2), ("accumulate", 2), ("accumulate", 4), ("forward", 2)]


@pytest.mark.parametrize(
    "passes", slow_but(("activation24 in fp8",), ["fp8", "activation24 in fp8", "weight24"])
)
def test_weights_to_read_are_replayed_too(tiny, monkeypatch, passes):
    """Once an update, and from the third update of a state on from a graph of their own."""
    of_pass = {
        "fp8": '{use="fp8",from_step=2}',
        "activation24 in fp8": '{use="activation24",from_step=2,precision="fp8",backward="split_gemm"}',
        "weight24": '{use="weight24",from_step=2,method="ste"}',
    }
    overrides = (
        "train.dtype=bfloat16_autocast",
        f'passes=[{{use="relu2_ffn",width="keep"}},{of_pass[passes]}]',
        "model.hidden_size=64",
        "model.intermediate_size=128",
    )
    _, expected = trained(tiny(*overrides, "train.cuda_graphs=off"), False, 7, False)
    _, kept = trained(tiny(*overrides, "train.cuda_graphs=off"), False, 7, False, kept=True)
    fake = use_fake_graphs(monkeypatch)
    step, found = trained(tiny(*overrides), False, 7, False, kept=True)
    assert not step.not_captured
    for ours, launched, theirs in zip(found, kept, expected, strict=True):
        assert torch.equal(ours, launched)
        assert torch.equal(ours, theirs)
    renewed = [graph.replays for graph in fake.made if graph.name == "renew"]
    # Of five updates with the pass the first is before old graphs are dropped, and two are warm-ups.
    assert renewed == [2]


def test_what_no_longer_trains_gets_no_update(tiny, monkeypatch):
    """A parameter that nothing reads has no gradient, rather than one of zeros that decays it."""
    use_fake_graphs(monkeypatch)
    recipe = tiny("passes=[]")
    built = build(recipe, ALONE.device)
    unread = torch.nn.Parameter(torch.ones(3))
    built.model.register_parameter("unread", unread)
    step = TrainingStep(built.model, recipe.train, ALONE, built.pipeline)
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    for number in range(3):
        step(batches_of(2, seed=number), optimizer, number)
    assert unread.grad is None
    assert unread.eq(1).all()


def test_a_failed_capture_is_noted_and_training_goes_on(tiny, monkeypatch):
    use_fake_graphs(monkeypatch)

    def fails(function, stream, pool):
        raise RuntimeError("no")

    recipe = tiny("passes=[]")
    built = build(recipe, ALONE.device)
    step = TrainingStep(built.model, recipe.train, Processes(0, 1, ALONE.device), built.pipeline)
    step._graphs._capture = fails
    optimizer = build_optimizer(built.model, recipe.optimizer, pipeline=built.pipeline)
    notes = [step(batches_of(2, seed=number), optimizer, number).note for number in range(4)]
    assert step.not_captured == "RuntimeError: no"
    said = "no CUDA graphs, steps are launched operator by operator: RuntimeError: no"
    assert notes == [None, said, None, None]


def captured_on_two(path):
    """Three steps of the dense form and four of the sparse one, of two micro-batches on each rank."""
    recipe = load_tiny(path, "train.total_batch_size=16", "train.grad_clip=0.5")
    alone = build(recipe, ALONE.device)
    reference = TrainingStep(alone.model, recipe.train, ALONE, alone.pipeline)
    reference_optimizer = torch.optim.SGD(alone.model.parameters(), lr=0.1)
    with open_processes() as processes, pytest.MonkeyPatch.context() as monkeypatch:
        fake = use_fake_graphs(monkeypatch)
        built = build(recipe, processes.device)
        if processes.rank:  # the main process's weights count
            torch.nn.init.zeros_(built.model.lm_head.weight)
        step = TrainingStep(built.model, recipe.train, processes, built.pipeline)
        optimizer = torch.optim.SGD(built.model.parameters(), lr=0.1)
        for updates in range(7, 14):
            built.pipeline.lower_(updates)
            alone.pipeline.lower_(updates)
            everything = batches_of(4, seed=updates)
            mine = everything[2 * processes.rank : 2 * processes.rank + 2]
            ours, theirs = step(mine, optimizer, updates), reference(everything, reference_optimizer, updates)
            assert ours.tokens == theirs.tokens
            torch.testing.assert_close(ours.loss, theirs.loss)
            torch.testing.assert_close(ours.grad_norm, theirs.grad_norm)
        for ours, theirs in zip(built.model.parameters(), alone.model.parameters(), strict=True):
            torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-4, atol=1e-6)
        assert [graph.replays for graph in fake.made] == [4, 6]


def test_two_captured_processes_do_what_one_does(tiny_file):
    run_ranks(2, captured_on_two, tiny_file)
