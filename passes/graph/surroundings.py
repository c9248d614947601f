"""What a forward may ask its process for, or draw from it: a graph would have the answer of one moment."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from types import CodeType, FrameType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.backends import cuda

from act24.passes.graph.named import global_names
from act24.passes.graph.proxies import is_internal

#: Packages whose functions read nothing that a user sets.
FOREIGN = {"torch", *sys.stdlib_module_names}

#: The modules of the process, which a forward may import or ask for.
MODULES = sys.modules

#: Functions that draw where they are given no value to draw for, of torch and of Python.
_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "random"}
_DRAWS |= {"getrandbits", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "gauss"}
#: Where it is looked up for whoever asks.
_LOOKS_UP = ("os", "collections.abc", "_collections_abc")
_NUMBERS = (bool, int, float, str)
_ANYTHING = (*_NUMBERS, tuple, dict, torch.device, torch.dtype)
_HARDWARE = ("torch.cuda", "torch.mps", "torch.xpu", "torch.accelerator", "torch.cpu", "torch.utils._device")
#: Python's modules in C that ask the system: files, processes, threads.
_SYSTEM = {"posix": "os", "nt": "os", "io": "io", "_io": "io", "_thread": "threading", "_socket": "socket"}
#: Functions of these and others that ask nothing.
_PURE = {"fspath", "intern", "exc_info", "audit", "_getframe", "getsizeof", "allocate_lock", "StringIO"}
_PURE |= {"BytesIO", "text_encoding"}
#: Python's own that ask for what they say, and tell the module nothing.
_SAYS = {"logging", "warnings", "traceback", "linecache", "importlib", "random"}
#: Those of its modules in Python whose numbers and texts are the process's.
_STATEFUL = {"logging", "threading", "multiprocessing", "platform", "locale", "socket", "warnings", "asyncio"}
_STATEFUL |= {"tempfile", "uuid", "secrets", "getpass", "sysconfig", "site", "signal"}


def package(frame: FrameType) -> str:
    """Whose code runs."""
    return frame.f_globals.get("__name__", "").partition(".")[0]


def in_their_forward(until: CodeType) -> Iterator[nn.Module]:
    """The modules whose own forward runs at this moment, above the function that asks, up to a function with
    this code."""
    frame = sys._getframe(2)
    while frame is not None and frame.f_code is not until:
        names = frame.f_code.co_varnames
        of = frame.f_locals.get(names[0]) if names else None
        if isinstance(of, nn.Module) and frame.f_code is getattr(type(of).forward, "__code__", None):
            yield of
        frame = frame.f_back


def asks_in_c(function: Any, caller: FrameType) -> str | None:
    """The name of a function in C whose answer is another one elsewhere, where a module calls it, itself or
    by one of Python's own functions."""
    name, of, module = function.__name__, function.__self__, function.__module__
    if module in _SYSTEM and name not in _PURE and not name.startswith("_path_"):
        return f"{_SYSTEM[module]}.{name}()" if _for_a_module(caller) else None
    if is_internal(caller):
        return None
    if module in ("operator", "_operator") and name in ("is_", "is_not"):
        return f"operator.{name}()"
    if package(caller) not in FOREIGN:
        if module in ("time", "sys", "gc") and name not in _PURE:
            return f"{module}.{name}()"
        if isinstance(of, ContextVar):
            return f"the ContextVar {of.name}"
        if isinstance(of, type) and of.__module__ == "datetime" and name in ("now", "utcnow", "today"):
            return f"datetime.{name}()"
    return f"torch.{name}()" if of is torch._C else None


def _for_a_module(caller: FrameType | None) -> bool:
    """Whether a module is the first, but for Python's own functions, to ask. What logging asks is logged,
    also where it asks by a handler of somebody's."""
    first = None
    while caller is not None and (name := package(caller)) != "act24":
        if name in _SAYS:
            return False
        if first is None and (name not in FOREIGN or name == "torch"):
            first = caller
        caller = caller.f_back
    return first is not None and not is_internal(first)


