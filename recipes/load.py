"""From a recipe's name to a checked `Recipe`: find, extend, override, validate.

Order of precedence, lowest first: defaults of the schema, the recipe named by `extends` (one at most, and so
on upwards), the file itself, overrides `key.path=value`. Tables merge key by key; a list, `[[passes]]` too,
replaces the one it overrides, and so does a `[model]` with `pretrained`.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from act24.errors import Act24Error, nearest, reading
from act24.optim import OPTIMIZERS
from act24.options import shown
from act24.passes import REGISTRY
from act24.passes.base import OperationalPass, Pass
from act24.recipes.checks import contradictions
from act24.recipes.keys import meant
from act24.recipes.plugins import load_plugins
from act24.recipes.records import Named, as_table, made, toml_text
from act24.recipes.schema import Recipe
from act24.records import Table
from act24.schedules import RESTART_WARMUP_STEPS, SCHEDULES

T = TypeVar("T", bound=Named)

#: Counts of steps that are a part of the run, and not a property of the method as a mask's 40 updates are.
SCALED = {
    "schedule": ("warmup_steps", "decay_steps", "restart_every", "lr_adjust_steps"),
    "optimizer": (
        "exact_every",
        "refresh_every",
        "restarts",
        "momentum_reset_steps",
        "momentum_reset_warmup",
    ),
    "passes": ("from_step", "until_step"),
}


class RecipeError(Act24Error):
    """A recipe that cannot be found, read or run; one line for each thing that is wrong."""


def recipe_names() -> list[str]:
    """The recipes that ship with act24, by name (`demo`, `c4/130m-dense`)."""
    root = files("act24.recipes")
    return sorted(_toml_names(root, ""))


def read_utf8(path: Path) -> str:
    """The text of a file that a person wrote, without the mark that some editors put in front of it.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError("it is UTF-16 text: save it as UTF-8") from None
        raise


def recipe_source(reference: str) -> tuple[str, str]:
    """The text of a recipe and where it came from.

    Args:
        reference: the path of a file ending in `.toml`, or the name of a shipped recipe.

    Raises:
        RecipeError: there is no such file or recipe.
    """
    if reference.endswith(".toml"):
        try:
            with reading(f"recipe file '{reference}' cannot be read", error=RecipeError):
                return read_utf8(Path(reference)), reference
        except RecipeError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise RecipeError(f"recipe file '{reference}' does not exist") from None
            raise
    if reference not in recipe_names():
        raise RecipeError(
            f"unknown recipe '{reference}': {nearest(reference, recipe_names())} (files end in .toml)"
        )
    return files("act24.recipes").joinpath(f"{reference}.toml").read_text(encoding="utf-8"), reference


def load_recipe(reference: str, overrides: Sequence[str] = (), scale_steps: bool = False) -> Recipe:
    """Find, extend, override and validate a recipe.

    Args:
        reference: as for `recipe_source`.
        overrides: `key.path=value` with a TOML value; a bare word counts as a string. A pass is addressed by
            position or by name: `passes.activation24.from_step=500`.
        scale_steps: where `train.steps` is overridden, what the recipe counts in steps of the whole run
            (`SCALED`) becomes longer or shorter with it. Other overrides stand as they are.

    Raises:
        RecipeError: with every mistake found, each with its path and the nearest valid name.
    """
    text, origin = recipe_source(reference)
    if scale_steps:
        return parse_recipe(text, origin, [*_scaled(parse_recipe(text, origin), overrides), *overrides])
    try:
        return parse_recipe(text, origin, overrides)
    except RecipeError as error:
        if any(override.startswith("train.steps=") for override in overrides):
            with contextlib.suppress(RecipeError):  # then something else is wrong too
                load_recipe(reference, overrides, scale_steps=True)
                error = RecipeError(f"{error}\n--scale-steps scales them with train.steps")
        raise error from None


