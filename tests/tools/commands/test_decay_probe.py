"""The probe of λ: dense beside sparse, from the same start on the same data."""

from __future__ import annotations

import math

import pytest
from tiny import Tiny

from act24.errors import Act24Error
from act24.passes import Weight24
from act24.tools.commands.decay_probe import BOUNDS, Probe, describe, probe_decays, verdict

WEIGHT24 = 'passes=[{use="weight24", scope="mlp", mask_every=2, weight_gradient="dense"}]'


def test_strong_decay_freezes_the_masks(tiny: Tiny) -> None:
    lines: list[str] = []
    probes = probe_decays(tiny(WEIGHT24), [0.0, 10.0], 12, say=lines.append)
    assert [p.decay for p in probes] == [None, 0.0, 10.0]
    assert probes[0].ratio == 1.0
    assert 0 < probes[0].flip_rate < 0.1
    assert probes[2].flip_rate < probes[1].flip_rate, "dropped weights are pulled to zero and stay dropped"
    for probe in probes[1:]:
        assert probe.ratio == pytest.approx(probe.flip_rate / probes[0].flip_rate)
    assert lines == [describe(p) for p in probes]
    assert all(3 < p.loss < 6 for p in probes)


def test_the_watched_run_is_the_dense_one(tiny: Tiny, tmp_path) -> None:
    from act24.tools.run.train import train

    (dense, *_) = probe_decays(tiny(WEIGHT24), [], 12, say=lambda line: None)
    recipe = tiny("passes=[]", "log.every=6", "eval.every=0")
    outcome = train(recipe, tmp_path / "r")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = EventAccumulator(str(tmp_path / "r")).Reload().Scalars("loss/train")
    assert outcome.finished
    assert dense.loss == pytest.approx(points[1].value, rel=1e-5), "steps 6 to 11"


def test_what_it_refuses(tiny: Tiny) -> None:
    with pytest.raises(Act24Error, match=r"needs a recipe with weight24.* has relu2_ffn, activation24"):
        probe_decays(tiny(), [1e-4], 100)
    with pytest.raises(Act24Error, match="too few"):
        probe_decays(tiny(WEIGHT24), [1e-4], 7)
    recipe = tiny('passes=[{use="weight24", method="ste"}]')
    assert isinstance(recipe.passes[0], Weight24)
    with pytest.raises(Act24Error, match="transposable or sr_ste; this one has method ste"):
        probe_decays(recipe, [1e-4], 100)
    lines: list[str] = []
    with pytest.raises(Act24Error, match="decay has to be 0 or more"):
        probe_decays(tiny(WEIGHT24), [1e-4, -1e-4], 12, say=lines.append)
    assert lines == [], "said before any run"


def test_bounds() -> None:
    assert Probe(1e-4, 0.1, BOUNDS[0], 3.0).healthy
    assert not Probe(1e-4, 0.1, 1.0, 3.0).healthy


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ({1e-5: 1.1, 1e-4: 0.9, 3e-4: 0.7, 1e-3: 0.1}, "μ is within 0.60 to 0.95 for λ = 0.0001, 0.0003"),
        ({1e-4: 1.0, 1e-5: 1.1}, "flip too often: try λ above 0.0001"),
        ({1e-4: 0.1, 1e-5: 0.3}, "flip too seldom: try λ below 1e-05"),
        ({1e-4: 0.1, 1e-5: 0.3, 1e-7: 1.1, 1e-6: 1.0}, "try λ between 1e-06 and 1e-05"),
        ({0.0: 1.1, 1e-4: 0.1}, "try λ between 0 and 0.0001"),
        ({1e-5: 0.3, 1e-4: 1.0}, "take more steps"),
        ({0.0: 0.3}, "take more steps"),
    ],
)
def test_what_to_do_next(ratios: dict[float, float], said: str) -> None:
    dense = Probe(None, 0.1, 1.0, 3.0)
    assert verdict([dense, *(Probe(k, 0.1 * ratio, ratio, 3.0) for k, ratio in ratios.items())]).endswith(
        said
    )


def test_nothing_to_compare_with() -> None:
    still = [Probe(None, 0.0, math.nan, 3.0), Probe(1e-4, 0.1, math.nan, math.inf)]
    assert "flipped nothing" in verdict(still)
    assert still[1].as_dict() == {
        "decay": 1e-4,
        "flip_rate": 0.1,
        "ratio": None,
        "loss": None,
        "healthy": False,
    }
