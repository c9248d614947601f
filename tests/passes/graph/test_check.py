"""What a proxy would answer wrongly, and what a graph cannot do, is found on numbers or refused by name."""

from __future__ import annotations

import collections
import copy
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Net, SwiGLU, Trunk, features, llama, regions, tokens

from act24.passes import LowRank, PassError, Pipeline, Relu2FFN, Weight24, apply_, plan, trace
from act24.passes.graph import check as checking
from act24.passes.graph.check import Check
from act24.passes.graph.outcomes import Outcome, difference_of
from act24.passes.graph.region import RegionModule
from act24.passes.graph.tracer import Unclean

MLP_RANK = {"scope": "mlp", "mlp_rank": 2}


def test_the_cost_is_what_is_documented() -> None:
    """Six forwards of the model, and of each region six and two backwards."""

    class Counts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls = collections.Counter[str]()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls[func.__name__.partition(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    model = Trunk(SwiGLU, layers=3)
    model.blocks.append(nn.Tanh())
    with Counts() as counted:
        apply_(model, [LowRank(**MLP_RANK)], probe=features(2, 16))
    assert counted.calls["tanh"] == 6
    assert counted.calls["silu"] == 3 * (6 + 6)
    assert counted.calls["silu_backward"] == 3 * 2


def why(forward: Any) -> str:
    """Why a module with this forward is no region, or the empty string."""
    kind = type("Asking", (Net,), {"forward": forward})
    model = nn.ModuleList([kind(), kind()])
    state = torch.get_rng_state()
    reasons = trace(model, Check(model))[1]
    assert torch.equal(torch.get_rng_state(), state)
    return reasons.get("0 [Asking]", "")


def _isinstance(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * 2 if isinstance(x, Tensor) else self.a(x))


def _is_tensor(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * 2 if torch.is_tensor(x) else self.a(x))


def _grad_enabled(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * 2 if torch.is_grad_enabled() else self.a(x))


def _autocast(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * 2 if torch.is_autocast_enabled("cpu") else self.a(x))


def _compiling(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * 2 if torch.compiler.is_compiling() else self.a(x))


def _random(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x) * float(torch.rand(())))


def _tried(self: Any, x: Tensor) -> Tensor:
    try:
        wide = bool(x.shape[0] > 1)
    except Exception:
        wide = False
    return self.b(self.a(x) * 2 if wide else self.a(x))


def _length(self: Any, x: Tensor) -> Tensor:
    try:
        return self.b(self.a(x) * len(x))
    except Exception:
        return self.b(self.a(x))


_apply = type(
    "Through",
    (torch.autograd.Function,),
    {"forward": staticmethod(lambda ctx, x: x * 1), "backward": staticmethod(lambda ctx, g: g * 7)},
).apply


def _function(self: Any, x: Tensor) -> Tensor:
    """By a name that was bound before anybody could look."""
    return self.b(_apply(self.a(x)))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_isinstance, "asks what kind of value x is"),
        (_is_tensor, "asks what kind of value x is"),
        (_grad_enabled, "torch.is_grad_enabled()"),
        (_autocast, "torch.is_autocast_enabled()"),
        (_compiling, "torch.compiler.is_compiling()"),
        (_random, "random number"),
        (_tried, "control flow"),
        (_length, "length"),
        (_function, "autograd.Function"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_questions_without_an_answer_are_refused(forward: Any, reason: str) -> None:
    assert reason in why(forward)


def test_hasattr_is_answered_as_by_a_tensor() -> None:
    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * 3 if hasattr(x, "last_hidden_state") else self.a(x))

    model = nn.Sequential(Asking(), Asking())
    expected = model(features(3, 4))
    report = apply_(model, [LowRank(scope="mlp", mlp_rank=2, targets=("*.a",), init="svd")]).report
    assert "2 regions compute what their modules do" in report.checked
    assert model(features(3, 4)).shape == expected.shape
    assert isinstance(model[0], RegionModule)


def test_what_no_guard_knows_is_found_on_numbers() -> None:
    class Asking(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * (2 if "tensor" in repr(x) else 1))

    model = nn.Sequential(Asking(), nn.Linear(4, 4), Asking())
    found, reasons = trace(model, Check(model))
    assert reasons["0 [Asking]"].startswith("its graph gives other numbers than the module in evaluation: ")
    assert {type(region.module) for region in found} == {nn.Linear}
    assert regions(model)["0"] == "Asking"  # without the check nobody knows


def test_gradients_are_compared_too() -> None:
    """A graph that gives the same numbers and another gradient."""
    net = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
    model = nn.Sequential(net, nn.Linear(4, 2))
    check, graph = Check(model), trace(model)[0][0].graph
    check.region(net, graph)
    silu = next(node for node in graph.nodes if node.target is F.silu)
    with graph.inserting_after(silu):
        cut = graph.call_method("detach", (silu,))
    silu.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)
    with pytest.raises(Unclean, match="gives an input no gradient, or one too many in training"):
        check.region(net, graph)


