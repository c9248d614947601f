"""From a recipe to the model that it describes: the stock LLaMA, rewritten by the recipe's passes."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from act24.errors import Act24Error, PassError
from act24.initialise import build_llama
from act24.llama import LlamaConfig, LlamaForCausalLM, llama_config
from act24.passes import Activation24, ActivationStatistics, Fp8, Pass, Pipeline, SparseMask, Weight24
from act24.passes.activation24 import SCALE as ACTIVATION_SCALE
from act24.passes.base import StructuralPass
from act24.passes.document_attention import DocumentAttention
from act24.passes.graph.measurements import Measurement
from act24.passes.graph.region import joined
from act24.passes.served import lower_to_serve_
from act24.passes.state import renew_masks_, renew_to_read_
from act24.passes.weight24 import MASK
from act24.passes.weight24 import SCALE as WEIGHT_SCALE
from act24.recipes.load import parse_recipe
from act24.recipes.schema import Data, Recipe, Tokenizer
from act24.sparse24.format.device import why_no_fp8
from act24.tools.checkpoints import checkpoint
from act24.tools.checkpoints.manifest import MANIFEST, CheckpointError
from act24.tools.checkpoints.reading import contents_of
from act24.tools.checkpoints.together import on_the_first
from act24.tools.data import open_tokenizer
from act24.tools.data import tokenizer as data_tokenizer
from act24.tools.huggingface.folder import PACKED, check_state, is_pretrained, open_pretrained
from act24.tools.huggingface.old_folder import is_old, open_old, told_by
from act24.tools.pruning.packed import read_packed
from act24.tools.run.auto_precision import held_layers, hold_
from act24.tools.run.folder import last_checkpoint
from act24.tools.run.language import GENERATION, config_from_json, unset_model

logger = logging.getLogger("act24")

#: Passes that make products 2:4; evaluation compares the same weights with and without them.
SPARSE_PASSES = ("activation24", "weight24")


@dataclass(frozen=True)
class Built:
    """A model, the pipeline that rewrote it, the updates already made, and how a recipe names the tokenizer
    of its text.

    Recipe and tokenizer are None where a folder holds a model alone. `tokenizer_json` is the content of a
    checkpoint's `tokenizer.json`: its `folder` may be gone.
    """

    recipe: Recipe | None
    model: LlamaForCausalLM
    pipeline: Pipeline
    step: int
    tokenizer_section: Tokenizer | None
    tokenizer_json: str | None = None
    folder: Path | None = None

    @cached_property
    def tokenizer(self) -> data_tokenizer.Tokenizer | None:
        """The tokenizer, which encodes and decodes; None where there is none."""
        return self.open_tokenizer() if self.tokenizer_section else None

    def open_tokenizer(self, data: Data | None = None) -> data_tokenizer.Tokenizer:
        """The tokenizer, for any text or for the given data.

        Raises:
            Act24Error: it cannot be opened, or `data` are token shards that another one wrote.
        """
        assert self.tokenizer_section is not None
        with contents_of(Path(self.tokenizer_section.name)) if self.tokenizer_json else nullcontext():
            return open_tokenizer(data or Data(), self.tokenizer_section, saved=self.tokenizer_json)


def model_config(recipe: Recipe) -> Any:
    """The configuration that a recipe starts from: of the stock model, or one of `transformers`."""
    if recipe.model.preset is None:
        if recipe.model.config is None:
            raise Act24Error("a recipe with model.pretrained has to be resolved: act24.tools.run.pretrained")
        return config_from_json(recipe.model.config, str(recipe.model.pretrained))
    return llama_config(recipe.model.preset, **recipe.model.overrides())


def generation_of(built: Built) -> dict[str, Any] | None:
    """The generation_config.json of the model that a run began with, if it had one."""
    config = built.recipe.model.config if built.recipe else None
    return json.loads(config).get(GENERATION) if config else None


class Weights(Protocol):
    """Weights to start from (`act24.tools.run.pretrained`)."""

    def stock_(self, model: nn.Module) -> bool:
        """Fill the stock model before passes rewrite it; whether nothing is left."""
        ...

    def fill_(self, pipeline: Pipeline) -> None:
        """Fill the rewritten model."""
        ...


def parameter_dtype(recipe: Recipe) -> torch.dtype:
    """What parameters are stored in: float32 under autocast too."""
    return torch.bfloat16 if recipe.train.dtype == "bfloat16" else torch.float32


def passes_of(recipe: Recipe, counting: bool = True) -> tuple[Pass, ...]:
    """The recipe's passes, that of `data.attention`, and the counting of activations if the recipe logs it.

    Args:
        counting: False leaves out the last.

    Raises:
        Act24Error: `data.attention = "document"` for a model whose attention is not seen.
    """
    watch = (ActivationStatistics(optional=True),) if counting and recipe.log.activation_statistics else ()
    structural = [i for i, p in enumerate(recipe.passes) if p.kind == "structural"]
    behind = structural[-1] + 1 if structural else 0
    return (*recipe.passes[:behind], *attention_passes(recipe), *recipe.passes[behind:], *watch)


def attention_passes(recipe: Recipe) -> tuple[DocumentAttention, ...]:
    """The pass of `data.attention`.

    Raises:
        Act24Error: the attention of the recipe's model is not seen.
    """
    if recipe.data.attention != "document":
        return ()
    config = model_config(recipe)
    if not isinstance(config, LlamaConfig):
        raise Act24Error(
            f'data.attention = "document" is for LLaMAs, and {recipe.model.pretrained} is a '
            f'{config.model_type}, whose attention no pass sees: use data.attention = "causal", and '
            'data.rows = "padded" for one document a row'
        )
    return (DocumentAttention(),)


def check_attention(recipe: Recipe, pipeline: Pipeline) -> None:
    """
    Raises:
        Act24Error: attention is to stay within documents, and in some block it would not.
    """
    blocks = model_config(recipe).num_hidden_layers if attention_passes(recipe) else 0
    seen = sum(row.pass_name == DocumentAttention.name for row in pipeline.report.rows)
    if seen < blocks:
        raise Act24Error(
            f'data.attention = "document": the attention of {blocks - seen} of {blocks} blocks could not be '
            'traced, and would cross documents; with data.attention = "causal", `act24 plan` shows which'
        )


def build(
    recipe: Recipe,
    device: torch.device,
    step: int = 0,
    measure: Callable[[Mapping[str, Measurement]], dict[str, Tensor]] | None = None,
    weights: Weights | None = None,
) -> Built:
    """The model at its start, rewritten. All of its regions stand as graph modules, whatever the passes.

    Args:
        measure: measures what `Pipeline.measurements` names; called only if a pass wants anything.
        weights: in the place of initial values.

    Raises:
        PassError: the recipe's passes do not fit the model.
        Act24Error: nor the device. Said here and not in the first 2:4 step, hours later.
    """
    _check_device(recipe, device)
    model = _initial(recipe, device, weights)
    pipeline = _pipeline(recipe, model, step)
    if not step:  # what was begun under other rules goes on, and opens
        _as_strict(recipe, pipeline)
    wanted = pipeline.measurements
    if wanted and recipe.model.preset is None:
        raise PassError(
            f"{next(iter(wanted))} is measured on initial weights, not on those of a pretrained model"
        )
    pipeline.commit_(measure(wanted) if wanted and measure else None)
    if weights is not None:
        weights.fill_(pipeline)
    elif recipe.model.preset is not None and any(
        isinstance(p, SparseMask) and p.masks == "saved" for p in recipe.passes
    ):
        raise PassError("sparse_mask keeps the zeros of a pruned model: name one with model.pretrained")
    # Graphs are cyclic, and may hold the dense weights that passes replaced until Python next collects.
    gc.collect()
    return Built(recipe, model, pipeline, step, recipe.tokenizer)


def _initial(recipe: Recipe, device: torch.device, weights: Weights | None) -> Any:
    """The model before passes."""
    config, dtype = model_config(recipe), parameter_dtype(recipe)
    if isinstance(config, LlamaConfig):
        if weights is None:
            return build_llama(config, recipe.train.seed, device, dtype)
        model = unset_model(config, dtype).to_empty(device=device)
        if not weights.stock_(model):
            model = build_llama(config, recipe.train.seed, device, dtype)
            weights.stock_(model)
        return model
    model = unset_model(config, dtype).to(device).train()
    if weights is not None:
        weights.stock_(model)
    return model


def build_from_old(
    folder: Path,
    recipe: Recipe,
    device: torch.device,
    step: int = 0,
    measure: Callable[[Mapping[str, Measurement]], dict[str, Tensor]] | None = None,
) -> Built:
    """`build`, with the weights of a folder that run_c4.py left.

    Raises:
        Act24Error: as `build`, and where the folder's model is not the recipe's.
    """
    built, old = build(recipe, device, step, measure), open_old(folder)
    then, now = (_kinds(passes) for passes in (old.recipe.passes, recipe.passes))
    if then != now:
        logger.warning(
            "warning: --continue_from %s was trained with %s, and this command has %s: its weights begin as "
            "another function, unless --optimizer, --loro_scope, --cola_silu and --squ_relu are those of it",
            *(folder, then or "no such pass", now or "none"),
        )
    way = "give the command the --model_config, --optimizer, --loro_scope and ranks of that run"
    _load_old_weights_(built, old.state, f"--continue_from {folder}", way)
    return built


def _kinds(passes: Sequence[Pass]) -> str:
    """Structural passes, as far as they say what the same names of weights compute."""
    structural = [p for p in passes if isinstance(p, StructuralPass)]
    kinds = [(p.name, getattr(p, "scope", ""), getattr(p, "bottleneck", "")) for p in structural]
    return ", ".join(" ".join(filter(None, kind)) for kind in sorted(kinds))


def plan_recipe(recipe: Recipe) -> Pipeline:
    """What the recipe's passes would do, with no weights allocated."""
    with torch.device("meta"):
        model = unset_model(model_config(recipe), torch.float32)
    pipeline = Pipeline(model, passes_of(recipe, counting=False))
    check_attention(recipe, pipeline)
    _as_strict(recipe, pipeline)
    return pipeline


