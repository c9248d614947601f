"""What a graph shows of linears whose names say nothing: activations and attention of any kind, routers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Activation24, ActivationStatistics, LowRank, PassError, Weight24, apply_, plan, trace
from act24.passes.graph.activation_kinds import activates

Forward = Callable[[Any, Tensor], Tensor]


class Lettered(nn.Module):
    """Linears 16 → 16 under letters, but `r` and `r2` 16 → 4 and `w` 4 → 16, and a forward from outside."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        for name in "abcdef":
            setattr(self, name, nn.Linear(16, 16))
        self.r, self.r2, self.w = nn.Linear(16, 4), nn.Linear(16, 4), nn.Linear(4, 16)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def roles(forward: Forward) -> dict[str, str]:
    """By letter, of the linears that are called; as trace has them, once the graph is known to be right."""
    ((region,), unclean) = trace(nn.ModuleList([Lettered(forward)]))
    assert not unclean
    x = features(2, 3, 16)
    assert torch.isfinite(region.module(x)).all()
    return {name.removesuffix(".weight"): role for name, role in region.roles.items()}


def network(m: Any, x: Tensor) -> Tensor:
    return x + m.f(F.gelu(m.e(x)))


NETWORK = {"e": "mlp", "f": "mlp"}
_NO_ACTIVATIONS = {"Softmax", "Softmax2d", "LogSoftmax", "Softmin", "MultiheadAttention"}
ACTIVATIONS = sorted(set(nn.modules.activation.__all__) - _NO_ACTIVATIONS)


def test_every_activation_of_torch_is_one() -> None:
    made = {name: getattr(nn, name)(*{"Threshold": (0.1, 0.0)}.get(name, ())) for name in ACTIVATIONS}
    assert len(made) > 20
    module = nn.ModuleDict(made)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert not [n for n in made if not activates(graph.call_module(n, (x,)), module)]
    names = (
        "relu6 elu selu celu gelu silu mish leaky_relu hardswish hardtanh softplus softsign tanh sigmoid glu"
    )
    assert all(activates(graph.call_function(getattr(F, n), (x,)), module) for n in names.split())
    assert all(activates(graph.call_method(n, (x,)), module) for n in ("tanh", "sigmoid", "relu_"))
    none = nn.ModuleDict({"softmax": nn.Softmax(-1), "dropout": nn.Dropout(), "norm": nn.LayerNorm(4)})
    assert not any(activates(graph.call_module(name, (x,)), none) for name in none)


@pytest.mark.parametrize("kind", [nn.GELU, nn.LeakyReLU, nn.ELU, nn.Hardswish, nn.Mish, nn.SiLU, nn.Sigmoid])
def test_a_network_of_any_activation_is_reached(kind: type[nn.Module]) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.act, self.b = nn.Linear(16, 32), kind(), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.b(self.act(self.a(x)))

    report = plan(nn.Sequential(Plain(), Plain()), [LowRank(attn_rank=4, mlp_rank=4)])
    assert {row.fqn for row in report.rows} == {"0.a", "0.b", "1.a", "1.b"}
    assert report.coverage[0].reached == report.coverage[0].total == 4 * 16 * 32


# Attention


def linear_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.elu(m.a(x)) + 1, F.elu(m.b(x)) + 1, m.c(x)
    return network(m, x + m.d(q @ (k.transpose(-1, -2) @ v) / 4))


def normalised_attention(m: Any, x: Tensor) -> Tensor:
    q, k, v = F.relu(m.a(x)), F.relu(m.b(x)), m.c(x)
    context = torch.einsum("bsd,bse->bde", k, v)
    scale = 1 / (torch.einsum("btd,bd->bt", q, k.sum(1)) + 1e-3)
    return network(m, x + m.d(torch.einsum("btd,bde,bt->bte", q, context, scale)))


def relu_attention(m: Any, x: Tensor) -> Tensor:
    return network(m, x + m.d(F.relu(m.a(x) @ m.b(x).transpose(-1, -2)) @ m.c(x)))


def chosen_attention(m: Any, x: Tensor) -> Tensor:
    scores = m.a(x) @ m.b(x).transpose(-1, -2)
    least = scores.topk(2, dim=-1).values[..., -1:]
    mixed = torch.softmax(scores.masked_fill(scores < least, -1e9), -1) @ m.c(x)
    return network(m, x + m.d(mixed))


def sigmoid_attention(m: Any, x: Tensor) -> Tensor:
    return network(m, x + m.d(torch.bmm(torch.sigmoid(torch.bmm(m.a(x), m.b(x).mT) - 1.0), m.c(x))))