@pytest.mark.parametrize("odd", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_hides_no_other(odd: float) -> None:
    """nan was no tolerance and a traceback, and an infinite one let any gradient pass."""
    gradient = torch.ones(8)
    gradient[0] = odd
    other = gradient.clone()
    assert not difference_of(Outcome([], [gradient]), Outcome([], [other]))
    other[3] = -1.0
    difference = difference_of(Outcome([], [gradient]), Outcome([], [other]))
    assert difference == "gives other gradients than the module"


@pytest.mark.parametrize("odd", [{"rope_theta": 1e-300}, {"initializer_range": 1e300}])
def test_what_gives_no_finite_number_is_not_said_to_be_checked(odd: dict[str, float]) -> None:
    """A traceback; and nan agrees with nan. Where rotary angles are infinite, on some CPUs it is the gradient
    alone: what their attention makes of nan differs."""
    report = plan(llama(**odd), [Relu2FFN()]).checked
    modes = ("evaluation", "training")
    assert report in [
        f"not checked: LlamaDecoderLayer: it gives no finite number in {mode}" for mode in modes
    ]


def test_a_cast_to_the_dtype_of_a_weight_is_always_made() -> None:
    """The line of T5 and eight others; `float32` is what the check runs, half what has to work."""

    class Cast(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            if (
                isinstance(self.b.weight, torch.Tensor)
                and x.dtype != self.b.weight.dtype
                and self.b.weight.dtype != torch.int8
            ):
                x = x.to(self.b.weight.dtype)
            return self.b(x)

    for half in (False, True):
        model = nn.Sequential(Cast(), Cast())
        for net in model if half else ():
            net.a.half()
        model = nn.Sequential(model[0])
        x = features(3, 4).half() if half else features(3, 4)
        expected = model(x)
        assert regions(model) == {"0": "Cast"}
        apply_(model, [Weight24(targets=("*.a", "*.b"), from_step=3)], probe=x)
        assert isinstance(model[0], RegionModule)
        assert torch.equal(model(x), expected)


# What a module does besides its forward


def test_behaviour_besides_forward_is_no_region() -> None:
    def call(self: Any, x: Tensor) -> Tensor:
        return nn.Module.__call__(self, x) + 1

    def state(self: Any) -> int:
        return 3

    for name, method in (("__call__", call), ("get_extra_state", state)):
        kind = type("Own", (SwiGLU,), {name: method})
        model = nn.ModuleList([kind(4, 8), kind(4, 8)])
        assert f"has a {name} of its own" in trace(model)[1]["0 [Own]"]


@pytest.mark.parametrize("post", [False, True])
def test_hooks_on_replaced_parameters_are_refused_and_others_kept(post: bool) -> None:
    model, seen = Trunk(SwiGLU), []
    weights = model.blocks[0].mlp.gate.weight, model.blocks[0].mlp.down.weight
    hook = lambda value: seen.append(1)  # noqa: E731
    handles = [w.register_post_accumulate_grad_hook(hook) if post else w.register_hook(hook) for w in weights]
    with pytest.raises(PassError, match=r"blocks\.0\.mlp\.gate\.weight has a hook.*register it"):
        apply_(model, [Relu2FFN(width="keep")])
    handles[0].remove()
    apply_(model, [Relu2FFN(width="keep")])
    model(features(3, 16)).sum().backward()
    assert seen == [1]


def test_a_compiled_or_wrapped_model_is_refused() -> None:
    model = Trunk(SwiGLU)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    with pytest.raises(PassError, match=r"blocks\.1 \[OptimizedModule\] is compiled: .* compile it then"):
        apply_(model, [Relu2FFN()])
    with pytest.raises(PassError, match=r"the model \[DataParallel\] is wrapped: .* wrap it then"):
        plan(nn.DataParallel(Trunk(SwiGLU)), [Relu2FFN()])
    with pytest.raises(PassError, match=r"0\.weight has no shape yet: run the model once"):
        plan(nn.Sequential(nn.LazyLinear(3), SwiGLU()), [Relu2FFN()])


def test_a_block_that_was_compiled_in_place_stays_compiled() -> None:
    model, graphs = Trunk(SwiGLU), []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend=backend, fullgraph=True)
    apply_(model, [Relu2FFN()])
    assert isinstance(model.blocks[0], RegionModule)
    model(features(3, 16))
    assert graphs
    inner = Trunk(SwiGLU)
    inner.blocks[0].mlp.compile(backend="eager")
    with pytest.raises(PassError, match=r"blocks\.0\.mlp is compiled in place"):
        apply_(inner, [Relu2FFN()])


# Looking leaves no trace


class Meter:
    def __init__(self) -> None:
        self.last: Any = None

    def update(self, value: Any) -> None:
        self.last = value


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (Meter, lambda held, x: held.update(x)),
        (collections.deque, lambda held, x: held.append(x)),
        (lambda: collections.defaultdict(list), lambda held, x: held["a"].append(x)),
        (collections.OrderedDict, lambda held, x: held.update(a=x)),
        (lambda: [[]], lambda held, x: held[0].append(x)),
    ],
    ids=["object", "deque", "defaultdict", "subclass", "nested"],
)
def test_objects_that_forward_writes_to_keep_nothing(make: Any, write: Any) -> None:
    class Recorder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.held = make()

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            write(self.held, x)
            return self.b(x)

    model = nn.Sequential(Recorder(), Recorder())
    before = copy.deepcopy(vars(model[0].held) if isinstance(model[0].held, Meter) else model[0].held)
    _, reasons = trace(model, Check(model))
    assert reasons["0 [Recorder]"].startswith("forward writes Recorder.held: write it in a forward hook")
    held = model[0].held
    assert (vars(held) if isinstance(held, Meter) else held) == before


