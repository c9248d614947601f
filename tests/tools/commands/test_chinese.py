"""Every message of `plan`, `doctor`, `recipe from-flags`, `run_c4` has its Chinese; no entry is left over.

Messages are read from the source: all strings of the functions named here, f-strings with {} for each value.
Then commands are driven, and what they print is looked through for English that was left.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len
from typer.testing import CliRunner

from act24.passes import REGISTRY
from act24.recipes.flags import FLAGS
from act24.recipes.keys import recipe_keys
from act24.recipes.load import load_recipe, parse_recipe
from act24.recipes.wanda_flags import translated
from act24.sparse24.feed_forward.methods import METHODS
from act24.tools.commands import doctor
from act24.tools.commands.chinese import Language, chinese, comments, language, messages, speaker
from act24.tools.commands.cli import app
from act24.tools.commands.old_flags import markdown
from act24.tools.run.pretrained import plan
from tests.recipes import test_from_flags as flags
from tests.recipes import test_wanda_flags as wanda

ROOT = Path(__file__).resolve().parents[3]

#: Where messages are made: file, then the functions, methods and tables in it; all of it if none is named.
SOURCES = {
    "recipes/flags.py": (),
    "recipes/flag_remarks.py": (),
    "recipes/flag_values.py": ("parse_flags",),
    "recipes/from_flags.py": ("_comments",),
    "recipes/wanda_flags.py": ("_prune", "_finetune", "_evaluate"),
    "recipes/checks.py": ("oddities",),
    "passes/report.py": ("Report", "row", "coverages", "_untraced", "_parameters", "_where", "untrained"),
    "passes/planning.py": ("__init__",),
    "passes/graph/around_activation.py": (),
    "passes/graph/activation_sites.py": ("obstacle", "OF_ATTENTION", "OF_ROUTER", "OF_BIAS"),
    "passes/graph/coverage.py": (
        "Coverage",
        "_NAMES",
        "STACKED",
        "_stacked",
        "_UNREAD",
        "_COMPUTED",
        "_computed",
        "_NO_ROLE",
        "_BESIDE",
        "_OTHER_ROLES",
        "_beside",
    ),
    "passes/base.py": ("split",),
    "passes/graph/check.py": ("Check",),
    "passes/graph/probe.py": ("obstacle",),
    "passes/graph/linear_sites.py": (
        "RESIZE",
        "CAST",
        "FROZEN",
        "no_linear",
        "tied",
        "plan",
        "_obstacle",
        "_OWN",
        "_REAL",
        "first_values",
        "_noted",
    ),
    "passes/activation24.py": ("_NO_RELU", "spares", "plan", "_note"),
    "passes/activation_statistics.py": ("plan",),
    "passes/cola.py": (),
    "passes/fp8.py": ("_IGNORED", "plan", "missing", "_note"),
    "passes/lora.py": ("plan",),
    "passes/low_rank.py": ("first_values",),
    "passes/recompute.py": ("_OTHERWISE", "plan", "_spared"),
    "passes/relu2_ffn.py": (),
    "passes/sparse_mask.py": ("plan",),
    "passes/weight24.py": ("plan", "_products_text", "_note"),
    "tools/run/pretrained.py": ("remarks",),
    "tools/commands/doctor.py": (),
    "tools/commands/old_flags.py": (),
    "act24/inference/layer.py": ("Choice",),
    "act24/optim/one_pass.py": ("why_not_one_pass", "_found"),
    "act24/sparse24/feed_forward/forms.py": ("why_not", "why_never", "why_never_packed"),
    "act24/sparse24/feed_forward/narrow.py": (),
    "act24/sparse24/feed_forward/masked.py": (),
    "act24/sparse24/feed_forward/packed.py": (),
    "act24/sparse24/feed_forward/packed_fp8.py": (),
    "act24/sparse24/feed_forward/methods.py": ("METHODS", "ESTIMATORS", "BACKWARDS"),
    "act24/sparse24/format/device.py": ("obstacle", "_product_obstacle"),
    "act24/sparse24/kernels/shared/self_check.py": ("kernel_obstacle", "check_operator"),
    "act24/sparse24/weight/forms.py": (),
    "act24/sparse24/weight/methods.py": ("wrong_size",),
}
#: Strings of those functions that are no messages: what a place becomes (formulas, in the columns "before"
#: and "after"), names, and lists of names.
OTHER = {
    "2:4 {}, {} backward",
    "{}, counted",
    "linear {}→{}",
    " · silu",
    "e4m3 in y, {}dW, {}",
    "frozen, with {} adapter of rank {}",
    "a masked",
    "all activations kept",
    "{} and {}",
    "the residual stream",
    "its zeros stay",
    "2:4 {}; 2:4 in {}",
    "2:4 {}; e4m3 in y, dX, dW",
    "2:4 {}; e4m3 in y, dX; 2:4 in {}",
    "{} is a {}",
    "{} is {}",
    "packed e4m3",
    "the recipe of this command",
    "method of activation24",
    "estimator of activation24",
    "backward of activation24",
    "{} of {}",
    "{}, 2:4 weights, {}, {}→{}",
}
#: Three words of prose.
_PROSE = re.compile(r"\b[a-z]{2,} [a-z]{2,} [a-z]{2,}\b")
_PLACES = re.compile(r"\{\w*\}")


def template(node: ast.AST) -> str | None:
    """A string as it stands, an f-string with {} for its values."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values)
    return None


