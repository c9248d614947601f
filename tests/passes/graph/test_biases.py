"""What biases scores is no feed-forward network, and noisy gating is a router, whatever names say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import features

from act24.passes import Activation24, LowRank, PassError, Weight24, plan, trace
from act24.passes.graph.roles import role_by_name

LENGTH = 6


class Biased(nn.Module):
    """Attention of four heads that a network of the distances biases, in a block with a plain network."""

    def __init__(self, scores: Any = None, name: str = "net", sizes: tuple[int, ...] = (2, 32, 4)):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
        between = [part for layer in layers for part in (layer, nn.ReLU())][:-1]
        self.add_module(name, nn.Sequential(*between))
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("coords", features(LENGTH, LENGTH, 2))
        self.scores, self.name = scores, name

    def mixed(self, x: Tensor, scores: Any) -> Tensor:
        split = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        y = scores(self, x, split[0], split[1], split[2])
        return self.proj(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixed(x, self.scores)
        return x + self.fc2(F.relu(self.fc1(x)))


class Hidden(Biased):
    """The same with an argument that keeps it from being traced: its parts are regions."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


def heads(m: Any) -> Tensor:
    return m.net(m.coords).permute(2, 0, 1)


def added(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.mT + 16 * torch.sigmoid(heads(m)).unsqueeze(0)
    return torch.softmax(scores + m.coords[..., 0].tril(), -1) @ v


def masked(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=heads(m))


def scaled(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * heads(m), -1) @ v


def by_batches(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = heads(m).repeat(x.shape[0], 1, 1)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).mT)
    return (scores.softmax(-1) @ v.flatten(0, 1)).unflatten(0, (x.shape[0], 4))