def test_the_check_writes_no_buffer_and_draws_nothing() -> None:
    class Counting(SwiGLU):
        def __init__(self) -> None:
            super().__init__(4, 8)
            self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.drop(super().forward(self.norm(x.flatten(0, 1)).view_as(x)))

    model = nn.Sequential(Counting(), Counting()).train()
    state, drawn = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    report = plan(model, [Relu2FFN(optional=True)])
    assert "2 regions" in report.checked
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_forward_that_writes_to_parameters_is_refused_before_it_does() -> None:
    """As RWKV's, between evaluation and training."""

    class Rescaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.rescaled = SwiGLU(4, 8), True

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            if self.rescaled == self.training:
                with torch.no_grad():
                    self.mlp.down.weight.mul_(2)
                self.rescaled = not self.training
            return self.mlp(x)

    model = nn.Sequential(Rescaling(), Rescaling()).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(PassError, match=r"writes to its parameter 0\.mlp\.down\.weight.*check=False"):
        plan(model, [Weight24(targets=("*.mlp.*",))])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan(model, [Weight24(targets=("*.mlp.*",))], check=False).rows


def test_other_threads_train_meanwhile() -> None:
    """Modes, hooks, and autograd functions of another thread work while a model is traced."""
    other, errors, done = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), SwiGLU(4, 8)), [], threading.Event()

    def train() -> None:
        while not done.is_set():
            try:
                assert other.train().training
                _apply(other(features(2, 4))).sum().backward()
            except Exception as error:
                errors.append(error)
                return

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(5):
            plan(llama(), [Relu2FFN()])
    finally:
        done.set()
        thread.join()
    assert not errors


# What was checked, and what was not


def test_the_report_says_what_was_checked() -> None:
    model = llama()
    assert plan(model, [Relu2FFN()]).checked == (
        "checked on input_ids [2, 8]: 2 regions compute what their modules do, before passes change them"
    )
    assert plan(model, [Relu2FFN()], check=False).checked == "nothing was checked: check=False"
    with torch.device("meta"):
        meta = Trunk(SwiGLU)
    text = plan(meta, [Relu2FFN()]).checked
    assert text == "nothing was checked: its parameters are on the meta device"
    given = plan(model, [Relu2FFN()], probe={"input_ids": tokens(1, 5)}).checked
    assert given.startswith("checked on input_ids [1, 5]")
    with pytest.raises(PassError, match="cannot be called with the probe"):
        plan(model, [Relu2FFN()], probe=features(2, 3))


def test_a_model_that_nobody_can_guess_the_input_of() -> None:
    class Odd(Trunk):
        def forward(self, first: Tensor, second: dict[str, Tensor]) -> Tensor:
            return super().forward(first + second["x"])

    model = Odd(SwiGLU)
    report = apply_(model, [Relu2FFN()]).report
    assert "no input was found that it takes" in report.checked
    assert "probe=" in report.checked
    assert "2 regions compute what their modules do" in report.checked  # on features of their own
    x = features(3, 16)
    report = apply_(Odd(SwiGLU), [Relu2FFN()], probe=(x, {"x": x})).report
    assert report.checked.startswith("checked on [3, 16]: 2 regions compute what their modules do, before ")


def test_a_rewrite_that_nothing_reads_is_undone(monkeypatch: Any) -> None:
    def reads_nothing(model: Any, arguments: Any, readings: Any, kept: Any = ()) -> tuple[Any, set[int]]:
        readings.entered |= readings._regions
        return [], set()

    model = llama()
    monkeypatch.setattr(checking, "_run", reads_nothing)
    stood = [type(m) for m in model.modules()]
    pipeline = Pipeline(model, [Relu2FFN()])
    monkeypatch.setattr(pipeline._check, "was_read", lambda tensor: True)
    with pytest.raises(PassError, match="the rewritten model does not read it"):
        pipeline.commit_()
    assert [type(m) for m in model.modules()] == stood


def test_a_reason_why_nothing_is_checked_is_said_once() -> None:
    """The region is the whole model, and fails as that does."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16))
    checked = plan(model, [Weight24()]).checked
    assert checked.startswith("nothing was checked: no input was found that it takes ([2, 8, 64]: Runtime")
    assert checked.count("cannot be multiplied") == 1
