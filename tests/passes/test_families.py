"""Families of transformers × passes: each works, or refuses and says why. `docs/models.md` is the table.

On a difference that is meant: ACT24_GOLDEN=write pytest -m slow tests/passes/test_families.py, and read the
diff.
"""

from __future__ import annotations

import copy
import os
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from families import FAMILIES, MASKED, SEQ2SEQ, WORDS, build, inputs
from torch import Tensor, nn

from act24.passes import (
    Activation24,
    Cola,
    LowRank,
    PartialWarning,
    Pass,
    PassError,
    Pipeline,
    Recompute,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
)
from act24.passes.graph.coverage import HIDES
from act24.passes.weight24 import MASK
from act24.relu2 import relu2

transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

TABLE = Path(__file__).parents[2] / "docs" / "models.md"
RANKS = {"attn_rank": 4, "mlp_rank": 4}
LATER = 3
COLUMNS: dict[str, Callable[[], list[Pass]]] = {
    "relu2_ffn + activation24": lambda: [Relu2FFN(gate="any"), Activation24(from_step=LATER)],
    "low_rank": lambda: [LowRank(**RANKS)],
    "cola": lambda: [Cola(**RANKS, bottleneck="relu2")],
    "activation24": lambda: [Activation24(from_step=LATER)],
    "weight24": lambda: [Weight24(from_step=LATER)],
    "cola + recompute": lambda: [Cola(**RANKS), Recompute()],
}


def outputs(model: Any, given: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**given).logits


def cell(family: str, make: Callable[[], list[Pass]]) -> str:
    """What the table says of one family and one list of passes; assertions are what "works" means."""
    model = build(family)
    given = inputs(family, model)
    expected = outputs(model, given)
    before = {name: id(p) for name, p in model.named_parameters()}
    state = copy.deepcopy(model.state_dict())
    try:
        report = plan(model, make(), probe=given)
    except PassError as error:
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert torch.equal(outputs(model, given), expected)
        return f"– {_shortened(str(error))}"
    # The plan touches nothing, and what it says is what is done.
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PartialWarning)
        pipeline = apply_(model, make(), probe=given)
    assert pipeline.report.rows == report.rows
    assert "as a whole was not checked" not in pipeline.report.checked
    assert sum(p.numel() for p in model.parameters()) == report.parameters_after
    _same_before(pipeline, given, expected)
    pipeline.lower_(LATER)
    _as_by_hand(family, pipeline, given)
    _gradients(family, pipeline, given)
    _copies(family, pipeline, make, given)
    _half(family, make)
    _generates(family, model)
    shares = [c.reached / c.total for c in pipeline.report.coverage if c.total]
    return f"{min(shares):.0%}"


#: Reasons that are true of most models, and say least.
_COMMON = re.compile(r"a single linear|not targeted|its forward is decorated|argument '\w+' of its forward")


def _shortened(text: str) -> str:
    """The most telling of the reasons in an error."""
    text = re.sub(r"^\w+ matches nothing\. (Not traced: )?", "", text)
    parts = re.split(r"; |\. Not traced: ", text)
    reasons = [re.sub(r"^\S+( \[\w+\])?( and \d+ more)?: ", "", part).partition(": ")[0] for part in parts]
    telling = [reason for reason in reasons if not _COMMON.match(reason)]
    others = [reason for reason in reasons if reason != "a single linear"]
    hidden = [reason for reason in reasons if reason.startswith(HIDES)]
    return (hidden or telling or others or reasons)[0]


def _same_before(pipeline: Pipeline, given: dict[str, Tensor], expected: Tensor) -> None:
    if all(p.kind == "operational" for p in pipeline.passes):
        assert torch.equal(outputs(pipeline.model, given), expected)


