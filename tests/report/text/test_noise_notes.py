"""The sentence on whether so large a batch was worth having, on runs that are made up."""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from gaccum_exp.core import noise_scale
from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.text import noise_notes
from gaccum_exp.report.text.noise_notes import say_noise
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]


def measured(
    arm: RunRecord,
    scale: float | None,
    low: float | None,
    high: float | None,
    *,
    windows: int = 64,
    adam: bool = False,
) -> RunRecord:
    """Return the arm with a noise scale at its last measured window; None: not recorded there."""
    steps = tuple(range(1, windows + 1))
    curves = {metrics.NOISE_TRACE: Curve(steps, (1.0,) * windows)}
    if adam:
        curves[metrics.in_adam_metric(metrics.NOISE_TRACE)] = curves[metrics.NOISE_TRACE]
    names = (metrics.NOISE_SCALE, metrics.NOISE_SCALE_LOW, metrics.NOISE_SCALE_HIGH)
    for name, value in zip(names, (scale, low, high), strict=True):
        key = metrics.in_adam_metric(name) if adam else name
        # Before the last window there was always a number.
        curves[key] = Curve(steps[:-1], (7.0,) * (windows - 1))
        if value is not None:
            curves[key] = Curve(steps, (*curves[key].values, value))
    return replace(arm, curves={**arm.curves, **curves})


def said(*arms: RunRecord) -> str:
    return say_noise(compare(arms))


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        (
            (90.0, 70.0, 120.0),
            "The noise scale is 90 samples (70 to 120, 64 windows to step 140 at N = 8): the global "
            "batch of 256 is beyond it. By the model steps ∝ 1 + noise scale/B, half the batch takes "
            "1.26 × the optimizer steps and 0.63 × the samples.",
        ),
        (
            (900.0, 700.0, 1234.5),
            "The noise scale is 900 samples (700 to 1,230, 64 windows to step 140 at N = 8): the global "
            "batch of 256 is below it. By the model steps ∝ 1 + noise scale/B, twice the batch takes "
            "0.61 × the optimizer steps and 1.22 × the samples.",
        ),
        ((250.0, 200.0, 300.0), "is about as large. By the model "),
        ((250.0, 60.0, 900.0), "would tell on which side of it the global batch of 256 is."),
        (
            (None, None, None),
            "The noise scale is not resolved (64 windows to step 140 at N = 8): more windows ",
        ),
        (
            (90.0, 40.0, None),
            "The noise scale is above 40 samples (64 windows to step 140 at N = 8): more windows ",
        ),
        (
            (900.0, 400.0, None),
            "above 400 samples (64 windows to step 140 at N = 8): the global batch of 256 is below it. "
            "By the model steps ∝ 1 + noise scale/B, twice the batch takes at most 0.70 × the optimizer "
            "steps and 1.39 × the samples.",
        ),
    ],
)
def test_a_batch_is_judged_only_where_the_interval_clears_it(
    arm: Arm, interval: tuple[float | None, float | None, float | None], expected: str
) -> None:
    """An end that was recorded earlier, and not at the last window, is none."""
    assert expected in said(arm(1), measured(arm(8), *interval))


def test_the_arm_that_is_told_is_the_one_that_measured_most_and_is_named(arm: Arm) -> None:
    """By the windows in its scale, then by the split, then the first: whatever the intervals are."""
    narrow, wide = (100.0, 90.0, 110.0), (80.0, 40.0, 160.0)
    for more in (64, 200):  # of 200 windows the last 64 tell it
        two, eight = measured(arm(2), *narrow, windows=more), measured(arm(8), *wide)
        assert "The noise scale is 80 samples (40 to 160, 64 windows to step 140 at N = 8)" in said(
            arm(1), two, eight
        )
    fewer = measured(arm(8), *narrow, windows=63)
    assert "at N = 2)" in said(arm(1), measured(arm(2), *wide), fewer)
    seeds = [measured(arm(8, seed=seed), *of) for seed, of in enumerate((wide, narrow))]
    assert "The noise scale is 80 samples (40 to 160, 64 windows to step 140 at N = 8, seed=0)" in said(
        arm(1), *seeds
    )


def test_an_adam_like_optimizers_metric_is_told_with_the_windows_that_have_it(arm: Arm) -> None:
    """The plain scale does not describe Adam, and its first window has no metric yet."""
    plain = measured(arm(8), 90.0, 70.0, 120.0, windows=6)
    trace = metrics.in_adam_metric(metrics.NOISE_TRACE)
    assert trace in metrics.OF_NOISE
    both = measured(plain, 40.0, 30.0, 60.0, windows=6, adam=True)
    later = replace(both, curves={**both.curves, trace: Curve((2, 3, 4, 5, 6), (1.0,) * 5)})
    told = said(arm(1), later)
    assert "40 samples (30 to 60, 5 windows to step 140 at N = 8, in Adam's metric)" in told
    assert "\n" not in told


def test_where_noise_was_on_and_no_window_told_any_the_reason_is_said(arm: Arm) -> None:
    """Not how it is switched on: under a schedule all windows that were trained may have had N = 1."""
    on = {"noise.every_steps": "2"}
    told = said(arm(1, params=on), arm(8, params=on))
    assert told.startswith("No window has told the noise scale: that takes two micro-batches")
    assert "noise.every_steps=8" not in told
    assert said(arm(1, params=on)) == told
    off = {"noise.every_steps": "None"}
    assert "noise.every_steps=8 measures it" in said(arm(1, params=off), arm(8, params=off))


def test_settings_have_a_line_each_and_what_was_not_measured_is_asked_for(arm: Arm) -> None:
    """Where no arm splits its windows there is nothing to ask for."""
    rates = [
        measured(arm(n, run_id=f"{n} {lr}", params={"optimizer.lr": lr}), 90.0, 70.0, 120.0)
        for n in (1, 8)
        for lr in ("0.1", "0.2")
    ]
    lines = said(*rates).splitlines()
    assert [re.match(r".*lr=(0\.\d)", line)[1] for line in lines] == ["0.1", "0.2"]  # type: ignore[index]
    assert "noise.every_steps=8 measures it" in said(arm(1), arm(2))
    assert said(arm(1)) == ""
    assert said(arm(1), arm(2, losses=[])) == ""  # audited, and not trained


def test_the_trap_of_equal_epochs_is_named(arm: Arm) -> None:
    """A larger global batch with fewer optimizer steps; with as many, or with more, there is none."""

    def notes(small: int, large: int) -> str:
        arms = arm(1, global_batch=32, n_losses=small), arm(8, global_batch=256, n_losses=large)
        return " ".join(compare(arms).notes)

    named = (
        "A global batch of 32 had 80 optimizer steps, one of 256 had 10: a loss that is higher there "
    )
    assert named in notes(80, 10)
    assert "optimizer steps" not in notes(80, 80) + notes(10, 80)


def test_the_last_windows_are_those_of_the_recorded_scale() -> None:
    """The report imports nothing of the core, which imports torch."""
    assert noise_notes.TRAILING == noise_scale.TRAILING
