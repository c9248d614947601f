"""What a forward asks its process for, reads from tensors that are none of its module's, or draws: a graph
would have the answer of one moment, so it is refused by name. Nothing is run, unless a test says so."""

from __future__ import annotations

import contextvars
import datetime
import logging
import operator
import os
import pathlib
import platform
import random
import sys
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress  # noqa: F401 - named in forwards below
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import record_function  # noqa: F401 - named in forwards below
from toys import Net, SwiGLU, features

from act24.passes import LowRank, PassError, Relu2FFN, apply_, plan, trace
from act24.passes.graph.check import Check

GAIN = contextvars.ContextVar("gain", default=1.0)
RNG = random.Random(1)
TEMPERATURE = torch.tensor(2.0)
TABLE = np.zeros(4)


@dataclass(slots=True)
class Meter:
    n: int = 0


METER = Meter()
LOG = logging.getLogger(__name__)
_MODULES = (datetime, logging, operator, os, pathlib, platform, sys, threading, warnings)


@contextmanager
def swallowing() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        return


class Swallows:
    def __enter__(self) -> None: ...

    def __exit__(self, *raised: object) -> bool:
        return True


def tried(x: Tensor) -> Tensor:
    try:
        return x.view(-1, 2, 4)
    except Exception:
        return x


_OUTSIDE = {**globals(), **{module.__name__: module for module in _MODULES}}


_IN_TRY = "computes in a try: or under suppress()"
_TRIED = "n = 3; try:;     "
_ELSE = "except Exception:;     pass; return self.b(self.a(x)) * n"


def forward(lines: str) -> Any:
    found: dict[str, Any] = {}
    body = "\n".join(f"    {line}" for line in lines.split("; "))
    exec(f"def forward(self, x):\n{body}", _OUTSIDE, found)
    return found["forward"]


def _generators() -> list[Any]:
    """Where those stand that tests draw from."""
    numpy = np.random.get_state()
    return [RNG.getstate(), random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()]


def why(lines: str, **held: Any) -> str:
    """Why a module with this forward is no region, or the empty string."""
    kind = type("Asking", (Net,), {"forward": forward(lines)})
    model = nn.ModuleList([kind(), kind()])
    for module in model:
        vars(module).update(held)
    stood = _generators()
    found, reasons = trace(model)
    assert _generators() == stood
    assert ("0 [Asking]" in reasons) != any(region.fqn == "0" for region in found)
    return reasons.get("0 [Asking]", "")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("return self.b(self.a(x)) * TEMPERATURE.item()", "reads a tensor from outside, neither parameter"),
        ("return self.b(self.a(x)) * float(TEMPERATURE)", "neither parameter nor buffer"),
        ("return self.b(self.a(x)) * (2 if TEMPERATURE else 1)", "neither parameter nor buffer"),
        ("return self.b(self.a(x)) * TEMPERATURE.tolist()", "neither parameter nor buffer"),
        ("return self.b(self.a(x)) * float(TEMPERATURE.numpy())", "neither parameter nor buffer"),
        ("self.seen += 1; return self.b(self.a(x))", "reads seen, neither parameter nor buffer"),
        ("return self.b(self.a(x)) * min(1.0, self.seen.item())", "reads seen, neither parameter nor buffer"),
        ("return self.b(self.a(x)) * self.listed[0].item()", "reads numbers of a.bias past its module"),
        ("return self.b(self.a(x)) * TEMPERATURE.dim() * TEMPERATURE.shape.numel()", ""),
        ("return self.b(self.a(x)) * torch.arange(3).sum().item()", ""),
    ],
)
def test_numbers_are_read_from_parameters_and_buffers_alone(lines: str, reason: str) -> None:
    kind = type("Asking", (Net,), {"forward": forward(lines)})
    model = nn.ModuleList([kind(), kind()])
    for module in model:
        module.seen, module.listed = torch.zeros(()), [module.a.bias]
    reasons = trace(model)[1]
    assert reason in reasons.get("0 [Asking]", "")
    assert bool(reason) == ("0 [Asking]" in reasons)
    assert all(not module.seen for module in model)


