"""The house rules that a machine can check: what imports what, and what importing does."""

import ast
import graphlib
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import act24

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("act24", "passes", "recipes", "tools")  # each may import itself and what stands before it
DOORS = ("act24/__init__.py", "act24/__main__.py", "act24/run_c4.py")

#: The one module that calls a library by itself: kernels that are not ours.
BINDING = "act24/sparse24/format/cusparselt.py"
TRACER = "passes/graph/tracer.py"
SURROUNDINGS = "passes/graph/surroundings.py"
FORWARDS = "passes/forwards.py"

#: What touches files, the network, processes or the terminal; in the core and the passes these have no place.
WORLD = """
    asyncio concurrent ctypes fcntl fileinput getpass glob http importlib io logging mmap multiprocessing os
    pathlib pickle platform random select selectors shelve shutil signal socket socketserver sqlite3 ssl
    subprocess sys tempfile threading time tomllib urllib uuid webbrowser
""".split()  # noqa: SIM905


def sources(*layers: str) -> list[str]:
    """The modules of some layers, as paths from the root. Nothing is reached twice, through a symlink."""
    paths = (path for layer in layers for path in (ROOT / layer).rglob("*.py"))
    names = sorted(path.relative_to(ROOT).as_posix() for path in paths)
    return [name for name in names if not name.startswith(tuple(f"act24/{layer}/" for layer in LAYERS))]


def imported(source: str) -> Iterator[str]:
    """Every module that a file imports, at its top or later, by full name."""
    for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source}:{node.lineno}: relative import; write `from act24.… import`"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                path = ROOT / submodule.replace(".", "/")
                is_module = path.is_dir() or path.with_suffix(".py").is_file()
                yield submodule if is_module else str(node.module)


def layer_of(module: str) -> int | None:
    """The place of one of our modules in LAYERS; None for anybody else's."""
    head, *rest = module.split(".")
    if head != "act24":
        return None
    return LAYERS.index(rest[0]) if rest and rest[0] in LAYERS else 0


def test_the_layers_have_sources():
    assert all(sources(layer) for layer in LAYERS)
    assert set(DOORS) <= set(sources("act24"))


@pytest.mark.parametrize("layer", LAYERS)
def test_dependencies_run_one_way(layer):
    wrong = [
        f"{source} imports {module}"
        for source in sources(layer)
        if source not in DOORS
        for module in imported(source)
        if module == "act24"  # the door leads to everything
        or module.split(".")[0] in LAYERS[1:]  # a stray top-level package, found from the root only
        or (layer_of(module) or 0) > LAYERS.index(layer)
    ]
    assert not wrong


def test_the_machinery_of_the_passes_knows_no_pass():
    """passes/graph may import the core, itself, and what a pass is."""
    machinery = [source for source in sources("passes") if source.startswith("passes/graph/")]
    assert len(machinery) > 5
    wrong = [
        f"{source} imports {module}"
        for source in machinery
        for module in imported(source)
        if module.startswith("act24.passes")
        and module != "act24.passes.base"
        and not f"{module}.".startswith("act24.passes.graph.")
    ]
    assert not wrong


#: Inside act24/sparse24 each may import itself and what stands before it; the last two not each other.
ROOMS = ("pattern", "format", "kernels", "feed_forward", "weight")


@pytest.mark.parametrize("room", ROOMS)
def test_the_rooms_of_sparse24_import_one_way(room):
    own = sources(f"act24/sparse24/{room}")
    assert own
    allowed = {*ROOMS[: ROOMS.index(room) + 1]} - ({"feed_forward"} if room == "weight" else set())
    wrong = [
        f"{source} imports {module}"
        for source in own
        for module in imported(source)
        if module.startswith("act24.sparse24.") and module.split(".")[2] not in allowed
    ]
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions count too."""
    modules = {source: _module(source) for source in sources(*LAYERS) if source not in DOORS}
    graph = {
        module: {name for name in imported(source) if name in modules.values()} - {module}
        for source, module in modules.items()
    }
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def _module(source: str) -> str:
    """The name under which a file is imported."""
    parts = source.removesuffix(".py").removesuffix("/__init__").split("/")
    return ".".join(parts if parts[0] == "act24" else ("act24", *parts))


def test_no_file_is_long():
    lengths = {
        source: len((ROOT / source).read_text(encoding="utf-8").splitlines())
        for source in sources(*LAYERS, "tests")
    }
    assert not {source: length for source, length in lengths.items() if length > 450}


def test_core_and_passes_import_nothing_of_the_world():
    wrong = []
    for source in sources("act24", "passes"):
        for module in imported(source) if source not in DOORS else ():
            head = module.split(".")[0]
            if (source, head) in ((BINDING, "ctypes"), (TRACER, "sys")):
                continue
            if source == SURROUNDINGS and head in ("sys", "random"):
                continue  # tracing sees what a forward calls, and takes back what it draws
            if source == FORWARDS and head in ("sys", "threading"):
                continue  # which forward runs on whose stack
            known = head in ("act24", "torch", "triton") or head in sys.stdlib_module_names
            process_groups = module.startswith(("torch.distributed", "torch.multiprocessing"))
            if not known or head in WORLD or (process_groups and module != "torch.distributed.tensor"):
                wrong.append(f"{source} imports {module}")
    assert not wrong


def test_core_and_passes_neither_print_nor_open_files():
    wrong = [
        f"{source}:{node.lineno}: {node.func.id}()"
        for source in sources("act24", "passes")
        for node in ast.walk(ast.parse((ROOT / source).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        if node.func.id in ("print", "input", "open", "breakpoint")
    ]
    assert not wrong


def run_python(code: str) -> str:
    """The last line that a fresh interpreter prints; it runs at the root of the checkout."""
    command = [sys.executable, "-c", code]
    # What an import may not set is no longer set by one of this process.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TORCH")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_importing_changes_nothing_and_touches_no_gpu():
    """Import all modules in one process, torch and transformers first, whose own doing is not ours, and watch
    what only a program may set."""
    code = """
