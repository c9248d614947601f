"""Public functions that take tensors say of what shape."""

import ast
import re

import pytest

from tests.test_architecture import ROOT, sources

#: How a docstring gives a shape: `[T, D]`, or in a word.
_SHAPE = re.compile(r"\[[^\]]*\]|\b[Ss]hapes?\b|\bscalar\b|\belementwise\b")


@pytest.mark.parametrize("source", [name for name in sources("act24") if "/optim/" not in name])
def test_functions_of_tensors_give_shapes(source):
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    silent = [
        f"{source}:{function.lineno} {function.name}"
        for function in tree.body
        if isinstance(function, ast.FunctionDef)
        and not function.name.startswith("_")
        and _takes_tensors(function)
        if not _SHAPE.search(ast.get_docstring(function) or "")
    ]
    assert not silent


def _takes_tensors(function: ast.FunctionDef) -> bool:
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return any(
        re.fullmatch(r"(list\[|tuple\[|\*)?(torch\.)?Tensor\b.*", ast.unparse(a.annotation))
        for a in arguments
        if a.annotation
    )
