"""Packages from outside: what they register is there wherever a recipe is read.

A package names a function in its metadata, and the function adds records to the tables:

    [project.entry-points."act24.plugins"]
    mine = "my_package.act24:register"

    def register():
        OPTIMIZERS.add(MyOptimizer)  # act24.optim; SCHEDULES of act24.schedules, REGISTRY of act24.passes
"""

from __future__ import annotations

from functools import cache
from importlib import metadata

from act24.errors import Act24Error

GROUP = "act24.plugins"


class PluginError(Act24Error):
    """A plugin that cannot be loaded."""


@cache
def load_plugins() -> tuple[str, ...]:
    """Let every installed plugin register what it has, the first time that this is called.

    Returns:
        their names, with the package each belongs to.

    Raises:
        PluginError: one of them failed. A recipe may mean what it would have registered, so none is read.
    """
    names = []
    for point in sorted(metadata.entry_points(group=GROUP), key=lambda point: point.name):
        package = f" of {point.dist.name} {point.dist.version}" if point.dist else ""
        try:
            point.load()()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(
                f"plugin '{point.name}'{package} ({point.value}) cannot be loaded: {reason}; mend it, or "
                "uninstall it"
            ) from error
        names.append(f"{point.name}{package}")
    return tuple(names)
