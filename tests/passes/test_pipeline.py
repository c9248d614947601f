"""The pipeline: order, all or nothing, step ranges, seeds, and what it says where nothing matches."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from toys import Doubled, Relu2MLP, SwiGLU, Trunk, features, fingerprint, llama

from act24.initialise import generator_for
from act24.llama import LlamaForCausalLM, llama_config
from act24.options import OptionError
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Match,
    PassError,
    Pipeline,
    Plan,
    Region,
    Relu2FFN,
    apply_,
    plan,
)
from act24.passes.base import Pass, StructuralPass
from act24.passes.graph.measurements import Measurement
from act24.passes.graph.region import ParameterSpec
from act24.sparse24.feed_forward.operation import activation24


@dataclass(frozen=True, kw_only=True)
class Broken(StructuralPass):
    """Finds its place and then fails to build what it planned."""

    name: ClassVar[str] = "broken"

    def plan(self, region: Region) -> Plan:
        return Plan((Match("", "module", "ruin", None, 0, 0),))

    def _rewrite(self, region: Region, match: Match) -> None:
        spec = ParameterSpec(torch.Size((1,)), torch.float32, torch.device("cpu"))
        region.create({"ruin": spec}, self._fail)

    @staticmethod
    def _fail(old: Mapping[str, Tensor], generator: Any) -> dict[str, Tensor]:
        raise MemoryError("no room")


# What is given


class Neither(Pass):
    """Neither structural nor operational: nobody would ever plan it."""

    name: ClassVar[str] = "neither"


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ([Relu2FFN], r"Relu2FFN is the class of a pass: write Relu2FFN\(\.\.\.\)"),
        (Relu2FFN, r"passes come as a list: .*, not Relu2FFN"),
        (Relu2FFN(), r"passes come as a list: .*, not Relu2FFN\(targets"),
        ("relu2_ffn", r"passes come as a list: .*, not 'relu2_ffn'"),
        (["relu2_ffn"], "'relu2_ffn' is text: write the pass"),
        ([Relu2FFN(), None], "None is no pass"),
        (None, "passes come as a list: .*, not None"),
        ([Neither()], "is no pass: .*StructuralPass or OperationalPass"),
        ([Relu2FFN(), Activation24(), Activation24()], "activation24 is given twice"),
    ],
)
def test_what_is_no_list_of_passes(passes: Any, message: str) -> None:
    model = llama()
    before = fingerprint(model)
    for use in (Pipeline, apply_, plan):
        with pytest.raises(PassError, match=message) as error:
            use(model, passes)
        assert "\n" not in str(error.value)
    assert fingerprint(model) == before


def test_what_is_no_model_no_seed_and_no_step() -> None:
    with pytest.raises(OptionError, match=r"model has to be a Module, got \[Relu2FFN"):
        apply_([Relu2FFN()], llama())  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="seed has to be an integer, got "):
        apply_(llama(), [Relu2FFN()], seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"step has to be 0 or more and .* at most, got -1"):
        apply_(llama(), [Relu2FFN()], step=-1)


# What a pass may ask for


@dataclass(frozen=True, kw_only=True)
class Asking(StructuralPass):
    """Starts a parameter from what only a loop can measure, and notes what it is shown at the end."""

    name: ClassVar[str] = "asking"
    seen: ClassVar[list[bool]] = []

    def plan(self, region: Region) -> Plan:
        return Plan((Match("mlp.up_proj", "nothing", "two", None, 0, 2),) if region.class_name("mlp") else ())

    def _rewrite(self, region: Region, match: Match) -> None:
        spec = ParameterSpec(torch.Size((2,)), torch.float32, torch.device("cpu"))
        wanted = Measurement("largest", "mlp.up_proj.weight", (2,))
        region.create({"mlp.n": spec}, lambda old, _: {"mlp.n": 2 * old["mlp.m"]}, measured={"mlp.m": wanted})

    def finish(self, region: Region) -> None:
        self.seen.append(any(node.target is activation24 for node in region.graph.nodes))


def test_a_pass_gets_what_it_wants_measured_and_finishes_every_lowering() -> None:
    model = llama()
    pipeline = Pipeline(model, [Relu2FFN(), Asking(), Activation24(from_step=5)])
    wanted = pipeline.measurements
    assert {(name, one.what, one.parameter, one.shape) for name, one in wanted.items()} == {
        (f"model.layers.{i}.mlp.m", "largest", f"model.layers.{i}.mlp.up_proj.weight", (2,)) for i in (0, 1)
    }
    with pytest.raises(
        PassError, match=r"2 measurements are missing, largest of model\.layers\.0\.mlp\.up_proj"
    ):
        pipeline.commit_()
    Asking.seen.clear()
    pipeline.commit_({f"model.layers.{i}.mlp.m": torch.tensor([1.0, 3.0]) + i for i in (0, 1)})
    assert model.model.layers[1].mlp.n.tolist() == [4.0, 8.0]
    assert Asking.seen == [False, False]
    pipeline.lower_(5)
    assert Asking.seen == [False, False, True, True]  # behind the passes in force


# Order and collisions


def test_structural_passes_come_first() -> None:
    with pytest.raises(PassError, match="relu2_ffn stands behind activation24"):
        Pipeline(llama(), [Activation24(), Relu2FFN()])


def test_observing_passes_come_last() -> None:
    with pytest.raises(PassError, match="activation24 stands behind activation_statistics"):
        Pipeline(llama(), [Relu2FFN(), ActivationStatistics(), Activation24()])


@dataclass(frozen=True, kw_only=True)
class Elsewhere(StructuralPass):
    """Always finds the first projection of a block."""

    name: ClassVar[str] = "elsewhere"

    def plan(self, region: Region) -> Plan:
        return Plan((Match("self_attn.q_proj", "linear", "linear", None, 0, 0),))

    def _rewrite(self, region: Region, match: Match) -> None:
        pass


def test_two_structural_passes_on_one_place() -> None:
    model = llama()
    before = fingerprint(model)
    both = r"doubled and elsewhere both rewrite model\.layers\.0\.self_attn\.q_proj"
    with pytest.raises(PassError, match=both):
        apply_(model, [Doubled(targets=("*.q_proj",)), Elsewhere()])
    assert fingerprint(model) == before


def test_passes_see_what_earlier_ones_left() -> None:
    model = llama()
    report = apply_(model, [Relu2FFN(), Doubled(targets=("*.up_proj",))]).report
    assert [(row.pass_name, row.fqn) for row in report.rows] == [
        *(("relu2_ffn", f"model.layers.{i}.mlp") for i in (0, 1)),
        *(("doubled", f"model.layers.{i}.mlp.up_proj") for i in (0, 1)),
    ]
    assert model.model.layers[0].mlp.up_proj.halved.shape == (128, 32)


# All or nothing


@pytest.mark.parametrize(
    "late",
    [
        Doubled(targets=("nothing",)),
        Relu2FFN(targets=("model.layers.0.*",)),  # the SwiGLU is gone by then
        Broken(),
    ],
)
def test_nothing_is_half_applied(late: StructuralPass) -> None:
    model = llama()
    before = fingerprint(model)
    with pytest.raises((PassError, MemoryError)):
        apply_(model, [Relu2FFN(), late])
    assert fingerprint(model) == before
    apply_(model, [Relu2FFN()])  # and the model is still good for another try


def test_a_failing_operational_pass_of_a_later_interval_fails_at_once() -> None:
    model = llama()
    before = fingerprint(model)
    with pytest.raises(PassError, match="activation24 matches nothing"):
        apply_(model, [Activation24(from_step=1000)])
    assert fingerprint(model) == before


def test_planning_touches_nothing() -> None:
    model = llama()
    before = fingerprint(model)
    report = plan(model, [Relu2FFN(), Activation24()])
    assert len(report.rows) == 4
    assert fingerprint(model) == before


def test_planning_on_meta_allocates_nothing() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config("llama-1b", intermediate_size=5472))

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            assert not isinstance(result, Tensor) or result.is_meta, func
            return result

    with Watch():
        report = plan(model, [Relu2FFN(), Activation24(from_step=10)])
    assert report.parameters_before == 1_340_704_768
    assert report.parameters_after == report.parameters_before + 24 * 2048 * (2 * 8192 - 3 * 5472)


def test_meta_model_is_rewritten_on_meta() -> None:
    with torch.device("meta"):
        model = Trunk(SwiGLU)
    apply_(model, [Relu2FFN(), Activation24()])
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    assert model(torch.empty(3, 16, device="meta")).shape == (3, 16)


def test_replaced_weights_do_not_live_on() -> None:
    """A plan that is kept for the whole run must not keep the stock model's weights."""
    model = llama()
    stock = model.model.layers[0]
    replaced = [weakref.ref(stock.mlp.gate_proj.weight), weakref.ref(stock.mlp.up_proj.weight)]
    kept = weakref.ref(stock.self_attn.q_proj.weight)
    del stock
    pipeline = apply_(model, [Relu2FFN(), Activation24(from_step=5)])
    gc.collect()
    assert [ref() for ref in replaced] == [None, None]
    assert kept() is model.model.layers[0].self_attn.q_proj.weight
    assert pipeline.lower_(5)


