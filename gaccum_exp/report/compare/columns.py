"""The columns of a comparison, each declared once: its name, how an arm is measured, how it is printed.

The values of an arm are a `ComparisonRow`; the table and the CSV file are made from the declarations.
"""
# ruff: noqa: RUF009  # `column` returns what `dataclasses.field` does, as a dataclass wants it

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from gaccum_exp.core.step_times import times_differ
from gaccum_exp.report.compare.pairing import Group, Source
from gaccum_exp.report.compare.rounding_envelope import Envelope, Standing
from gaccum_exp.report.compare.step_times import loads_differ, step_time
from gaccum_exp.report.compare.swept_keys import Setting
from gaccum_exp.report.text.wording import byte_unit, say_gap, say_loss, say_ratio, say_sizes, time_unit
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import RunRecord


@dataclass(frozen=True, slots=True)
class Measured:
    """An arm and what was found by holding it against its group's reference."""

    run: RunRecord
    group: Group
    loss_gap: float | None = None
    common_steps: int = 0
    weight_distance: float | None = None
    envelope: Envelope | None = None
    """Of the reference's controls; None for the reference itself."""
    standing: Standing = Standing()

    @property
    def role(self) -> str:
        """`candidate` for all but the run that the group is compared with, whatever its N."""
        if self.group.reference is None or self.run.run_id != self.group.reference.run_id:
            return "candidate"
        names = {Source.STAND_IN: "stand-in", Source.STORED: "stored reference"}
        return names.get(self.group.source, "reference")

    @property
    def other_command(self) -> bool:
        """Whether another command than the reference's ran it: on another day, under another load."""
        ours, theirs = (
            run.tags.get("command_id") for run in (self.run, self.group.reference or self.group.arms[0])
        )
        return None not in (ours, theirs) and ours != theirs

    def ratio(self, metric: str, *alike: str) -> float | None:
        """Return a cost over the reference's; None unless these tags, which it depends on, agree."""
        run, reference = self.run, self.group.reference
        if reference is None:
            return None
        same = all(run.tags.get(tag) and run.tags[tag] == reference.tags.get(tag) for tag in alike)
        ours, theirs = _cost(run, metric), _cost(reference, metric)
        return ours / theirs if (same or run is reference) and ours is not None and theirs else None

    @property
    def step_ratio(self) -> float | None:
        """The step time over the reference's; None, too, where of either too few windows were timed, or
        the machine had other work to do than in the other's time."""
        runs = self.run, self.group.reference
        if any(run is None or step_time(run) is None for run in runs) or self.other_load:
            return None
        return self.ratio(metrics.STEP_TIME_S, "device", "threads")

    @property
    def other_load(self) -> bool:
        """Whether its step time and its reference's are under different loads of other processes."""
        reference = self.group.reference
        return reference is not None and loads_differ(self.run, reference)

    @property
    def step_differs(self) -> bool | None:
        """Whether the step time is measurably another than the reference's; None: not compared."""
        reference = self.group.reference
        if reference is None or self.run.run_id == reference.run_id or self.step_ratio is None:
            return None
        return times_differ(step_time(self.run), step_time(reference))


class Column(NamedTuple):
    """One column, under the name of the row's attribute."""

    read: Callable[[Measured], Any]
    header: str = ""
    """The table's, `{unit}` standing for the unit that suits all arms; empty: not in the table."""
    say: Callable[[Any], str] = str
    unit: Callable[[float], tuple[float, str]] | None = None
    """Of the largest value: the unit's size and name."""
    in_csv: bool = True


def column(read: Callable[[Measured], Any], *header_and_say: Any, **options: Any) -> Any:
    """Declare a column of `ComparisonRow`; the arguments are a `Column`'s."""
    return field(metadata={"column": Column(read, *header_and_say, **options)})


def _cost(run: RunRecord, metric: str) -> float | None:
    value = run.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None  # else it was not measured


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _predicted_peak(arm: Measured) -> int | None:
    # For the N that the run began with: where it ended with another, nothing was predicted.
    used = "accum.steps_used" in arm.run.tags
    return None if used else _whole(arm.run.last(metrics.PREDICTED_PEAK_BYTES))


