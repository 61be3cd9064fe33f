"""An arm's task: to train, with its controls, to audit, to plan or to advise; begun or gone on with."""

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

import gaccum_exp.arms.torch_settings  # noqa: F401  # takes down what they are before any arm
from gaccum_exp.arms import advise as advising
from gaccum_exp.arms import audits as audit_files
from gaccum_exp.arms import plan as planning
from gaccum_exp.arms import resume
from gaccum_exp.arms.context import ArmContext
from gaccum_exp.arms.life import Life, ends
from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.arms.provenance import device_tags
from gaccum_exp.audit.result import worst
from gaccum_exp.config.schema import Settings
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.fake import settle
from gaccum_exp.report.text.advice import print_advice
from gaccum_exp.report.text.audit_printout import print_audit
from gaccum_exp.tracking import metrics
from gaccum_exp.train.audits import WindowAudits, telling_windows
from gaccum_exp.train.build import TrainingData, build, load
from gaccum_exp.train.datasets import DatasetCache
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import NEVER, Stop

log = logging.getLogger(__name__)


def run_arm(
    context: ArmContext, settings: Settings, stop: Stop = NEVER, resumed: resume.Resumed | None = None
) -> Outcome:
    """Run one arm, or go on with it, and return how it ended; only an interruption is raised again.

    Args:
        context: of its job.
        settings: what it is.
        stop: asked to end it.
        resumed: the run to go on with; None: the arm's own, where its sweep has left that in its folder.
    """
    if resumed is None and settings.task == "train":
        resumed = left_by_sweep(context, settings)
    life, loaded, tags = Life(context, settings, stop=stop, resumed=resumed), None, {}
    with _controls_held(life):
        if resumed is not None and resumed.left.status == "FINISHED":  # only its controls are left
            life.had_finished(resumed.left.path)
            resumed.lock.release()
        else:
            with ends(life):
                if resumed is not None:
                    loaded = _load(life)
                    life.require_same_data(loaded)
                elif life.needs_data_to_begin:
                    try:
                        loaded = _load(life)
                        if settings.chooses_accum_steps:
                            with stop.at_once():
                                life.settings, why = planning.with_fitting_accum_steps(settings, loaded)
                            tags["accum.auto"] = why
                            log.info("accum.steps=auto: %s", why)
                    except Exception:
                        life.begin()  # so that the store knows of it too
                        raise
                life.begin(tags)
                tasks = {"train": _train, "audit": _audit, "plan": _plan, "advise": _advise}
                run_task = tasks[settings.task]
                life.finish(run_task(life, loaded))
        train_controls(life)
    assert life.outcome is not None
    return life.outcome


@contextmanager
def _controls_held(life: Life) -> Iterator[None]:
    """Let no other process train controls of a reference while this one does, or is going to."""
    settings, lock = life.settings, None
    if settings.task == "train" and settings.in_one_pass and settings.audit.controls:
        lock = resume.controls_lock(life.context.folder)
        if lock is None:
            if life.resumed is not None:
                life.resumed.lock.release()
            raise BadInputError(f"{life.name}: its controls are being trained by another process")
    try:
        yield
    finally:
        if lock is not None:
            lock.path.unlink(missing_ok=True)
            lock.release()


def left_by_sweep(context: ArmContext, settings: Settings) -> resume.Resumed | None:
    """Take the run that an arm's sweep has left in its folder; None: another one is begun there."""
    resumed = resume.in_folder(context.folder, settings)
    if resumed is None:
        _say_what_is_unlike(context, settings)
        return None
    if may_go_on(resumed.left, context):
        return resumed
    log.info("%s is left as it is, and the arm begun anew (resume=never)", resumed.left.told)
    resumed.lock.release()
    return None


def _say_what_is_unlike(context: ArmContext, settings: Settings) -> None:
    """Say why the run that an arm's sweep has left in its folder does not go on, if there is one."""
    of_arm = (run for run in resume.runs_in(context.folder) if "control_of" not in run.begin["tags"])
    left = next((run for run in of_arm if run.sweep_id == settings.sweep_id), None)
    unlike = {} if left is None else resume.Wanted(settings).differing(left)
    if left is not None and unlike:
        both = ", ".join(f"{key} ({there} there, {here} here)" for key, (there, here) in unlike.items())
        log.info("%s is left as it is, and the arm begun anew: %s", left.told, both)


def may_go_on(left: resume.Left, context: ArmContext) -> bool:
    """Whether a run that an arm's sweep has left is one to go on with.

    Under `resume=never` it is one of this command, whose job a batch system has put back into its queue.
    """
    own = left.begin["tags"].get("command_id") == context.command_id
    return own or str(context.config.resume) != resume.NEVER


# A task is a function of its own, so that nothing that it has built outlives it.


def _train(life: Life, loaded: TrainingData | None) -> str | None:
    """Train, within the memory that there is; return the worst verdict on a window."""
    settings, sink = life.settings, life.sink
    loaded = _load(life, loaded)
    budget, predicted = planning.budget_bytes(settings, loaded.device), None
    if settings.runtime.memory_budget_gib is not None:
        with life.stop.at_once():
            predicted = planning.predicted_peak(settings, loaded)
        planning.refuse_over_budget(settings, loaded, predicted, budget)
    state = _build(life, loaded)
    if predicted is None and budget is not None and not planning.plainly_fits(state, budget):
        predicted = planning.predicted_peak(settings, loaded)
        planning.refuse_over_budget(settings, loaded, predicted, budget)
    with life.progress(state.total_steps, life.controls) as progress:
        hooks, audits = hooks_of(
            state, sink, progress,
            budget_bytes=budget, stop=life.stop, checkpoints=life.checkpoints,
        )  # fmt: skip
        life.restore(state, hooks, audits)
        train(state, hooks)
    life.keep_weights(state)
    predicted = predicted or planning.predicted_peak(settings, loaded)
    if predicted is not None:
        whole = predicted.bytes + planning.held_by_libraries(loaded.device)
        sink.record(loaded.total_steps, {metrics.PREDICTED_PEAK_BYTES: whole})
    return None if audits.worst is None else audits.worst.verdict


