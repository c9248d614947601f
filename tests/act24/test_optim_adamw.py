"""AdamW against PyTorch's, against a float64 loop, and through every way of saving its state."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from act24.errors import Act24Error
from act24.optim import AdamW, adam_direction, adamw_, parameter_groups, reset_due, reset_moments_


def tensors(count, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(5, 3), (7,), (2, 2, 2), (1,)][:count]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def run(optimizer, parameters, steps, seed=0):
    """Updates from random gradients, the same for the same seed."""
    for index in range(steps):
        for parameter, gradient in zip(
            parameters, tensors(len(parameters), torch.float64, seed + index), strict=True
        ):
            parameter.grad = gradient.to(parameter.dtype)
        optimizer.step()


def parameters_of(dtype):
    return [nn.Parameter(tensor) for tensor in tensors(4, dtype, seed=99)]


@settings(deadline=None, max_examples=20)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64]),
    lr=st.floats(0, 0.1),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0.5, 0.9999)),
    eps=st.floats(1e-9, 1e-2),
    weight_decay=st.floats(0, 0.5),
    as_tensor=st.booleans(),
)
def test_it_is_pytorchs_adamw(dtype, lr, betas, eps, weight_decay, as_tensor):
    mine, theirs = parameters_of(dtype), parameters_of(dtype)
    options = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
    run(AdamW(mine, lr=torch.tensor(lr, dtype=torch.float64) if as_tensor else lr, **options), mine, 5)
    run(torch.optim.AdamW(theirs, lr=lr, foreach=False, **options), theirs, 5)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-7)


def test_the_direction_is_adams_for_each_element():
    """A scalar loop in plain Python, three updates."""
    (gradient,) = tensors(1, torch.float64, seed=3)
    average, square = torch.zeros_like(gradient), torch.zeros_like(gradient)
    m = v = 0.0
    for step in range(1, 4):
        (direction,) = adam_direction(
            [gradient * step], [average], [square], step=step, betas=(0.9, 0.99), eps=1e-3
        )
        g = gradient[0, 0].item() * step
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        expected = (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.99**step)) + 1e-3)
        assert direction[0, 0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("part", [1, 20, 2**26])
def test_both_paths_follow_one_rule(part, monkeypatch):
    """float32 gradients of float64 parameters take the unfused path, in parts; their values are the same."""
    monkeypatch.setattr("act24.optim.adamw._PART", part)
    results = []
    for mixed in (False, True):
        parameters = tensors(4, torch.float64, seed=1)
        moments = [[torch.zeros_like(p) for p in parameters] for _ in range(2)]
        for step in (1, 2, 3):
            gradients = tensors(4, torch.float32, seed=step)
            gradients = gradients if mixed else [g.double() for g in gradients]
            adamw_(
                parameters,
                gradients,
                *moments,
                step=step,
                lr=0.01,
                betas=(0.9, 0.95),
                eps=1e-8,
                weight_decay=0.1,
            )
        results.append([*parameters, *moments[0], *moments[1]])
    for fused, unfused in zip(*results, strict=True):
        torch.testing.assert_close(fused, unfused, rtol=1e-12, atol=1e-14)


def test_bfloat16_parameters_keep_float32_moments_and_feel_small_decay():
    (start,) = tensors(1, torch.bfloat16)
    parameter = nn.Parameter(start.clone())
    optimizer = AdamW([parameter], lr=1e-2, weight_decay=0.1)
    exact = start.double()
    for _ in range(20):
        parameter.grad = torch.zeros_like(parameter)
        before = parameter.detach().double()
        optimizer.step()
        exact = (before * (1 - 1e-3)).to(torch.bfloat16)  # rounded once, from the exact product
        assert torch.equal(parameter.detach(), exact)
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float32
    assert (1 - 1e-3) * torch.ones((), dtype=torch.bfloat16) == 1  # what a bfloat16 factor would do


@pytest.mark.parametrize("choice", ["float32", "parameter"])
def test_the_second_moment_of_bfloat16_parameters_decays_only_in_float32(choice):
    parameter = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = AdamW([parameter], lr=0.0, betas=(0.9, 0.999), state_dtype=choice)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    square = optimizer.state[parameter]["exp_avg_sq"].float().mean().item()
    parameter.grad = torch.zeros_like(parameter)
    for _ in range(300):
        optimizer.step()
    left = optimizer.state[parameter]["exp_avg_sq"].float().mean().item() / square
    assert left == pytest.approx(0.999**300 if choice == "float32" else 1.0, rel=1e-3)


def test_float64_parameters_have_float64_moments():
    (parameter,) = (nn.Parameter(t) for t in tensors(1, torch.float64))
    optimizer = AdamW([parameter], lr=0.1)
    run(optimizer, [parameter], 1)
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.float64


def test_a_parameter_without_gradient_is_left_alone():
    parameters = parameters_of(torch.float32)
    optimizer = AdamW(parameters, lr=0.1, weight_decay=0.1)
    before = parameters[1].detach().clone()
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer.step()
    assert torch.equal(parameters[1], before)
    assert parameters[1] not in optimizer.state


def test_resets_fall_after_every_nth_update_and_never_before_the_first():
    assert [n for n in range(13) if reset_due(n, 4)] == [4, 8, 12]
    assert not any(reset_due(n, 0) for n in range(13))


def test_a_reset_makes_the_next_update_a_first_one():
    resetting, fresh = parameters_of(torch.float64), parameters_of(torch.float64)
    optimizer = AdamW(resetting, lr=0.01, momentum_reset_steps=3)
    run(optimizer, resetting, 3, seed=0)
    storage = [optimizer.state[p]["exp_avg"].data_ptr() for p in resetting]
    assert all(not optimizer.state[p][name].any() for p in resetting for name in ("exp_avg", "exp_avg_sq"))
    assert (optimizer.param_groups[0]["step"], optimizer.param_groups[0]["updates"]) == (0, 3)
    with torch.no_grad():
        for a, b in zip(fresh, resetting, strict=True):
            a.copy_(b)
    run(optimizer, resetting, 2, seed=50)
    run(torch.optim.AdamW(fresh, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0), fresh, 2, seed=50)
    for a, b in zip(resetting, fresh, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert storage == [optimizer.state[p]["exp_avg"].data_ptr() for p in resetting]


def test_a_reset_of_one_group_leaves_the_other():
    parameters = parameters_of(torch.float32)
    optimizer = AdamW([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)
    run(optimizer, parameters, 2)
    reset_moments_(optimizer, optimizer.param_groups[:1])
    assert [group["step"] for group in optimizer.param_groups] == [0, 2]
    assert not optimizer.state[parameters[0]]["exp_avg"].any()
    assert optimizer.state[parameters[2]]["exp_avg"].any()


def by_state_dict(model, optimizer, fresh):
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def by_distributed_state_dict(model, optimizer, fresh):
    set_optimizer_state_dict(model, fresh, copy.deepcopy(get_optimizer_state_dict(model, optimizer)))


@pytest.mark.parametrize("carry", [by_state_dict, by_distributed_state_dict])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resuming_is_bit_exact(carry, dtype):
    """Saved between two resets, so that counters, moments and the reset's phase all have to survive."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    options = {"lr": 0.01, "momentum_reset_steps": 4}
    optimizer = AdamW(parameter_groups(model, 0.1), **options)

    def train(optimizer, steps):
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
            optimizer.step()

    train(optimizer, range(6))
    fresh = AdamW(parameter_groups(model, 0.1), **options)
    carry(model, optimizer, fresh)
    start = copy.deepcopy(model.state_dict())
    train(optimizer, range(6, 9))
    ends = [p.detach().clone() for p in model.parameters()]
    model.load_state_dict(start)
    train(fresh, range(6, 9))
    for a, b in zip(model.parameters(), ends, strict=True):
        assert torch.equal(a, b)


