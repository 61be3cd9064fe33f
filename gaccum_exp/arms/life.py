"""The life of a run: it begins in the store, or goes on there, and finishes, fails or is killed.

An arm, a control and each seed of a stacked training have the same one. However it goes, no run takes
the others down. An arm's end is written to its folder too (`arm.json`), so that the end of the sweep
knows of arms that could not be recorded anywhere else.
"""

import logging
import shlex
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gaccum_exp.arms import resume
from gaccum_exp.arms.context import ArmContext, given_name, label_of, name_of
from gaccum_exp.arms.outcome import Outcome
from gaccum_exp.arms.process import SPENT
from gaccum_exp.arms.provenance import (
    DECISIVE,
    DIGEST,
    data_tags,
    dataset_records,
    device_tags,
    digest_of,
    environment_tags,
)
from gaccum_exp.audit.result import worst
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError, TrackingError, text_of
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.records import LARGEST_BATCH, LARGEST_N
from gaccum_exp.tracking.resumed import Recorded, ResumedSink, UnequalError
from gaccum_exp.tracking.sink import WEIGHTS, JournalSink, NonFiniteLossError
from gaccum_exp.train.audits import WindowAudits, audit_of
from gaccum_exp.train.build import TrainingData
from gaccum_exp.train.checkpoint import files
from gaccum_exp.train.checkpoint.hook import FOLDER, Writer
from gaccum_exp.train.checkpoint.snapshot import restore
from gaccum_exp.train.final_weights import criterion_weights_of, weights_of
from gaccum_exp.train.hooks import Hooks
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import NEVER, Stop, StoppedError, worker_was_ended, workers_silenced

log = logging.getLogger(__name__)
EXPECTED = (BadInputError, NonFiniteLossError, TrackingError, UnequalError)
"""Errors whose message says all, as against faults of the program's or the user's code."""
MOST_STAGES = 12
"""Of a batch that grows, so many are written with a run."""
VECTORIZED = "vectorized"
"""The tag of a run that was trained together with others."""


