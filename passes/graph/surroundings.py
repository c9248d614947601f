"""What a forward may ask its process for, or draw from it: a graph would have the answer of one moment."""

from __future__ import annotations

import random
import sys
from contextvars import ContextVar
from types import FrameType, ModuleType
from typing import Any

import torch
from torch.backends import cuda

from act24.passes.graph.proxies import is_internal

#: Packages whose functions read nothing that a user sets.
FOREIGN = {"torch", *sys.stdlib_module_names}

#: Functions that draw where they are given no value to draw for, of torch and of Python.
_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "random"}
_DRAWS |= {"getrandbits", "uniform_", "normal_", "random_", "bernoulli_", "exponential_", "gauss"}
ENVIRONMENT = "os.environ"
#: Where it is looked up for whoever asks.
_LOOKS_UP = ("os", "collections.abc", "_collections_abc")
_NUMBERS = (bool, int, float, str)


def package(frame: FrameType) -> str:
    """Whose code runs."""
    return frame.f_globals.get("__name__", "").partition(".")[0]


def asks_in_c(function: Any, caller: FrameType) -> str | None:
    """The name of a function in C whose answer is another one elsewhere, where a module calls it."""
    name, of = function.__name__, function.__self__
    if is_internal(caller):
        return None
    if function.__module__ in ("operator", "_operator") and name in ("is_", "is_not"):
        return f"operator.{name}()"
    if package(caller) not in FOREIGN:
        if function.__module__ == "time":
            return f"time.{name}()"
        if isinstance(of, ContextVar):
            return f"the ContextVar {of.name}"
    return f"torch.{name}()" if of is torch._C else None


def asks_in_python(frame: FrameType) -> str | None:
    """The name of a function that has just begun, if it is one of torch's about the process, and if a module
    calls it; or that of the environment."""
    caller = frame.f_back
    module = frame.f_globals.get("__name__", "")
    if frame.f_code.co_name == "__getitem__" and module == "os":
        while caller is not None and caller.f_globals.get("__name__") in _LOOKS_UP:
            caller = caller.f_back
        return None if caller is None or is_internal(caller) else ENVIRONMENT
    if caller is None or module.partition(".")[0] != "torch" or package(caller) in (*FOREIGN, "act24"):
        return None
    given = list(frame.f_locals.values())
    if module.startswith("torch.distributed") or all(v is None or type(v) in _NUMBERS for v in given):
        return f"{module}.{frame.f_code.co_name}()"
    return None


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
        _is_numpy(frame.f_globals.get(name)) for name in frame.f_code.co_names
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