def _last(metric: str) -> Callable[[Measured], float | None]:
    return lambda arm: arm.run.last(metric)


def _terms(arm: Measured) -> tuple[tuple[str, float], ...]:
    prefixes = tuple(metrics.of_term(of, "") for of in (metrics.TRAIN_LOSS, metrics.EVAL_LOSS))
    return tuple(sorted(pair for pair in arm.run.metrics.items() if pair[0].startswith(prefixes)))


def last_noise(run: RunRecord, metric: str) -> float | None:
    """Return what was recorded of the last measured window; None where that has no such number."""
    measured, curve = (run.curves.get(key) for key in (metrics.NOISE_TRACE, metric))
    if measured is None or curve is None or measured.global_steps[-1:] != curve.global_steps[-1:]:
        return None
    return curve.values[-1]


def _noise(metric: str) -> Callable[[Measured], float | None]:
    return lambda arm: last_noise(arm.run, metric)


def _windows_with(metric: str) -> Callable[[Measured], int | None]:
    def count(arm: Measured) -> int | None:
        measured = arm.run.curves.get(metric)
        return len(measured.values) if measured else None

    return count


def _noise_asked(arm: Measured) -> bool:
    return arm.run.params.get("noise.every_steps", "None") != "None"


def _steps(arm: Measured) -> int | None:
    curve = arm.run.curves.get(metrics.TRAIN_LOSS)
    return curve.global_steps[-1] if curve and curve.global_steps else None


