"""Every refusal of a pass says what to do. The table of refusals is the source itself: what is raised, what
is missed, and why a module is not traced."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Relu2MLP, SwiGLU, Trunk, features, llama
from transformers import GPT2Config, GPT2Model

from act24.passes import (
    Activation24,
    Cola,
    Fp8,
    Lora,
    LowRank,
    Pass,
    PassError,
    Recompute,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.graph import linear_sites, proxies
from act24.passes.sparse_mask import SparseMask

PASSES = Path(linear_sites.__file__).parents[1]

#: What a user is told to do: an imperative at the beginning of the text or of a part of it.
VERBS = (
    "apply call compile compute decide derive draw export give go hand keep leave loop make measure merge "
    "multiply name please put register rename remove resize run save set switch take train unfreeze untie "
    "use widen wrap write"
)
REMEDY = re.compile(rf"(^|[:;,.(] ?|\bor |\band )({'|'.join(VERBS.split())})\b", re.IGNORECASE)

RAISED = {"PassError", "Act24Error", "OptionError", "Unclean", "refuse"}


def refusals() -> Iterator[tuple[str, str]]:
    """(where, text), what is not written in the text as `…`."""
    for file in sorted((*PASSES.glob("*.py"), *(PASSES / "graph").glob("*.py"))):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            for value in _refused(node):
                for text in _texts(value, tree):
                    yield f"{file.name}:{value.lineno}", text


def _refused(node: ast.AST) -> Iterator[ast.expr]:
    """The expressions whose value is the text of a refusal."""
    if not isinstance(node, ast.Call):
        return
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in RAISED and node.args:
        yield node.args[0]
    if name == "Plan":
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "absent")
        for keyword in node.keywords:
            if keyword.arg == "misses" and isinstance(keyword.value, ast.Tuple):
                yield from (pair.elts[1] for pair in keyword.value.elts if isinstance(pair, ast.Tuple))
    listed = isinstance(node.func, ast.Attribute) and getattr(node.func.value, "id", "") == "misses"
    if name == "append" and listed and isinstance(node.args[0], ast.Tuple):
        yield node.args[0].elts[1]


SHARED = ast.parse(Path(linear_sites.__file__).read_text(encoding="utf-8"))
_HELD = {**vars(linear_sites), **vars(proxies)}
CONSTANTS = {name: value for name, value in _HELD.items() if isinstance(value, str)}


def _texts(value: ast.expr, tree: ast.Module, inside: tuple[str, ...] = ()) -> list[str]:
    """What an expression may be, as far as the file says it. `inside` are names that it is part of: what is
    made of itself (`reason = reason or …`) is told by its other parts."""
    if isinstance(value, ast.Constant):
        return [value.value] if value.value else []
    if isinstance(value, ast.JoinedStr):
        texts = [""]
        for part in value.values:
            inner = part.value if isinstance(part, ast.FormattedValue) else part
            plain = isinstance(inner, ast.Constant | ast.Name | ast.Call | ast.Subscript)
            found = (_texts(inner, tree, inside) if plain else []) or ["…"]
            texts = [text + more for text in texts for more in found]
        return texts
    if isinstance(value, ast.BinOp):
        ends = _texts(value.right, tree, inside) or ["…"]
        return [text + end for text in _texts(value.left, tree, inside) or ["…"] for end in ends]
    if isinstance(value, ast.BoolOp):
        return [text for part in value.values for text in _texts(part, tree, inside)]
    if isinstance(value, ast.IfExp):
        return _texts(value.body, tree, inside) + _texts(value.orelse, tree, inside)
    if isinstance(value, ast.Call):
        name = getattr(value.func, "attr", getattr(value.func, "id", ""))
        if (call := f"{name}()") in inside:
            return []
        nodes = [*ast.walk(tree), *ast.walk(SHARED)]
        if name == "missing":  # each pass says it for itself
            nodes += [node for file in PASSES.glob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
        made = [node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name]
        returned = [node.value for f in made for node in ast.walk(f) if isinstance(node, ast.Return)]
        return [text for r in returned if r is not None for text in _texts(r, tree, (*inside, call))]
    if isinstance(value, ast.Name):
        if value.id in inside:
            return []
        if value.id in CONSTANTS:
            return [CONSTANTS[value.id]]
        set_here = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == value.id for t in node.targets)
        ]
        set_here += [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.NamedExpr) and node.target.id == value.id
        ]
        made_of = [v for v in set_here if not isinstance(v, ast.Name)]
        return [text for v in made_of for text in _texts(v, tree, (*inside, value.id))]
    if isinstance(value, ast.Dict):
        return [text for v in value.values for text in _texts(v, tree, inside)]
    if (
        isinstance(value, ast.Subscript) and getattr(value.value, "id", "").isupper()
    ):  # of a table in the file
        tables = [n for n in ast.walk(tree) if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict)]
        here = [n for n in tables if getattr(n.targets[0], "id", "") == value.value.id]  # type: ignore[attr-defined]
        return [text for n in here for text in _texts(n.value, tree)]
    return []


def test_the_table_holds_what_it_should() -> None:
    texts = [text for _, text in refusals()]
    assert len(texts) > 90
    for known in (
        "its forward is decorated",
        "F is …",
        "both rewrite",
        "gated by",
        "tied to",
        "no bottleneck",
    ):
        assert any(known in text for text in texts), known


def test_each_says_what_to_do() -> None:
    assert [(where, text) for where, text in refusals() if not REMEDY.search(text)] == []


class Unknown(nn.Module):
    """Neither names nor graph say what its linears are for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) + self.a(x)


