"""Figures by layer against counts made by hand, under the names that the charts have."""

import dataclasses

import pytest
import torch

from act24.tools.run.build import build
from act24.tools.run.processes import Processes
from act24.tools.watch.statistics import (
    SiteStatistics,
    block_weights,
    read_activation_statistics_,
    split_layer,
    weight_sparsity,
)

ALONE = Processes(0, 1, torch.device("cpu"))
ATTENTION = ["attn_q_proj", "attn_k_proj", "attn_v_proj", "attn_o_proj"]


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["passes=[]"], [*ATTENTION, "mlp_gate_proj", "mlp_up_proj", "mlp_down_proj"]),
        ([], [*ATTENTION, "mlp_up_proj", "mlp_down_proj"]),
        (
            ['passes=[{use="low_rank", attn_rank=8, mlp_rank=8, scope="attn"}]'],
            [f"{name}{factor}" for name in ATTENTION for factor in ("_in", "_out")]
            + ["mlp_gate_proj", "mlp_up_proj", "mlp_down_proj"],
        ),
    ],
)
def test_every_weight_of_every_block_has_its_name(tiny, overrides, names):
    built = build(tiny(*overrides), ALONE.device)
    weights = block_weights(built.model)
    assert set(weights) == {f"layer_{layer}/{name}" for layer in (0, 1) for name in names}
    elements = sum(p.numel() for p in built.model.model.layers.parameters() if p.ndim == 2)
    assert sum(weight.numel() for weight in weights.values()) == elements


def test_zeros_in_weights(tiny):
    built = build(tiny(), ALONE.device)
    expected = {}
    generator = torch.Generator().manual_seed(0)
    for index, (name, weight) in enumerate(block_weights(built.model).items()):
        dropped = torch.rand(weight.shape, generator=generator) < index / 20
        weight.data[dropped] = 0.0
        expected[name] = dropped.sum().item() / weight.numel()
    assert weight_sparsity(built.model) == expected


@pytest.mark.parametrize("step", [0, 10])
def test_zeros_in_activations(tiny, step):
    """Dense and 2:4 alike: what 2:4 drops is also counted before it is in force."""
    built = build(tiny(), ALONE.device, step)
    inputs = {}

    def keep(module, arguments, output):
        inputs[module] = output

    norms = [layer.get_submodule("post_attention_layernorm") for layer in built.model.model.layers]
    for norm in norms:
        norm.register_forward_hook(keep)
    for _ in range(2):  # counts add up
        built.model(torch.arange(32).view(2, 16))
    sites = read_activation_statistics_(built.model, ALONE)
    assert [(site.layer, site.site) for site in sites] == [(0, "mlp"), (1, "mlp")]
    for site, norm, layer in zip(sites, norms, built.model.model.layers, strict=True):
        activation = (inputs[norm] @ layer.get_parameter("mlp.up_proj.weight").T).relu().square().double()
        groups = activation.unflatten(-1, (-1, 4)).sort(dim=-1, descending=True).values
        dropped, nonzero = groups[..., 2:], (groups > 0).sum()
        expected = SiteStatistics(
            site.layer,
            "mlp",
            sparsity=1 - (nonzero / activation.numel()).item(),
            crowded_groups=((groups > 0).sum(-1) > 2).double().mean().item(),
            dropped_nonzeros=((dropped > 0).sum() / nonzero).item(),
            dropped_energy=(dropped.square().sum() / groups.square().sum()).item(),
        )
        found = dataclasses.asdict(site)
        for name, value in dataclasses.asdict(expected).items():
            assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), (
                name
            )
    assert read_activation_statistics_(built.model, ALONE) == []  # they were taken


@pytest.mark.parametrize(
    ("fqn", "expected"),
    [
        ("model.layers.11.mlp", (11, "mlp")),
        ("model.layers.3.self_attn.q_proj", (3, "self_attn.q_proj")),
        ("model.layers.3._checkpoint_wrapped_module.mlp", (3, "mlp")),
        ("0.mlp", (0, "mlp")),
        ("lm_head", (None, "lm_head")),
    ],
)
def test_layer_and_place(fqn, expected):
    assert split_layer(fqn) == expected