def outer_attention(m: Any, x: Tensor) -> Tensor:
    state = (m.b(x).unsqueeze(-1) * m.c(x).unsqueeze(-2)).cumsum(1)
    return network(m, x + m.d((m.a(x).unsqueeze(-1) * state).sum(-2)))


def efficient_attention(m: Any, x: Tensor) -> Tensor:
    context = torch.softmax(m.b(x), 1).mT @ m.c(x)
    return network(m, x + m.d(torch.softmax(m.a(x), -1) @ context))


@pytest.mark.parametrize(
    "forward",
    [
        linear_attention,
        normalised_attention,
        relu_attention,
        chosen_attention,
        sigmoid_attention,
        outer_attention,
        efficient_attention,
    ],
)
def test_attention_is_told_by_its_products(forward: Forward) -> None:
    found = roles(forward)
    assert {name: found[name] for name in "abcdef"} == {**dict.fromkeys("abcd", "attn"), **NETWORK}


def relu2_network(m: Any, x: Tensor) -> Tensor:
    """Behind attention whose scores, features and moved dimensions go through relu."""
    x = relu_attention(m, x) + F.relu(m.r(x).transpose(-1, -2)).transpose(-1, -2).mean()
    return normalised_attention(m, x) + m.f(F.relu(m.e(x)).square())


def test_a_relu_of_attention_is_no_site() -> None:
    model = nn.ModuleList([Lettered(relu2_network)])
    x, longer = features(2, 4, 16), features(2, 7, 16)
    before = model[0](x), model[0](longer)
    pipeline = apply_(model, [Activation24(from_step=2), ActivationStatistics()])
    assert [row.before for row in pipeline.report.rows] == ["linear · relu2 · linear"]
    assert (torch.equal(model[0](x), before[0]), torch.equal(model[0](longer), before[1])) == (True, True)
    pipeline.lower_(2)
    assert model[0](longer).shape == longer.shape
    counts = [name for name, _ in model.named_buffers() if name.endswith("activation_statistics")]
    assert len(counts) == 1
    with pytest.raises(PassError, match="its relu is of what attention multiplies, and no network's"):
        plan(
            nn.ModuleList([Lettered(lambda m, x: m.d(F.relu(m.a(x) @ m.b(x).mT) @ m.c(x)))]), [Activation24()]
        )
    with pytest.raises(PassError, match="no relu² or relu: leave it to other passes"):
        plan(nn.ModuleList([Lettered(relu_attention)]), [Activation24()])


# Routers


def chosen(m: Any, x: Tensor) -> Tensor:
    weight, place = torch.topk(torch.softmax(m.r(x), -1), 2)
    full = torch.zeros_like(m.r(x)).scatter(-1, place, weight)
    return network(m, x) * full[..., :1] + m.b(F.silu(m.a(x))) * full[..., 1:2]


def biased(m: Any, x: Tensor) -> Tensor:
    scores = torch.sigmoid(m.r(x))
    place = (scores + m.w.weight.mean(0)).argsort(-1)
    return network(m, x) * scores.gather(-1, place[..., :1]) + m.b(F.silu(m.a(x)))


def noisy(m: Any, x: Tensor) -> Tensor:
    logits = m.r(x) + torch.ones_like(m.r(x)) * F.softplus(m.r(x))
    return network(m, x) * logits.topk(1, dim=-1).values + m.b(F.silu(m.a(x)))


def one_of_all(m: Any, x: Tensor) -> Tensor:
    weight, place = torch.softmax(m.r(x), -1).max(-1, keepdim=True)
    return network(m, x) * weight * (place == 0) + m.b(F.silu(m.a(x)))


def all_of_them(m: Any, x: Tensor) -> Tensor:
    weight = torch.softmax(m.r(x), -1)
    return network(m, x) * weight[..., :1] + m.b(F.silu(m.a(x))) * weight[..., 1:2]


def stacked(m: Any, x: Tensor) -> Tensor:
    experts = torch.stack([network(m, x), m.b(F.silu(m.a(x))), x, x], -2)
    return torch.einsum("bte,bted->btd", F.softmax(m.r(x), dim=-1), experts)


def dispatched(m: Any, x: Tensor) -> Tensor:
    weight = torch.softmax(m.r(x), -1)
    mask = F.one_hot(weight.argmax(-1), 4).to(x)
    inside = torch.einsum("bte,btd->bed", mask, x)
    outside = network(m, inside) + m.b(F.silu(m.a(inside)))
    return torch.einsum("bte,bed->btd", mask * weight, outside)


def positive(m: Any, x: Tensor) -> Tensor:
    """arXiv 2412.14711: a relu decides how many."""
    weight = F.relu(m.r(x))
    return network(m, x) * weight[..., :1] + m.b(F.silu(m.a(x))) * weight[..., 1].unsqueeze(-1)


