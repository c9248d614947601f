"""The one language that says where: used by every pass, and by whatever else names modules.

model.layers.*.mlp      glob over the fully qualified name; `*` crosses dots, `?` and `[0-9]` work
re:layers\\.(0|1)\\..*   regular expression over the whole name
class:LlamaMLP          class of the module that stood there before tracing
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from act24.errors import Act24Error


class SelectorError(Act24Error):
    """A selector that cannot be read."""


def matches(selector: str, fqn: str, class_name: str) -> bool:
    """Whether one selector takes the module `fqn` of class `class_name`."""
    if selector.startswith("re:"):
        try:
            return re.fullmatch(selector[3:], fqn) is not None
        except re.error as error:
            raise SelectorError(f"selector '{selector}' is no regular expression: {error}") from None
    if selector.startswith("class:"):
        return selector[6:] == class_name
    return fnmatchcase(fqn, selector)


def selected(targets: Iterable[str], ignore: Iterable[str], fqn: str, class_name: str) -> bool:
    """Whether some target takes the module and nothing in `ignore` does.

    Raises:
        SelectorError: a selector that cannot be read, or one where a list of them is due.
    """
    for given in (targets, ignore):
        if isinstance(given, str):
            raise SelectorError(f"selectors come as a list: write ['{given}'] for '{given}'")
    return any(matches(s, fqn, class_name) for s in targets) and not any(
        matches(s, fqn, class_name) for s in ignore
    )