def _audit(life: Life, loaded: TrainingData | None) -> str:
    """Judge the windows that tell, at the initial weights; print the worst and return its verdict."""
    state = _build(life, _load(life, loaded))
    audits = WindowAudits(state, life.sink, life.stop)
    found = worst([audits.judge(next(state.windows_from(k)), k) for k in telling_windows(state)])
    life.sink.keep_file(audit_files.write(found, life.context.folder))
    print_audit(life.name, found)
    return found.verdict


def _plan(life: Life, loaded: TrainingData | None) -> None:
    """Predict the memory of every N; record it, draw it and print it."""
    from gaccum_exp.report.figures.save_figures import (
        save_plan,  # with matplotlib, which no training waits for
    )

    sink, folder = life.sink, life.context.folder
    loaded = _load(life, loaded)
    with life.stop.at_once():
        planned = planning.plan(life.settings, loaded)
    for row in planned.rows:
        sizes = {key: value for key, value in row.as_dict().items() if key.endswith("_bytes")}
        sink.record(row.accum_steps, {metrics.planned(key): value for key, value in sizes.items()})
    chosen = {"plan.chosen_steps": planned.chosen_steps, "plan.knee_steps": planned.knee_steps}
    sink.describe(device_tags(loaded.device) | {k: str(v) for k, v in chosen.items() if v is not None})
    figures = save_plan(planned, folder, life.settings.figures.format, life.settings.figures.width)
    for path in (planning.write(planned, folder), *figures):
        sink.keep_file(path)
    print(f"{life.name}\n\n{planned}")
    if planned.chosen_steps is not None or planned.budget_bytes is None:
        print(f"Train with it: {planning.command(planned, life.context.overrides)}")
    print(f"Written: {folder / planning.PLAN}, and its figure beside it")


def _advise(life: Life, loaded: TrainingData | None) -> None:
    """Plan, try and audit the ways to a global batch; record and print what they take."""
    loaded = _load(life, loaded)
    found = advising.advise(life.settings, loaded, life.stop)
    best = found.recommended()
    told = {"advice.recommended": " ".join(best.overrides) or "as it is"} if best else {}
    life.sink.describe(device_tags(loaded.device) | told)
    life.sink.keep_file(advising.write(found, life.context.folder))
    print(f"{life.name}\n")
    print_advice(found)
    print(f"Written: {life.context.folder / advising.ADVICE}")


def train_controls(arm: Life) -> None:
    """Train a finished reference again in other orders, as often as was asked."""
    settings, context = arm.settings, arm.context
    if arm.outcome is None or arm.outcome.status != "FINISHED" or not arm.controls:
        return
    for number in range(1, arm.controls + 1):
        arm.stop.look()
        left = None
        if arm.resumed is not None:
            left = resume.control_in(context.folder, settings.sweep_id, number)
            if left is not None and left.begin["time_ms"] < arm.resumed.left.begin["time_ms"]:
                left = None  # of an earlier run of the arm
        if left is not None and not left.is_unfinished:
            continue
        of_control = context.with_values({"audit.control_seed": number})
        own, resumed = settings.as_control(number), None if left is None else resume.take(left)
        left_after = arm.controls - number
        _train_control(Life(of_control, own, arm.name, arm.stop, resumed), left_after)
    arm.controls_are_over()


def _train_control(life: Life, controls_left: int) -> None:
    with ends(life):
        loaded = None
        if life.resumed is not None:
            loaded = _load(life)
            life.require_same_data(loaded)
        life.begin()
        state = _build(life, _load(life, loaded))
        with life.progress(state.total_steps, controls_left) as progress:
            hooks, audits = hooks_of(
                state, life.sink, progress, stop=life.stop, checkpoints=life.checkpoints
            )
            life.restore(state, hooks, audits)
            train(state, hooks)
        life.keep_weights(state)
        life.finish(None)


@lru_cache(maxsize=1)
def shared_data(sweep_id: str) -> DatasetCache:
    """Return the data sets that the arms of a sweep share in this process; the last sweep's are kept."""
    return DatasetCache()


def clear() -> None:
    """Drop what an earlier arm left; what is imported before the first one stays for good."""
    settle()
    gc.enable()  # off since the command began
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _load(life: Life, loaded: TrainingData | None = None) -> TrainingData:
    clear()
    with life.stop.at_once():
        loaded = loaded or load(life.settings, shared_data(life.settings.sweep_id))
    life.settings = loaded.in_stages(life.settings)
    return loaded


def _build(life: Life, loaded: TrainingData) -> TrainState:
    """Build what a run trains or audits, and describe it; wait until the run has begun in the store."""
    with life.stop.at_once():
        state = build(life.settings, loaded)
    life.describe(loaded)
    with life.stop.at_once():
        is_open = life.sink.ready()
    if (
        is_open and not life.context.multirun and life.control_of is None
    ):  # a sweep says it once, before its arms
        log.info("recorded in %s, experiment %s", *life.store)
    return state
