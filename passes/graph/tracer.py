"""The tracer: runs the double of a module on proxies, and refuses every question that a proxy would answer
otherwise than a tensor does.

A question that is swallowed by a `try:` of the module counts all the same. The exceptions are answered:
parameters are tensors, no tensor has an attribute that `torch.Tensor` lacks, and the dtypes of a value and of
a parameter, where a module asks whether they differ in order to cast, do differ. A cast that was not needed
changes nothing; that there is nothing else in the branch, `clean_trace` finds out.
"""

from __future__ import annotations

import operator
import random
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.fx.proxy import Attribute

from act24.passes.graph.identity import identity_questions, reads_class
from act24.passes.graph.normal_form import is_linear, linear_arguments
from act24.passes.graph.shadow import Shadow

#: What a tensor, a shape or a number has.
_ATTRIBUTES = {*dir(Tensor), *dir(torch.Size), *dir(float)}

#: Those that are None or another tensor, by where a value comes from.
_HISTORY = ("grad", "grad_fn", "_base", "_backward_hooks")

#: What a parameter is asked for and never changes. A pass may put others in its place.
_SIZES = ("shape", "ndim", "size", "dim", "ndimension", "numel", "nelement")

#: Packages that may ask a value anything: their questions are not the module's branches.
_INTERNAL = ("torch", "act24")


#: What to do about modules that cannot be traced.
OWN = "give its linears a module of their own"
PLAIN = f"compute in forward with tensors alone, or {OWN}"
REGISTER = "make it one, register_buffer(name, tensor, persistent=False)"
_OUTSIDE = f"decide that where the module is made, or {OWN}"


class Unclean(Exception):
    """Why a module cannot be a region, and what to do."""


#: Augmented assignments, each with what it computes.
AUGMENTED: dict[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.imatmul: operator.matmul,
    operator.itruediv: operator.truediv,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.ipow: operator.pow,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}


class _Written:
    """What is done to a value, in place. fx knows of no augmented assignments and makes them functions."""

    def __init_subclass__(cls) -> None:
        for function in AUGMENTED:
            setattr(cls, f"__{function.__name__}__", _augmented(function))

    def __setattr__(self: Any, name: str, value: object) -> None:
        if name not in ("tracer", "node", "_node", "root", "attr"):  # fx's own
            self.tracer.refuse(f"sets {name} of the value {self.node.name}: {PLAIN}")
        super().__setattr__(name, value)

    def __setitem__(self: Any, key: object, value: object) -> None:
        self.tracer.refuse(
            f"writes into {self.node.name} by index: write torch.where, index_put or torch.cat, or {OWN}"
        )

    def __hash__(self: Any) -> int:
        if not _is_internal(sys._getframe(1)):
            self.tracer.refuse(f"looks {self.node.name} up in a dictionary or set: {_OUTSIDE}")
        return id(self)


