"""AdamW (arXiv 1711.05101) with float32 moments for parameters of any dtype.

In bfloat16 the usual second moment is a ratchet: 0.999 v rounds back to v for every v, so it only ever
grows. Float32 moments cost 8 bytes a parameter instead of 4, and are the default.
"""

# pyright: reportPrivateImportUsage=false
from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from act24.optim.base import OptimizerOptions, Surroundings
from act24.optim.one_pass import Tensors, misfit, update_, why_not_one_pass
from act24.options import OptionError, Range, Steps, check_values, in_range
from act24.schedules import rewarm

MOMENTS = ("exp_avg", "exp_avg_sq")
StateDtype = Literal["float32", "parameter"]
Decay = Literal["matrices", "matrices_and_embeddings", "all"]
Beta = Annotated[float, Range(ge=0, lt=1)]
_PART = 2**26


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(OptimizerOptions):
    """Options of `adamw`; those of `AdamW` are among them.

    Attributes:
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times the learning rate.
        decay: what weight decay acts on (`parameter_groups`).
        state_dtype: of the moments: `"float32"`, or float64 for float64 parameters; `"parameter"` takes the
            parameter's, which reproduces pure bfloat16 training.
        momentum_reset_steps: zero all moments after every so many updates; 0: never.
        momentum_reset_warmup: updates over which the learning rate climbs after that.
    """

    name: ClassVar[str] = "adamw"

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: Annotated[float, Range(gt=0)] = 1e-8
    weight_decay: Annotated[float, Range(ge=0)] = 0.0
    decay: Decay = "matrices"
    state_dtype: StateDtype = "float32"
    momentum_reset_steps: Steps = 0
    momentum_reset_warmup: Steps = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        period, climb = self.momentum_reset_steps, self.momentum_reset_warmup
        if climb and not period:
            raise OptionError(
                f"{self.name}: momentum_reset_warmup has no meaning without momentum_reset_steps"
            )
        if period and climb >= period:
            raise OptionError(
                f"{self.name}: momentum_reset_warmup ({climb}) must be below momentum_reset_steps ({period})"
            )

    def build(self, model: nn.Module, surroundings: Surroundings) -> AdamW:
        groups = parameter_groups(model, self.weight_decay, self.decay)
        return AdamW(groups, **self.of_every_group())

    def of_every_group(self) -> dict[str, Any]:
        """The options that `AdamW` takes beside the groups."""
        names = ("lr", "betas", "eps", "state_dtype", "momentum_reset_steps")
        return {name: getattr(self, name) for name in names}

    def reset_periods(self) -> tuple[int, ...]:
        return (self.momentum_reset_steps,) if self.momentum_reset_steps else ()

    def softened(self, step: int) -> float:
        return rewarm(step, every=self.momentum_reset_steps, warmup_steps=self.momentum_reset_warmup)


@dataclass(frozen=True, kw_only=True)
class ColaAdamWOptions(AdamWOptions):
    """AdamW with the settings that CoLA was published with (arXiv 2502.10940)."""

    name: ClassVar[str] = "cola_adamw"
    aliases: ClassVar[tuple[str, ...]] = ("adamw_cola",)
    needs: ClassVar[str] = "cola"
    why: ClassVar[str] = "is AdamW with the settings of cola"

    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: Annotated[float, Range(ge=0)] = 0.01
    decay: Decay = "all"


@dataclass(frozen=True, kw_only=True)
class LostAdamWOptions(AdamWOptions):
    """AdamW with the settings that LoST was published with (arXiv 2508.02668)."""

    name: ClassVar[str] = "lost_adamw"
    aliases: ClassVar[tuple[str, ...]] = ("adamw_lost",)
    needs: ClassVar[str] = "lost"
    why: ClassVar[str] = "is AdamW with the settings of lost"


