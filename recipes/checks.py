"""What a recipe's tables say about each other: what contradicts, and what only looks odd.

Whatever reads a recipe refuses the first; `validate`, `plan` and `train` print the second.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from act24.errors import Act24Error
from act24.llama import llama_config
from act24.passes import LowRank, OperationalPass, Pass, Weight24
from act24.recipes.schema import Recipe
from act24.schedules import resets_without_rewarm

_SHOWN = 6  # resets that are named
_LOOKED_AT = 10_000  # resets, the first ones of a run


def contradictions(recipe: Recipe) -> Iterator[str]:
    """What cannot be run, each with its key and the reason."""
    try:
        recipe.lr_multiplier(0)
    except Act24Error as error:
        yield f"schedule: {error}"
    if recipe.train.parallel == "fsdp" and recipe.log.gradient_cosine_every:
        yield 'log.gradient_cosine_every: compares gradients of whole weights: use train.parallel = "ddp"'
    yield from _of_the_model(recipe)
    yield from _of_the_optimizer(recipe)


def oddities(recipe: Recipe) -> Iterator[str]:
    """What can be run and is likely not meant, one line each."""
    steps = recipe.train.steps
    for i, p in enumerate(recipe.passes):
        if isinstance(p, OperationalPass) and p.from_step >= steps:
            yield (
                f"passes.{i}.from_step: {p.name} comes into force at step {p.from_step}, and the run ends at "
                f"{steps}: it is trained without"
            )
    if recipe.data.attention == "document" and recipe.data.rows == "padded":
        yield (
            'data.attention = "document" costs time and changes nothing: data.rows = "padded" has one '
            "document a row"
        )
    both = math.lcm(recipe.checkpoint.every, recipe.eval.every)  # 0 where one is only at the end
    if recipe.checkpoint.keep_best and not 0 < both < steps:
        yield (
            f"checkpoint.keep_best = {recipe.checkpoint.keep_best} keeps nothing: before the end no step has "
            f"both an evaluation (eval.every = {recipe.eval.every}) and a checkpoint "
            f"(checkpoint.every = {recipe.checkpoint.every})"
        )
    for every in recipe.optimizer.reset_periods():
        looked_at = min(steps, every * _LOOKED_AT)
        found = resets_without_rewarm(recipe.lr_multiplier, every=every, total_steps=looked_at)
        if found:
            count = f"{len(found) - _SHOWN}" + ("" if looked_at == steps else " or more")
            more = f" and {count} more" if len(found) > _SHOWN else ""
            yield (
                f"moments are reset every {every} updates, but the learning rate does not warm up again at "
                f"step {', '.join(map(str, found[:_SHOWN]))}{more}: there the first update is of full size "
                "in every coordinate"
            )


def _of_the_model(recipe: Recipe) -> Iterator[str]:
    if recipe.model.preset is None:
        return  # what a trained model is, opening it says
    try:
        config = llama_config(recipe.model.preset, **recipe.model.overrides())
    except Act24Error as error:
        yield f"model: {error}"
        return
    trained = recipe.tokenizer.name == "bpe" and recipe.data.source != "shards"
    if trained and recipe.tokenizer.vocab_size > config.vocab_size:
        yield (
            f"tokenizer.vocab_size: {recipe.tokenizer.vocab_size} tokens are more than the vocabulary of the "
            f"model has, model.vocab_size = {config.vocab_size}"
        )


def _of_the_optimizer(recipe: Recipe) -> Iterator[str]:
    optimizer, uses = recipe.optimizer, {p.name for p in recipe.passes}
    refused = [why for name, why in optimizer.refuses.items() if name in uses]
    if refused:
        yield f'optimizer.name: "{optimizer.name}" {refused[0]}'
    elif optimizer.needs and optimizer.needs not in uses:
        yield (
            f'optimizer.name: "{optimizer.name}" {optimizer.why}, and the recipe has no pass '
            f'{optimizer.needs}: use "adamw"'
        )
    if not optimizer.exact_steps():
        return
    for i, p in enumerate(recipe.passes):
        if isinstance(p, LowRank) and p.init.startswith("const_"):
            yield (
                f"passes.{i}.init: {p.init} makes factors of rank one, which have no exact step; set "
                'optimizer.type = "eucl", or another init'
            )
    if any(_overlap(p, q) for p in recipe.passes for q in recipe.passes):
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


def _has(recipe: Recipe, method: type) -> bool:
    return any(isinstance(p, method) for p in recipe.passes)
