"""What makes a module unclean, that looking leaves no trace on it, and what follows the mode."""

from __future__ import annotations

import copy
import cProfile
import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from toys import Net, Relu2MLP, SwiGLU, Trunk, features, regions, stand

from act24.passes import Relu2FFN, apply_, plan, trace
from act24.passes.graph.region import RegionModule


def unclean(mlp: nn.Module) -> str:
    """Why a module is no region; its linears still are."""
    found, reasons = trace(nn.ModuleDict({"a": mlp, "b": copy.deepcopy(mlp)}))
    assert {type(r.module) for r in found} <= {nn.Linear}
    return reasons[f"a [{type(mlp).__name__}]"]


def test_default_argument() -> None:
    class Scaled(Net):
        def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
            return self.b(self.a(x)) * scale

    assert "'scale'" in unclean(Scaled())


@pytest.mark.parametrize("star", ["args", "kwargs"])
def test_open_arguments(star: str) -> None:
    class Args(Net):
        def forward(self, x: Tensor, *args: Any) -> Tensor:
            return self.b(self.a(x))

    class Kwargs(Net):
        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.b(self.a(x))

    assert "open arguments" in unclean(Args() if star == "args" else Kwargs())


def test_decorated_forward() -> None:
    class Quiet(Net):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    assert "decorated" in unclean(Quiet())


def test_forward_replaced_on_the_instance() -> None:
    """As offloading hooks do; a linear so treated is not opened either."""
    net = SwiGLU()
    net.up.forward = lambda x: nn.Linear.forward(net.up, x) + 1  # type: ignore[method-assign]
    model = nn.ModuleDict({"a": net})
    assert regions(model) == {"a.gate": "Linear", "a.down": "Linear"}
    own = SwiGLU()
    own.forward = own.forward  # type: ignore[method-assign]
    assert "replaced or compiled" in trace(nn.ModuleDict({"a": own}))[1]["a [SwiGLU]"]


def test_branch_on_values() -> None:
    class Branch(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x)) if x.sum() > 0 else x

    class Loop(Net):
        def forward(self, x: Tensor) -> Tensor:
            for row in x:
                x = x + self.b(self.a(row))
            return x

    assert "control flow" in unclean(Branch())
    assert unclean(Loop())


@pytest.mark.parametrize(
    ("question", "remedy"),
    [
        ("x.max() > 0", "a value: write torch.where, or "),
        ("x.sum().item() > 0", "a value: write torch.where, or "),
        ("flag", "a value: decide a flag where the module is made, of a tensor write torch.where, or "),
        ("not flag", "a value: decide a flag where the module is made, of a tensor write torch.where, or "),
        ("flag == 'train'", "what is no tensor: decide that where the module is made, or "),
        ("scale", "what is no tensor: decide that where the module is made, or "),
        ("scale > 1", "what is no tensor: decide that where the module is made, or "),
        ("x.shape[0] > 1", "what is no tensor: decide that where the module is made, or "),
        ("x.dim() == 3", "what is no tensor: decide that where the module is made, or "),
        ("x.is_cuda", "what is no tensor: decide that where the module is made, or "),
    ],
)
def test_the_remedy_is_that_of_what_is_branched_on(question: str, remedy: str) -> None:
    """Nobody can write torch.where of a flag."""
    scope: dict[str, Any] = {}
    lines = f"return self.b(self.a(x)) if {question} else x"
    exec(f"def forward(self, x, flag, scale: float):\n    {lines}", scope)
    branch = type("Branch", (Net,), {"forward": scope["forward"]})
    assert remedy in unclean(branch())


@pytest.mark.parametrize("hidden", [False, True])
def test_branch_on_an_argument_being_none(hidden: bool) -> None:
    """A proxy is never None, so tracing would freeze `is_causal` to False."""

    def attend(q: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q, attn_mask=mask, is_causal=mask is None)

    class Attention(Net):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            x = self.a(x)
            if hidden:
                return self.b(attend(x, mask))
            return self.b(x if mask is None else x + mask)

    assert "'mask' is None" in unclean(Attention())