def load(path: str | Path, device: torch.device | str = "cpu") -> Built:
    """Open a run's last checkpoint, a checkpoint, a Hugging Face folder (LLaMA, Arcee, act24), one of packed
    weights (`act24 pack`), or one that run_c4.py left: its passes are applied again, then its weights.

    The model is in evaluation mode, and the one that would be served: nothing is drawn at random, and masks
    are those of the weights that were read. `model.train()` and `Pipeline.begin_update_` train it on.

    Raises:
        Act24Error: there is none of these, or it is damaged, or not for this device.
    """
    if Path(path).is_file():
        raise Act24Error(f"{path} is a file; give a run, a checkpoint or a Hugging Face folder")
    if is_old(Path(path)):
        return _load_old(Path(path), torch.device(device))
    if is_pretrained(Path(path)):
        packed = (Path(path) / PACKED).is_file()
        model, pipeline = open_pretrained(path, read_packed(Path(path))[0] if packed else None)
        return Built(None, model.to(device).eval(), pipeline, 0, _beside(Path(path)))
    opened = open_checkpoint(Path(path))
    with contents_of(opened.folder / "recipe.toml"):
        recipe = parse_recipe(opened.recipe_text, origin=str(opened.folder / "recipe.toml"))
    model, pipeline = _without_values(recipe, opened.step, torch.device(device))
    checkpoint.load_weights_(opened, model)
    hold_(pipeline, held_layers(opened.state.get("products")))
    lower_to_serve_(pipeline, opened.step)
    for one in renew_to_read_(pipeline, opened.step):
        logger.warning(
            "warning: %s stands at %s (%d) of activation24 and has no scale for it, which is measured in the "
            "update that follows: until then it is 1. eval measures it on the held-out rows",
            path,
            "from_step" if opened.step <= one.of.from_step else "a boundary",
            opened.step,
        )
    section, text = saved_tokenizer(opened), opened.tokenizer_json
    return Built(recipe, model, pipeline, opened.step, section, text, opened.folder)


