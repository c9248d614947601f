"""Passes on transformers' models, built from small configurations with random weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from slow import slow_but
from torch import Tensor, nn
from torch.nn import functional as F

from act24.passes import (
    Activation24,
    ActivationStatistics,
    Cola,
    Lost,
    LowRank,
    PassError,
    Pipeline,
    Relu2FFN,
    Weight24,
    apply_,
    plan,
    trace,
)
from act24.passes.graph.normal_form import is_transposed, weight_name
from act24.passes.graph.region import RegionModule
from act24.sparse24.feed_forward.operation import activation24

transformers = pytest.importorskip("transformers", minversion="5")

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GATED = {"Llama": {}, "Qwen2": {}, "Qwen3": {"head_dim": 8}, "Mistral": {}}
OTHERS: dict[str, dict[str, Any]] = {
    "GPT2": {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "OPT": {
        **{k: v for k, v in SIZES.items() if k not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
}


def build(family: str, **more: Any) -> Any:
    """A small model of a family with seeded weights, in evaluation mode."""
    sizes = OTHERS[family] if family in OTHERS else {**SIZES, **GATED[family]}
    special = {"bos_token_id": 1, "eos_token_id": 2} if family == "GPT2" else {}
    config = getattr(transformers, f"{family}Config")(**sizes, **special, **more)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def ids(batch: int = 2, sequence: int = 9) -> Tensor:
    return torch.randint(3, 97, (batch, sequence), generator=torch.Generator().manual_seed(0))


def sparse_by_hand(model: Any) -> Any:
    """The family's own class with its MLPs replaced by modules that say what they should compute."""

    class MLP(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            self.up_proj, self.down_proj = mlp.up_proj, mlp.down_proj

        def forward(self, x: Tensor) -> Tensor:
            groups = F.linear(x, self.up_proj.weight).relu().square().unflatten(-1, (-1, 4))
            ranks = groups.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            return F.linear((groups * (ranks < 2)).flatten(-2), self.down_proj.weight)

    for layer in model.model.layers:
        layer.mlp = MLP(layer.mlp)
    return model


@pytest.fixture(params=GATED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_mlp_is_rewritten_and_computes_what_it_should(family: str) -> None:
    model = build(family)
    report = apply_(model, [Relu2FFN(), Activation24()]).report
    assert [row.fqn for row in report.rows] == 2 * [f"model.layers.{i}.mlp" for i in range(3)]
    assert report.parameters_after == model.num_parameters()
    for layer in model.model.layers:
        calls = [node.target for node in layer.mlp.graph.nodes if node.op == "call_function"]
        assert calls[0] is activation24
        assert type(layer.mlp) is type(model.model.layers[0].mlp)
        assert type(layer.self_attn.q_proj) is nn.Linear  # nothing to do there
    by_hand = sparse_by_hand(copy.deepcopy(model))
    torch.testing.assert_close(model(ids()).logits, by_hand(ids()).logits)


def test_rewritten_models_train(family: str) -> None:
    model = build(family).train()
    apply_(model, [Relu2FFN(), Activation24()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(ids(), labels=ids()).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0] - 0.1


def test_rewritten_models_generate_with_a_cache(family: str) -> None:
    model = build(family)
    apply_(model, [Relu2FFN(), Activation24()])
    given = ids(1, 4)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(given, **options, use_cache=True)
    assert cached.shape == (1, 10)
    tokens = given
    for _ in range(6):
        logits = model(tokens).logits[:, -1].clone()
        logits[:, 2] = -torch.inf  # the end, which min_new_tokens forbids
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), 1)
    assert torch.equal(cached, tokens)


def test_the_host_waits_for_a_generation_once(reads: Any) -> None:
    """At its beginning, to see whether anybody wrote to 2:4 weights; also where that leaves no trace."""
    from transformers import DynamicCache

    model = build("Llama")
    apply_(model, [Weight24()])
    tokens, seen = ids(1, 6), []
    with torch.no_grad():
        for _ in range(2):
            cache = DynamicCache()
            reads.count = 0
            with reads:
                model(tokens[:, :2], past_key_values=cache)
                assert reads.count == 1
                for i in range(2, 6):
                    logits = model(tokens[:, i : i + 1], past_key_values=cache).logits
            assert reads.count == 1
            seen.append(model(tokens).logits[:, -1])
            torch.testing.assert_close(logits[:, -1], seen[-1])
            for parameter in model.parameters():
                parameter.data.copy_(torch.randn(parameter.shape) * 0.1)
    assert not torch.allclose(*seen)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_that_are_written_within_a_generation_are_seen(fused: bool) -> None:
    """By hand, and by an optimizer that leaves no trace in their versions."""
    from transformers import DynamicCache

    model = build("Llama")
    pipeline = apply_(model, [Weight24()])
    cache, token = DynamicCache(), torch.tensor([[5]])
    with torch.no_grad():
        for _ in range(2):
            model(token, past_key_values=cache)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape)
            if not fused:
                parameter.copy_(parameter.grad * 0.1)
        if fused:
            torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
        twin = copy.deepcopy(cache)
        seen = model(token, past_key_values=cache).logits
        with pipeline.evaluation():
            expected = model(token, past_key_values=twin).logits
    assert torch.equal(seen, expected)


