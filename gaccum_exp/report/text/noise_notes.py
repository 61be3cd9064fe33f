"""Say whether so large a global batch was worth having, as the measured noise scale tells it.

That the optimizer steps to a given loss go with 1 + B_noise/B, and the samples with 1 + B/B_noise, is a
model (McCandlish et al. 2018, arXiv 1812.06162), and is marked as one. Of a batch inside a wide interval
of the noise scale it is only said what would settle the question.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from gaccum_exp.report.arm_limit import by_setting
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.text.wording import say_ratio, say_rounded

TRAILING = 64
"""Measured windows that a recorded noise scale is the quotient of means of."""
NARROW = 2.0
"""Ratio of an interval's ends up to which a batch inside it is about as large as the noise scale."""


class NoiseTold(NamedTuple):
    """What one arm's last measured windows tell."""

    row: ComparisonRow
    scale: float | None
    low: float
    high: float
    """Infinite where nothing bounds it."""
    in_adam_metric: bool

    @property
    def windows(self) -> int:
        """How many have told it, in this metric."""
        told = self.row.adam_noise_windows if self.in_adam_metric else self.row.noise_windows
        return told or 0

    @property
    def effort(self) -> tuple[int, int]:
        """How well it was measured: the windows in its scale, and how finely they were split."""
        return min(self.windows, TRAILING), self.row.accum_steps or 0

    @property
    def width(self) -> float:
        """How little it tells: the ratio of the interval's ends."""
        return self.high / self.low if self.low else math.inf


def noise_of(row: ComparisonRow) -> NoiseTold | None:
    """Return what an arm tells, in its optimizer's own metric where there is one; None: nothing."""
    if not row.noise_windows:
        return None
    of_adam = row.adam_noise_scale_low is not None or row.adam_noise_scale is not None
    scale, low, high = (
        (row.adam_noise_scale, row.adam_noise_scale_low, row.adam_noise_scale_high)
        if of_adam
        else (row.noise_scale, row.noise_scale_low, row.noise_scale_high)
    )
    return NoiseTold(row, scale, low or 0.0, math.inf if high is None else high, of_adam)


def best_measured(rows: Iterable[ComparisonRow]) -> NoiseTold | None:
    """Return what the best measured arm tells, of several that are as well measured the first.

    Nothing that was found decides: the narrowest of several 95 % intervals would be no such one.
    """
    told = (found for row in rows if (found := noise_of(row)) is not None)
    return max(told, key=lambda of: of.effort, default=None)


def say_noise(comparison: Comparison) -> str:
    """Say it setting by setting, a line each; where nothing was measured, how it would be."""
    rows = [row for row in comparison.rows if row.finished]
    if not any(row.noise_windows for row in rows):
        if any(row.noise_asked for row in rows):
            return (
                "No window has told the noise scale: that takes two micro-batches in a window that "
                "noise.every_steps looks at, and eight tell more (accum.steps=8)."
            )
        # An audit trains nothing, so there nothing would be measured.
        split = any((row.accum_steps or 1) > 1 and row.optimizer_steps for row in rows)
        return (
            "Whether so large a batch is worth having: noise.every_steps=8 measures it." if split else ""
        )
    said = {
        label: [_say(told) for alike in _by_batch(of_setting) if (told := best_measured(alike))]
        for label, of_setting in by_setting(rows, "{reduction}, over all settings").items()
    }
    if len(said) == 1:
        return "\n".join(*said.values())
    return "\n".join(f"{label}: {line}" for label, lines in said.items() for line in lines)


def _by_batch(rows: Iterable[ComparisonRow]) -> list[list[ComparisonRow]]:
    found: dict[int, list[ComparisonRow]] = {}
    for row in rows:
        if row.global_batch_size is not None:
            found.setdefault(row.global_batch_size, []).append(row)
    return [found[batch] for batch in sorted(found)]


def _say(told: NoiseTold) -> str:
    row, windows = told.row, told.windows
    batch = row.global_batch_size or 0
    metric = ", in Adam's metric" if told.in_adam_metric else ""
    arm = ", ".join(part for part in (f"N = {row.accum_steps}", row.setting.text) if part)
    over = f"{'the last ' * (windows > TRAILING)}{min(windows, TRAILING)} windows"
    over = "a window" if windows == 1 else over
    over = f"{over} to step {row.optimizer_steps} at {arm}{metric}"
    scale = told.scale, told.low, told.high
    return say_worth(scale, batch, f"the global batch of {batch}", over, _settling(row))


def say_worth(
    scale: tuple[float | None, float, float], batch: int, this: str, over: str, settling: str
) -> str:
    """Say on which side of a noise scale a batch is, and what half or twice of it would take.

    Args:
        scale: the noise scale in samples, None where it is not told, and the ends of its interval.
        batch: in samples.
        this: what the batch is called.
        over: what the scale was measured over.
        settling: what would make its interval narrower.
    """
    value, low, high = scale
    if value is None or math.isinf(high):
        bound = f"above {_samples(low)}" if low else "not resolved"
        lead = f"The noise scale is {bound} ({over})"
        if low <= batch:
            return f"{lead}: {settling} would tell on which side of it {this} is."
        return f"{lead}: {this} is below it. {_modelled(low, batch, 2, 'at most ')}."
    lead = f"The noise scale is {_samples(value)} ({say_rounded(low)} to {say_rounded(high)}, {over})"
    if batch > high:
        return f"{lead}: {this} is beyond it. {_modelled(value, batch, 0.5)}."
    if batch < low:
        return f"{lead}: {this} is below it. {_modelled(value, batch, 2)}."
    if high > NARROW * low:
        return f"{lead}: {settling} would tell on which side of it {this} is."
    half, twice = _modelled(value, batch, 0.5), _factors(value, batch, 2)
    return f"{lead}: {this} is about as large. {half}; {twice}."


def _settling(row: ComparisonRow) -> str:
    """Return what would make the interval narrower."""
    finer = (row.accum_steps or 1) < 8 and (row.global_batch_size or 0) >= 16
    more = "more windows (a smaller noise.every_steps, a longer training)"
    return f"{more} or a larger accum.steps" if finer else more


def _modelled(scale: float, batch: int, by: float, at_most: str = "") -> str:
    return f"By the model steps ∝ 1 + noise scale/B, {_factors(scale, batch, by, at_most)}"


def _factors(scale: float, batch: int, by: float, at_most: str = "") -> str:
    steps = (1 + scale / (by * batch)) / (1 + scale / batch)
    which, samples = "half the batch" if by < 1 else "twice the batch", say_ratio(by * steps)
    return f"{which} takes {at_most}{say_ratio(steps)} × the optimizer steps and {samples} × the samples"


def _samples(number: float) -> str:
    return f"{say_rounded(number)} samples"
