"""A curve of many points is drawn with fewer, and nothing that stands out is lost."""

import numpy as np
import pytest

from gaccum_exp.report.page.thinning import kept_places, rounded


@pytest.mark.parametrize(("points", "most"), [(1000, 60), (1000, 600), (997, 61), (100_000, 100)])
def test_every_spike_of_every_column_stays(points: int, most: int) -> None:
    """The least and the greatest of each column, its ends, and no more than was asked for (and ends)."""
    random = np.random.default_rng(points)
    columns = [random.normal(size=points) for _ in range(3)]
    for sign, column in zip((1, -1, 1), columns, strict=True):
        column[random.integers(points)] = sign * 1e6
    kept = kept_places(columns, most)
    assert {0, points - 1} <= set(kept.tolist())
    assert (np.diff(kept) > 0).all()
    assert kept.size <= most + 2
    for column in columns:
        assert (column[kept].min(), column[kept].max()) == (column.min(), column.max())


def test_extremes_of_every_stretch_stay() -> None:
    """Not of the whole curve alone: a naive loop over the buckets finds the same."""
    values = np.random.default_rng(0).normal(size=1000)
    kept = set(kept_places([values], 100).tolist())
    for bucket in np.array_split(np.arange(1000), 25):
        assert max(bucket, key=lambda i: values[i]) in kept
        assert min(bucket, key=lambda i: values[i]) in kept


def test_the_first_steps_are_drawn_finely() -> None:
    """A loss that falls like 1/√k is nowhere far from the line through the points that stay."""
    steps = np.arange(1, 1001)
    losses = 2.3 / np.sqrt(steps)
    kept = kept_places([losses], 60)
    drawn = np.interp(steps, steps[kept], losses[kept])
    assert (np.abs(drawn - losses) < 0.03 * losses).all()


def test_a_loss_that_is_not_finite_breaks_the_line() -> None:
    """A place without a number stays, and takes no extreme's place."""
    values = np.sin(np.arange(1000.0))
    values[500], values[700] = np.nan, np.inf
    kept = kept_places([values], 50)
    assert {500, 700} <= set(kept.tolist())
    assert rounded(values[kept], 3).count(None) == 2
    assert kept_places([np.full(1000, np.nan)], 50).size <= 50 + 2


def test_few_points_stay_as_they_are() -> None:
    """Nothing is left out where there is room."""
    assert kept_places([np.arange(60.0)], 60).tolist() == list(range(60))
