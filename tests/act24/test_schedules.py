"""Schedules against printed values of the published runs, and against the properties they are used for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from act24.errors import Act24Error
from act24.schedules import (
    SCHEDULES,
    WSD,
    Constant,
    Cosine,
    CosineRestart,
    Linear,
    constant,
    cosine,
    cosine_restart,
    linear,
    resets_without_rewarm,
    rewarm,
    wsd,
)

# (total, warm-up, lr_adjust_steps, restart_every) of LORO's published scripts.
PUBLISHED = {
    "60m": (10_000, 1000, -1000, 500),
    "130m": (20_000, 2000, -2000, 500),
    "350m": (60_000, 2000, -6000, 500),
    "1b": (100_000, 10_000, -10_000, 200),
}

LORO_60M = {
    0: 0.1,
    1: 0.10086984631039296,
    250: 0.31746157759823856,
    499: 0.5340533088860842,
    500: 1e-6,
    501: 0.10698543103929543,
    502: 0.21396986207859087,
    504: 0.4279387241571817,
    505: 0.5392723867484419,
    999: 0.9689764640825612,
    1000: 0.9728616793536587,
    1499: 0.9931361852650207,
    1500: 1e-6,
    1505: 0.9932991967696483,
    1999: 0.9999999725844325,
    2000: 1e-6,
    2005: 0.9999993146109795,
    5007: 0.7740470846002634,
    9999: 0.1271920708059393,
}

# The learning rates printed by the published 130m run, by update number counted from 1; peak 0.01.
LORO_130M_LOG = {
    1: 0.001,
    500: 0.0031702665444304215,
    1000: 0.005344882320412806,
    2000: 0.009694113872377577,
    2500: 0.009846462876095651,
    4000: 0.009999999931461081,
    5000: 0.009931771204016402,
    15_000: 0.0039616474113309584,
    20_000: 0.0012716518928599786,
    20_001: 1e-08,
}


def loro(size):
    total, warmup, adjust, every = PUBLISHED[size]
    return lambda step: cosine_restart(
        step,
        total_steps=total,
        warmup_steps=warmup,
        min_lr_ratio=0.1,
        restart_every=every,
        lr_adjust_steps=adjust,
    )


@pytest.mark.parametrize("step", LORO_60M)
def test_cosine_restart_is_loros_bit_for_bit(step):
    assert loro("60m")(step) == LORO_60M[step]


@pytest.mark.parametrize("number", LORO_130M_LOG)
def test_cosine_restart_gives_the_printed_rates_of_the_130m_run(number):
    assert 0.01 * loro("130m")(number - 1) == LORO_130M_LOG[number]


def test_without_restarts_in_warmup():
    options = {"total_steps": 100, "warmup_steps": 50, "min_lr_ratio": 0.1, "restart_every": 20}
    values = [cosine_restart(step, **options, restart_in_warmup=False) for step in range(100)]
    assert [step for step in range(100) if values[step] == 1e-6] == [60, 80]


@pytest.mark.parametrize(
    ("size", "expected"),
    [("60m", (1000,)), ("130m", (2000,)), ("350m", tuple(range(2000, 6001, 500))), ("1b", (10_000,))],
)
def test_the_refreshes_of_the_published_runs_that_are_not_rewarmed(size, expected):
    total, _, _, every = PUBLISHED[size]
    assert resets_without_rewarm(loro(size), every=every, total_steps=total) == expected


def test_every_reset_of_a_plain_schedule_is_listed_unless_rewarmed():
    plain = lambda step: constant(step)  # noqa: E731
    assert resets_without_rewarm(plain, every=30, total_steps=100) == (30, 60, 90)
    softened = lambda step: constant(step) * rewarm(step, every=30, warmup_steps=5)  # noqa: E731
    assert resets_without_rewarm(softened, every=30, total_steps=100) == ()
    assert resets_without_rewarm(plain, every=0, total_steps=100) == ()


def test_rewarm_climbs_after_each_reset_and_is_absent_before_the_first():
    values = [rewarm(step, every=10, warmup_steps=4) for step in range(20)]
    assert values[:10] == [1.0] * 10
    assert values[10:] == pytest.approx([1e-6, 0.25, 0.5, 0.75, *[1.0] * 6], abs=1e-6)
    assert rewarm(7, every=0, warmup_steps=4) == 1.0


@settings(deadline=None)  # the first call pays for torch's imports
@given(total=st.integers(2, 500), data=st.data())
def test_cosine_agrees_with_pytorchs_annealing(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    floor = data.draw(st.floats(0, 1))
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total - warmup, eta_min=floor)
    for step in range(warmup, total):
        assert cosine(step, total_steps=total, warmup_steps=warmup, min_lr_ratio=floor) == pytest.approx(
            oracle.get_last_lr()[0], abs=1e-9
        )
        optimizer.step()
        oracle.step()


def test_linear_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    parameter = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = transformers.get_linear_schedule_with_warmup(optimizer, 7, 40)
    for step in range(45):
        assert linear(step, total_steps=40, warmup_steps=7, min_lr_ratio=0.0) == oracle.get_last_lr()[0]
        optimizer.step()
        oracle.step()


@given(total=st.integers(1, 300), data=st.data())
def test_all_stay_between_0_and_1_and_decay_to_the_floor(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    floor = data.draw(st.floats(0.01, 1))
    shape = {"total_steps": total, "warmup_steps": warmup, "min_lr_ratio": floor}
    for schedule in (cosine, linear):
        values = [schedule(step, **shape) for step in range(total + 1)]
        assert all(0 <= value <= 1 + 1e-12 for value in values)
        assert values[warmup] == pytest.approx(1)
        assert values[total] == pytest.approx(floor)
        assert schedule(total + 10, **shape) == values[total]
    values = [cosine_restart(step, **shape, restart_every=10) for step in range(total)]
    assert all(0 < value <= 1 + 1e-12 for value in values)
    assert all(value == 1e-6 for step, value in enumerate(values) if step and step % 10 == 0)


def test_constant_warms_up():
    assert [constant(step, warmup_steps=4) for step in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert constant(0) == 1.0


def test_the_table_holds_every_schedule_under_its_name():
    assert sorted(SCHEDULES) == ["constant", "cosine", "cosine_restart", "linear", "wsd"]
    assert all(schedule.name == name for name, schedule in SCHEDULES.items())


@pytest.mark.parametrize("step", [0, 3, 10, 57, 99])
def test_a_schedule_is_its_function_of_its_options(step):
    given = {"warmup_steps": 10, "min_lr_ratio": 0.2}
    restarts = {
        "restart_every": 20,
        "restart_warmup_steps": 3,
        "lr_adjust_steps": -7,
        "restart_in_warmup": False,
    }
    assert Cosine(**given).multiplier(step, 100) == cosine(step, total_steps=100, **given)
    assert Linear(**given).multiplier(step, 100) == linear(step, total_steps=100, **given)
    assert Constant(**given).multiplier(step, 100) == constant(step, warmup_steps=10)
    made = CosineRestart(**given, **restarts)
    assert made.multiplier(step, 100) == cosine_restart(step, total_steps=100, **given, **restarts)
    plain = CosineRestart(**given, restart_every=20)
    assert plain.multiplier(step, 100) == cosine_restart(step, total_steps=100, **given, restart_every=20)


GOOD = {"total_steps": 100, "warmup_steps": 10, "min_lr_ratio": 0.1}


@pytest.mark.parametrize(
    ("schedule", "change", "named"),
    [
        (cosine, {"warmup_steps": 100}, "warmup_steps"),
        (cosine, {"warmup_steps": -1}, "warmup_steps"),
        (linear, {"min_lr_ratio": 1.5}, "min_lr_ratio"),
        (wsd, {"decay_steps": 91}, "decay_steps"),
        (wsd, {"decay_steps": -1}, "decay_steps"),
        (wsd, {"decay_steps": 9, "decay": "cosine"}, "decay"),
        (cosine_restart, {"restart_every": 0}, "restart_every"),
        (cosine_restart, {"restart_every": 20, "min_lr_ratio": 0.0}, "min_lr_ratio"),
        (cosine_restart, {"restart_every": 20, "lr_adjust_steps": 5}, "lr_adjust_steps"),
        (cosine_restart, {"restart_every": 20, "lr_adjust_steps": -90}, "lr_adjust_steps"),
        (cosine_restart, {"restart_every": 20, "restart_warmup_steps": 21}, "restart_warmup_steps"),
    ],
)
def test_bad_arguments_are_named(schedule, change, named):
    with pytest.raises(Act24Error, match=named):
        schedule(5, **{**GOOD, **change})


def test_a_negative_step_is_refused():
    with pytest.raises(Act24Error, match="step"):
        constant(-1)
    with pytest.raises(Act24Error, match="step"):
        cosine(-1, **GOOD)


@pytest.mark.parametrize("record", [Cosine, Linear, Constant, WSD])
def test_the_zero_of_a_warm_up_can_be_left_out(record):
    """Update k then has the multiplier of k + 1, to the last; without a warm-up there is no zero."""
    plain, ahead = record(warmup_steps=4), record(warmup_steps=4, skip_zero=True)
    assert plain.multiplier(0, 20) == 0
    assert [ahead.multiplier(k, 20) for k in range(20)] == [plain.multiplier(k + 1, 20) for k in range(20)]
    assert record(skip_zero=True).multiplier(0, 20) == record().multiplier(0, 20) == 1


def test_a_restarting_cosine_has_no_zero_to_leave_out():
    plain, same = (CosineRestart(warmup_steps=4, restart_every=5, skip_zero=skip) for skip in (False, True))
    assert [same.multiplier(k, 20) for k in range(20)] == [plain.multiplier(k, 20) for k in range(20)]


@pytest.mark.parametrize("form", ["sqrt", "linear"])
def test_wsd_is_the_published_formula(form):
    """Hägele et al., arXiv 2405.18392: warm-up, 1, and f(t) = 1 - √t or 1 - t over the last steps."""
    record = WSD(warmup_steps=10, decay_steps=25, decay=form, min_lr_ratio=0.0)
    for step in range(100):
        t = (step - 75) / 25
        fall = 1 - (t**0.5 if form == "sqrt" else t) if t > 0 else 1.0
        assert record.multiplier(step, 100) == pytest.approx(min(step / 10, 1.0) if step < 10 else fall)
    assert wsd(100, total_steps=100, warmup_steps=10, decay_steps=25, min_lr_ratio=0.2) == pytest.approx(0.2)
    assert wsd(10**6, total_steps=100, warmup_steps=10, decay_steps=25, min_lr_ratio=0.2) == pytest.approx(
        0.2
    )


def test_wsd_falls_over_a_fifth_unless_it_is_said():
    values = [WSD(min_lr_ratio=0.1).multiplier(step, 50) for step in range(50)]
    assert [step for step, value in enumerate(values) if value < 1] == list(range(41, 50))


def test_wsd_before_its_fall_is_that_of_any_longer_run():
    short, long = WSD(warmup_steps=5, decay_steps=10), WSD(warmup_steps=5, decay_steps=40)
    assert [short.multiplier(k, 100) for k in range(90)] == [long.multiplier(k, 500) for k in range(90)]


def test_wsd_without_a_fall_stays():
    assert {WSD(decay_steps=0).multiplier(step, 20) for step in range(20)} == {1.0}
