"""`[model] pretrained`: a run that starts from the weights of another one, of a folder, or of a file.

Weights alone: the optimizer is new, and the first step is step 0. Where both models have the same passes,
their parameters go over as they are; where the new one has another structural pass, the stock weights go
through it; what has no such way starts fresh, and is listed.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from act24.errors import Act24Error, PassError
from act24.passes import Lora, Pass, Pipeline, Weight24
from act24.passes.base import StructuralPass
from act24.passes.graph.region import joined
from act24.passes.recovery import has_masks, kept_masks, pruned_weights, set_masks_
from act24.passes.sparse_mask import MASK_BITS
from act24.recipes.schema import Recipe
from act24.tools.files import weights_hash
from act24.tools.huggingface.any_model import open_folder
from act24.tools.huggingface.config import CONFIG, LLAMA, config_json, read_json
from act24.tools.huggingface.old_folder import check_old, is_old
from act24.tools.huggingface.tokenizer_files import GENERATION as GENERATION_FILE
from act24.tools.pruning.masks import masks_beside
from act24.tools.run.build import Built, build, build_from_old, generation_of, load, plan_recipe
from act24.tools.run.language import GENERATION, check_loss

logger = logging.getLogger("act24")


@dataclass(frozen=True)
class Pretrained:
    """What a run starts from.

    Attributes:
        source: as the recipe has it.
        config: JSON, of the stock model before passes, or of another class; with its generation settings.
        passes: structural ones, that rewrote it.
        pipeline: they, applied; None for another class.
        state: parameters, after `passes`.
        masks: what is pruned, by weight; None: nobody said.
        sha256: of `state`.
    """

    source: str
    config: str
    passes: tuple[Pass, ...]
    pipeline: Pipeline | None
    state: Mapping[str, Tensor]
    masks: Mapping[str, Tensor] | None
    sha256: str


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with the configuration and the hash of the model that it starts from; others as they are.

    Raises:
        Act24Error: the model cannot be opened, or is not the one that the recipe was resolved with.
    """
    if recipe.model.pretrained is None:
        return recipe
    opened = open_source(recipe.model.pretrained)
    if recipe.model.sha256 not in (None, opened.sha256):
        raise Act24Error(
            f"model.pretrained: {opened.source} has other weights than this recipe began with (sha256 "
            f"{opened.sha256[:12]}, was {recipe.model.sha256[:12]}): name those, or "  # type: ignore[index]
            "begin anew in another --run-dir and without model.sha256"
        )
    model = recipe.model.model_copy(update={"config": opened.config, "sha256": opened.sha256})
    return recipe.model_copy(update={"model": model})


def plan(recipe: Recipe, say: Callable[[str], str] = str) -> Pipeline:
    """`plan_recipe`, of a recipe that may start from a model; says what starts fresh, by `say`."""
    recipe = resolved(recipe)
    _refuse_untrained(recipe)
    pipeline = plan_recipe(recipe)
    if recipe.model.pretrained is not None:
        for line in open_source(recipe.model.pretrained).remarks(pipeline):
            logger.warning("%s", say(line))
        # What would start fresh and frozen was refused.
        pipeline.report = replace(pipeline.report, untrained="")
    return pipeline


@functools.lru_cache(maxsize=1)
def open_source(source: str) -> Opened:
    """Open what a recipe starts from; the last one stays open until `close_source`."""
    return Opened(_open(source))


def beginning(recipe: Recipe, old: Path | None) -> Callable[..., Built]:
    """What makes the model of a run that begins: with weights of its own, of the model that the recipe names,
    or of a folder that run_c4.py left.

    Raises:
        Act24Error: run_c4.py did not write that folder, the model that the recipe names cannot be opened, or
            adapters have none.
    """
    if recipe.model.pretrained is not None:
        return functools.partial(build, weights=open_source(recipe.model.pretrained))
    if old is None:
        _refuse_untrained(recipe)
        return build
    check_old(old)
    return functools.partial(build_from_old, old)