def _tag(name: str) -> Callable[[Measured], str | None]:
    # A tag that was taken back is an empty one.
    return lambda arm: arm.run.tags.get(name) or None


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One arm; None stands for what was not measured or cannot be compared.

    The order of the columns in the CSV file is a contract, as their names are: new ones go below.
    """

    run_id: str = column(lambda arm: arm.run.run_id)
    """MLflow's; of an arm read from its journal, the one that it has or will have there."""
    role: str = column(lambda arm: arm.role)
    """`reference`, `stand-in`, `stored reference` or `candidate`; a failed N = 1 is no reference."""
    accum_steps: int | None = column(lambda arm: arm.run.accum_steps, "N")
    """N, micro-batches per window."""
    micro_batch_size: int | None = column(lambda arm: next(iter(arm.run.micro_batch_sizes), None))
    """Samples in the largest micro-batch of a full window."""
    global_batch_size: int | None = column(lambda arm: arm.run.global_batch_size, "global\nbatch")
    """Samples of one optimizer step."""
    reduction: str | None = column(lambda arm: arm.run.params.get("accum.reduction"), "\nreduction")
    """`accum.reduction`."""
    train_loss: float | None = column(_last(metrics.TRAIN_LOSS), "train\nloss", say_loss)
    """The last one recorded."""
    eval_loss: float | None = column(_last(metrics.EVAL_LOSS), "eval\nloss", say_loss)
    """The last evaluation's loss."""
    eval_accuracy: float | None = column(_last(metrics.EVAL_ACCURACY), "eval\nacc.", say_loss)
    """The last evaluation's accuracy."""
    max_loss_gap: float | None = column(lambda arm: arm.loss_gap, "loss\ngap", say_gap)
    """Largest |train loss − reference's| over the steps that both have."""
    weight_distance: float | None = column(lambda arm: arm.weight_distance, "weight\ndist.", say_gap)
    """‖w − w_ref‖₂ / ‖w_ref‖₂ at the end of training; None unless both finished."""
    peak_bytes: int | None = column(
        lambda arm: _whole(_cost(arm.run, metrics.PEAK_BYTES)), "peak\n{unit}", unit=byte_unit
    )
    """Peak memory of a window."""
    peak_ratio: float | None = column(
        lambda arm: arm.ratio(metrics.PEAK_BYTES, "memory.source"), "\n×", say_ratio
    )
    """To the reference's; None where the two were measured by different means."""
    step_s: float | None = column(
        lambda arm: _cost(arm.run, metrics.STEP_TIME_S), "step\n{unit}", unit=time_unit
    )
    """Median seconds of an optimizer step."""
    step_ratio: float | None = column(lambda arm: arm.step_ratio, "\n×", say_ratio)
    """To the reference's; None where too few windows of either were timed, or other load differed."""
    name: str = column(lambda arm: arm.run.name)
    """The run's name, as in MLflow."""
    status: str = column(lambda arm: arm.run.status)
    """`FINISHED`, `FAILED`, `KILLED` or `RUNNING`."""
    failure: str | None = column(lambda arm: arm.run.tags.get("failure"))
    """The reason, where it failed."""
    differs: str = column(lambda arm: arm.group.setting.text, "also\nvaried")
    """Other swept keys with this arm's values: `norm=batch, seed=1`; empty if there are none."""
    reference_run_id: str | None = column(
        lambda arm: arm.group.reference.run_id if arm.group.reference else None
    )
    """The run that it was compared with."""
    reference_source: str = column(lambda arm: arm.group.source.value)
    """`own`, `other reduction`, `stored`, `stand-in` or `none`; `audit`: taken in one pass."""
    common_steps: int = column(lambda arm: arm.common_steps)
    """Optimizer steps that `max_loss_gap` was taken over."""
    peak_phase: str | None = column(lambda arm: arm.run.tags.get("memory.peak_phase"))
    """Where the peak falls: `forward/backward` or `optimizer step`."""
    memory_source: str | None = column(lambda arm: arm.run.tags.get("memory.source"))
    """What measured the peak: `tracker` or `allocator`."""
    device: str | None = column(lambda arm: arm.run.tags.get("device"))
    """Where it ran."""
    threads: str | None = column(lambda arm: arm.run.tags.get("threads"))
    """How many threads it had on the CPU."""
    verdict: str | None = column(_tag("verdict"), "\nverdict")
    """The worst audit's; None where the arm was not audited."""
    cause: str | None = column(_tag("cause"), "\ncause")
    """The audit's, where the verdict has one."""
    culprit: str | None = column(_tag("culprit"))
    """A module's dotted name."""
    e64: float | None = column(_last(metrics.AUDIT_E64), "\ne64", say_gap)
    """‖g_N − g_1‖ / ‖g_1‖ in float64, as last audited."""
    e: float | None = column(_last(metrics.AUDIT_E), "\ne", say_gap)
    """The same in the run's own precision."""
    floor: float | None = column(_last(metrics.AUDIT_FLOOR), "\nfloor", say_gap)
    """What summation order alone makes of `e`."""
    control: str | None = column(lambda arm: arm.standing.word)
    """Whether the loss curve is `inside` or `outside` the envelope of controls; None: not judged."""
    envelope: float | None = column(lambda arm: arm.envelope.values[-1] if arm.envelope else None)
    """The largest gap that the controls' envelope reaches."""
    eval_perplexity: float | None = column(_last(metrics.EVAL_PERPLEXITY), "eval\nppl.", say_loss)
    """exp(eval loss), where the loss counts tokens."""
    tokens_per_s: float | None = column(_last(metrics.TOKENS_PER_S))
    """Median over windows, where the loss counts tokens."""
    skipped_windows: float | None = column(_last(metrics.SKIPPED_WINDOWS))
    """Windows whose float16 gradient was not finite, so that no step was taken; None: none."""
    predicted_peak_bytes: int | None = column(_predicted_peak)
    """What was predicted before the run, for the N that it ended with."""

    command_id: str | None = column(_tag("command_id"))
    """Of the command that ran it."""
    optimizer_steps: int | None = column(_steps)
    """The last global step of its loss curve."""
    noise_windows: int | None = column(_windows_with(metrics.NOISE_TRACE))
    """How many windows the noise was measured of; None: of none."""
    noise_scale: float | None = column(_noise(metrics.NOISE_SCALE))
    """In samples, at the last window measured; None: not resolved."""
    noise_scale_low: float | None = column(_noise(metrics.NOISE_SCALE_LOW))
    """The lower end of its 95 % interval."""
    noise_scale_high: float | None = column(_noise(metrics.NOISE_SCALE_HIGH))
    """The upper end; None where nothing bounds it."""
    adam_noise_scale: float | None = column(_noise(metrics.in_adam_metric(metrics.NOISE_SCALE)))
    """The noise scale in the optimizer's metric, where that is Adam-like."""
    adam_noise_scale_low: float | None = column(_noise(metrics.in_adam_metric(metrics.NOISE_SCALE_LOW)))
    """The lower end of its 95 % interval."""
    adam_noise_scale_high: float | None = column(
        _noise(metrics.in_adam_metric(metrics.NOISE_SCALE_HIGH))
    )
    """The upper end; None where nothing bounds it."""

    step_low_s: float | None = column(lambda arm: _cost(arm.run, metrics.STEP_TIME_LOW_S))
    """The lower quartile of the seconds of a step, over the windows timed after warm-up."""
    step_high_s: float | None = column(lambda arm: _cost(arm.run, metrics.STEP_TIME_HIGH_S))
    """The upper quartile."""
    step_windows: int | None = column(lambda arm: _whole(_cost(arm.run, metrics.STEP_WINDOWS)))
    """How many were timed after warm-up; None: not recorded, as by older versions."""
    step_differs: bool | None = column(lambda arm: arm.step_differs)
    """Whether the step time is measurably another than the reference's; None: not compared."""
    adam_noise_windows: int | None = column(_windows_with(metrics.in_adam_metric(metrics.NOISE_TRACE)))
    """How many windows the noise in the optimizer's metric was measured of; there is none before its
    first step."""
    waiting_share: float | None = column(lambda arm: _cost(arm.run, metrics.WAITING_SHARE))
    """The share of the training in which it was ready and other processes had the processor."""

    term_losses: tuple[tuple[str, float], ...] = column(_terms, in_csv=False)
    """(`train/loss/box`, the last one recorded) of a loss with terms; in the CSV file a column each."""
    blamed: str | None = column(lambda arm: arm.run.culprit or None, "\nculprit", in_csv=False)
    """The culprit with its class: `bn1 (BatchNorm2d)`."""
    setting: Setting = column(lambda arm: arm.group.setting, in_csv=False)
    """Reduction and what else was swept, with this arm's values."""
    micro_batch_sizes: tuple[int, ...] = column(
        lambda arm: arm.run.micro_batch_sizes, "micro\nbatch", say_sizes, in_csv=False
    )
    """The micro-batches of a full window, largest first."""
    other_load: bool = column(lambda arm: arm.other_load, in_csv=False)
    """Whether the machine had more, or less, other work to do than in its reference's time."""
    other_command: bool = column(lambda arm: arm.other_command, in_csv=False)
    """Whether its step time and its reference's are of different commands."""
    left_at: int | None = column(lambda arm: arm.standing.left_at, in_csv=False)
    """The first optimizer step at which the loss curve is outside the envelope."""
    controls: int = column(lambda arm: arm.envelope.controls if arm.envelope else 0, in_csv=False)
    """How many controls the envelope is of."""
    noise_asked: bool = column(_noise_asked, in_csv=False)
    """Whether its noise was to be measured."""

    @classmethod
    def of(cls, arm: Measured) -> "ComparisonRow":
        """Fill in every column."""
        return cls(**{name: column.read(arm) for name, column in COLUMNS.items()})

    @property
    def finished(self) -> bool:
        """Whether the arm trained to its end."""
        return self.status == "FINISHED"

    @property
    def is_audit(self) -> bool:
        """Whether it trained nothing, and one window was audited."""
        return self.reference_source == Source.AUDIT.value

    @property
    def is_reference(self) -> bool:
        """Whether the other arms of its group are compared with this one."""
        return self.role != "candidate"


COLUMNS: dict[str, Column] = {f.name: f.metadata["column"] for f in fields(ComparisonRow)}
"""Every column by name; the CSV file's in its order."""
