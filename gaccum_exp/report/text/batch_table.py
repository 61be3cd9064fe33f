"""Print what a sweep shows of its global batches: a table for each setting, and a sentence or two."""

import math
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gaccum_exp.report.arm_limit import MOST_SETTINGS
from gaccum_exp.report.compare.batch_curves import AVERAGED, AXES, Axis, Point
from gaccum_exp.report.compare.batches import BatchComparison, BatchRow, CriticalBatch, Loss
from gaccum_exp.report.text.noise_notes import NoiseTold
from gaccum_exp.report.text.terminal import LOOK
from gaccum_exp.report.text.wording import (
    MISSING,
    say_list,
    say_loss,
    say_rounded,
    say_scaled,
    time_unit,
)
from gaccum_exp.tracking.metrics import EVAL_LOSS, TRAIN_LOSS

EQUAL: dict[Axis, str] = {
    "samples": "equal samples",
    "steps": "equal optimizer steps",
    "seconds": "equal seconds",
}
_HEADERS: dict[Axis, str] = {"samples": "samples", "steps": "opt. steps", "seconds": "seconds"}
_PLACES = {
    "highest": ("↑", "the highest tried: a better one may lie beyond"),
    "lowest": ("↓", "the lowest tried: a better one may lie below"),
    "only one": ("↕", "the only one tried"),
    "contested": ("?", "another has a lower loss over the fewer seeds of it"),
    "inside": (" ", ""),
}
DEFINITION = (
    "Critical batch (the largest whose loss at equal samples is within twice the spread over seeds of "
    "the best batch's)"
)


def print_batches(out: Console, comparisons: Sequence[BatchComparison]) -> None:
    """Print the comparison of global batches, setting by setting."""
    for comparison in comparisons[:MOST_SETTINGS]:
        out.print()
        out.print(render_batches(comparison, named=len(comparisons) > 1))
        out.print(say_batches(comparison), highlight=False)
    if len(comparisons) > MOST_SETTINGS:
        out.print(f"{len(comparisons) - MOST_SETTINGS} more settings: see batches.csv.")


def render_batches(comparison: BatchComparison, *, named: bool = False) -> Table:
    """Return a row per global batch, as a table that fits a terminal of 80 columns.

    Args:
        comparison: of one setting.
        named: whether it is one of several, so that its title says which.
    """
    rows = comparison.rows
    title = "Global batches, each at its best learning rate"
    title += f": {comparison.setting.label}" if named else ""
    table = Table(title=title, caption=Text("\n".join(_legend(comparison))), **LOOK)
    columns = [
        ("\nglobal\nbatch", [str(row.global_batch_size) for row in rows]),
        ("\n\nN × micro", [f"{row.accum_steps} × {row.micro_batch_size}" for row in rows]),
        ("\n\nlr ", [(row.rate or MISSING) + _PLACES[row.rate_place][0] for row in rows]),
        ("\n\nseeds", [_say_seeds(row) for row in rows]),
        *(_column(comparison.points[axis], rows) for axis in AXES),
    ]
    if any(row.noise for row in rows):
        columns.append(("\nnoise\nscale", [_say_scale(row.noise) for row in rows]))
    for header, _ in columns:
        table.add_column(Text(header), justify="right", no_wrap=True, overflow="fold")
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*map(Text, cells))
    return table


def say_batches(comparison: BatchComparison) -> str:
    """Say which batch is the best in which of the three ways, and which is critical."""
    told: dict[int, list[str]] = {}
    for axis in AXES:
        best = comparison.best_at(axis)
        if best is not None and math.isfinite(best.losses[axis].mean):
            told.setdefault(best.global_batch_size, []).append(EQUAL[axis])
    (batch, ways), *others = told.items() if told else ((0, []),)
    lowest = f"The global batch of {batch} has the lowest loss at {say_list(ways)}"
    lowest = ", ".join([lowest, *(f"that of {b} at {say_list(of)}" for b, of in others)])
    return f"{f'{lowest}. ' if told else ''}{DEFINITION}: {say_critical(comparison.critical)}."


def say_critical(critical: CriticalBatch) -> str:
    """`128`, `at least 256, the largest tried`, or `not resolved, because …`."""
    if critical.open_because:
        return f"not resolved, because {critical.open_because}"
    return f"at least {critical.size}, the largest tried" if critical.at_least else str(critical.size)


