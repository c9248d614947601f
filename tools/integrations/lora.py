"""PEFT's LoRA beside linears that passes have rewritten."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from act24.errors import PassError
from act24.passes.graph.frozen import Remains
from act24.passes.graph.region import RegionModule

if TYPE_CHECKING:
    from peft import LoraConfig  # pyright: ignore[reportMissingImports]

#: First values of adapters that are not made from the weight beside them.
_INITS = (True, False, "gaussian")
#: What remains of an nn.Linear and of transformers' Conv1D says how wide it was: in, out.
_SIZES = (("in_features", "nx"), ("out_features", "nf"))


def lora_config(config: LoraConfig) -> LoraConfig:
    """The same configuration, with which PEFT adapts linears that passes have rewritten too: whatever such a
    linear computes now, LoRA's product is added to it. PEFT does not save this: read a configuration of a
    folder through here again.

    Raises:
        PassError: the first values would be made from a weight, which a rewritten linear may not have, or
            "all-linear" is targeted. PEFT's own calls raise it where a target lies inside of a larger graph,
            and where adapters are merged.
    """
    if config.init_lora_weights not in _INITS:
        raise PassError(
            f"init_lora_weights = {config.init_lora_weights!r} is made from the weight of a linear, which "
            f"passes may have taken away: choose from {', '.join(map(repr, _INITS))}"
        )
    if config.target_modules == "all-linear":
        raise PassError(
            'target_modules = "all-linear" finds the linears that no pass has rewritten, and no others: name '
            'them, as in ["q_proj", "v_proj"]'
        )
    config._register_custom_module({RegionModule: _adapted(), Remains: _refused})
    return config


@cache
def _adapted() -> type[nn.Module]:
    """The class of a rewritten linear with LoRA beside it."""
    from peft.tuners.lora.layer import Linear  # pyright: ignore[reportMissingImports]

    class Adapted(Linear):
        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            """None but LoRA itself: the others read the weight."""
            return {(): None}

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            sizes = [getattr(module, names[0], None) or getattr(module, names[1], None) for names in _SIZES]
            if not all(isinstance(size, int) for size in sizes):
                raise PassError(
                    f"a {_kind(module)} that passes have rewritten is no linear, beside which LoRA could "
                    "be: name linears in target_modules"
                )
            return sizes[0], sizes[1]  # type: ignore[return-value]

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
            raise PassError(
                "an adapter beside a rewritten linear has no weight to be merged into: keep it beside "
                "(PEFT's save_pretrained writes it), or merge first and apply the passes then"
            )

    return Adapted


def _refused(target: nn.Module, *_: Any, **__: Any) -> NoReturn:
    """What PEFT makes of a linear inside of a larger graph."""
    raise PassError(
        f"a {_kind(target)} in target_modules lies inside of a larger graph that a pass has rewritten, "
        "where it is not called: give the model to PEFT first, and apply the passes then (their targets "
        "name the linear as …base_layer)"
    )


def _kind(module: nn.Module) -> str:
    return vars(module).get("_kind", "module")