@pytest.mark.parametrize(
    "draw",
    [
        "self.own.random()",
        "self.own.uniform(0, 1)",
        "RNG.random()",
        "RNG.choice([1, 2, 3])",
        "random.random()",
        "np.random.rand()",
        "np.random.standard_normal()",
        "float(torch.rand((), generator=self.its))",
        "float(torch.rand(()))",
        "self.its.initial_seed()",
        "self.third.random()",
    ],
)
def test_what_is_drawn_outside_of_the_graph_is_refused_and_moves_nobody(draw: str) -> None:
    held = {"own": random.Random(0), "its": torch.Generator(), "third": np.random.default_rng(0)}
    reason = why(f"return self.b(self.a(x)) * {draw}", **held)
    assert "draws" in reason or "forward writes" in reason


@pytest.mark.parametrize(
    ("question", "name"),
    [
        ("GAIN.get()", "the ContextVar gain"),
        ("torch.distributed.is_initialized()", "is_initialized()"),
        ("torch.distributed.is_available()", "is_available()"),
        ("torch.are_deterministic_algorithms_enabled()", "torch.are_deterministic_algorithms_enabled()"),
        ("torch.compiler.is_compiling()", "torch.compiler.is_compiling()"),
        ("torch._dynamo.is_compiling()", "is_compiling()"),
        ("torch.jit.is_tracing()", "is_tracing()"),
        ("torch.cuda.is_available()", "torch.cuda.is_available()"),
        ("torch.get_num_threads()", "torch.get_num_threads()"),
        ("torch.get_float32_matmul_precision() == 'highest'", "torch.get_float32_matmul_precision()"),
        ("len(__import__('os').environ.get('HOME', ''))", "os.environ"),
        ("torch.backends.cudnn.benchmark", "torch.backends.cudnn_benchmark"),
        ("torch.backends.mkldnn.enabled", "torch.backends.mkldnn_enabled"),
        ("torch.backends.cuda.matmul.allow_tf32", "allow_tf32"),
        ("len(torch.backends.cpu.get_cpu_capability())", "torch.backends.cpu.get_cpu_capability()"),
        ("(torch.backends.cudnn.version() or 1)", "torch.backends.cudnn.version()"),  # None without a GPU
        (
            "(2 if torch.backends.cuda.preferred_linalg_library() == torch._C._LinalgBackend.Default else 1)",
            "torch.backends.cuda.preferred_linalg_library()",
        ),
        (
            "(setattr(torch.backends.cudnn, 'benchmark', True) or 1)",
            "torch.backends.cudnn_benchmark to be another one",
        ),
        ("torch.cuda.device_count()", "torch.cuda.device_count()"),
        ("os.path.exists('/')", "os.stat()"),
        ("pathlib.Path('/').exists()", "os.stat()"),
        ("len(os.listdir('/'))", "os.listdir()"),
        ("len(open(os.devnull).read())", "open()"),
        ("len(pathlib.Path(os.devnull).read_text())", "open()"),
        ("os.getpid()", "os.getpid()"),
        ("logging.getLogger('a').isEnabledFor(10)", "isEnabledFor()"),
        ("(1 if threading.current_thread() is threading.main_thread() else 2)", "threading.get_ident()"),
        ("threading.active_count()", "threading.active_count()"),
        ("datetime.datetime.now().year", "datetime.now()"),
        ("datetime.date.today().year", "datetime.today()"),
        ("len(platform.node())", "platform.node()"),
        ("sys.getrecursionlimit()", "sys.getrecursionlimit()"),
    ],
)
def test_questions_about_the_process_are_refused(question: str, name: str) -> None:
    before = torch.backends.cudnn.benchmark
    assert f"{name}, which tracing would freeze" in why(f"return self.b(self.a(x)) * {question}")
    assert torch.backends.cudnn.benchmark is before


def test_what_a_module_asks_itself_is_no_question_about_the_process() -> None:
    assert not why("return self.b(self.a(x)) * len(self.parts)", parts=nn.ModuleList([nn.Tanh()]))


