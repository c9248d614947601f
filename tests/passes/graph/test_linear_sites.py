"""Linears are told apart by what their weights are, not by what the weights are called."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from toys import llama, tokens

from act24.errors import Act24Error
from act24.llama import LlamaForCausalLM
from act24.passes import (
    Activation24,
    Cola,
    Fp8,
    Lora,
    Lost,
    LowRank,
    PassError,
    Recompute,
    SparseMask,
    Weight24,
    apply_,
    plan,
)
from act24.passes.state import refuse_exact_steps

RANKS = {"attn_rank": 4, "mlp_rank": 4}


class Named(nn.Module):
    """Two linears in one module, by weights that are called anything."""

    def __init__(self, first, second):
        super().__init__()
        self.names = (first, second)
        self.register_parameter(first, nn.Parameter(torch.randn(16, 8)))
        self.register_parameter(second, nn.Parameter(torch.randn(8, 16)))

    def forward(self, x):
        hidden = F.linear(x, getattr(self, self.names[0]))
        return F.linear(F.silu(hidden), getattr(self, self.names[1]))


class Blocks(nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.mlp = nn.ModuleList(Named(*names) for _ in range(2))

    def forward(self, x):
        for block in self.mlp:
            x = x + block(x)
        return x


@pytest.mark.parametrize(
    "names", [("fc_weight", "proj_weight"), ("w", "v"), ("weight_out", "weight_columns")]
)
def test_every_weight_is_factorised_whatever_its_name(names):
    """Also one that is called as a factor would be; the product is the best approximation of that weight."""
    model, stock = Blocks(*names), Blocks(*names)
    stock.load_state_dict(model.state_dict())
    apply_(model, [LowRank(scope="mlp", mlp_rank=4, init="svd")])
    made = dict(model.named_parameters())
    assert set(made) == {f"mlp.{i}.{n}_{part}" for i in (0, 1) for n in names for part in ("in", "out")}
    for i in (0, 1):
        for n in names:
            u, s, vh = torch.linalg.svd(stock.get_parameter(f"mlp.{i}.{n}"))
            product = made[f"mlp.{i}.{n}_out"] @ made[f"mlp.{i}.{n}_in"]
            torch.testing.assert_close(product, u[:, :4] * s[:4] @ vh[:4], rtol=1e-4, atol=1e-4)


def test_two_weights_of_one_module_keep_columns_of_their_own():
    model = Blocks("w", "v")
    apply_(model, [Lost(scope="mlp", mlp_rank=4, sparsity=0.3)])
    buffers = {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}
    assert buffers == {f"mlp.{i}.{n}_column_indices": (k,) for i in (0, 1) for n, k in (("w", 2), ("v", 4))}
    assert model(torch.randn(3, 8)).shape == (3, 8)


def test_names_of_factors_do_not_make_factors():
    """Weights of the model's own that are called weight_out are no factors: nothing is kept for them, and an
    exact step has no business with them."""
    with pytest.raises(PassError, match="no bottleneck"):
        plan(Blocks("weight_out", "weight_columns"), [Recompute()])
    refuse_exact_steps(apply_(Blocks("weight_in", "weight_out"), [Weight24(scope="mlp")]))
    factors = apply_(Blocks("w", "v"), [LowRank(scope="mlp", mlp_rank=4), Weight24(scope="mlp")])
    with pytest.raises(Act24Error, match=r"weight24 makes mlp\.0\.w_in 2:4"):
        refuse_exact_steps(factors)


def test_a_name_that_is_taken_is_refused():
    """The factors of w would be w_in and w_out, and w_in is another weight of the same module."""
    with pytest.raises(PassError, match=r"mlp\.0\.w_in is there already"):
        plan(Blocks("w", "w_in"), [LowRank(scope="mlp", mlp_rank=4)])
    model = Blocks("weight", "v")
    for block in model.mlp:
        block.register_buffer("column_indices", torch.zeros(3))
    with pytest.raises(PassError, match=r"mlp\.0\.column_indices is there already"):
        plan(model, [Lost(scope="mlp", mlp_rank=4)])


def test_factors_count_as_linears_only_when_asked_for():
    taken = [row.fqn for row in plan(Blocks("w", "v"), [LowRank(scope="mlp", mlp_rank=4), Weight24()]).rows]
    assert len(taken) == 4 + 8
    with pytest.raises(PassError, match="lost matches nothing"):
        plan(Blocks("w", "v"), [LowRank(scope="mlp", mlp_rank=4), Lost(scope="mlp", mlp_rank=2)])


def test_a_model_made_up_after_meta_has_buffers_that_can_be():
    with torch.device("meta"):
        model = LlamaForCausalLM(llama().config)
    pipeline = apply_(model, [Lost(**RANKS, sparsity=0.3), Weight24(scope="mlp", ignore=("*.down_proj",))])
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    pipeline.reset_buffers_()
    kinds = [buffer.dtype for buffer in model.buffers()]
    assert kinds.count(torch.int64) >= 14
    assert kinds.count(torch.bool) >= 8
    for name, buffer in model.named_buffers():
        if buffer.dtype is torch.int64 and buffer.ndim:
            width = model.get_parameter(name.replace("column_indices", "weight_in")).shape[1]
            assert len(set(buffer.tolist())) == len(buffer)
            assert buffer.min() >= 0
            assert buffer.max() < width
        if buffer.dtype is torch.bool and buffer.ndim:
            assert (buffer.unflatten(-1, (-1, 4)).sum(-1) == 2).all(), name
    assert model.eval()(tokens()).isfinite().all()


class Autoencoder(nn.Module):
    """One weight, read as it is and transposed."""

    def __init__(self, encode, decode):
        super().__init__()
        self.w, self.v = nn.Linear(16, 16, bias=False), nn.Linear(16, 16)
        self.encode, self.decode = encode, decode

    def forward(self, x):
        return self.v(self.decode(self, torch.relu(self.encode(self, x))))


READS = {
    "module": lambda m, x: m.w(x),
    "straight": lambda m, x: F.linear(x, m.w.weight),
    "transposed": lambda m, x: F.linear(x, m.w.weight.t()),
    "product": lambda m, x: x @ m.w.weight,
    "T": lambda m, x: F.linear(x, m.w.weight.T),
    "sum": lambda m, x: x + m.w.weight.sum(),
}


@pytest.mark.parametrize(
    ("encode", "decode", "reason"),
    [
        ("module", "transposed", "another transposed"),
        ("straight", "product", "another transposed"),
        ("transposed", "module", "another transposed"),
        ("straight", "T", "something else than linears reads it too"),
        ("module", "sum", "something else than linears reads it too"),
    ],
)
def test_a_weight_with_two_purposes_stays_what_it_is(encode, decode, reason):
    model = nn.Sequential(*(Autoencoder(READS[encode], READS[decode]) for _ in range(2)))
    both = ("*.w", "*.v")
    given = {"attn_rank": 2, "mlp_rank": 2, "targets": both}
    everything = [LowRank(**given), Cola(**given), Lost(**given, sparsity=0.2)]
    everything += [Weight24(targets=both), Fp8(targets=both), SparseMask(targets=both), Lora(targets=both)]
    for p in everything:
        report = plan(model, [p])
        assert [row.fqn for row in report.rows] == ["0.v", "1.v"]
        left = {fqn: why for _, fqn, why in report.misses}
        assert reason in left["0.w"]
    stock = [parameter.clone() for parameter in model.parameters()]
    x = torch.randn(3, 16)
    expected = model(x)
    apply_(model, [LowRank(**{**given, "attn_rank": 16, "mlp_rank": 16}, init="svd")])
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert len(list(model.parameters())) == len(stock) + 2


def test_a_weight_that_is_read_twice_in_one_way_is_one_linear():
    model = nn.Sequential(*(Autoencoder(READS["module"], READS["straight"]) for _ in range(2)))
    x = torch.randn(3, 16)
    expected = model(x)
    report = apply_(model, [LowRank(scope="mlp", mlp_rank=16, targets=("*.w",), init="svd")]).report
    assert [row.fqn for row in report.rows] == ["0.w", "1.w"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_weight_that_a_module_around_reads_stays_what_it_is():
    """The decoder of a tied autoencoder that nobody traces reads weights as they are: 2:4, or with an
    adapter, they would be others only in the encoder."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
            self.head = nn.Linear(16, 16)

        def forward(self, x, **_):
            for layer in self.layers:
                x = F.relu(layer(x))
            return self.head(F.linear(x, self.layers[1].weight.t()))

    everywhere = ("layers.*", "head")
    for p in (Weight24, Lora, Fp8, Cola, Lost, LowRank):
        ranks = {} if p in (Fp8, Weight24, Lora) else RANKS
        p = p(targets=everywhere, **ranks)
        report = plan(Tied(), [p], probe=torch.randn(3, 16))
        assert [row.fqn for row in report.rows] == ["layers.0", "head"]
        assert report.misses[0][1:] == (
            "layers.1",
            "a Tied around it reads its weight past the linear: give each a weight of its own, or leave it "
            "out with ignore",
        )