def _without_values(recipe: Recipe, step: int, device: torch.device) -> tuple[LlamaForCausalLM, Pipeline]:
    """A recipe's model whose weights are still to be read; what no file holds, statistics, is zero."""
    _check_device(recipe, device)
    # Of the stock model no value is drawn that the checkpoint overwrites.
    model: Any = unset_model(model_config(recipe), parameter_dtype(recipe))
    pipeline = _pipeline(recipe, model, step)
    pipeline.commit_()
    if not isinstance(model, LlamaForCausalLM):
        return model.to(device).eval(), pipeline
    model.to_empty(device=device).eval()
    for name, buffer in model.named_buffers():
        if name not in model.state_dict():
            buffer.zero_()
    return model, pipeline


def _load_old(path: Path, device: torch.device) -> Built:
    old = open_old(path)
    model, pipeline = _without_values(old.recipe, old.step, device)
    built = Built(old.recipe, model, pipeline, old.step, None)
    way = f"are --optimizer, --loro_scope and the ranks in {told_by(path)} those that it was trained with?"
    _load_old_weights_(built, old.state, str(path), way)
    lower_to_serve_(pipeline, old.step)
    return Built(old.recipe, model, pipeline, old.step, _beside(path) or old.recipe.tokenizer)


def _load_old_weights_(built: Built, state: Mapping[str, Tensor], path: str, way: str) -> None:
    """Copy what run_c4.py saved into a model of its recipe. Masks, which it saved nowhere, are those of the
    weights, and scales that it did not save are 1.

    Args:
        way: what to do where the model is another one.

    Raises:
        Act24Error: names or shapes differ.
    """
    expected = built.model.state_dict()
    kinds = (ACTIVATION_SCALE, WEIGHT_SCALE, MASK)
    kept = {
        joined(fqn, name)
        for fqn, module in built.pipeline.regions.items()
        for name, (kind, _) in module.buffer_kinds.items()
        if kind in kinds
    }
    unsaved = [name for name in expected if name not in state and name in kept]
    try:
        check_state({**state, **{name: expected[name] for name in unsaved}}, built.model, path)
    except Act24Error as error:
        raise Act24Error(f"{error}; {way}") from error
    with torch.no_grad():
        for name in unsaved:
            expected[name].fill_(1)
        for name, value in state.items():
            expected[name].copy_(value)
    for p in built.pipeline.active:
        if isinstance(p, Weight24):
            renew_masks_(built.pipeline, p, p.from_step)
    with torch.no_grad():  # what was saved is the function that was trained
        for name in kept - {*unsaved}:
            expected[name].copy_(state[name])