def asks_in_python(frame: FrameType) -> tuple[str, tuple[type, ...]] | None:
    """The name of a function that has just begun, if it is one of torch's or Python's own about the process,
    and if a module calls it, with the kinds of answers that are such, none where it is not to run at all; or
    that of the environment."""
    caller = frame.f_back
    module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
    if name == "__getitem__" and module == "os":
        while caller is not None and caller.f_globals.get("__name__") in _LOOKS_UP:
            caller = caller.f_back
        return None if caller is None or is_internal(caller) else ("os.environ", ())
    if caller is None or package(caller) in (*FOREIGN, "act24"):
        return None
    if (of := module.partition(".")[0]) != "torch":
        return (f"{module}.{name}()", _NUMBERS) if of in _STATEFUL and _for_a_module(caller) else None
    if module.startswith("torch.backends"):  # whose answers are None too, and objects of theirs
        kinds = {"__set__": (), "__getattr__": (*_ANYTHING, type(None))}  # of functions, what they answer
        return f"{module}.{_setting(frame)}", kinds.get(name, (object,))
    given = list(frame.f_locals.values())
    of_process = module.startswith("torch.distributed")
    if of_process or all(v is None or type(v) in _NUMBERS for v in given):
        settings = module == "torch" or module.startswith(_HARDWARE)  # as torch.get_default_device
        return f"{module}.{name}()", _ANYTHING if settings else _NUMBERS
    return None


def _setting(frame: FrameType) -> str:
    """What a module asks one of torch.backends for: a function, or an attribute that calls one."""
    name, held = frame.f_code.co_name, frame.f_locals
    if name in ("__get__", "__set__"):
        setting = getattr(held["self"].getter, "__name__", "").removeprefix("_get_")
        return setting if name == "__get__" else f"{setting} to be another one"
    asked = held.get("name", held.get("attr"))
    return str(asked) if name == "__getattr__" and asked else f"{name}()"


def draws(function: Any) -> bool:
    """Whether a function in C may draw a number."""
    return function.__name__ in _DRAWS or isinstance(function.__self__, torch.Generator)


def own_generator(function: Any) -> Any:
    """Whom a function in C draws from, where that is no generator of the process."""
    of = function.__self__
    if isinstance(of, random.Random) and of is not random._inst:  # pyright: ignore[reportAttributeAccessIssue]
        return of
    return of if isinstance(of, torch.Generator) else None


def names_numpy(frame: FrameType) -> bool:
    """Whether a function that begins, none of torch's or Python's own, names numpy, whose draws nobody is
    told of."""
    return package(frame) not in FOREIGN and any(
        _is_numpy(frame.f_globals.get(name)) for name in global_names(frame.f_code)
    )


def _is_numpy(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "numpy"


def random_state() -> tuple[Any, ...]:
    """Where the process's generators stand that a forward draws from."""
    numpy = sys.modules.get("numpy")
    third = () if numpy is None else numpy.random.get_state()
    third = tuple(part.tobytes() if hasattr(part, "tobytes") else part for part in third)
    with torch._C.DisableTorchFunction():  # modes of the caller's, and that of tracing
        return random.getstate(), torch.get_rng_state().numpy().tobytes(), third


def set_random_state(state: tuple[Any, ...]) -> None:
    """Let the generators stand there again."""
    random.setstate(state[0])
    with torch._C.DisableTorchFunction():
        torch.set_rng_state(torch.frombuffer(bytearray(state[1]), dtype=torch.uint8))
    if third := state[2]:
        numpy = sys.modules["numpy"]
        numpy.random.set_state((third[0], numpy.frombuffer(third[1], dtype=numpy.uint32), *third[2:]))


def modes() -> tuple[Any, ...]:
    """All that `with` may set around a part of a forward, and that a node of a graph does not say."""
    autocast = ((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda"))
    kernels = (cuda.flash_sdp_enabled, cuda.mem_efficient_sdp_enabled, cuda.math_sdp_enabled)
    saving = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        saving._top_saved_tensors_default_hooks(True),
        saving._saved_tensors_hooks_get_disabled_error_message(),
        torch._C._len_torch_dispatch_stack(),
        *autocast,
        *(enabled() for enabled in (*kernels, cuda.cudnn_sdp_enabled)),
    )
