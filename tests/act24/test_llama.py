"""The stock LLaMA against `transformers`, the published parameter counts and its own tracing contract."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from act24.errors import Act24Error
from act24.initialise import build_llama
from act24.llama import (
    PRESETS,
    LlamaConfig,
    LlamaDecoderLayer,
    LlamaForCausalLM,
    llama_config,
)
from act24.rotary import rotary_embedding, rotate

TINY = LlamaConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=6
)


def parameter_count(config: LlamaConfig) -> int:
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "millions"),
    [
        ("60m", 58.07),
        ("130m", 134.11),
        ("350m", 367.97),
        ("1b", 1339.08),
        ("3b", 2685.83),
        ("7b", 6738.42),
    ],
)
def test_presets_have_the_published_parameter_counts(size: str, millions: float) -> None:
    assert round(parameter_count(PRESETS[f"llama-{size}"]) / 1e6, 2) == millions


@pytest.mark.parametrize("preset", PRESETS)
def test_parameter_count_of_every_preset_follows_from_its_sizes(preset: str) -> None:
    config = PRESETS[preset]
    width, inner = config.hidden_size, config.intermediate_size
    block = 4 * width * width + 3 * width * inner + 2 * width
    expected = 2 * config.vocab_size * width + config.num_hidden_layers * block + width
    assert parameter_count(config) == expected


def test_tied_embeddings_are_one_parameter() -> None:
    tied = dataclasses.replace(TINY, tie_word_embeddings=True)
    assert parameter_count(TINY) - parameter_count(tied) == TINY.vocab_size * TINY.hidden_size


VARIANTS = {
    "plain": {},
    "grouped": {"num_key_value_heads": 2},
    "tied": {"tie_word_embeddings": True},
    "grouped and tied": {"num_key_value_heads": 3, "tie_word_embeddings": True},
    "biased": {"attention_bias": True, "mlp_bias": True},
    "wide heads": {"head_dim": 20, "rope_theta": 500000.0, "rms_norm_eps": 1e-3},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(variant: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{name: value for name, value in dataclasses.asdict(config).items() if name != "rope_theta"},
            rope_parameters={"rope_theta": config.rope_theta, "rope_type": "default"},
        )
    )
    with torch.no_grad():  # unlike their start, which would hide a dropped bias or norm weight
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    state = theirs.state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    ours = LlamaForCausalLM(config)
    ours.load_state_dict(state)
    input_ids = torch.randint(0, config.vocab_size, (2, 19))

    expected, logits = theirs(input_ids).logits, ours(input_ids)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    probe = torch.randn_like(logits)
    (expected * probe).sum().backward()
    (logits * probe).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(
            gradients[name].grad, parameter.grad, rtol=1e-4, atol=1e-5 * parameter.grad.abs().max().item()
        )


def test_a_token_never_sees_a_later_one() -> None:
    model = build_llama(TINY, seed=0)
    input_ids = torch.randint(0, TINY.vocab_size, (1, 12))
    changed = input_ids.clone()
    changed[0, 7] = (changed[0, 7] + 1) % TINY.vocab_size
    same = (model(input_ids) == model(changed)).all(-1)[0]
    assert same[:7].all()
    assert not same[7:].any()


def test_rotary_scores_depend_on_distance_alone() -> None:
    cos, sin = rotary_embedding(32, 16, 10000.0, torch.device("cpu"))
    query, key = torch.randn(2, 16, dtype=torch.float64)
    scores = rotate(query.expand(32, 16), cos, sin) @ rotate(key.expand(32, 16), cos, sin).T
    for distance in (-9, 0, 5):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5)
    assert scores.diagonal(5)[0] != scores.diagonal(-9)[0]


@pytest.mark.parametrize("variant", VARIANTS)
def test_decoder_layer_traces_for_any_batch_and_sequence(variant: str) -> None:
    config = dataclasses.replace(TINY, **VARIANTS[variant])
    layers = [LlamaDecoderLayer(config) for _ in range(2)]
    traced = [torch.fx.symbolic_trace(layer) for layer in layers]
    assert traced[0].code == traced[1].code  # nothing in the graph tells one layer from another
    leaves = [traced[0].get_submodule(str(n.target)) for n in traced[0].graph.nodes if n.op == "call_module"]
    assert sorted(type(leaf).__name__ for leaf in leaves) == ["Linear"] * 7 + ["RMSNorm"] * 2
    for batch, sequence in ((1, 1), (3, 8), (2, 21)):
        hidden_states = torch.randn(batch, sequence, config.hidden_size)
        cos, sin = rotary_embedding(sequence, config.head_width, config.rope_theta, hidden_states.device)
        for layer, graph in zip(layers, traced, strict=True):
            assert torch.equal(graph(hidden_states, cos, sin), layer(hidden_states, cos, sin))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_forward_follows_float32(autocast: bool) -> None:
    exact = build_llama(llama_config("llama-9m", vocab_size=101), seed=3)
    input_ids = torch.randint(0, 101, (2, 64))
    expected = exact(input_ids)
    model = exact if autocast else build_llama(exact.config, seed=3, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits = model(input_ids)
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).norm() / expected.norm() < 0.02


def test_state_dict_holds_parameters_only() -> None:
    model = LlamaForCausalLM(TINY)
    assert not list(model.buffers())
    assert list(model.state_dict()) == [name for name, _ in model.named_parameters()]


def test_overrides_replace_single_fields() -> None:
    config = llama_config("llama-130m", hidden_size=960, rope_theta=5e5)
    assert (config.hidden_size, config.head_width, config.rope_theta) == (960, 80, 5e5)
    assert dataclasses.replace(config, hidden_size=768, rope_theta=10000.0) == PRESETS["llama-130m"]


@pytest.mark.parametrize(
    ("preset", "overrides", "told"),
    [
        ("llama-130", {}, "'llama-130m'"),
        ("llama-9m", {"hiden_size": 64}, "'hidden_size'"),
        ("llama-9m", {"hidden_size": 130}, "num_attention_heads 4"),
        ("llama-9m", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ("llama-9m", {"hidden_size": 12}, "even head_dim, not 3"),
        ("llama-9m", {"intermediate_size": 0}, "model: intermediate_size .* 1 or more .* got 0"),
        ("llama-9m", {"vocab_size": "32000"}, "vocab_size .* integer, got '32000'"),
        ("llama-9m", {"vocab_size": True}, "vocab_size .* integer, got True"),
        ("llama-9m", {"rope_theta": -1.0}, "rope_theta .* above 0, got -1.0"),
        ("llama-9m", {"rope_theta": float("inf")}, "rope_theta .* got inf"),
        ("llama-9m", {"initializer_range": float("nan")}, "initializer_range .* got nan"),
        (
            "llama-9m",
            {"num_hidden_layers": 10**18},
            "layers .* 10000 at most, got 10{18}$",
        ),
        (
            "llama-9m",
            {"num_hidden_layers": 10**5000},
            "layers .* more than 30 digits",
        ),
        ("llama-9m", {"hidden_size": 10**9}, "hidden_size .* 1e\\+08 at most"),
        ("llama-9m", {"tie_word_embeddings": "yes"}, "tie_word_embeddings .* true or false, got 'yes'"),
        ("llama-9m", {"head_dim": 5}, "even head_dim, not 5"),
    ],
)
def test_bad_configurations_are_named(preset: str, overrides: dict, told: str) -> None:
    with pytest.raises(Act24Error, match=told):
        llama_config(preset, **overrides)
