"""Where: globs, regular expressions, classes."""

from __future__ import annotations

import pytest
from toys import Relu2MLP, SwiGLU, Trunk, llama

from act24.passes import Activation24, Cola, Relu2FFN, SparseMask, apply_, plan
from act24.passes.graph.selectors import SelectorError, matches, takes


@pytest.mark.parametrize(
    ("selector", "taken"),
    [
        ("*", True),
        ("model.layers.1.mlp", True),
        ("model.layers.*.mlp", True),
        ("model.*.mlp", True),  # `*` crosses dots
        ("*.mlp", True),
        ("model.layers.[01].mlp", True),
        ("model.layers.[!1].mlp", False),
        ("model.layers.?.mlp", True),
        ("model.layers.??.mlp", False),
        ("model.layers.{0..3}.mlp", True),
        ("model.layers.{0,2..3}.mlp", False),
        ("model.layers.{0,1}.{attn,m?p}", True),
        ("model.layers.{0..0,10..11}.mlp", False),
        ("{model,*}.mlp", True),
        ("{model,x}.mlp", False),
        ("model.layers.1.mlp{,s}", True),
        ("model.layers.{1.mlp", False),
        (r"re:model\.layers\.\d{1}\.mlp", True),
        ("mlp", False),  # the whole name, not a part
        ("model.layers.1", False),
        ("Model.layers.1.mlp", False),
        (r"re:model\.layers\.(0|1)\.mlp", True),
        (r"re:.*\.mlp", True),
        (r"re:mlp", False),
        (r"re:model\.layers\.\d", False),
        ("class:LlamaMLP", True),
        ("class:Llama*", False),
        ("class:", False),
    ],
)
def test_one_selector(selector: str, taken: bool) -> None:
    assert matches(selector, "model.layers.1.mlp", "LlamaMLP") == taken


@pytest.mark.parametrize("selector", ["a", "*.mlp", "class:M", "class:Root", "*", r"re:.*\.mlp", "a.mlp.up"])
def test_what_takes_a_module_takes_what_is_below(selector: str) -> None:
    classes = {"": "Root", "a": "Block", "a.mlp": "M", "a.mlp.up": "Linear"}
    assert takes(("no", selector), "a.mlp.up", classes)
    assert not takes((), "a.mlp.up", classes)
    # A beginning of a name is no module, and what is below one says nothing of it.
    assert takes((selector,), "b.mlp2", classes) == (selector in ("*", "class:Root"))
    assert not takes(("a.mlp.up", "*.mlp.*"), "a.mlp", classes)


@pytest.mark.parametrize("given", [("*.mlp",), ("class:LlamaMLP",), ("*.mlp.*",)])
def test_selectors_mean_the_same_for_every_pass(given: tuple[str, ...]) -> None:
    """Also where a pass acts on linears, and on networks that are named by all of these."""
    model, every = llama(2), (Cola, SparseMask, Relu2FFN)
    for kind in every:
        ranks = {"attn_rank": 4, "mlp_rank": 4} if kind is Cola else {}
        for options in ({"targets": given}, {"ignore": given, "optional": True}):
            report = plan(model, [kind(**ranks, **options)], check=False)
            wanted = "targets" in options
            none = kind is Relu2FFN and not wanted  # which takes nothing else
            assert {".mlp" in row.fqn for row in report.rows} == (set() if none else {wanted})
            (reach,) = report.coverage
            assert reach.reached == reach.total
            assert not report.partial
            assert bool(reach.total) == bool(report.rows)


@pytest.mark.parametrize(
    ("selector", "reason"),
    [
        ("re:layers.(0", r"'re:layers\.\(0' is no regular expression"),
        ("re:a{99999999999999999999}", "is no regular expression"),
        ("regex:.*mlp", "no known prefix: did you mean 're:'|no known prefix: choose from"),
        ("clas:LlamaMLP", "no known prefix: did you mean 'class:'"),
        ("class:", "nothing behind 'class:'"),
        ("", "names nothing"),
        (r"re:(?!.*mlp).*", "takes the model itself, and so all"),
    ],
)
@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_selectors_that_cannot_be_read(field: str, selector: str, reason: str) -> None:
    """They are refused where the pass is made, also those that no module would have been compared with."""
    with pytest.raises(SelectorError, match=f"relu2_ffn: {field}: .*({reason})"):
        Relu2FFN(**{field: ("*.mlp", selector)})


def test_a_string_is_no_list_of_selectors() -> None:
    """Each of its letters would be one, and `*` takes everything."""
    with pytest.raises(SelectorError, match=r"\['model\.layers\.0\.\*'\]"):
        Relu2FFN(targets="model.layers.0.*")  # type: ignore[arg-type]
    with pytest.raises(SelectorError, match="list"):
        Relu2FFN(ignore="*")  # type: ignore[arg-type]


def test_passes_use_the_name_and_the_class_before_tracing() -> None:
    def rewritten(**where: tuple[str, ...]) -> list[str]:
        return [row.fqn for row in plan(llama(3), [Relu2FFN(optional=True, **where)]).rows]

    assert rewritten(targets=("class:LlamaMLP",), ignore=("*.1.*",)) == [
        "model.layers.0.mlp",
        "model.layers.2.mlp",
    ]
    assert len(rewritten(targets=("class:LlamaDecoderLayer",))) == 3
    assert rewritten(targets=("class:LlamaAttention",)) == []
    assert rewritten(ignore=("class:LlamaModel",)) == []
    assert rewritten(targets=(r"re:.*\.[12]\.mlp",)) == ["model.layers.1.mlp", "model.layers.2.mlp"]


def test_a_network_of_which_a_part_is_ignored_is_left_and_said_to_be() -> None:
    for kind in (Relu2FFN, Activation24):
        model = llama(2) if kind is Relu2FFN else Trunk(Relu2MLP, layers=2)
        part = "*.0.mlp.up_proj" if kind is Relu2FFN else "*.0.mlp.up"
        report = plan(model, [kind(ignore=(part,))])
        assert [row.fqn.split(".")[-2:] for row in report.rows] == [["1", "mlp"]]
        ((_, place, reason),) = report.misses
        assert place.endswith("0.mlp")
        assert reason.startswith(f"ignore takes {place}.up")
        (reach,) = report.partial
        assert reach.left[0][2] == reason


def test_any_name_of_a_shared_module_will_do() -> None:
    model = Trunk(SwiGLU, layers=3)
    model.blocks[2] = model.blocks[0]
    report = apply_(model, [Relu2FFN(targets=("blocks.2.*",)), Activation24(ignore=("blocks.1.*",))]).report
    assert [(row.pass_name, row.fqn) for row in report.rows] == [
        ("relu2_ffn", "blocks.0.mlp"),
        ("activation24", "blocks.0.mlp"),
    ]
