"""Which weights `--enable_2to4_sparse True` makes 2:4: a table of the old code, branch by branch, from a
reading of it, beside the weights that the translated recipe's pass reaches in a model of two layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from slow import slow_but

from act24.recipes.from_flags import Translation, recipe_from_flags
from act24.recipes.load import parse_recipe
from act24.tools.run.build import build

COMMAND = "--model_config llama_9m --batch_size 4 --dtype float32 --enable_2to4_sparse True"
TOY = [
    "model.vocab_size=97",
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
]
ATTN, MLP = {"q_proj", "k_proj", "v_proj", "o_proj"}, {"gate_proj", "up_proj", "down_proj"}
FACTORED = {"": set(), "None": set(), "attn": ATTN, "mlp": MLP, "all": ATTN | MLP}


def of_the_old_code(branch: str, scope: str, asked: set[str]) -> set[str]:
    """AdamW replaced the linears that were asked for, unless 2:4 activations made it replace their inputs;
    LORO wrapped those that had become factors; the others had none of it."""
    return {
        "adamw": asked,
        "adamw --activation_2by4 True": set(),
        "adamw --use_hf_model": set(),
        "loro_adamw --loro_type eucl": asked & FACTORED[scope],
        "cola_adamw": set(),
        "lost_adamw": set(),
    }[branch]


CASES = [
    (branch, scope, attn, mlp)
    for branch, scopes in (("adamw", ("", "attn")), ("loro_adamw --loro_type eucl", FACTORED))
    for scope in scopes
    for attn, mlp in itertools.product((False, True), repeat=2)
] + [
    (branch, scope, True, True)
    for branch in ("adamw --activation_2by4 True", "adamw --use_hf_model", "cola_adamw", "lost_adamw")
    for scope in ("", "all")
]


def translated(branch: str, scope: str, attn: bool, mlp: bool) -> Translation:
    words = f"{COMMAND} --optimizer {branch} --attn_2by4 {attn} --mlp_2by4 {mlp}"
    ranks = " --loro_attn_rank 8 --loro_mlp_rank 8"
    return recipe_from_flags((words + ranks + (f" --loro_scope {scope}" if scope else "")).split())


@pytest.mark.parametrize(("branch", "scope", "attn", "mlp"), slow_but(CASES[1::3], CASES))
def test_the_weights_that_are_2_4_are_those_of_the_old_code(
    branch: str, scope: str, attn: bool, mlp: bool
) -> None:
    translation = translated(branch, scope, attn, mlp)
    expected = of_the_old_code(branch, scope, (ATTN if attn else set()) | (MLP if mlp else set()))
    names = [p.name for p in translation.recipe.passes]
    assert ("weight24" in names) == bool(expected)
    if not expected:
        return
    built = build(parse_recipe(translation.text, "toy", TOY), torch.device("cpu"))
    reached = {p.split(".")[4] for p in built.model.state_dict() if p.endswith("24_mask")}
    assert reached == expected
    told = "run_c4.py grouped along the rank" in " ".join(translation.changes)
    assert told == branch.startswith("loro_adamw")


@pytest.mark.parametrize(
    ("branch", "scope", "remark"),
    [
        ("loro_adamw", "", "for factors only"),
        ("loro_adamw", "attn", "for factors only"),
        ("loro_adamw", "mlp", "left out, see above"),
        ("cola_adamw", "all", "adamw and loro_adamw only"),
    ],
)
def test_why_there_are_none(branch: str, scope: str, remark: str) -> None:
    """`--mlp_2by4` alone; with exact steps, which is said, where there was something to leave out."""
    translation = translated(branch, scope, False, True)
    (own,) = [r for r in translation.remarks if r.option.startswith("--enable_2to4_sparse")]
    assert (own.effect, remark in own.text) == ("none", True)
    assert any("is left out" in line for line in translation.changes) == (remark == "left out, see above")