def _augmented(function: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


class _Proxy(_Written, fx.Proxy):
    """A value. What it is asked goes to the tracer."""

    tracer: Tracer  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def __class__(self) -> type:  # type: ignore[override]
        """Asked by isinstance() where the answer is not yet yes."""
        if not self.tracer.asks_kind:
            if reads_class(frame := sys._getframe(1)) and not _is_internal(frame):
                self.tracer.refuse(f"asks what kind of value {self.node.name} is: {_OUTSIDE}")
            return type(self)
        if self.node.op == "get_attr":
            return nn.Parameter
        return self.tracer.refuse(f"asks what kind of value {self.node.name} is: {_OUTSIDE}")

    def __getattr__(self, name: str) -> Any:
        if name not in _ATTRIBUTES or name.startswith("__"):
            raise AttributeError(f"no tensor has an attribute '{name}'")
        if name in _SIZES and (parameter := self.tracer.parameter(self.node)) is not None:
            return getattr(parameter, name)
        if name in _HISTORY:
            self.tracer.refuse(f"asks for {self.node.name}.{name}, how it came about: {_OUTSIDE}")
        return _Attribute(self, name)

    def __len__(self) -> int:
        return self.tracer.refuse("asks a value for its length: write x.shape[0], and do not branch on it")

    def __contains__(self, _: object) -> bool:
        return self.tracer.refuse(f"asks what a value contains: {_OUTSIDE}")


_KIND = vars(_Proxy)["__class__"].fget.__code__


class _Attribute(_Written, Attribute):
    """An attribute of a value, which may be a method, a number or a shape."""

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Attribute(self, name)

    def __repr__(self) -> str:
        if self.attr != "shape" and not _is_internal(sys._getframe(1)):
            self.tracer.refuse(f"asks how a value's {self.attr} is written: {_OUTSIDE}")
        return super().__repr__()


class Tracer(fx.Tracer):
    """Opens everything but modules that `closed` names, and lets linears be functions.

    Attributes:
        refused: the first question that had no answer, or the empty string.
        casts: the questions whether two dtypes differ, one of them a value's, that were answered by yes: a
            dtype, or the node that it is of.
        asks_kind: whether the module calls isinstance() at this moment.
    """

    proxy_buffer_attributes = True

    def __init__(self, shadow: Shadow, closed: Callable[[nn.Module], bool]) -> None:
        super().__init__()
        self.refused = ""
        self.casts: list[tuple[fx.Node | torch.dtype, fx.Node | torch.dtype]] = []
        self.asks_kind = False
        self._shadow = shadow
        self._closed = closed
        self._proxies: dict[int, fx.Proxy] = {}
        self._questions: list[fx.Node] = []
        self._asked: dict[CodeType, tuple[tuple[str, tuple[str, ...]], ...]] = {}
        self._equal: int | None = None
        self._before_draw: tuple[Any, ...] | None = None

    def record(self, values: dict[str, Any] | None = None, equal: int | None = None) -> fx.Graph:
        """The graph of the double's forward.

        Args:
            values: what stands for some arguments instead of a proxy.
            equal: the number of a question about dtypes that is answered by: they do not differ.
        """
        self._equal = equal
        root = self._shadow.root
        self.root = root
        self.graph = fx.Graph(tracer_cls=RegionTracer)
        self.tensor_attrs = {}
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self._names = {
            id(t): name
            for tensors in (root.named_buffers, root.named_parameters)
            for name, t in tensors(remove_duplicate=True)
        }
        self._modes = _modes()
        function, args = self.create_args_for_root(type(root).forward, True, values)
        before = sys.getprofile()
        self._shadow.observer = self
        sys.setprofile(self._on_event)
        try:
            result = function(*args)
            sys.setprofile(before)
            self.create_node("output", "output", (self.create_arg(result),), {})
        finally:
            sys.setprofile(before)
            self._shadow.observer = None
        if self.refused:
            raise Unclean(self.refused)
        for node in reversed(self._questions):
            if not node.users:
                inputs = node.all_input_nodes
                self.graph.erase_node(node)
                for source in inputs:
                    if source.target is getattr and not source.users:
                        self.graph.erase_node(source)
        return self.graph

    def refuse(self, reason: str) -> NoReturn:
        """End, also where the module catches what this raises."""
        self.refused = self.refused or reason
        raise Unclean(reason)

    def undo_draws(self) -> None:
        """Put generators back that the module drew from, and refuse if it did."""
        before, self._before_draw = self._before_draw, None
        if before is not None and random_state() != before:
            set_random_state(before)
            self.refused = self.refused or (
                "draws a random number, which tracing would freeze: draw for a value (torch.rand_like(x))"
            )

    def _on_event(self, frame: FrameType, event: str, argument: Any) -> None:
        """Of the interpreter's profiling, which is this thread's own: a function is called."""
        if frame.f_code is _KIND:
            return
        if event in ("call", "return"):
            self._check_identities(frame)
        # Parsing the arguments of torch's functions asks too, and is no question of the module's.
        self.asks_kind = event == "c_call" and argument is isinstance and _asks(frame)
        if event == "c_call":
            if self._before_draw is None and argument.__name__ in _DRAWS:
                self._before_draw = random_state()
            name, caller = _asked(argument), frame
        elif event == "call":
            name, caller = _ASKED_CODE.get(frame.f_code), frame.f_back
        else:
            return
        if name and caller is not None and not _is_internal(caller):
            self.refuse(f"asks {name}, which tracing would freeze: {_OUTSIDE}")

    def _check_identities(self, frame: FrameType) -> None:
        """Of a function that begins or ends: whether it asks which object a value is."""
        if frame.f_code not in self._asked:
            internal = _is_internal(frame)
            self._asked[frame.f_code] = () if internal else identity_questions(frame.f_code)
        for question, names in self._asked[frame.f_code]:
            held = frame.f_locals
            for name in names:
                if name in held and issubclass(type(held[name]), fx.Proxy):
                    self.refuse(f"asks {question} of '{name}', which a graph cannot answer: {_OUTSIDE}")

    def on_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        original = self._shadow.originals[module]
        if is_linear(original):
            weight, bias, transposed = linear_arguments(original)
            x = args[0] if args else kwargs["input"]
            weight, bias = self._proxied(weight), self._proxied(bias)
            return F.linear(x, weight.t() if transposed else weight, bias)
        if "forward" in vars(original):
            self.refuse(
                f"the forward of {self.path_of_module(module)} was replaced, as accelerate's hooks do: put "
                "back its own (accelerate.hooks.remove_hook_from_module), and replace it after apply_"
            )
        if self._closed(original):
            return self.create_proxy("call_module", self.path_of_module(module), args, kwargs)
        return module.forward(*args, **kwargs)

    def on_tensor(self, module: nn.Module, name: str, tensor: Tensor) -> Any:
        return self._proxied(tensor) if id(tensor) in self._names else tensor

    def _proxied(self, tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if id(tensor) not in self._proxies:
            self._proxies[id(tensor)] = self.create_proxy("get_attr", self._names[id(tensor)], (), {})
        return self._proxies[id(tensor)]

    def on_training(self, module: nn.Module) -> bool:
        return self.refuse(f"reads self.training: draw in an nn.Dropout, or {OWN}")

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) in self._names:
                return self._proxied(a).node
            held = [name for m in self.root.modules() for name, value in vars(m).items() if value is a]
            what = held[0] if held else "a constant tensor"
            self.refuse(f"reads {what}, neither parameter nor buffer: {REGISTER}")
        return super().create_arg(a)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        frame, forwards = sys._getframe(1), set(_forwards(Function))
        while frame is not None:
            if frame.f_code in forwards:
                self.refuse(
                    "calls an autograd.Function, whose backward tracing would drop: make a function "
                    "with it one node (act24.operation.operation)"
                )
            frame = frame.f_back  # type: ignore[assignment]
        if _modes() != self._modes:
            self.refuse(
                f"computes under a grad or autocast mode of its own: set it around the model, or {OWN}"
            )
        return super().create_node(*args, **kwargs)

    def iter(self, obj: fx.Proxy) -> Any:
        self.refuse(f"loops over {obj.node.name}: loop over a fixed number, and index it")

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse(f"unpacks {obj.node.name} as keyword arguments: write them out")

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        if node.target in (operator.ne, operator.eq) and (answer := self._differ(*node.args)) is not None:
            self._questions.append(node)
            return answer is (node.target is operator.ne)
        self.refuse(f"branches on {node.name}, control flow on a value: write torch.where, or {OWN}")

    def _differ(self, a: Any, b: Any) -> bool | None:
        """Whether two dtypes differ; None: neither is one, or it cannot be said."""
        a, b = _dtype_of(a), _dtype_of(b)
        if a is None or b is None:
            return None
        fixed, other = self._held_dtype(a), self._held_dtype(b)
        if fixed is not None and other is not None:
            # Floating-point parameters may become others of them, and never integers.
            return True if fixed.is_floating_point != other.is_floating_point else None
        self.casts.append((a, b))
        return len(self.casts) - 1 != self._equal

    def _held_dtype(self, value: fx.Node | torch.dtype) -> torch.dtype | None:
        """A dtype, or that of a parameter; None: of a value."""
        if isinstance(value, torch.dtype):
            return value
        parameter = self.parameter(value)
        return None if parameter is None else parameter.dtype

    def parameter(self, node: fx.Node) -> nn.Parameter | None:
        """The parameter that a node is."""
        return dict(self.root.named_parameters()).get(str(node.target)) if node.op == "get_attr" else None


def _dtype_of(value: Any) -> fx.Node | torch.dtype | None:
    """A dtype, or the node whose dtype something is."""
    if isinstance(value, fx.Node) and value.target is getattr and value.args[1] == "dtype":
        return value.args[0]  # type: ignore[return-value]
    return value if isinstance(value, torch.dtype) else None


def random_state() -> tuple[Any, ...]:
    """Where the process's generators stand that a forward draws from."""
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


def set_random_state(state: tuple[Any, ...]) -> None:
    """Let the generators stand there again."""
    random.setstate(state[0])
    torch.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))