def strings(node: ast.AST) -> Iterator[str]:
    """The strings in a tree, apart from docstrings, imports, annotations and what is raised."""
    text = template(node)
    if text is not None:
        yield text
    for child in ast.iter_child_nodes(node):
        docstring = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
        inside = isinstance(node, ast.JoinedStr) and isinstance(child, ast.Constant)
        if not docstring and not inside and not isinstance(child, ast.Raise | ast.Assert):
            yield from strings(child)


def named(node: ast.stmt) -> str:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node.name
    target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
    return getattr(target, "id", "")


@cache
def collected() -> dict[str, str]:
    """The messages of the sources, each with its file."""
    found = {}
    for file, names in SOURCES.items():
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and named(node) in names]
        assert {*map(named, statements)} == {*names}, file
        for node in statements or [tree]:
            found |= dict.fromkeys(strings(node), file)
    return found


def bare(text: str) -> str:
    """A template without the names of its places, neighbours as one, and what joins it to others."""
    return re.sub(r"(\{\})+", "{}", _PLACES.sub("{}", text)).strip(" :;,.()")


def entries() -> dict[str, str]:
    return {english: there for section in messages().values() for english, there in section.items()}


def test_every_message_has_its_chinese() -> None:
    whole = {
        bare(english) for name, section in messages().items() for english in section if name != "composed"
    }
    pieces = [bare(english) for english in messages()["composed"]]
    prose = {
        text: file for text, file in collected().items() if re.search(r"[A-Za-z]{2,} | [A-Za-z]{2,}", text)
    }
    missing = {
        text: file
        for text, file in prose.items()
        if text not in OTHER and bare(text) not in whole and not any(bare(text) in piece for piece in pieces)
    }
    assert missing == {}
    assert prose.keys() >= OTHER


def test_every_entry_has_its_message() -> None:
    said = {bare(text) for text in collected()}
    for name, section in messages().items():
        if name != "composed":
            assert [english for english in section if bare(english) not in said] == [], name


def test_both_have_the_same_places_and_no_entry_is_made_of_values_alone() -> None:
    for english, there in entries().items():
        assert set(_PLACES.findall(english)) == set(_PLACES.findall(there)), english
        assert _PLACES.sub("", english).strip(), english
        assert english == "pass" or re.search("[\u4e00-\u9fff：；（]", there) or "[English]" in there, english
    assert sum(map(len, messages().values())) == len(entries())  # in one section each


def left_over(text: str) -> list[str]:
    """English that is left of a message in Chinese."""
    return _PROSE.findall(text)


COMMANDS = [
    *(f"{flags.BASE} {needs} {option}" for option, needs, *_ in (*flags.MAPPED, *flags.EXPLAINED)),
    *(
        flags.EXAMPLE.format(optimizer=name, mode=mode)
        for name in ("adamw", "lost_adamw")
        for mode in (1, 2, 3)
    ),
    f"{flags.BASE} {flags.RELU2} {flags.RESTART} --momentum_reset_steps 200 "
    "--activation_dense_warmup_steps 20000",
]


def test_remarks_of_every_command_are_chinese_and_the_recipe_is_the_same() -> None:
    for command in COMMANDS:
        translation = flags.recipe_from_flags(command.split())
        said = comments(translation.text, chinese)
        above, _, below = said.partition("\n\n[model]")
        assert left_over(above) == [], above
        assert below == translation.text.partition("\n\n[model]")[2]
        assert len(said.splitlines()) == len(translation.text.splitlines())
    assert parse_recipe(said, "printed") == translation.recipe


@pytest.mark.parametrize(
    "command",
    [
        wanda.PRUNE,
        wanda.TUNE,
        wanda.EVALUATE,
        f"{wanda.PRUNE} --sparsity_type 2:4 --seed 1 --cache_dir C --eval_zero_shot",
    ],
)
def test_remarks_on_commands_of_wanda_are_chinese(command: str) -> None:
    text = translated(shlex.split(command.replace("\\\n", " ")))
    above, _, below = comments(text, chinese).partition("\n\n")
    assert left_over(above) == []
    assert below == text.partition("\n\n")[2]


@pytest.mark.parametrize("machine", ["cpu", "capable"])
def test_what_doctor_finds_is_chinese(machine: str, request: pytest.FixtureRequest) -> None:
    if machine == "capable":
        request.getfixturevalue("capable_machine")
    for finding in doctor.examine(torch.device("cpu")):
        said = f"{chinese(finding.subject)}  {chinese(finding.finding)}"
        assert left_over(said) == [], said
        assert all(name in said for name in re.findall(r"llama-\w+|\d[\d×→]+|soft_\w+", f"{finding.subject}"))
    for method in METHODS.values():
        assert chinese(method.summary) != method.summary


