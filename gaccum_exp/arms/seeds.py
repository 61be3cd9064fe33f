"""The seeds of an arm in one job: trained as one where that is sound, else one after the other.

Each is the arm that it would have been alone: its own configuration, its own folder below the job's, its
own run. A sweep makes such jobs under `sweep.vectorize=seed` (`gaccum_exp/arms/callback.py`).
"""

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, open_dict, read_write

from gaccum_exp.arms import plan as planning
from gaccum_exp.arms.life import (
    Outcome,
    abandon,
    clear,
    describe,
    keep_weights,
    reason_of,
    refuse_arm,
    report_failure,
    role_of,
    run_arm,
    run_name,
    shared_data,
    start_run,
    train_controls,
)
from gaccum_exp.config import schema as config
from gaccum_exp.config.schema import Settings
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.plan import size
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.sink import MlflowSink
from gaccum_exp.train.build import TrainingData, load
from gaccum_exp.train.stackable import NotStackableError, stackable
from gaccum_exp.train.stacked import End, StackedState, train_stacked
from gaccum_exp.train.state import TrainState

log = logging.getLogger(__name__)
KEY = "sweep.vectorize=seed"
VECTORIZED = "vectorized"
"""The tag of a run that was trained beside others."""


def run_seeds(cfg: DictConfig) -> None:
    """Run the arm of every seed in `sweep.seeds`."""
    jobs = jobs_of(cfg)
    settings = [config.validate(job.cfg) for job in jobs]
    try:
        experiments = _experiments(settings)
    except Exception as error:
        if not isinstance(error, BadInputError):  # which each arm says itself
            why = error if isinstance(error, NotStackableError) else reason_of(error)
            log.warning("%s: not for this arm: %s; its seeds are trained one after the other", KEY, why)
        for job, one in zip(jobs, settings, strict=True):
            with job.current():
                run_arm(one, job.cfg)
        return
    _train_together([_Run(job, built) for job, built in zip(jobs, experiments, strict=True)])


def refuse_seeds(cfg: DictConfig, error: BadInputError) -> None:
    """Record the arms of a configuration that cannot be used: one for each seed."""
    for job in jobs_of(cfg):
        with job.current():
            refuse_arm(job.cfg, error)


@dataclass(frozen=True, slots=True)
class Job:
    """What Hydra would have made of one seed alone."""

    cfg: DictConfig
    folder: Path
    overrides: list[str]

    @contextmanager
    def current(self) -> Iterator[None]:
        """Let Hydra's own configuration speak of this job."""
        hydra = HydraConfig.instance().cfg.hydra  # type: ignore[union-attr]  # Hydra runs this
        before = hydra.runtime.output_dir, list(hydra.overrides.task)
        self.folder.mkdir(parents=True, exist_ok=True)
        with read_write(hydra), open_dict(hydra):
            hydra.runtime.output_dir, hydra.overrides.task = str(self.folder), self.overrides
        try:
            yield
        finally:
            with read_write(hydra), open_dict(hydra):
                hydra.runtime.output_dir, hydra.overrides.task = before


def jobs_of(cfg: DictConfig) -> list[Job]:
    """Return the jobs of an arm's seeds; of a configuration without such a list, the one that it is."""
    here, given = Path(HydraConfig.get().runtime.output_dir), list(HydraConfig.get().overrides.task)
    if not isinstance(cfg.sweep.seeds, ListConfig):
        return [Job(cfg, here, given)]
    jobs = []
    for seed in cfg.sweep.seeds:
        of_seed = copy.deepcopy(cfg)
        of_seed.seed, of_seed.sweep.seeds = seed, None
        keys = [line.partition("=")[0] for line in given]
        lines = (
            f"{key}={seed}" if key.lstrip("+") == "seed" else line
            for key, line in zip(keys, given, strict=True)
            if key != "sweep.seeds"
        )
        jobs.append(Job(of_seed, here / f"seed={seed}", list(lines)))
    return jobs


