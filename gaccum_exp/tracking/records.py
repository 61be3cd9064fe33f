"""Stored runs as plain values, and what follows from these; nothing of the store they came from."""

import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from gaccum_exp.tracking.metrics import INFINITE, TRAIN_LOSS

# Keys that say how the batch is split, what a store calls it, or where it goes on: none changes what is
# trained.
_SPLITTING = {
    *("accum.steps", "accum.on_oom", "runtime.memory_budget_gib"),
    *("data.micro_batch_size", "data.global_batch_size", "sweep_id", "resume"),
}
# But for the first window of a batch that grows.
_DECIDING_GROWTH = {"accum.steps", "data.micro_batch_size", "data.global_batch_size"}
# Nor does how it is audited, a control's seed being such a key, whether its noise was measured, what
# else was trained with it, or when it was kept on disk.
_BOOKKEEPING = (*("tracking.", "hydra.", "audit.", "sweep.", "checkpoint.", "noise.", "figures."),)

LARGEST_N, LARGEST_BATCH = "accum.largest_steps", "data.largest_global_batch_size"
"""Tags of a run whose batch grows: its parameters say what it begins with."""


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over training: `values[i]` was measured after `global_steps[i]` optimizer steps."""

    global_steps: tuple[int, ...]
    values: tuple[float, ...]
    times_ms: tuple[int, ...] = field(default=(), compare=False)
    """When they were measured, since 1970; empty where nobody knows."""


TRAINING_SAMPLES = "training_samples"
"""The tag that says how many samples the training data set holds."""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One arm of a sweep as it stands in the store."""

    run_id: str
    experiment_id: str
    name: str
    """What differs: `N=4 · micro 64 · mean`."""
    status: str
    """MLflow's word: RUNNING, FINISHED, FAILED or KILLED."""
    start_time_ms: int
    params: Mapping[str, str]
    """Every resolved config value by its dotted key, e.g. `accum.steps`."""
    tags: Mapping[str, str]
    """`sweep_id`, `command_id` (of the command that ran it), `command` (as it was typed), `overrides`
    (the arm's), `arm` (its folder in the sweep's), `digest` (of its configuration), `role` (reference,
    candidate or control), `verdict`, `cause`, `culprit` and `remedy` where audited, `training_samples`
    (of its data set), `memory.source`, `memory.peak_phase`, `failure`, versions, device."""
    metrics: Mapping[str, float]
    """The last value of each metric, e.g. `train/loss`, `memory/peak_bytes`, `time/step_s`."""
    curves: Mapping[str, Curve] = field(default_factory=dict)
    """The metrics that were recorded at every optimizer step or evaluation."""

    @property
    def finished(self) -> bool:
        """Whether the run trained to its end."""
        return self.status == "FINISHED"

    @property
    def diverged(self) -> bool:
        """Whether its training ended because its loss was not finite."""
        curve = self.curves.get(TRAIN_LOSS)
        last = curve.values[-1] if curve and curve.values else self.metrics.get(TRAIN_LOSS)
        return self.status == "FAILED" and last is not None and not abs(last) < INFINITE

    @property
    def accum_steps(self) -> int | None:
        """N that the run ended with; None when it ended before its config was recorded."""
        used = self.tags.get("accum.steps_used") or self.tags.get(LARGEST_N)
        return _integer(used or self.params.get("accum.steps"))

    @property
    def global_batch_size(self) -> int | None:
        """Samples per window: as recorded, of several the largest, else N × micro-batch."""
        recorded = _integer(self.tags.get(LARGEST_BATCH) or self.params.get("data.global_batch_size"))
        n, micro = self.accum_steps, _integer(self.params.get("data.micro_batch_size"))
        return n * micro if recorded is None and n is not None and micro is not None else recorded

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The sizes of a full window's micro-batches, largest first; empty when unknown."""
        # As tagged by the run, else the global batch split as evenly as possible.
        tagged = map(_integer, self.tags.get("micro_batch_sizes", "").split(","))
        sizes = [size for size in tagged if size is not None]
        n, total = self.accum_steps, self.global_batch_size
        if not sizes and n and total is not None:
            small, larger = divmod(total, n)
            sizes = [small + 1] * larger + [small] * (n - larger)
        return tuple(sorted(sizes, reverse=True))

    @property
    def training_samples(self) -> int | None:
        """Samples of the data set that it is trained on; None: not recorded."""
        return _integer(self.tags.get(TRAINING_SAMPLES))

    @property
    def control_seed(self) -> int | None:
        """What the order inside a control's windows was drawn from."""
        return _integer(self.params.get("audit.control_seed"))

    @property
    def is_control(self) -> bool:
        """Whether the run is a control: it shows the effect of rounding alone."""
        return self.tags.get("role") == "control" or self.control_seed is not None

    @property
    def culprit(self) -> str:
        """What its audit blames, with its class: `bn1 (BatchNorm2d)`; empty: nothing."""
        name, kind = self.tags.get("culprit", ""), self.tags.get("culprit_type", "")
        if not kind:
            return name
        return f"{name or 'the model itself'} ({kind})"

    @property
    def overrides(self) -> list[str]:
        """What the command line said of this arm, an override each: `accum.steps=4`."""
        text = self.tags.get("overrides", "")
        try:
            words = shlex.split(text)
        except ValueError:
            words = []
        # Runs of earlier versions have them with bare blanks between, whatever is in them.
        return words if shlex.join(words) == text else re.split(r" (?=[+~]*[\w./@-]+=)", text)

    @property
    def training_config(self) -> dict[str, str]:
        """The parameters that decide what is trained, without how its batch is split and bookkeeping."""
        # A schedule under which the global batch stays what it is decides no more than how it is split.
        splitting = _SPLITTING if "global_batches" in self.tags else _SPLITTING | {"accum.schedule"}
        if LARGEST_N in self.tags:  # a batch grows by whole micro-batches from the first one
            splitting = splitting - _DECIDING_GROWTH
        return {
            key: value
            for key, value in self.params.items()
            if key not in splitting and not key.startswith(_BOOKKEEPING)
        }

    def last(self, metric: str) -> float | None:
        """Return the last value of a metric; None where it was never recorded."""
        curve = self.curves.get(metric)
        return self.metrics.get(metric, curve.values[-1] if curve and curve.values else None)