def sigmoids(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(torch.einsum("bhnd,bhmd->bhnm", q, k) + heads(m)) @ v


def of_tokens(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = m.net(x).transpose(1, 2).unsqueeze(-2)
    return torch.softmax(torch.where(m.coords[..., 0] > 2, -1e9, q @ k.mT + bias), -1) @ v


def mixed_heads(m: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(m.net((q @ k.mT).permute(0, 2, 3, 1)).permute(0, 3, 1, 2), -1) @ v


PLAIN = {"fc1": "mlp", "fc2": "mlp", "qkv": "attn", "proj": "attn"}


@pytest.mark.parametrize(
    ("scores", "sizes", "role"),
    [
        (added, (2, 32, 4), "bias"),
        (masked, (2, 32, 32, 4), "bias"),
        (scaled, (2, 4), "bias"),
        (by_batches, (2, 32, 4), "bias"),
        (sigmoids, (2, 32, 4), "bias"),
        (of_tokens, (16, 32, 4), "bias"),
        (mixed_heads, (4, 32, 4), "attn"),
    ],
)
def test_a_graph_shows_what_biases_scores(scores: Any, sizes: tuple[int, ...], role: str) -> None:
    model = nn.Sequential(Biased(scores, sizes=sizes))
    ((region,), unclean) = trace(model)
    assert not unclean
    assert torch.isfinite(model(features(2, LENGTH, 16))).all()
    found = {name.removesuffix(".weight"): kind for name, kind in region.roles.items()}
    assert found == PLAIN | {f"net.{2 * place}": role for place in range(len(sizes) - 1)}


@pytest.mark.parametrize("block", [Biased, Hidden])
def test_passes_leave_a_bias_and_name_it(block: type[Biased]) -> None:
    model = nn.Sequential(block(added), block(added))
    for one in (LowRank(attn_rank=8, mlp_rank=8), Weight24()):
        report = plan(model, [one], check=False)
        assert not [row for row in report.rows if "net" in row.fqn]
        assert ("{0..1}.net.{0,2}", 0.0, "a bias of attention's scores") in report.coverage[0].left
        assert block is Hidden or not report.partial
    assert plan(model, [LowRank(attn_rank=2, mlp_rank=2, targets=("*.net.*",))], check=False).rows
    if block is Biased:
        rows = plan(model, [Activation24()], check=False).rows
        assert [row.reaches for row in rows] == [(f"{n}.fc1.weight", f"{n}.fc2.weight") for n in "01"]
    else:
        with pytest.raises(PassError, match=r"activation24 matches nothing\. Not traced: 0 \[Hidden\]"):
            plan(model, [Activation24()], check=False)
        alone = nn.ModuleList([nn.ModuleDict({"pos_bias": nn.Sequential(*model[0].net)})])  # type: ignore[arg-type]
        with pytest.raises(
            PassError, match="its relu is of a bias of attention's scores: name it in targets"
        ):
            plan(alone, [Activation24()], check=False)
    assert plan(model, [Activation24(targets=("*.net",))], check=False).rows


@pytest.mark.parametrize("name", ["cpb_mlp", "mlp", "continuous_position_bias_mlp", "ffn"])
def test_a_network_beside_queries_whose_widths_are_not_theirs_is_a_bias(name: str) -> None:
    regions, _ = trace(nn.Sequential(Hidden(name=name)))
    found = {f"{r.fqn}.{n}": role for r in regions for n, role in r.roles.items()}
    assert {found[f"0.{name}.{n}.weight"] for n in (0, 2)} == {"bias"}
    regions, _ = trace(nn.Sequential(Hidden(name="mlp", sizes=(16, 32, 16))))
    found = {f"{r.fqn}.{n}": role for r in regions for n, role in r.roles.items()}
    assert {found[f"0.mlp.{n}.weight"] for n in (0, 2)} == {"mlp"}


def test_the_continuous_bias_of_swin_is_left() -> None:
    from transformers import Swinv2Config, Swinv2Model

    sizes: dict[str, Any] = {"image_size": 16, "patch_size": 4, "embed_dim": 16, "window_size": 4}
    model = Swinv2Model(Swinv2Config(depths=[1], num_heads=[2], hidden_act="relu", **sizes))
    (reach,) = plan(model, [LowRank(attn_rank=8, mlp_rank=8)], check=False).coverage
    assert reach.reached == reach.total == 4 * 16 * 16 + 2 * 16 * 64
    assert reach.left[-1][2] == "a bias of attention's scores"


def test_a_rank_above_a_side_names_what_to_ignore() -> None:
    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.wide = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 4)), Wide()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.wide(x) + self.mlp(x[..., :4]).mean(-1, keepdim=True)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc2(F.gelu(self.fc1(x)))

    model = nn.Sequential(Narrow(), Narrow())
    with pytest.raises(PassError, match=r'ignore = \["\*\.mlp\.\*"\]$') as error:
        plan(model, [LowRank(attn_rank=8, mlp_rank=8)])
    assert len(str(error.value)) < 300
    assert plan(model, [LowRank(attn_rank=8, mlp_rank=8, ignore=("*.mlp.*",))]).rows


# Noisy top-k gating


class Gating(nn.Module):
    """arXiv 1701.06538, equations 3 to 5, with matrices by themselves or in linears."""

    w_gate: Any
    w_noise: Any

    def __init__(self, linears: bool, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        for name in ("w_gate", "w_noise"):
            made = nn.Linear(16, 4, bias=False) if linears else nn.Parameter(features(16, 4))
            setattr(self, name, made)
        self.linears, self.choose = linears, choose

    def forward(self, x: Tensor) -> Tensor:
        if self.linears:
            return self.choose(self.w_gate(x), self.w_noise(x))
        return self.choose(x @ self.w_gate, x @ self.w_noise)


def topped(gate: Tensor, noise: Tensor) -> Tensor:
    logits = gate + torch.randn_like(gate) * F.softplus(noise)
    kept, place = logits.topk(2, -1)
    return torch.full_like(logits, float("-inf")).scatter(-1, place, kept).softmax(-1)


def summed(gate: Tensor, noise: Tensor) -> Tensor:
    logits = gate + torch.randn_like(gate) * (F.softplus(noise) + 0.01) + gate.mean(-1, keepdim=True)
    kept, _ = logits.clamp(-9, 9).topk(2, -1)
    return F.softmax(kept, -1)


@pytest.mark.parametrize("choose", [topped, summed])
@pytest.mark.parametrize("linears", [True, False])
def test_both_matrices_of_noisy_gating_are_routers_whatever_they_are_called(
    linears: bool, choose: Any
) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Gating(linears, choose)
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.silu(self.up(x))) * self.mlp(x).sum(-1, keepdim=True)

    model = nn.Sequential(Block(), Block())
    for one in (LowRank(attn_rank=2, mlp_rank=2), Weight24(), LowRank(attn_rank=8, mlp_rank=8)):
        report = plan(model, [one], check=False)
        assert {row.fqn.rpartition(".")[2] for row in report.rows} == {"up", "down"}
        assert report.coverage[0].left[-1][1:] == (0.0, "a router")
    assert plan(model, [LowRank(attn_rank=2, mlp_rank=2, targets=("*w_noise",))], check=False).rows


def test_noisy_gating_that_is_not_traced_is_known_by_its_two_names() -> None:
    class Untraced(Gating):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.training else self.choose(x[..., :4], x[..., :4])

    for linears in (True, False):
        model = nn.ModuleDict({"mlp": nn.ModuleList([Untraced(linears, topped)]), "fc1": nn.Linear(16, 16)})
        report = plan(model, [LowRank(attn_rank=2, mlp_rank=2)], check=False)
        assert [row.fqn for row in report.rows] == ["fc1"]
        assert report.coverage[0].left == (("mlp.0.{w_gate,w_noise}", 0.0, "a router"),)
    around = dict(
        nn.ModuleDict(
            {"mlp": nn.ModuleDict({"gate": nn.Linear(2, 2), "up": nn.Linear(2, 2)})}
        ).named_modules()
    )
    assert role_by_name("mlp.gate", around, "weight") == "mlp"