class RegionTracer(fx.Tracer):
    """Whom fx asks to make a graph again, as when it is unpickled: buffers are nodes there too."""

    proxy_buffer_attributes = True


def _is_internal(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _INTERNAL


def _asks(frame: FrameType) -> bool:
    """Whether isinstance() is called for the module: by its own code, or by torch.is_tensor."""
    if frame.f_code.co_name == "__torch_function__":  # a mode that the caller of apply_ has set looks on
        return False
    return not _is_internal(frame) or frame.f_code is torch.is_tensor.__code__


def _asked(function: Any) -> str | None:
    """The name of a function in C whose answer is another one elsewhere."""
    name = function.__name__
    if function in (operator.is_, operator.is_not):
        return f"operator.{name}()"
    return f"torch.{name}()" if name in _ASKED and function.__self__ is torch._C else None


def _forwards(of: type) -> Iterator[CodeType]:
    """The code of the forwards of all autograd.Functions there are: torch 2.14 calls them from C, where there
    is no frame of `apply` to be recognised by."""
    for function in of.__subclasses__():
        if code := getattr(function.forward, "__code__", None):
            yield code
        yield from _forwards(function)


def _modes() -> tuple[Any, ...]:
    autocast = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


#: Functions of torch's C++ side, and Python functions by their code.
_ASKED = ("is_grad_enabled", "is_inference_mode_enabled", "is_autocast_enabled", "is_autocast_cpu_enabled")
_ASKED += ("get_autocast_dtype", "get_autocast_gpu_dtype", "get_autocast_cpu_dtype")
#: Functions that draw where they are given no value to draw for, of torch and of Python.
_DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "random",
    "getrandbits",
}
_DRAWS |= {"uniform_", "normal_", "random_", "bernoulli_", "exponential_", "gauss"}
_ASKED_CODE = {
    function.__code__: f"torch.compiler.{function.__name__}()"
    for function in (
        torch.compiler.is_compiling,
        torch.compiler.is_dynamo_compiling,
        torch.compiler.is_exporting,
    )
}