def _refuse_untrained(recipe: Recipe) -> None:
    """
    Raises:
        Act24Error: adapters would freeze a model that starts fresh.
    """
    freezing = (p for p in recipe.passes if isinstance(p, StructuralPass) and p.freezes)
    adapters = [p.name for p in freezing if not p.optional]
    if adapters and recipe.model.pretrained is None:
        raise Act24Error(
            f"{', '.join(adapters)} freezes all but its adapters, and this model starts fresh: name a "
            "trained one with model.pretrained in the place of model.preset, or leave the pass out"
        )


def close_source() -> None:
    """Let go of the weights that `open_source` holds."""
    open_source.cache_clear()


def _open(source: str) -> Pretrained:
    path = Path(source).expanduser()
    if path.is_dir() and (is_old(path) or not (path / CONFIG).is_file()):
        built = load(path)
        passes = tuple(p for p in built.pipeline.passes if isinstance(p, StructuralPass))
        config = _with(config_json(built.model.config, LLAMA, torch.float32), generation_of(built))
        state = _parameters(built.model)
        masks = kept_masks(built.pipeline)[0] if has_masks(built.pipeline) else None
        return Pretrained(source, config, passes, built.pipeline, state, masks, weights_hash(state))
    opened = open_folder(source)
    state = _parameters(opened.model)
    beside = masks_beside(opened.folder, opened.state()) if opened.folder else None
    masks = beside.masks if beside else None
    began = opened.folder / GENERATION_FILE if opened.folder else None
    generation = read_json(began) if began and began.is_file() else None
    if opened.config is None:
        check_loss(opened.model, source)
        foreign: Any = opened.model
        content = {**foreign.config.to_dict(), "model_type": foreign.config.model_type}
        config = _with(content, generation)
        return Pretrained(source, config, (), None, state, masks, weights_hash(state))
    config = _with(config_json(opened.config, LLAMA, torch.float32), generation)
    passes = tuple(p for p in opened.passes if isinstance(p, StructuralPass))
    return Pretrained(source, config, passes, opened.pipeline, state, masks, weights_hash(state))


def _with(config: dict[str, Any], generation: dict[str, Any] | None) -> str:
    return json.dumps({**config, **({GENERATION: generation} if generation else {})})


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


