"""cola: the function of the bottleneck, its start, SwiGLU's SiLU, and activation24 in every bottleneck."""

import pytest
import torch
import torch.nn.functional as F
from toys import llama, tokens

from act24.options import OptionError
from act24.passes import Activation24, ActivationStatistics, Cola, PassError, Pipeline, Relu2FFN, apply_, plan
from act24.passes.activation_statistics import BUFFER
from act24.relu2 import relu2

ACTIVATIONS = {"silu": F.silu, "relu2": relu2}


def by_hand(model, ids, state, bottleneck, mlp_activation):
    """The stock LLaMA with every linear of a block replaced by CoLA's, from a state dict."""
    act = ACTIVATIONS[bottleneck]
    for index, layer in enumerate(model.model.layers):
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                prefix = f"model.layers.{index}.{name}"
                weight_in, weight_out = state[f"{prefix}.weight_in"], state[f"{prefix}.weight_out"]
                linear.forward = lambda x, i=weight_in, o=weight_out: F.linear(act(F.linear(x, i)), o)
        if mlp_activation == "drop":
            mlp = layer.mlp
            mlp.forward = lambda x, m=mlp: m.down_proj(m.gate_proj(x) * m.up_proj(x))
    return model(ids)


@pytest.mark.parametrize("mlp_activation", ["keep", "drop"])
@pytest.mark.parametrize("bottleneck", ["silu", "relu2"])
def test_it_computes_colas_layers(bottleneck, mlp_activation):
    options = {"bottleneck": bottleneck, "mlp_activation": mlp_activation}
    model, stock = llama(), llama()
    apply_(model, [Cola(attn_rank=8, mlp_rank=12, **options)])
    state = model.state_dict()
    missing = stock.load_state_dict(state, strict=False)  # embeddings and norms
    assert all("_proj.weight" in name for name in missing.missing_keys)
    torch.testing.assert_close(model(tokens()), by_hand(stock, tokens(), state, **options))


def test_both_factors_start_as_published():
    model = llama(hidden_size=64, intermediate_size=160)
    apply_(model, [Cola(attn_rank=16, mlp_rank=24)])
    for name, parameter in model.named_parameters():
        if name.endswith(("weight_in", "weight_out")):
            linear = model.get_submodule(name.rpartition(".")[0])
            rank, in_features = linear.weight_in.shape
            expected = (rank * (in_features + linear.weight_out.shape[0])) ** -0.25
            error = 4 / (2 * parameter.numel()) ** 0.5  # four standard errors
            assert parameter.std().item() == pytest.approx(expected, rel=error)


def test_there_is_no_dense_form():
    model = llama()
    pipeline = apply_(model, [Cola(attn_rank=8, mlp_rank=8)])
    with pytest.raises(PassError, match="between the factors stands silu"):
        pipeline.state_to_stock(model.state_dict())
    _, fresh = pipeline.state_from_stock(llama().state_dict())
    assert len(fresh) == 2 * 7 * 2


def test_activation24_finds_the_network_and_every_bottleneck():
    """more_activation_relu2: nobody tells the pass where."""
    passes = [Relu2FFN(), Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2"), Activation24()]
    report = plan(llama(layers=1), passes)
    found = [row.fqn for row in report.rows if row.pass_name == "activation24"]
    attention = [f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"]
    mlp = [f"model.layers.0.mlp{x}" for x in ("", ".up_proj", ".down_proj")]
    assert sorted(found) == sorted(attention + mlp)


def test_statistics_of_every_bottleneck_are_kept():
    passes = [Relu2FFN(), Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2"), ActivationStatistics()]
    model = llama(layers=1)
    apply_(model, passes)
    model(tokens())
    elements = {
        name.removeprefix("model.layers.0.").rpartition(".")[0]: int(buffer[0])
        for name, buffer in model.named_buffers()
        if name.endswith(BUFFER)
    }
    count = tokens().numel()
    bottlenecks = [*(f"self_attn.{x}_proj" for x in "qkvo"), "mlp.up_proj", "mlp.down_proj"]
    assert elements == {"mlp": 128 * count, **dict.fromkeys(bottlenecks, 8 * count)}


def test_dropping_a_silu_that_is_not_there_is_said():
    passes = [Relu2FFN(), Cola(attn_rank=8, mlp_rank=8, mlp_activation="drop")]
    report = plan(llama(layers=1), passes)
    note = 'no SiLU behind it to drop: leave mlp_activation at "keep"'
    notes = {row.fqn.rpartition(".")[2]: row.note for row in report.rows if row.pass_name == "cola"}
    assert {name for name, said in notes.items() if said.endswith(note)} == {"up_proj", "down_proj"}
    assert not report.misses  # what is rewritten is not said to be left
    assert not report.partial
    dropped = plan(llama(), [Cola(attn_rank=8, mlp_rank=8, mlp_activation="drop")])
    assert not dropped.misses
    assert note not in str(dropped)


def test_the_silu_of_a_half_is_dropped():
    """One linear computes gate and up, as in Phi-3."""

    class Fused(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up, self.down = torch.nn.Linear(16, 64), torch.nn.Linear(32, 16)

        def forward(self, x):
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(up * F.silu(gate))

    model, x = torch.nn.Sequential(Fused(), Fused()), torch.randn(3, 16)
    apply_(model, [Cola(attn_rank=4, mlp_rank=4, mlp_activation="drop")])

    def by_hand(linear, h):
        return F.linear(F.silu(F.linear(h, linear.weight_in)), linear.weight_out, linear.bias)

    for network in model:
        gate, up = by_hand(network.gate_up, x).chunk(2, dim=-1)
        torch.testing.assert_close(network(x), by_hand(network.down, gate * up))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": "gelu"}, "cola: bottleneck has no 'gelu'"),
        ({"bottleneck": "none"}, "cola: bottleneck has no 'none'"),  # which is low_rank
        ({"mlp_activation": True}, "cola: mlp_activation has no True"),
        ({"attn_rank": 8.0}, "cola: attn_rank has to be an integer, got 8.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(OptionError, match=message):
        Cola(**{"attn_rank": 8, "mlp_rank": 8, **options})


def test_layers_share_one_class_and_compile_without_breaks():
    model = llama()
    pipeline = apply_(model, [Cola(attn_rank=8, mlp_rank=8)])
    assert len({type(module) for module in pipeline.modules}) == 1
    expected = model(tokens())
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(model(tokens()), expected)


def test_every_parameter_gets_a_gradient():
    model = llama()
    Pipeline(model, [Cola(attn_rank=8, mlp_rank=8, bottleneck="relu2")]).commit_()
    model(tokens()).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def test_its_start_may_be_another():
    """As run_c4.py's `--cola_init False` left it: xavier's deviation of each factor in place of CoLA's."""
    model = llama()
    apply_(model, [Cola(attn_rank=8, mlp_rank=12, init="xavier")])
    weight = model.state_dict()["model.layers.0.self_attn.q_proj.weight_in"]
    expected = (2 / (weight.shape[1] + 8)) ** 0.5
    assert float(weight.std()) == pytest.approx(expected, rel=0.15)
    with pytest.raises(OptionError, match="did you mean 'xavier'"):
        Cola(attn_rank=8, mlp_rank=12, init="xavie")