import importlib, json, os, pkgutil, sys
import torch
from transformers import LlamaForCausalLM
import act24

done = []
torch.cuda._lazy_init = lambda: done.append("initialises CUDA")

def state():
    return {
        "os.environ": dict(os.environ),
        "working folder": os.getcwd(),
        "sys.path": list(sys.path),
        "torch random state": torch.get_rng_state().tolist(),
        "default dtype": str(torch.get_default_dtype()),
        "gradient mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "matmul precision": torch.get_float32_matmul_precision(),
    }

before = state()
for module in pkgutil.walk_packages(act24.__path__, "act24."):
    importlib.import_module(module.name)
    after = state()
    done += [f"{module.name}: {key}" for key in before if before[key] != after[key]]
    before = after
print(json.dumps(done))
"""
    assert json.loads(run_python(code)) == []


@pytest.mark.parametrize(
    "code",
    [
        "import act24; act24.__version__; dir(act24)",
        "import sys; sys.argv = ['act24', '--help']\n"
        "from act24.tools.commands.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code",
    ],
    ids=["import", "help"],
)
def test_the_door_opens_without_what_is_slow_to_import(code):
    slow = {
        "datasets",
        "numpy",
        "pandas",
        "pyarrow",
        "pydantic",
        "tensorboard",
        "tokenizers",
        "torch",
        "triton",
    }
    assert run_python(f"{code}\nimport sys; print({slow} & set(sys.modules))") == "set()"


def test_the_door_exports_what_it_lists():
    assert set(act24.__all__) == {*act24._EXPORTS, "__version__"}
    for name, module in act24._EXPORTS.items():
        exported = getattr(act24, name)
        assert getattr(exported, "__module__", exported.__name__).startswith(module)
    with pytest.raises(AttributeError, match="no attribute 'apply'"):
        act24.apply  # noqa: B018


@pytest.mark.parametrize("folder", LAYERS[1:])
def test_no_folder_is_a_package_of_its_own(folder):
    code = f"""
try: import {folder}
except ImportError as error: print(error)
"""
    assert f"import act24.{folder}" in run_python(code)


def git(*arguments: str) -> list[str]:
    """The lines that a git command prints."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_symlinks_are_relative_and_committed():
    links = {line.split("\t")[1] for line in git("ls-files", "--stage", "act24") if line.startswith("120000")}
    assert links == {f"act24/{folder}" for folder in LAYERS[1:]}
    assert all((ROOT / link).readlink() == Path("..") / Path(link).name for link in links)


def test_no_file_names_a_path_of_some_machine():
    folders = "|".join(("work", "home", "root", "Users"))
    machine_path = re.compile(rf"(?<![\w.~/$}}-])/({folders})/\w")
    found = []
    for name in git("ls-files", "--cached", "--others", "--exclude-standard"):
        path = ROOT / name
        if path.is_file() and not path.is_symlink():
            lines = path.read_bytes().decode("utf-8", errors="ignore").splitlines()
            found += [f"{name}:{n}: {line}" for n, line in enumerate(lines, 1) if machine_path.search(line)]
    assert not found


def test_every_recipe_is_package_data():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for glob in globs["act24.recipes"] for path in (ROOT / "recipes").glob(glob)}
    assert shipped == set((ROOT / "recipes").rglob("*.toml"))
