"""Find the smallest N that fits a budget, and the N past which nothing shrinks."""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.meter import highest
from gaccum_exp.memory.plan import (
    BF16,
    CHECKPOINTING,
    FLAT,
    FUSED,
    Advice,
    Change,
    MemoryPlan,
    Row,
    knee,
)
from gaccum_exp.memory.predict import Extrapolated, MeteredStep, PeakSource, Predicted

WHOLE_WINDOW = "The outputs of the whole window, and the loss over them, are there at every N."


@dataclass(slots=True)
class Planner:
    """Predict the peak of every N that is asked for, each once, and choose among them."""

    source: PeakSource
    samples: int
    """Of a window, the global batch."""
    equal_parts: bool = False
    """Whether N has to divide the window, as a mean of means needs."""
    notes: list[str] = field(default_factory=list)
    _rows: dict[int, Row | None] = field(default_factory=dict)

    def row(self, accum_steps: int) -> Row | None:
        """Return the prediction for one N; None where the model refuses micro-batches of that size."""
        if accum_steps in self._rows:
            return self._rows[accum_steps]
        sizes = split_sizes(self.samples, accum_steps)
        peak = None
        try:
            peak = highest(self.source.peaks(self.samples, accum_steps))
        except Exception as error:  # a model may refuse a single sample, or an odd number of them
            if accum_steps == 1:
                raise
            several = f"{sizes[0]}" if sizes[-1] == sizes[0] else f"{sizes[0]} and {sizes[-1]}"
            why = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            self.notes.append(f"N = {accum_steps} is left out, with micro-batches of {several}: {why}.")
        self._rows[accum_steps] = Row(accum_steps, sizes[0], peak) if peak else None
        return self._rows[accum_steps]

    def candidates(self) -> list[int]:
        """Return every N that is of use: divisors of the batch, or those with peaks of their own."""
        if self.equal_parts:
            return [n for n in range(1, self.samples + 1) if self.samples % n == 0]
        # The smallest of those with the same first two micro-batches, on which a peak depends.
        first_two = {
            (-(-self.samples // n), (self.samples - 2) // n): n for n in range(self.samples, 1, -1)
        }
        return sorted({*first_two.values(), *(2**i for i in range(self.samples.bit_length()))})

    def ladder(self) -> list[int]:
        """Return the N of the table: powers of two up to one sample a micro-batch, or the divisors."""
        return [
            n for n in self.candidates() if self.equal_parts or n & (n - 1) == 0 or n == self.samples
        ]

    def smallest_fitting(self, budget_bytes: int) -> int | None:
        """Return the smallest N whose peak is within the budget; None where no peak is."""
        ladder = self.ladder()

        def fits(n: int) -> bool:
            row = self.row(n)
            return row is not None and row.peak.bytes <= budget_bytes

        fitting = next((n for n in ladder if fits(n)), None)
        if fitting is None or fitting == ladder[0]:
            return fitting
        # From N = 2 on, more micro-batches never hold more.
        below = ladder[ladder.index(fitting) - 1]
        between = [n for n in self.candidates() if below < n <= fitting]
        return between[bisect_left(between, True, hi=len(between) - 1, key=fits)]

    def plan(
        self, device: str, budget_bytes: int | None, shown: Iterable[int] | None = None
    ) -> MemoryPlan:
        """Return the plan, without advice, of the N `shown` beside the chosen one; None: the ladder."""
        chosen = None if budget_bytes is None else self.smallest_fitting(budget_bytes)
        shown = sorted({*(self.ladder() if shown is None else shown), chosen or 1})
        rows = [row for row in map(self.row, shown) if row is not None]
        return MemoryPlan(
            global_batch_size=self.samples,
            device=device,
            rows=tuple(rows),
            budget_bytes=budget_bytes,
            chosen_steps=chosen,
            knee_steps=knee({row.accum_steps: row.peak.bytes for row in rows}),
            extrapolated_from=self.source.extrapolated_from,
            notes=tuple(self.notes),
        )


def peak_source(
    fake: Callable[[], MeteredStep], real: Callable[[], MeteredStep] | None, samples: int
) -> tuple[PeakSource, list[str]]:
    """Return predictions, or, of a step that needs values, an extrapolation if there are, and why."""
    try:
        step = fake()
        notes = [WHOLE_WINDOW] if step.strategy.takes_window_at_once else []
        return Predicted(step, samples), notes
    except Exception as error:  # each model fails on fake tensors in its own way
        if real is None:
            error.add_note(
                "Planned without values, model or batch being on `meta`. If the step depends on values, "
                "give both with memory: then it is measured on micro-batches of four and eight samples."
            )
            raise
        failure = error
        why = str(getattr(error, "func", None) or f"{type(error).__name__}: {error}").splitlines()[0]
        on_values = isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))
        what = "depends on values" if on_values else "cannot be taken on tensors without values"
    step = real()
    if step.strategy.takes_window_at_once:
        raise BadInputError(
            f"this model's step {what} ({why}); it would be measured on small windows, and they do not "
            "tell what the loss of a whole window holds: plan without strategy=cached"
        ) from failure
    found = Extrapolated(step, samples)  # what is wrong with real tensors as well is raised here
    return found, [f"This model's step {what} ({why}): it was run on small micro-batches."]


def with_advice(plan: MemoryPlan, changed: Callable[[Change], MeteredStep | None]) -> MemoryPlan:
    """Return the plan with what other changes would save at the N that matters in it."""
    n = plan.chosen_steps or plan.knee_steps
    before, samples = plan.row(n).peak.bytes, plan.global_batch_size
    found = []
    for change in (FUSED, CHECKPOINTING, BF16):
        try:
            step = changed(change)
            peak = step and highest(Predicted(step, samples).peaks(samples, n))
        except Exception:  # what this model or optimizer cannot do is no advice
            continue
        if peak and before - peak.bytes > FLAT * before:
            found.append(Advice(change, n, peak.bytes, before - peak.bytes))
    return replace(plan, advice=tuple(sorted(found, key=lambda advice: -advice.saved_bytes)))
