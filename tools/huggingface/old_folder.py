"""Folders that run_c4.py left (`model_<step>/`, what its --continue_from takes): the model in its recipe.

    config.json            of a LLaMA, and which activation the network has; not which method, nor its rank
    model.safetensors      or pytorch_model.bin
    optimizer.pt           every flag of the run, beside the optimizer's state, which is not read
    training_state.json    updates made
    command.txt            ours, and optional: the command, where optimizer.pt is missing

The weights are those of the function that was trained, which the flags alone tell: CoLA's factors have
LORO's names. Pickles are read with `weights_only`, so nothing in them runs.
"""

from __future__ import annotations

import dataclasses
import logging
import pickle
import shlex
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from act24.errors import Act24Error, reading
from act24.optim import AdamWOptions
from act24.passes import Activation24, Cola, Lost, LowRank, Pass, Relu2FFN, Weight24
from act24.recipes.flags import BY_NAME
from act24.recipes.from_flags import recipe_from_flags
from act24.recipes.load import dump_recipe, parse_recipe, read_utf8
from act24.recipes.schema import Recipe
from act24.sparse24.pattern.soft_threshold import soft_threshold24
from act24.tools.huggingface.config import COLA, CONFIG, read_json
from act24.tools.huggingface.folder import INDEX, PICKLE, PICKLE_INDEX, WEIGHTS, read_state, weight_files

FLAGS, STATE, COMMAND = "optimizer.pt", "training_state.json", "command.txt"

#: In the names of what `SparseOverlayLinear` wrapped.
_OVERLAY = ".loro_linear."

logger = logging.getLogger("act24")

#: Of run_c4.py's own model, which read none from a file.
_ROPE_THETA = 10000.0


@dataclasses.dataclass(frozen=True)
class OldModel:
    """What a folder holds.

    Attributes:
        recipe: that builds the model, with the settings that it was trained with.
        state: all its parameters and the buffers that were kept, under the names of that model.
        step: updates made.
    """

    recipe: Recipe
    state: dict[str, Tensor]
    step: int


def is_old(folder: Path) -> bool:
    """Whether run_c4.py wrote a folder."""
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model_type") == COLA:
        return False
    files = any((folder / name).is_file() for name in (FLAGS, STATE, COMMAND))
    return files or "squ_relu" in read_json(folder / CONFIG)


def check_old(folder: Path) -> None:
    """
    Raises:
        Act24Error: run_c4.py did not write a folder: what it is, and what to do.
    """
    if is_old(folder):
        return
    inside = sorted(path.name for path in folder.iterdir() if is_old(path)) if folder.is_dir() else []
    run = next((path for path in (folder, folder.parent.parent) if (path / "checkpoints").is_dir()), None)
    if not folder.is_dir():
        what = "it is none: name the folder of the weights"
    elif inside:
        what = f"it holds {', '.join(inside[:4])}: name one of them"
    elif run:
        on = shlex.join(
            ["act24", "train", str(run / "recipe.toml"), "--run-dir", str(run), "--resume", "auto"]
        )
        what = f"it is of act24, which goes on with {on}"
    else:
        what = (
            f"it has neither {FLAGS} nor {COMMAND}: write the run_c4.py command that trained it into "
            f"{folder / COMMAND}, or begin with any other model by model.pretrained of a recipe (act24 train)"
        )
    raise Act24Error(
        f"--continue_from {folder} takes a folder that run_c4.py left (model_<step>/), and {what}"
    )


def open_old(folder: Path) -> OldModel:
    """Read a folder.

    Raises:
        Act24Error: no flags are there, a file is damaged, or the model is one that act24 does not compute.
    """
    old = _weights(folder)
    if overlaid := any(_OVERLAY in name for name in old):
        old = _without_overlay(old)
        logger.warning(
            "warning: %s: its factors were made 2:4 along the rank (--enable_2to4_sparse with LORO), which "
            "no pass does. They are read as its products had them, and go on as plain low rank",
            folder,
        )
    recipe = _recipe(folder, old)
    if overlaid:
        plain = tuple(p for p in recipe.passes if not isinstance(p, Weight24))
        recipe = recipe.model_copy(update={"passes": plain})
    step = _updates_made(folder / STATE)
    if any(isinstance(p, Activation24) and p.soft for p in recipe.passes):
        logger.warning(
            "warning: %s keeps no scale of its soft 2:4 activations, since the old code saved none: they are "
            "computed with 1 until training measures one",
            folder,
        )
    return OldModel(recipe, _renamed(old), step)


