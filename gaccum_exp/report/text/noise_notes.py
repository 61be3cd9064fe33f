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


def narrowest(rows: Iterable[ComparisonRow]) -> NoiseTold | None:
    """Return the narrowest interval: arms of one global batch differ in how finely they tell it."""
    told = (found for row in rows if (found := noise_of(row)) is not None)
    return min(told, key=lambda of: (of.width, -of.low), default=None)


def say_noise(comparison: Comparison) -> str:
    """Say it setting by setting, a line each; where nothing was measured, how it would be."""
    rows = [row for row in comparison.rows if row.finished]
    if not any(row.noise_windows for row in rows):
        split = any((row.accum_steps or 1) > 1 for row in rows)
        return (
            "Whether so large a batch is worth having: noise.every_steps=8 measures it." if split else ""
        )
    said = {
        label: [_say(told) for alike in _by_batch(of_setting) if (told := narrowest(alike))]
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
    batch, windows = told.row.global_batch_size or 0, told.row.noise_windows or 0
    this = f"the global batch of {batch}"
    metric = ", in Adam's metric" if told.in_adam_metric else ""
    over = f"{'the last ' * (windows > TRAILING)}{min(windows, TRAILING)} windows"
    over = "a window" if windows == 1 else over
    if told.scale is None or math.isinf(told.high):
        bound = f"above {_samples(told.low)}" if told.low else "not resolved"
        lead = f"The noise scale is {bound} ({over} at N = {told.row.accum_steps}{metric})"
        if told.low <= batch:
            return f"{lead}: {_settling(told.row)} would tell on which side of it {this} is."
        return f"{lead}: {this} is below it, and a larger one would save optimizer steps."
    interval = f"{say_rounded(told.low)} to {say_rounded(told.high)}"
    lead = (
        f"The noise scale is {_samples(told.scale)} ({interval}, {over} to step "
        f"{told.row.optimizer_steps}{metric})"
    )
    if batch > told.high:
        return f"{lead}: {this} is beyond it. {_modelled(told.scale, batch, 0.5)}."
    if batch < told.low:
        return f"{lead}: {this} is below it. {_modelled(told.scale, batch, 2)}."
    if told.width > NARROW:
        return f"{lead}: {_settling(told.row)} would tell on which side of it {this} is."
    half, twice = _modelled(told.scale, batch, 0.5), _factors(told.scale, batch, 2)
    return f"{lead}: {this} is about as large. {half}; {twice}."


def _settling(row: ComparisonRow) -> str:
    """Return what would make the interval narrower."""
    finer = (row.accum_steps or 1) < 8 and (row.global_batch_size or 0) >= 16
    more = "more windows (a smaller noise.every_steps, a longer training)"
    return f"{more} or a larger accum.steps" if finer else more


def _modelled(scale: float, batch: int, by: float) -> str:
    return f"By the model steps ∝ 1 + noise scale/B, {_factors(scale, batch, by)}"


def _factors(scale: float, batch: int, by: float) -> str:
    steps = (1 + scale / (by * batch)) / (1 + scale / batch)
    which, samples = "half the batch" if by < 1 else "twice the batch", say_ratio(by * steps)
    return f"{which} takes {say_ratio(steps)} × the optimizer steps and {samples} × the samples"


def _samples(number: float) -> str:
    return f"{say_rounded(number)} samples"
