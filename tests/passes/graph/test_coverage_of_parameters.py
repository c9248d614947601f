"""Coverage counts parameters, and what is said of one of a module is not said of another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toys import SwiGLU, features, llama

from act24.passes import Activation24, Cola, Fp8, Lora, PassError, Relu2FFN, Weight24, plan

RANKS: dict[str, Any] = {"attn_rank": 4, "mlp_rank": 4}


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
    assert reach.left[0][0] == "{0..1}.v"
    assert reach.left[0][2].startswith("its weight is 30 × 64")
    (reach,) = plan(nn.Sequential(Multiplied(), Multiplied()), [Weight24(scope="mlp")]).coverage
    why = {names: reason for names, _, reason in reach.left}
    assert why["{0..1}.v"].startswith("no linear that is traced reads it")
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
    (reach,) = plan(model, [Weight24()], probe=probe).partial
    assert reach.left == (("{0..1}.wq", 1 / 4, reach.left[0][2]),)  # of attention, as the graph shows
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


class Experts(nn.Module):
    """A choice of experts whose matrices lie in two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.dn = nn.Linear(16, 4), *(nn.Parameter(torch.randn(4, 16, 16)) for _ in "ud")

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        y = torch.einsum("btef,efd->bted", F.relu(torch.einsum("btd,edf->btef", x, self.up)), self.dn)
        return x + torch.einsum("bted,bte->btd", y, share)


