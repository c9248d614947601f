"""recompute: the same gradients and names, and less kept for backward than by CoLA-M, 2 T D + 7 T R."""

import copy
import pickle
import re

import pytest
import torch
from slow import slow_after
from torch import nn
from toys import Trunk, features, llama, tokens

from act24.operation import operation
from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Lost,
    LowRank,
    PassError,
    Recompute,
    Relu2FFN,
    apply_,
    plan,
)
from act24.rotary import rotary_embedding

RANKS = {"attn_rank": 8, "mlp_rank": 8}
MODELS = {
    "cola": [Cola(**RANKS)],
    "low_rank": [LowRank(**RANKS)],
    "lost": [Lost(**RANKS, sparsity=0.1)],
    "low_rank relu2 act24": [Relu2FFN(), LowRank(**RANKS), Activation24()],
    "cola relu2 act24": [Cola(**RANKS, bottleneck="relu2"), Activation24()],
    "cola relu2": [Relu2FFN(), Cola(**RANKS, bottleneck="relu2"), ActivationStatistics()],
}


def trained(passes):
    model = llama(num_key_value_heads=2, attention_bias=True)
    pipeline = apply_(model, passes)
    loss = model(tokens()).square().mean()
    loss.backward()
    return model, pipeline, loss


@pytest.mark.parametrize("passes", slow_after(3, MODELS.values()), ids=MODELS)
def test_gradients_names_and_counts_are_the_same(passes):
    model, _, loss = trained(passes)
    other, pipeline, other_loss = trained([*passes, Recompute()])
    assert torch.equal(loss, other_loss)
    assert model.state_dict().keys() == other.state_dict().keys()
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(model.named_buffers(), other.named_buffers(), strict=True):
        assert torch.equal(a, b), name  # statistics are counted once, not twice
    assert len({type(module) for module in pipeline.modules}) == 1


def kept_elements(passes, width, heads):
    """Elements of activations that one block keeps for backward, each storage once."""
    model = llama(layers=1, hidden_size=width, intermediate_size=96, num_attention_heads=heads)
    apply_(model, passes)
    block = model.model.layers[0]
    x = features(4, 16, width).requires_grad_()
    cos, sin = rotary_embedding(16, width // heads, 10_000.0, torch.device("cpu"))
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers(), cos, sin)}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes() // tensor.element_size(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = block(x, cos, sin)
    assert output.requires_grad
    return sum(elements for elements, _ in kept.values()), 4 * 16


def test_a_block_keeps_the_bottlenecks_and_the_residual_stream():
    width, rank = 64, 8
    passes = [Cola(attn_rank=rank, mlp_rank=rank)]
    all_of_it, count = kept_elements(passes, width, 4)
    little, _ = kept_elements([*passes, Recompute()], width, 4)
    assert little == count * width + 7 * count * rank
    assert all_of_it > 5 * little


def test_it_may_stand_anywhere_and_come_and_go():
    passes = [Recompute(until_step=5), Relu2FFN(), Cola(**RANKS, bottleneck="relu2"), ActivationStatistics()]
    model = llama()
    pipeline = apply_(model, passes)
    assert pipeline.boundaries == (5,)
    expected = model(tokens())
    names = list(model.state_dict())
    assert pipeline.lower_(5)
    torch.testing.assert_close(model(tokens()), expected)
    assert list(model.state_dict()) == names
    assert "recomputed" not in pipeline.modules[0].code


def test_figures_of_the_report_are_those_without_it():
    passes = [Relu2FFN(), LowRank(**RANKS), Activation24()]
    assert plan(llama(), [*passes, Recompute()]).flops_after == plan(llama(), passes).flops_after


