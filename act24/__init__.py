"""Train LLaMA-style language models with low-rank weights and 2:4 sparsity through torch.fx graph passes.

This is the door to the whole: the names below are re-exported from where they live, on first use (PEP 562),
so that `import act24`, and with it `act24 --help`, does not wait for torch.

    model = act24.LlamaForCausalLM(act24.llama_config("llama-130m"))
    print(act24.apply_(model, [Relu2FFN(), Activation24()]))  # from act24.passes
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from act24.errors import Act24Error
    from act24.inference.generator import Generator
    from act24.llama import LlamaConfig, LlamaForCausalLM, llama_config
    from act24.passes import Pipeline, apply_, plan, trace
    from act24.recipes.load import load_recipe
    from act24.tools import integrations
    from act24.tools.huggingface.export import save_pretrained
    from act24.tools.pruning.prune import prune_
    from act24.tools.run.build import load

    __version__: str

_LINKS = ("passes", "recipes", "tools")


def _check_links(package: str) -> None:
    """Refuse a checkout whose symbolic links are text files. Python would look on for `act24.passes`, and an
    editable install of another checkout would answer: two versions in one process, without a word."""
    broken = [name for name in _LINKS if not os.path.isdir(os.path.join(package, name))]
    if broken and os.path.isdir(package):  # in a zip file nothing is a folder
        names = " ".join(f"act24/{name}" for name in _LINKS)
        raise ImportError(
            f"{os.path.join(package, broken[0])} is no folder: this checkout of act24 has no symbolic links. "
            f"Run in it: git config core.symlinks true && rm -f {names} && git checkout -- {names}"
        )


_check_links(os.path.dirname(os.path.abspath(__file__)))

# A second list beside the imports above, which only type checkers read; a test keeps the two equal.
_EXPORTS = {
    "Act24Error": "act24.errors",
    "Generator": "act24.inference.generator",
    "LlamaConfig": "act24.llama",
    "LlamaForCausalLM": "act24.llama",
    "Pipeline": "act24.passes",
    "apply_": "act24.passes",
    "integrations": "act24.tools.integrations",
    "llama_config": "act24.llama",
    "load": "act24.tools.run.build",
    "load_recipe": "act24.recipes.load",
    "plan": "act24.passes",
    "prune_": "act24.tools.pruning.prune",
    "save_pretrained": "act24.tools.huggingface.export",
    "trace": "act24.passes",
}

__all__ = [
    "Act24Error",
    "Generator",
    "LlamaConfig",
    "LlamaForCausalLM",
    "Pipeline",
    "__version__",
    "apply_",
    "integrations",
    "llama_config",
    "load",
    "load_recipe",
    "plan",
    "prune_",
    "save_pretrained",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _installed_version()
    elif name in _EXPORTS:
        module = import_module(_EXPORTS[name])
        value = module if _EXPORTS[name].endswith(f".{name}") else getattr(module, name)
    else:
        raise AttributeError(f"module 'act24' has no attribute '{name}'")
    globals()[name] = value  # from now on an ordinary attribute
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _installed_version() -> str:
    from importlib import metadata

    try:
        return metadata.version("act24")
    except metadata.PackageNotFoundError:  # a checkout on sys.path, never installed
        return "0+unknown"
