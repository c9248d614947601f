"""The tracer: runs the double of a module on proxies, and refuses every question that a proxy would answer
otherwise than a tensor does.

A question that is swallowed by a `try:` of the module counts all the same. The exceptions are answered:
parameters are tensors, no value has an attribute that `torch.Tensor` lacks, and the dtypes of a value and of
a parameter, where a module asks whether they differ in order to cast, do differ. A cast that was not needed
changes nothing; that there is nothing else in the branch, `clean_trace` finds out.
"""

from __future__ import annotations

import dis
import gc
import inspect
import operator
import sys
from collections.abc import Callable
from enum import Enum
from types import CodeType, FrameType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from act24.passes.graph import outside
from act24.passes.graph.handlers import Tries
from act24.passes.graph.identity import asks_any, asks_none, asks_which, identity_questions
from act24.passes.graph.missing import Path, path_of
from act24.passes.graph.normal_form import is_linear, linear_arguments
from act24.passes.graph.outside import Outside
from act24.passes.graph.parts import parts_of
from act24.passes.graph.proxies import (
    OUTSIDE,
    OWN,
    REGISTER,
    Proxy,
    Unclean,
    asks_itself,
    dtype_of,
    forwards,
    is_internal,
    is_number,
)
from act24.passes.graph.shadow import Shadow
from act24.passes.graph.surroundings import (
    FOREIGN,
    asks_in_c,
    asks_in_python,
    draws,
    modes,
    names_numpy,
    own_generator,
    package,
    random_state,
    set_random_state,
)

#: What proxies do to answer is no question of the module's.
_PROXIES = Proxy._attribute.__globals__
#: Nor is what these do for proxies; half of all calls are theirs. Told by the dictionaries of their globals.
_QUIET = {id(_PROXIES), *(id(vars(module)) for module in (dis, pytree, outside))}
_QUESTIONS = (isinstance, hasattr, getattr)
#: Exceptions that a value in a proxy's place would raise too.
_SAME = (AttributeError, LookupError, ImportError, StopIteration, Unclean)