def test_committing_twice() -> None:
    pipeline = apply_(llama(), [Relu2FFN()])
    with pytest.raises(PassError, match="already committed"):
        pipeline.commit_()


def test_rewriting_twice() -> None:
    model = llama()
    apply_(model, [Relu2FFN()])
    with pytest.raises(PassError, match="already rewritten"):
        apply_(model, [Activation24()])


# Step ranges


def targets_of(module: nn.Module) -> set[str]:
    assert isinstance(module, fx.GraphModule)
    return {node.target.__name__ for node in module.graph.nodes if node.op == "call_function"}


def test_step_ranges_swap_operations_over_the_same_parameters() -> None:
    model = Trunk(lambda: Relu2MLP(bias=True))
    dense = Trunk(lambda: Relu2MLP(bias=True))
    dense.load_state_dict(model.state_dict())
    pipeline = apply_(model, [Activation24(from_step=10, until_step=20)])
    parameters = {name: id(p) for name, p in model.named_parameters()}
    x = features(4, 16)
    assert pipeline.boundaries == (10, 20)
    seen = {}
    for step in (0, 9, 10, 19, 20, 100, 15, 3):
        changed = pipeline.lower_(step)
        sparse = 10 <= step < 20
        seen[step] = changed
        assert ("relu2" not in targets_of(model.blocks[0])) == sparse
        assert torch.equal(model(x), dense(x)) != sparse
        assert {name: id(p) for name, p in model.named_parameters()} == parameters
        assert model.state_dict().keys() == dense.state_dict().keys()
    assert seen == {0: False, 9: False, 10: True, 19: False, 20: True, 100: False, 15: True, 3: True}


