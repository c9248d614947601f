"""Learning-rate schedules: the multiplier of the peak learning rate as a pure function of the update index.

`step` counts updates already made, so the first update has index 0. Every function checks its arguments each
time, which costs a few comparisons an update.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from act24.errors import Act24Error

#: What `cosine_restart` restarts from, and what is left of the learning rate right after moments are reset.
RESTART_FLOOR = 1e-6


def cosine(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up from 0 over `warmup_steps`, then half a cosine down to `min_lr_ratio` at `total_steps`.

    With a warm-up the update of index 0 has multiplier 0, as in GaLore's scripts. Constant after the end.
    """
    _check(step, total_steps, warmup_steps, min_lr_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    return _half_cosine(min(1.0, (step - warmup_steps) / (total_steps - warmup_steps)), min_lr_ratio)


def linear(step: int, *, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> float:
    """Linear warm-up from 0, then a straight line down to `min_lr_ratio`; with 0 that of `transformers`."""
    _check(step, total_steps, warmup_steps, min_lr_ratio)
    if step < warmup_steps:
        return step / warmup_steps
    left = max(0, total_steps - step) / (total_steps - warmup_steps)
    return min_lr_ratio + (1 - min_lr_ratio) * left


def constant(step: int, *, warmup_steps: int = 0) -> float:
    """Linear warm-up from 0, then 1."""
    if step < 0 or warmup_steps < 0:
        raise Act24Error(f"step ({step}) and warmup_steps ({warmup_steps}) must be 0 or more")
    return min(1.0, step / warmup_steps) if warmup_steps else 1.0


def cosine_restart(
    step: int,
    *,
    total_steps: int,
    warmup_steps: int,
    min_lr_ratio: float,
    restart_every: int,
    restart_warmup_steps: int = 5,
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
    _check(step, total_steps, warmup_steps, min_lr_ratio)
    if min_lr_ratio == 0:
        raise Act24Error("cosine_restart: min_lr_ratio must be above 0, because the warm-up starts there")
    if restart_every < 1:
        raise Act24Error(f"cosine_restart: restart_every must be at least 1, got {restart_every}")
    if not 0 <= restart_warmup_steps <= restart_every:
        raise Act24Error(
            f"cosine_restart: restart_warmup_steps ({restart_warmup_steps}) must lie between 0 and "
            f"restart_every ({restart_every})"
        )
    if lr_adjust_steps > 0 or warmup_steps - lr_adjust_steps >= total_steps:
        raise Act24Error(
            f"cosine_restart: lr_adjust_steps ({lr_adjust_steps}) must be 0 or negative, a delay that ends "
            f"before total_steps ({total_steps}) with warmup_steps ({warmup_steps}) added"
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
    """
    if every == 0 or step < every or step % every >= warmup_steps:
        return 1.0
    return RESTART_FLOOR + step % every / warmup_steps * (1 - RESTART_FLOOR)


def resets_without_rewarm(
    multiplier: Callable[[int], float], *, every: int, total_steps: int
) -> tuple[int, ...]:
    """The positive multiples of `every` below `total_steps` at which `multiplier` does not fall by half.

    There Adam with fresh moments makes its first update, one of the size of the learning rate in every
    coordinate, at full learning rate. None for `every` = 0.
    """
    if every == 0:
        return ()
    resets = range(every, total_steps, every)
    return tuple(step for step in resets if multiplier(step) > multiplier(step - 1) / 2)


#: The schedules that a recipe can name.
SCHEDULES: dict[str, Callable[..., float]] = {
    schedule.__name__: schedule for schedule in (cosine, linear, constant, cosine_restart)
}


def _half_cosine(progress: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def _check(step: int, total_steps: int, warmup_steps: int, min_lr_ratio: float) -> None:
    if step < 0:
        raise Act24Error(f"step must be 0 or more, got {step}")
    if not 0 <= warmup_steps < total_steps:
        raise Act24Error(
            f"warmup_steps ({warmup_steps}) must be 0 or more and below total_steps ({total_steps})"
        )
    if not 0 <= min_lr_ratio <= 1:
        raise Act24Error(f"min_lr_ratio must lie between 0 and 1, got {min_lr_ratio}")
