"""Many places of a model as few names: `layers.{0..11}.self_attn.{q,k,v,o}_proj`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

#: A name by its components, each with all that stand there.
Pattern = tuple[tuple[str, ...], ...]


def patterns(names: Sequence[str]) -> list[Pattern]:
    """The fewest that this way finds: from the last component to the first, those that differ in it alone
    become one. Each stands for every combination of its components, and for nothing else."""
    found: list[Pattern] = [tuple((part,) for part in name.split(".")) for name in dict.fromkeys(names)]
    for back in range(1, 1 + max(map(len, found), default=0)):
        alike: dict[tuple[Pattern, Pattern], list[str]] = {}
        for one in found:
            if len(one) < back:  # shorter than this component is deep: a name of its own
                alike[one, ()] = []
                continue
            at = len(one) - back
            alike.setdefault((one[:at], one[at + 1 :]), []).extend(one[at])
        found = [(*head, tuple(parts), *tail) if parts else head for (head, tail), parts in alike.items()]
    return found


def every(pattern: Pattern) -> Iterator[str]:
    """The names that a pattern stands for."""
    return map(".".join, itertools.product(*pattern))


def shared(found: Sequence[Pattern]) -> int:
    """How many components they all begin with, of which each has more."""
    same = (len({*component}) == 1 for component in zip(*(one[:-1] for one in found), strict=False))
    return sum(1 for _ in itertools.takewhile(bool, same))


def text(pattern: Pattern) -> str:
    """As a shell would write it."""
    return ".".join(map(_component, pattern))


def texts(names: Iterable[str]) -> list[str]:
    """Some names, and no others, in few words; selectors read them (`act24.passes.graph.selectors`)."""
    found = patterns([*names])
    return [one for pattern in found for one in (pattern[0] if len(pattern) == 1 else [text(pattern)])]


def renamed(name: str, sentence: str, other: str) -> str:
    """A sentence with another name in the place of one."""
    pattern = rf"(?<![\w.]){re.escape(name)}(?!\w)"
    return re.sub(pattern, lambda _: other, sentence) if name else sentence


def _component(parts: tuple[str, ...]) -> str:
    if len(parts) == 1:
        return parts[0]
    if all(map(str.isdecimal, parts)):
        return "{" + ",".join(_ranges(sorted(map(int, parts)))) + "}"
    ends = {"_" + part.rpartition("_")[2] for part in parts}
    end = ends.pop() if len(ends) == 1 and all("_" in part for part in parts) else ""
    return "{" + ",".join(part.removesuffix(end) for part in parts) + "}" + end


def _ranges(numbers: Sequence[int]) -> list[str]:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return [f"{part[0]}..{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts]
