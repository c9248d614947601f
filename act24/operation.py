"""Operations that stay one node whenever a graph is traced.

Tracing through `torch.autograd.Function.apply` inlines its forward and silently drops its backward
(pytorch issue 84515). A function marked `@operation` is therefore never traced through: called with a
`torch.fx.Proxy`, by whichever tracer and however often, it records itself as one `call_function` node.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
from torch.autograd import forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from act24.errors import Act24Error

Function = TypeVar("Function", bound=Callable[..., Any])
Backward = TypeVar("Backward", bound=Callable[..., Any])


def operation(function: Function) -> Function:
    """Make `function` atomic to `torch.fx`, and to anything else that speaks `__torch_function__`.

    All tensors must be positional arguments: only those are looked at.
    """

    @functools.wraps(function)
    def dispatched(*args: Any, **kwargs: Any) -> Any:
        if has_torch_function(args):
            return handle_torch_function(dispatched, args, *args, **kwargs)
        if _in_transformation():
            return _transformed(function, args, kwargs)
        return function(*args, **kwargs)

    return dispatched  # type: ignore[return-value]


def constant_when_compiled(function: Function) -> Function:
    """`torch.compiler.assume_constant_result`, which would import the compiler here and now: a second, and it
    sets a variable of the environment. All that it does is this."""
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


#: What PyTorch says that a function with a backward of its own lacks, and what that is in our words.
_LACKING = {
    "implement the jvp function": "derivative in forward mode (torch.func.jvp, jacfwd, hessian): take it in "
    "reverse (grad, vjp, jacrev)",
    "does not have vmap support": "rule for torch.func.vmap: run one sample after another, or leave the pass "
    "out, pipeline.lower_(step, without=[…])",
}


def _transformed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operation inside of a transformation of torch.func, which it may not have a rule for.

    Raises:
        Act24Error: it has none.
    """
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:  # and its NotImplementedError
        for sign, lacking in _LACKING.items():
            if sign in str(error):
                raise Act24Error(f"{function.__name__} has no {lacking}") from error
        raise


_ONCE = (
    "an operation of act24 can be differentiated once: its gradient is straight through or of constants, "
    "and a derivative of that would be another function's. Take first derivatives only, or detach() what the "
    "inner one is taken of"
)


class _Once(torch.autograd.Function):
    """A gradient that has none itself."""

    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: torch.Tensor, *depends: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> NoReturn:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise Act24Error(_ONCE)


def once_differentiable(backward: Backward) -> Backward:
    """A backward of which no derivative is taken. PyTorch's own does not tell who takes one all the same: in
    torch.func it is zero, and with `create_graph=True` it is missing where only saved tensors need it."""

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: torch.Tensor) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *gradients)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        tensors = (t for t in (*gradients, *ctx.saved_tensors) if t is not None)
        depends = [t for t in tensors if t.is_floating_point()]
        if not in_functorch():  # else what comes out of it would require gradients
            depends.append(torch.zeros((), requires_grad=True))
        return tuple(None if output is None else _Once.apply(output, *depends) for output in outputs)

    return once  # type: ignore[return-value]


def refuse_second_derivatives(*tensors: torch.Tensor | None) -> None:
    """To be called by operations that can be differentiated once.

    Raises:
        Act24Error: torch.func takes a derivative of a derivative with respect to a tensor.
    """
    if not _nested():
        return
    if torch.compiler.is_compiling() or any(t is not None and _derivatives(t) > 1 for t in tensors):
        raise Act24Error(_ONCE)


@constant_when_compiled
def _nested() -> bool:
    """Whether torch.func takes a derivative inside of another one."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    levels = functorch.get_interpreter_stack() or ()
    return sum(level.key() == functorch.TransformType.Grad for level in levels) > 1


def _derivatives(tensor: torch.Tensor) -> int:
    """With respect to a tensor, how many derivatives torch.func takes of one another."""
    functorch, found = torch._C._functorch, 0  # pyright: ignore[reportAttributeAccessIssue]
    while functorch.is_functorch_wrapped_tensor(tensor):
        found += functorch.is_gradtrackingtensor(tensor) and tensor.requires_grad
        tensor = functorch.get_unwrapped(tensor)
    return found


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`tensor.to(dtype)`, and `tensor` itself where it has that dtype; any shape.

    What an autograd.Function returns is cast with this: torch.compile of torch 2.11 gives zeros for the
    gradients, without a word, where an output went through a `.to` that changed nothing.
    """
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def cast_for_autocast(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors in the dtype that autocast would give a matrix product, or as they are outside it.

    A hand-written backward runs outside autocast, so the casts have to lie outside the function. Float64
    stays, as autocast has it.
    """
    device = next(tensor for tensor in tensors if tensor is not None).device.type
    if not _has_autocast(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in tensors)


@constant_when_compiled  # compiled graphs are traced outside of it
def is_mapped() -> bool:
    """Whether `torch.func.vmap` maps over what runs now: operators of our own have no rule for that."""
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(
        level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack() or ()
    )


@constant_when_compiled
def in_functorch() -> bool:
    """Whether any transformation of torch.func surrounds what runs now."""
    return bool(torch._C._functorch.get_interpreter_stack())  # pyright: ignore[reportAttributeAccessIssue]


def is_transformed(tensor: torch.Tensor) -> bool:
    """Whether a transformation of torch.func has put something in the place of a tensor of any shape: its
    numbers cannot be read, and foreach operations know nothing of it."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


@constant_when_compiled
def _in_transformation() -> bool:
    """Whether `torch.func.vmap` maps over what runs now, or a derivative in forward mode is taken of it."""
    return is_mapped() or forward_ad._current_level >= 0


@constant_when_compiled  # torch 2.11 cannot trace it, and would break the graph
def _has_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)
