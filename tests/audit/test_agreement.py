"""Do two functions agree to rounding? One rule for accumulation, compiled models and stacked seeds."""

import math

import pytest

from gaccum_exp.audit.agreement import (
    AGAINST_FLOAT64,
    IN_FLOAT64,
    IN_OWN_PRECISION,
    Agreement,
    Tolerance,
)


@pytest.mark.parametrize(
    ("tolerance", "floor", "limit"),
    [
        (IN_FLOAT64, 0.0, 1e-10),
        (IN_FLOAT64, 1e-12, 1e-9),
        (IN_FLOAT64, 1e-3, 1e-7),
        (IN_OWN_PRECISION, 0.0, 4e-15),
        (IN_OWN_PRECISION, 1e-3, 4e-3),
        (AGAINST_FLOAT64, 0.0, 1e-10),
        (AGAINST_FLOAT64, 1e-3, 4e-3),
    ],
)
def test_the_limit_follows_the_floor_between_two_bounds(
    tolerance: Tolerance, floor: float, limit: float
) -> None:
    """Below the first a difference is rounding on any floor; only in float64 there is a second."""
    assert tolerance.limit(floor) == pytest.approx(limit, rel=1e-15)
    assert Agreement(limit * 0.99, floor, tolerance).agrees
    assert not Agreement(limit * 1.01, floor, tolerance).agrees


@pytest.mark.parametrize("tolerance", [IN_FLOAT64, IN_OWN_PRECISION, AGAINST_FLOAT64])
def test_an_error_that_is_no_number_never_agrees(tolerance: Tolerance) -> None:
    """Nor does a floor that is no number excuse anything."""
    assert not Agreement(math.nan, 1e-3, tolerance).agrees
    assert not Agreement(1e-3, math.nan, tolerance).agrees
