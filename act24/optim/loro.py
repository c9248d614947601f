"""LORO's optimizer (ICLR 2025): AdamW whose factors now and then take a step on the manifold of fixed rank.

Lazy updates, which is all but every `exact_every`-th, are AdamW with the learning rate of the factors times
R / D. The exact update replaces each product by a truncated SVD (`act24.low_rank.exact_step`) at the full
learning rate and without weight decay. Afterwards the moments, which belong to factors that are gone, are
zeroed; couple it with a schedule that warms up again (`act24.schedules.cosine_restart`).
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from act24.errors import Act24Error
from act24.low_rank.diagnostics import balance, largest_singular_value
from act24.low_rank.exact_step import Eigh, Refactored, exact_step, refactor
from act24.optim.adamw import (
    AdamW,
    AdamWOptions,
    Beta,
    Decay,
    StateDtype,
    adam_direction,
    adamw_,
    local,
    parameter_groups,
    reset_due,
    reset_moments_,
)
from act24.optim.base import Share, Surroundings, unshared
from act24.options import OptionError, Range, Steps, check_values, in_range

LoroType = Literal["loro", "eucl", "loro_raw"]
Refresh = Literal["all", "reg", "lrk", "none"]

#: The two factors of a linear.
Pair = tuple[nn.Parameter, nn.Parameter]

#: Elements of a factor that are stacked at once; the exact step holds some ten such stacks, in float64.
_STACK_ELEMENTS = 2**26


@dataclass(frozen=True, kw_only=True)
class LOROAdamWOptions(AdamWOptions):
    """Options of `loro_adamw`; those of `LOROAdamW` are among them.

    Attributes:
        type: what the exact update is fed: `"loro"`, Adam's direction, as in the published runs;
            `"loro_raw"`, the gradient, as in the paper's Algorithm 1; `"eucl"`: there is none.
        lr_scaler: factor on the factors' learning rate in lazy updates; -1: rank / hidden_size.
        exact_every: updates from one exact one to the next; 0: none.
        exact_lr_scale: factor on the learning rate in exact updates.
        refresh: moments that are zeroed: of the factors (`"lrk"`), of all else (`"reg"`), both or none. After
            an exact update `"reg"` and `"none"` keep moments of factors that are gone: what they do to the
            new ones depends on the signs of singular vectors, which each decomposition chooses for itself, so
            such a run follows the published script's only up to there.
        refresh_every: after every so many updates; None: after each exact one.
        restarts: replace the factors by the balanced ones of the same product, and refresh, after every so
            many updates (arXiv 2505.22922); 0: never.
    """

    name: ClassVar[str] = "loro_adamw"
    needs: ClassVar[str] = "low_rank"
    why: ClassVar[str] = "steps on factors of low_rank"
    refuses: ClassVar[Mapping[str, str]] = {
        method: "steps on products of two factors, and the model computes with no product of those of "
        f'{method}: use "{settings}"'
        for method, settings in (("cola", "cola_adamw"), ("lost", "lost_adamw"))
    }

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Annotated[float, Range(gt=0)] = 1e-6
    type: LoroType = "loro"
    lr_scaler: float = -1.0
    exact_every: Steps = 500
    exact_lr_scale: Annotated[float, Range(gt=0)] = 1.0
    refresh: Refresh = "all"
    refresh_every: Steps | None = None
    restarts: Steps = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_scale(self.name, "lr_scaler", self.lr_scaler)
        _check_restarts(self.name, self.type, self.refresh, self.restarts)

    def build(self, model: nn.Module, surroundings: Surroundings) -> LOROAdamW:
        groups = loro_parameter_groups(
            model,
            surroundings.places(self.needs),
            self.weight_decay,
            self.decay,
            hidden_size=getattr(getattr(model, "config", None), "hidden_size", None),
            lr_scale=self.lr_scaler,
        )
        return LOROAdamW(
            groups,
            type=self.type,
            exact_every=self.exact_every,
            exact_lr_scale=self.exact_lr_scale,
            refresh=self.refresh,
            refresh_every=self.refresh_every,
            restarts=self.restarts,
            eigh=surroundings.eigh,
            share=surroundings.share,
            **self.of_every_group(),
        )

    def exact_steps(self) -> bool:
        return bool(exact_period(self.type, self.exact_every) or self.restarts)

    def reset_periods(self) -> tuple[int, ...]:
        periods = {*super().reset_periods(), self.restarts}
        if self.refresh != "none":
            periods.add(refresh_period(self.type, self.exact_every, self.refresh_every))
        return tuple(sorted(periods - {0}))

    def diagnostics_(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        assert isinstance(optimizer, LOROAdamW)
        return {f"optim/loro_{name}": value for name, value in optimizer.diagnostics_().items()}


def loro_parameter_groups(
    model: nn.Module,
    linears: Sequence[str],
    weight_decay: float,
    decay: Decay = "matrices",
    *,
    hidden_size: int | None = None,
    lr_scale: float = -1.0,
) -> list[dict[str, Any]]:
    """The groups of `parameter_groups`, with the factors in groups of their own.

    Args:
        linears: fully qualified names of the factorised linears, which hold `weight_in` and `weight_out`.
        hidden_size: D; only needed for `lr_scale` -1.
        lr_scale: factor on the learning rate of the factors in lazy updates; -1: R / D, for every linear, as
            LORO does.

    Returns:
        beside `decay` and `no_decay` one group `factors_rank_<R>` a rank, whose parameters are pairs
        (weight_in, weight_out) one after the other.

    Raises:
        OptionError: `lr_scale` is neither -1 nor above 0.
        Act24Error: it is -1, and there is no `hidden_size`.
    """
    _check_scale("loro_parameter_groups", "lr_scale", lr_scale)
    if lr_scale == -1 and hidden_size is None:
        raise Act24Error("lr_scale = -1 means R / D, and the model tells no hidden_size: give a number")
    by_rank: dict[int, list[nn.Parameter]] = {}
    for name in linears:
        linear = model.get_submodule(name)
        weight_in = linear.get_parameter("weight_in")
        by_rank.setdefault(weight_in.shape[0], []).extend((weight_in, linear.get_parameter("weight_out")))
    factors = {id(parameter) for parameters in by_rank.values() for parameter in parameters}
    groups = parameter_groups(model, weight_decay, decay)
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) not in factors]
    for rank, parameters in sorted(by_rank.items()):
        groups.append(
            {
                "name": f"factors_rank_{rank}",
                "params": parameters,
                "weight_decay": weight_decay,
                "factors": True,
                "lr_scale": lr_scale if lr_scale != -1 else rank / (hidden_size or 1),
            }
        )
    return [group for group in groups if group["params"]]


def exact_period(type: str, exact_every: int) -> int:
    """Updates from one exact update to the next; 0: there are none."""
    return 0 if type == "eucl" else exact_every


def refresh_period(type: str, exact_every: int, refresh_every: int | None) -> int:
    """Updates from one refresh to the next, unless given that of the exact updates; 0: there are none."""
    return exact_period(type, exact_every) if refresh_every is None else refresh_every


def _check_scale(owner: str, name: str, scale: float) -> None:
    in_range(owner, name, scale)
    if scale != -1 and scale <= 0:
        raise OptionError(f"{owner}: {name} has to be -1, for rank / hidden_size, or above 0, got {scale}")


def _check_restarts(owner: str, type: str, refresh: str, restarts: int) -> None:
    if restarts and type != "eucl":
        raise OptionError(
            f"{owner}: restarts re-factorise, which the exact update of type '{type}' does anyway: use type "
            "'eucl'"
        )
    if restarts and refresh in ("reg", "none"):
        raise OptionError(
            f"{owner}: restarts leave the factors' moments without meaning, which refresh '{refresh}' would "
            "keep"
        )


class LOROAdamW(AdamW):
    """AdamW with exact updates of factors; see the module.

    eps is added to the uncorrected √v, as in LORO's script, and stands for eps / √(1 - β₂^step) of `AdamW`.
    Weight decay acts on the factors in lazy updates as lr √(1 - β₂^step) / (1 - β₁^step) · weight_decay,
    without `lr_scale`: LORO's script again.

    Exact updates are bit-equal on all processes if `share` computes each module on one of them and hands out
    the result; everything else is elementwise. FSDP2's factors are gathered stack by stack. Lazy updates
    cause no host sync; exact ones do where the eigendecomposition does.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = LOROAdamWOptions.betas,
        eps: float = LOROAdamWOptions.eps,
        weight_decay: float = LOROAdamWOptions.weight_decay,
        state_dtype: StateDtype = LOROAdamWOptions.state_dtype,
        momentum_reset_steps: int = LOROAdamWOptions.momentum_reset_steps,
        type: LoroType = LOROAdamWOptions.type,
        exact_every: int = LOROAdamWOptions.exact_every,
        exact_lr_scale: float = LOROAdamWOptions.exact_lr_scale,
        refresh: Refresh = LOROAdamWOptions.refresh,
        refresh_every: int | None = LOROAdamWOptions.refresh_every,
        restarts: int = LOROAdamWOptions.restarts,
        eigh: Eigh = torch.linalg.eigh,
        share: Share = unshared,
    ) -> None:
        """
        Args:
            params: groups, of `loro_parameter_groups`; and as for `AdamW` further on.
            type, exact_every, exact_lr_scale, refresh, refresh_every, restarts: see `LOROAdamWOptions`.
            eigh, share: see `Eigh` and `Share`.

        Raises:
            OptionError: names the option and the value that it does not take, or the two that contradict.
        """
        check_values(
            LOROAdamWOptions,
            "LOROAdamW",
            type=type,
            exact_every=exact_every,
            exact_lr_scale=exact_lr_scale,
            refresh=refresh,
            refresh_every=refresh_every,
            restarts=restarts,
        )
        _check_restarts("LOROAdamW", type, refresh, restarts)
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_dtype=state_dtype,
            momentum_reset_steps=momentum_reset_steps,
            factors=False,
            lr_scale=1.0,
        )
        self.type = type
        self.exact_every = exact_period(type, exact_every)
        self.exact_lr_scale = exact_lr_scale
        self.refresh = refresh
        self.refresh_every = refresh_period(type, exact_every, refresh_every)
        self.restarts = restarts
        self._eigh, self._share = eigh, share
        self._guarded: Tensor | None = None

    def diagnostics_(self) -> dict[str, Tensor]:
        """What to watch, as 0-D tensors on the device: the extremes of |weight_out| / |weight_in| and the
        largest singular value over all products, and how many modules' exact updates were refused, and lazy
        ones made instead, since the last call. Collective where parameters are sharded."""
        ratios, singular = [], []
        for pairs in self._stacks():
            weight_in, weight_out = _stacked(pairs)
            ratios.append(balance(weight_in, weight_out))
            singular.append(largest_singular_value(weight_in, weight_out))
        if not ratios:
            return {}
        ratio, largest = torch.cat(ratios), torch.cat(singular).amax()
        guarded = torch.zeros_like(largest) if self._guarded is None else self._guarded
        self._guarded = None
        return {
            "balance_min": ratio.amin(),
            "balance_max": ratio.amax(),
            "sigma_max": largest,
            "guarded": guarded,
        }

    def _update(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        correction = math.sqrt(1 - beta2 ** group["step"])
        shared = {"step": group["step"], "betas": group["betas"], "eps": group["eps"] / correction}
        if not group["factors"]:
            adamw_(*self._tensors(group), lr=group["lr"], weight_decay=group["weight_decay"], **shared)
        elif reset_due(group["updates"], self.exact_every):
            self._exact_update(group, shared)
        else:
            scale = group["lr_scale"]
            decay = group["weight_decay"] * correction / ((1 - beta1 ** group["step"]) * scale)
            adamw_(*self._tensors(group), lr=group["lr"] * scale, weight_decay=decay, **shared)

    def _after_update(self, updates: int) -> None:
        if reset_due(updates, self.restarts):
            for pairs in self._stacks():
                self._replace(pairs, lambda *stacks: refactor(*stacks, eigh=self._eigh))
        if reset_due(updates, self.refresh_every) or reset_due(updates, self.restarts):
            kept = {"all": (), "reg": (True,), "lrk": (False,), "none": (True, False)}[self.refresh]
            reset_moments_(self, [group for group in self.param_groups if group["factors"] not in kept])
        super()._after_update(updates)

    def _exact_update(self, group: dict[str, Any], shared: dict[str, Any]) -> None:
        directions = self._directions(group, shared)
        lr = group["lr"] * self.exact_lr_scale
        for pairs in self._stacks([group]):
            stacks = _stacked([(directions[a], directions[b]) for a, b in pairs])
            valid = self._replace(
                pairs,
                lambda *s: exact_step(*s, lr=lr, eigh=self._eigh),
                *(_stacked([(p.grad, q.grad) for p, q in pairs]) if self.type == "loro_raw" else stacks),
                otherwise=tuple(-group["lr"] * group["lr_scale"] * stack for stack in stacks),
            )
            refused = (~valid).sum().float()
            self._guarded = refused if self._guarded is None else self._guarded + refused

    def _directions(self, group: dict[str, Any], shared: dict[str, Any]) -> dict[nn.Parameter, Tensor]:
        """Adam's direction for each factor that has a gradient, sharded like it; the moments move on."""
        directions = {}
        for parameter in group["params"]:
            if parameter.grad is not None:
                moments = self._moments(parameter, group["state_dtype"])
                directions[parameter] = torch.zeros_like(moments[0])
        filled = [p for p in directions if local(p).numel()]
        if filled:  # a process may have no part of any
            _, *tensors = self._tensors(group)
            for parameter, direction in zip(filled, adam_direction(*tensors, **shared), strict=True):
                local(directions[parameter]).copy_(direction)
        return directions

    def _stacks(self, groups: list[dict[str, Any]] | None = None) -> Iterator[list[Pair]]:
        """Pairs of factors of one shape, as many as are to be stacked; of the groups given, those with
        gradients."""
        by_shape: dict[tuple[torch.Size, torch.Size], list[Pair]] = {}
        for group in self.param_groups if groups is None else groups:
            if group["factors"]:
                parameters = iter(group["params"])
                for weight_in, weight_out in zip(parameters, parameters, strict=True):
                    if groups is None or (weight_in.grad is not None and weight_out.grad is not None):
                        key = (weight_in.shape, weight_out.shape)
                        by_shape.setdefault(key, []).append((weight_in, weight_out))
        for (shape_in, shape_out), pairs in by_shape.items():
            size = max(1, _STACK_ELEMENTS // max(shape_in.numel(), shape_out.numel()))
            for start in range(0, len(pairs), size):
                yield pairs[start : start + size]

    def _replace(
        self,
        pairs: Sequence[Pair],
        compute: Callable[..., Refactored],
        *stacks: Tensor,
        otherwise: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Put new factors in the place of a stack of them; where they are not valid, add `otherwise`."""
        old = _stacked(pairs)

        def part(positions: slice) -> tuple[Tensor, ...]:
            new = compute(*(stack[positions] for stack in (*old, *stacks)))
            return new.weight_in, new.weight_out, new.valid

        new_in, new_out, valid = self._share(part, len(pairs))
        for i, (new, before) in enumerate(zip((new_in, new_out), old, strict=True)):
            fallback = before if otherwise is None else before + otherwise[i]
            new = torch.where(valid[:, None, None], new, fallback)
            for pair, value in zip(pairs, new, strict=True):
                _assign_(pair[i], value)
        return valid


def _stacked(pairs: Sequence[tuple[Any, Any]]) -> tuple[Tensor, Tensor]:
    """Pairs of tensors as two stacks, whole tensors where they are sharded."""
    first, second = zip(*pairs, strict=True)
    return torch.stack([_full(t) for t in first]), torch.stack([_full(t) for t in second])


def _full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _assign_(parameter: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, which every process has, into a parameter, each process its part."""
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        value = distribute_tensor(value.to(parameter.dtype), mesh, placements, src_data_rank=None)
    parameter.detach().copy_(value)
