"""From what was measured to a verdict, its cause and what to do about it."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gaccum_exp.audit import result
from gaccum_exp.audit.result import Culprit, ParameterError, Verdict
from gaccum_exp.core.gradient import Gradient, distance, dot, gaps, norm, relative

ROUNDING64 = 1e-10
"""The line between rounding in float64 (seen: 1e-16 to 1e-13) and bias (seen: 5e-3 to 1)."""
FAR = 1e3
"""How far above the measured float64 floor a difference is none of rounding any more."""
NEVER_ROUNDING64 = 1e-7
"""No difference above this is rounding in float64, however far another order of the samples moves it."""
RANGE = 4.0
"""How far e may exceed the floor, which as the largest of a few orders underestimates that of all."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The distances that a verdict rests on."""

    identical: bool
    e: float
    """In the run's precision, draws held where they can be."""
    floor: float
    """How much of g_1 is rounding: its distance to other summation orders and to float64."""
    e64: float
    floor64: float
    hidden64: bool = False
    """Whether a parameter too small to be seen in e64 differs beyond its own rounding."""

    @property
    def same_function(self) -> bool | None:
        """Whether the two gradients are equal but for rounding; None: not known."""
        if not math.isfinite(self.e64):
            return None
        line = max(ROUNDING64, min(FAR * self.floor64, NEVER_ROUNDING64))
        return self.e64 <= line and not self.hidden64

    @property
    def in_range(self) -> bool:
        """Whether e is what rounding makes in this precision."""
        return self.e <= self.limit

    @property
    def limit(self) -> float:
        """The largest e that rounding explains."""
        return RANGE * max(self.floor, 1e-15)


def parameter_errors(one: Gradient, reference: Gradient) -> tuple[ParameterError, ...]:
    """Return each parameter's part in the difference, the largest first."""
    total = norm(reference)
    rows = []
    for name, gap in gaps(one, reference):
        of_gap = norm({name: gap})
        of_own = norm({name: reference[name]}) if name in reference else 0.0
        rows.append(ParameterError(name, relative(of_gap, of_own), relative(of_gap, total), of_own))
    return tuple(sorted(rows, key=lambda row: (-row.share, row.name)))


def hidden_difference(errors: Iterable[ParameterError], rounding: Iterable[ParameterError]) -> bool:
    """Whether some parameter's gradient differs though its share in the whole is too small to show.

    errors: of the accumulated gradient; rounding: of the one pass in another order.
    """
    floors = {row.name: row.share for row in rounding}
    return any(
        row.error > 1e-6 and row.share > FAR * min(max(floors.get(row.name, 0.0), 1e-16), ROUNDING64)
        for row in errors
    )


def multiple(gradient: Gradient, reference: Gradient, tolerance: float) -> float | None:
    """Return c where `gradient` = c × `reference` up to a relative tolerance, else None."""
    size = norm(reference)
    if size == 0:
        return None
    c = dot(gradient, reference) / size**2
    if c == 0:
        return None
    return c if distance(gradient, reference, c) <= tolerance * abs(c) else None


def scale_of(gradient: Gradient, mean_gradient: Gradient) -> float | None:
    """Return the gradient's component along the large batch's mean gradient, in its units."""
    size = norm(mean_gradient)
    return dot(gradient, mean_gradient) / size**2 if size > 0 else None


def remedy(
    cause: str | None,
    culprits: Sequence[Culprit] = (),
    sizes: Sequence[int] = (),
    counts: Sequence[float] = (),
    factor: float | None = None,
) -> str | None:
    """Return what to do about it, in a sentence."""
    first = culprits[0] if culprits else None
    if cause == result.BATCH_STATISTICS and first is not None:
        where = first.name or "the model's own forward pass"
        if "BatchNorm" in first.type:
            return f"replace {first.type} by GroupNorm, or freeze its statistics"
        return (
            f"{where} ({first.type}) makes a sample's output depend on the other samples of its micro-"
            "batch: compute it sample by sample, or fix the statistics that it takes from the batch"
        )
    if cause == result.UNEQUAL_DENOMINATORS:
        return f"micro-batches {_held(sizes, counts)}: use global_mean"
    if cause == result.LOSS_SCALE and factor is not None:
        return f"gradient is {factor:.4g} × the large batch's: {_why_scaled(factor, len(sizes))}"
    if cause == result.NOT_ADDITIVE:
        return (
            "this loss couples samples, it is no sum over them: accumulate embeddings first, "
            "or take it over the whole window"
        )
    if cause == result.RANDOMNESS:
        where = f" ({first.name or 'the model'}, {first.type})" if first is not None else ""
        return (
            f"random numbers are drawn in every pass{where}: compare averages over seeds, "
            "or switch them off to compare gradients"
        )
    if cause == result.LOW_PRECISION:
        return "keep the gradient in float32 while it accumulates"
    return None


def _held(sizes: Sequence[int], counts: Sequence[float]) -> str:
    if counts and list(counts) != [float(size) for size in sizes]:
        return f"count {_listed(counts)} in their loss"
    return f"hold {_listed(sizes)} samples"


def _listed(numbers: Sequence[float]) -> str:
    said = [f"{number:g}" for number in numbers]
    return ", ".join(said if len(said) <= 8 else [*said[:4], "…", *said[-2:]])


def _why_scaled(factor: float, steps: int) -> str:
    if steps > 1 and math.isclose(factor, steps, rel_tol=1e-3):
        return "the loss is not divided by N"
    if steps > 1 and math.isclose(factor, 1 / steps, rel_tol=1e-3):
        return "it is divided by N twice"
    return "divide the sum of the losses once by what the window counts"


def judged(measured: Measured, draws: bool) -> Verdict:
    """Return the verdict of the numbers alone, given whether the pass draws random numbers."""
    same = measured.same_function
    if measured.identical and not draws:
        return "identical"
    if same is None:
        return "inconclusive"
    if not same:
        return "biased"
    if draws:
        return "stochastic"
    return "equivalent" if measured.in_range else "biased"
