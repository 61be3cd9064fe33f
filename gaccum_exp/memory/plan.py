"""A memory plan as data and as text: what each N needs, before anything is trained."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gaccum_exp.core.step_times import FEWEST_WINDOWS, StepTime, times_differ
from gaccum_exp.memory.meter import OPTIMIZER_STEP, Peak
from gaccum_exp.memory.storages import CATEGORIES as CATEGORIES  # those of a plan's rows

FIXED = ("parameters", "gradients", "optimizer_state")
"""Categories that no N makes smaller."""
FLAT = 0.01
"""A peak within this of the smallest counts as no larger, and a saving below it as none."""
_HEADS = (
    *("N", "micro", "peak", "×", "params", "grads", "opt. state", "activations", "temps", "inputs"),
    "peak in",
)


@dataclass(frozen=True, slots=True)
class Row:
    """The predicted peak of one N."""

    accum_steps: int
    """N, micro-batches per window."""
    micro_batch_size: int
    """Samples of the largest."""
    peak: Peak
    time: StepTime | None = None
    """Of a window, measured; None: it was not."""

    def as_dict(self) -> dict[str, Any]:
        """Return it flat, sizes in bytes and times in seconds."""
        n = {"accum_steps": self.accum_steps, "micro_batch_size": self.micro_batch_size}
        whole = {"peak_bytes": self.peak.bytes, "peak_phase": self.peak.phase}
        parts = {f"{part}_bytes": self.peak.parts[part] for part in CATEGORIES}
        return n | whole | parts | (self.time._asdict() if self.time else {})


@dataclass(frozen=True, slots=True)
class Change:
    """A change of something else than N that could save memory."""

    name: str
    override: str
    """Its argument on the command line."""
    code: str
    """What brings it about in a script."""


FUSED = Change(
    "a fused optimizer", "+optimizer.fused=true", "fused=True among the optimizer's arguments"
)
CHECKPOINTING = Change(
    "activation checkpointing",
    "runtime.activation_checkpointing=true",
    "x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) in place of x = block(x)",
)
BF16 = Change(
    "bf16 autocast",
    "runtime.precision=bf16",
    'with torch.autocast(device_type="{device_type}", dtype=torch.bfloat16) around model and loss',
)


@dataclass(frozen=True, slots=True)
class Advice:
    """What a change would save at one N, predicted."""

    change: Change
    accum_steps: int
    peak_bytes: int
    saved_bytes: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Predicted peaks by N, and what follows from them. `print(plan)` shows it."""

    global_batch_size: int
    device: str
    rows: tuple[Row, ...]
    """By N."""
    budget_bytes: int | None
    chosen_steps: int | None
    """The smallest N whose peak is within the budget; None: none is, or there is no budget."""
    knee_steps: int
    """The smallest N at which the peak is as good as the smallest of all."""
    advice: tuple[Advice, ...] = ()
    """The largest saving first."""
    extrapolated_from: tuple[int, ...] = ()
    """Micro-batch sizes that were run, where the peaks could not be predicted without values."""
    notes: tuple[str, ...] = ()
    """Other remarks, a sentence each."""
    in_code: bool = False
    """Whether advice is worded for a script, rather than as arguments of our command line."""

    def row(self, accum_steps: int) -> Row:
        """Return the row of one N."""
        return next(row for row in self.rows if row.accum_steps == accum_steps)

    def as_dict(self) -> dict[str, Any]:
        """Return what `plan.json` holds."""
        return {
            "global_batch_size": self.global_batch_size,
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "chosen_steps": self.chosen_steps,
            "knee_steps": self.knee_steps,
            "extrapolated": bool(self.extrapolated_from),
            "extrapolated_from": list(self.extrapolated_from),
            "rows": [row.as_dict() for row in self.rows],
            "advice": [
                {"change": of.change.name, "override": of.change.override, "accum_steps": of.accum_steps}
                | {"peak_bytes": of.peak_bytes, "saved_bytes": of.saved_bytes}
                for of in self.advice
            ],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        """Return the table, in which a star marks the chosen N, and a sentence a line."""
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        how = "extrapolated" if self.extrapolated_from else "predicted"
        yield f"Peak memory of a window of {self.global_batch_size} samples, {how} for {self.device}"
        yield ""
        cells: list[tuple[str, ...]] = [_HEADS]
        for row in self.rows:
            mark = "*" if row.accum_steps == self.chosen_steps else ""
            ratio = row.peak.bytes / self.rows[0].peak.bytes
            leading = f"{mark}{row.accum_steps}", str(row.micro_batch_size), size(row.peak.bytes)
            parts = (size(row.peak.parts[part]) for part in CATEGORIES)
            cells.append((*leading, f"{ratio:.2f}", *parts, row.peak.phase))
        yield from _aligned(cells)
        yield ""
        yield self.fit()
        yield self._knee()
        yield from self.advice_lines()
        if any(row.time for row in self.rows):
            yield ""
            yield from self.time_lines()
        if self.extrapolated_from:
            sizes = " and ".join(map(str, self.extrapolated_from))
            yield (
                f"Extrapolated, not predicted: measured on micro-batches of {sizes} samples and "
                "continued on a straight line."
            )
        yield from self.notes

    def advice_lines(self) -> Iterator[str]:
        """Yield what would save memory beside another N, if anything would."""
        if not self.advice:
            return
        at = f"At N = {self.advice[0].accum_steps} would save besides:"
        if not self.in_code:
            each = (f"{a.change.name} {size(a.saved_bytes)} ({a.change.override})" for a in self.advice)
            yield f"{at} {', '.join(each)}."
            return
        yield at
        for a in self.advice:
            code = a.change.code.format(device_type=self.device.partition(":")[0])
            yield f"  {size(a.saved_bytes)}: {a.change.name} ({code})"

    def time_lines(self) -> Iterator[str]:
        """Yield the table of the windows that were timed, and what its ratios are."""
        timed = [row for row in self.rows if row.time is not None]
        windows = min(row.time.windows for row in timed if row.time)
        few = windows < FEWEST_WINDOWS
        cells: list[tuple[str, ...]] = [("N", "micro", "peak", "s a window", "quartiles", "×")]
        for row in timed:
            assert row.time is not None
            first, time = timed[0].time, row.time
            assert first is not None
            ratio = "1" if row is timed[0] else f"{time.median_s / first.median_s:.2f}"
            if row is not timed[0] and not times_differ(time, first):
                ratio = "" if few else "≈"
            mark = "*" if row.accum_steps == self.chosen_steps else ""
            between = f"{time.low_s:.3g} to {time.high_s:.3g}"
            of = f"{mark}{row.accum_steps}", str(row.micro_batch_size), size(row.peak.bytes)
            cells.append((*of, f"{time.median_s:.3g}", between, ratio))
        yield f"Seconds of a window, measured on copies for {self.device}: medians of {windows} in turn"
        yield ""
        yield from _aligned(cells)
        if any(line[0].startswith("*") for line in cells):
            yield "* the smallest N that fits the budget"
        if few:
            yield f"Of fewer than {FEWEST_WINDOWS} windows no ratio is stated."
        elif any(line[-1] == "≈" for line in cells):
            yield "≈ no measurable difference: the quartiles overlap"

    def fit(self) -> str:
        """Return a sentence on the smallest N that fits."""
        least = min(self.rows, key=lambda row: row.peak.bytes)
        smallest = f"the smallest peak is {size(least.peak.bytes)}, at N = {least.accum_steps}"
        if self.budget_bytes is None:
            return f"There is no budget; {smallest}."
        budget = f"the budget of {size(self.budget_bytes)}"
        if self.chosen_steps is None:
            return f"No N fits {budget}: {smallest}."
        peak, one = size(self.row(self.chosen_steps).peak.bytes), self.rows[0]
        if self.chosen_steps == 1:
            return f"One pass fits {budget}: its peak is {peak}. Memory asks for no accumulation."
        whole = f", and one pass takes {size(one.peak.bytes)}" if one.accum_steps == 1 else ""
        return f"N = {self.chosen_steps} is the smallest that fits {budget}: its peak is {peak}{whole}."

    def _knee(self) -> str:
        row = self.row(self.knee_steps)
        if len(self.rows) == 1:
            return f"There is no other N than {row.accum_steps} to compare with."
        if row is self.rows[-1]:
            micro = row.micro_batch_size
            return f"The peak shrinks up to N = {row.accum_steps}, with micro-batches of {micro}."
        past = f"Past N = {row.accum_steps} nothing shrinks: "
        if row.peak.phase == OPTIMIZER_STEP:
            # From this N on, up to the knee and past it, the peak is in the optimizer step.
            others = [r.accum_steps for r in self.rows if r.peak.phase != OPTIMIZER_STEP]
            before = max((n for n in others if n < self.knee_steps), default=0)
            first = next(r.accum_steps for r in self.rows if r.accum_steps > before)
            return (
                f"{past}from N = {first} the optimizer step is the peak, with "
                f"{size(row.peak.parts['temporaries'])} of temporaries beside parameters, gradients and "
                "optimizer state."
            )
        fixed = sum(row.peak.parts[part] for part in FIXED)
        return (
            f"{past}{size(fixed)} of the {size(row.peak.bytes)} are parameters, gradients and optimizer "
            "state, which no N makes smaller."
        )


def _aligned(cells: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a table, whose last column begins at the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield ("  ".join(map(str.rjust, line[:-1], widths)) + "  " + line[-1]).rstrip()


def size(number: int) -> str:
    """Return bytes in words: `7.13 GiB`, `83.2 MiB`."""
    unit = min(4, max(0, int(math.log2(max(1, number)) // 10)))
    scaled = number / 1024**unit
    digits = f"{scaled:.3g}" if scaled < 999.5 else f"{scaled:.0f}"  # else `1.02e+03`
    return f"{digits} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"


def knee(peaks: Mapping[int, float]) -> int:
    """Return the N past which nothing shrinks, of bytes by N: the first as good as the smallest."""
    least = min(peaks.values())
    return min(n for n, peak in peaks.items() if peak <= (1 + FLAT) * least)
