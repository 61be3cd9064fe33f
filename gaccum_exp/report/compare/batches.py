"""Compare arms of *different* global batches: at equal samples, at equal steps, at equal seconds.

No batch is another's large batch, so these arms are no pairs: for each global batch stands its best
learning rate, that with the lowest loss at equal samples in the mean over seeds. What else was swept
makes comparisons of their own. Controls and arms whose global batch changes in training are left out.

The *critical batch* is the largest whose loss at equal samples is within twice the spread over seeds
(their standard deviation) of the best batch's, the one with the lowest. It is not resolved where a batch
has fewer than two seeds, or lost one at its best rate, or where that is at an end of those tried: a
better one beyond it would move the loss of that batch. It is a lower bound where the largest batch tried
is within.
"""

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, NamedTuple

from gaccum_exp.core.step_times import FEWEST_WINDOWS
from gaccum_exp.report.compare.batch_curves import Axis, Curves, Point, curves_of, shared_point
from gaccum_exp.report.compare.columns import ComparisonRow
from gaccum_exp.report.compare.comparison import Comparison
from gaccum_exp.report.compare.step_times import step_time
from gaccum_exp.report.compare.swept_keys import Setting, swept_keys, swept_values
from gaccum_exp.report.text.noise_notes import NoiseTold, best_measured
from gaccum_exp.report.text.wording import say_list
from gaccum_exp.report.whole_files import whole
from gaccum_exp.tracking.metrics import TRAIN_LOSS
from gaccum_exp.tracking.records import RunRecord

RATE = "optimizer.lr"
_NOT_APART = ("seed", RATE, "train.eval_every_steps", "train.eval_every_samples")
"""Keys in which the arms of one comparison may differ besides their batches."""
_ALIKE = {"device": "devices", "threads": "numbers of threads", "command_id": "commands"}
"""Tags on which step times depend."""

Place = Literal["inside", "highest", "lowest", "only one", "contested"]


class Loss(NamedTuple):
    """Of the seeds of one batch."""

    mean: float
    spread: float | None
    """Standard deviation over the seeds; None of one."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """One global batch, trained with the best of the rates that were tried."""

    global_batch_size: int
    accum_steps: int
    micro_batch_size: int
    rate: str
    """`optimizer.lr` as configured; empty: the optimizer has none."""
    rate_place: Place
    """Among the rates tried; contested: over the fewer seeds that both have, another is lower."""
    rates: tuple[str, ...]
    """Those tried, ascending; a training that diverged has tried its rate."""
    seeds: tuple[str, ...]
    step_s: float | None
    """Seconds of an optimizer step, the median over seeds of their medians; None: see `step_times`."""
    losses: Mapping[Axis, Loss]
    """At the comparison's points, as far as there are any."""
    noise: NoiseTold | None
    """What the best measured seed tells at the end of its training: see `noise_notes`."""
    curves: tuple[Curves, ...]
    """A seed's each."""
    diverged: tuple[str, ...] = ()
    """Seeds that diverged at this rate, as some did at all that were tried under as many seeds: losses
    are of the others, and are not held against those of other batches."""


@dataclass(frozen=True, slots=True)
class CriticalBatch:
    """The largest batch that is as good as the best at equal samples, where that is resolved."""

    size: int | None = None
    at_least: bool = False
    """Whether no larger one was tried."""
    limit: float | None = None
    """The loss up to which a batch is as good."""
    open_because: str = ""
    """Why it is not resolved."""


@dataclass(frozen=True, slots=True)
class BatchComparison:
    """What a sweep shows of its global batches in one setting."""

    setting: Setting
    """Reduction, and what was swept besides batch, rate and seed."""
    rows: tuple[BatchRow, ...]
    """By global batch, two at least."""
    points: Mapping[Axis, Point]
    critical: CriticalBatch
    rate_rule: str
    """How the rate follows the batch from a stated one: `sqrt from 64`; empty: it does not."""
    is_scheduled: bool
    """Whether the rate follows a schedule over the whole of each training."""
    counts_full_windows: bool
    """Whether an arm, as older ones, does not say how many samples its partial windows hold."""

    @property
    def best(self) -> BatchRow:
        """The batch with the lowest loss at equal samples."""
        return self.best_at("samples") or self.rows[0]

    def best_at(self, axis: Axis) -> BatchRow | None:
        """Return the batch with the lowest loss on an axis, of those that lost no seed, if any."""
        known = [row for row in self.rows if axis in row.losses and not row.diverged]
        return min(known, key=lambda row: _finite_first(row.losses[axis].mean), default=None)


