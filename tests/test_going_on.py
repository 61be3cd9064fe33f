"""The study of runs that go on notices whatever could be wrong with one, and accuses nobody else."""

from dataclasses import replace

import pytest
import torch

from experiments.durability.going_on import ROUNDING, apart, equal, held_against
from experiments.durability.ledger import Stored
from gaccum_exp.tracking.metrics import EVAL_LOSS, STEP_TIME_S, TRAIN_LOSS

POINTS = {(TRAIN_LOSS, step): [(1 / step, 7)] for step in range(1, 6)} | {
    (EVAL_LOSS, 5): [(0.5, 7)],
    (STEP_TIME_S, 5): [(0.01, 7)],
}
TRUTH = Stored("a", "N=1", "FINISHED", "s", None, POINTS)


def test_a_run_that_went_on_as_it_should_is_sound() -> None:
    """At other times, and as long as that takes."""
    points = {key: [(value, 9) for value, _ in values] for key, values in POINTS.items()}
    points[STEP_TIME_S, 5] = [(0.02, 9)]
    found = held_against(TRUTH, [replace(TRUTH, run_id="b", points=points)])
    assert (found.sound, found.points) == (True, 6), found


@pytest.mark.parametrize(
    ("kind", "key", "values"),
    [
        ("lost", (TRAIN_LOSS, 3), []),
        ("wrong", (TRAIN_LOSS, 3), [(1 / 3 + 1e-16, 7)]),
        ("doubled", (TRAIN_LOSS, 3), [(1 / 3, 7), (1 / 3, 8)]),
        ("doubled", (STEP_TIME_S, 5), [(0.01, 7), (0.02, 8)]),
        ("wrong", (TRAIN_LOSS, 6), [(0.1, 7)]),
    ],
)
def test_whatever_is_wrong_with_its_points_is_noticed(
    kind: str, key: tuple[str, int], values: list[tuple[float, int]]
) -> None:
    """One that is not there, another bit, twice, a step that never was."""
    found = held_against(TRUTH, [replace(TRUTH, points=POINTS | {key: values})])
    assert getattr(found, kind) == 1, found


def test_another_run_beside_it_is_noticed_and_one_that_never_ended() -> None:
    """Nor may there be none."""
    assert held_against(TRUTH, [TRUTH, TRUTH]).runs_doubled == 1
    assert held_against(TRUTH, []).runs_doubled == 1
    assert held_against(TRUTH, [replace(TRUTH, status="RUNNING")]).running == 1
    assert held_against(TRUTH, [replace(TRUTH, files=frozenset())]).lost == 1


def test_distances_are_those_of_the_farthest_loss_and_of_the_weights() -> None:
    """Over the largest loss, and over the norm."""
    weights, others = {"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 4.5])}
    assert equal(weights, weights)
    assert not equal(weights, others)
    assert apart(TRUTH, TRUTH, weights, weights) == 0.0
    assert apart(TRUTH, TRUTH, weights, others) == pytest.approx(0.1)
    far = replace(TRUTH, points=POINTS | {(TRAIN_LOSS, 5): [(0.2 + 2 * ROUNDING, 7)]})
    assert ROUNDING < apart(TRUTH, far, weights, weights) < 3 * ROUNDING
    without = replace(TRUTH, points={k: v for k, v in POINTS.items() if k != (TRAIN_LOSS, 5)})
    assert apart(TRUTH, without, weights, weights) == float("inf")
