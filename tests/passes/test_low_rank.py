"""low_rank: parameter counts as published, the function of the factors, the way back, and what is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import features, llama, tokens

from act24.errors import Act24Error
from act24.llama import LlamaForCausalLM, llama_config
from act24.passes import Cola, Lost, LowRank, PassError, Pipeline, Relu2FFN, apply_, plan
from act24.passes.graph.linear_sites import FactorisingPass

#: Millions of parameters: dense, and with LORO's or CoLA's factors of the published rank.
PUBLISHED = {
    "60m": (58.07, 128, 42.77),
    "130m": (134.11, 256, 94.00),
    "350m": (367.97, 256, 185.22),
    "1b": (1339.08, 512, 609.31),
}


def on_meta(size):
    with torch.device("meta"):
        return LlamaForCausalLM(llama_config(f"llama-{size}"))


@pytest.mark.parametrize(
    "size", [pytest.param(s, marks=pytest.mark.slow) if s in ("130m", "350m", "1b") else s for s in PUBLISHED]
)
@pytest.mark.parametrize("method", [LowRank, Cola])
def test_parameters_are_as_many_as_published(size, method):
    dense, rank, factorised = PUBLISHED[size]
    report = plan(on_meta(size), [method(attn_rank=rank, mlp_rank=rank)])
    assert round(report.parameters_before / 1e6, 2) == dense
    assert round(report.parameters_after / 1e6, 2) == factorised
    assert len(report.rows) == 7 * llama_config(f"llama-{size}").num_hidden_layers


@pytest.mark.parametrize("method", [LowRank, Cola, Lost])
def test_a_checkpoint_loads_into_factors_of_what_relu2_made(method):
    """As `act24.load` does it: on the meta device, where what the first pass creates has no value."""
    passes = [Relu2FFN(), method(attn_rank=4, mlp_rank=6)]
    model = llama()
    apply_(model, passes)
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama().config)
    apply_(empty, passes)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(tokens()), model(tokens()))


def test_the_model_computes_with_the_product():
    """On grouped-query attention with biases, against the stock model given the products as weights."""
    options = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    model, stock = llama(**options), llama(**options)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    model.load_state_dict(stock.state_dict())
    pipeline = apply_(model, [LowRank(attn_rank=4, mlp_rank=6)])
    state = model.state_dict()
    for name, parameter in stock.named_parameters():
        if f"{name}_in" in state:
            assert state[f"{name}_in"].shape[0] == (4 if "self_attn" in name else 6)
            with torch.no_grad():
                parameter.copy_(state[f"{name}_out"] @ state[f"{name}_in"])
    torch.testing.assert_close(model(tokens()), stock(tokens()), rtol=1e-4, atol=1e-5)
    back = pipeline.state_to_stock(state)
    assert back.keys() == stock.state_dict().keys()
    for name, value in stock.state_dict().items():
        torch.testing.assert_close(back[name], value, rtol=1e-5, atol=1e-7)


def test_gradients_are_those_of_the_factors():
    model = llama()
    apply_(model, [LowRank(attn_rank=4, mlp_rank=6)])
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    seen = []
    before = F.linear

    def watching(x, weight, bias=None):
        y = before(x, weight, bias)
        if weight is linear.weight_out:
            seen.append((x, y))
            y.retain_grad()
            x.retain_grad()
        return y

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._C._nn, "linear", watching)
        patch.setattr(F, "linear", watching)
        model(tokens()).square().mean().backward()
    ((hidden, output),) = seen
    grad = output.grad.flatten(0, 1)
    torch.testing.assert_close(linear.weight_out.grad, grad.T @ hidden.flatten(0, 1))


@pytest.mark.parametrize(("scope", "expected"), [("all", 7), ("attn", 4), ("mlp", 3)])
def test_scope_takes_its_linears(scope, expected):
    ranks = {"attn_rank": 4 if scope != "mlp" else None, "mlp_rank": 4 if scope != "attn" else None}
    pipeline = Pipeline(llama(layers=1), [LowRank(scope=scope, **ranks)])
    assert len(pipeline.places("low_rank")) == expected
    part = {"attn": "self_attn", "mlp": "mlp"}.get(scope, "")
    assert all(part in place for place in pipeline.places("low_rank"))


def test_svd_init_starts_at_the_best_approximation():
    model, stock = llama(), llama()
    apply_(model, [LowRank(attn_rank=5, mlp_rank=5, init="svd")])
    for name, dense in stock.state_dict().items():
        if f"{name}_in" in model.state_dict():
            product = model.state_dict()[f"{name}_out"] @ model.state_dict()[f"{name}_in"]
            u, s, vh = torch.linalg.svd(dense)
            torch.testing.assert_close(product, u[:, :5] * s[:5] @ vh[:5], rtol=1e-4, atol=1e-6)


def test_full_rank_svd_is_the_dense_model():
    model, stock = llama(), llama()
    pipeline = apply_(model, [LowRank(attn_rank=32, mlp_rank=32, init="svd")])
    torch.testing.assert_close(model(tokens()), stock(tokens()), rtol=1e-4, atol=1e-5)
    state, fresh = pipeline.state_from_stock(stock.state_dict())
    assert fresh == ()
    model.load_state_dict(state)
    torch.testing.assert_close(model(tokens()), stock(tokens()), rtol=1e-4, atol=1e-5)


LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attention_bias": True,
}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1}


@pytest.mark.parametrize(
    ("name", "sizes", "scope", "places"),
    [("LlamaConfig", LLAMA, "mlp", 6), ("LlamaConfig", LLAMA, "attn", 8), ("GPT2Config", GPT2, "all", 8)],
)
def test_linears_of_other_models(name, sizes, scope, places):
    """transformers' LLaMA, grouped queries and biases; GPT-2, whose weights are stored `[in, out]`."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, name)(vocab_size=97, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = model(tokens()).logits
    stock = {name: value.clone() for name, value in model.state_dict().items()}
    full = 16 if scope == "attn" else 32  # the keys' width, or the model's
    pipeline = apply_(model, [LowRank(scope=scope, attn_rank=full, mlp_rank=full, init="svd")])
    assert len(pipeline.places("low_rank")) == places
    if scope != "attn":
        torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-3, atol=1e-4)
        back = pipeline.state_to_stock(model.state_dict())
        for name, value in stock.items():
            torch.testing.assert_close(back[name], value, rtol=1e-3, atol=1e-5)


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.ModuleDict({"up": nn.Linear(8, 8)})

    def forward(self, x):
        return self.mlp["up"](self.mlp["up"](x))