def _as_by_hand(family: str, pipeline: Pipeline, given: dict[str, Tensor]) -> None:
    """The stock model with what the passes compute written into it."""
    stock, model, first = build(family), pipeline.model, pipeline.passes[0]
    if isinstance(first, LowRank):
        stock.load_state_dict(pipeline.state_to_stock(model.state_dict()))
    elif isinstance(first, Weight24):
        buffers = dict(model.named_buffers())
        with torch.no_grad():
            for name, parameter in stock.named_parameters():
                if name + MASK in buffers:
                    parameter.mul_(buffers[name + MASK])
    elif isinstance(first, Cola):
        activation = relu2 if first.bottleneck == "relu2" else F.silu
        for place in pipeline.places("cola"):
            factors = [model.get_parameter(f"{place}.weight_{part}") for part in ("in", "out")]
            linear = stock.get_submodule(place)
            linear.forward = partial(_bottleneck, *factors, linear.bias, activation)
    elif isinstance(first, Relu2FFN):
        for change in pipeline.changes:
            assert len(change.state.creates) == 2  # no biases in these families
            names = [change.region.name(name) for name in change.state.creates]
            up, down = sorted((model.get_parameter(n) for n in names), key=lambda p: p.shape[0], reverse=True)
            network = stock.get_submodule(change.region.name(change.path))
            network.forward = partial(_bottleneck, up, down, None, lambda h: _two_of_four(relu2(h)))
    else:
        for row in pipeline.report.rows:
            network = stock.get_submodule(row.fqn)
            name = next(name for name in ("act_fn", "act") if hasattr(network, name))
            setattr(network, name, _TwoOfFour(getattr(network, name)))
    torch.testing.assert_close(outputs(model, given), outputs(stock, given), rtol=1e-3, atol=1e-4)


def _bottleneck(first: Tensor, second: Tensor, bias: Tensor | None, activation: Any, x: Tensor) -> Tensor:
    """linear → activation → linear, of weights `[out, in]`."""
    return F.linear(activation(F.linear(x, first)), second, bias)


def _two_of_four(x: Tensor) -> Tensor:
    """The two largest of every four features, which is what naive 2:4 keeps of what is not negative."""
    groups = x.unflatten(-1, (-1, 4))
    return torch.zeros_like(groups).scatter(-1, (top := groups.topk(2)).indices, top.values).flatten(-2)


class _TwoOfFour(nn.Module):
    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return _two_of_four(self.activation(x))


def _gradients(family: str, pipeline: Pipeline, given: dict[str, Tensor]) -> None:
    """Whatever a region holds gets a gradient, but where the stock module there had none either."""
    without = []
    stock = build(family)
    for model in (stock.train(), pipeline.model.train()):
        if model is not stock:
            pipeline.begin_update_(LATER, given)
        torch.manual_seed(0)
        model(**given).logits.float().square().mean().backward()
        without.append({n.rpartition(".")[0] for n, p in model.named_parameters() if p.grad is None})
    assert without[1] <= without[0]
    pipeline.model.zero_grad()
    pipeline.model.eval()


def _copies(
    family: str, pipeline: Pipeline, make: Callable[[], list[Pass]], given: dict[str, Tensor]
) -> None:
    model = pipeline.model
    with pipeline.evaluation():
        other = copy.deepcopy(model)
    assert torch.equal(outputs(other, given), outputs(model, given))
    again = build(family)
    apply_(again, make(), seed=1, step=LATER, check=False)
    again.load_state_dict(model.state_dict())
    assert torch.equal(outputs(again, given), outputs(model, given))


def _half(family: str, make: Callable[[], list[Pass]]) -> None:
    model = build(family, torch.bfloat16)
    given = inputs(family, model)
    apply_(model, make(), step=LATER, probe=given)
    found = outputs(model, given)
    assert found.dtype is torch.bfloat16
    assert found.isfinite().all()


def _generates(family: str, model: Any) -> None:
    if family in MASKED or not model.can_generate():
        return
    given = inputs(family, model)
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    if family in SEQ2SEQ:
        options["decoder_start_token_id"] = 1
    cached = model.generate(**given, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**given, **options, use_cache=False))


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family: str) -> None:
    cells = [cell(family, make) for make in COLUMNS.values()]
    row = f"| {type(build(family)).__name__} | " + " | ".join(cells) + " |"
    text = TABLE.read_text(encoding="utf-8")
    if os.environ.get("ACT24_GOLDEN") == "write":
        head, rows = text.split("|---", 1)
        rule, *kept = ("|---" + rows).splitlines()
        name = row.split(" | ")[0]
        kept = sorted([line for line in kept if not line.startswith(name + " ")] + [row], key=str.casefold)
        text = "\n".join([head.rstrip("\n"), rule, *kept]) + "\n"
        TABLE.write_text(text, encoding="utf-8")
    assert row in text.splitlines()


def test_five_passes_over_64_layers_take_less_than_8_seconds_of_cpu() -> None:
    """Tracing, checking and applying, whatever else the machine does meanwhile."""
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=64,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=WORDS,
    )
    model = transformers.LlamaForCausalLM(config)
    passes = [Relu2FFN(), LowRank(**RANKS), Activation24(), Weight24(scope="attn", from_step=5), Recompute()]
    begin = time.process_time()
    report = apply_(model, passes).report
    assert time.process_time() - begin < 8
    assert "64 regions compute what their modules do" in report.checked
