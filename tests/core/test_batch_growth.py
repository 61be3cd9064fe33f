"""A batch that grows instead of a rate that falls, against the schedule that it stands for."""

import math
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gaccum_exp.core.batch_growth import grow, growing_accum_steps, rate_factor
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.errors import BadInputError

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 + math.cos(math.pi * done) / 2,
    "warm-up, then cosine": lambda done: (
        (done + 0.02) / 0.22 if done < 0.2 else 0.5 + math.cos(math.pi * (done - 0.2) / 0.8) / 2
    ),
    "steps": lambda done: 0.1 ** ((done >= 0.3) + (done >= 0.6)),
    "linear, to a tenth": lambda done: 1 - 0.9 * done,
    "to nothing half-way": lambda done: max(0.0, 1 - 2 * done),
}


def rates(name: str, steps: int, peak: float = 0.3) -> list[float]:
    return [peak * SCHEDULES[name](step / steps) for step in range(steps)]


@pytest.mark.parametrize(("rule", "power"), [("none", 0.0), ("sqrt", 0.5), ("linear", 1.0)])
def test_a_rate_follows_the_batch_by_a_power_of_it(rule: str, power: float) -> None:
    """Constant, by the square root or in proportion, up and down; at the batch itself exactly one."""
    for share in (0.25, 1 / 3, 1.0, 3.0, 64.0):
        assert rate_factor(rule, share) == pytest.approx(share**power, rel=1e-15)
    assert rate_factor(rule, 1.0) == 1.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("first", "largest"), [(1, 8), (3, 1000), (4, 6)])
def test_rate_and_batch_share_the_fall_of_the_schedule(name: str, first: int, largest: int) -> None:
    """Up to the peak N is the first. From there SGD's rate is the peak's but for what rounding to whole
    micro-batches leaves, less than one of them; Adam's falls by the square root of the batch besides;
    and once N is the largest both fall with the schedule."""
    schedule = rates(name, 60)
    peak = schedule.index(max(schedule))
    found = growing_accum_steps(schedule, first, largest)
    assert found[: peak + 1] == [first] * (peak + 1)
    for n, rate in list(zip(found, schedule, strict=True))[peak + 1 :]:
        alpha = rate / schedule[peak]
        assert first <= n <= largest
        sgd = alpha * rate_factor("linear", n / first)
        assert sgd <= 1 + 1e-8
        assert n == largest or n / (n + 1) < sgd
        assert alpha * rate_factor("sqrt", n / first) == pytest.approx(sgd * math.sqrt(first / n))
    assert found == sorted(found)


def test_a_schedule_of_tenths_is_followed_exactly() -> None:
    """Ten times N at a tenth of the rate, whatever rounding does to 0.1²."""
    found = growing_accum_steps(rates("steps", 10), 2, 1000)
    assert found == [2] * 3 + [20] * 3 + [200] * 4


@pytest.mark.parametrize("rule", ["exact", "carry", "drop"])
@settings(max_examples=60)
@given(
    samples=st.integers(5, 40),
    micro=st.integers(1, 4),
    first=st.integers(1, 3),
    growth=st.integers(1, 9),
    windows=st.integers(2, 30),
    name=st.sampled_from(sorted(SCHEDULES)),
)
def test_a_batch_that_grows_is_fed_the_same_samples_in_the_same_order(
    rule: str, samples: int, micro: int, first: int, growth: int, windows: int, name: str
) -> None:
    """To the last one where none are dropped; and each window has the N and the rate of the schedule at
    the sample at which it begins."""
    first = min(first, samples // micro)
    largest = min(first + growth, samples // micro)
    if not first or largest == first:
        return
    plan = WindowPlan(samples, first * micro, 3, rule)  # type: ignore[arg-type]
    accum_steps = growing_accum_steps(rates(name, windows), first, largest)
    growth_of = grow(plan, accum_steps, micro, "sqrt")
    growing = plan.in_stages(growth_of.stages)
    number = len(growth_of.factors)
    before = [index for k in range(windows) for index in plan.indices(k).tolist()]
    after = [index for k in range(number) for index in growing.indices(k).tolist()]
    if rule == "drop":
        assert all(growing.size(k) == asked(growing, k) for k in range(number))
        end = plan.position(windows - 1) + plan.size(windows - 1)
        assert growing.position(number - 1) + growing.size(number - 1) <= end
        assert growing.position(number) + growing.size(number) > end
    else:
        assert after == before
    begins = {}
    for k in range(windows):
        begins |= dict.fromkeys(range(plan.position(k), plan.position(k) + plan.size(k)), k)
    for k in range(number):
        step, size = growth_of.base_steps[k], asked(growing, k)
        at = growing.position(k)
        assert step == min(begins[p] for p in begins if p >= at and (p == at or rule == "drop"))
        whole = accum_steps[step] * micro
        assert size == whole or (k == number - 1 and size < whole)
        expected = math.sqrt(size / (first * micro))
        assert growth_of.factors[k] == pytest.approx(expected, rel=1e-15)
    assert growth_of.base_steps[-1] == windows
    assert sorted(growth_of.base_steps) == list(growth_of.base_steps)


def asked(plan: WindowPlan, global_step: int) -> int:
    """Samples of a full window there."""
    return plan.stages[plan.stage_of(global_step)].global_batch_size


def test_a_batch_that_grows_takes_fewer_steps() -> None:
    """Under a cosine to zero from N = 1 to 16: 200 windows become 123."""
    plan = WindowPlan(800, 4, 0)
    growth = grow(plan, growing_accum_steps(rates("cosine", 200), 1, 16), 4, "linear")
    assert len(growth.factors) == 123
    assert [stage.global_batch_size for stage in growth.stages][:4] == [4, 8, 12, 16]


def test_windows_that_do_not_divide_the_epoch_are_refused_where_they_must() -> None:
    """Under `error` three micro-batches of four do not divide 800 samples."""
    plan = WindowPlan(800, 4, 0, "error")
    with pytest.raises(BadInputError, match=r"800 samples, which data\.global_batch_size=12 does not"):
        grow(plan, growing_accum_steps(rates("cosine", 200), 1, 16), 4, "linear")