def test_state_dict_saves_and_loads(family: str, tmp_path: Any) -> None:
    model = build(family)
    apply_(model, [Relu2FFN(), Activation24()])
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = build(family)
    apply_(other, [Relu2FFN(), Activation24()], seed=1)
    assert not torch.equal(model(ids()).logits, other(ids()).logits)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(model(ids()).logits, other(ids()).logits)


def test_hidden_states_are_still_recorded(family: str) -> None:
    model = build(family)
    apply_(model, [Relu2FFN(), Activation24()])
    output = model(ids(), output_hidden_states=True)
    assert len(output.hidden_states) == 4
    torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
def test_gradient_checkpointing_still_checkpoints_by_block(family: str) -> None:
    model = build(family).train()
    apply_(model, [Relu2FFN(), Activation24()])
    model(ids(), labels=ids()).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    calls = []
    # A hook before forward: recomputing stops as soon as the last saved tensor is there again.
    model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    model(ids(), labels=ids()).loss.backward()
    assert len(calls) == 2  # once forward, once again for backward
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_tied_embeddings_stay_tied() -> None:
    model = build("Llama", tie_word_embeddings=True)
    report = apply_(model, [Relu2FFN()]).report
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert report.parameters_after == model.num_parameters()


def test_biased_mlps() -> None:
    model = build("Llama", mlp_bias=True)
    apply_(model, [Relu2FFN(), Activation24()])
    assert model.model.layers[0].mlp.up_proj.bias.shape == (128,)
    assert model(ids()).logits.isfinite().all()


# Models without a gate


@pytest.mark.parametrize("family", OTHERS)
def test_every_linear_is_in_normal_form(family: str) -> None:
    model = build(family)
    regions, _ = trace(model)
    seen = set()
    for region in regions:
        for node in region.graph.nodes:
            if node.target is F.linear:
                name = weight_name(node)
                assert name in region.parameters
                weight = region.parameters[name]
                seen.add(region.name(name))
                assert is_transposed(node) == (family == "GPT2" and "lm_head" not in region.fqn)
                assert len(weight.shape) == 2
    embeddings = ("wte.weight", "wpe.weight", "embed_tokens.weight", "embed_positions.weight")
    matrices = {
        name
        for name, p in model.named_parameters(remove_duplicate=False)
        if p.ndim == 2 and not name.endswith(embeddings)
    }
    assert seen == matrices


@pytest.mark.parametrize("family", OTHERS)
def test_regions_stand_without_changing_a_number(family: str) -> None:
    model = build(family)
    expected = model(ids()).logits
    state = list(model.state_dict())
    pipeline = Pipeline(model, [], keep_all=True)
    pipeline.commit_()
    assert len(pipeline.modules) == (2 if family == "GPT2" else 0)  # OPT's linears lie bare in the block
    assert torch.equal(model(ids()).logits, expected)
    assert list(model.state_dict()) == state
    assert model.generate(ids(1, 4), max_new_tokens=3, do_sample=False).shape[0] == 1


