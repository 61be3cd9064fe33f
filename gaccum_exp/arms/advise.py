"""Advise how to get a global batch: plan, try and audit each way, and look for runs that have gone it.

The ways: accumulation, activation checkpointing, bf16 and their combinations, and smaller batches with
the optimizer's rule for the rate. Of each the memory is predicted for every N, and a few windows are
trained in the first N that fits.
"""

import json
import logging
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from gaccum_exp.arms import plan as planning
from gaccum_exp.arms import trial
from gaccum_exp.config.schema import Settings
from gaccum_exp.config.targets import target_object
from gaccum_exp.errors import BadInputError, TrackingError, first_line
from gaccum_exp.memory.fake import nothing_left_behind
from gaccum_exp.memory.plan import BF16, CHECKPOINTING, Change
from gaccum_exp.memory.planner import Planner
from gaccum_exp.report.compare.batch_curves import samples_of
from gaccum_exp.report.compare.columns import last_noise
from gaccum_exp.report.compare.ways import Advice, NoiseKnown, Way
from gaccum_exp.report.text.advice import say_why
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.records import RunRecord
from gaccum_exp.train.build import TrainingData
from gaccum_exp.train.growth import RULES, kind_of
from gaccum_exp.train.stopping import Stop

log = logging.getLogger(__name__)
ADVICE = "advice.json"
PARTS = {2: "half the batch", 4: "a quarter of the batch"}
"""Smaller batches that are weighed against the one asked for."""
WORDS = {CHECKPOINTING: "checkpointing", BF16: "bf16"}
_MAY_DIFFER = ("optimizer.lr", "seed", "train.", "runtime.", "data.workers", "task")
"""Keys and their beginnings in which runs of one way may differ: its rate, above all."""


@nothing_left_behind()
def planned(settings: Settings, loaded: TrainingData) -> tuple[list[tuple[Settings, Way]], int | None]:
    """Return the ways with their predicted peaks, and the budget in bytes."""
    budget = planning.budget_bytes(settings, loaded.device)
    found: list[tuple[Settings, Way]] = []
    for changes in _combinations(settings):
        changed = _with(settings, changes)
        try:
            planner = planning.planner_of(changed, loaded, settings.largest_batch)
            wanted = _accum_steps(planner, budget, every=not changes)
        except BadInputError as error:
            one = changed.with_accum_steps(1)
            found.append((one, replace(_way(settings, one, changes), failure=first_line(error))))
            continue
        for n in wanted:
            found.append(_predicted(settings, changed, changes, planner, n, budget))
    for part in PARTS:
        batch = settings.largest_batch // part
        if batch >= 1 and settings.largest_batch % part == 0:
            smaller = _with_batch(settings, batch)
            planner = planning.planner_of(smaller, _loaded(smaller, loaded), batch)
            n = 1 if budget is None else planner.smallest_fitting(budget) or 1
            found.append(_predicted(settings, smaller, (), planner, n, budget))
    return [(own, _with_held(own, way, loaded)) for own, way in found], budget


def advise(settings: Settings, loaded: TrainingData, stop: Stop) -> Advice:
    """Plan, try and audit every way."""
    with stop.at_once():
        ways, budget = planned(settings, loaded)
    runs = _runs_like(settings, loaded)
    tried = trial.tried(ways, lambda own: _loaded(own, loaded), stop)
    found = tuple(_with_runs(way, own, runs) for way, (own, _) in zip(tried, ways, strict=True))
    return Advice(settings.largest_batch, str(loaded.device), budget, found, _noise_of(settings, runs))


def write(advice: Advice, folder: Path) -> Path:
    """Write `advice.json`."""
    path = folder / ADVICE
    found = advice.as_dict() | {"why": say_why(advice)}
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def _combinations(settings: Settings) -> list[tuple[Change, ...]]:
    there = [CHECKPOINTING] * (not settings.runtime.activation_checkpointing)
    there += [BF16] * (settings.precision == "fp32")
    return [some for count in range(len(there) + 1) for some in combinations(there, count)]


