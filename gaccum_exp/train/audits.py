"""The hook that audits a training's windows, and an audit's metrics and tags."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gaccum_exp.audit.audit_window import audit_window
from gaccum_exp.audit.audited_window import SAMPLES, WINDOW_FILE
from gaccum_exp.audit.result import Audit, worst
from gaccum_exp.core.feed import Window
from gaccum_exp.core.losses.protocol import Clamped, count
from gaccum_exp.core.seeding import derive_seed
from gaccum_exp.core.window import split_sizes
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.hooks import Hook
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import NEVER, Stop

log = logging.getLogger(__name__)
MOST_COUNTED = 1000
"""Windows at most that are looked through for one that counts unequally, where nothing is trained."""
TAGS = ("verdict", "culprit", "culprit_type", "cause", "remedy", "detail")


def audit(state: TrainState, window: Window, global_step: int) -> Audit:
    """Audit one window of a training at its present weights, and leave the training as it was.

    An audit that fails is an inconclusive one.
    """
    try:
        return audit_window(
            state.model,
            state.loss_fn,
            window,
            reduction=state.reduction_at(global_step),
            strategy=state.strategy,
            loss_scale=1.0 if state.scaler is None else state.scaler.get_scale(),
            seed=derive_seed(state.settings.seed, "model", global_step),  # as the step's own passes
        )
    except Exception as error:  # the run goes on without it
        reason = f"the audit failed: {type(error).__name__}: {error}"
        log.warning("%s", reason)
        return Audit("inconclusive", len(window), state.reduction.name, detail=reason)


def first_full(state: TrainState, windows: range) -> int:
    """Return the first full window of a stage; the stage's very first may be the rest of an epoch."""
    return next((k for k in windows if state.is_full(k)), windows[0])


def stages_audited(state: TrainState) -> list[range]:
    """Return the stages whose first full window is audited: all, and of a batch that grows by single
    micro-batches those where N has doubled."""
    if state.growth is None:
        return state.stage_windows
    found: list[range] = []
    for windows in state.stage_windows:
        if not found or state.accum_steps(windows[0]) >= 2 * state.accum_steps(found[-1][0]):
            found.append(windows)
    return found


def first_unequal(state: TrainState, windows: range) -> int | None:
    """Return the first window of a stage that is cut otherwise than its full ones, and so may be biased
    where they are not: its micro-batches differ in size, and the reduction wants them equal.

    None: there is none.
    """
    if not state.reduction.needs_equal_parts or state.plan.partial_window != "exact":
        return None
    if _differ(state, first_full(state, windows)):
        return None
    partial = next((k for k in windows if not state.is_full(k)), None)
    return partial if partial is not None and _differ(state, partial) else None


def _differ(state: TrainState, global_step: int) -> bool:
    return len(set(split_sizes(state.plan.size(global_step), state.accum_steps(global_step)))) > 1


def counts_unequally(state: TrainState, window: Window) -> bool | None:
    """Return whether the micro-batches of a window count unequally, and the reduction wants them equal.

    Nothing runs for it. None: what they count is known after their passes only.
    """
    if not state.reduction.needs_equal_parts or len(window) < 2:
        return False
    counts = [count(state.loss_fn, micro_batch) for micro_batch in window]
    if any(n is None for n in counts):
        return None
    terms = [{"": n} if not isinstance(n, Mapping) else n for n in counts]
    return any(_number(of.get(name, 0)) != _number(n) for of in terms for name, n in terms[0].items())


def telling_windows(state: TrainState) -> list[int]:
    """Return the windows to audit where few stand for all: of the stage with the most passes.

    Those are its first full one, the first that is cut unequally, and the first that counts so: of the
    windows of its first epoch, at most as many as are counted.
    """
    stage = max(state.stage_windows, key=lambda windows: state.accum_steps(windows[0]))
    cut, counting = first_unequal(state, stage), None
    if not state.reduction.needs_equal_parts:
        return [first_full(state, stage)]
    in_epoch = next((k + 1 for k in stage if state.plan.ends_epoch(k)), stage.stop)
    counted = range(stage.start, min(in_epoch, stage.start + MOST_COUNTED))
    for k, window in zip(counted, state.windows_from(stage.start), strict=False):
        unequal = counts_unequally(state, window)
        counting = k if unequal and k != cut else None
        if unequal is not False:
            break
    return list(dict.fromkeys(k for k in (first_full(state, stage), cut, counting) if k is not None))


def _number(count: Any) -> float:
    return float(count.denominator if isinstance(count, Clamped) else count)


