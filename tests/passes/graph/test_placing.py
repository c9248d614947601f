"""A model that is itself a region stays an instance of its class, with its methods and what it holds."""

from __future__ import annotations

import abc
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SwiGLU, features

from act24.passes import Activation24, LowRank, PassError, Relu2FFN, Weight24, apply_
from act24.passes.graph.region import RegionModule


class Settings:
    def __init__(self) -> None:
        self.scale, self.name = 2.0, "own"


class Registered(nn.Module):
    """Keeps a list of its subclasses."""

    subclasses: list[type] = []  # noqa: RUF012

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Registered.subclasses.append(cls)


class Model(Registered, abc.ABC):
    """Its root is the region: nothing in it repeats."""

    version = 3

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.settings, self.epoch = Settings(), 0
        self.listed = [self.up]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x))) * self.settings.scale

    def loss(self, x: Tensor) -> Tensor:
        return self(x).square().mean()

    def next_epoch(self) -> int:
        self.epoch += 1
        return self.epoch

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def hidden(self, x: Tensor) -> Tensor:
        return self.up(x)


def rewritten(step: int = 0) -> tuple[Model, Any]:
    torch.manual_seed(0)
    model = Model().eval()
    return model, apply_(model, [LowRank(scope="mlp", mlp_rank=4), Activation24(from_step=5)], step=step)


def test_the_model_stays_what_it_is() -> None:
    model, pipeline = rewritten()
    x = features(4, 16)
    for step in (0, 5, 0):
        pipeline.lower_(step)
        assert isinstance(model, Model)
        assert isinstance(model, RegionModule)
        assert type(model).__name__ == "Model"
        assert torch.equal(model.loss(x), model(x).square().mean())
        assert model.device == torch.device("cpu")
        assert (model.version, model.settings.name) == (3, "own")
    assert (model.next_epoch(), model.next_epoch(), model.epoch) == (1, 2, 2)
    assert Registered.subclasses == [Model]


def test_what_the_forward_reads_cannot_be_set() -> None:
    model, _ = rewritten()
    with pytest.raises(PassError, match="settings of a Model cannot be set"):
        model.settings = Settings()
    with pytest.raises(PassError, match=r"in the place of up would not be called"):
        model.up = nn.Linear(16, 32)
    model.settings.scale = 3.0
    with pytest.raises(PassError, match=r"settings\.scale was 2\.0"):
        model(features(4, 16))


def test_a_part_of_it_cannot_be_called_by_itself() -> None:
    model, _ = rewritten()
    with pytest.raises(PassError, match=r"a Linear that a pass has opened cannot be called by itself"):
        model.hidden(features(4, 16))
    with pytest.raises(AttributeError, match="listed"):  # the old module lay there
        _ = model.listed


def test_its_class_makes_stock_models() -> None:
    model, _ = rewritten()
    other = type(model)(8)
    assert type(other) is Model
    assert other.up.in_features == 8


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("step", [0, 5])
def test_copies_are_instances_too(copied: Any, step: int) -> None:
    model, pipeline = rewritten(step)
    with pipeline.evaluation():
        twin = copied(model)
    x = features(4, 16)
    assert isinstance(twin, Model)
    assert type(twin).__name__ == "Model"
    assert torch.equal(twin.loss(x), model.loss(x))
    assert twin.state_dict().keys() == model.state_dict().keys()
    assert [*dict(twin.named_buffers())] == [*dict(model.named_buffers())]
    assert twin.next_epoch() == 1
    assert model.epoch == 0
    with pytest.raises(PassError, match="settings of a Model cannot be set"):
        twin.settings = 1


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = Model()
    before = dict(vars(model))
    with pytest.raises(PassError):
        apply_(model, [LowRank(scope="mlp", mlp_rank=400)])
    assert type(model) is Model
    assert vars(model) == before


def test_a_sequential() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    x = features(4, 16)
    expected = model(x)
    apply_(model, [Weight24(scope="mlp", from_step=5)])
    assert isinstance(model, nn.Sequential)
    assert torch.equal(model(x), expected)
    assert len(model) == 3
    assert model[0].weight.shape == (32, 16)
    for change in (lambda: model.append(nn.ReLU()), lambda: model.insert(0, nn.ReLU()), lambda: model.pop(0)):
        with pytest.raises(PassError, match="of a Sequential would change nothing"):
            change()
    with pytest.raises(PassError, match="would change nothing"):
        model[1] = nn.SiLU()
    with pytest.raises(PassError, match="would change nothing"):
        del model[1]


def test_a_linear() -> None:
    model = nn.Linear(16, 32)
    apply_(model, [LowRank(targets=("re:.*",), **RANKS)])
    assert isinstance(model, nn.Linear)
    assert model(features(4, 16)).shape == (4, 32)


RANKS = {"attn_rank": 2, "mlp_rank": 2}


@pytest.mark.parametrize("name", ["graph", "code", "meta", "print_readable"])
def test_a_name_that_regions_need_is_refused(name: str) -> None:
    model = SwiGLU(16, 32)
    setattr(model, name, 1)
    with pytest.raises(PassError, match=f"has a '{name}', and so does every traced module: rename it"):
        apply_(model, [Relu2FFN()])
    assert type(model) is SwiGLU
    apply_(nn.Sequential(model), [Relu2FFN()])  # as a part of another one


def test_a_model_that_was_compiled_in_place_still_is() -> None:
    model = SwiGLU(16, 32)
    seen: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.append(1)
        return graph.forward

    model.compile(backend=backend)
    apply_(model, [Relu2FFN()])
    model(features(4, 16))
    assert seen == [1]