class Geglu(SwiGLU):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.gate(x)) * self.up(x))


HINTS: dict[str, tuple[Callable[[], nn.Module], list[Pass]]] = {
    **{
        f"unknown {index}": (lambda: nn.Sequential(Unknown(), Unknown()), [p])
        for index, p in enumerate(
            (
                Weight24(),
                Weight24(scope="mlp"),
                LowRank(attn_rank=2, mlp_rank=2),
                Fp8(),
                Lora(targets=("*",)),
                SparseMask(),
            )
        )
    },
    "the model is a linear": (lambda: nn.Linear(16, 32), [Weight24()]),
    "another scope": (lambda: Trunk(SwiGLU), [Weight24(scope="attn")]),
    "another scope for factors": (lambda: Trunk(SwiGLU), [LowRank(scope="attn", attn_rank=2, mlp_rank=2)]),
    "other targets": (lambda: Trunk(SwiGLU), [Weight24(targets=("*.mlp.x",))]),
    "a gate": (lambda: Trunk(SwiGLU), [Activation24()]),
    "a gate of GELU": (lambda: Trunk(Geglu), [Activation24()]),
}


@pytest.mark.parametrize("case", HINTS)
def test_a_hint_can_be_followed(case: str) -> None:
    """What a pass that matches nothing says is done, and then it matches something."""
    make, passes = HINTS[case]
    with pytest.raises(PassError) as error:
        plan(make(), passes)
    assert plan(make(), followed(str(error.value), passes)).rows


def followed(said: str, passes: list[Pass]) -> list[Pass]:
    """Passes with what an error asks for."""
    changes: dict[str, Any] = {}
    if found := re.search(
        r'(?:targets = \["|leaves out )(.*?)(?:"\]| and \d+ more: name it in targets)', said
    ):
        changes["targets"] = (found[1],)
    elif found := re.search(r'set scope = "(\w+)"', said):
        changes["scope"] = found[1]
    elif found := re.search(r'put relu2_ffn in front(?:, with gate = "(\w+)")?', said):
        return [Relu2FFN(gate=found[1] or "silu"), *passes]  # type: ignore[arg-type]
    assert changes, said
    return [replace(p, **changes) for p in passes]


