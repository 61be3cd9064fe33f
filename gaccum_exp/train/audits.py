"""What an audit becomes in a run: metrics and tags.

The audit itself knows nothing of runs; here it is put to a run's own model, loss and windows.
"""

import logging
import math

from gaccum_exp.audit.configured_window import audit_window
from gaccum_exp.audit.result import Audit, worst
from gaccum_exp.core.feed import Window
from gaccum_exp.core.seeding import derive_seed
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.state import Experiment

log = logging.getLogger(__name__)
TAGS = ("verdict", "culprit", "culprit_type", "cause", "remedy", "detail")


def audit(experiment: Experiment, window: Window, global_step: int) -> Audit:
    """Judge one window of a run at the run's present weights, and leave the run as it was.

    Whatever goes wrong in it is no more than an inconclusive verdict.
    """
    settings = experiment.settings
    try:
        return audit_window(
            experiment.model,
            experiment.loss_fn,
            window,
            reduction=settings.accum.reduction,  # type: ignore[arg-type]  # validated
            sum_divisor=experiment.divisor(global_step),
            buffer_dtype=experiment.buffer_dtype,
            loss_scale=1.0 if experiment.scaler is None else experiment.scaler.get_scale(),
            seed=derive_seed(settings.seed, "model", global_step),  # as the step's own passes
        )
    except Exception as error:  # the run goes on without it
        reason = f"the audit failed: {type(error).__name__}: {error}"
        log.warning("%s", reason)
        return Audit("inconclusive", len(window), settings.accum.reduction, detail=reason)


def first_full(experiment: Experiment, windows: range) -> int:
    """Return the first of a stage's windows that is as large as they get."""
    return next((step for step in windows if experiment.is_full(step)), windows[0])


def telling_window(experiment: Experiment) -> int:
    """Return the window to judge where one is to stand for all: of the stage with the most passes."""
    steps = [first_full(experiment, windows) for windows in experiment.stage_windows]
    return max(steps, key=experiment.accum_steps)


class RunAudits:
    """The audits of one training run: which of its windows, and what they say of the run."""

    def __init__(self, experiment: Experiment, sink: Sink) -> None:
        self._experiment, self._sink = experiment, sink
        self.worst: Audit | None = None
        """Of the windows judged so far."""
        # No window of a stage is larger; its first may be the rest of an epoch.
        self._of_stages = {first_full(experiment, windows) for windows in experiment.stage_windows}

    def due(self, global_step: int) -> bool:
        """Whether the window of this global step is to be judged."""
        when = self._experiment.settings.audit
        if when.control_seed is not None:
            return False
        if when.every_steps is not None and global_step % when.every_steps == 0:
            return True
        return when.at_start and global_step in self._of_stages

    def judge(self, window: Window, global_step: int) -> Audit:
        """Judge a window that is about to be used; its numbers stand beside its own train/loss."""
        found = audit(self._experiment, window, global_step)
        self._sink.record(global_step + 1, numbers(found))
        before = self.worst
        self.worst = found if before is None else worst([before, found])
        if self.worst is not before:  # said at once: a run that fails later keeps it
            told = set() if before is None else set(tags(before))
            self._sink.describe(dict.fromkeys(told, "") | tags(self.worst))
        return found


def numbers(audit: Audit) -> dict[str, float]:
    """Return an audit's metrics, those that could be had."""
    values = {
        metrics.AUDIT_E64: audit.e64,
        metrics.AUDIT_E: audit.e,
        metrics.AUDIT_FLOOR: audit.floor,
    }
    return {key: v for key, v in values.items() if v is not None and math.isfinite(v)}


def tags(audit: Audit) -> dict[str, str]:
    """Return what an audit says in words, as far as it says it."""
    words = {key: getattr(audit, key) for key in TAGS}
    return {key: value for key, value in words.items() if value is not None}