class Life:
    """One run from its beginning in the store to its end.

    Args:
        context: the job that it is run by.
        settings: what it is; to be replaced once N is chosen.
        control_of: the name of the arm that it is a control of. A control's end does not count for its
            arm: nothing is written to the folder, and a failure is a warning.
        stop: asked to end it.
        resumed: the run that it goes on with; None: it begins one.
    """

    def __init__(
        self,
        context: ArmContext,
        settings: Settings,
        control_of: str | None = None,
        stop: Stop = NEVER,
        resumed: resume.Resumed | None = None,
    ) -> None:
        self.context, self.control_of, self.stop, self.resumed = context, control_of, stop, resumed
        self.settings = settings if resumed is None else resumed.settings(settings)
        self.outcome: Outcome | None = None
        """How it ended; None: it is not over."""
        self._sink: JournalSink | None = None
        self._recorded: Recorded | None = None
        """What the journal of a run that goes on told, once it was read."""
        self._checkpoint: Path | None = None
        """Of a run that goes on, where from; None: from its beginning."""

    @property
    def name(self) -> str:
        """What differs: `N=4 · micro 64 · mean`, and whatever else the sweep varies."""
        return name_of(self.context, self.settings, self.control_of)

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether its windows had to be split finer than was asked for."""
        return self._sink is not None and metrics.ACCUM_STEPS_NOW in self._sink.last

    @property
    def needs_data_to_begin(self) -> bool:
        """Whether only the data decide what N it is recorded under."""
        own = self.settings
        return own.task != "plan" and (own.chooses_accum_steps or own.accum.grow is not None)

    @property
    def controls(self) -> int:
        """How often it is trained again in other orders, once it has finished."""
        own = self.settings
        if self.control_of is not None or own.task != "train":
            return 0
        # Where memory ran out, it did not stay in one pass.
        return own.audit.controls if own.in_one_pass and not self.ran_out_of_memory else 0

    @property
    def sink(self) -> JournalSink:
        """Where it records; there is one once it has begun."""
        assert self._sink is not None
        return self._sink

    @property
    def store(self) -> tuple[str, str]:
        """The address of its store and its experiment: of a run that goes on, where it was begun."""
        if self.resumed is not None:
            store = self.resumed.left.store
            return str(store["uri"]), str(store["experiment_name"])
        return self.settings.tracking.uri, self.settings.tracking.experiment_name

    @property
    def checkpoints(self) -> Writer:
        """What writes its checkpoints, beside its journal."""
        journal = self.sink.journal
        return Writer(journal.file_path(FOLDER), journal.token)

    def begin(self, tags: Mapping[str, str] | None = None) -> None:
        """Begin the run's journal with its parameters, its configuration, its tags and these.

        That of a run that goes on has them, and says that it goes on.
        """
        settings, context = self.settings, self.context
        if self.resumed is not None:
            path = self.resumed.left.path
            recorded = self._recorded or Recorded(path)
            journal = Journal.going_on(path, self.resumed.lock)
            # What a machine that was switched off has forgotten of the journal is trained again.
            self._checkpoint = files.newest(journal.file_path(FOLDER), journal.token, recorded.last_step)
            place = None if self._checkpoint is None else files.place_of(self._checkpoint)
            self._sink = ResumedSink(journal, recorded, place[0] if place else 0)
            before, now = recorded.tags.get("command_id"), context.command_id
            if before and now and now not in before.split():
                self._sink.describe({"command_id": f"{before} {now}"})  # its times are of several loads
            return
        own = {
            "sweep_id": settings.sweep_id,
            "command_id": context.command_id or settings.sweep_id,
            "digest": context.digest,
            "kind": {"train": "arm"}.get(settings.task, settings.task),
            "role": "reference" if settings.in_one_pass else "candidate",
            "micro_batch_sizes": _spelled(settings.largest_batch, settings.accum_steps),
            "overrides": shlex.join(context.overrides),
        }
        if context.command:
            own["command"] = context.command
        if context.place is not None:
            own["arm"] = context.place
        if settings.audit.control_seed is not None:
            own["role"] = "control"
        if self.control_of is not None:
            own["control_of"] = self.control_of
        if len({stage.global_batch_size for stage in settings.stages}) > 1:
            own["global_batches"] = _growth(settings)
        if settings.accum.grow is not None:  # what is configured is the first batch
            own[LARGEST_N] = str(settings.accum_steps)
            own[LARGEST_BATCH] = str(settings.largest_batch)
        choices = {f"choice.{k}": str(v) for k, v in context.choices.items() if "/" not in k}
        to = settings.tracking
        journal = Journal.create(context.folder, to.uri, to.experiment_name, context.home)
        journal.begin(
            self.name,
            params=settings.flat(),
            tags=own | choices | environment_tags() | dict(tags or {}),
            texts={"config.yaml": OmegaConf.to_yaml(context.config, resolve=True)},
        )
        self._sink = JournalSink(journal)

    def describe(self, loaded: TrainingData | TrainState) -> None:
        """Record what it is made of: its device, and its data."""
        records, own = dataset_records(self.settings, loaded), device_tags(loaded.device)
        own |= data_tags(records)
        if self.resumed is not None:
            own |= environment_tags()
        self.sink.describe(own)
        self.sink.log_datasets(records)

    def require_same_data(self, loaded: TrainingData) -> None:
        """Refuse to go on with other data than the run was begun with; its journal stays as it is."""
        if self.resumed is None:
            return
        left = self.resumed.left
        self._recorded = Recorded(left.path)
        before = self._recorded.tags.get(DIGEST)
        now = digest_of(dataset_records(self.settings, loaded))
        if before not in (None, now):
            raise BadInputError(
                f"{left.told} does not go on: its data were {before}, and are {now}; "
                "resume=never begins another run"
            )

    def progress(self, total_steps: int, controls_left: int) -> Progress:
        """Return what shows how far its training is, after which so many controls are trained."""
        context, number = self.context, self.settings.audit.control_seed
        controls = 0 if number is None else number + controls_left
        turn = context.turn if context.turn is not None and context.turn.left is not None else None

        def following_s(own_s: float) -> float:
            of_arm = turn.following_s((1 + max(controls, controls_left)) * own_s) if turn else 0.0
            return controls_left * own_s + of_arm

        return Progress(
            label_of(context, self.settings, "" if number is None else f"control {number}"),
            total_steps,
            alone=context.owns_terminal,
            following_s=following_s if turn is not None else None,
        )

    def restore(self, state: TrainState, hooks: Hooks, audits: WindowAudits) -> None:
        """Bring a training that goes on to where it was, and say from where."""
        if self.resumed is None:
            return
        sink, left, runtime = self.sink, self.resumed.left, self.settings.runtime
        assert isinstance(sink, ResumedSink)
        recorded = sink.recorded
        if self._checkpoint is not None:
            restore(self._checkpoint, state, hooks)
        # The journal may know of a worse one than a checkpoint that was taken before it.
        told = [audit for audit in (audits.worst, audit_of(recorded.tags, state)) if audit is not None]
        audits.worst = worst(told) if told else None
        before = left.begin["tags"].get(LARGEST_N, left.params["accum.steps"])
        used = str(max(state.accum_steps(windows[0]) for windows in state.stage_windows))
        if recorded.tags.get("accum.steps_used", before) != used:
            sizes = split_sizes(self.settings.largest_batch, int(used))
            split = {"accum.steps_used": used, "micro_batch_sizes": ", ".join(map(str, sizes))}
            sink.describe(split | {"role": "candidate"})
        same_n = {before, *recorded.seen["accum.steps_used"]} == {used}
        if not (same_n and computes_alike(state, recorded)):
            coarser = runtime.tf32 or runtime.matmul_precision != "highest"
            sink.expect_rounding("fp16" if coarser else self.settings.precision)
        step = f"{state.global_step} of {state.total_steps}"
        done = f" and {state.begun.passes_done} micro-batches" if state.begun is not None else ""
        at = "" if used == before else f", at N = {used}"
        log.info("goes on with %s%s, from step %s%s", left.told, at, step, done)

    def keep_weights(self, state: TrainState) -> None:
        """Store what was trained, where that is asked for."""
        if not self.settings.tracking.log_weights:
            return
        weights = weights_of(state)
        self.sink.keep_weights(weights, criterion_weights_of(state))
        if weights.left_out:
            left_out = "; ".join(weights.left_out)
            self.sink.describe({"weights.left_out": left_out})
            log.info("%s is without %s: it loads with strict=False", WEIGHTS, left_out)

    def finish(self, verdict: str | None) -> None:
        """End it as finished, its checkpoints not being needed any more.

        Args:
            verdict: of the worst window audited.
        """
        sink = self.sink
        sink.close("FINISHED")
        self.checkpoints.drop()
        if isinstance(sink, ResumedSink) and sink.compared:
            log.info("%d steps were taken again, and are equal %s", len(sink.compared), sink.how_equal)
        self._finished(sink.last, verdict)

    def had_finished(self, journal: Path) -> None:
        """Take it as finished, as its journal has it."""
        recorded = Recorded(journal)
        self._finished(recorded.last, recorded.tags.get("verdict"))

    def _finished(self, last: Mapping[str, float], verdict: str | None) -> None:
        objective = last.get(metrics.EVAL_LOSS, last.get(metrics.TRAIN_LOSS))
        # Whatever ends its process before its controls are trained, it is to go on with them.
        self._end("FINISHED", verdict=verdict, objective=objective, again=self.controls > 0)

    def controls_are_over(self) -> None:
        """Take it as finished with its controls."""
        assert self.outcome is not None
        self._keep(replace(self.outcome, again=False))

    def fail(self, error: BaseException) -> None:
        """End it as failed with a reason, unless it is over."""
        if self.outcome is not None:
            return
        reason = reason_of(error)
        if not isinstance(error, EXPECTED):  # whatever it has interrupted may be half done
            SPENT.set()
        if self.control_of is not None:
            log.warning("%s failed: %s", self.name, reason)
        else:
            _say_failed(self.context.sweep_id, self.name, reason)
            if not isinstance(error, EXPECTED):  # a fault of the program's
                self._keep_traceback(error)
        self._abandon("FAILED", reason)
        refused, unwritten = (isinstance(error, kind) for kind in (BadInputError, TrackingError))
        self._end("FAILED", reason=reason, bad_input=refused, again=unwritten)

    def interrupt(self, error: KeyboardInterrupt) -> None:
        """End it as killed, unless it is over."""
        if self.outcome is None:
            reason = text_of(error) if isinstance(error, StoppedError) else "interrupted"
            try:
                self._abandon("KILLED", reason)
            except UnequalError as unequal:  # found in what had not been written yet
                self.fail(unequal)
            else:
                self._end("KILLED", reason=reason, again=True)

    def _keep_traceback(self, error: BaseException) -> None:
        path, text = self.context.folder / "traceback.txt", "".join(traceback.format_exception(error))
        try:
            path.write_text(text, encoding="utf-8", errors="backslashreplace")
            log.error("its traceback is in %s", path)
        except OSError as failed:
            log.error("its traceback cannot be written (%s)", failed.strerror)

    def _abandon(self, status: str, reason: str) -> None:
        if self._sink is None:
            if self.resumed is not None:
                self.resumed.lock.release()
            return
        try:
            self._sink.close(status, reason)
        except UnequalError:
            raise
        except Exception as error:  # it must not hide why the run has failed
            log.warning("the run could not be closed (%s)", error)

    def _end(self, status: str, **more: Any) -> None:
        own, asked = self.settings, self.settings.audit_asked
        outcome = Outcome(
            own.sweep_id, self.name, status, task=own.task, audit_asked=asked,
            digest=self.context.digest, command_id=self.context.command_id, **more,
        )  # fmt: skip
        self._keep(outcome)

    def _keep(self, outcome: Outcome) -> None:
        self.outcome = outcome
        if self.control_of is not None:
            return
        try:
            outcome.write(self.context.folder)
        except OSError as error:  # whoever waits for it is told, too
            log.error("%s: its outcome cannot be written (%s)", self.name, error)


def computes_alike(state: TrainState, recorded: Recorded) -> bool:
    """Whether a step gives the bits that it gave to all processes that have recorded a run before."""
    here = device_tags(state.device) | environment_tags()
    alike = all(recorded.seen[key] <= {here[key]} for key in DECISIVE)
    deterministic = state.device.type == "cpu" or state.settings.runtime.deterministic
    return alike and deterministic and VECTORIZED not in recorded.tags


def _spelled(samples: int, accum_steps: int) -> str:
    """Return the sizes of a window's micro-batches, of many the largest and the smallest."""
    if accum_steps > 64:
        return f"{-(-samples // accum_steps)} … {samples // accum_steps}"
    return ", ".join(map(str, split_sizes(samples, accum_steps)))