def _scaled(recipe: Recipe, overrides: Sequence[str]) -> Iterator[str]:
    """What the recipe's own counts of steps become under another `train.steps`, as overrides."""
    steps = [override.partition("=")[2] for override in overrides if override.startswith("train.steps=")]
    if not steps or not re.fullmatch(r"\s*[0-9][0-9_]{0,17}\s*", steps[-1]):
        raise RecipeError("--scale-steps scales by train.steps: it needs --set train.steps=N")
    factor = int(steps[-1]) / recipe.train.steps
    owners: dict[str, object] = {"schedule": recipe.schedule, "optimizer": recipe.optimizer}
    owners |= {f"passes.{index}": p for index, p in enumerate(recipe.passes)}
    for path, owner in owners.items():
        for name in SCALED[path.partition(".")[0]]:
            value = getattr(owner, name, None)
            if value:
                scaled = max(1, round(abs(value) * factor))
                yield f"{path}.{name}={scaled if value > 0 else -scaled}"
                # A climb of few updates stays as it is, but it has to end before the next restart.
                climb = getattr(owner, "restart_warmup_steps", None)
                if name == "restart_every" and scaled < (RESTART_WARMUP_STEPS if climb is None else climb):
                    yield f"{path}.restart_warmup_steps={scaled}"


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from its text, as stored in a run or a checkpoint; see `load_recipe`."""
    with reading(f"{origin}: cannot be read", error=RecipeError):
        table = _extended(text, origin, seen=())
        for override in overrides:
            _override(table, override)
        return _validate(table, origin)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as TOML: every value, defaults included, and nothing to extend."""
    table = recipe.model_dump(exclude={"passes"}, exclude_none=True)
    passes = [as_table(p, "use") for p in recipe.passes]
    return toml_text(table | ({"passes": passes} if passes else {}))


def passes_of_tables(tables: Sequence[Any], origin: str) -> tuple[Pass, ...]:
    """The passes of `[[passes]]` tables that some other file than a recipe holds.

    Args:
        origin: the file and key, for errors.

    Raises:
        RecipeError: with every mistake found.
    """
    load_plugins()
    errors: list[str] = []
    built = [_pass(_tuples(entry), f"{origin}[{index}]", errors) for index, entry in enumerate(tables)]
    if errors:
        raise RecipeError("\n".join(errors))
    return tuple(p for p in built if p is not None)


def _toml_names(folder: Any, prefix: str) -> Iterator[str]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _toml_names(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".toml"):
            yield prefix + entry.name.removesuffix(".toml")


def _extended(text: str, origin: str, seen: tuple[str, ...]) -> dict[str, Any]:
    try:
        table = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{origin}: not valid TOML: {_why_not_toml(error)}") from None
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise RecipeError(f"{origin}: extends names one recipe, a string, not {parent!r}")
    if parent.endswith(".toml"):  # a file extends a file beside it
        parent = os.path.normpath(Path(origin).parent / parent)
    if parent in (*seen, origin):
        raise RecipeError(f"{origin}: extends goes in a circle: {' → '.join((*seen, origin, parent))}")
    parent_text, parent_origin = recipe_source(parent)
    extended = _extended(parent_text, parent_origin, (*seen, origin))
    if isinstance(model := table.get("model"), dict) and "pretrained" in model:
        extended.pop("model", None)  # a trained model has its own sizes
    return _merged(extended, table)


def _why_not_toml(error: Exception) -> str:
    if isinstance(error, tomllib.TOMLDecodeError):
        return str(error)
    # tomllib lets these two through.
    return "tables are too deep" if isinstance(error, RecursionError) else "a number has too many digits"


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _override(table: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"override '{override}' is not of the form key.path=value")
    if keys == ["extends"]:
        raise RecipeError("override 'extends': only a file extends a recipe; name that recipe itself")
    try:
        parsed = tomllib.loads(f"value = {text}")
        value = parsed["value"] if parsed.keys() == {"value"} else text.strip()  # no second line of TOML
    except tomllib.TOMLDecodeError:
        value = text.strip()
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"override '{path}': not a value of TOML: {_why_not_toml(error)}") from None
    node: Any = table
    for key in keys[:-1]:
        node = _listed(node, key, path) if isinstance(node, list) else node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"override '{path}': '{key}' is a value, not a table")
    if isinstance(node, list):
        raise RecipeError(f"override '{path}': name a key of the pass, as in passes.0.optional=true")
    node[keys[-1]] = value