def test_a_run_may_begin_inside_a_range() -> None:
    model, straight = (Trunk(Relu2MLP) for _ in range(2))
    straight.load_state_dict(model.state_dict())
    apply_(model, [Activation24(from_step=10)], step=12)
    apply_(straight, [Activation24()])
    assert torch.equal(model(features(4, 16)), straight(features(4, 16)))


def test_passes_may_follow_each_other() -> None:
    """Ranges of one pass that do not overlap; where they do, the second finds nothing to rewrite."""
    model = Trunk(Relu2MLP)
    pipeline = apply_(model, [Activation24(until_step=5), Activation24(from_step=7)])
    assert pipeline.boundaries == (5, 7)
    assert [bool(pipeline.lower_(step)) for step in (4, 5, 6, 7)] == [False, True, False, True]
    with pytest.raises(PassError, match="activation24 matches nothing"):
        apply_(Trunk(Relu2MLP), [Activation24(until_step=8), Activation24(from_step=7)])


def test_leaving_a_pass_out() -> None:
    model = Trunk(Relu2MLP)
    x = features(4, 16)
    expected = model(x)
    pipeline = apply_(model, [Activation24()])
    sparse = model(x)
    pipeline.lower_(0, without=["activation24"])
    assert torch.equal(model(x), expected)
    pipeline.lower_(0)
    assert torch.equal(model(x), sparse)