def test_linears_that_a_parent_calls_are_regions_of_their_own():
    """The forward of the module between them is never called, and its graph would never run."""

    class FF(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(F.gelu(self.up(x)))

    class Parent(nn.Module):
        way = staticmethod(lambda feed, x: feed.down(F.gelu(feed.up(x))))

        def __init__(self):
            super().__init__()
            self.feeds = nn.ModuleList(FF() for _ in range(2))

        def forward(self, x):
            for feed in self.feeds:
                x = x + self.way(feed, x)
            return x

    x = torch.randn(3, 16)
    model = Parent()
    pipeline = apply_(model, [LowRank(scope="mlp", mlp_rank=8)], probe=x)
    assert [row.fqn for row in pipeline.report.rows] == [
        f"feeds.{i}.{n}" for i in (0, 1) for n in ("up", "down")
    ]
    by_hand = x
    for feed in model.feeds:
        h = F.linear(by_hand, feed.up.weight_out @ feed.up.weight_in, feed.up.bias)
        by_hand = by_hand + F.linear(F.gelu(h), feed.down.weight_out @ feed.down.weight_in, feed.down.bias)
    torch.testing.assert_close(model(x), by_hand)
    with pytest.raises(PassError, match=r"calls up in it and never its forward.*: call the module itself"):
        plan(Parent(), [Activation24()], probe=x)
    for way in (lambda feed, x: feed.forward(x), lambda feed, x: feed(x)):
        kind = type("Parent", (Parent,), {"way": staticmethod(way)})
        assert {row.fqn for row in plan(kind(), [Cola(mlp_rank=8, attn_rank=8)], probe=x).rows} == {
            "feeds.0.up",
            "feeds.0.down",
            "feeds.1.up",
            "feeds.1.down",
        }
        assert "2 regions compute" in plan(kind(), [Cola(mlp_rank=8, attn_rank=8)], probe=x).checked


def test_a_complex_linear_is_left_by_name():
    """What is real beside it is taken."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp, self.mixing = (
                nn.Sequential(*(nn.Linear(16, 16, dtype=dtype) for _ in range(2)))
                for dtype in (torch.float32, torch.complex64)
            )

        def forward(self, x):
            return self.mixing(self.mlp(x).to(torch.complex64)).real

    everything = {"targets": ("re:.*",)}
    for p in (Fp8, Weight24, Lora, Cola, Lost, LowRank):
        ranks = {} if p in (Fp8, Weight24, Lora) else RANKS
        report = plan(Model(), [p(**everything, **ranks)], check=False)
        assert {row.fqn for row in report.rows} == {"mlp.0", "mlp.1"}
        assert "leaves mixing.{0..1} as it is: its weight is complex64, and passes take real" in str(report)


@pytest.mark.parametrize("one", [LowRank(**RANKS), Weight24(method="ste")], ids=lambda one: one.name)
@pytest.mark.parametrize("place", ["", "model.layers.0"])
def test_a_forward_that_was_replaced_has_to_be_put_back(one, place):
    """As `m.forward = torch.compile(m.forward)` does, which is bound to the modules that are there."""
    model = llama(1)
    held = model.get_submodule(place)
    bound = held.forward
    held.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    with pytest.raises(PassError) as refused:
        plan(model, [one], probe=tokens())
    said = f"the forward of a {type(held).__name__} around it was replaced or compiled, and reads its weight"
    assert said in str(refused.value)
    assert "put back its own (del module.forward)" in str(refused.value)
    del held.forward
    assert not plan(model, [one], probe=tokens()).partial