@pytest.mark.usefixtures("capable_machine")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_doctor_says_of_generation_is_chinese(device: str) -> None:
    for finding in doctor._decoding(torch.device(device)):
        assert re.fullmatch(r"解码，\d+ 行", chinese(finding.subject))
        assert not re.search(r"dense|skipping|weights|measured", chinese(finding.finding))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("demo", ["passes.activation24.backward=split_gemm", "passes.activation24.token_permutation=none"]),
        ("c4/60m-cola-relu2-act24", ["model.num_hidden_layers=1"]),
        ("c4/1b-relu2-weight24", ["model.num_hidden_layers=1"]),
    ],
)
def test_a_plan_is_chinese(recipe: str, overrides: list[str]) -> None:
    report = plan(load_recipe(recipe, overrides)).report
    said = report.lines(chinese, cell_len)
    assert said[1].split() == ["pass", "模块", "改写前", "改写后"]
    for line, there in zip(str(report).splitlines(), said, strict=True):
        assert left_over(there) == [], there
        assert re.findall(r"[\d,]+\d", line) == re.findall(r"[\d,]+\d", there)


def test_a_line_of_several_messages_is_taken_apart() -> None:
    line = (
        "low_rank reaches 60% of the attention and feed-forward matrices; "
        "left: l.{0..1,4}.{a,b}, c 30% (F is 6, not a multiple of 4: leave it out with ignore); "
        "f 10% (not traced: its forward is decorated); l.{0..1}.up.{A,B} (adapter of up); g, h (a router)"
    )
    assert chinese(line) == (
        "low_rank 覆盖注意力和前馈矩阵的 60%；"
        "未覆盖：l.{0..1,4}.{a,b}, c 30%（F 是 6，不是 4 的倍数：用 ignore 排除）；"
        "f 10%（没有追踪：its forward is decorated）；l.{0..1}.up.{A,B}（up 的适配器）；g, h（路由器）"
    )
    resets = (
        "moments are reset every 200 updates, but the learning rate does not warm up again at step 200, 400 "
        "and 7 more: there the first update is of full size in every coordinate"
    )
    assert "200, 400，另外还有 7 个" in chinese(resets)
    assert chinese("warning: nobody knows this one") == "警告：nobody knows this one"
    assert chinese("lr = 1; lr (a; b)") == "lr = 1；lr (a; b)"


@pytest.mark.parametrize(
    ("environment", "chosen", "spoken"),
    [
        ({}, None, "en"),
        ({"LANG": "zh_CN.UTF-8"}, None, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_MESSAGES": "en_US.UTF-8"}, None, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "C", "LC_ALL": "zh_TW"}, None, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": ""}, None, "zh"),
        ({"LANG": "zh_CN.UTF-8", "LC_ALL": "C.UTF-8"}, None, "en"),
        ({"LANG": "zh_CN.UTF-8"}, "en", "en"),
        ({"LANG": "C"}, "zh", "zh"),
    ],
)
def test_the_language_is_the_one_chosen_or_that_of_the_locale(environment, chosen, spoken) -> None:
    assert language(chosen, environment) == spoken


def test_commands_speak_by_option_and_by_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*words: str) -> str:
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    late = ["plan", "demo", "-s", "passes.activation24.from_step=100000", "-s", "model.num_hidden_layers=2"]
    assert "起生效" in told(*late, "--lang", "zh")
    printed = CliRunner().invoke(app, [*late, "--json", "--lang", "zh"]).stdout
    assert json.loads(printed)["coverage"][0]["scope"] == "feed-forward"
    assert "# 不起作用" in told(
        "recipe", "from-flags", "--lang", "zh", "--", *f"{flags.BASE} --tags a".split()
    )
    monkeypatch.setenv("LC_ALL", "zh_CN.UTF-8")
    common, *table = told(*late).splitlines()[:3]
    assert common == "在 model.layers.{0..1} 中："
    head, row = table
    assert cell_len(head[: head.index("改写前")]) == cell_len(row[: row.index("silu")])
    assert "2:4 内核" in told("doctor")


@pytest.mark.parametrize(("page", "lang"), [("old-flags.md", "en"), ("old-flags.zh.md", "zh")])
def test_the_page_of_old_options_is_the_table_of_the_code(page: str, lang: Language) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == markdown(speaker(lang)), (
        f"act24 recipe from-flags --markdown --lang {lang} > docs/{page}"
    )
    rows = [line for line in written.splitlines() if line.startswith("| `--")]
    assert [row.split("`")[1].removeprefix("--") for row in rows][: len(FLAGS)] == [
        flag.name for flag in FLAGS
    ]
    known = {*(key.path for key in recipe_keys()), *(f"passes.{name}" for name in REGISTRY)}
    known |= {"", "optimizer.name", "schedule.name"}
    for flag in FLAGS:
        assert known & {flag.key.replace("{method}", method) for method in ("low_rank", "cola", "lost")}, (
            flag.name
        )