def compare_batches(comparison: Comparison, runs: Sequence[RunRecord]) -> tuple[BatchComparison, ...]:
    """Compare the global batches of a sweep, setting by setting; none where it has but one.

    Args:
        comparison: of the sweep.
        runs: its arms, with their curves, and controls.
    """
    rows = {row.run_id: row for row in comparison.rows}
    trained = [run for run in runs if not run.is_control]
    keys = {key: short for key, short in swept_keys(trained).items() if key not in _NOT_APART}
    found: dict[Setting, list[RunRecord]] = defaultdict(list)
    for run in trained:
        if _has_one_batch(run) and (run.finished or run.diverged):
            setting = Setting(run.params.get("accum.reduction"), swept_values(run, keys))
            found[setting].append(run)
    made = (
        _compare(setting, alike, rows)
        for setting, arms in found.items()
        for alike in _of_the_same_data(arms)
    )
    return tuple(sorted(filter(None, made), key=lambda of: of.setting.order))


def write_batches(comparisons: Sequence[BatchComparison], path: Path) -> Path:
    """Write a row per setting and global batch, floats in full precision, unknown values blank."""
    with whole(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
        lines = [_csv_line(of, row) for of in comparisons for row in of.rows]
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


def _of_the_same_data(arms: Iterable[RunRecord]) -> Iterable[Sequence[RunRecord]]:
    """Sort arms by their data, which a seed may decide, and nothing else does."""
    of_data: dict[str | None, list[RunRecord]] = defaultdict(list)
    for arm in arms:
        of_data[arm.tags.get("data_digest")].append(arm)
    seeds = [{arm.params.get("seed") for arm in alike} for alike in of_data.values()]
    if sum(map(len, seeds)) == len(set().union(*seeds)):
        return [[arm for alike in of_data.values() for arm in alike]]
    return of_data.values()


def _has_one_batch(run: RunRecord) -> bool:
    curve = run.curves.get(TRAIN_LOSS)
    known = run.global_batch_size and run.accum_steps and curve is not None and curve.values
    return bool(known) and "global_batches" not in run.tags


Tried = Mapping[str, Mapping[str, RunRecord]]
"""One batch's arms, by rate, ascending, and by seed."""


class _Choice(NamedTuple):
    """The rate that stands for a batch."""

    arms: list[RunRecord]
    """Those that finished, by seed."""
    rate: str
    place: Place
    rates: tuple[str, ...]
    step_s: float | None
    curves: tuple[Curves, ...]
    diverged: tuple[str, ...]


def _compare(
    setting: Setting, runs: Iterable[RunRecord], rows: Mapping[str, ComparisonRow]
) -> BatchComparison | None:
    of_batch: dict[int, list[RunRecord]] = defaultdict(list)
    for run in runs:
        of_batch[run.global_batch_size or 0].append(run)
    tried = [_one_split(of_batch[batch]) for batch in sorted(of_batch)]
    finished = [_finished(arm for of_rate in of.values() for arm in of_rate.values()) for of in tried]
    if sum(map(bool, finished)) < 2:
        return None
    samples = shared_point("samples", (curves_of(arm) for arms in finished for arm in arms))
    chosen = [_best_rate(of, samples) for of, arms in zip(tried, finished, strict=True) if arms]
    every = [of for choice in chosen for of in choice.curves]
    apart = _times_apart(chosen)
    points: dict[Axis, Point] = {
        "samples": samples,
        "steps": shared_point("steps", every),
        "seconds": Point("seconds", reason=apart) if apart else shared_point("seconds", every),
    }
    found = tuple(_row(choice, points, rows) for choice in chosen)
    params = chosen[0].arms[0].params
    rule = params.get("train.lr_rule", "none")
    return BatchComparison(
        setting,
        found,
        points,
        critical_batch(found),
        rate_rule="" if rule == "none" else f"{rule} from {params.get('train.base_batch_size')}",
        is_scheduled=params.get("scheduler._target_") not in (None, "None"),
        counts_full_windows=any(arm.training_samples is None for arms in finished for arm in arms),
    )


def _one_split(arms: Iterable[RunRecord]) -> Tried:
    """Return one batch's arms of one N: of that which most arms have, of several the smallest.

    Of arms with the same rate and seed the most recent stands for all.
    """
    of_n: dict[int, dict[tuple[str, str], RunRecord]] = defaultdict(dict)
    for arm in sorted(arms, key=lambda arm: (arm.start_time_ms, arm.run_id)):
        of_n[arm.accum_steps or 0][arm.params.get(RATE, ""), arm.params.get("seed", "")] = arm
    n = min(of_n, key=lambda n: (-len(of_n[n]), n))
    found: dict[str, dict[str, RunRecord]] = defaultdict(dict)
    for rate, seed in sorted(of_n[n], key=lambda of: tuple(map(_number, of))):
        found[rate][seed] = of_n[n][rate, seed]
    return found


def _best_rate(tried: Tried, point: Point) -> _Choice:
    """Choose among the rates that have the most seeds; where a seed diverged, its loss is infinite.

    Where all rates lost a seed, that is chosen which lost the fewest, of several by the mean over the
    others.
    """
    losses = {
        rate: {
            seed: _finite_first(_loss_at(curves_of(arm), point)) if arm.finished else math.inf
            for seed, arm in of_seed.items()
        }
        for rate, of_seed in tried.items()
    }
    trained = [rate for rate, of_seed in tried.items() if _finished(of_seed.values())]
    most = max(len(losses[rate]) for rate in trained)
    competing = [rate for rate in trained if len(losses[rate]) == most]

    def order(rate: str) -> tuple[float, int, float]:
        left = [losses[rate][seed] for seed, arm in tried[rate].items() if arm.finished]
        return statistics.fmean(losses[rate].values()), -len(left), statistics.fmean(left)

    best = min(competing, key=order)
    rates = tuple(tried)
    place: Place = "inside"
    if best in (rates[0], rates[-1]):
        place = "only one" if len(rates) == 1 else "lowest" if best == rates[0] else "highest"
    elif any(_is_lower(losses[rate], losses[best]) for rate in rates if rate not in competing):
        place = "contested"
    arms = _finished(tried[best].values())
    known = [time.median_s for arm in arms if (time := step_time(arm)) is not None]
    step_s = statistics.median(known) if len(known) == len(arms) else None
    curves = tuple(curves_of(arm, math.nan if step_s is None else step_s) for arm in arms)
    diverged = tuple(seed for seed, arm in tried[best].items() if not arm.finished)
    return _Choice(arms, best, place, rates, step_s, curves, diverged)


def _is_lower(losses: Mapping[str, float], others: Mapping[str, float]) -> bool:
    """Whether losses are lower than others over the seeds that both have."""
    shared = losses.keys() & others.keys()
    return sum(losses[seed] for seed in shared) < sum(others[seed] for seed in shared)


def _finished(arms: Iterable[RunRecord]) -> list[RunRecord]:
    return [arm for arm in arms if arm.finished]


def _times_apart(chosen: Sequence[_Choice]) -> str:
    """Say why the times of arms are not compared; empty: they are."""
    if any(choice.step_s is None for choice in chosen):
        return f"the time of a step was not measured over {FEWEST_WINDOWS} windows in every arm"
    arms = [arm for choice in chosen for arm in choice.arms]
    several = [word for tag, word in _ALIKE.items() if len({arm.tags.get(tag) for arm in arms}) > 1]
    return f"the arms ran under several {say_list(several)}" if several else ""


def _row(choice: _Choice, points: Mapping[Axis, Point], rows: Mapping[str, ComparisonRow]) -> BatchRow:
    arms = choice.arms
    return BatchRow(
        global_batch_size=arms[0].global_batch_size or 0,
        accum_steps=arms[0].accum_steps or 0,
        micro_batch_size=arms[0].micro_batch_sizes[0],
        rate=choice.rate,
        rate_place=choice.place,
        rates=choice.rates,
        seeds=tuple(arm.params.get("seed", "") for arm in arms),
        step_s=choice.step_s,
        losses={
            axis: _mean_loss([_loss_at(of, point) for of in choice.curves])
            for axis, point in points.items()
            if point.at is not None
        },
        noise=best_measured(rows[arm.run_id] for arm in arms if arm.run_id in rows),
        curves=choice.curves,
        diverged=choice.diverged,
    )


def critical_batch(rows: Sequence[BatchRow]) -> CriticalBatch:
    """Return the critical batch of these, or why it is not resolved: see the module's beginning."""
    if any("samples" not in row.losses for row in rows):
        return CriticalBatch(open_because="there is no point that all arms have")
    losses = {row.global_batch_size: row.losses["samples"] for row in rows}
    lost = [row.global_batch_size for row in rows if row.diverged]
    if lost:
        return CriticalBatch(open_because=f"{_batches(lost)} lost a seed at its best rate")
    best = min(losses.values(), key=lambda loss: _finite_first(loss.mean))
    few = [row.global_batch_size for row in rows if len(row.seeds) < 2]
    if few:
        return CriticalBatch(open_because=f"{_batches(few)} had fewer than two seeds")
    limit = best.mean + 2 * (best.spread or 0.0)
    at_end = [r.global_batch_size for r in rows if r.rate_place not in ("inside", "contested")]
    contested = [row.global_batch_size for row in rows if row.rate_place == "contested"]
    if at_end:
        why = f"the best rate for {_batches(at_end)} is at an end of those tried"
        return CriticalBatch(limit=limit, open_because=why)
    if contested:
        why = f"for {_batches(contested)} another rate has a lower loss over the fewer seeds of it"
        return CriticalBatch(limit=limit, open_because=why)
    size = max(batch for batch, loss in losses.items() if loss.mean <= limit or loss is best)
    return CriticalBatch(size, size == max(losses), limit)


def _mean_loss(losses: Sequence[float]) -> Loss:
    measurable = len(losses) > 1 and all(map(math.isfinite, losses))
    return Loss(statistics.fmean(losses), statistics.stdev(losses) if measurable else None)


def _loss_at(curves: Curves, point: Point) -> float:
    return math.nan if point.at is None else curves[point.metric].at(point.axis, point.at)


def _csv_line(comparison: BatchComparison, row: BatchRow) -> dict[str, object]:
    of = comparison.critical
    noise = row.noise
    line: dict[str, object] = {"setting": comparison.setting.label}
    line |= {
        f.name: getattr(row, f.name)
        for f in fields(BatchRow)
        if f.name not in ("rates", "seeds", "losses", "noise", "curves", "diverged")
    }
    line |= {"rates_tried": " ".join(row.rates), "seeds": " ".join(row.seeds)}
    line |= {"diverged_seeds": " ".join(row.diverged)}
    for axis, point in comparison.points.items():
        loss = row.losses.get(axis)
        line |= {
            f"equal_{axis}": point.at,
            f"{axis}_metric": point.metric,
            f"loss_at_equal_{axis}": loss.mean if loss else None,
            f"spread_at_equal_{axis}": loss.spread if loss else None,
        }
    return line | {
        "noise_scale": noise.scale if noise else None,
        "noise_scale_low": noise.low if noise else None,
        "noise_scale_high": noise.high if noise and math.isfinite(noise.high) else None,
        "noise_in_adam_metric": noise.in_adam_metric if noise else None,
        "critical_batch": of.size,
        "critical_at_least": of.at_least if of.size else None,
        "critical_open_because": of.open_because,
        "loss_limit": of.limit,
    }


def _batches(sizes: Sequence[int]) -> str:
    return f"the global batch{'es' if len(sizes) > 1 else ''} of {say_list(sizes)}"


def _finite_first(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


def _number(text: str) -> tuple[float, str]:
    try:
        return float(text), text
    except ValueError:
        return math.inf, text
