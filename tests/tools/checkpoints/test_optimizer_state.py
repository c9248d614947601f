"""Optimizer state goes out and comes back exactly, where PyTorch's own load_state_dict would round it."""

import json

import pytest
import torch
from torch import nn

from act24.tools.checkpoints import optimizer_state
from act24.tools.checkpoints.manifest import CheckpointError


class Float32Momentum(torch.optim.Optimizer):
    """Momentum in float32 whatever the parameter's dtype, and a plain number in the state."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, {"lr": lr, "betas": (0.9, 0.95), "note": None})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
                    state["updates"] = 0
                state["momentum"].mul_(0.9).add_(parameter.grad.float())
                state["updates"] += 1
                parameter.sub_(group["lr"] * state["momentum"])


def model_of(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2, bias=False)).to(dtype)


def take_steps(model, optimizer, count):
    generator = torch.Generator().manual_seed(count)
    for _ in range(count):
        x = torch.randn(8, 4, generator=generator).to(model[0].weight.dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def carry_over(model, optimizer, fresh_model, fresh_optimizer):
    """What a checkpoint does with the tensors and the table, without the files."""
    tensors, table = optimizer_state.capture(dict(model.named_parameters()), optimizer)
    table = json.loads(json.dumps(table))
    fresh_model.load_state_dict(model.state_dict())
    parameters = dict(fresh_model.named_parameters())
    optimizer_state.check(parameters, fresh_optimizer, table)
    allocated = optimizer_state.allocate(parameters, table)
    assert allocated.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (allocated[name].dtype, allocated[name].shape) == (tensor.dtype, tensor.shape)
        assert allocated[name].device == tensor.device
        assert not allocated[name].requires_grad
        allocated[name].copy_(tensor)
    optimizer_state.assign_(parameters, fresh_optimizer, allocated, table)


ADAMW = {
    "loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True},
    "lr as a tensor": {"lr": torch.tensor(0.01), "foreach": False},
}


@pytest.mark.parametrize("options", ADAMW.values(), ids=ADAMW)
def test_adamw_goes_on_as_if_never_interrupted(options):
    model, fresh = model_of(0), model_of(1)
    optimizer = torch.optim.AdamW(model.parameters(), **{"lr": 0.01, **options})
    other = torch.optim.AdamW(fresh.parameters(), **{"lr": 0.01, **options})
    take_steps(model, optimizer, 3)
    carry_over(model, optimizer, fresh, other)
    take_steps(model, optimizer, 4)
    take_steps(fresh, other, 4)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        for key, value in optimizer.state[ours].items():
            assert torch.equal(value, other.state[theirs][key])


def test_float32_state_of_bfloat16_parameters_is_not_rounded():
    model, fresh = model_of(0, torch.bfloat16), model_of(1, torch.bfloat16)
    optimizer, other = Float32Momentum(model.parameters()), Float32Momentum(fresh.parameters())
    take_steps(model, optimizer, 3)
    carry_over(model, optimizer, fresh, other)
    rounded = Float32Momentum(fresh.parameters())
    rounded.load_state_dict(optimizer.state_dict())
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[ours]["momentum"], other.state[theirs]["momentum"])
        assert other.state[theirs]["updates"] == 3
        assert rounded.state[theirs]["momentum"].dtype == torch.bfloat16  # why load_state_dict is not used


def test_options_come_back_as_they_were_and_a_tensor_stays_the_same_tensor():
    model, fresh = model_of(0), model_of(1)
    optimizer = Float32Momentum(
        [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[1].parameters()}]
    )
    live = torch.tensor(9.0)
    other = Float32Momentum(
        [{"params": fresh[0].parameters(), "lr": live}, {"params": fresh[1].parameters()}]
    )
    optimizer.param_groups[1]["lr"] = torch.tensor(0.25)
    carry_over(model, optimizer, fresh, other)
    assert other.param_groups[0]["lr"] is live
    assert live.item() == 0.5
    assert other.param_groups[1]["lr"] == 0.25
    assert other.param_groups[1]["betas"] == (0.9, 0.95)
    assert other.param_groups[1]["note"] is None
    assert not other.state  # no step was taken, and none is made up


def test_another_optimizer_or_grouping_is_refused():
    model = model_of(0)
    parameters = dict(model.named_parameters())
    _, table = optimizer_state.capture(parameters, torch.optim.AdamW(model.parameters()))
    with pytest.raises(
        CheckpointError, match=r"AdamW over 3 parameters there, SGD over 3 parameters in this run"
    ):
        optimizer_state.check(parameters, torch.optim.SGD(model.parameters()), table)
    grouped = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    with pytest.raises(CheckpointError, match=r"AdamW over 2 \+ 1 parameters in this run"):
        optimizer_state.check(parameters, grouped, table)
