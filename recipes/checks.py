"""What a recipe's tables say about each other: combinations that contradict, and those that only look odd."""

from __future__ import annotations

from collections.abc import Iterator

from act24.errors import Act24Error
from act24.optim.loro import check_loro_options, refresh_period
from act24.passes import Cola, Lost, LowRank, Pass, Weight24
from act24.recipes.schema import Recipe
from act24.schedules import resets_without_rewarm

#: Optimizers that are AdamW with the settings of a pass, and that pass.
_SETTINGS_OF = {"cola_adamw": Cola, "lost_adamw": Lost}
_SHOWN = 6


def contradictions(recipe: Recipe) -> Iterator[str]:
    """What cannot be run, each with its key and the reason."""
    try:
        recipe.lr_multiplier(0)
    except Act24Error as error:
        yield f"schedule: {error}"
    if recipe.train.parallel == "fsdp" and recipe.log.gradient_cosine_every:
        yield 'log.gradient_cosine_every: compares gradients of whole weights: use train.parallel = "ddp"'
    optimizer = recipe.optimizer
    if optimizer.name == "loro_adamw":
        yield from _loro_contradictions(recipe)
    elif (method := _SETTINGS_OF.get(optimizer.name)) and not _has(recipe, method):
        yield (
            f'optimizer.name: "{optimizer.name}" is AdamW with the settings of {method.name}, and the recipe '
            'has no such pass: use "adamw"'
        )


def oddities(recipe: Recipe) -> Iterator[str]:
    """What can be run and is likely not meant, one line each."""
    for every in _reset_periods(recipe):
        steps = resets_without_rewarm(recipe.lr_multiplier, every=every, total_steps=recipe.train.steps)
        if steps:
            more = f" and {len(steps) - _SHOWN} more" if len(steps) > _SHOWN else ""
            yield (
                f"moments are reset every {every} updates, but the learning rate does not warm up again at "
                f"step {', '.join(map(str, steps[:_SHOWN]))}{more}: there the first update is of full size "
                "in every coordinate"
            )


def _loro_contradictions(recipe: Recipe) -> Iterator[str]:
    optimizer = recipe.optimizer
    try:
        check_loro_options(**optimizer.loro_options())
    except Act24Error as error:
        yield f"optimizer: {error}"
    if optimizer.lr_scaler != -1 and (optimizer.lr_scaler or 0) <= 0:
        yield f"optimizer.lr_scaler: -1, for rank / hidden_size, or above 0, got {optimizer.lr_scaler}"
    for method, settings in ((Cola, "cola_adamw"), (Lost, "lost_adamw")):
        if _has(recipe, method):
            yield (
                'optimizer.name: "loro_adamw" steps on products of two factors, and the model computes with '
                f'no product of those of {method.name}: use "{settings}"'
            )
            return
    if not _has(recipe, LowRank):
        yield 'optimizer.name: "loro_adamw" steps on factors, and the recipe has no pass low_rank'
    exact = optimizer.type != "eucl" and optimizer.exact_every
    for p in recipe.passes:
        if isinstance(p, LowRank) and p.init.startswith("const_") and (exact or optimizer.restarts):
            yield (
                f"passes.low_rank.init: {p.init} makes factors of rank one, which have no exact step; set "
                'optimizer.type = "eucl", or another init'
            )

    if (exact or optimizer.restarts) and any(_overlap(p, q) for p in recipe.passes for q in recipe.passes):
        yield (
            "passes.weight24: it takes factors of low_rank, and LORO's exact step mixes their columns, which "
            'tears a 2:4 mask; set optimizer.type = "eucl", or keep the scopes apart'
        )


def _overlap(factors: Pass, sparse: Pass) -> bool:
    """Whether a `weight24` surely meets factors; with selectors given the run finds out when it starts."""
    if not (isinstance(factors, LowRank) and isinstance(sparse, Weight24)):
        return False
    chosen = any(p.targets != ("*",) or p.ignore for p in (factors, sparse))
    return not chosen and ("all" in (factors.scope, sparse.scope) or factors.scope == sparse.scope)


def _reset_periods(recipe: Recipe) -> list[int]:
    """Updates from one reset of moments to the next, for each cause of resets."""
    optimizer = recipe.optimizer
    periods = {optimizer.momentum_reset_steps}
    if optimizer.name == "loro_adamw":
        periods.add(optimizer.restarts or 0)
        if optimizer.refresh != "none":
            options = optimizer.loro_options()
            periods.add(refresh_period(options["type"], options["exact_every"], options["refresh_every"]))
    return sorted(periods - {0})


def _has(recipe: Recipe, method: type) -> bool:
    return any(isinstance(p, method) for p in recipe.passes)