def normalised(m: Any, x: Tensor) -> Tensor:
    weight = torch.sigmoid(m.r(x))
    experts = torch.stack([network(m, x), m.b(F.silu(m.a(x))), x, x], -2)
    return torch.einsum("bte,bted->btd", weight / weight.sum(-1, keepdim=True), experts)


ROUTERS = [chosen, biased, noisy, one_of_all, all_of_them, stacked, dispatched, positive, normalised]


@pytest.mark.parametrize("forward", ROUTERS)
def test_routers_are_told_by_what_they_choose(forward: Forward) -> None:
    found = roles(forward)
    assert {name: found[name] for name in "rabef"} == {"r": "router", "a": "mlp", "b": "mlp", **NETWORK}


def of_two(m: Any, x: Tensor) -> Tensor:
    logits = m.r(F.relu(m.c(x)))
    weight, place = logits.topk(2, -1)
    full = torch.zeros_like(logits).scatter(-1, place, weight.softmax(-1))
    return network(m, x) * full[..., :1] + m.b(F.silu(m.a(x))) * full[..., 1:2]


def of_two_relus(m: Any, x: Tensor) -> Tensor:
    weight = F.relu(m.r(torch.tanh(m.c(x))))
    return network(m, x) * weight[..., :1] + m.b(F.silu(m.a(x))) * weight[..., 1:2]


@pytest.mark.parametrize("forward", [of_two, of_two_relus])
def test_the_first_matrix_of_a_router_is_one(forward: Forward) -> None:
    found = roles(forward)
    assert found == {"r": "router", "c": "router", "a": "mlp", "b": "mlp", **NETWORK}


def narrow_gate(m: Any, x: Tensor) -> Tensor:
    """A gated network as wide as a router has features."""
    return network(m, x) + m.w(F.silu(m.r(x)) * m.r2(x))


def narrow_halves(m: Any, x: Tensor) -> Tensor:
    gate, up = m.r(x).chunk(2, -1)
    return network(m, x) + m.w(torch.cat([F.relu(gate) * up, up * gate], -1))


def bottleneck(m: Any, x: Tensor) -> Tensor:
    """Squeezed and spread again, to weigh every feature."""
    return network(m, x) * torch.sigmoid(m.w(F.relu(m.r(x))))


def gated_attention(m: Any, x: Tensor) -> Tensor:
    """A gate for each of four heads of what attention gives."""
    mixed = F.scaled_dot_product_attention(m.a(x), m.b(x), m.c(x)).unflatten(-1, (4, 4))
    return network(m, x + m.d((mixed * torch.sigmoid(m.r(x)).unsqueeze(-1)).flatten(-2)))


@pytest.mark.parametrize("forward", [narrow_gate, narrow_halves, bottleneck, gated_attention])
def test_what_does_not_only_weigh_is_no_router(forward: Forward) -> None:
    assert "router" not in roles(forward).values()


def test_the_relu_of_a_router_is_no_site() -> None:
    for forward, first in ((positive, "0.r"), (of_two, "0.c")):
        model = nn.ModuleList([Lettered(forward)])
        with pytest.raises(PassError, match="its relu is a router's: name it in targets to take it"):
            plan(model, [Activation24()])
        (row,) = plan(model, [Activation24(targets=(first, "0.r"))]).rows
        assert row.before.startswith("linear · relu")
    beside = nn.ModuleList([Lettered(lambda m, x: of_two(m, x) + m.w(F.relu(m.r2(x))))])
    (row,) = plan(beside, [Activation24()]).rows
    assert row.reaches == ("0.r2.weight", "0.w.weight")


class Gate(nn.Module):
    """A router that is a region by itself, around experts that are none; a name around it says mlp."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.topk(torch.softmax(self.proj(x), -1), 2)


def test_a_router_that_is_a_region_is_left_and_named() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = nn.ModuleDict({"choice": Gate(), "up": nn.Linear(16, 16)})

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            weight, _ = self.mlp["choice"](x)
            return self.mlp["up"](x) * weight[..., :1]

    for one in (LowRank(attn_rank=2, mlp_rank=2), Weight24()):
        report = plan(nn.Sequential(Layer(), Layer()), [one])
        assert {row.fqn for row in report.rows} == {"0.mlp.up", "1.mlp.up"}
        assert ("{0..1}.mlp.choice.proj", 0.0, "a router") in report.coverage[0].left


def test_a_relu_between_convolutions_is_no_site() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.out = nn.Conv1d(4, 8, 1), nn.Conv1d(8, 4, 1), nn.Linear(6, 6)
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.two(self.act(self.one(x))))

    with pytest.raises(PassError, match="its relu stands between convolutions"):
        plan(nn.Sequential(Stem(), Stem()), [Activation24()])