class WindowAudits(Hook):
    """Audits the first full window of every stage, the first partial one where that is cut unequally,
    the first one whose micro-batches count unequally, and windows at intervals.

    Args:
        state: of the training.
        sink: takes the numbers of each audit, and in words, with its window, the worst one so far.
        stop: ends it, also in the middle of an audit: that may take long, and is not kept.
    """

    def __init__(self, state: TrainState, sink: Sink, stop: Stop = NEVER) -> None:
        self._state, self._sink, self._stop = state, sink, stop
        self._judged: tuple[int, int] | None = None
        self.worst: Audit | None = None
        """Of the windows audited so far."""
        self._unequal = {first_unequal(state, windows) for windows in state.stage_windows} - {None}
        self._counts: bool | None = False
        """Whether a window was met that counts unequally; None: what they count is known after their
        passes only."""
        self._counting: int | None = None
        """The first such window, of those since the training began or went on."""
        self._of_stages = {first_full(state, windows) for windows in stages_audited(state)}

    def state_dict(self) -> dict[str, Any]:
        """Return the window that was audited last, and the worst audit."""
        worst = None if self.worst is None else self.worst.as_dict()
        return {"judged": self._judged, "worst": worst, "counts": self._counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._judged = state["judged"]
        self.worst = None if state["worst"] is None else Audit.of_dict(state["worst"])
        self._counts = state.get("counts", False)

    def due(self, global_step: int) -> bool:
        """Whether the window of this global step is to be audited."""
        when = self._state.settings.audit
        if when.control_seed is not None:
            return False
        if when.every_steps is not None and global_step % when.every_steps == 0:
            return True
        return when.at_start and global_step in self._of_stages | self._unequal | {self._counting}

    def before(self, state: TrainState, window: Window) -> None:
        """Audit a window that is about to be used, once for each way to split it."""
        when = state.settings.audit
        if self._counts is False and when.at_start and when.control_seed is None:
            self._counts = counts_unequally(state, window)
            self._counting = state.global_step if self._counts else None
        split = state.global_step, state.split_factor
        known = self._sink.has(state.global_step + 1, metrics.AUDIT_E)
        if self.due(state.global_step) and self._judged != split and not known:
            self._judged = split
            self._sink.flush()
            self.judge(window, state.global_step)

    def judge(self, window: Window, global_step: int) -> Audit:
        """Audit a window that is about to be used; its numbers stand beside its own train/loss."""
        with self._stop.at_once():
            found = self._placed(audit(self._state, window, global_step), global_step)
        unequal = counts_unequally(self._state, window)
        if global_step in self._unequal:
            found = found.noting("on the partial window that ends an epoch")
        elif unequal and global_step not in self._of_stages:
            found = found.noting(f"on window {global_step + 1}, whose micro-batches count unequally")
        elif unequal is None and found.sound:
            found = found.noting(
                f"on window {global_step + 1}: what others count is known after their passes alone"
            )
        self._sink.record(global_step + 1, numbers(found))
        before = self.worst
        self.worst = found if before is None else worst([before, found])
        if self.worst is not before:  # kept at once: a run that fails later has it
            if found.window is not None:  # first, for what its words are of is not kept again
                self._sink.keep_text(WINDOW_FILE, found.window.as_json())
            replaced = set() if before is None else set(tags(before))
            self._sink.describe(dict.fromkeys(replaced, "") | tags(self.worst))
        return found

    def _placed(self, found: Audit, global_step: int) -> Audit:
        """Return the audit, with where its window stands in the training and what is counted there."""
        window = found.window
        if window is None:
            return found
        counts_tokens = self._state.counts_tokens and window.unit != SAMPLES
        unit = "tokens" if counts_tokens else window.unit
        placed = replace(window, verdict=found.verdict, global_step=global_step, unit=unit)
        return replace(found, window=placed)


def numbers(audit: Audit) -> dict[str, float]:
    """Return an audit's metrics, those that are finite."""
    values = {
        metrics.AUDIT_E64: audit.e64,
        metrics.AUDIT_E: audit.e,
        metrics.AUDIT_FLOOR: audit.floor,
    }
    return {key: v for key, v in values.items() if v is not None and math.isfinite(v)}


def tags(audit: Audit) -> dict[str, str]:
    """Return an audit's words as tags, those that it has."""
    words = {key: getattr(audit, key) for key in TAGS} | {"remedy": audit.remedies}
    return {key: value for key, value in words.items() if value is not None}


def audit_of(tags: Mapping[str, str], state: TrainState) -> Audit | None:
    """Return the audit that a run's tags tell, in words alone; None where it was not audited."""
    words: dict[str, Any] = {key: tags[key] for key in TAGS if tags.get(key)}
    if "verdict" not in words:
        return None
    return Audit(accum_steps=state.settings.accum_steps, reduction=state.reduction.name, **words)
