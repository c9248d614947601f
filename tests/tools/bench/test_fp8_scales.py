"""What `fp8_scales` measures, on operands whose errors are known."""

from __future__ import annotations

from collections import deque

import pytest
import torch

from act24.tools.bench.fp8_scales import Operands, errors, role, rounded

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_formats_round_clamp_and_lose_as_their_definitions_say() -> None:
    """Scale 1: 448 and 57344 are the largest numbers, 2^-9 and 2^-16 the smallest; ties go to even."""
    matrix = torch.tensor([[448.0, 17.0, 2.0**-10, 2.0**-9, 0.0]])
    found = rounded(matrix, 448.0, E4M3)
    assert found.values.tolist() == [[448.0, 16.0, 0.0, 2.0**-9, 0.0]]
    assert (found.lost, found.clamped) == (1 / 4, 0)
    wide = rounded(matrix, 57344.0, E5M2)
    assert wide.values.tolist() == [[448.0, 16.0, 2.0**-10, 2.0**-9, 0.0]]
    assert wide.lost == 0
    late = rounded(torch.tensor([[896.0, 2.0]]), 448.0, E4M3)  # half of the scale that it wants
    assert late.values.tolist() == [[448.0, 2.0]]
    assert late.clamped == 1 / 2


def test_rows_of_unequal_size_gain_by_scales_of_their_own_and_a_late_scale_costs() -> None:
    """x and G with rows of very different sizes: one scale for all makes small ones zero. The last step grew
    eightfold, so a scale of the one before clamps; the largest of 16 does not, where one was larger."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    sizes = torch.logspace(-6, 0, 64, base=4.0)[:, None] ** 2
    operands = Operands(
        (draw(64, 32) * sizes).bfloat16(), draw(16, 32).bfloat16(), (draw(64, 16) * sizes).bfloat16()
    )
    for key, tensor in (("x", operands.x), ("grad", operands.grad)):
        largest = float(tensor.abs().max())
        operands.largest[key] = deque([largest * 2] * 15 + [largest / 8, largest])
    found = {(product, scheme, kind): f for product, scheme, kind, f in errors(operands)}
    assert {key[1] for key in found} == {"tensorwise", "rowwise", "delayed, 1", "delayed, 16"}
    assert {key[2] for key in found if key[0] == "y"} == {E4M3}
    for product in ("dX", "dW"):
        assert found[product, "tensorwise", E5M2].lost < found[product, "tensorwise", E4M3].lost
    for product in ("y", "dX", "dW"):
        assert found[product, "delayed, 1", E4M3].clamped > 0
        assert found[product, "delayed, 1", E4M3].error > 5 * found[product, "tensorwise", E4M3].error
        assert found[product, "delayed, 16", E4M3].clamped == 0
        # Two operands, each off by half of a last bit at most, evenly: 2^-4 / √3 each.
        assert 0.01 < found[product, "rowwise", E4M3].error < 2**-4 * (2 / 3) ** 0.5
    assert found["y", "rowwise", E4M3].lost < found["y", "tensorwise", E4M3].lost
    short = Operands(operands.x, operands.weight, operands.grad)
    short.largest = {key: deque([1.0, 1.0]) for key in ("x", "grad")}
    assert "delayed, 16" not in {scheme for _, scheme, _, _ in errors(short)}


def test_errors_are_those_of_products_in_float64() -> None:
    operands = Operands(
        torch.randn(32, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.randn(32, 16).bfloat16()
    )
    x, w = operands.x.double(), operands.weight.double()
    narrow = [(m / (m.abs().max() / 448)).float().to(E4M3).double() * (m.abs().max() / 448) for m in (x, w)]
    expected = (narrow[0] @ narrow[1].T - x @ w.T).norm() / (x @ w.T).norm()
    (found,) = (f for p, s, _, f in errors(operands) if (p, s) == ("y", "tensorwise"))
    assert found.error == pytest.approx(float(expected), rel=0.02)


def test_places() -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "lm_head")
    assert [role(name) for name in names] == ["attention", "mlp", "head"]
