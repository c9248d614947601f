"""What hangs on modules and parameters from outside, and that a rewritten module would lose: hooks, compiled
calls, and wrappers."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import fx, nn
from torch.nn.utils.spectral_norm import SpectralNorm, SpectralNormLoadStateDictPreHook

from act24.errors import PassError
from act24.passes.graph.frozen import refuse_name_clashes
from act24.passes.graph.region import Region, RegionModule

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


#: Modules that stand around a model, by the name of their class or of a base, and what to do about them.
_WRAPPERS = {
    "OptimizedModule": "is compiled: apply the passes to the module inside, and compile it then",
    "DistributedDataParallel": "is wrapped: apply the passes to the module inside, and wrap it then",
    "DataParallel": "is wrapped: apply the passes to the module inside, and wrap it then",
    "FullyShardedDataParallel": "is wrapped: apply the passes first, and wrap the model then",
    "ScriptModule": "is a script, which cannot be traced: apply the passes to the module it is from",
}


def refuse_wrapped(model: nn.Module) -> None:
    """Check that no module is compiled, wrapped, or still without shapes.

    Raises:
        PassError: names the first that is.
    """
    for fqn, module in model.named_modules():
        cls = type(module)
        for base in cls.__mro__:  # torch.jit.trace makes one subclass of a script, torch.jit.script another
            if base.__module__.startswith("torch.") and base.__name__ in _WRAPPERS:
                raise PassError(f"{fqn or 'the model'} [{cls.__name__}] {_WRAPPERS[base.__name__]}")
        if any(b.__name__ == "FSDPModule" and b.__module__.startswith("torch.") for b in cls.__mro__):
            raise PassError(
                f"{fqn or 'the model'} [{cls.__name__}] is sharded: apply the passes first, and fully_shard "
                "it then"
            )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise PassError(f"{name} has no shape yet: run the model once, and apply the passes then")


def refuse_parameter_hooks(region: Region, replaced: tuple[str, ...]) -> None:
    """Check that no parameter that a pass replaces has a hook.

    Raises:
        PassError: names the first that has one.
    """
    parameters = dict(region.module.named_parameters(remove_duplicate=False))
    for name in replaced:
        parameter: Any = parameters.get(name)
        if parameter is not None and (
            parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
        ):
            raise PassError(
                f"{region.name(name)} has a hook, and a pass replaces the parameter: remove the hook, "
                "apply the passes, and register it on what stands there then"
            )


def recompile_(old: nn.Module, new: nn.Module) -> None:
    """Compile a module as another was compiled in place (`nn.Module.compile`), if it was.

    Raises:
        PassError: how it was compiled cannot be found out.
    """
    compiled: Any = old._compiled_call_impl
    if compiled is None:
        return
    for cell in getattr(compiled, "__closure__", None) or ():
        if isinstance(context := cell.cell_contents, _compiler_contexts()):
            new._compiled_call_impl = context(new._call_impl)  # type: ignore[operator]
            return
    raise PassError(
        f"a {type(old).__name__} is compiled in place, and how cannot be found out: compile it after apply_"
    )


def _compiler_contexts() -> tuple[type, ...]:
    from torch._dynamo.eval_frame import _TorchDynamoContext  # imported wherever something is compiled

    return (_TorchDynamoContext,)


def refuse_hooks(region: Region, opened: Collection[str] = ()) -> None:
    """Check that no module of a region has a hook. Leaves may: they stay the modules that they are. A model
    that is a region itself stays an instance of its class, and needs names of its own for that.

    Args:
        opened: leaves, by local name, that a pass does not call either.

    Raises:
        PassError: names the first module that has one.
    """
    if not region.fqn:
        refuse_name_clashes(region.module, RegionModule(nn.Module(), fx.Graph()))
    called = (str(node.target) for node in region.graph.nodes if node.op == "call_module")
    leaves = tuple(f"{path}." for path in called if path not in opened)
    for path, module in region.module.named_modules():
        if f"{path}.".startswith(leaves):
            continue  # stays the module that it is, hooks and all
        if path and module._compiled_call_impl is not None:
            raise PassError(
                f"{region.name(path)} is compiled in place, and lies in a module that is traced as a "
                "whole: apply the passes first, and compile then"
            )
        for kind in _HOOKS:
            if any(not _is_left_over(hook, module) for hook in getattr(module, kind).values()):
                again, fqn = "register it again", region.fqn
                if path and "state_dict" not in kind:  # nothing will call what stands here then
                    again = f"register one on {fqn or 'the model'}"
                    again += f', or leave that one out, ignore = ["{fqn}"]' if fqn else ""
                raise PassError(
                    f"{region.name(path)} has a hook ({kind.strip('_')}), which a traced module would "
                    f"lose: remove it, apply the passes, and {again}"
                )


def _is_left_over(hook: Any, module: nn.Module) -> bool:
    """Whether a hook is one that torch.nn.utils.remove_spectral_norm leaves, for keys that are gone."""
    of_norm = isinstance(getattr(hook, "hook", hook), SpectralNormLoadStateDictPreHook)
    return of_norm and not any(isinstance(one, SpectralNorm) for one in module._forward_pre_hooks.values())