def say_point(point: Point) -> str:
    """`2,874`, or `0.31 s`: how much all had."""
    if point.at is None:
        return MISSING
    if point.axis != "seconds":
        return f"{point.at:,.0f}"
    size, unit = time_unit(point.at)
    return f"{say_scaled(point.at, size)} {unit}"


def say_interval(noise: NoiseTold) -> str:
    """`90 (70-120)`; `>40` where nothing bounds it."""
    said = _say_scale(noise)
    bounded = noise.scale is not None and math.isfinite(noise.high)
    return f"{said} ({say_rounded(noise.low)}-{say_rounded(noise.high)})" if bounded else said


def _say_seeds(row: BatchRow) -> str:
    """`3`; `2/3` where one of three diverged."""
    left, every = len(row.seeds), len(row.seeds) + len(row.diverged)
    return f"{left}/{every}" if row.diverged else str(left)


def _say_scale(noise: NoiseTold | None) -> str:
    if noise is None or not noise.low:
        return MISSING
    if noise.scale is None or math.isinf(noise.high):
        return f">{say_rounded(noise.low)}"
    return say_rounded(noise.scale)


def _column(point: Point, rows: Sequence[BatchRow]) -> tuple[str, list[str]]:
    kind = {EVAL_LOSS: "eval loss", TRAIN_LOSS: "train loss"}.get(point.metric, "loss")
    header = f"{kind} at\n{say_point(point)}\n{_HEADERS[point.axis]}"
    if point.at is None:
        header = f"loss at\nequal\n{_HEADERS[point.axis]}"
    return header, [_say_mean(row.losses.get(point.axis)) for row in rows]


def _say_mean(loss: Loss | None) -> str:
    if loss is None:
        return MISSING
    if loss.spread is None:
        return say_loss(loss.mean)
    spread = f"{loss.spread:.4f}" if loss.spread >= 9.5e-4 else f"{loss.spread:.0e}"
    return f"{say_loss(loss.mean)}±{spread}"


def _legend(comparison: BatchComparison) -> Iterator[str]:
    """Yield what the columns are, and what keeps any from being compared."""
    rows, points = comparison.rows, comparison.points
    places = {row.rate_place: _PLACES[row.rate_place] for row in rows}
    marks = "; ".join(f"{mark} {meaning}" for mark, meaning in places.values() if meaning)
    rule = f", which follows the batch by train.lr_rule={comparison.rate_rule}"
    yield (
        f"lr: optimizer.lr{rule if comparison.rate_rule else ''}, of those tried the one with the "
        f"lowest loss at equal samples{'; ' if marks else ''}{marks}"
    )
    yield "samples, opt. steps, seconds: the most that all have had; ±: standard deviation over seeds"
    metrics = {point.metric for point in points.values()}
    if EVAL_LOSS in metrics:
        yield "eval loss: between two evaluations linear"
    if TRAIN_LOSS in metrics:
        yield (
            f"train loss: mean over the last {100 * AVERAGED:.0f} % of the samples before the point"
            + (
                ", where not all arms have evaluations before and after it"
                if EVAL_LOSS in metrics
                else ""
            )
        )
    told = [row.noise for row in rows if row.noise]
    if told:
        in_adam = any(noise.in_adam_metric for noise in told)
        metric = ", in Adam’s metric" if in_adam else ""
        yield (f"noise scale: in samples{metric}, at the end of the training; batches.csv has intervals")
    if comparison.is_scheduled:
        yield (
            "- The rate follows a schedule over each whole training: arms that go on beyond the equal "
            "steps or seconds have not come to its end there, as the shortest has."
        )
    for row in rows:
        if row.diverged:
            seeds = f"seed{'s' * (len(row.diverged) > 1)} {say_list(row.diverged)}"
            yield (
                f"- Of the global batch of {row.global_batch_size} {seeds} diverged at {row.rate}, "
                "which lost the fewest: its losses are of the others, and held against no batch's."
            )
    if comparison.counts_full_windows:
        yield (
            "- Samples are steps × global batch, more than an epoch's partial window holds: older runs "
            "do not say how many samples their data have."
        )
    for point in points.values():
        if point.reason:
            yield f"- At {EQUAL[point.axis]} nothing is compared: {point.reason}."
