"""Coverage counts parameters, and what is said of one of a module is not said of another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features, llama

from act24.passes import Cola, Lora, PassError, Weight24, plan

RANKS = {"attn_rank": 4, "mlp_rank": 4}


class Raw(nn.Module):
    """A network whose matrices are its own parameters, one of a size that is no multiple of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(64, 32)), nn.Parameter(torch.randn(30, 64))
        self.u = nn.Linear(30, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.u(F.linear(F.relu(F.linear(x, self.w)), self.v))


class Multiplied(Raw):
    def forward(self, x: Tensor) -> Tensor:
        return self.u(torch.einsum("...i,oi->...o", F.relu(F.linear(x, self.w)), self.v))


def test_one_matrix_of_a_module_does_not_count_for_another() -> None:
    taken, total = 2 * 64 * 32, 2 * (64 * 32 + 30 * 64)
    (reach,) = plan(nn.Sequential(Raw(), Raw()), [Weight24()]).partial
    assert (reach.reached, reach.total) == (taken, total)
    assert reach.left[0][0] == "*.v"
    assert reach.left[0][2].startswith("its weight is 30 × 64")
    (reach,) = plan(nn.Sequential(Multiplied(), Multiplied()), [Weight24(scope="mlp")]).coverage
    why = {names: reason for names, _, reason in reach.left}
    assert why["*.v"].startswith("no linear that is traced reads it")
    # What is left out by name is, and a pass that makes factors does not count for what it leaves either.
    report = plan(nn.Sequential(Raw(), Raw()), [Weight24(ignore=("*.v",))])
    assert report.coverage[0].reached == report.coverage[0].total == taken
    model = nn.Sequential(Raw(), Raw())
    for layer in model:
        layer.v.requires_grad_(False)
    report = plan(model, [Cola(mlp_rank=4, scope="mlp"), Weight24(optional=True)])
    for reach in report.coverage:
        assert (reach.reached, reach.total) == (taken, total)
    assert [row.fqn for row in report.rows if row.pass_name == "cola"] == ["0.w", "1.w"]
    assert {(place, why.partition(":")[0]) for name, place, why in report.misses if name == "cola"} == {
        ("0.v", "frozen"),
        ("1.v", "frozen"),
    }
    # The remedy is of the one matrix.
    report = plan(model, [Cola(mlp_rank=4, scope="mlp", targets=("*.v",))])
    assert [row.fqn for row in report.rows] == ["0.v", "1.v"]
    assert not report.partial


class Heads(nn.Module):
    """Attention whose queries are made by one matrix a head, in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(4, 16, 4) / 4)
        self.wk, self.wv, self.wo = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q = torch.einsum("btd,hde->bhte", x, self.wq)
        k, v = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.wk, self.wv))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.wo(y.transpose(1, 2).flatten(-2))


def test_the_remedy_for_what_no_linear_reads_is_not_to_name_it() -> None:
    model, probe = nn.Sequential(Heads(), Heads()), features(2, 8, 16)
    (reach,) = plan(model, [Weight24()], probe=probe).coverage
    assert reach.left == (("*.wq", 0.0, reach.left[0][2]),)
    assert reach.left[0][2].startswith("stacked parameters")
    assert not reach.unmet
    with pytest.raises(
        PassError, match=r"\['\*.wq'\]\. 0 \[Heads\] and 1 more: stacked parameters"
    ) as refused:
        plan(model, [Weight24(targets=("*.wq",))], probe=probe)
    assert "targets to take" not in str(refused.value)
    (reach,) = plan(model, [Weight24(targets=("*.wq", "*.wk"))], probe=probe).partial
    assert (reach.reached, reach.total) == (2 * 256, 4 * 256)
    (reach,) = plan(model, [Weight24(ignore=("*.wq",))], probe=probe).coverage
    assert not reach.left
    assert not reach.unmet


def test_targets_without_a_linear_are_said_to_have_none() -> None:
    with pytest.raises(PassError, match=r"takes model.embed_tokens \[Embedding\], where no linear is, and"):
        plan(llama(), [Cola(**RANKS, targets=("*.embed_tokens",))])


def test_a_linear_that_another_pass_has_made_factors_of_gives_that_reason() -> None:
    """Also where what is around it is not traced."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=2))
    with pytest.raises(PassError, match="factors that another pass has made") as refused:
        plan(model, [Cola(**RANKS), Lora()])
    assert "ot traced" not in str(refused.value)
    (reach,) = plan(model, [Cola(attn_rank=4, scope="attn"), Lora(targets=("*",))]).partial
    assert "factors that another pass has made" in reach.left[0][2]
