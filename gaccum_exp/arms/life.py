"""One arm of a sweep: build, train or audit, record, and never take the other arms down.

Whatever happens is written to the arm's folder as well (`arm.json`), so that the end of the sweep knows
of arms that could not be recorded anywhere else.
"""

import copy
import gc
import json
import logging
import os
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from gaccum_exp.arms import audits as audit_files
from gaccum_exp.arms import plan as planning
from gaccum_exp.arms.callback import OUTCOME, SWEPT_KEYS
from gaccum_exp.arms.provenance import dataset_records, device_tags, environment_tags
from gaccum_exp.audit.result import Audit
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.window import split_sizes
from gaccum_exp.errors import BadInputError
from gaccum_exp.memory.available import out_of_memory
from gaccum_exp.memory.fake import settle
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.progress import Progress
from gaccum_exp.tracking.shipper import connect
from gaccum_exp.tracking.sink import MlflowSink
from gaccum_exp.train import audits as certify
from gaccum_exp.train.build import TrainingData, build, load
from gaccum_exp.train.datasets import DatasetCache
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an arm ended."""

    sweep_id: str
    name: str
    status: str
    """FINISHED, FAILED or KILLED"""
    reason: str | None = None
    task: str = "train"
    verdict: str | None = None
    """Of the worst window audited."""
    audit_asked: bool = False
    """Whether the exit status answers for the verdict."""
    bad_input: bool = False
    """Whether the reason is the user's to mend."""
    objective: float | None = None
    """The last evaluation loss, or training loss without evaluation: what a sweeper may minimise."""

    def write(self, folder: Path) -> None:
        """Keep it in the arm's folder."""
        (folder / OUTCOME).write_text(json.dumps(asdict(self)))


def run_arm(settings: Settings, cfg: DictConfig) -> Outcome:
    """Run one arm and return how it ended; only an interruption is raised again."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    name = run_name(settings)
    sink: MlflowSink | None = None
    outcome = Outcome(
        settings.sweep_id, name, "FINISHED", task=settings.task, audit_asked=settings.audit_asked
    )
    try:
        loaded, chosen = None, {}
        if settings.auto_steps and settings.task != "plan":
            try:
                loaded = load(settings, shared_data(settings.sweep_id))
                settings, said = planning.with_fitting_steps(settings, loaded)
            except Exception:
                sink = start_run(settings, cfg, name, role_of(settings))
                raise
            name, chosen = run_name(settings), {"accum.auto": said}
            outcome = replace(outcome, name=name)
            log.info("accum.steps=auto: %s", said)
        sink = start_run(settings, cfg, name, role_of(settings) | chosen)
        outcome = _run(settings, loaded, name, sink, folder, outcome)
        sink.close("FINISHED")
    except Exception as error:  # whatever ends an arm is that arm's result, and no more
        reason = reason_of(error)
        report_failure(name, reason, error, folder)
        abandon(sink, "FAILED", reason)
        bad_input = isinstance(error, BadInputError)
        outcome = replace(outcome, status="FAILED", reason=reason, bad_input=bad_input)
    except BaseException:
        abandon(sink, "KILLED", "interrupted")
        replace(outcome, status="KILLED", reason="interrupted").write(folder)
        raise
    outcome.write(folder)
    if outcome.status == "FINISHED" and sink is not None and metrics.STEPS_NOW not in sink.last:
        train_controls(settings, cfg, name)
    return outcome


def train_controls(settings: Settings, cfg: DictConfig, name: str) -> None:
    """Train a finished arm again in other orders, as often as was asked, if it ran in one pass."""
    if settings.task == "train" and settings.accum_steps == 1:
        for number in range(1, settings.audit.controls + 1):
            _train_control(settings.as_control(number), cfg, name)


def refuse_arm(cfg: DictConfig, error: BadInputError) -> Outcome:
    """Record an arm of a sweep whose configuration cannot be used, as FAILED with the reason."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    swept = os.environ.get(SWEPT_KEYS, "").split(",")
    task = HydraConfig.get().overrides.task
    name = " · ".join(o for o in task if o.partition("=")[0].lstrip("+") in swept) or " · ".join(task)
    log.error("%s failed: %s", name, error)
    outcome = Outcome(str(cfg.sweep_id), name, "FAILED", str(error), task=str(cfg.task), bad_input=True)
    outcome.write(folder)
    tags = {"sweep_id": str(cfg.sweep_id), "kind": "arm", "role": "candidate"}
    try:
        store = connect(cfg.tracking.uri, cfg.tracking.experiment_name)
        run = store.start_run(name, params={}, tags=tags, texts={"config.yaml": OmegaConf.to_yaml(cfg)})
        run.end("FAILED", str(error))
    except Exception as recording:  # the reason is in arm.json; what cannot be recorded is said
        log.warning("%s could not be recorded (%s)", name, recording)
    return outcome