def test_step_ranges_that_make_no_sense() -> None:
    with pytest.raises(OptionError, match=r"activation24: from_step has to be 0 or more and .* most, got -1"):
        Activation24(from_step=-1)
    with pytest.raises(PassError, match=r"until_step \(5\)"):
        Activation24(from_step=5, until_step=5)
    with pytest.raises(TypeError):
        Relu2FFN(from_step=5)  # type: ignore[call-arg]


# Seeds


def parameters_with(passes: list[Any], seed: int = 0) -> dict[str, Tensor]:
    model = llama(3)
    apply_(model, passes, seed=seed)
    return dict(model.named_parameters())


def test_a_pass_on_one_layer_does_not_move_the_start_of_others() -> None:
    all_layers = parameters_with([Relu2FFN()])
    some = parameters_with([Relu2FFN(ignore=("model.layers.1.*",))])
    for name, value in some.items():
        if ".layers.1." not in name:
            assert torch.equal(value, all_layers[name])
    assert "model.layers.1.mlp.gate_proj.weight" in some


def test_starts_follow_seed_and_name() -> None:
    first, again, other = (parameters_with([Relu2FFN()], seed) for seed in (0, 0, 1))
    fresh = [f"model.layers.{i}.mlp.{p}_proj.weight" for i in range(3) for p in ("up", "down")]
    for name in fresh:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])
        expected = torch.empty(first[name].shape).normal_(0, 0.02, generator=generator_for(0, name))
        assert torch.equal(first[name], expected)
    assert not torch.equal(first[fresh[0]], first[fresh[2]])
    kept = set(first) - set(fresh)
    assert all(torch.equal(first[name], other[name]) for name in kept)


def test_the_global_generator_and_default_dtype_play_no_part() -> None:
    first = parameters_with([Relu2FFN()])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    default = torch.get_default_dtype()
    model = llama(3)
    try:
        torch.set_default_dtype(torch.float64)
        apply_(model, [Relu2FFN()])
    finally:
        torch.set_default_dtype(default)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, first[name]) for name, value in model.named_parameters())


# Messages


def test_no_match_names_what_is_there_instead() -> None:
    with pytest.raises(PassError) as error:
        apply_(Trunk(Relu2MLP, layers=3), [Relu2FFN()])
    assert str(error.value) == (
        "relu2_ffn matches nothing. blocks.0 [Block] and 2 more: already relu²: use activation24 alone"
    )


def test_no_match_names_targets_and_what_did_not_trace() -> None:
    class Open(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.Linear(4, 4)

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.mlp(x)

    with pytest.raises(PassError) as error:
        apply_(nn.ModuleList([Open(), Open()]), [Relu2FFN(targets=("*.mlp",))])
    assert str(error.value) == (
        "relu2_ffn matches nothing within targets ['*.mlp']. Not traced: 0 [Open] and 1 more: its forward "
        "takes open arguments: name them, or give its linears a module of their own"
    )


def test_no_match_names_what_the_selectors_leave_out() -> None:
    with pytest.raises(PassError) as error:
        apply_(Trunk(SwiGLU, layers=3), [Relu2FFN(targets=("*.ffn", "*.mlp"), ignore=("re:.*mlp",))])
    assert str(error.value) == (
        "relu2_ffn matches nothing within targets ['*.ffn', '*.mlp'] without ['re:.*mlp'], "
        "which leaves out blocks.0.mlp and 2 more: take it out of ignore"
    )


def test_no_match_where_there_is_no_linear_at_all() -> None:
    with pytest.raises(PassError, match="The model has no linear"):
        apply_(nn.Sequential(nn.LayerNorm(4)), [Relu2FFN()])


def test_optional_passes_may_find_nothing() -> None:
    model = Trunk(Relu2MLP)
    before = fingerprint(model)
    report = apply_(model, [Relu2FFN(optional=True)]).report
    assert report.rows == ()
    assert str(report).startswith("nothing to rewrite")
    assert fingerprint(model) == before
