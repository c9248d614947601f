"""The one language that says where: used by every pass, and by whatever else names modules.

model.layers.*.mlp      glob over the fully qualified name; `*` crosses dots, `?` and `[0-9]` work
layers.{0..3}.{q,k}_proj  alternatives, and numbers from one to another, as reports write names
re:layers\\.(0|1)\\..*   regular expression over the whole name
class:LlamaMLP          class of the module that stood there before tracing

A selector that takes a module takes what is below it. A matrix that a module holds besides its `weight` has a
name of its own, as `mlp.w_in`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import translate
from functools import lru_cache

from torch import nn

from act24.errors import nearest
from act24.options import OptionError

_PREFIXES = ("re:", "class:")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d{1,6})\.\.(\d{1,6})")


class SelectorError(OptionError):
    """A selector that cannot be read."""


def check_selectors(selectors: Iterable[str], owner: str = "") -> None:
    """Check that selectors can be read, whatever they would take.

    Args:
        owner: the option that they are, for errors: "cola: targets".

    Raises:
        SelectorError: a string where a list of them is due, a malformed regular expression, an unknown
            prefix, or an empty selector.
    """
    where = f"{owner}: " if owner else ""
    if isinstance(selectors, str):
        raise SelectorError(f"{where}selectors come as a list: write [{selectors!r}] for {selectors!r}")
    for selector in selectors:
        if reason := _unreadable(selector):
            raise SelectorError(f"{where}selector {selector!r} {reason}")


def _unreadable(selector: str) -> str:
    """Why a selector cannot be read, or the empty string."""
    prefix, colon, rest = selector.partition(":")
    if not colon or not prefix.isidentifier():  # a glob, in which a colon is a letter like others
        return "" if selector else "names nothing: write '*' for everything"
    if prefix + colon not in _PREFIXES:
        return f"begins with no known prefix: {nearest(prefix + colon, _PREFIXES)}"
    if not rest:
        return f"has nothing behind '{prefix}:'"
    try:
        everything = prefix == "re" and re.fullmatch(rest, "") is not None and rest != ".*"
    except (re.error, OverflowError, RecursionError) as error:
        return f"is no regular expression: {error}"
    if everything:  # as one that leaves names out by a lookahead
        return "takes the model itself, and so all below it: take '*', and name what is left out in ignore"
    return ""


def matches(selector: str, fqn: str, class_name: str) -> bool:
    """Whether one selector takes the module `fqn` of class `class_name`. It has to be readable
    (`check_selectors`)."""
    if selector.startswith("re:"):
        return re.fullmatch(selector[3:], fqn) is not None
    if selector.startswith("class:"):
        return selector[6:] == class_name
    return _glob(selector).fullmatch(fqn) is not None


@lru_cache(maxsize=4096)
def _glob(selector: str) -> re.Pattern[str]:
    """A glob with alternatives as a regular expression."""
    parts = _BRACES.split(selector)  # text and what stands in braces, in turn
    found = [_regex(text) for text in parts]
    found[1::2] = ("|".join(_regex(one) for one in _alternatives(inside)) for inside in parts[1::2])
    return re.compile("".join(f"(?:{one})" for one in found))


def _regex(glob: str) -> str:
    return translate(glob).removesuffix("\\Z").removesuffix("\\z")


def _alternatives(inside: str) -> Iterator[str]:
    for one in inside.split(","):
        if (numbers := _RANGE.fullmatch(one)) is not None:
            yield from map(str, range(int(numbers[1]), int(numbers[2]) + 1))
        else:
            yield one


def names(selectors: Iterable[str], fqn: str, classes: Mapping[str, str]) -> bool:
    """Whether some selector takes the module or parameter `fqn` itself.

    Args:
        classes: the class name of every module of the model, by full name.
    """
    return any(matches(selector, fqn, classes.get(fqn, "")) for selector in selectors)


def takes(selectors: Iterable[str], fqn: str, classes: Mapping[str, str]) -> bool:
    """Whether some selector takes the module or parameter `fqn` or a module around it. Arguments as for
    `names`."""
    given = tuple(selectors)
    return any(names(given, place, classes) for place in _around(fqn))


def _around(fqn: str) -> Iterator[str]:
    """A name, and those of the modules around it; the model's own is empty."""
    parts = fqn.split(".") if fqn else []
    return (".".join(parts[:end]) for end in range(len(parts), -1, -1))


def idle_targets(
    targets: Iterable[str], counted: Collection[str], model: nn.Module, spelled: bool
) -> tuple[str, ...]:
    """The selectors of a pass that name something, but nothing that it takes or that coverage counts.

    Args:
        counted: the full names of the places that it takes, and of the matrices that it means.
        spelled: also modules with parameters of their own that other selectors spell out, as
            `re:.*(norm|up_proj)` does.
    """
    around = dict(model.named_modules(remove_duplicate=False))
    classes = {name: type(module).__name__ for name, module in around.items()}
    found = dict[str, None]()
    for selector in targets:
        there = [name for name in around if names((selector,), name, classes)]
        if there and not any(takes((selector,), place, classes) for place in counted):
            found[selector] = None
        elif spelled:
            parts = [name for name in there if around[name]._parameters and _spelled(selector, name, classes)]
            found |= dict.fromkeys(n for n in parts if not any(f"{c}.".startswith(f"{n}.") for c in counted))
    return tuple(found)


def _spelled(selector: str, name: str, classes: Mapping[str, str]) -> bool:
    """Whether a selector says in letters what it takes."""
    return any(word and word in selector for word in (name.rpartition(".")[2], classes[name]))