def _with(settings: Settings, changes: Iterable[Change]) -> Settings:
    runtime = settings.runtime
    for change in changes:
        if change == CHECKPOINTING:
            runtime = replace(runtime, activation_checkpointing=True)
        else:
            runtime = replace(runtime, precision="bf16")
    return replace(settings, runtime=runtime)


def _with_batch(settings: Settings, batch: int) -> Settings:
    """Return the settings with a smaller batch, and the rate that the optimizer's rule has for it."""
    train, rule = settings.train, _rate_rule(settings)
    if train.base_batch_size is None:
        train = replace(train, lr_rule=rule, base_batch_size=settings.largest_batch)
    if train.steps is not None:  # the same samples
        train = replace(train, steps=train.steps * settings.largest_batch // batch)
    data = replace(settings.data, global_batch_size=batch)
    return replace(settings, data=data, train=train).with_accum_steps(1)


def _rate_rule(settings: Settings) -> str:
    """Return the optimizer's rule; where none is known Adam's, which changes the rate less."""
    made = target_object(settings.optimizer)
    return RULES[(kind_of(made) if isinstance(made, type) else None) or "adam"]


def _accum_steps(planner: Planner, budget: int | None, *, every: bool) -> list[int]:
    """Return the N of a way: the first that fits, and of plain accumulation those of the ladder too."""
    fitting = 1 if budget is None else planner.smallest_fitting(budget)
    chosen = {fitting or planner.ladder()[-1]}
    if every:
        most = fitting or 1
        chosen |= {n for n in planner.ladder() if n <= max(8, 2 * most)}
    return sorted(n for n in chosen if planner.row(n) is not None)


def _predicted(
    asked: Settings,
    own: Settings,
    changes: Sequence[Change],
    planner: Planner,
    accum_steps: int,
    budget: int | None,
) -> tuple[Settings, Way]:
    own, row = own.with_accum_steps(accum_steps), planner.row(accum_steps)
    way = _way(asked, own, changes)
    if row is None:
        return own, replace(way, failure="the model refuses micro-batches of that size")
    peak = row.peak.bytes
    return own, replace(way, peak_bytes=peak, fits=budget is None or peak <= budget)


def _way(asked: Settings, own: Settings, changes: Sequence[Change]) -> Way:
    batch, words = own.largest_batch, [WORDS[change] for change in changes]
    overrides = [change.override for change in changes]
    if batch != asked.largest_batch:
        words.append(PARTS[asked.largest_batch // batch])
        if own.train.lr_rule != asked.train.lr_rule:
            overrides.append(f"train.lr_rule={own.train.lr_rule}")
            overrides.append(f"train.base_batch_size={own.train.base_batch_size}")
        if own.train.steps != asked.train.steps:
            overrides.append(f"train.steps={own.train.steps}")
    return Way(
        (*overrides, *_split(asked, own)), tuple(words), batch, own.accum_steps,
        own.data.micro_batch_size,
        exact=batch == asked.largest_batch and own.precision == asked.precision,
    )  # fmt: skip


def _split(asked: Settings, own: Settings) -> list[str]:
    """Return what gives a command another batch or another N, whatever of the three sizes it has set."""
    batch, n = own.largest_batch, own.accum_steps
    of_batch = [f"data.global_batch_size={batch}"] if batch != asked.largest_batch else []
    of_n = [f"accum.steps={n}"] if n != asked.accum_steps or asked.chooses_accum_steps else []
    if not (of_batch or of_n) or asked.data.block.get("micro_batch_size") is None:
        return [*of_batch, *of_n]
    # A micro-batch that was set would contradict N, or make another batch of it.
    return ["data.micro_batch_size=null", f"data.global_batch_size={batch}", f"accum.steps={n}"]


def _with_held(settings: Settings, way: Way, loaded: TrainingData) -> Way:
    held = _loaded(settings, loaded).plan.full_window
    return replace(way, held=held) if held < way.global_batch_size else way


def _loaded(settings: Settings, loaded: TrainingData) -> TrainingData:
    """Return the data for another global batch."""
    if settings.largest_batch == loaded.plan.largest_batch:
        return loaded
    plan = replace(loaded.plan, global_batch_size=settings.largest_batch)
    return replace(loaded, plan=plan, total_steps=max(1, loaded.total_steps))


def _runs_like(settings: Settings, loaded: TrainingData) -> list[RunRecord]:
    """Return the finished runs of the store with this model, data and optimizer, with their noise.

    Of as many samples, by less than a batch of theirs: a loss falls with them, and a noise scale grows.
    Controls are left out, and batches that change in training.
    """
    from gaccum_exp.tracking.mlflow_store import Store

    try:
        store = Store(str(settings.tracking.uri), str(settings.tracking.experiment_name))
        own = {k: str(v) for k, v in settings.flat().items()}
        like = {k: own[k] for k in own if k.endswith("_target_") and len(own[k]) <= 200}
        asked = _comparable(RunRecord("", "", "", "", 0, own, {}, {}))
        alike = [run for run in store.finished(like) if _comparable(run) == asked and not run.is_control]
        runs = store.with_curves(alike, (metrics.TRAIN_LOSS, *metrics.OF_NOISE))
    except (BadInputError, TrackingError) as error:
        log.warning("no runs are looked for in the store: %s", error)
        return []
    wanted = loaded.plan.position(loaded.total_steps)
    return [run for run in runs if abs(samples_of(run) - wanted) < (run.global_batch_size or 0)]


def _comparable(run: RunRecord) -> dict[str, str]:
    # Of a run whose batch changed its tags say so, and then its schedule is among these.
    return {k: v for k, v in run.training_config.items() if not k.startswith(_MAY_DIFFER)}


def _with_runs(way: Way, own: Settings, runs: Iterable[RunRecord]) -> Way:
    """Return a way with the loss of the runs of its batch and precision.

    It is the mean over runs that differ in their seed at most, of the rate for which that is lowest: the
    lowest of all runs would be the lower the more seeds there are.
    """
    alike: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for run in runs:
        same = run.global_batch_size == own.largest_batch
        loss = run.last(metrics.EVAL_LOSS)
        if same and run.params.get("runtime.precision") == own.precision and loss is not None:
            alike[_trained_how(run)].append(loss if math.isfinite(loss) else math.inf)
    means = {how: statistics.fmean(losses) for how, losses in alike.items()}
    best = min(means, key=lambda how: (means[how], -len(alike[how])), default=None)
    if best is None or not means[best] < metrics.INFINITE:
        return way
    return replace(way, loss=means[best], runs=len(alike[best]))


def _trained_how(run: RunRecord) -> tuple[str, ...]:
    """Return the learning rate and its rules, by which runs of one way may differ."""
    rates = ("optimizer.lr", "train.lr_rule", "train.base_batch_size", "train.beta2_rule")
    return tuple(run.params.get(key, "") for key in rates)


def _noise_of(settings: Settings, runs: Sequence[RunRecord]) -> NoiseKnown | None:
    """Return the noise scale of the run with the most measured windows, of this batch's at first.

    Not the narrowest: see `noise_notes.best_measured`.
    """
    told = [*_told(runs)]
    own = [of for of in told if of[0] == settings.largest_batch]
    return max(own or told, key=lambda of: of[1])[2] if told else None


def _told(runs: Iterable[RunRecord]) -> Iterator[tuple[int | None, int, NoiseKnown]]:
    """Yield global batch, measured windows and noise scale of runs that have an interval."""
    for run in runs:
        measured = run.curves.get(metrics.NOISE_TRACE)
        for in_adam in (True, False):
            names = (metrics.NOISE_SCALE, metrics.NOISE_SCALE_LOW, metrics.NOISE_SCALE_HIGH)
            scale, low, high = (
                last_noise(run, metrics.in_adam_metric(name) if in_adam else name) for name in names
            )
            if scale is not None and low and high is not None:
                known = NoiseKnown(scale, low, high, in_adam, run.name)
                yield run.global_batch_size, len(measured.values) if measured else 0, known
                break
