"""Learning-rate schedules: the multiplier of the peak learning rate as a pure function of the update index.

`step` counts updates already made, so the first update has index 0. Every function checks its arguments each
time, which costs a few comparisons an update.

A schedule that a recipe can name is one record, a frozen dataclass of options with a name and a method
`multiplier`, in one table, `SCHEDULES`. A package from outside adds its own with `SCHEDULES.add`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from act24.options import (
    MOST_STEPS,
    OptionError,
    PositiveSteps,
    Range,
    Steps,
    check_options,
    check_values,
    in_range,
)
from act24.records import Table

#: Updates of `cosine_restart`'s climb, where it is not given.
RESTART_WARMUP_STEPS = 5
#: What `cosine_restart` restarts from, and what is left of the learning rate right after moments are reset.
RESTART_FLOOR = 1e-6


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The options that every schedule has, which are none, and what is asked of one.

    Attributes:
        name: as recipes have it.

    Raises:
        OptionError: when made with a value that a field does not take, naming both.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        check_options(self)

    def multiplier(self, step: int, total_steps: int) -> float:
        """The factor on the peak learning rate at update `step` of a run of `total_steps`.

        Raises:
            OptionError: the options make no sense for a run of this length.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Cosine(Schedule):
    """Options of `cosine`.

    Attributes:
        warmup_steps: updates over which the learning rate rises from 0 to its peak.
        min_lr_ratio: what it falls to, of the peak.
        skip_zero: where the first update would have learning rate 0, which is wherever there is a warm-up
            from 0, leave that value out: update k has the multiplier of k + 1, as in the public scripts.
            `cosine_restart` begins above 0 and has none to leave out.
    """

    name: ClassVar[str] = "cosine"

    warmup_steps: Steps = 0
    min_lr_ratio: Annotated[float, Range(ge=0, le=1)] = 0.1
    skip_zero: bool = False

    def _index(self, step: int) -> int:
        """The update whose multiplier update `step` has."""
        return step + 1 if self.skip_zero and self.warmup_steps else step

    def multiplier(self, step: int, total_steps: int) -> float:
        return cosine(
            self._index(step),
            total_steps=total_steps,
            warmup_steps=self.warmup_steps,
            min_lr_ratio=self.min_lr_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class Linear(Cosine):
    """Options of `linear`."""

    name: ClassVar[str] = "linear"

    def multiplier(self, step: int, total_steps: int) -> float:
        return linear(
            self._index(step),
            total_steps=total_steps,
            warmup_steps=self.warmup_steps,
            min_lr_ratio=self.min_lr_ratio,
        )


@dataclass(frozen=True, kw_only=True)
class Constant(Cosine):
    """Options of `constant`.

    It takes `min_lr_ratio` and has none: recipes that extend one with a cosine cannot take that key away.
    """

    name: ClassVar[str] = "constant"

    def multiplier(self, step: int, total_steps: int) -> float:
        return constant(self._index(step), warmup_steps=self.warmup_steps)


@dataclass(frozen=True, kw_only=True)
class WSD(Cosine):
    """Options of `wsd`: warm-up, stable, decay (MiniCPM, arXiv 2404.06395).

    Attributes:
        decay_steps: updates of the fall at the end; not given: a fifth of the run, as in arXiv 2405.18392.
        decay: its form, `"sqrt"`, 1 - √t (arXiv 2405.18392), or `"linear"`, 1 - t.
        min_lr_ratio: where the fall ends, at `total_steps`; the published runs end at 0 or a tenth.
    """

    name: ClassVar[str] = "wsd"

    decay_steps: Steps | None = None
    decay: Literal["sqrt", "linear"] = "sqrt"

    def multiplier(self, step: int, total_steps: int) -> float:
        return wsd(
            self._index(step),
            total_steps=total_steps,
            warmup_steps=self.warmup_steps,
            decay_steps=total_steps // 5 if self.decay_steps is None else self.decay_steps,
            min_lr_ratio=self.min_lr_ratio,
            decay=self.decay,
        )


@dataclass(frozen=True, kw_only=True)
class CosineRestart(Cosine):
    """Options of `cosine_restart`; None: what that function takes where it is not given.

    Attributes:
        restart_every: updates from one restart to the next.
        restart_warmup_steps: updates of the climb back to the cosine.
        lr_adjust_steps: 0 or less; delays the cosine by so many updates.
        restart_in_warmup: whether there are restarts during the warm-up too.
    """

    name: ClassVar[str] = "cosine_restart"

    restart_every: PositiveSteps
    restart_warmup_steps: Steps | None = None
    lr_adjust_steps: Annotated[int, Range(ge=-MOST_STEPS, le=0)] | None = None
    restart_in_warmup: bool | None = None

    def multiplier(self, step: int, total_steps: int) -> float:
        names = ("restart_warmup_steps", "lr_adjust_steps", "restart_in_warmup")
        given: dict[str, Any] = {name: v for name in names if (v := getattr(self, name)) is not None}
        return cosine_restart(
            step,
            total_steps=total_steps,
            warmup_steps=self.warmup_steps,
            min_lr_ratio=self.min_lr_ratio,
            restart_every=self.restart_every,
            **given,
        )


#: The schedules that a recipe can name.
SCHEDULES: Table[type[Schedule]] = Table("schedule", Cosine, Linear, Constant, WSD, CosineRestart)


def cosine(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then half a cosine down to `min_lr_ratio` at `total_steps`.

    With a warm-up the update of index 0 has multiplier 0, as in GaLore's scripts. Constant after the end.
    """
    _check("cosine", step, total_steps, warmup_steps, min_lr_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    return _half_cosine(min(1.0, (step - warmup_steps) / (total_steps - warmup_steps)), min_lr_ratio)


def linear(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up from 0, then a straight line down to `min_lr_ratio`; with 0 that of `transformers`."""
    _check("linear", step, total_steps, warmup_steps, min_lr_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    left = max(0, total_steps - step) / (total_steps - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * left


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0, then 1."""
    in_range("constant", "step", step, Range(ge=0))
    check_values(Constant, "constant", warmup_steps=warmup_steps)
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def wsd(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    decay_steps: int,
    min_lr_ratio: float = 0.0,
    decay: Literal["sqrt", "linear"] = "sqrt",
) -> float:
    """Linear warm-up from 0, then 1, then over the last `decay_steps` down to `min_lr_ratio` at the end.

    Before its fall nothing depends on `total_steps`, so a run may be made longer from there.

    Raises:
        OptionError: warm-up and fall are longer than the run, or a number is out of range.
    """
    _check("wsd", step, total_steps, warmup_steps, min_lr_ratio)
    check_values(WSD, "wsd", decay_steps=decay_steps, decay=decay)
    if warmup_steps + decay_steps > total_steps:
        raise OptionError(
            f"wsd: warmup_steps ({warmup_steps}) and decay_steps ({decay_steps}) are more than total_steps "
            f"({total_steps})"
        )
    if step < warmup_steps:
        return step / warmup_steps
    if step < total_steps - decay_steps:
        return 1.0
    fallen = min(1.0, (step - (total_steps - decay_steps)) / decay_steps) if decay_steps else 0.0
    return min_lr_ratio + (1 - min_lr_ratio) * (1 - (math.sqrt(fallen) if decay == "sqrt" else fallen))


def cosine_restart(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    restart_every: int,
    restart_warmup_steps: int = RESTART_WARMUP_STEPS,
    lr_adjust_steps: int = 0,
    restart_in_warmup: bool = True,
) -> float:
    """A cosine that every `restart_every` updates falls to 1e-6 and climbs back within a few updates.

    The climb takes `restart_warmup_steps` and ends on the value the cosine has at the restart. It softens the
    first updates of an Adam whose moments were just reset.

    Args:
        lr_adjust_steps: a <= 0 delays the cosine by |a| updates: past the warm-up the multiplier still rises,
            peaks at `warmup_steps` + |a|, and ends above `min_lr_ratio`. After the warm-up restarts are
            counted on `step + lr_adjust_steps`; the first ones, up to |a| updates after it, are missing.
        restart_in_warmup: whether restarts also happen during the warm-up.

    The warm-up starts at `min_lr_ratio`, not at 0. Bit for bit the scheduler `cosine_restart` of LORO's
    pretraining script (ICLR 2025): the order of the operations below is part of the definition.
    """
    _check("cosine_restart", step, total_steps, warmup_steps, min_lr_ratio)
    check_values(
        CosineRestart,
        "cosine_restart",
        restart_every=restart_every,
        restart_warmup_steps=restart_warmup_steps,
        lr_adjust_steps=lr_adjust_steps,
        restart_in_warmup=restart_in_warmup,
    )
    if min_lr_ratio == 0:
        raise OptionError("cosine_restart: min_lr_ratio has to be above 0, because the warm-up starts there")
    if restart_warmup_steps > restart_every:
        raise OptionError(
            f"cosine_restart: restart_warmup_steps ({restart_warmup_steps}) has to be restart_every "
            f"({restart_every}) at most"
        )
    if warmup_steps - lr_adjust_steps >= total_steps:
        raise OptionError(
            f"cosine_restart: lr_adjust_steps ({lr_adjust_steps}) has to be a delay that ends before "
            f"total_steps ({total_steps}) with warmup_steps ({warmup_steps}) added"
        )
    decay_steps = total_steps - warmup_steps

    def restarting(since: int, target: float) -> float:
        return RESTART_FLOOR + since / restart_warmup_steps * (target - RESTART_FLOOR)

    if step < warmup_steps:
        since, start = step % restart_every, step // restart_every * restart_every
        # What the delayed cosine has at the end of the warm-up, without the floor.
        end = 0.5 * (1 + math.cos(math.pi * -lr_adjust_steps / decay_steps))
        if restart_in_warmup and since < restart_warmup_steps and start != 0:
            return restarting(since, min_lr_ratio + start / warmup_steps * (end - min_lr_ratio))
        return min_lr_ratio + step / warmup_steps * (end - min_lr_ratio)
    shifted = step + lr_adjust_steps
    since, start = shifted % restart_every, shifted // restart_every * restart_every
    if since < restart_warmup_steps and start > 0:
        return restarting(since, _half_cosine((start - warmup_steps) / decay_steps, min_lr_ratio))
    return _half_cosine((shifted - warmup_steps) / decay_steps, min_lr_ratio)


def rewarm(step: int, *, every: int, warmup_steps: int) -> float:
    """The factor that softens the updates after a reset of the moments, for any schedule.

    1 but for the `warmup_steps` updates from each positive multiple of `every` on, over which it climbs from
    1e-6 as in `cosine_restart`. `every` = 0: no resets, always 1.

    Raises:
        OptionError: a number is below 0.
    """
    for name, value in (("step", step), ("every", every), ("warmup_steps", warmup_steps)):
        in_range("rewarm", name, value, Range(ge=0))
    if every == 0 or step < every or step % every >= warmup_steps:
        return 1.0
    return RESTART_FLOOR + step % every / warmup_steps * (1 - RESTART_FLOOR)


def resets_without_rewarm(
    multiplier: Callable[[int], float], *, every: int, total_steps: int
) -> tuple[int, ...]:
    """The positive multiples of `every` below `total_steps` at which `multiplier` does not fall by half.

    There Adam with fresh moments makes its first update, one of the size of the learning rate in every
    coordinate, at full learning rate. None for `every` = 0.

    Raises:
        OptionError: a number is below 0.
    """
    in_range("resets_without_rewarm", "every", every, Range(ge=0))
    in_range("resets_without_rewarm", "total_steps", total_steps, Range(ge=0))
    if every == 0:
        return ()
    resets = range(every, total_steps, every)
    return tuple(step for step in resets if multiplier(step) > multiplier(step - 1) / 2)


def _half_cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _check(owner: str, step: int, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> None:
    in_range(owner, "step", step, Range(ge=0))
    check_values(Cosine, owner, warmup_steps=warmup_steps, min_lr_ratio=min_lr_ratio)
    if warmup_steps >= total_steps:
        raise OptionError(
            f"{owner}: warmup_steps ({warmup_steps}) has to be below total_steps ({total_steps})"
        )