class Pointwise(nn.Module):
    """Attention whose projections are convolutions of one column."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Conv1d(16, 16, 1) for _ in range(3))
        self.wide, self.out = nn.Conv1d(16, 16, 3, padding=1), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(self.wide(x.mT)).mT for f in (self.query, self.key, self.value))
        return self.out(F.scaled_dot_product_attention(q, k, v))


def test_matrices_that_other_products_read_are_of_what_the_graph_shows() -> None:
    network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))  # of 8 · 16 · 16
    for kind, names, share, why in (
        (Experts, "{0..1}.up", 8 / 24, "stacked parameters"),
        (Pointwise, "{0..1}.{query,key,value}", 6 / 16, "a convolution"),
    ):
        model = nn.Sequential(kind(), kind(), network)
        (reach,) = plan(model, [Weight24()], probe=features(2, 8, 16), check=False).partial
        assert reach.left[0] == (names, pytest.approx(share), reach.left[0][2])
        assert reach.left[0][2].startswith(why)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.second = nn.Linear(16, 32), nn.Bilinear(16, 16, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(self.mix(x, x))))


def test_a_bilinear_is_no_linear_whatever_targets_say() -> None:
    model = nn.Sequential(Both(), Both())
    (reach,) = plan(model, [Weight24()]).coverage
    assert reach.left[0][0] == "{0..1}.mix"
    assert "name it in targets" not in str(reach)
    with pytest.raises(PassError, match=r"0\.mix \[Bilinear\] and 1 more: stacked parameters"):
        plan(model, [Weight24(targets=("*.mix",))])


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


def test_what_targets_name_and_a_pass_leaves_is_less_than_promised() -> None:
    tied: Any = llama(1)
    own = llama(1)
    tied.lm_head.weight = tied.model.embed_tokens.weight
    (reach,) = plan(tied, [Weight24(targets=("lm_head", "*.q_proj"), method="ste")], check=False).partial
    assert (reach.reached, reach.total) == (32 * 32, 32 * 32 + 97 * 32)
    assert reach.left[0][0] == "lm_head"
    assert "tied to model.embed_tokens.weight" in reach.left[0][2]
    for target, idle in {
        "model.embed_tokens": "model.embed_tokens",
        "model.norm": "model.norm",
        "class:Embedding": "class:Embedding",
        "re:.*(embed_tokens|k_proj)": "model.embed_tokens",
        "*.rotary*": "",
    }.items():
        report = plan(own, [Weight24(targets=(target, "*.q_proj"), method="ste")], check=False)
        (reach,) = report.partial  # of what is not there at all too
        assert reach.idle == ((idle,) if idle else ())
    assert "nothing is taken of model.norm: take it out of targets" in str(
        plan(own, [Weight24(targets=("model.norm", "*.q_proj"), method="ste")], check=False)
    )
    for targets in (("re:.*",), ("model.*",), ("class:LlamaForCausalLM", "*.mlp"), ("*_proj", "lm_*")):
        assert not plan(own, [Weight24(targets=targets, method="ste")], check=False).partial
    (reach,) = plan(own, [Cola(scope="mlp", mlp_rank=4, targets=("*.mlp", "*.q_proj"))], check=False).partial
    assert reach.idle == ("*.q_proj",)


class Adapted(nn.Linear):
    """As loralib has it, by F.linear or by products: its factors are parameters."""

    def __init__(self, rows: int, columns: int, by_linear: bool) -> None:
        super().__init__(columns, rows, bias=False)
        self.weight.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(8, columns) / 8)
        self.lora_B = nn.Parameter(torch.zeros(rows, 8))
        self.by_linear = by_linear

    def forward(self, input: Tensor) -> Tensor:
        if self.by_linear:
            return super().forward(input) + F.linear(F.linear(input, self.lora_A), self.lora_B)
        return F.linear(input, self.weight) + (input @ self.lora_A.transpose(0, 1) @ self.lora_B.T) * 2


@pytest.mark.parametrize("by_linear", [True, False])
def test_adapters_that_are_parameters_are_left_alone(by_linear: bool) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = Adapted(32, 16, by_linear), Adapted(16, 32, by_linear)
            self.last = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.last(F.gelu(self.down(F.gelu(self.up(x)))))

    model = nn.Sequential(Layer(), Layer())
    for one in (Weight24(method="ste"), Cola(**RANKS)):
        (reach,) = plan(model, [one], check=False).coverage
        assert (reach.reached, reach.total) == (2 * 16 * 16, 2 * (16 * 16 + 2 * 16 * 32))
        ((names, _, why),) = [group for group in reach.left if group[1]]
        assert (names, why.partition(":")[0]) == ("{0..1}.{up,down}", "frozen")
        with pytest.raises(PassError) as refused:
            plan(model, [replace(one, ignore=("*.last",))], check=False)
        assert "0.up and 3 more: frozen" in str(refused.value)
        assert "no linear" not in str(refused.value)
    if by_linear:
        (reach,) = plan(model, [Weight24(method="ste", targets=("*.lora_A",))], check=False).coverage
        assert (reach.reached, reach.total, reach.partial) == (2 * (8 * 16 + 8 * 32),) * 2 + (False,)


def test_every_matrix_that_a_pass_does_not_reach_is_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)) for _ in range(2)]
            self.layers, self.embed_out = nn.Sequential(*layers), nn.Linear(16, 16)
            self.one, self.pooler = nn.Linear(1, 16), nn.Sequential(nn.Linear(16, 16), nn.Tanh())
            self.words, self.lm_head = nn.Embedding(11, 16), nn.Linear(16, 11)
            self.adapter = nn.ModuleDict({"lora_A": nn.Linear(16, 2), "lora_B": nn.Linear(2, 16)})
            self.gate, self.norm = nn.Linear(16, 1), nn.LayerNorm(16)
            self.lm_head.weight = self.words.weight

        def forward(self, x: Tensor, again: bool = False) -> Tensor:
            hidden = self.layers(self.norm(self.words(x) + self.one(x[..., None].float())))
            hidden = self.adapter["lora_B"](self.adapter["lora_A"](hidden)) + self.embed_out(hidden)
            return self.lm_head(self.pooler(hidden) * self.gate(hidden).sigmoid())

    for one in (Weight24(method="ste"), Cola(**RANKS), Activation24(), Fp8()):
        (reach,) = plan(Model(), [one], check=False).coverage
        assert reach.reached == reach.total == 4 * 16 * 16
        beside = {names: why.partition(":")[0] for names, share, why in reach.left if not share}
        assert beside == {
            "embed_out, one, gate, pooler.0": "neither attention nor feed-forward",
            "lm_head": "the head",
            "adapter.{lora_A,lora_B}": "LoRA's",
        }


@pytest.mark.parametrize("by", ["convolution", "decay", "nothing"])
def test_what_mixes_tokens_is_no_part_of_a_feed_forward_network(by: str) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(16, 16), nn.Linear(16, 16)
            if by == "convolution":
                self.along = nn.Conv1d(16, 16, 3, padding=1, groups=16)
            if by == "decay":
                self.A_log = nn.Parameter(torch.zeros(16))

        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            hidden = self.enter(x)
            hidden = self.along(hidden.mT).mT if by == "convolution" else hidden
            return self.leave(hidden * torch.exp(-self.A_log.exp()) if by == "decay" else hidden)

    model = nn.Sequential(Mixer(), SwiGLU(), Mixer(), SwiGLU())
    (reach,) = plan(model, [Relu2FFN()], check=False).coverage
    assert (reach.reached, reach.partial) == (2 * 3 * 16 * 32, by == "nothing")
    if by != "nothing":  # of which nobody knows what it is
        assert reach.scope == "feed-forward"
        assert reach.left == (("{0,2}.{enter,leave}", 0.0, "neither attention nor feed-forward"),)


def test_mixers_of_bamba_and_falcon_h1_are_not_feed_forward() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 11}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0, "mamba_n_groups": 1}
    sizes |= {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_d_ssm": 64}
    for name, own in (("Bamba", {"attn_layer_indices": []}), ("FalconH1", {})):
        config = getattr(transformers, f"{name}Config")(**sizes, **own)
        model = getattr(transformers, f"{name}ForCausalLM")(config)
        (reach,) = plan(model, [Relu2FFN()], check=False).coverage
        assert (reach.reached, reach.total, reach.partial) == (3 * 32 * 64, 3 * 32 * 64, False)
        assert "model.layers.0.mamba.{in,out}_proj" in {names for names, share, _ in reach.left if not share}


def test_linears_around_which_nothing_is_traced_are_taken_by_name() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(16, 16), nn.Linear(16, 16)

        @torch.enable_grad()
        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.enter(x).cumsum(1))

    todo = "its forward is decorated: name it in targets to take it"
    (reach,) = plan(nn.Sequential(Mixer(), SwiGLU()), [Weight24(method="ste")], check=False).coverage
    assert [(names, why) for names, _, why in reach.left] == [("0.{enter,leave}", f"not traced: {todo}")]
    model = nn.Sequential(Mixer(), Mixer())
    with pytest.raises(PassError, match=todo):
        plan(model, [Cola(**RANKS)], check=False)
    taken = plan(model, [Cola(**RANKS, targets=("*.enter", "*.leave"))], check=False)
    assert [row.fqn for row in taken.rows] == ["0.enter", "0.leave", "1.enter", "1.leave"]
    with pytest.raises(PassError, match="its forward is decorated: give its linears a module of their own"):
        plan(model, [Relu2FFN()], check=False)  # which takes no linear by its name