def test_why_relu2_ffn_does_not_match_gpt2() -> None:
    with pytest.raises(PassError) as error:
        apply_(build("GPT2"), [Relu2FFN()])
    assert str(error.value) == (
        "relu2_ffn matches nothing. transformer.h.0.mlp [GPT2MLP] and 1 more: its activation is gelu, and "
        'nothing gates it: give it relu² (transformers: its activation "relu2"), and use activation24 alone'
    )


def test_why_relu2_ffn_does_not_match_opt() -> None:
    with pytest.raises(PassError) as error:
        apply_(build("OPT"), [Relu2FFN()])
    message = str(error.value)
    assert message.startswith(
        "relu2_ffn matches nothing. Not traced: model.decoder.layers.0 [OPTDecoderLayer] and 2 more"
    )
    with pytest.raises(
        PassError, match=r"\[OPTDecoderLayer\] and 2 more: its relu \(activation_fn\) is not seen: "
    ):
        plan(build("OPT"), [Activation24()])


def test_dropout_of_gpt2_stays_alive() -> None:
    model = build("GPT2", resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0)
    Pipeline(model, [], keep_all=True).commit_()
    mlp = model.transformer.h[0].mlp
    assert isinstance(mlp, RegionModule)
    x = torch.ones(4, 32)
    assert torch.equal(mlp(x), mlp(x))
    model.train()
    assert not torch.equal(mlp(x), mlp(x))


RANKS = {"attn_rank": 8, "mlp_rank": 8}


@pytest.mark.parametrize(
    "passes",
    [
        [Relu2FFN()],
        [Relu2FFN(), Activation24()],
        [LowRank(**RANKS)],
        [Cola(**RANKS)],
        [Lost(**RANKS)],
        [Weight24(from_step=9)],
    ],
    ids=lambda passes: passes[-1].name,
)
@pytest.mark.parametrize("copied", slow_but((True,), [False, True]))
def test_save_pretrained_refuses_what_would_come_back_as_another_model(passes, copied, tmp_path) -> None:
    model = build("Llama")
    apply_(model, passes)
    if copied:
        model = copy.deepcopy(model)
    with pytest.raises(PassError, match=r"act24\.save_pretrained\(pipeline, folder\)") as error:
        model.save_pretrained(tmp_path / "out")
    assert passes[-1].name in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_save_pretrained_writes_what_no_pass_has_changed(tmp_path) -> None:
    model = build("Llama", hidden_act="relu")
    expected = model(ids()).logits
    apply_(model, [ActivationStatistics(optional=True)])
    model.save_pretrained(tmp_path)
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(back(ids()).logits, expected)


@pytest.mark.parametrize("method", ["naive", "mvue"])
def test_padding_is_read_from_the_attention_mask(method: str) -> None:
    """Also where no pass has anything to renew: statistics and weight gradients leave padding out. A forward
    without a mask has none again, and a copy neither."""
    ids = torch.randint(97, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 8).long().expand(4, 12)
    labels = ids.masked_fill(mask == 0, -100)

    def trained(told: bool) -> tuple[Any, Any, dict[str, Tensor]]:
        model = build("Llama").train()
        sparse = Activation24(method=method, backward="split_gemm", kernels=False)
        pipeline = apply_(model, [Relu2FFN(), sparse, ActivationStatistics()])
        pipeline.begin_update_(0)
        pipeline.set_pads_(None if told else mask == 0)
        model(input_ids=ids, labels=labels, **({"attention_mask": mask} if told else {})).loss.backward()
        found = {n: b.clone() for n, b in model.named_buffers() if n.endswith("activation_statistics")}
        found |= {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return model, pipeline, found

    expected, (model, _, found) = trained(False)[2], trained(True)
    assert any(n.endswith("activation_statistics") for n in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-4, msg=name)

    def pads(model: Any) -> list[int]:
        return [b.ndim for n, b in model.named_buffers() if n.endswith("pad_rows")]

    assert {*pads(model)} == {2}
    duplicate = copy.deepcopy(model)
    assert {*pads(duplicate)} == {0}
    model(input_ids=ids)
    assert {*pads(model)} == {0}
    if method == "naive":
        duplicate(input_ids=ids[:2, :5]).logits.sum().backward()
