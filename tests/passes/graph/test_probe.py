"""What a model is called with: refused where it is nothing of the kind, and guessed where nobody says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toys import SwiGLU, features

from act24.passes import Activation24, LowRank, PassError, apply_, plan


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.mark.parametrize("probe", [5, "text"])
def test_a_probe_that_is_none_is_refused(probe: Any) -> None:
    with pytest.raises(PassError, match=r"^probe is .*: give what model\(…\) takes"):
        plan(network(), [Activation24()], probe=probe)


def test_a_probe_without_a_tensor_of_its_own_has_a_name_in_the_report() -> None:
    class Batched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            return self.inner(batch["x"])

    report = plan(Batched(), [Activation24()], probe=({"x": torch.randn(2, 8)},))
    assert report.checked.startswith("checked on the probe: ")


def test_tokens_are_tried_though_blocks_are_registered_first() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.embedding = nn.ModuleList([network(), network()]), nn.Embedding(50, 8)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            for block in self.blocks:
                x = block(x)
            return x

    assert "as a whole was not checked" not in plan(Model(), [Activation24()]).checked


def test_a_guess_that_does_not_fit_is_not_called_a_failure_of_the_module() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(144, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.conv(x)).flatten(1))))

    checked = plan(Pictures(), [Activation24()]).checked
    assert "not checked: Pictures: no input was found that it takes" in checked
    assert "fails" not in checked
    given = plan(Pictures(), [Activation24()], probe=torch.randn(2, 3, 8, 8)).checked
    assert given == "checked on [2, 3, 8, 8]: 1 region computes what its module does, before passes change it"


def test_the_text_of_a_pass_is_no_pass() -> None:
    with pytest.raises(PassError, match="'activation24' is text: write the pass"):
        apply_(network(), ["activation24"])  # type: ignore[list-item]


def test_what_is_left_alone_has_its_own_name() -> None:
    model = network()
    model[0].requires_grad_(False)
    (coverage,) = plan(model, [LowRank(attn_rank=2, mlp_rank=2)]).coverage
    assert coverage.left[0][0] == "0"


def test_rows_of_one_module_are_printed() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.ParameterList([nn.Parameter(torch.randn(8, 8)) for _ in range(3)])
            self.inner = network()

        def forward(self, x: Tensor) -> Tensor:
            for w in self.w:
                x = torch.relu(x @ w)
            return self.inner(x)

    report = plan(Listed(), [LowRank(attn_rank=2, mlp_rank=2)])
    assert str(report).splitlines()[1].split()[:2] == ["low_rank", "w.{0..2}"]
    assert [(row.parameters_before, row.parameters_after) for row in report.rows if row.fqn[:2] == "w."] == [
        (64, 32)
    ] * 3


class Flat(nn.Module):
    """A network of its day, whose last linear wants pictures of one size."""

    def __init__(self, side: int, **told: Any) -> None:
        super().__init__()
        vars(self).update(told)
        self.conv, self.a, self.b = nn.Conv2d(1, 4, 3), nn.Linear(4 * (side - 2) ** 2, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(torch.relu(self.conv(x)).flatten(1))))


@pytest.mark.parametrize(("side", "told"), [(28, {}), (20, {"image_size": 20}), (20, {"img_size": (20, 20)})])
def test_pictures_are_of_the_size_that_a_module_says_or_of_a_usual_one(side: int, told: Any) -> None:
    checked = plan(Flat(side, **told), [Activation24()]).checked
    computes = "1 region computes what its module does, before passes change it"
    assert checked == f"checked on [2, 1, {side}, {side}]: {computes}"


class Configured(nn.Module):
    """As models of `transformers` are: they have a configuration, and names for what they take."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config, self.inner = config_of(**config), network()


def config_of(**values: Any) -> Any:
    return SimpleNamespace(model_type="any", **values)


class Both(Configured):
    main_input_name = "input_ids"

    def forward(self, input_ids: Any = None, pixel_values: Any = None, labels: Any = None) -> Tensor:
        assert input_ids.shape == (2, 8)
        assert input_ids.max() < 30
        assert pixel_values.shape == (2, 1, 12, 16)
        return self.inner(pixel_values.mean((1, 2))[:, :8])


class Either(Both):
    def forward(self, input_ids: Any = None, pixel_values: Any = None) -> Tensor:
        assert pixel_values is None
        return self.inner(torch.nn.functional.one_hot(input_ids % 8, 8).float())


class Sound(Configured):
    main_input_name = "input_values"

    def forward(self, input_values: Tensor, mask: Any = None) -> Tensor:
        frames = input_values.unfold(1, 10, 5).mean(-1).unfold(1, 3, 2).mean(-1)
        assert frames.shape == (2, 16 + 10)  # behind two convolutions
        return self.inner(frames[:, :8])


def test_inputs_are_those_that_a_configuration_tells_of() -> None:
    text, pictures = config_of(vocab_size=30), config_of(image_size=(12, 16), num_channels=1)
    two = {"text_config": text, "vision_config": pictures}
    given = "pixel_values [2, 1, 12, 16], input_ids [2, 8]"
    assert plan(Both(**two), [Activation24()]).checked.startswith(f"checked on {given}: ")
    assert plan(Either(**two), [Activation24()]).checked.startswith("checked on input_ids [2, 8]: ")
    sound = Sound(conv_kernel=(10, 3), conv_stride=(5, 2), mask_time_length=10)
    assert plan(sound, [Activation24()]).checked.startswith("checked on input_values [2, 270]: ")


def test_what_cannot_be_guessed_is_asked_for_by_name() -> None:
    class Odd(Configured):
        main_input_name = "states"

        def forward(self, other: Tensor, states: Any = None, pixel_values: Any = None) -> Tensor:
            return self.inner(states)

    checked = plan(Odd(), [Activation24()]).checked
    assert checked.partition("\n")[0].endswith("give one, probe={'states': …, 'other': …, 'pixel_values': …}")


def test_a_model_of_convolutions_alone_is_said_to_have_no_linear() -> None:
    with pytest.raises(
        PassError, match=r"low_rank matches nothing\. The model has no linear: leave the pass"
    ):
        plan(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), [LowRank(attn_rank=2, mlp_rank=2)])


class Experts(nn.Module):
    """Each row runs through the expert whose gate is largest; experts without rows are not called."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(16, 4, bias=False), nn.ModuleList(SwiGLU() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows, result = x.reshape(-1, 16), torch.zeros_like(x).reshape(-1, 16)
        chosen = self.gate(rows).argmax(-1)
        for index, expert in enumerate(self.experts):
            if (mine := chosen == index).any():
                result[mine] += expert(rows[mine])
        return x + result.view(x.shape)


def test_a_router_may_send_the_probe_to_other_experts_than_before() -> None:
    """What no row reaches then is not read, and is no error but named."""
    torch.manual_seed(0)
    model = nn.Sequential(SwiGLU(), Experts(), nn.LayerNorm(16))
    x = features(1, 3, 16)
    chosen = []
    model[1].gate.register_forward_hook(lambda *given: chosen.append({*given[2].argmax(-1).tolist()}))
    model(x)
    report = apply_(model, [LowRank(scope="mlp", mlp_rank=2)], probe=x).report
    model(x)
    before, after = chosen[0], chosen[-1]
    assert before - after, "the seed should show it"
    idle = [f"1.experts.{index}" for index in range(4) if index not in after]
    assert f"not checked: {idle[0]} and {len(idle) - 1} more: the model runs on the probe" in report.checked