# ------------------------------------------------------------------------------------------- the recipe


def _updates_made(state: Path) -> int:
    """Those that the file of a folder says; 0 without it, as the old code began anew then."""
    step = read_json(state).get("update_step", 0) if state.is_file() else 0
    if type(step) is not int or step < 0:
        raise Act24Error(
            f"{state}: update_step is {step!r}, expected the number of updates that were made: mend it, or "
            "take the file away to begin at 0"
        )
    return step


def _recipe(folder: Path, old: Mapping[str, Tensor]) -> Recipe:
    command = [*_flags(folder), "--model_config", str(folder / CONFIG)]
    overrides = []
    biased = [name for name in old if name.endswith(".bias") and "_proj" in name]
    overrides += ["model.attention_bias=true"] if any(".self_attn." in name for name in biased) else []
    overrides += ["model.mlp_bias=true"] if any(".mlp." in name for name in biased) else []
    with _told_by(folder):
        recipe = parse_recipe(recipe_from_flags(command).text, "the recipe of this command", overrides)
    recipe = _as_it_was_trained(recipe, old, folder)
    if "--use_hf_model" not in command and recipe.model.rope_theta not in (None, _ROPE_THETA):
        logger.warning(
            "warning: %s: rope_theta %g in its %s is not used: run_c4.py's own model had %g whatever that "
            "says. If the model was transformers', --use_hf_model belongs into %s",
            *(folder, recipe.model.rope_theta, CONFIG, _ROPE_THETA, COMMAND),
        )
        recipe = recipe.model_copy(
            update={"model": recipe.model.model_copy(update={"rope_theta": _ROPE_THETA})}
        )
    return parse_recipe(dump_recipe(recipe), str(folder))


def _as_it_was_trained(recipe: Recipe, old: Mapping[str, Tensor], folder: Path) -> Recipe:
    """The recipe with what the old code did where a translated command does better (docs/findings.md)."""
    passes: list[Pass] = []
    sparse = any(isinstance(p, Activation24) for p in recipe.passes)
    model, optimizer = recipe.model, recipe.optimizer
    for p in recipe.passes:
        if isinstance(p, Relu2FFN):
            width = 3 * read_json(folder / CONFIG)["intermediate_size"] // 2
            model = model.model_copy(update={"intermediate_size": width})
            passes.append(dataclasses.replace(p, width="keep"))
        elif isinstance(p, Lost):
            gammas = {float(value) for name, value in old.items() if name.endswith(".gamma")}
            gamma = gammas.pop() if len(gammas) == 1 else p.gamma
            bottleneck = "none" if p.bottleneck == "silu" else p.bottleneck
            passes.append(dataclasses.replace(p, gamma=gamma, bottleneck=bottleneck))
        elif isinstance(p, Cola) and sparse and p.scope != "attn":
            # Under 2:4 activations the network was computed as plain low rank, without CoLA's activation.
            if p.scope == "all":
                passes.append(dataclasses.replace(p, scope="attn", mlp_rank=None))
            else:
                names = [field.name for field in dataclasses.fields(AdamWOptions)]
                optimizer = AdamWOptions(**{name: getattr(optimizer, name) for name in names})
            passes.append(LowRank(scope="mlp", mlp_rank=p.mlp_rank))
        else:
            passes.append(p)
    return recipe.model_copy(update={"model": model, "optimizer": optimizer, "passes": tuple(passes)})