def test_compiled_blocks_agree_and_break_nowhere():
    model, _, _ = trained([*MODELS["cola"], Recompute()])
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend="aot_eager")
    model(tokens()).square().mean().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_a_block_of_which_ignore_takes_a_part_is_left():
    passes = [Cola(**RANKS), Recompute(ignore=("model.layers.0.mlp",))]
    report = plan(llama(layers=2), passes)
    assert [row.fqn for row in report.rows if row.pass_name == "recompute"] == ["model.layers.1"]
    (partial,) = report.partial
    assert partial.left[0][2].startswith("ignore takes model.layers.0.mlp.gate_proj, a part of it: ignore")
    assert not plan(llama(layers=2), [passes[0], Recompute(ignore=("model.layers.0",))]).partial
    with pytest.raises(PassError, match=r"model\.layers\.0: ignore takes model.*q_proj, a part of it"):
        plan(llama(layers=2), [passes[0], Recompute(ignore=("*.q_proj",))])


def test_without_bottlenecks_it_says_so():
    with pytest.raises(PassError, match="no bottleneck"):
        plan(llama(), [Recompute()])


class Drops(nn.Module):
    def __init__(self, kind=nn.Dropout):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(16, 32), nn.Linear(32, 16), kind(0.4)

    def forward(self, x):
        return self.dropout(self.down(self.dropout(torch.tanh(self.up(x)))))


def test_a_module_that_may_differ_the_second_time_is_refused():
    passes = [LowRank(scope="mlp", mlp_rank=4), Recompute()]
    with pytest.raises(PassError, match=r"mlp\.dropout \[AlphaDropout\] may differ: leave"):
        plan(Trunk(lambda: Drops(nn.AlphaDropout)), passes)


