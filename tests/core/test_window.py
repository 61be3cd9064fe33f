"""Which samples feed which optimizer step."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gaccum_exp.core.window import BatchStage, WindowPlan, split_sizes
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


@dataclass
class Walked:
    """A window as the walk below finds it."""

    epoch: int
    """In which it begins."""
    start: int
    """Where, of all epochs laid end to end."""
    indices: list[int]
    stage: int


def walk(
    samples: int, stages: list[BatchStage], rule: str, by_step: bool, order: Any, windows: int
) -> list[Walked]:
    """Go through a training's windows one by one: each begins where the one before it ended.

    A new epoch begins when the old one is used up, under `drop` also when it is too short for a window.
    """
    found: list[Walked] = []
    at = 0
    for step in range(windows):
        while True:
            epoch, offset = divmod(at, samples)
            now = step if by_step else epoch
            stage = max(i for i, s in enumerate(stages) if s.start <= now)
            size = stages[stage].global_batch_size
            if rule != "drop" or size <= samples - offset:
                break
            at = (epoch + 1) * samples
        taken = size if rule == "carry" else min(size, samples - offset)
        indices = [order(i // samples)[i % samples] for i in range(at, at + taken)]
        found.append(Walked(epoch, at, indices, stage))
        at += taken
    return found


def orders(samples: int, seed: int) -> Any:
    """The order of every epoch, as windows of whole epochs show it."""
    whole = WindowPlan(samples, samples, seed)
    known: dict[int, list[int]] = {}
    return lambda epoch: known.setdefault(epoch, whole.indices(epoch).tolist())


STAGES = st.tuples(
    st.lists(st.integers(1, 30), min_size=1, max_size=4),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
)


def staged(drawn: tuple[list[int], list[int]], largest: float) -> list[BatchStage]:
    """Stages of some sizes, the first from 0 on; of those that begin together the last holds."""
    sizes, starts = drawn
    pairs = zip([0, *sorted(starts)], sizes, strict=False)
    return [BatchStage(start, int(min(size, largest))) for start, size in pairs]


WINDOWS = 40


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("rule", RULES)
@settings(max_examples=150)
@given(
    samples=st.integers(1, 24),
    drawn=STAGES,
    seed=st.integers(0, 3),
)
def test_windows_of_stages_are_those_of_a_walk(
    rule: str, by_step: bool, samples: int, drawn: Any, seed: int
) -> None:
    """Samples, sizes, stages, ends of epochs, and how many fit, against the walk above."""
    stages = staged(drawn, samples if rule == "drop" else math.inf)
    plan = WindowPlan(samples, stages, seed, rule, by_step=by_step)  # type: ignore[arg-type]
    walked = walk(samples, stages, rule, by_step, orders(samples, seed), WINDOWS)
    for step, window in enumerate(walked):
        assert plan.indices(step).tolist() == window.indices
        assert plan.size(step) == len(window.indices)
        assert plan.stage_of(step) == window.stage
    for step, (window, following) in enumerate(pairwise(walked)):
        assert plan.ends_epoch(step) == (following.epoch > window.epoch)
    begun = [next((k for k, w in enumerate(walked) if w.stage >= i), None) for i in range(len(stages))]
    for start, first in zip(plan.stage_starts, begun, strict=True):
        assert start == first or (first is None and start >= WINDOWS)
    for epochs in range(8):
        if rule == "carry":
            fit = sum(w.start + len(w.indices) <= epochs * samples for w in walked)
        else:
            fit = sum(w.epoch < epochs for w in walked)
        assert plan.steps_in(epochs=epochs) == fit or fit == WINDOWS
    taken = 0
    for step, window in enumerate(walked):
        taken += len(window.indices)
        assert plan.steps_in(samples=taken - 1) == step
        assert plan.steps_in(samples=taken) == step + 1


@pytest.mark.parametrize("by_step", [False, True])
@pytest.mark.parametrize("rule", RULES)
@given(samples=st.integers(1, 24), size=st.integers(1, 30), starts=st.sets(st.integers(1, 9)))
def test_stages_of_equal_size_change_nothing(
    rule: str, by_step: bool, samples: int, size: int, starts: set[int]
) -> None:
    """Window for window the plan without stages, and as many of them."""
    assume(rule != "drop" or size <= samples)
    stages = [BatchStage(start, size) for start in [0, *sorted(starts)]]
    plan = WindowPlan(samples, size, 0, rule)  # type: ignore[arg-type]
    in_stages = replace(plan, global_batch_size=stages, by_step=by_step)
    for step in range(25):
        assert torch.equal(plan.indices(step), in_stages.indices(step))
        assert plan.ends_epoch(step) == in_stages.ends_epoch(step)
        assert plan.is_largest(step) == in_stages.is_largest(step)
        assert plan.steps_in(samples=10 * step) == in_stages.steps_in(samples=10 * step)
        assert plan.steps_in(epochs=step) == in_stages.steps_in(epochs=step)


def test_a_batch_that_grows_is_worked_out_by_hand() -> None:
    """10 samples: two epochs at 4, then at 8; exact, dropped and carried."""
    stages = [BatchStage(0, 4), BatchStage(2, 8)]
    sizes = {
        rule: [WindowPlan(10, stages, 0, rule).size(k) for k in range(9)]  # type: ignore[arg-type]
        for rule in RULES
    }
    assert sizes == {
        "exact": [4, 4, 2, 4, 4, 2, 8, 2, 8],
        "drop": [4, 4, 4, 4, 8, 8, 8, 8, 8],
        "carry": [4, 4, 4, 4, 4, 8, 8, 8, 8],
    }


@pytest.mark.parametrize("rule", RULES)
def test_any_window_of_stages_can_be_asked_for_first(rule: str) -> None:
    """In any order the same, which is what resuming needs."""
    stages = [BatchStage(0, 3), BatchStage(5, 7), BatchStage(9, 2)]
    plan = WindowPlan(11, stages, 0, rule, by_step=True)  # type: ignore[arg-type]
    in_order = [plan.indices(step) for step in range(20)]
    for step in (17, 3, 11, 5, 0):
        again = WindowPlan(11, stages, 0, rule, by_step=True).indices(step)  # type: ignore[arg-type]
        assert torch.equal(again, in_order[step])


def test_the_full_window_is_that_of_the_largest_stage() -> None:
    """Windows of a smaller stage are no measure of time; an epoch bounds them where none is carried."""
    stages = [BatchStage(0, 4), BatchStage(1, 8), BatchStage(2, 2)]
    plan = WindowPlan(16, stages, 0)
    assert plan.largest_batch == plan.full_window == 8
    assert [plan.is_largest(k) for k in range(8)] == [False] * 4 + [True, True] + [False] * 2
    assert WindowPlan(5, stages, 0).full_window == 5
    assert WindowPlan(5, stages, 0, "carry").full_window == 8


@pytest.mark.parametrize("rule", RULES)
@given(data=st.data())
def test_samples_sorted_by_length_stay_in_their_window(rule: str, data: st.DataObject) -> None:
    """The same set, lengths ascending, and each sample with the position it was drawn at."""
    samples = data.draw(st.integers(4, 24))
    size = data.draw(st.integers(1, samples))
    lengths = torch.tensor(data.draw(st.lists(st.integers(1, 5), min_size=samples, max_size=samples)))
    plan = WindowPlan(samples, [BatchStage(0, size), BatchStage(2, samples)], 0, rule)  # type: ignore[arg-type]
    ordered = replace(plan, lengths=lengths)
    control = replace(ordered, control_seed=3)
    for step in range(6):
        drawn = plan.indices(step)
        for chosen in (ordered, control):
            assert torch.equal(drawn[chosen.positions(step)], chosen.indices(step))
            assert sorted(chosen.positions(step).tolist()) == list(range(len(drawn)))
        by_length = lengths[ordered.indices(step)]
        assert torch.equal(by_length, by_length.sort().values)
        # Of equal length, in the order they were drawn in: nothing but the lengths decides.
        expected = sorted(range(len(drawn)), key=lambda i, of=drawn: int(lengths[of[i]]))
        assert ordered.positions(step).tolist() == expected


def test_a_control_of_a_sorted_window_is_permuted() -> None:
    """The same samples in an order of the control's number, no longer by length."""
    lengths = torch.arange(40).flip(0)
    plans = [WindowPlan(40, 20, 0, lengths=lengths, control_seed=c) for c in (None, 0, 1)]
    for step in range(2):
        found = [tuple(plan.indices(step).tolist()) for plan in plans]
        assert len(set(found)) == 3
        assert len({frozenset(order) for order in found}) == 1


def test_a_stage_that_leaves_a_partial_window_is_refused_where_none_is_allowed() -> None:
    """12 samples: 2 and 4 both divide them, and yet the epoch in which 2 becomes 4 has 2 left over."""
    by_epoch = WindowPlan(12, [BatchStage(0, 2), BatchStage(1, 4)], 0, "error")
    assert [by_epoch.size(k) for k in (5, 6)] == [2, 4]
    by_step = WindowPlan(12, [BatchStage(0, 2), BatchStage(2, 4)], 0, "error", by_step=True)
    assert [by_step.size(k) for k in range(4)] == [2, 2, 4, 4]
    with pytest.raises(BadInputError, match=r"step 1, .* becomes 4, .* 10 samples, .*\(2 are left over"):
        WindowPlan(12, [BatchStage(0, 2), BatchStage(1, 4)], 0, "error", by_step=True)
    with pytest.raises(BadInputError, match=r"12 samples.*batch_size=5 "):
        WindowPlan(12, [BatchStage(0, 2), BatchStage(1, 5)], 0, "error")