@lru_cache(maxsize=1)
def shared_data(sweep_id: str) -> DatasetCache:
    """Return the data sets that the arms of a sweep share in this process; the last sweep's are kept."""
    return DatasetCache()


def run_name(settings: Settings) -> str:
    """Say what differs: `N=4 · micro 64 · mean`, and whatever else the sweep varies."""
    split = f"N={settings.accum_steps}", f"micro {settings.data.micro_batch_size}"
    if settings.task == "plan":  # it is of every N
        split = "plan", f"global batch {settings.data.global_batch_size}"
    parts = [*split, settings.accum.reduction]
    named = ("accum.steps", "accum.reduction", "data.micro_batch_size")
    values = settings.flat() | dict(HydraConfig.get().runtime.choices)
    swept = os.environ.get(SWEPT_KEYS, "").split(",")
    return " · ".join(parts + [f"{k}={values[k]}" for k in swept if k in values and k not in named])


def start_run(settings: Settings, cfg: DictConfig, name: str, role: Mapping[str, str]) -> MlflowSink:
    """Begin a run in the store: its parameters, its tags, its configuration."""
    store = connect(settings.tracking.uri, settings.tracking.experiment_name)
    run = store.start_run(
        name,
        params=settings.flat(),
        tags={**_tags(settings), **role},
        texts={"config.yaml": OmegaConf.to_yaml(cfg, resolve=True)},
    )
    return MlflowSink(run)


def _run(
    settings: Settings,
    loaded: TrainingData | None,
    name: str,
    sink: MlflowSink,
    folder: Path,
    outcome: Outcome,
) -> Outcome:
    """Do what the task says; a function, so that nothing that was built outlives it."""
    clear()
    loaded = load(settings, shared_data(settings.sweep_id)) if loaded is None else loaded
    if settings.task == "plan":
        _plan(settings, loaded, name, sink, folder)
        return outcome
    if settings.task == "audit":
        found = _audit(_build(settings, loaded, sink), name, sink, folder)
        return replace(outcome, verdict=found.verdict)
    budget = planning.budget_bytes(settings, loaded.device)
    predicted = None
    if settings.runtime.memory_budget_gib is not None:
        predicted = planning.predicted_peak(settings, loaded)
        planning.require_room(settings, loaded, predicted, budget)
    state = _build(settings, loaded, sink)
    if predicted is None and budget is not None and not planning.plainly_fits(state, budget):
        predicted = planning.predicted_peak(settings, loaded)
        planning.require_room(settings, loaded, predicted, budget)
    worst = _train(state, name, sink, budget)
    predicted = predicted or planning.predicted_peak(settings, loaded)
    if predicted is not None:
        whole = predicted.bytes + planning.held_by_libraries(loaded.device)
        sink.record(loaded.total_steps, {metrics.PREDICTED_PEAK_BYTES: whole})
    objective = sink.last.get(metrics.EVAL_LOSS, sink.last.get(metrics.TRAIN_LOSS))
    return replace(outcome, verdict=None if worst is None else worst.verdict, objective=objective)


def _build(settings: Settings, loaded: TrainingData, sink: MlflowSink) -> TrainState:
    """Build, and say what was built."""
    state = build(settings, loaded)
    describe(state, sink)
    sink.ready()
    return state


def describe(state: TrainState, sink: MlflowSink) -> None:
    """Say what a run is made from, once it is built."""
    data = dataset_records(state)
    digests = {"data_digest": " ".join(record.digest for record in data)}
    sink.describe(device_tags(state.device) | digests)
    sink.log_datasets(data)


def _train(state: TrainState, name: str, sink: MlflowSink, budget: int | None = None) -> Audit | None:
    """Train, keep the weights, and return the worst audit."""
    alone = "Basic" in HydraConfig.get().launcher._target_
    with Progress(name, state.total_steps, alone=alone) as progress:
        hooks, audits = hooks_of(state, sink, progress, budget_bytes=budget)
        train(state, hooks)
    keep_weights(state, sink)
    return audits.worst


def keep_weights(state: TrainState, sink: MlflowSink) -> None:
    """Store what was trained, where that is asked for."""
    if state.settings.tracking.log_weights:
        named = state.modules.named_parameters()
        sink.keep_weights({name: p for name, p in named if p.requires_grad})


