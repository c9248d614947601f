"""The module that stands where a region was: its tensors, its copies, its class."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import Block, Relu2MLP, SwiGLU, Trunk, features, llama, stand, tokens

from act24.passes import Activation24, ActivationStatistics, Relu2FFN, apply_
from act24.passes.graph.region import RegionModule


class Rich(nn.Module):
    """Everything that a module may hold: used and unused, frozen, double, buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8, dtype=torch.float64)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.idle = nn.Linear(2, 2)
        self.register_buffer("shift", torch.ones(8))
        self.register_buffer("temporary", torch.full((8,), 2.0), persistent=False)
        self.register_buffer("unread", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.up(self.norm(x) * self.scale + self.shift)).square()
        return self.down(x.double()).float() * self.temporary


def assert_same_tensors(left: nn.Module, right: nn.Module, same: bool) -> None:
    """Equal names in equal order, and `same` tensors or equal ones."""
    for named in ("named_parameters", "named_buffers"):
        a = dict(getattr(left, named)(remove_duplicate=False))
        b = dict(getattr(right, named)(remove_duplicate=False))
        assert list(a) == list(b)
        for name, tensor in a.items():
            assert (tensor is b[name]) == same
            assert torch.equal(tensor, b[name])
            assert tensor.requires_grad == b[name].requires_grad
            assert tensor.dtype == b[name].dtype
    assert list(left.state_dict()) == list(right.state_dict())


def test_every_tensor_of_the_module_stays() -> None:
    model = nn.ModuleList([Rich(), Rich()])
    original = nn.ModuleList(list(model))
    assert_same_tensors(stand(model), original, same=True)


def test_copies_are_whole_and_their_own() -> None:
    model = stand(nn.ModuleList([Rich(), Rich()]))
    duplicate = copy.deepcopy(model)
    assert_same_tensors(model, duplicate, same=False)
    x = features(3, 8)
    assert torch.equal(duplicate[0](x), model[0](x))
    with torch.no_grad():
        model[0].up.weight.zero_()
    assert not torch.equal(duplicate[0](x), model[0](x))
    assert duplicate[0].graph is not model[0].graph
    assert duplicate[0].graph.owning_module is duplicate[0]


def test_copies_share_the_class() -> None:
    model = Trunk(SwiGLU, layers=3)
    pipeline = apply_(model, [Relu2FFN(), Activation24(), ActivationStatistics()])
    duplicate = copy.deepcopy(model)
    classes = {type(m) for m in (*model.modules(), *duplicate.modules()) if isinstance(m, RegionModule)}
    assert len(pipeline.modules) == 3
    assert len(classes) == 1
    x = features(3, 16)
    assert torch.equal(duplicate(x), model(x))
    assert duplicate.state_dict().keys() == model.state_dict().keys()


def test_copies_keep_tied_parameters_tied_and_others_apart() -> None:
    model = stand(nn.ModuleList([Block(SwiGLU()), Block(SwiGLU())]))
    model[1].mlp.up.weight = model[0].mlp.up.weight
    duplicate = copy.deepcopy(model)
    assert duplicate[1].mlp.up.weight is duplicate[0].mlp.up.weight
    assert duplicate[1].mlp.down.weight is not duplicate[0].mlp.down.weight


def test_a_tie_inside_a_region_holds() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)
            self.b = nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x)).square())

    model = nn.ModuleList([Tied()])
    x = features(3, 8)
    expected = model[0](x)
    apply_(model, [Activation24(optional=True)])
    assert model[0].a.weight is model[0].b.weight
    dense = stand(nn.ModuleList([Tied()]))
    dense.load_state_dict(model.state_dict())
    assert torch.equal(dense[0](x), expected)


def test_equal_regions_share_one_class_and_others_do_not() -> None:
    model = nn.ModuleList([Block(SwiGLU()), Block(SwiGLU()), Block(Relu2MLP())])
    stand(model)
    assert type(model[0]) is type(model[1])
    assert type(model[0]) is not type(model[2])
    assert isinstance(model[2], RegionModule)


def test_a_constant_that_differs_is_another_class() -> None:
    class Scaled(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.scale

    model = nn.ModuleList([Scaled(1.0), Scaled(2.0), Scaled(1.0)])
    x = features(3, 4)
    expected = [layer(x) for layer in model]
    stand(model)
    assert type(model[0]) is type(model[2]) is not type(model[1])
    assert all(torch.equal(layer(x), y) for layer, y in zip(model, expected, strict=True))


def test_editing_one_graph_by_hand_leaves_its_siblings_alone() -> None:
    model = stand(Trunk(SwiGLU, layers=2))
    first, second = model.blocks  # type: ignore[misc]
    x = features(3, 16)
    expected = second(x), first(x)
    (output,) = first.graph.find_nodes(op="output")
    with first.graph.inserting_before(output):
        output.args = (first.graph.call_function(torch.neg, (output.args[0],)),)
    first.recompile()
    assert torch.equal(first(x), -expected[1])
    assert torch.equal(second(x), expected[0])


def test_saving_the_whole_model_keeps_classes_shared() -> None:
    model = Trunk(SwiGLU)
    apply_(model, [Relu2FFN(), Activation24()])
    file = io.BytesIO()
    torch.save(model, file)
    assert type(model.blocks[0]) is type(model.blocks[1])
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = features(3, 16)
    assert torch.equal(loaded(x), model(x))


def test_conversion_reaches_every_tensor() -> None:
    model = llama()
    apply_(model, [Relu2FFN(), Activation24(), ActivationStatistics()])
    model.to(torch.float64)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(tokens()).dtype == torch.float64


def test_new_parameters_take_the_dtype_of_what_they_replace_and_train() -> None:
    mlp = SwiGLU().to(torch.bfloat16)
    mlp.down.weight.requires_grad_(False)
    model = nn.ModuleList([mlp])
    apply_(model, [Relu2FFN(targets=("0",))])
    assert model[0].up.weight.dtype == torch.bfloat16
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_every_part_is_kept(training: bool) -> None:
    model = Trunk(Relu2MLP).train(training)
    model.blocks[0].mlp.dropout.train(not training)  # a part that somebody froze
    stand(model)
    assert model.blocks[0].mlp.dropout.training is not training
    model.blocks[0].mlp.dropout.train(training)
    assert {module.training for module in model.modules()} == {training}