def _growth(settings: Settings) -> str:
    """Return the global batch over training, of many stages the first and the last."""
    stages, by = settings.stages, settings.accum.schedule_by
    by = "step" if settings.accum.grow is not None else by
    said = [f"{stage.global_batch_size} from {by} {stage.start}" for stage in stages]
    return ", ".join(said if len(said) <= MOST_STAGES else [*said[: MOST_STAGES - 2], "…", said[-1]])


@contextmanager
def ends(*lives: Life) -> Iterator[None]:
    """End the lives that are not over, on an error or an interruption; raise only the latter again.

    A request to end waits meanwhile, until it is looked at.
    """
    stop = lives[0].stop
    with stop.held():
        try:
            yield
        except KeyboardInterrupt as error:
            with workers_silenced():
                for life in lives:
                    life.interrupt(error)
            raise
        except BaseException as error:  # it is the result of this arm, and the others go on
            with workers_silenced():
                # A batch system ends data workers too, and theirs may be the first word of it.
                if worker_was_ended(error):
                    stop.comes_within(1.0)
                if stop.asked is None:
                    for life in lives:
                        life.fail(error)
                else:
                    for life in lives:
                        life.interrupt(stop.asked)
            stop.look()


def refuse_arm(context: ArmContext, error: BadInputError) -> Outcome:
    """Record an arm of a sweep whose configuration cannot be used, as FAILED with the reason."""
    config, name = context.config, given_name(context)
    _say_failed(context.sweep_id, name, str(error))
    task = str(config.task)
    outcome = Outcome(
        context.sweep_id, name, "FAILED", str(error), task, bad_input=True,
        digest=context.digest, command_id=context.command_id,
    )  # fmt: skip
    outcome.write(context.folder)
    tags = {"sweep_id": context.sweep_id, "kind": "arm", "role": "candidate", "digest": context.digest,
            "overrides": shlex.join(context.overrides),
            "command_id": context.command_id or context.sweep_id}  # fmt: skip
    if context.command:
        tags["command"] = context.command
    if context.place is not None:
        tags["arm"] = context.place
    try:
        to = config.tracking
        journal = Journal.create(context.folder, str(to.uri), str(to.experiment_name))
        text = OmegaConf.to_yaml(config)
        journal.begin(name, params={}, tags=tags, texts={"config.yaml": text})
        JournalSink(journal).close("FAILED", str(error))
    except Exception as recording:  # the reason is in arm.json
        log.warning("%s could not be recorded (%s)", name, recording)
    return outcome


def _say_failed(sweep_id: str, name: str, reason: str) -> None:
    """Log that an arm failed; a reason that several share is said of the first, in this process."""
    first = _first_failed(sweep_id).setdefault(reason, name)
    if reason.startswith(f"{name}: "):  # of an arm that is named after what it was given
        log.error("%s", reason)
    else:
        log.error("%s failed%s", name, f": {reason}" if first == name else f", as {first} did")


@lru_cache(maxsize=1)
def _first_failed(sweep_id: str) -> dict[str, str]:
    """Return the name of the first arm that failed for a reason, by that; the last sweep's are kept."""
    return {}


def reason_of(error: BaseException) -> str:
    """Return in a line why a run failed."""
    if isinstance(error, SystemExit):
        return f"the model called sys.exit({'' if error.code is None else repr(error.code)})"
    lines = [line.strip() for line in text_of(error).splitlines() if line.strip()] or ["no message"]
    if out_of_memory(error):
        advice = "task=plan says which N fits, accum.on_oom=increase_steps goes on with one that does"
        return f"out of memory ({lines[0]}): {advice}"
    expected = isinstance(error, EXPECTED)
    return lines[0] if expected else f"{type(error).__name__}: {lines[0]}"