def _listed(passes: list[dict[str, Any]], key: str, path: str) -> dict[str, Any]:
    names = [str(p.get("use", "")) if isinstance(p, dict) else "" for p in passes]
    if key.isdecimal() and int(key) < len(passes):
        return passes[int(key)]
    if names.count(key) == 1:
        return passes[names.index(key)]
    hint = "it is there more than once: use its position" if key in names else nearest(key, names)
    raise RecipeError(f"override '{path}': no single pass '{key}' in this recipe: {hint}")


def _validate(table: dict[str, Any], origin: str) -> Recipe:
    load_plugins()
    table = _tuples(table)
    errors: list[str] = []
    passes = table.pop("passes", ())
    if not isinstance(passes, tuple):
        errors.append('passes: expected [[passes]] tables, each with use = "..."')
        passes = ()
    built = [_pass(entry, f"passes.{i}", errors) for i, entry in enumerate(passes)]
    if "optimizer" in table:
        table["optimizer"] = _named(OPTIMIZERS, table["optimizer"], "optimizer", "adamw", errors)
    if "schedule" in table:
        table["schedule"] = _named(SCHEDULES, table["schedule"], "schedule", "cosine", errors)
    recipe = None
    try:
        recipe = Recipe.model_validate(table)
    except ValidationError as error:
        errors += _explain(error, Recipe)
    if recipe is not None and not errors:
        recipe = recipe.model_copy(update={"passes": tuple(p for p in built if p is not None)})
        errors += contradictions(recipe)
    if errors or recipe is None:
        raise RecipeError("\n".join(f"{origin}: {message}" for message in errors))
    return recipe


def _named(records: Table[type[T]], entry: Any, path: str, usual: str, errors: list[str]) -> T | None:
    """What `[optimizer]` or `[schedule]` says; `usual` where it has no name."""
    values = {"name": usual, **entry} if isinstance(entry, dict) else {}
    if not isinstance(values.get("name"), str):
        errors.append(f'{path}: expected a table, with name = "<{path}>" or without')
        return None
    return made(records, values, path, "name", errors, meant)


def _pass(entry: Any, path: str, errors: list[str]) -> Pass | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("use"), str):
        errors.append(f'{path}: expected a table with use = "<pass>"; {nearest("", REGISTRY)}')
        return None
    cls = REGISTRY.get(entry["use"])
    for key in ("from_step", "until_step"):
        if cls is not None and not issubclass(cls, OperationalPass) and key in entry:
            errors.append(
                f"{path}.{key}: {cls.name} changes parameters: it holds all run long, without step range"
            )
            return None
    return made(REGISTRY, entry, path, "use", errors, meant)


def _tuples(value: Any) -> Any:
    """TOML's lists as tuples: the schema is frozen, and strict about the difference."""
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return tuple(_tuples(entry) for entry in value)
    return value


def _explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line an error: the path, what is wrong, what was expected."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            names = _names_at(model, item["loc"][:-1])
            lines.append(f"{path}: unknown key: {meant(str(item['loc'][-1]), names)}")
        elif item["type"] == "missing":
            lines.append(f"{path}: missing")
        else:
            message = item["msg"].removeprefix("Value error, ")
            got = "" if item["type"] == "value_error" else f", got {shown(item['input'])}"
            lines.append(f"{path}: {message}{got}" if path else f"{message}")
    return lines


def _names_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return [*model.model_fields, *(["extends"] if model is Recipe else [])]
