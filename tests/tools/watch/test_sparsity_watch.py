"""What is watched of 2:4 training: gradients against exact ones, alarms, and the shares that are reported."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch.nn.functional as F
from rewritten_llama import ALONE, IDS, loss_of, rewritten, scales

from act24.passes import Activation24, ActivationStatistics, Lost, Relu2FFN, Weight24
from act24.tools.watch.sparsity_watch import alarms, gradient_cosines
from act24.tools.watch.statistics import SiteStatistics, read_activation_statistics_, weight_sparsity


def test_gradient_cosines_against_two_models() -> None:
    sparse = Activation24(backward="sparse", token_permutation="none")
    model, pipeline = rewritten(Relu2FFN(), sparse, ActivationStatistics())
    twin, _ = rewritten(Relu2FFN(), replace(sparse, backward="dense"))
    loss_of(model).backward()
    loss_of(twin).backward()
    cosines = gradient_cosines(pipeline, lambda: loss_of(model))
    names = {f"model.layers.{i}.mlp.{linear}.weight" for i in (0, 1) for linear in ("up_proj", "down_proj")}
    assert set(cosines) == names
    for name, cosine in cosines.items():
        a, b = model.get_parameter(name).grad, twin.get_parameter(name).grad
        assert a is not None
        assert b is not None
        assert float(cosine) == pytest.approx(
            float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)), abs=1e-5
        )
        assert 0.5 < float(cosine) < 0.9999
    assert gradient_cosines(rewritten(Relu2FFN(), Activation24())[1], lambda: loss_of(model)) == {}


def test_alarms_name_the_worst() -> None:
    def site(layer: int, dropped: float, feature: float | None = None) -> SiteStatistics:
        return SiteStatistics(layer, "mlp", 0.5, 0.1, 0.1, dropped, feature_dropped_energy=feature)

    assert alarms([site(0, 0.001, 0.002), site(1, 0.0)]) == []
    texts = alarms([site(0, 0.02), site(1, 0.05), site(2, 0.0, 0.3)])
    assert len(texts) == 2
    assert "5.0%" in texts[0]
    assert "layer 1" in texts[0]
    assert "1 other" in texts[0]
    assert "30.0%" in texts[1]
    assert "layer 2" in texts[1]
    assert "others" not in texts[1]


def test_statistics_report_what_the_backward_drops_only_where_there_is_one() -> None:
    for backward, known in (("dense", False), ("split_gemm", True)):
        model, pipeline = rewritten(
            Relu2FFN(), Activation24(method="soft_dynamic", backward=backward), ActivationStatistics()
        )
        pipeline.begin_update_(0, IDS)
        model(IDS)
        sites = read_activation_statistics_(model, ALONE)
        assert [s.layer for s in sites] == [0, 1]
        for site, scale in zip(sites, scales(model), strict=True):
            assert site.scale == pytest.approx(scale)
            assert 0 < site.dropped_energy < site.dropped_nonzeros < site.crowded_groups < 1
            values = (site.feature_dropped_energy, site.feature_dropped_nonzeros, site.dense_feature_energy)
            assert all((value is not None) == known for value in values)


@pytest.mark.parametrize("method", ["transposable", "soft_threshold", "ste"])
def test_weight_sparsity_is_that_of_the_weights_in_force(method: Any) -> None:
    model, pipeline = rewritten(Weight24(scope="mlp", method=method, until_step=5))
    shares = weight_sparsity(model)
    assert {name: share for name, share in shares.items() if "mlp" in name} == {
        f"layer_{i}/mlp_{linear}_proj": 0.5 for i in (0, 1) for linear in ("gate", "up", "down")
    }
    assert {share for name, share in shares.items() if "attn" in name} == {0.0}
    pipeline.lower_(5)
    assert set(weight_sparsity(model).values()) == {0.0}, "the dense finish"


def test_where_no_site_has_a_linear_there_is_no_cosine() -> None:
    """LoST's activation has two branches on either side: its gradients are exact whatever `backward` says."""
    lost = Lost(attn_rank=4, mlp_rank=4, sparsity=0.1, gamma=0.5)
    model, pipeline = rewritten(Relu2FFN(), lost, Activation24(backward="split_gemm"), ActivationStatistics())
    assert gradient_cosines(pipeline, lambda: loss_of(model)) == {}