def test_dropout_draws_the_same_again_and_heeds_what_it_is_set_to():
    """Against autograd without the pass: in training, in evaluation, and where a part is in evaluation."""
    found = []
    for passes in ((), (Recompute(),)):
        torch.manual_seed(0)
        model = Trunk(Drops).double()
        apply_(model, [LowRank(scope="mlp", mlp_rank=4), *passes])
        values = []
        for part in (None, model, model.blocks[0].mlp.dropout):
            model.train()
            if part is not None:
                part.eval()
            torch.manual_seed(1)
            output = model(features(5, 16).double())
            gradients = torch.autograd.grad(output.square().sum(), list(model.parameters()))
            values += [output, *gradients]
        found.append(values)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(found[0][0], found[0][len(found[0]) // 3])
    assert not torch.equal(found[0][0], found[0][2 * len(found[0]) // 3])
    model.blocks[1].mlp.dropout.p = 0.1
    with pytest.raises(PassError, match=r"dropout\.p was 0\.4"):
        model(features(5, 16).double())


def test_layer_norms_are_computed_again_too():
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    gradients = []
    for passes in ([], [Recompute()]):
        torch.manual_seed(0)
        model = Trunk(MLP)
        pipeline = apply_(model, [LowRank(scope="mlp", mlp_rank=4), *passes])
        model(features(3, 16)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert "self.norm(" not in pipeline.modules[0].code
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_modules_of_torch_without_chance_are_computed_again():
    """In place too; what draws, or has tensors, is refused by name."""

    class MLP(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.up, self.act, self.down = nn.Linear(16, 32), act, nn.Linear(32, 16)

        def forward(self, x):
            return self.down(self.act(self.up(x)))

    acts = [nn.GELU("tanh"), nn.Tanh(), nn.LeakyReLU(0.3, inplace=True), nn.ELU(0.5), nn.Softplus(2.0, 3.0)]
    acts += [nn.Mish(inplace=True), nn.ReLU6(), nn.SELU(), nn.Hardswish(), nn.Sigmoid(), nn.Flatten()]
    acts += [nn.LogSigmoid(), nn.Tanhshrink(), nn.Softmax(-1)]
    gradients = []
    for passes in ([], [Recompute()]):
        torch.manual_seed(0)
        model = nn.Sequential(MLP(nn.Sequential(*acts)), MLP(nn.Sequential(*acts))).double()
        pipeline = apply_(model, [LowRank(scope="mlp", mlp_rank=4, targets=("re:.*",)), *passes])
        model(features(3, 16).double()).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert "recomputed" in pipeline.modules[0].code
    for a, b in zip(*gradients, strict=True):
        assert a.any()
        torch.testing.assert_close(a, b)
    for act in (nn.RReLU(), nn.PReLU()):
        with pytest.raises(
            PassError, match=rf"act \[{type(act).__name__}\] may differ.*torch.utils.checkpoint"
        ):
            plan(nn.Sequential(MLP(act)), [LowRank(scope="mlp", mlp_rank=4, targets=("re:.*",)), Recompute()])


def _hooked(name):
    return lambda mlp: getattr(mlp, name).register_forward_hook(lambda *_: None)


#: What is done to a module that is computed again, and what says so.
CHANGES = {
    "dropout": (lambda mlp: setattr(mlp.dropout, "p", 0.5), r"mlp\.dropout\.p was 0\.0 .* and is 0\.5"),
    "option": (lambda mlp: setattr(mlp.act, "approximate", "tanh"), r"act\.approximate was 'none' .* 'tanh'"),
    "eps": (lambda mlp: setattr(mlp.norm, "eps", 0.1), r"mlp\.norm\.eps was 1e-05 .* and is 0\.1"),
    "bias": (lambda mlp: mlp.norm.register_parameter("bias", nn.Parameter(torch.ones(16))), r"bias was None"),
    "module": (lambda mlp: setattr(mlp, "norm", nn.LayerNorm(16, bias=False)), r"mlp\.norm was .* another"),
    "forward": (lambda mlp: setattr(mlp.norm, "forward", torch.relu), r"mlp\.norm\.forward was "),
    "hook": (_hooked("act"), r"number of forward_hooks of blocks\.0\.mlp\.act was 0 .* and is 1"),
}


def test_what_it_reads_of_modules_cannot_be_changed():
    """Nor their hooks, which nothing runs; where they are called it can."""

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.act = nn.LayerNorm(16, bias=False), nn.Linear(16, 32), nn.GELU()
            self.down, self.dropout = nn.Linear(32, 16), nn.Dropout(0.0)

        def forward(self, x):
            return self.dropout(self.down(self.act(self.up(self.norm(x)))))

    passes, x = [LowRank(scope="mlp", mlp_rank=4), Recompute(from_step=2)], features(3, 16)
    plain, model = Trunk(MLP), Trunk(MLP)
    apply_(plain, passes[:1])
    pipeline = apply_(model, passes)
    for change, text in CHANGES.values():
        change(plain.blocks[0].mlp)
        plain(x)
        twin, its = copy.deepcopy((model, pipeline))
        change(twin.blocks[0].mlp)
        with pytest.raises(PassError, match=text):
            its.lower_(2)
    change, text = CHANGES["eps"]
    change(model.blocks[0].mlp)
    for call in (lambda: model(x), lambda: pipeline.lower_(2)):
        with pytest.raises(PassError, match=text):
            call()
    model = Trunk(MLP)
    CHANGES["hook"][0](model.blocks[0].mlp)
    with pytest.raises(PassError, match=r"blocks\.0\.mlp\.act has a hook \(forward_hooks\)"):
        apply_(model, [passes[0], Recompute()])


def _several(h):
    h = nn.functional.dropout(h, 0.5) + torch.rand_like(h)
    return nn.functional.rrelu(h, training=True) * torch.bernoulli(torch.sigmoid(h))


DRAWS = {
    "several": _several,
    "gumbel_softmax": nn.functional.gumbel_softmax,
    "dropout1d": lambda h: nn.functional.dropout1d(h.unsqueeze(0)).squeeze(0),
    "dropout2d": lambda h: nn.functional.dropout2d(h.view(3, 32, 1, 1)).flatten(1),
    "dropout3d": lambda h: nn.functional.dropout3d(h.view(3, 32, 1, 1, 1)).flatten(1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_what_draws_by_a_function_draws_the_same_again(draw):
    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
            self.same = nn.Sequential(nn.Identity(), nn.Dropout(0.0))

        def forward(self, x):
            return self.down(draw(self.same(torch.tanh(self.up(x)))))

    gradients = []
    for passes in ([], [Recompute()]):
        torch.manual_seed(0)
        model = Trunk(MLP)
        pipeline = apply_(model, [LowRank(scope="mlp", mlp_rank=4), *passes])
        torch.manual_seed(1)
        model(features(3, 16)).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert "recomputed" in pipeline.modules[0].code
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("passes", slow_after(2, MODELS.values()), ids=MODELS)
def test_the_report_says_what_is_kept(passes):
    """As autograd's own hooks count it; without the pass at least so many."""
    width = 64
    model = llama(layers=1, hidden_size=width, intermediate_size=96, num_attention_heads=4)
    (row,) = [row for row in plan(model, [*passes, Recompute()]).rows if row.pass_name == "recompute"]
    after, before = (int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", row.note))
    kept, count = kept_elements(passes, width, 4)
    assert after * count == kept_elements([*passes, Recompute()], width, 4)[0]
    assert after < before <= kept / count


def test_of_lone_linears_it_says_how_little_is_spared():
    class Lone(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x, flag=False):  # which is not traced
            return self.down(torch.tanh(self.up(x)))

    def lone():
        return nn.Sequential(Lone(), Lone())

    cola = Cola(scope="mlp", mlp_rank=4, targets=("*.up", "*.down"))
    report = plan(lone(), [cola, Recompute()])
    notes = [row.note for row in report.rows if row.pass_name == "recompute"][:2]
    # x and the bottleneck behind silu, and not what is in front of it.
    assert notes == [f"a token keeps {n + 4} values for backward, of {n + 8} or more" for n in (16, 32)]
    low_rank = LowRank(scope="mlp", mlp_rank=4, targets=("*.up", "*.down"))
    with pytest.raises(PassError, match="spares nothing, for nothing lies between its bottlenecks"):
        plan(lone(), [low_rank, Recompute()])
    report = plan(
        nn.Sequential(Lone(), *Trunk(lambda: nn.Linear(16, 16)).blocks),
        [LowRank(scope="mlp", mlp_rank=4, targets=("0.up", "0.down", "*.mlp")), Recompute()],
    )
    assert "recompute reaches 33%" in str(report)


def test_where_nothing_can_be_computed_again_it_says_so():
    with pytest.raises(PassError, match="nothing lies between its bottlenecks"):
        plan(nn.Sequential(nn.Linear(8, 8)), [LowRank(mlp_rank=2, scope="mlp", targets=("0",)), Recompute()])


def test_its_graph_is_pickled_in_training_and_as_it_is_evaluated():
    model = llama()
    pipeline = apply_(model, [Cola(attn_rank=8, mlp_rank=8), Recompute()])
    trained = pickle.loads(pickle.dumps(model))
    assert "recomputed" in trained.model.layers[0].code
    with pipeline.evaluation():
        other = pickle.loads(pickle.dumps(model))
    assert "recomputed" not in other.model.layers[0].code
    with torch.no_grad():
        assert torch.equal(trained(tokens()), model(tokens()))
        assert torch.equal(other(tokens()), model(tokens()))


def test_a_graph_that_no_other_process_can_import_is_refused_by_name():
    def local(x):
        return x * 2

    class MLP(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x):
            return self.down(fx_local(self.up(x)))

    fx_local = operation(local)
    model = Trunk(MLP)
    apply_(model, [LowRank(scope="mlp", mlp_rank=4), Recompute(optional=True)])
    with pytest.raises(PassError, match="calls what no other process can import"):
        pickle.dumps(model)