def open_checkpoint(path: Path) -> checkpoint.Checkpoint:
    """The checkpoint at a path, or the last one of the run there, verified.

    A run that goes on may delete, rename or replace a checkpoint while it is read here. Then it is looked for
    again.

    Raises:
        Act24Error: neither is there.
    """
    nor = ", nor a Hugging Face folder with a config.json"
    while True:
        folder, manifest = on_the_first(lambda: _with_manifest(last_checkpoint(path, nor)))
        try:
            return checkpoint.load(folder)
        except CheckpointError:
            _, now = on_the_first(lambda folder=folder: _with_manifest(folder))
            if now == manifest and (now or folder == path):
                raise


def _with_manifest(folder: Path) -> tuple[Path, bytes | None]:
    """The folder, and what tells which checkpoint of that name it is; None where there is none."""
    try:
        text = (folder / MANIFEST).read_bytes() if (folder / MANIFEST).is_file() else None
    except OSError:
        text = None
    return folder, text


def _beside(folder: Path) -> Tokenizer | None:
    """The tokenizer in a Hugging Face folder."""
    file = folder / checkpoint.TOKENIZER
    return Tokenizer(name=str(file)) if file.is_file() else None


def saved_tokenizer(opened: checkpoint.Checkpoint) -> Tokenizer:
    """The tokenizer that a checkpoint brings, as a recipe names one: its text was read with no other."""
    section = parse_recipe(opened.recipe_text, f"{opened.folder}/recipe.toml").tokenizer
    return section.model_copy(update={"name": str(opened.folder / checkpoint.TOKENIZER)})


def tokenizer_of_run(recipe: Recipe, start: checkpoint.Checkpoint | None) -> data_tokenizer.Tokenizer:
    """The tokenizer to train with. A run that goes on reads the text as it did, also where it would train
    another one now.

    Raises:
        Act24Error: it cannot be opened; or a run that goes on names another one, by content.
    """
    if start is None:
        return open_tokenizer(recipe.data, recipe.tokenizer)
    saved = open_tokenizer(recipe.data, saved_tokenizer(start), saved=start.tokenizer_json)
    then = parse_recipe(start.recipe_text, f"{start.folder}/recipe.toml").tokenizer.name
    name = recipe.tokenizer.name
    if name != then and open_tokenizer(recipe.data, recipe.tokenizer).fingerprint != saved.fingerprint:
        raise Act24Error(f"tokenizer.name was {then!r} and is {name!r}, which is another tokenizer")
    return saved


def _check_device(recipe: Recipe, device: torch.device) -> None:
    fp8 = any(
        isinstance(p, Fp8) or (isinstance(p, Activation24) and p.precision in ("fp8", "auto"))
        for p in recipe.passes
    )
    if fp8 and (reason := why_no_fp8(device)):
        raise Act24Error(reason)


def _pipeline(recipe: Recipe, model: LlamaForCausalLM, step: int) -> Pipeline:
    pipeline = Pipeline(model, passes_of(recipe), seed=recipe.train.seed, step=step, keep_all=True)
    check_attention(recipe, pipeline)
    return pipeline


def _as_strict(recipe: Recipe, pipeline: Pipeline) -> None:
    """Check that passes reach what the recipe insists on.

    Raises:
        Act24Error: one reaches less.
    """
    for one in pipeline.report.partial if recipe.strict else ():
        if not one.optional:
            raise Act24Error(
                f"{one}. The recipe is strict: narrow the pass by scope, targets or ignore to what it should "
                "reach, give it optional = true if that little is meant, or set strict = false"
            )