def told_by(folder: Path) -> Path:
    """The file of a folder that says how it was trained: the command, or else the flags."""
    return folder / (COMMAND if (folder / COMMAND).is_file() else FLAGS)


@contextmanager
def _told_by(folder: Path) -> Iterator[None]:
    """One line for a command, or flags, that cannot be read: the file, what is wrong and what to do."""
    try:
        with reading("it cannot be read"):
            yield
    except Act24Error as error:
        raise Act24Error(
            f"{told_by(folder)}: {error}; the run_c4.py command that trained the folder belongs into "
            f"{folder / COMMAND}, as a line"
        ) from error


def _flags(folder: Path) -> list[str]:
    """The options of the command that trained it, without the model's."""
    if (folder / COMMAND).is_file():
        with _told_by(folder):
            words = shlex.split(read_utf8(folder / COMMAND), comments=True)
        for index in reversed(range(len(words))):
            name, equals, _ = words[index].partition("=")
            if name == "--model_config":
                del words[index : index + (1 if equals else 2)]
        return words
    if not (folder / FLAGS).is_file():
        raise Act24Error(
            f"{folder} has neither {FLAGS} nor {COMMAND}, which say how the old code trained it: weights do "
            f"not tell LORO from CoLA. Write the run_c4.py command, as a line, into {folder / COMMAND}"
        )
    config = _unpickled(folder / FLAGS).get("config")
    if not isinstance(config, Mapping):
        raise Act24Error(
            f"{folder / FLAGS} holds no flags under 'config': write the run_c4.py command, as a line, into "
            f"{folder / COMMAND}"
        )
    values = {"lr": config.get("max_lr"), **config}
    words = []
    for name, flag in BY_NAME.items():
        value = values.get(name)
        if value is None or name == "model_config" or (flag.kind == "flag" and not value):
            continue
        words.append(f"--{name}" if flag.kind == "flag" else f"--{name}={value}")
    return words


# ------------------------------------------------------------------------------------------ the weights


def _weights(folder: Path) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
        return read_state(folder)
    state: dict[str, Tensor] = {}
    for name in weight_files(folder, PICKLE, PICKLE_INDEX):
        state |= _unpickled(folder / name)
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise Act24Error(f"{folder / PICKLE}: {strange[0]} is no tensor")
    return state


def _unpickled(path: Path) -> dict[str, Any]:
    failure = f"cannot read {path} without running code in it"
    with reading(failure, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile):
        content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise Act24Error(f"{path} holds no table of values")
    return content


def _without_overlay(old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors of LORO as its overlay multiplied with them: soft-thresholded along their last axis as the
    product reads them, N `[in, R]` along R and Mᵀ `[R, out]` along `out`, in float16 where they are bfloat16,
    times a scale that was kept."""
    state: dict[str, Tensor] = {}
    for name, value in old.items():
        module, _, leaf = name.rpartition(_OVERLAY)
        if leaf in ("weight_in", "weight_out"):
            factor = value if leaf == "weight_in" else value.T
            thin = factor.half() if factor.dtype == torch.bfloat16 else factor
            sparse = soft_threshold24(thin).to(value.dtype) * old[f"{module}.sparse_scale_{leaf[7:]}"]
            value = sparse if leaf == "weight_in" else sparse.T.contiguous()
        if not name.endswith((".sparse_scale_in", ".sparse_scale_out")):
            state[name.replace(_OVERLAY, ".")] = value
    return state


def _renamed(old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names: `weight_in` was `[in, R]` there and is `[R, in]` here."""
    state = {}
    for name, value in old.items():
        module, _, leaf = name.rpartition(".")
        module = module.removesuffix(".lowrank_module")
        if leaf in ("inv_freq", "previous_mask", "activation_scale", "gamma"):
            continue  # follows from the configuration, or is measured anew
        if leaf == "weight_in":
            value = value.T.contiguous()
        ours = {
            "values": "weight_columns",
            "selected_col_indices": "column_indices",
            "scale": "weight24_scale",
        }.get(leaf, leaf)
        state[f"{module}.{ours}"] = value
    return state
