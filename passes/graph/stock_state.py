"""State dicts of a rewritten model from those of the stock model, and back, match by match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from act24.errors import PassError
from act24.passes.base import StateMap
from act24.passes.graph.region import Region, joined


@dataclass(frozen=True)
class Change:
    """What one match does to the parameters of a region.

    Attributes:
        region: where; a shared region has several places, and so several sets of names.
        pass_name: which pass made the match.
        path: of the match, local to the region.
        state: how the parameters map, by local names.
    """

    region: Region
    pass_name: str
    path: str
    state: StateMap


def from_stock(
    changes: Sequence[Change], state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """A stock state dict as the rewritten model's.

    Args:
        changes: in the order in which passes made them.

    Returns:
        the state dict, and the names that it lacks because nothing in the stock one becomes their value.

    Raises:
        PassError: a name that a pass starts from is missing.
    """
    result, fresh = dict(state), dict[str, None]()
    for change in changes:
        for fqn in change.region.fqns:
            removes = {name: joined(fqn, name) for name in change.state.removes}
            creates = [joined(fqn, name) for name in change.state.creates]
            fill = change.state.from_stock if fresh.keys().isdisjoint(removes.values()) else None
            if fill is None:
                for name in removes.values():
                    result.pop(name, None)
                    fresh.pop(name, None)
                fresh.update(dict.fromkeys(creates))
            else:
                made = fill(_take(result, removes))
                result.update({joined(fqn, name): value for name, value in made.items()})
    return result, tuple(fresh)


def to_stock(changes: Sequence[Change], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rewritten model's state dict as a stock one of the same function.

    Args:
        changes: in the order in which passes made them.

    Raises:
        PassError: a pass has no such form, with its reason, or a name is missing.
    """
    result = dict(state)
    for change in reversed(changes):
        if change.state.to_stock is None:
            raise PassError(
                f"{change.region.name(change.path)} has no stock form: {change.state.why}. Keep that pass"
            )
        for fqn in change.region.fqns:
            created = _take(result, {name: joined(fqn, name) for name in change.state.creates})
            made = change.state.to_stock(created)
            result.update({joined(fqn, name): value for name, value in made.items()})
    return result


def _take(state: dict[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Take tensors out of a state dict, by the keys of `names`."""
    if missing := [fqn for fqn in names.values() if fqn not in state]:
        raise PassError(f"the state dict has no {missing[0]}: give one of the whole model")
    return {name: state.pop(fqn) for name, fqn in names.items()}


def freeze_beside_(model: nn.Module, changes: Sequence[Change]) -> None:
    """Let nothing of a rewritten model train but what some changes have made; without changes all stays."""
    made = set[int]()
    for change in changes:
        held = dict(change.region.module.named_parameters())
        made |= {id(held[name]) for name in {*change.state.creates} - {*change.state.removes} if name in held}
    for parameter in model.parameters() if changes else ():
        if id(parameter) not in made:
            parameter.requires_grad_(False)