def adam_direction(
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> list[Tensor]:
    """Take the gradients into the moments, in place, and return Adam's direction m̂ / (√v̂ + eps).

    Args:
        gradients, exp_avgs, exp_avg_sqs: lists of equal shapes, the two moments of one dtype.
        step: updates that the moments hold, with this one: 1 after a reset.

    Returns:
        new tensors in the moments' dtype, positive where the parameter is to fall.

    Raises:
        OptionError: a number is out of range.
    """
    _check_numbers("adam_direction", step, betas=betas, eps=eps)
    beta1, beta2 = betas
    gradients = [gradient.to(average.dtype) for gradient, average in zip(gradients, exp_avgs, strict=True)]
    torch._foreach_lerp_(exp_avgs, gradients, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, gradients, gradients, 1 - beta2)
    # The corrections of both moments go into the denominator: fewer passes over memory.
    correction = 1 - beta1**step
    denominators = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_mul_(denominators, correction / math.sqrt(1 - beta2**step))
    torch._foreach_add_(denominators, eps * correction)
    return list(torch._foreach_div(exp_avgs, denominators))


def adamw_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW update of parameters and moments, in place, without a host sync.

        p -= lr (m̂ / (√v̂ + eps) + weight_decay p)

    Where all tensors are of one dtype this is PyTorch's fused kernel: 28 bytes a parameter in float32.
    Otherwise the update is computed in the moments' dtype and the parameter is rounded once, so that decay
    survives in bfloat16: on a GPU by a kernel of our own (`act24.optim.one_pass`), elsewhere in several
    passes over memory, a part of the parameters at a time.

    Args:
        parameters, gradients, exp_avgs, exp_avg_sqs: lists of equal shapes, on one device.
        step: as for `adam_direction`.
        lr: a number, or a 0-D tensor.

    Raises:
        OptionError: a number is out of range.
    """
    _check_numbers("adamw_", step, betas=betas, eps=eps, weight_decay=weight_decay)
    if not isinstance(lr, Tensor):
        in_range("adamw_", "lr", lr, Range(ge=0))
    if not parameters:
        return
    dtypes = {tensor.dtype for tensor in itertools.chain(parameters, gradients, exp_avgs, exp_avg_sqs)}
    if len(dtypes) == 1 and parameters[0].device.type in ("cpu", "cuda"):
        # Filled on the device, so nothing waits; the kernel only reads it.
        steps = torch.full((), step, dtype=torch.float32, device=parameters[0].device)
        torch._fused_adamw_(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],
            [steps] * len(parameters),
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        return
    usable = not why_not_one_pass(parameters[0].device)
    one_pass: list[Tensors] = []
    several: list[Tensors] = []
    for tensors in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        (several if not usable or misfit(tensors) else one_pass).append(tensors)
    if one_pass:
        update_(one_pass, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if not several:
        return
    for part in _parts([parameter for parameter, *_ in several]):
        values, grads, *moments = map(list, zip(*several[part], strict=True))
        updates = adam_direction(grads, *moments, step=step, betas=betas, eps=eps)
        if weight_decay:
            torch._foreach_add_(updates, values, alpha=weight_decay)
        torch._foreach_mul_(updates, -lr)
        torch._foreach_add_(values, updates)


def _check_numbers(owner: str, step: int, **options: object) -> None:
    in_range(owner, "step", step, Range(ge=1))
    check_values(AdamWOptions, owner, **options)


def _parts(tensors: list[Tensor]) -> Iterator[slice]:
    """The list in parts of about `_PART` elements: temporaries are of that size, and not of the model's."""
    start, elements = 0, 0
    for index, tensor in enumerate(tensors):
        if elements and elements + tensor.numel() > _PART:
            yield slice(start, index)
            start, elements = index, 0
        elements += tensor.numel()
    yield slice(start, len(tensors))


def reset_due(updates: int, every: int) -> bool:
    """Whether moments are reset after `updates` updates: after every `every`-th, never for 0, and never
    before the first update.

    Raises:
        OptionError: a number is below 0.
    """
    in_range("reset_due", "updates", updates, Range(ge=0))
    in_range("reset_due", "every", every, Range(ge=0))
    return every > 0 and updates > 0 and updates % every == 0


def reset_moments_(optimizer: AdamW, groups: Iterable[dict[str, Any]] | None = None) -> None:
    """Zero the moments of the groups (all, unless given), in place, and restart their bias correction."""
    for group in optimizer.param_groups if groups is None else groups:
        group["step"] = 0
        for name in MOMENTS:
            moments = [
                local(state[name]) for p in group["params"] if name in (state := optimizer.state.get(p, {}))
            ]
            if moments:
                torch._foreach_zero_(moments)


def parameter_groups(
    model: nn.Module, weight_decay: float, decay: Decay = "matrices"
) -> list[dict[str, Any]]:
    """The model's trainable parameters in groups named `decay` and `no_decay`; empty ones are left out.

    Args:
        decay: `"matrices"` decays what has at least two dimensions and is no embedding table (so not a tied
            head either); `"matrices_and_embeddings"` the tables too; `"all"` decays everything.

    Raises:
        OptionError: an option is none of these, or out of range.
    """
    check_values(AdamWOptions, "parameter_groups", weight_decay=weight_decay, decay=decay)
    tables = (
        {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        if decay == "matrices"
        else set()
    )
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim >= 2 and id(parameter) not in tables
            (decayed if matrix or decay == "all" else exempt).append(parameter)
    groups = [
        {"name": "decay", "params": decayed, "weight_decay": weight_decay},
        {"name": "no_decay", "params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class AdamW(torch.optim.Optimizer):
    """AdamW over groups of parameters; the rule is `adamw_`.

    Each group counts for itself and in plain numbers, which checkpoints keep: `updates` ever made, and
    `step`, those since the last reset of the moments. A parameter without a gradient is left alone, moments
    and all, but its group's count goes on. FSDP2's sharded parameters are updated shard by shard.
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float | Tensor,
        betas: tuple[float, float] = AdamWOptions.betas,
        eps: float = AdamWOptions.eps,
        weight_decay: float = AdamWOptions.weight_decay,
        state_dtype: StateDtype = AdamWOptions.state_dtype,
        momentum_reset_steps: int = AdamWOptions.momentum_reset_steps,
        **group_defaults: Any,
    ) -> None:
        """
        Args:
            params: parameters, or groups such as those of `parameter_groups`.
            lr: a number of 0 or more, or a 0-D tensor that a schedule fills.
            betas, eps, weight_decay, state_dtype, momentum_reset_steps: see `AdamWOptions`.
            group_defaults: further entries of groups that lack them, for rules that build on this one.

        Raises:
            OptionError: names the option and the value that it does not take.
        """
        if not isinstance(lr, Tensor):
            in_range(type(self).__name__, "lr", lr, Range(ge=0))
        check_values(
            AdamWOptions,
            type(self).__name__,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            state_dtype=state_dtype,
            momentum_reset_steps=momentum_reset_steps,
        )
        self.momentum_reset_steps = momentum_reset_steps
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
            "updates": 0,
            "step": 0,
            **group_defaults,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Make one update from the gradients that the parameters hold."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["updates"] += 1
            group["step"] += 1
            self._update(group)
        self._after_update(self.param_groups[0]["updates"])
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        adamw_(
            *self._tensors(group),
            step=group["step"],
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _after_update(self, updates: int) -> None:
        if reset_due(updates, self.momentum_reset_steps):
            reset_moments_(self)

    def _is_adamw(self, group: dict[str, Any]) -> bool:
        """Whether the rule of a group is AdamW's."""
        return True

    def why_several_passes(self) -> dict[str, int]:
        """Why parameters are updated in several passes over memory where `adamw_` on a GPU can do it in one,
        and of each reason how many are; empty if none is."""
        reasons: Counter[str] = Counter()
        for group in filter(self._is_adamw, self.param_groups):
            rows: list[Tensors] = []
            for parameter in group["params"]:
                if (value := local(parameter)).numel():
                    mean, square = (self._moment_like(parameter, group["state_dtype"], n) for n in MOMENTS)
                    rows.append((value, value, mean, square))
            if len({tensor.dtype for row in rows for tensor in row}) > 1:  # else PyTorch's kernel does it
                reasons.update(why_not_one_pass(row[0].device) or misfit(row) for row in rows)
        del reasons[""]
        return dict(reasons)

    def _tensors(self, group: dict[str, Any]) -> tuple[list[Tensor], ...]:
        """Parameters, gradients and the two moments of a group: this process's part, where there is any."""
        rows = []
        for parameter in group["params"]:
            if parameter.grad is not None:
                row = (parameter, parameter.grad, *self._moments(parameter, group["state_dtype"]))
                if local(parameter).numel():
                    rows.append([local(tensor) for tensor in row])
        return tuple([row[i] for row in rows] for i in range(4))

    def _moments(self, parameter: Tensor, choice: StateDtype) -> tuple[Tensor, ...]:
        state = self.state[parameter]
        for name in MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=_state_dtype(parameter, choice))
        return tuple(state[name] for name in MOMENTS)

    def _moment_like(self, parameter: Tensor, choice: StateDtype, name: str) -> Tensor:
        """A moment, or one without memory where there is none yet."""
        if name in (state := self.state.get(parameter, {})):
            return local(state[name])
        dtype = _state_dtype(parameter, choice)
        return torch.empty_like(local(parameter), dtype=dtype, device="meta")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, but the moments keep the dtype they have in `state_dict`, where torch.optim
        rounds them to the parameter's."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        mine = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, parameter in zip(saved, mine, strict=True):
            for name in MOMENTS:
                if name in state_dict["state"].get(key, {}):
                    moment = state_dict["state"][key][name]
                    self.state[parameter][name] = moment.detach().clone().to(parameter.device)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor: the shard of a DTensor, or the tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _state_dtype(parameter: Tensor, choice: StateDtype) -> torch.dtype:
    if choice == "parameter":
        return parameter.dtype
    return torch.promote_types(parameter.dtype, torch.float32)