def test_what_to_do_where_another_pass_was_there_or_nothing_is_left_to_ignore() -> None:
    cola, networks = Cola(attn_rank=4, mlp_rank=4), LowRank(scope="mlp", mlp_rank=4)
    (left,) = plan(llama(), [networks, cola], check=False).partial
    assert left.left[0][2] == 'another pass has it: leave it to that one, scope = "attn"'
    attention = Cola(scope="attn", attn_rank=4)
    assert plan(llama(), [networks, attention], check=False).partial == ()
    activations = [Relu2FFN(), Activation24()]
    (left,) = plan(llama(), [*activations, Weight24()], check=False).partial
    assert 'scope = "attn"' in left.left[0][2]
    assert plan(llama(), [*activations, Weight24(scope="attn")], check=False).partial == ()
    for passes, said in (
        (
            [networks, replace(cola, scope="mlp")],
            'other passes have those in scope "mlp": leave the pass out, or',
        ),
        ([replace(cola, mlp_rank=33)], 'take a lower rank, or set scope = "attn"'),
        ([replace(networks, mlp_rank=33)], "take a lower rank, or leave the pass out"),
    ):
        with pytest.raises(PassError, match=said) as error:
            plan(llama(), passes, check=False)
        assert "ignore" not in str(error.value)
    with pytest.raises(PassError, match=r"0 and 2 more: its weight is 15 × 15.* leave the pass out$"):
        plan(nn.Sequential(*(nn.Linear(15, 15) for _ in range(3))), [Weight24(targets=("re:.*",))])


def test_recompute_says_in_one_line_what_to_do() -> None:
    gpt2 = partial(GPT2Config, n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=8)
    low_rank = LowRank(attn_rank=4, mlp_rank=4)
    with pytest.raises(
        PassError, match=r"no bottleneck to keep: put low_rank, cola or lost in front$"
    ) as error:
        plan(GPT2Model(gpt2()), [Recompute()])
    assert len(str(error.value)) < 200
    assert plan(GPT2Model(gpt2()), [low_rank, Recompute()]).rows  # with its dropout


ASKS: dict[str, Callable[[nn.Module], float]] = {
    "isinstance": lambda net: 1 + isinstance(net, Relu2MLP),
    "name": lambda net: len(type(net).__name__),
    "property": lambda net: getattr(net, "gain", 1),
    "method": lambda net: 1 + hasattr(net, "scaled"),
    "count": lambda net: sum(isinstance(child, nn.Linear) for child in net.modules()),
    "training": lambda net: 1 + (net.training and isinstance(net, Relu2MLP)),
}


class Gained(Relu2MLP):
    @property
    def gain(self) -> float:
        return 2.0

    def scaled(self) -> None: ...


@pytest.mark.parametrize("ask", ASKS)
def test_what_a_parent_asks_about_its_child_is_no_other_answer_silently(ask: str) -> None:
    """A graph in the child's place is of another class and has other attributes."""

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(Gained() for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for net in self.nets:
                x = x + ASKS[ask](net) * net(x)
            return x

    model = Asking()
    for passes in ([Activation24()], [LowRank(attn_rank=4, mlp_rank=4)], [Activation24(from_step=1)]):
        with pytest.raises(PassError, match=r"the model asks what stands at nets\.0 \[Gained\] and 1 more"):
            apply_(model, passes, probe=features(2, 16))
        assert type(model.nets[0]) is Gained


def test_what_fails_and_what_is_drawn_is_said_as_it_is() -> None:
    """Not by something outside, and not by a constant tensor."""

    class Cut(Relu2MLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.pad(F.relu(self.up(x)[..., :30]), (0, 2)))

    class Draws(Relu2MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[torch.randperm(2)]

    x, ranks = features(2, 16), {"scope": "mlp", "mlp_rank": 4}
    with pytest.raises(PassError, match=r"^0 fails where the stock one runs: .*multiple of 4.* Leave it out"):
        apply_(nn.Sequential(Cut(), Cut()), [Activation24()], probe=x)
    model = nn.Sequential(Draws(), Draws())
    drawn = torch.get_rng_state()
    with pytest.raises(PassError, match="draws a random number"):
        plan(model, [Relu2FFN()], probe=x)
    assert torch.equal(torch.get_rng_state(), drawn)
    model = nn.Sequential(Relu2MLP(), Relu2MLP())
    with torch.device("meta"), pytest.raises(PassError, match="call apply_ outside of it"):
        apply_(model, [LowRank(**ranks)], probe=x)
    fused = [Cola(bottleneck="relu2", **ranks), Activation24(backward="split_gemm"), Recompute()]
    with pytest.raises(PassError, match='fused its bottlenecks: set backward = "dense" of activation24'):
        plan(nn.Sequential(Gelu(), Gelu()), fused, probe=x)


class Gelu(Relu2MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))
