"""State dicts of a stock model into a rewritten one, and out again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toys import Doubled, llama, tokens

from act24.passes import Activation24, LowRank, PassError, Pipeline, Relu2FFN, Weight24, apply_
from act24.passes.graph.region import RegionModule


def test_state_dict_round_trip_of_an_exact_pass() -> None:
    model, stock = llama(), llama(seed=1)
    pipeline = apply_(model, [Doubled(targets=("*_proj",), ignore=("*.k_proj",))])
    mapped, fresh = pipeline.state_from_stock(stock.state_dict())
    assert fresh == ()
    model.load_state_dict(mapped)
    torch.testing.assert_close(model(tokens()), stock(tokens()))
    back = pipeline.state_to_stock(model.state_dict())
    assert back.keys() == stock.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in stock.state_dict().items())


def test_values_are_carried_over_on_apply() -> None:
    model = llama()
    expected = model(tokens())
    apply_(model, [Doubled(targets=("*_proj",))])
    torch.testing.assert_close(model(tokens()), expected)


def test_relu2_ffn_says_what_starts_anew_and_why_there_is_no_way_back() -> None:
    stock = llama()
    model = llama()
    pipeline = apply_(model, [Relu2FFN()])
    mapped, fresh = pipeline.state_from_stock(stock.state_dict())
    assert fresh == tuple(f"model.layers.{i}.mlp.{p}_proj.weight" for i in (0, 1) for p in ("up", "down"))
    result = model.load_state_dict(mapped, strict=False)
    assert tuple(result.missing_keys) == fresh
    assert not result.unexpected_keys
    with pytest.raises(PassError, match=r"model\.layers\.1\.mlp has no stock form: SwiGLU and relu²"):
        pipeline.state_to_stock(model.state_dict())


def test_what_follows_from_a_fresh_parameter_is_fresh() -> None:
    pipeline = Pipeline(llama(1), [Relu2FFN(), Doubled(targets=("*.up_proj", "*.q_proj"))])
    stock = llama(1).state_dict()
    mapped, fresh = pipeline.state_from_stock(stock)
    assert fresh == ("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.up_proj.halved")
    assert mapped.keys() | set(fresh) == (
        stock.keys()
        - {f"model.layers.0.mlp.{p}_proj.weight" for p in ("gate", "up")}
        - {"model.layers.0.self_attn.q_proj.weight"}
        | {"model.layers.0.mlp.up_proj.halved", "model.layers.0.self_attn.q_proj.halved"}
    )


def test_a_missing_name_is_named() -> None:
    model = llama()
    pipeline = apply_(model, [Doubled(targets=("*.q_proj",))])
    stock = llama().state_dict()
    del stock["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(PassError, match=r"no model\.layers\.1\.self_attn\.q_proj\.weight"):
        pipeline.state_from_stock(stock)
    own = model.state_dict()
    del own["model.layers.0.self_attn.q_proj.halved"]
    with pytest.raises(PassError, match=r"no model\.layers\.0\.self_attn\.q_proj\.halved"):
        pipeline.state_to_stock(own)


def test_state_of_a_shared_module() -> None:
    mlp = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False))
    model = nn.ModuleList([mlp, nn.Sequential(nn.Linear(4, 4)), mlp])
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    pipeline = apply_(model, [Doubled()])
    assert model[0] is model[2]
    assert isinstance(model[0], RegionModule)
    mapped, fresh = pipeline.state_from_stock(stock)
    assert not fresh
    assert mapped.keys() == model.state_dict().keys()
    back = pipeline.state_to_stock(model.state_dict())
    assert back.keys() == stock.keys()
    assert all(torch.equal(back[name], value) for name, value in stock.items())


@pytest.mark.parametrize("method", ["transposable", "soft_threshold", "ste"])
def test_a_stock_state_of_24_weights_is_what_a_stock_model_loads_and_computes_the_same(method: str) -> None:
    """Masks are those of the weights as they are, and factors are masked before they are multiplied."""
    model = llama()
    low_rank = LowRank(scope="attn", attn_rank=8)
    pipeline = apply_(model, [low_rank, Weight24(method=method)])  # type: ignore[arg-type]
    pipeline.begin_update_(0, tokens())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.eval()
    stock = llama(seed=1).eval()
    stock.load_state_dict(pipeline.state_to_stock(model.state_dict()))
    with torch.no_grad():
        torch.testing.assert_close(stock(tokens()), model(tokens()))
        # What is not in force leaves weights dense, and its state behind.
        pipeline.lower_(0, without=["weight24"])
        stock.load_state_dict(pipeline.state_to_stock(model.state_dict()))
        torch.testing.assert_close(stock(tokens()), model(tokens()))


def test_a_stock_state_of_a_shared_module_with_24_weights_and_of_24_activations() -> None:
    mlp = nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
    model = nn.Sequential(mlp, nn.Sequential(nn.Linear(8, 8)), mlp)
    names = model.state_dict().keys()
    stock = copy.deepcopy(model)
    pipeline = apply_(model, [Activation24(), Weight24(targets=("re:.*",), method="ste", optional=True)])
    back = pipeline.state_to_stock(model.state_dict())
    assert back.keys() == names
    stock.load_state_dict(back)
    assert float((stock[1][0].weight == 0).float().mean()) == 0.5
