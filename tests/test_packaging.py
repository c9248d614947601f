"""What a user gets: the sdist, the wheel built from it, and that wheel installed, used from another folder.

The four folders at the top level become one package through symlinks. What can go wrong with that (a module
or recipe left out, a stray top-level package, a name found only in a checkout) shows here and only here: the
other tests run in a checkout.
"""

import email
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
from slow import slow_after

PACKAGES = ("act24", "act24/passes", "act24/recipes", "act24/tools")  # all but the first are symlinks


def run(*command: object, cwd: Path) -> str:
    """The output of a command that must succeed."""
    result = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def root(pytestconfig) -> Path:
    return pytestconfig.rootpath


@pytest.fixture(scope="session")
def distributions(root, tmp_path_factory) -> Path:
    """A folder with the sdist of this checkout and the wheel built from the sdist."""
    checkout = tmp_path_factory.mktemp("checkout") / "act24"  # the build writes into its source folder
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests")
    shutil.copytree(root, checkout, symlinks=True, ignore=ignored)
    out = tmp_path_factory.mktemp("distributions")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout)
    return out


@pytest.fixture(scope="session")
def wheel(distributions) -> zipfile.ZipFile:
    (path,) = distributions.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="session")
def python(distributions, tmp_path_factory) -> Path:
    """The interpreter of a new environment that holds the wheel, and sees the dependencies of this one."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin" / "python"
    (path,) = distributions.glob("*.whl")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", path, cwd=environment)
    # The dependencies come after the environment's own packages, and without what the .pth files beside them
    # would add, such as an editable act24: those are read in site's own folders only.
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """A folder with nothing of act24 in it or above it."""
    return tmp_path


def shipped(root: Path, *patterns: str) -> set[str]:
    """The files of the checkout that match, by their paths in the package."""
    found = (path for package in PACKAGES for pattern in patterns for path in (root / package).rglob(pattern))
    return {path.relative_to(root).as_posix() for path in found}


@pytest.fixture
def linkless(root, tmp_path) -> Path:
    """A clone as git makes it where it may not write symbolic links: with text files in their place."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    folder = tmp_path / "clone"
    run(
        "git", "clone", "-q", "-c", "core.symlinks=false", "--depth=1", f"file://{root}", folder, cwd=tmp_path
    )
    assert not any((folder / link).is_symlink() for link in PACKAGES[1:])
    # The door of this working tree, which may not be committed yet.
    shutil.copy(root / "act24/__init__.py", folder / "act24/__init__.py")
    return folder


@pytest.mark.parametrize("module", slow_after(1, ["act24", "act24.passes", "act24.tools.run.build"]))
def test_a_clone_without_links_says_so_and_finds_no_other_act24(root, linkless, module):
    """Another act24 is installed the editable way: its finder answers for every folder of the name."""
    code = f"""
import importlib.util, sys
class Editable:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.startswith("act24."):
            place = {str(root)!r} + "/" + name.replace(".", "/")
            return importlib.util.spec_from_file_location(name, place + "/__init__.py")
sys.meta_path.append(Editable)
try:
    import {module}
except ImportError as error:
    print(error)
else:
    print("imported", sys.modules[{module!r}].__file__)
"""
    (line,) = run(sys.executable, "-c", code, cwd=linkless).splitlines()
    assert line.startswith(f"{linkless}/act24/passes is no folder")
    advice = line.partition("Run in it: ")[2]
    run("sh", "-c", advice, cwd=linkless)  # and what it says to do helps
    assert all((linkless / link).is_symlink() for link in PACKAGES[1:])
    assert run(sys.executable, "-c", code, cwd=linkless).startswith(f"imported {linkless}/")


def test_wheel_holds_each_module_and_recipe_and_nothing_else(root, wheel):
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == shipped(root, "*.py", "*.toml") | {"act24/py.typed"}


def test_wheel_has_one_import_root_and_the_version(root, wheel):
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert wheel.read(f"{info}/top_level.txt").decode().split() == ["act24"]
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert metadata["Version"] == project["version"]
    assert set(metadata.get_all("Provides-Extra", [])) == {"gguf", "hf", "test", "wandb"}
    assert metadata["License-Expression"] == "Apache-2.0"


def test_sdist_holds_files_in_place_of_symlinks(root, distributions):
    (path,) = distributions.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    files = shipped(root, "*.py", "*.toml")
    assert files <= set(members)
    assert all(members[file].isfile() for file in files)
    assert "LICENSE" in members


@pytest.mark.slow
def test_every_module_imports(python, root, elsewhere):
    code = """
import importlib, pkgutil, act24
print(act24.__file__, act24.__version__)
for module in pkgutil.walk_packages(act24.__path__, "act24."):
    importlib.import_module(module.name)
    print(module.name)
"""
    first, *modules = run(python, "-c", code, cwd=elsewhere).splitlines()
    file, version = first.split()
    assert Path(file).is_relative_to(python.parents[1])
    assert version == tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    names = {file.removesuffix(".py").removesuffix("/__init__") for file in shipped(root, "*.py")}
    assert {"act24", *modules} == {name.replace("/", ".") for name in names}


def test_every_recipe_is_read_through_importlib_resources(python, root, elsewhere):
    code = """
from importlib.resources import files
from act24.recipes.load import load_recipe, recipe_names
for name in recipe_names():
    load_recipe(name)
    print("act24/recipes/" + name + ".toml")
"""
    assert set(run(python, "-c", code, cwd=elsewhere).splitlines()) == {
        file for file in shipped(root, "*.toml") if file.startswith("act24/recipes/")
    }


@pytest.mark.parametrize("command", ["act24", "python -m act24"])
def test_help(python, elsewhere, command):
    program, *arguments = command.split()
    text = run(python.with_name(program), *arguments, "--help", cwd=elsewhere)
    assert all(subcommand in text for subcommand in ("train", "eval", "plan", "recipe", "data"))


@pytest.mark.slow
def test_torchrun_trains_the_demo_on_two_processes(python, elsewhere):
    # torchrun is a script of the environment that holds torch; as a module it runs under this interpreter.
    torchrun = (python, "-m", "torch.distributed.run", "--nproc-per-node", 2)
    run(*torchrun, "-m", "act24", "train", "demo", "--dry-run", cwd=elsewhere)
    assert not any(elsewhere.iterdir())  # a dry run writes nothing


def test_what_a_test_is_skipped_without_is_installed_by_some_make_target(root):
    """Tests of lm-eval were skipped everywhere, and had long failed."""
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {re.split(r"[^\w-]", package)[0] for packages in extras.values() for package in packages}
    (others,) = re.findall(r"^OTHERS := (.*)$", (root / "Makefile").read_text(), re.M)
    tests = [path.read_text(encoding="utf-8") for path in (root / "tests").rglob("test_*.py")]
    wanted = {name for text in tests for name in re.findall(r'importorskip\(\s*"(\w+)"', text)}
    assert {"transformers", "lm_eval", "accelerate"} <= wanted
    assert wanted <= installed | {*others.split()}