def _plan(settings: Settings, loaded: TrainingData, name: str, sink: MlflowSink, folder: Path) -> None:
    """Predict the memory of every N; record it, draw it and print it."""
    from gaccum_exp.report.figures.draw import save_plan  # with matplotlib, which no training waits for

    planned = planning.plan(settings, loaded)
    for row in planned.rows:
        sizes = {key: value for key, value in row.as_dict().items() if key.endswith("_bytes")}
        sink.record(row.accum_steps, {f"plan/{key}": value for key, value in sizes.items()})
    chosen = {"plan.chosen_steps": planned.chosen_steps, "plan.knee_steps": planned.knee_steps}
    sink.describe(device_tags(loaded.device) | {k: str(v) for k, v in chosen.items() if v is not None})
    for path in (planning.write(planned, folder), *save_plan(planned, folder)):
        sink.keep_file(path)
    print(f"{name}\n\n{planned}")
    if planned.chosen_steps is not None or planned.budget_bytes is None:
        print(f"Train with it: {planning.command(planned, HydraConfig.get().overrides.task)}")
    print(f"Written: {folder / planning.PLAN}, and its figure beside it")


def _audit(state: TrainState, name: str, sink: MlflowSink, folder: Path) -> Audit:
    """Judge a window at the initial weights; record it and print it."""
    audits = certify.WindowAudits(state, sink)
    step = certify.telling_window(state)
    found = audits.judge(next(state.windows_from(step)), step)
    sink.keep_file(audit_files.write(found, folder))
    audit_files.show(name, found)
    return found


def _train_control(settings: Settings, cfg: DictConfig, control_of: str) -> None:
    """Train the reference again in another order; what becomes of it is no matter of the arm's."""
    name = f"{control_of} · control {settings.audit.control_seed}"
    cfg = copy.deepcopy(cfg)
    cfg.audit.control_seed = settings.audit.control_seed
    sink: MlflowSink | None = None
    try:
        sink = start_run(settings, cfg, name, role_of(settings) | {"control_of": control_of})
        clear()
        _train(_build(settings, load(settings, shared_data(settings.sweep_id)), sink), name, sink)
        sink.close("FINISHED")
    except Exception as error:
        log.warning("%s failed: %s", name, reason_of(error))
        abandon(sink, "FAILED", reason_of(error))
    except BaseException:
        abandon(sink, "KILLED", "interrupted")
        raise


def role_of(settings: Settings) -> dict[str, str]:
    """Return the tag that says what a run is in a comparison."""
    if settings.audit.control_seed is not None:
        return {"role": "control"}
    return {"role": "reference" if settings.accum_steps == 1 else "candidate"}


def _tags(settings: Settings) -> dict[str, str]:
    sizes = split_sizes(settings.data.global_batch_size, settings.accum_steps)
    spelled = ", ".join(map(str, sizes)) if len(sizes) <= 64 else f"{sizes[0]} … {sizes[-1]}"
    return {
        "sweep_id": settings.sweep_id,
        "kind": {"train": "arm"}.get(settings.task, settings.task),
        "micro_batch_sizes": spelled,
        **_growth(settings),
        "overrides": " ".join(HydraConfig.get().overrides.task),
        **{f"choice.{k}": str(v) for k, v in HydraConfig.get().runtime.choices.items() if "/" not in k},
        **environment_tags(),
    }


def _growth(settings: Settings) -> dict[str, str]:
    """Say which global batches a schedule goes through, where they differ."""
    sizes = [stage.global_batch_size for stage in settings.stages]
    if len(set(sizes)) == 1:
        return {}
    by = settings.accum.schedule_by
    said = (f"{stage.global_batch_size} from {by} {stage.start}" for stage in settings.stages)
    return {"global_batches": ", ".join(said)}


def reason_of(error: Exception) -> str:
    """Say in a line why a run failed."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    if out_of_memory(error):
        advice = "task=plan says which N fits, accum.on_oom=increase_steps goes on with one that does"
        return f"out of memory ({lines[0]}): {advice}"
    told = isinstance(error, (BadInputError, metrics.NonFiniteLossError))
    return lines[0] if told else f"{type(error).__name__}: {lines[0]}"


def report_failure(name: str, reason: str, error: Exception, folder: Path) -> None:
    """Log why a run failed, and write down where, if that is not the user's affair."""
    log.error("%s failed: %s", name, reason)
    if not isinstance(error, (BadInputError, metrics.NonFiniteLossError)):
        path = folder / "traceback.txt"
        path.write_text("".join(traceback.format_exception(error)))
        log.error("its traceback is in %s", path)


def abandon(sink: MlflowSink | None, status: str, reason: str) -> None:
    """End the run of a failed arm; that it cannot be ended must not hide why it failed."""
    if sink is None:
        return
    try:
        sink.close(status, reason)
    except Exception as error:
        log.warning("the run could not be closed (%s)", error)


def clear() -> None:
    """Drop what an earlier arm left; what is imported before the first one stays for good."""
    settle()
    gc.enable()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()
