"""The verdict that follows from what was measured, and what to do about its cause."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gaccum_exp.audit import result
from gaccum_exp.audit.agreement import FAR, ROUNDING64, Agreement
from gaccum_exp.audit.result import Culprit, ParameterError, Verdict
from gaccum_exp.core.gradient import Deviation, Gradient, distance, dot, norm, relative

DIVIDE_ONCE = (
    "sum the loss over each micro-batch and divide it by what the whole window counts "
    "(in a configuration: accum.reduction=global_mean)"
)
"""What to do about unequal denominators, in a loop of one's own and in a configuration."""
REMEDIES = {
    result.NOT_ADDITIVE: "this loss couples samples, it is no sum over them: take it once over the "
    "outputs of the whole window, and send its gradient back through each micro-batch "
    "(accumulate_gradients(..., strategy='cached'); in a configuration: strategy=cached)",
    result.LOW_PRECISION: "keep the gradient in float32 while it accumulates",
}
"""What to do about a cause, in a sentence, where the cause says it all."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The distances that a verdict rests on."""

    identical: bool
    """Whether the two gradients agree bit for bit in the run's precision."""
    own: Agreement
    """In the run's precision, draws replayed where they can be; the floor is how much of g_1 is
    rounding: its distance to other summation orders and to float64."""
    float64: Agreement
    hidden64: bool
    """Whether a parameter too small to show in float64's error differs beyond its own rounding."""

    @property
    def same_function(self) -> bool | None:
        """Whether the two gradients are equal but for rounding; None: not known."""
        if not math.isfinite(self.float64.error):
            return None
        return self.float64.agrees and not self.hidden64


def verdict_of(measured: Measured, draws: bool) -> Verdict:
    """Return the verdict of the numbers alone, given whether the pass draws random numbers."""
    if measured.identical and not draws:
        return "identical"
    if measured.same_function is None:
        return "inconclusive"
    if draws and measured.same_function:
        return "stochastic"
    return "equivalent" if measured.same_function and measured.own.agrees else "biased"


def parameter_errors(of: Deviation) -> tuple[ParameterError, ...]:
    """Return each parameter's part in the difference of two gradients, the largest first."""
    total = math.sqrt(sum(of.reference.values()))
    rows = []
    for name, square in of.gap.items():
        gap, own = math.sqrt(square), math.sqrt(of.reference.get(name, 0.0))
        rows.append(ParameterError(name, relative(gap, own), relative(gap, total), own))
    return tuple(sorted(rows, key=lambda row: (-row.share, row.name)))


def hidden_difference(errors: Iterable[ParameterError], rounding: Iterable[ParameterError]) -> bool:
    """Whether some parameter's gradient differs, though its share in the whole is too small to show.

    `rounding` are the errors of the one pass in another order.
    """
    floors = {row.name: row.share for row in rounding}
    return any(
        row.error > 1e-6 and row.share > FAR * min(max(floors.get(row.name, 0.0), 1e-16), ROUNDING64)
        for row in errors
    )


def scale_of(gradient: Gradient, mean_gradient: Gradient) -> float | None:
    """Return the gradient's component along the large batch's mean gradient, in units of that one."""
    size = norm(mean_gradient)
    return dot(gradient, mean_gradient) / size**2 if size > 0 else None


def multiple(gradient: Gradient, reference: Gradient, tolerance: float) -> float | None:
    """Return c where `gradient` = c × `reference` up to a relative tolerance, else None."""
    c = scale_of(gradient, reference)
    return c if c and distance(gradient, reference, c) <= tolerance * abs(c) else None


def of_each_type(culprits: Sequence[Culprit]) -> str:
    """Return how many modules of which types they are."""
    counts = Counter(culprit.type for culprit in culprits).items()
    return ", ".join(f"{n} module{'s' if n > 1 else ''} of type {kind}" for kind, n in counts)


def remedy_of(culprit: Culprit, counts: Mapping[str, int]) -> str:
    """Return what to do about a module, in a sentence; `counts` are the modules by class name."""
    number = counts.get(culprit.type, 1)
    one_of = f", one of {number} of this type" if number > 1 else ""
    if culprit.cause == result.RANDOMNESS:
        return (
            f"random numbers are drawn in every pass, in {culprit.said}{one_of}: compare "
            "averages over seeds, or switch them off (for dropout: p = 0) to compare gradients"
        )
    if "BatchNorm" in culprit.type:
        every = f" ({number} modules)" if number > 1 else ""
        return f"replace {culprit.type}{every} by GroupNorm, or freeze its statistics"
    return (
        f"{culprit.said} makes a sample's output depend on the other samples of its micro-"
        "batch: compute it sample by sample, or fix the statistics that it takes from the batch"
    )


def remedy_of_counts(sizes: Sequence[int], counts: Sequence[float]) -> str:
    """Return what to do about micro-batches of these sizes whose losses count this much."""
    counted = bool(counts) and list(counts) != [float(size) for size in sizes]
    numbers: Sequence[float] = counts if counted else sizes
    if len(set(numbers)) == 1:  # what makes them unequal is not known
        return f"micro-batches do not count alike in their loss: {DIVIDE_ONCE}"
    said = listed(numbers)
    what = f"count {said} in their loss" if counted else f"hold {said} samples"
    return f"micro-batches {what}: {DIVIDE_ONCE}"


def listed(numbers: Sequence[float]) -> str:
    """Return numbers in words, of many the first and the last."""
    said = [f"{number:.0f}" if number % 1 == 0 else f"{number:.4g}" for number in numbers]
    return ", ".join(said if len(said) <= 8 else [*said[:4], "…", *said[-2:]])


def remedy_of_factor(factor: float, accum_steps: int) -> str:
    """Return what to do about a gradient that is a multiple of the large batch's."""
    why = "divide the sum of the losses once by what the window counts"
    if accum_steps > 1 and math.isclose(factor, accum_steps, rel_tol=1e-3):
        why = "the loss is not divided by N"
    elif accum_steps > 1 and math.isclose(factor, 1 / accum_steps, rel_tol=1e-3):
        why = "it is divided by N twice"
    return f"gradient is {factor:.4g} × the large batch's: {why}"