class Opened:
    """A pretrained model, and how it gets into another one."""

    def __init__(self, pretrained: Pretrained) -> None:
        self._pretrained = pretrained
        self.source, self.config, self.sha256 = pretrained.source, pretrained.config, pretrained.sha256

    def carried(self, pipeline: Pipeline) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """The state of a rewritten model, and the names that start fresh.

        Raises:
            Act24Error: the source has a pass that the new model has not, and its weights have no stock form.
        """
        own = self._pretrained
        shared = [p.name for p in pipeline.passes if p in own.passes]
        try:
            stock = dict(own.state)
            if own.pipeline is not None:
                stock = own.pipeline.state_to_stock(_with_buffers(own.state, own.pipeline), keep=shared)
            carried, _ = pipeline.state_from_stock(stock, keep=shared)
        except PassError as error:
            raise Act24Error(
                f"model.pretrained: {own.source} cannot become this model: {error}; give the recipe the same "
                f"passes ({', '.join(p.name for p in own.passes)})"
            ) from error
        parameters = dict(pipeline.model.named_parameters())
        if not pipeline.modules:  # planned only
            made = _created(pipeline)
            fresh = tuple(name for name, masked in made if masked is None and name not in carried)
            self._refuse_frozen(pipeline, fresh)
            return carried, fresh
        carried = {name: value for name, value in carried.items() if name in parameters}
        for name, value in carried.items():
            if parameters[name].shape != value.shape:
                raise Act24Error(
                    f"model.pretrained: {own.source}: {name} is {list(value.shape)}, the model's "
                    f"{list(parameters[name].shape)}"
                )
        fresh = tuple(name for name in parameters if name not in carried)
        self._refuse_frozen(pipeline, fresh)
        return carried, fresh

    def _refuse_frozen(self, pipeline: Pipeline, fresh: Sequence[str]) -> None:
        """
        Raises:
            Act24Error: adapters freeze what starts fresh.
        """
        freezing = _freezing(pipeline)
        factors = {name for name, _ in _created(pipeline, freezing)}
        if freezing and (untrained := [name for name in fresh if name not in factors]):
            adapters = ", ".join(freezing)
            raise Act24Error(
                f"model.pretrained: {self.source} has no values for {_first(untrained)}, which would start "
                f"fresh and never train, as {adapters} freezes all but its adapters: train without "
                f"{adapters} first, and name that run"
            )

    def stock_(self, model: nn.Module) -> bool:
        """Copy what has a stock form into a stock model, before passes rewrite it; whether that was all."""
        own = self._pretrained
        try:
            stock = own.state
            if own.pipeline is not None:
                stock = own.pipeline.state_to_stock(_with_buffers(own.state, own.pipeline))
        except PassError:
            stock = own.state
        missing = False
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                value = stock.get(name)
                if value is None or value.shape != parameter.shape:
                    missing = True
                else:
                    parameter.copy_(value)
        return not missing

    @torch.no_grad()
    def fill_(self, pipeline: Pipeline) -> None:
        """Copy all that goes over into a rewritten model, and its masks."""
        carried, _ = self.carried(pipeline)
        parameters = dict(pipeline.model.named_parameters())
        for name, value in carried.items():
            parameters[name].copy_(value)
        if has_masks(pipeline):
            set_masks_(pipeline, self._pretrained.masks)
        for line in self.remarks(pipeline):
            logger.warning("%s", line)

    def remarks(self, pipeline: Pipeline) -> list[str]:
        """What is worth saying, one line each."""
        lines = []
        _, fresh = self.carried(pipeline)
        if fresh:
            lines.append(f"not of {self.source}, these start fresh: {_first(fresh)}")
        if self._pretrained.masks and any(isinstance(p, Weight24) for p in pipeline.passes):
            lines.append(
                f"warning: {self.source} is pruned, and weight24 chooses masks of its own; to keep those "
                "that there are use sparse_mask"
            )
        elif lost := self._lost(pipeline):
            lines.append(f"warning: {self.source} is pruned, and no pass keeps the zeros of {_first(lost)}")
        return lines

    def _lost(self, pipeline: Pipeline) -> list[str]:
        """Pruned weights that are trained without their masks: neither a pass has them nor adapters freeze
        them."""
        if any(isinstance(p, Lora) for p in pipeline.passes):
            return []
        if pipeline.modules:
            kept = {weight.name for weight in pruned_weights(pipeline)}
        else:
            kept = {weight for _, weight in _created(pipeline) if weight is not None}
        masks = self._pretrained.masks or {}
        return [name for name, mask in masks.items() if name not in kept and not bool(mask.all())]


def _freezing(pipeline: Pipeline) -> list[str]:
    """The passes that let nothing train but what they make, where they act."""
    acting = {row.pass_name for row in pipeline.report.rows}
    freezing = (p for p in pipeline.passes if isinstance(p, StructuralPass) and p.freezes)
    return [*dict.fromkeys(p.name for p in freezing if p.name in acting)]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _with_buffers(state: Mapping[str, Tensor], pipeline: Pipeline) -> dict[str, Tensor]:
    """Parameters, and the buffers that structural passes turn into parameters again. Masks of `weight24` are
    none of them: it is dense weights that another run begins with."""
    buffers = dict(pipeline.model.named_buffers(remove_duplicate=False))
    return {**state, **{name: buffers[name] for name, _ in _created(pipeline) if name in buffers}}


def _created(pipeline: Pipeline, passes: Sequence[str] | None = None) -> Iterator[tuple[str, str | None]]:
    """What structural passes, all or those of these names, create, planned or done: each name, and of a
    mask the weight that it is of, which the same match has; None of a parameter."""
    for change in pipeline.changes:
        if passes is not None and change.pass_name not in passes:
            continue
        created = change.state.creates
        # A mask is created with its weight. A region has its buffers only when it is rewritten.
        weights = {name + MASK_BITS: name for name in created if name + MASK_BITS in created}
        for fqn, name in itertools.product(change.region.fqns, created):
            yield joined(fqn, name), joined(fqn, weights[name]) if name in weights else None