def test_a_linear_called_twice_is_factorised_once():
    model = nn.ModuleList([CalledTwice(), CalledTwice()])
    expected = model[0](features(3, 8))
    pipeline = apply_(model, [LowRank(scope="mlp", mlp_rank=8, init="svd")])
    assert pipeline.places("low_rank") == ("0.mlp.up", "1.mlp.up")
    torch.testing.assert_close(model[0](features(3, 8)), expected, rtol=1e-4, atol=1e-5)


def test_a_pass_on_one_layer_never_moves_another_ones_start():
    one, both = llama(), llama()
    options = {"attn_rank": 4, "mlp_rank": 4}
    apply_(one, [LowRank(targets=("*.layers.1.*",), **options)], seed=3)
    apply_(both, [LowRank(**options)], seed=3)
    name = "model.layers.1.mlp.up_proj.weight_in"
    assert torch.equal(one.state_dict()[name], both.state_dict()[name])


def test_layers_share_one_class():
    model = llama(layers=3)
    pipeline = apply_(model, [LowRank(attn_rank=4, mlp_rank=4)])
    assert len({type(module) for module in pipeline.modules}) == 1


def test_a_named_head_is_factorised_and_a_tied_one_refused():
    free = Pipeline(llama(), [LowRank(attn_rank=4, mlp_rank=4, targets=("lm_head",))])
    assert free.places("low_rank") == ("lm_head",)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 8)
            self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": nn.Linear(8, 8)}) for _ in range(2)])
            self.lm_head = nn.Linear(8, 10, bias=False)
            self.lm_head.weight = self.embed.weight

    with pytest.raises(PassError, match=r"lm_head\.weight is tied to embed\.weight"):
        plan(Tied(), [LowRank(attn_rank=4, mlp_rank=4, targets=("*lm_head*",))])
    # By default nobody asks for the head.
    assert len(plan(Tied(), [LowRank(attn_rank=4, mlp_rank=4)]).rows) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_rank": 4}, "mlp_rank is missing"),
        ({"attn_rank": 0, "mlp_rank": 4}, "low_rank: attn_rank has to be 1 or more and .* at most, got 0"),
        (
            {"attn_rank": 4, "mlp_rank": 4, "init": "xavir"},
            "low_rank: init .* did you mean 'xavier'",
        ),
        ({"attn_rank": 4, "mlp_rank": 4, "init": "randn_<std>"}, "init has no 'randn_<std>'"),
        ({"attn_rank": 4, "mlp_rank": 4, "init": "randn_1e999"}, "low_rank: init .* finite number above 0"),
        ({"attn_rank": 4, "mlp_rank": 4, "scope": "ffn"}, "low_rank: scope has no 'ffn'"),
        ({"attn_rank": 4, "mlp_rank": 4, "initializer_range": 0.0}, "initializer_range"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(Act24Error, match=message):
        LowRank(**options)


def test_a_rank_above_the_smaller_side_is_named_with_the_linear():
    with pytest.raises(
        PassError, match=r"attn_rank = 33 is above 32.*layers\.0\.self_attn\.q_proj \[32, 32\]"
    ):
        plan(llama(), [LowRank(attn_rank=33, mlp_rank=4)])


def test_relu2_ffn_has_to_come_first():
    good = [Relu2FFN(width="keep"), LowRank(attn_rank=4, mlp_rank=4)]
    assert len(plan(llama(), good).rows) == 2 + 2 * 6
    with pytest.raises(PassError, match="relu2_ffn matches nothing"):
        plan(llama(), good[::-1])


def test_two_factorisations_of_one_linear_are_refused():
    ranks = {"attn_rank": 4, "mlp_rank": 4}
    assert issubclass(LowRank, FactorisingPass)
    with pytest.raises(PassError):
        plan(llama(), [LowRank(**ranks), Cola(**ranks)])


def test_the_target_that_is_proposed_is_another_one():
    class Halved(nn.Linear):
        def forward(self, input):
            return super().forward(input) * 0.5

    model = nn.Sequential(Halved(8, 8), nn.ReLU(), Halved(8, 8))
    with pytest.raises(PassError, match=r'targets = \["0"\]'):
        plan(model, [LowRank(attn_rank=2, mlp_rank=2)])


@pytest.mark.parametrize("init", ["xavier", "svd"])
def test_factors_of_a_frozen_weight_train_unless_they_are_that_weight(init):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
    report = apply_(model, [LowRank(attn_rank=2, mlp_rank=2, init=init, targets=("0",))]).report
    said = {
        "xavier": "fresh: its factors; its weight was frozen, its factors train",
        "svd": "starts as its weight's best approximation; its factors stay frozen",
    }
    assert [row.note for row in report.rows] == [said[init]]
    assert not model[0].bias.requires_grad
    factors = [p.requires_grad for name, p in model.named_parameters() if "weight_" in name]
    assert factors == [init == "xavier"] * 2


@pytest.mark.parametrize(
    "passed",
    [
        Cola(attn_rank=2, mlp_rank=2),
        Lost(attn_rank=2, mlp_rank=2),
        Lost(attn_rank=2, mlp_rank=2, bottleneck="none"),
    ],
)
def test_factors_of_a_frozen_weight_train_where_they_compute_something_else(passed):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
    with pytest.raises(PassError, match="frozen: name it in targets"):
        plan(model, [passed])
    (row,) = apply_(model, [replace(passed, targets=("0",))]).report.rows
    assert row.note.endswith("its weight was frozen, its factors train")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {name for name, _ in model.named_parameters() if name.startswith("0.weight_")}


def test_the_report_says_what_becomes_of_trained_weights() -> None:
    """Of each first row, and whether the output has anything of the model's before."""
    rank = {"attn_rank": 7, "mlp_rank": 7}
    x = torch.randn(64, 8)
    for passed, said in (
        (LowRank(**rank), "fresh: its factors"),
        (LowRank(**rank, init="svd"), "starts as its weight's best approximation"),
        (Cola(**rank), "fresh: its factors"),
        (Cola(**rank, init="svd"), "starts from its weight, as another function"),
        (Lost(**rank), "starts from its weight, as another function"),
    ):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        before = model(x).detach()
        report = apply_(model, [passed]).report
        assert {row.note for row in report.rows} == {said}, passed
        near = float((model(x).detach() - before).norm() / before.norm()) < 0.2
        assert near == (said == "starts as its weight's best approximation"), passed
        assert report.checked.endswith("before passes change it")


class ZeroBranch(nn.Module):
    """A residual branch whose last linear starts at zero, as in DiT."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


@pytest.mark.parametrize(
    "passed", [LowRank(scope="mlp", mlp_rank=4, init="svd"), Lost(scope="mlp", mlp_rank=4)]
)
def test_a_linear_that_starts_at_zero_computes_that_and_trains(passed):
    torch.manual_seed(0)
    model, x = nn.Sequential(ZeroBranch(), ZeroBranch()), features(32, 8)
    biases = model[0].down.bias.detach().clone()
    report = apply_(model, [passed]).report
    notes = {row.fqn: row.note for row in report.rows}
    assert notes["0.down"].endswith("; its weight is zero: weight_in is drawn, weight_out is 0")
    assert "zero" not in notes["0.up"]
    assert torch.equal(model[0](x), x + biases)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).sin().sum().backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert "down" not in name or not torch.equal(p, before[name]), name
    assert not torch.equal(model[0].down.weight_in[0], model[1].down.weight_in[0])


def test_what_a_checkpoint_of_lower_rank_leaves_of_the_factors_trains():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 8, bias=False))
    pipeline = apply_(model, [LowRank(attn_rank=4, mlp_rank=4)])
    dense = features(8, 2) @ features(2, 8)
    mapped, _ = pipeline.state_from_stock({"0.weight": dense, "2.weight": torch.zeros(8, 8)})
    for name, weight, rank in (("0", dense, 2), ("2", torch.zeros(8, 8), 0)):
        weight_in, weight_out = mapped[f"{name}.weight_in"], mapped[f"{name}.weight_out"]
        torch.testing.assert_close(weight_out @ weight_in, weight, rtol=0, atol=1e-5)
        assert (weight_in.norm(dim=1) > 0.1).all()
        assert not weight_out[:, rank:].any()
