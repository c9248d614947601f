"""Hooks on modules that tracing takes apart: nothing would call them any more."""

from __future__ import annotations

from act24.errors import PassError
from act24.passes.graph.region import Region

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


def refuse_hooks(region: Region) -> None:
    """Check that no module of a region has a hook. Leaves may: they stay the modules that they are.

    Raises:
        PassError: names the first module that has one.
    """
    leaves = tuple(f"{node.target}." for node in region.graph.nodes if node.op == "call_module")
    for path, module in region.module.named_modules():
        if f"{path}.".startswith(leaves):
            continue  # stays the module that it is, hooks and all
        for kind in _HOOKS:
            if getattr(module, kind):
                raise PassError(
                    f"{region.name(path)} has a hook ({kind.strip('_')}), which a traced module would lose: "
                    "remove it, apply the passes, and register it again"
                )