def test_an_argument_that_may_be_none_and_makes_no_difference_is_clean() -> None:
    class Attention(Net):
        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            x = self.a(x)
            return self.b(F.scaled_dot_product_attention(x, x, x, attn_mask=mask))

    model = nn.ModuleList([Attention()])
    x = features(2, 3, 4)
    expected = model[0](x, None), model[0](x, torch.eye(3).bool())
    assert regions(model) == {"0": "Attention"}
    stand(model)
    assert torch.equal(model[0](x, None), expected[0])
    assert torch.equal(model[0](x, torch.eye(3).bool()), expected[1])


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "save_on_cpu": save_on_cpu,
    "saved_tensors_hooks": lambda: saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "disable_saved_tensors_hooks": lambda: disable_saved_tensors_hooks("not here"),
    "sdpa_kernel": lambda: sdpa_kernel(SDPBackend.MATH),
    "set_detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "a dispatch mode": FlopCounterMode,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("kind", MODES)
def test_mode_set_inside_forward(kind: str) -> None:
    class Inner(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            with MODES[kind]():
                x = x * 2
            return self.b(x)

    assert "mode of its own" in unclean(Inner())


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_forward_stays_one(reentrant: bool) -> None:
    """What it recomputes is traced apart from it, and runs again in backward as it did."""

    class Recomputes(Net):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = SwiGLU(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(checkpoint(self.mlp, self.a(x), use_reentrant=reentrant))

    model = nn.Sequential(Recomputes(), Recomputes())
    assert "calls torch.utils.checkpoint" in trace(model)[1]["0 [Recomputes]"]
    apply_(model, [Relu2FFN()])
    assert isinstance(model[0].mlp, RegionModule)
    runs: list[int] = []
    model[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    loss = model(features(3, 4)).square().sum()
    assert len(runs) == 1
    loss.backward()
    assert len(runs) == 2


def test_tracing_under_autocast_is_no_mode_of_the_module() -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert regions(nn.ModuleList([SwiGLU()])) == {"0": "SwiGLU"}


def test_attribute_written_in_forward_is_refused_and_undone() -> None:
    class Recorder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.last: Tensor | None = None
            self.calls = [1]

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.last = x
            self.new = x
            return self.b(x)

    net = Recorder()
    assert "Recorder.last, Recorder.new" in unclean(net)
    assert net.last is None
    assert not hasattr(net, "new")


def test_container_filled_in_forward_is_refused_and_undone() -> None:
    class Recorder(Net):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []
            self.cache = {"old": 1}

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            self.seen.append(x)
            self.cache["x"] = x
            return self.b(x)

    net = Recorder()
    assert "Recorder.cache, Recorder.seen" in unclean(net)
    assert net.seen == []
    assert net.cache == {"old": 1}


def test_buffer_reassigned_in_forward() -> None:
    class Counter(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count = self.count + 1
            return self.b(self.a(x))

    net = Counter()
    unclean(net)
    assert net.count.item() == 0


def test_buffer_changed_in_place_stays_alive() -> None:
    class Counter(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.b(self.a(x)) * self.count

    model = nn.ModuleList([Counter()])
    stand(model)
    model[0](features(2, 4))
    model[0](features(2, 4))
    assert dict(model.named_buffers())["0.count"].item() == 2
    assert not any("count" in name for name in model.state_dict())


def test_tensor_that_is_neither_parameter_nor_buffer() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.tensor(2.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * self.scale)

    class Inline(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.tensor(2.0))

    assert "scale" in unclean(Plain())
    unclean(Inline())


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def test_custom_backward_of_the_user_is_not_lost() -> None:
    class Rounded(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.b(StraightThrough.apply(self.a(x)))

    model = nn.ModuleList([Rounded()])
    assert "autograd.Function" in unclean(model[0])
    stand(model)
    model[0](features(3, 4)).sum().backward()
    assert model[0].a.weight.grad.abs().sum() > 0
    assert StraightThrough.apply(torch.tensor(0.6)).item() == 1  # and works again after tracing


class Saving(StraightThrough):
    """Fails on what is no tensor, once it has computed with it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if (rounded := x.round()).data_ptr() + 0 == 0:
            raise TypeError
        ctx.save_for_backward(rounded)
        return rounded


@pytest.mark.parametrize("caught", [False, True])
def test_custom_backward_is_the_reason_where_its_forward_fails_on_a_proxy(caught: bool) -> None:
    class Rounded(Net):
        def forward(self, x: Tensor) -> Tensor:
            if not caught:
                return self.b(Saving.apply(self.a(x)))
            try:
                return self.b(Saving.apply(self.a(x)))
            except TypeError:
                return self.b(self.a(x))

    assert unclean(Rounded()).startswith("calls an autograd.Function")


def test_a_model_is_traced_below_a_profiler_and_the_profiler_goes_on() -> None:
    model, profiler = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), cProfile.Profile()
    profiler.enable()
    try:
        (region,), _ = trace(model)
        copy.copy(region)
    finally:
        profiler.disable()
    assert region.module is model
    called = {entry.code.co_name for entry in profiler.getstats() if not isinstance(entry.code, str)}
    assert {"trace", "copy"} <= called


# Leaves: what depends on the mode stays a module


def test_dropout_follows_the_mode_after_tracing() -> None:
    model = Trunk(lambda: Relu2MLP(dropout=0.5))
    x = features(4, 16)
    stand(model)
    assert isinstance(model.blocks[0], RegionModule)
    model.eval()
    quiet = model(x)
    assert torch.equal(model(x), quiet)
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(model(x), quiet)


def test_mode_of_the_model_is_kept() -> None:
    model = Trunk(lambda: Relu2MLP(dropout=0.5)).eval()
    stand(model)
    assert not any(module.training for module in model.modules())


class OwnDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class HiddenDropout(nn.Module):
    """Reads the mode where no look at its code would find it."""

    def forward(self, x: Tensor) -> Tensor:
        return _drop(self, x)


def _drop(module: nn.Module, x: Tensor) -> Tensor:
    return F.dropout(x, 0.5, module.training)


@pytest.mark.parametrize("dropout", [OwnDropout, HiddenDropout])
def test_modules_that_read_training_never_freeze(dropout: type[nn.Module]) -> None:
    class Mixed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.drop = dropout()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.drop(self.a(x)))

    model = nn.ModuleList([Mixed()])
    stand(model)
    assert isinstance(model[0], RegionModule) == (dropout is OwnDropout)
    x = features(64, 4)
    model.train()
    assert not torch.equal(model[0](x), model[0](x))
    model.eval()
    assert torch.equal(model[0](x), model[0](x))


def test_a_double_of_a_compiled_module_is_not_the_module() -> None:
    class Counter(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(1)
            return self.b(self.a(x))

    model = nn.Sequential(Counter(), Counter())
    for block in model:
        block.compile(backend="eager")
    plan(model, [Relu2FFN(optional=True)])
    assert model[0].count.item() == 0


def test_what_happens_when_garbage_is_collected_is_not_the_modules() -> None:
    """A callback of somebody else's, as hypothesis has one, that looks at the clock."""
    asked: list[float] = []

    def callback(phase: str, info: dict[str, int]) -> None:
        asked.append(time.perf_counter())

    before = gc.get_threshold()
    gc.callbacks.append(callback)
    gc.set_threshold(1, 1, 1)
    try:
        found, reasons = trace(Trunk(SwiGLU))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(callback)
    assert asked
    assert (len(found), reasons) == (2, {})
    assert gc.isenabled()