def test_what_a_module_says_or_makes_of_paths_and_dates_is_no_question() -> None:
    said = "LOG.warning('is %s', 1); LOG.debug('is'); warnings.warn('is')"
    made = "len(os.path.join('a', 'b')) + len(pathlib.PurePath('a').name) + datetime.date(2020, 1, 1).year"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not why(f"{said}; return self.b(self.a(x)) * ({made})")


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("self.meter.n += 1; return self.b(self.a(x))", "forward writes Asking.meter"),
        ("self.counts[0] += 1; return self.b(self.a(x))", "forward writes Asking.counts"),
        ("METER.n += 1; return self.b(self.a(x))", "forward writes METER of"),
        ("TABLE[0] += 1; return self.b(self.a(x))", "forward writes TABLE of"),
        ("return self.b(self.a(x)) * (self.meter.n + float(self.counts[0]) + METER.n)", ""),
    ],
)
def test_a_write_into_slots_or_an_array_is_a_write(lines: str, reason: str) -> None:
    meter, counts = Meter(), np.zeros(3)
    found = why(lines, meter=meter, counts=counts)
    assert found.startswith(reason)
    assert bool(found) == bool(reason)
    assert (meter.n, counts.sum()) == (0, 0)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("match x.shape:;     case (_, _): x = x * 2; return self.b(self.a(x))", "a pattern of its parts"),
        ("match x:;     case {'a': _}: x = x * 2; return self.b(self.a(x))", "a pattern of its parts"),
        (
            "try:;     b, t = x.shape; except ValueError:;     return x; return self.b(self.a(x))",
            "for the number of parts of 'x'",
        ),
        ("b, t = x.shape; return self.b(self.a(x)).view(b, t)", ""),
        (f"{_TRIED} n = int(x.ndim); {_ELSE}", "catches a TypeError"),
        (f"{_TRIED} n = range(x.ndim)[-1]; {_ELSE}", "catches a TypeError"),
        (f"{_TRIED} n = len(x.shape); {_ELSE}", "catches a RuntimeError"),
        (f"{_TRIED} n = getattr(torch, x.device.type); {_ELSE}", "catches a TypeError"),
        (f"{_TRIED} n = self.c; {_ELSE}", ""),
        (
            "try:;     x = x.view(-1, 2, 4); except RuntimeError:;     x = x * 2; return self.b(self.a(x))",
            _IN_TRY,
        ),
        ("try:;     x = x.view(-1, 2, 4); except:;     x = x * 2; return self.b(self.a(x))", _IN_TRY),
        ("with suppress(RuntimeError):;     x = x.view(-1, 2, 4); return self.b(self.a(x))", _IN_TRY),
        ("with swallowing():;     x = x.view(-1, 2, 4); return self.b(self.a(x))", _IN_TRY),
        ("with Swallows():;     x = x.view(-1, 2, 4); return self.b(self.a(x))", _IN_TRY),
        ("return self.b(self.a(tried(x)))", _IN_TRY),
        ("try:;     x = self.a(x); except (KeyError, AttributeError):;     pass; return self.b(x)", ""),
        ("try:;     x = self.a(x); finally:;     n = 1; return self.b(x)", ""),
        ("with suppress(ValueError):;     n = 1; return self.b(self.a(x))", ""),
        ("with nullcontext(), record_function('f'):;     x = self.a(x); return self.b(x)", ""),
        ("return self.b(self.a(x)) * torch.iinfo(x.dtype).bits", "iinfo() of 'x'"),
        ("return self.b(self.a(x)) * torch.finfo(x.dtype).eps", "finfo() of 'x'"),
        ("return self.b(self.a(x)) * torch.finfo(torch.half).eps", ""),
        ("return self.b(self.a(x)) * len(vars(x))", "vars() of 'x'"),
    ],
)
def test_what_a_proxy_answers_by_not_raising_or_not_matching(lines: str, reason: str) -> None:
    found = why(lines)
    assert reason in found
    assert bool(found) == bool(reason)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("isinstance(x.device.type, str)", True),
        ("isinstance(x.dtype.itemsize, int)", True),
        ("isinstance(x.dtype, torch.dtype)", True),
        ("isinstance(x.shape, tuple)", True),
        ("isinstance(x.device, str)", False),
        ("hasattr(x.dtype, 'itemsize')", True),
        ("hasattr(x.dtype, 'foo')", False),
        ("getattr(x.shape, 'foo', False)", False),
    ],
)
def test_what_attributes_of_all_tensors_have_in_common_is_answered(question: str, answer: bool) -> None:
    lines = f"return self.b(self.a(x)) * (2 if {question} else 1)"
    assert not why(lines)
    kind = type("Asking", (Net,), {"forward": forward(lines)})
    net = kind()
    (region, *_), _ = trace(nn.Sequential(net, nn.Linear(4, 4)))
    (scale,) = (n.args[1] for n in region.graph.nodes if n.target in (torch.mul, operator.mul))
    assert scale == (2 if answer else 1)


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("(1 if x.device.index is None else 2)", "device.index, which is None for some"),
        ("(1 if x.T.grad_fn is None else 2)", "T.grad_fn, how it came about"),
        ("(1 if isinstance(x.T, Tensor) else 2)", "asks what kind of value T"),
        ("(1 if isinstance(x.real, Tensor) else 2)", "asks what kind of value real"),
        ("(1 if hasattr(x, '__array__') else 2)", "__array__, which some values have"),
        ("(1 if hasattr(x, 'bit_length') else 2)", "bit_length, which some values have"),
        ("(1 if x.dtype.is_floating_point else 2)", "control flow on what is no tensor"),
        ("(1 if x.dtype.itemsize == 4 else 2)", "control flow on what is no tensor"),
        ("(1 if x.device.type == 'cpu' else 2)", "control flow on what is no tensor"),
        ("(1 if x.layout == torch.strided else 2)", "control flow on what is no tensor"),
    ],
)
def test_what_hangs_off_an_attribute_and_differs_is_refused(question: str, reason: str) -> None:
    assert reason in why(f"return self.b(self.a(x)) * {question}")


