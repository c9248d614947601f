"""AdamW's update in one pass against its formula in float64, and against the passes that it stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from act24.optim import AdamW, adamw, one_pass


@pytest.fixture(autouse=True)
def usable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "why_not_one_pass", lambda device: "")


def test_the_check_of_a_gpu_sees_that_it_is_right_and_what_would_be_wrong():
    device = torch.device("cpu")
    assert one_pass.agrees(device)
    for wrong in (
        {"weight_decay": 0.0},
        {"betas": (0.9, 0.951)},
        {"betas": (0.901, 0.95)},
        {"lr": 0.011},
        {"eps": 1e-2},
        {"step": 1},
    ):

        def update(each: Any, wrong: dict[str, Any] = wrong, **given: Any) -> None:
            one_pass.update_(each, **given | wrong)

        assert not one_pass.agrees(device, update), wrong


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_optimizer_of_tensors_that_fit_and_others(dtype, as_tensor, monkeypatch):
    """Beside a scalar loop in Python: sizes that are no multiple of anything, a transposed parameter, which
    the kernel does not take, and one without a gradient."""
    start = [torch.randn(3, 700).to(dtype), torch.randn(5).to(dtype), torch.randn(6, 4).to(dtype).T]
    parameters = [nn.Parameter(tensor.clone()) for tensor in start]
    assert not parameters[2].is_contiguous()
    parameters.append(nn.Parameter(torch.ones(2, dtype=dtype)))
    taken = []
    update = one_pass.update_
    monkeypatch.setattr(
        adamw, "update_", lambda each, **given: (taken.append(len(each)), update(each, **given))
    )
    options = {"betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    lr = 0.02
    optimizer = AdamW(parameters, lr=torch.tensor(lr) if as_tensor else lr, **options)
    places = [(0, (2, 699)), (1, (4,)), (2, (3, 5))]
    moments = {place: (0.0, 0.0) for place in places}
    for step in (1, 2, 3):
        before, versions = [p.detach().clone() for p in parameters], [p._version for p in parameters]
        for parameter in parameters[:3]:
            parameter.grad = torch.randn(parameter.shape).to(dtype)
        optimizer.step()
        assert [p._version > v for p, v in zip(parameters, versions, strict=True)] == [
            True,
            True,
            True,
            False,
        ]
        for (index, where), (m, v) in moments.items():
            grad = parameters[index].grad[where].item()
            m, v = 0.8 * m + 0.2 * grad, 0.99 * v + 0.01 * grad * grad
            moments[index, where] = m, v
            direction = m / (1 - 0.8**step) / (math.sqrt(v / (1 - 0.99**step)) + 1e-6)
            value = before[index][where].item()
            expected = value - lr * (direction + 0.3 * value)
            rounding = torch.finfo(dtype).eps * abs(expected)
            assert abs(parameters[index][where].item() - expected) <= rounding + 1e-6
            state = optimizer.state[parameters[index]]
            assert state["exp_avg"][where].item() == pytest.approx(m, rel=1e-5)
            assert state["exp_avg_sq"][where].item() == pytest.approx(v, rel=1e-5)
    assert taken == [2, 2, 2]
    assert torch.equal(parameters[3], torch.ones(2, dtype=dtype))


@pytest.mark.parametrize(
    "words", ["CUDA out of memory. Tried to allocate", "Triton Error [CUDA]: out of memory"]
)
def test_memory_that_ran_out_is_no_finding_about_the_kernel(words, monkeypatch):
    """The check of a GPU, on a CPU that is taken for one: three times there is no memory, then there is."""
    outcomes = iter([RuntimeError(words)] * 3)

    def agrees(device: torch.device) -> bool:
        for error in outcomes:
            raise error
        return check(torch.device("cpu"))

    check = one_pass.agrees
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(one_pass, "agrees", agrees)
    one_pass._found.cache_clear()
    found = [one_pass.why_not_one_pass(torch.device("cuda", 0)) for _ in range(4)]
    assert ["no memory was left" in reason for reason in found] == [True, True, True, False]
    assert found[3] == ""
    monkeypatch.setattr(one_pass, "agrees", lambda _: 1 / 0)  # not asked again
    assert one_pass.why_not_one_pass(torch.device("cuda", 0)) == ""
    one_pass._found.cache_clear()
    for _ in range(2):  # kept, whatever comes of later checks
        reason = one_pass.why_not_one_pass(torch.device("cuda", 0))
        assert reason == "the kernel does not run on this GPU (ZeroDivisionError: division by zero)"
        monkeypatch.setattr(one_pass, "agrees", lambda _: True)
    one_pass._found.cache_clear()


def test_what_is_not_finite_is_seen():
    """A gradient of NaN or infinity makes its own entry NaN, as in the passes, and no other."""
    value = torch.randn(2000).bfloat16()
    for bad in (math.nan, math.inf):
        results = []
        for usable in (True, False):
            parameter = nn.Parameter(value.clone())
            parameter.grad = torch.randn(2000, generator=torch.Generator().manual_seed(1)).bfloat16()
            parameter.grad[1500] = bad
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(adamw, "why_not_one_pass", lambda device, usable=usable: "" if usable else "no")
                AdamW([parameter], lr=0.01).step()
            results.append(parameter.detach())
        assert results[0].isnan().nonzero().tolist() == [[1500]]
        torch.testing.assert_close(*results, equal_nan=True, rtol=0.01, atol=0)