def test_groups_decay_matrices_but_no_norms_biases_and_embeddings():
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "linear": nn.Linear(4, 3), "norm": nn.RMSNorm(4)})
    groups = parameter_groups(model, 0.1)
    assert [group["name"] for group in groups] == ["decay", "no_decay"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [id(p) for p in groups[0]["params"]] == [id(model["linear"].weight)]
    assert len(groups[1]["params"]) == 3
    both, rest = parameter_groups(model, 0.1, decay="matrices_and_embeddings")
    assert {id(p) for p in both["params"]} == {id(model[name].weight) for name in ("embedding", "linear")}
    assert {id(p) for p in rest["params"]} == {id(model["linear"].bias), id(model["norm"].weight)}
    (everything,) = parameter_groups(model, 0.1, decay="all")
    assert len(everything["params"]) == 4
    model.requires_grad_(False)
    assert parameter_groups(model, 0.1) == []


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"lr": -1.0}, "lr"),
        ({"lr": 0.1, "betas": (1.0, 0.9)}, "betas"),
        ({"lr": 0.1, "eps": 0.0}, "eps"),
        ({"lr": 0.1, "weight_decay": -0.1}, "weight_decay"),
        ({"lr": 0.1, "momentum_reset_steps": -1}, "momentum_reset_steps"),
        ({"lr": math.inf}, "lr"),
        ({"lr": 0.1, "betas": (2, -1)}, "betas"),
        ({"lr": 0.1, "betas": 0.9}, "betas"),
        ({"lr": 0.1, "eps": math.inf}, "eps"),
        ({"lr": 0.1, "momentum_reset_steps": 10**18}, "momentum_reset_steps"),
        ({"lr": 0.1, "state_dtype": "float23"}, "did you mean 'float32'"),
    ],
)
def test_bad_options_are_named(options, named):
    with pytest.raises(Act24Error, match=named):
        AdamW(parameters_of(torch.float32), **options)
    with pytest.raises(Act24Error, match="did you mean 'matrices'"):
        parameter_groups(nn.Linear(2, 2), 0.1, decay="matrixes")


@pytest.mark.parametrize("change", [{"step": 0}, {"betas": (0.9, 1.0)}, {"eps": -1.0}, {"eps": math.nan}])
def test_rules_refuse_numbers_out_of_range(change):
    rows = [tensors(2, torch.float32) for _ in range(4)]
    numbers = {"step": 1, "betas": (0.9, 0.95), "eps": 1e-8} | change
    with pytest.raises(Act24Error, match=next(iter(change))):
        adam_direction(*rows[1:], **numbers)
    with pytest.raises(Act24Error, match=next(iter(change))):
        adamw_(*rows, lr=0.1, weight_decay=0.0, **numbers)
    with pytest.raises(Act24Error, match="every"):
        reset_due(3, -1)