def _experiments(settings: Sequence[Settings]) -> list[TrainState]:
    """Build the experiments of seeds that can be trained as one.

    Raises:
        NotStackableError: they cannot, or not in the memory that there is.
        BadInputError: neither together nor alone.
    """
    first = settings[0]
    if first.task != "train":
        raise NotStackableError(f"task={first.task} trains nothing")
    clear()
    loaded = load(first, shared_data(first.sweep_id))
    budget = planning.budget_bytes(first, loaded.device)
    experiments = stackable(settings, loaded)
    if budget is not None:
        _require_room(experiments, loaded, budget)
    return experiments


def _require_room(experiments: Sequence[TrainState], loaded: TrainingData, budget: int) -> None:
    seeds = len(experiments)
    if planning.plainly_fits(experiments[0], budget // seeds):
        return
    predicted = planning.predicted_peak(experiments[0].settings, loaded)
    if predicted is not None and seeds * predicted.bytes > budget:
        raise NotStackableError(
            f"{seeds} seeds at once are predicted to hold {size(seeds * predicted.bytes)}, of "
            f"{size(budget)} that they may"
        )


@dataclass(slots=True)
class _Run:
    """The run of one seed among those that are trained as one."""

    job: Job
    experiment: TrainState
    sink: MlflowSink | None = None
    status: str | None = None
    """How it ended; None: it is not over."""

    @property
    def settings(self) -> Settings:
        return self.experiment.settings

    @property
    def name(self) -> str:
        return run_name(self.settings)

    def begin(self, seeds: int) -> MlflowSink:
        """Begin the run in the store."""
        with self.job.current():
            tags = role_of(self.settings) | {VECTORIZED: f"{seeds} seeds"}
            self.sink = start_run(self.settings, self.job.cfg, self.name, tags)
        describe(self.experiment, self.sink)
        return self.sink

    def end(self, end: End) -> None:
        """Keep what came of it."""
        assert self.sink is not None
        try:
            if end.error is not None:
                raise end.error
            keep_weights(self.experiment, self.sink)
            self.sink.close("FINISHED")
        except Exception as error:
            self.fail(error)
            return
        last = self.sink.last
        self._leave(
            "FINISHED",
            verdict=None if end.audit is None else end.audit.verdict,
            objective=last.get(metrics.EVAL_LOSS, last.get(metrics.TRAIN_LOSS)),
        )

    def fail(self, error: Exception) -> None:
        """End it as failed, unless it is over."""
        if self.status is not None:
            return
        reason = reason_of(error)
        with self.job.current():
            report_failure(self.name, reason, error, self.job.folder)
        abandon(self.sink, "FAILED", reason)
        self._leave("FAILED", reason=reason, bad_input=isinstance(error, BadInputError))

    def interrupt(self) -> None:
        """End it as interrupted, unless it is over."""
        if self.status is None:
            abandon(self.sink, "KILLED", "interrupted")
            self._leave("KILLED", reason="interrupted")

    def _leave(self, status: str, **more: Any) -> None:
        settings, self.status = self.settings, status
        asked = settings.audit_asked
        Outcome(settings.sweep_id, self.name, status, audit_asked=asked, **more).write(self.job.folder)


def _train_together(runs: Sequence[_Run]) -> None:
    """Train as one; what goes wrong beyond one seed ends all that are not over yet."""
    first = runs[0].experiment
    alone = "Basic" in HydraConfig.get().launcher._target_
    try:
        sinks = [run.begin(len(runs)) for run in runs[:1]]
        sinks[0].ready()  # what is wrong with the store is wrong for all, who begin beside the training
        sinks += [run.begin(len(runs)) for run in runs[1:]]
        name = f"{runs[0].name} and {len(runs) - 1} more seeds"
        with Progress(name, first.total_steps, alone=alone) as progress:
            ends = train_stacked(StackedState([run.experiment for run in runs]), sinks, progress)
        for run, end in zip(runs, ends, strict=True):
            run.end(end)
    except Exception as error:
        for run in runs:
            run.fail(error)
    except BaseException:
        for run in runs:
            run.interrupt()
        raise
    for run in runs:
        if run.status == "FINISHED":
            with run.job.current():
                train_controls(run.settings, run.job.cfg, run.name)