def test_numbers_that_hang_off_an_attribute_are_in_the_graph() -> None:
    """Of half precision another one than of single."""
    kind = type("Asking", (Net,), {"forward": forward("return self.b(self.a(x)) * x.dtype.itemsize")})
    model = nn.Sequential(kind(), kind())
    report = apply_(model, [LowRank(scope="mlp", mlp_rank=4, targets=("*.a",))], probe=features(3, 4)).report
    assert "2 regions compute" in report.checked
    for dtype, size in ((torch.float32, 4), (torch.float64, 8)):
        net, x = model[0].to(dtype), features(3, 4).to(dtype)
        graph = F.linear(F.linear(x, net.a.weight_in), net.a.weight_out, net.a.bias)
        torch.testing.assert_close(net(x), F.linear(graph, net.b.weight, net.b.bias) * size)


def test_an_attribute_hung_on_an_input_is_there_when_graph_and_module_are_compared() -> None:
    class Gained(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            gain = getattr(x, "gain", None)
            y = super().forward(x)
            return y if gain is None else y * gain

    class Hangs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Gained(), Gained()])

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                h = x * 1
                h.gain = 3.0
                x = x + block(h)
            return x

    with pytest.raises(PassError, match="gives other numbers than the module"):
        plan(Hangs(), [Relu2FFN()])


def test_what_is_returned_beside_tensors_is_compared_too() -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> Any:
            return OrderedDict(y=self.b(self.a(x)), loss=1)

    class Listed(Net):
        def forward(self, x: Tensor) -> Any:
            return [self.b(self.a(x)), {"loss": (1, None, "a")}]

    for kind, differs in ((Named, True), (Listed, False)):
        model = nn.ModuleList([kind(), kind()])
        reason = trace(model, Check(model))[1].get(f"0 [{kind.__name__}]", "")
        assert ("its graph returns another container" in reason) == differs


@pytest.mark.parametrize("kind", ["environment", "getenv", "clock", "default dtype"])
def test_what_the_process_answers_otherwise_later_is_refused(kind: str) -> None:
    class Asks(SwiGLU):
        def forward(self, x: Tensor) -> Tensor:
            x = super().forward(x)
            if kind == "environment":
                return x * (2.0 if "SCALED" in os.environ else 1.0)
            if kind == "getenv":
                return x * float(os.getenv("SCALED", "1.0"))
            if kind == "clock":
                return x * (2.0 if time.time() < 0 else 1.0)
            return x.to(torch.get_default_dtype())

    said = {"clock": r"asks time\.time", "default dtype": r"asks torch\.get_default_dtype"}
    with pytest.raises(PassError, match=said.get(kind, r"asks os\.environ")):
        plan(nn.Sequential(Asks(4, 8), Asks(4, 8)), [LowRank(scope="mlp", mlp_rank=2)])