class Tracer(fx.Tracer):
    """Opens everything but modules that `closed` names, and lets linears be functions.

    Attributes:
        refused: the first question that had no answer, or the empty string.
        sized: the parameters whose sizes the module asks for, by name.
        casts: the questions whether two dtypes differ, one of them a value's, that were answered by yes: a
            dtype, or the node that it is of.
        asks_none: whether the module compares anything with None that may be an argument of it.
        asks: isinstance(), hasattr() or getattr(), where the module calls it at this moment.
    """

    proxy_buffer_attributes = True

    def __init__(
        self, shadow: Shadow, closed: Callable[[nn.Module], bool], note: Callable[[FrameType], None]
    ) -> None:
        """Make it.

        Args:
            note: is told of every function that begins.
        """
        super().__init__()
        self.refused = ""
        self.casts: list[tuple[fx.Node | torch.dtype, fx.Node | torch.dtype]] = []
        self._note = note
        self.sized = set[str]()
        self.asks_none, self._absent = False, frozenset[Path]()
        self.asks: Callable[..., Any] | None = None
        self._shadow = shadow
        self._closed = closed
        self._proxies: dict[int, fx.Proxy] = {}
        self._questions: list[fx.Node] = []
        self._asked: dict[CodeType, tuple[tuple[str, tuple[str, ...]], ...]] = {}
        self._compares, self._made_nodes = set[CodeType](), set[CodeType]()
        self._equal: int | None = None
        self._before_draw: tuple[Any, ...] | None = None
        self._raised, self._tries = "", Tries()
        self._asking: dict[int, tuple[str, tuple[type, ...]]] = {}
        self._imports: FrameType | None = None

    def record(self, absent: frozenset[Path] = frozenset(), equal: int | None = None) -> fx.Graph:
        """The graph of the double's forward.

        Args:
            absent: the arguments, and items of arguments, that are None.
            equal: the number of a question about dtypes that is answered by: they do not differ.
        """
        self._equal, self._absent = equal, absent
        values = {path[0]: None for path in absent if len(path) == 1}
        root = self._shadow.root
        self.root = root
        self.graph = fx.Graph(tracer_cls=RegionTracer)
        self.tensor_attrs = {}
        self.submodule_paths = {module: name for name, module in root.named_modules()}
        self._parameters = dict(root.named_parameters())
        self._names = {id(t): n for n, t in [*root.named_buffers(), *self._parameters.items()]}
        self._modes = modes()
        before, traces, collects = sys.getprofile(), sys.gettrace(), gc.isenabled()
        sys.setprofile(None)
        gc.disable()  # what others do when garbage is collected is not asked by the module
        try:
            function, args = self.create_args_for_root(type(root).forward, True, values or None)
            self._shadow.observer = self
            with Outside(self):
                sys.setprofile(self._on_event)
                result = function(*args)
                sys.setprofile(None)
            if self._raised:
                self.refuse(
                    f"catches {self._raised}, which tracing raises and a tensor may not: take the try: away, "
                    f"or {OWN}"
                )
            if self._tries.found and not self.refused:
                self.refuse(
                    "computes in a try: or under suppress(), and its graph would go no other way where that "
                    f"raises: ask for the shape where the model is made, or {OWN}"
                )
            self.create_node("output", "output", (self.create_arg(result),), {})
        except Exception:
            sys.setprofile(None)
            self._refuse_functions()
            raise
        finally:
            _profile_with(before)
            sys.settrace(traces)
            self._shadow.observer = None
            if collects:
                gc.enable()
        self._refuse_functions()
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

    def asker(self, above: int = 2) -> FrameType:
        """Who asks a proxy what the proxy takes here.

        Args:
            above: how many calls above.
        """
        return sys._getframe(above)

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
        if id(frame.f_globals) in _QUIET:
            return
        if self._imports is not None:  # what modules ask as they are imported is asked once anyway
            self._imports = None if event == "return" and frame is self._imports else self._imports
            return
        self.asks = None
        if event == "c_call":
            # Parsing the arguments of torch's functions asks too, and is no question of the module's.
            if argument in _QUESTIONS:
                self.asks = argument if asks_itself(frame) else None
                return
            self._check_draw(argument)
            if name := asks_in_c(argument, frame):
                self._refuse_to_ask(name)
        elif event == "call":
            if _imports(frame):
                self._imports = frame
                return
            self._check_identities(frame)
            self._begins(frame)
        elif event == "return":
            self._check_identities(frame)
            if (asks := self._asking.pop(id(frame), None)) and isinstance(argument, asks[1]):
                self._refuse_to_ask(asks[0])

    def _begins(self, frame: FrameType) -> None:
        """A function in Python begins."""
        self._note(frame)
        self._tries.begins(frame)
        if sys.gettrace() != self._on_raise and (local := self._on_raise(frame, "call", None)):
            sys.settrace(self._on_raise)
            frame.f_trace = local
        if frame.f_code is _CHECKPOINT:
            self.refuse(
                "calls torch.utils.checkpoint, and its graph would recompute nothing: call it around the "
                "module, or leave it out and give the pass recompute"
            )
        if self._before_draw is None and names_numpy(frame):
            self._before_draw = random_state()
        if asks := asks_in_python(frame):
            if not asks[1]:
                self._refuse_to_ask(asks[0])
            self._asking[id(frame)] = asks

    def _check_draw(self, function: Any) -> None:
        """Of a function in C that is called: remember where generators stand that it may draw from."""
        if not draws(function):
            return
        if self._before_draw is None:
            self._before_draw = random_state()
        if (generator := own_generator(function)) is not None:
            self.refuse(
                f"draws from a {type(generator).__name__} of its own, which tracing would freeze: draw for a "
                "value (torch.rand_like(x))"
            )

    def _refuse_to_ask(self, name: str) -> NoReturn:
        self.refuse(f"asks {name}, which tracing would freeze: {OUTSIDE}")

    def _on_raise(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        """Of the interpreter's tracing, this thread's own too, from the first function on that may catch what
        is raised in it: one begins, or something is."""
        if event == "call":
            if not frame.f_code.co_exceptiontable or package(frame) in FOREIGN:
                return None
            frame.f_trace_lines = False
        elif event == "exception" and not issubclass(argument[0], _SAME):
            self._raised = self._raised or f"a {argument[0].__name__}"
        return self._on_raise

    def _check_identities(self, frame: FrameType) -> None:
        """Of a function that begins or ends: whether it asks which object a value is."""
        if frame.f_code not in self._asked:
            internal = is_internal(frame)
            self._asked[frame.f_code] = () if internal else identity_questions(frame.f_code)
            if not internal and asks_any(frame.f_code):
                self._compares.add(frame.f_code)
            self.asks_none |= not internal and asks_none(frame.f_code)
        for question, names in self._asked[frame.f_code]:
            held = frame.f_locals
            for name in names:
                if name in held and issubclass(type(held[name]), fx.Proxy):
                    self.refuse(f"asks {question} of '{name}', which a graph cannot answer: {OUTSIDE}")
        if frame.f_code in self._compares and (asks := asks_which(frame)):
            self.refuse(f"asks {asks}, which a graph cannot answer: {OUTSIDE}")

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
        return Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if issubclass(type(a), fx.Proxy):
            return a.node
        if isinstance(a, Tensor):
            if id(a) in self._names:
                return self._proxied(a).node
            held = [name for m in self.root.modules() for name, value in vars(m).items() if value is a]
            if not held and self._before_draw is not None and random_state() != self._before_draw:
                self.undo_draws()
                self.refuse(self.refused)
            what = held[0] if held else "a constant tensor"
            self.refuse(f"reads {what}, neither parameter nor buffer: {REGISTER}")
        return super().create_arg(_written(a))

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        watching, tracing = sys.getprofile(), sys.gettrace()
        sys.setprofile(None)  # nothing of the module's runs below, and each call would be looked at
        sys.settrace(None)
        try:
            made = super().create_proxy(*args, **kwargs)
            if made.node.op != "placeholder" and path_of(made.node) in self._absent:
                self.graph.erase_node(made.node)
                return None  # type: ignore[return-value]
            return made
        finally:
            sys.settrace(tracing)
            sys.setprofile(watching)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not _RECORD:
            self._made_nodes.add(frame.f_code)
            self._tries.computes(frame, args[0])
            frame = frame.f_back
        if modes() != self._modes:
            self.refuse(
                "computes under a mode of its own (gradients, autocast, saved tensors, attention "
                f"kernels, precision), which its graph has not: set it around the model, or {OWN}"
            )
        return super().create_node(*args, **kwargs)

    def _refuse_functions(self) -> None:
        """Refuse if a node was made in the forward of an autograd.Function; looked at once, at the end, for
        there may be hundreds of them."""
        if not self._made_nodes.isdisjoint(forwards(Function)):
            self.refused = (
                "calls an autograd.Function, whose backward tracing would drop: make a function with it one "
                "node (act24.operation.operation)"
            )
            raise Unclean(self.refused)

    def iter(self, obj: fx.Proxy) -> Any:
        if count := self.parts(obj.node):
            return iter([obj[place] for place in range(count)])  # type: ignore[index]
        self.refuse(f"loops over {obj.node.name}: loop over a fixed number, and index it")

    def parts(self, node: fx.Node) -> int:
        """How many parts a node splits its input in, whatever that is; 0 where nobody knows."""
        return parts_of(node, self._parameters)

    def keys(self, obj: fx.Proxy) -> Any:
        self.refuse(f"unpacks {obj.node.name} as keyword arguments: write them out")

    def to_bool(self, obj: fx.Proxy) -> bool:
        node = obj.node
        if node.target in (operator.ne, operator.eq) and (answer := self._differ(*node.args)) is not None:
            self._questions.append(node)
            return answer is (node.target is operator.ne)
        if is_number(node):
            self.refuse(f"branches on {node.name}, control flow on what is no tensor: {OUTSIDE}")
        # Of an argument nobody knows whether it is a flag.
        flag = "decide a flag where the module is made, of a tensor " if node.op == "placeholder" else ""
        self.refuse(f"branches on {node.name}, control flow on a value: {flag}write torch.where, or {OWN}")

    def _differ(self, a: Any, b: Any) -> bool | None:
        """Whether two dtypes differ; None: neither is one, or it cannot be said."""
        a, b = dtype_of(a), dtype_of(b)
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

    def name(self, tensor: Tensor) -> str | None:
        """That of a parameter or buffer."""
        return self._names.get(id(tensor))

    def parameter(self, node: fx.Node) -> nn.Parameter | None:
        """The parameter that a node is."""
        return self._parameters.get(str(node.target)) if node.op == "get_attr" else None


def _written(value: Any) -> Any:
    """A constant as the code of a graph can write it: a number of numpy's, or of a class of its own, as the
    plain one that it is."""
    if (numpy := sys.modules.get("numpy")) and isinstance(value, numpy.generic):
        return value.item()
    plain: Any = next((kind for kind in (int, float, complex, str) if isinstance(value, kind)), None)
    return value if plain is None or isinstance(value, bool | Enum) else plain(value)


class RegionTracer(fx.Tracer):
    """Whom fx asks to make a graph again, as when it is unpickled: buffers are nodes there too."""

    proxy_buffer_attributes = True


def _imports(frame: FrameType) -> bool:
    return frame.f_code.co_name == "_find_and_load" and package(frame) == "importlib"


def _profile_with(profiler: Any) -> None:
    """Put the interpreter's profiling back as it was. A cProfile.Profile is no function; Python 3.12 keeps it
    elsewhere."""
    if profiler is None or callable(profiler):
        sys.setprofile(profiler)
    else:
        sys.setprofile(None)
        profiler.enable()


_RECORD = Tracer.record.__code__
_CHECKPOINT = inspect.unwrap(checkpoint).__code__
