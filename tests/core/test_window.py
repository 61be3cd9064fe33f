"""Which samples feed which optimizer step."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gaccum_exp.core.window import WindowPlan, split_sizes
from gaccum_exp.errors import BadInputError

RULES = ("exact", "drop", "carry")


@given(st.integers(0, 300), st.integers(1, 64))
def test_a_split_is_as_even_as_possible_and_loses_nothing(samples: int, steps: int) -> None:
    """min(N, r) parts, none empty, none two samples larger than another."""
    sizes = split_sizes(samples, steps)
    assert sum(sizes) == samples
    assert len(sizes) == min(samples, steps)
    if sizes:
        assert min(sizes) >= 1
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("rule", RULES)
@given(samples=st.integers(1, 60), size=st.integers(1, 70), seed=st.integers(-3, 3))
def test_every_epoch_is_seen_once_up_to_the_rule(rule: str, samples: int, size: int, seed: int) -> None:
    """exact: each sample once an epoch; drop: none twice; carry: the epochs end to end, uncut."""
    if rule == "drop" and samples < size:
        return
    plan = WindowPlan(samples, size, seed, rule)  # type: ignore[arg-type]
    steps = 3 * (samples // size if rule == "drop" else math.ceil(samples / size))
    fetched = torch.cat([plan.indices(step) for step in range(steps)]).tolist()
    if rule == "carry":
        epochs = math.ceil(len(fetched) / samples)
        for epoch in range(epochs - 1):
            assert sorted(fetched[epoch * samples : (epoch + 1) * samples]) == list(range(samples))
        assert len(fetched) == steps * size
        return
    per_epoch = len(fetched) // 3
    for epoch in range(3):
        seen = fetched[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert len(set(seen)) == len(seen) == (samples if rule == "exact" else samples // size * size)


@pytest.mark.parametrize("rule", RULES)
def test_a_window_does_not_depend_on_those_before_it(rule: str) -> None:
    """Any global step can be asked for first, which is what resuming needs."""
    plan = WindowPlan(23, 5, 0, rule)  # type: ignore[arg-type]
    in_order = [plan.indices(step) for step in range(20)]
    for step in (17, 3, 11, 0):
        again = WindowPlan(23, 5, 0, rule).indices(step)  # type: ignore[arg-type]
        assert torch.equal(again, in_order[step])


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    """Another seed or another epoch is another permutation; seed 0 is a seed."""
    plans = [WindowPlan(50, 50, seed) for seed in (0, 1)]
    orders = [plans[0].indices(0), plans[0].indices(1), plans[1].indices(0)]
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], WindowPlan(50, 50, 0).indices(0))


@pytest.mark.parametrize("rule", RULES)
def test_a_control_permutes_the_order_inside_a_window_and_nothing_else(rule: str) -> None:
    """The same samples in every window, each with the position it was drawn at; every number its own."""
    plans = [WindowPlan(23, 8, 0, rule, control_seed=c) for c in (None, 0, 1)]  # type: ignore[arg-type]
    for step in range(8):
        plain, *controls = [plan.indices(step) for plan in plans]
        assert torch.equal(plans[0].positions(step), torch.arange(len(plain)))
        for plan, control in zip(plans[1:], controls, strict=True):
            assert torch.equal(plain[plan.positions(step)], control)
            assert sorted(control.tolist()) == sorted(plain.tolist())
    orders = [tuple(plan.positions(step).tolist()) for plan in plans[1:] for step in range(2)]
    assert len(set(orders)) == 4


@pytest.mark.parametrize("rule", RULES)
@given(samples=st.integers(1, 60), size=st.integers(1, 60), budget=st.integers(1, 400))
def test_a_budget_of_samples_is_used_and_not_exceeded(
    rule: str, samples: int, size: int, budget: int
) -> None:
    """The windows of a budget fit into it, and one more would not."""
    if rule == "drop" and samples < size:
        return
    plan = WindowPlan(samples, size, 0, rule)  # type: ignore[arg-type]
    steps = plan.steps_in(samples=budget)
    taken = sum(len(plan.indices(step)) for step in range(steps))
    assert taken <= budget < taken + len(plan.indices(steps))


def test_epochs_are_whole_epochs() -> None:
    """17 samples at 5: four windows an epoch, three whole ones, or the stream's 34 // 5."""
    counts = {rule: WindowPlan(17, 5, 0, rule).steps_in(epochs=2) for rule in RULES}  # type: ignore[arg-type]
    assert counts == {"exact": 8, "drop": 6, "carry": 6}


@pytest.mark.parametrize(
    ("samples", "size", "rule", "said"),
    [
        (0, 4, "exact", "empty"),
        (10, 4, "error", "10 samples, which data.global_batch_size=4 does not divide"),
        (3, 4, "drop", "3 samples, fewer than data.global_batch_size=4"),
        (3, 4, "error", "3 samples, which data.global_batch_size=4 does not divide"),
    ],
)
def test_what_cannot_be_windowed_is_refused_with_both_numbers(
    samples: int, size: int, rule: str, said: str
) -> None:
    """The message names the rule's key and the two numbers that do not fit."""
    with pytest.raises(BadInputError, match=said):
        WindowPlan(samples, size, 0, rule)  # type: ignore[arg-type]
