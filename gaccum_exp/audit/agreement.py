"""Do two functions agree to rounding?

Numbers added in another order differ, so no fixed line separates rounding from a fault. The line is
taken from the floor: how far rounding alone moves the same results. Accumulation is held against one
pass this way, a compiled model against the eager one, and stacked seeds against seeds trained alone.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The largest relative difference that rounding explains, as a function of the measured floor."""

    times: float
    """How far above the floor rounding may lie."""
    least: float
    """Differences up to this are rounding, whatever the floor."""
    most: float = math.inf
    """No difference above this is rounding, however high the floor."""

    def limit(self, floor: float) -> float:
        """Return the largest difference that rounding explains."""
        return max(self.least, min(self.times * floor, self.most))


ROUNDING64 = 1e-10
"""The line between rounding in float64 (seen: 1e-16 to 1e-13) and bias (seen: 5e-3 to 1)."""
FAR = 1e3
"""Times the float64 floor beyond which a difference is no rounding."""
NEVER_ROUNDING64 = 1e-7
"""No difference above this is rounding in float64, however far another order of samples moves it."""
RANGE = 4.0
"""Times the floor that rounding may reach, since a few orders underestimate the largest of all."""

IN_FLOAT64 = Tolerance(times=FAR, least=ROUNDING64, most=NEVER_ROUNDING64)
"""Both functions in float64."""
IN_OWN_PRECISION = Tolerance(times=RANGE, least=RANGE * 1e-15)
"""Both functions in the precision of a run."""
AGAINST_FLOAT64 = Tolerance(times=RANGE, least=ROUNDING64)
"""A function in the precision of a run, and the floor too, each against float64."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """A comparison of two functions on the same inputs."""

    error: float
    """Relative distance of their results."""
    floor: float
    """Relative distance that rounding alone gives."""
    tolerance: Tolerance

    @property
    def limit(self) -> float:
        """The largest error that rounding explains."""
        return self.tolerance.limit(self.floor)

    @property
    def agrees(self) -> bool:
        """Whether rounding explains the error; it never explains NaN."""
        return self.error <= self.limit