@dataclass(frozen=True, slots=True)
class DatasetRecord:
    """One data set that a run was fed."""

    name: str
    digest: str
    samples: int
    context: str
    """training | evaluation"""


def last_of_each_arm(runs: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs without those of an arm that was begun again later, in the order given."""
    every = list(runs)
    last: dict[tuple[str, int | None], RunRecord] = {}
    for run in sorted(every, key=lambda run: run.start_time_ms):
        if "arm" in run.tags:
            last[run.tags["arm"], run.control_seed] = run
    kept = {run.run_id for run in last.values()}
    return [run for run in every if "arm" not in run.tags or run.run_id in kept]


def with_those_elsewhere(here: Iterable[RunRecord], stored: Iterable[RunRecord]) -> list[RunRecord]:
    """Return the runs that are here and, of the stored ones, those that are not, oldest first.

    An arm that ran elsewhere is the same as one that is here where its configuration is; and then it
    does not count, nor do its controls.
    """
    found, others = list(here), list(stored)
    ids, arms = {run.run_id for run in found}, {run.tags.get("arm") for run in found}
    digests = {run.tags.get("digest") for run in found} - {None}
    same = {run.tags.get("arm") for run in others if run.tags.get("digest") in digests} - arms
    found += [run for run in others if run.run_id not in ids and run.tags.get("arm") not in same]
    return sorted(found, key=lambda run: run.start_time_ms)


def _integer(text: str | None) -> int | None:
    try:
        return int(text) if text is not None else None
    except ValueError:  # `None`, or `null`
        return None
