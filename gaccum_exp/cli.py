"""The command line: the only hydra.main.

Exit status: 0; 1 a run failed; 2 bad input; 3 biased; 4 stochastic; 5 inconclusive; 130 interrupted.
3 to 5 only where an audit was asked for: `task=audit`, or `audit.every_steps` is set. Under `-m` it is
decided at the end, from what the arms have left: the first of 1, 3, 5, 4 that any arm earned.
"""

import gc
import logging
import os
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gaccum_exp.arms.context import ArmContext, Command, Launch, current_command, in_command_process
from gaccum_exp.arms.outcome import BAD_INPUT, INTERRUPTED, OK, RUN_FAILED, exit_status, read_outcomes
from gaccum_exp.config import explain
from gaccum_exp.config import schema as config
from gaccum_exp.errors import BadInputError, TrackingError
from gaccum_exp.tracking.journal import Journal


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; leave the process as it was.

    Args:
        arguments: what follows the program's name; None: those of this process.

    Raises:
        Exception: whatever stopped Hydra and is not about the configuration, e.g. a sweeper's own error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    with _process_restored():
        # Imports leave next to no garbage, and the search for it takes a sixth of their time. An arm
        # turns it on again.
        gc.disable()
        try:
            if given[:1] == ["deliver"]:
                from gaccum_exp.tracking.deliver import main as deliver

                return deliver(given[1:])
            if given[:1] == ["report"]:
                from gaccum_exp.arms.report import main as report

                return report(given[1:])
            return _run(given)
        except KeyboardInterrupt:  # while comparing
            return INTERRUPTED
        except SystemExit as end:  # of --help, of a wrong flag, of a configuration that was refused
            if isinstance(end.code, str):
                raise
            return end.code or OK


@contextmanager
def _process_restored() -> Iterator[None]:
    """Put back what a command changes of the process, torch's settings and Hydra's singletons too."""
    argv, environment, collects = sys.argv, dict(os.environ), gc.isenabled()
    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    loggers = [(logger, list(logger.handlers), logger.level) for logger in (logging.root, *known)]
    hydra_before, job_before = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    # Without waiting for torch, where no arm has needed it.
    life = sys.modules.get("gaccum_exp.arms.life")
    of_torch = None if life is None else life.process_settings()
    GlobalHydra.instance().clear()  # or Hydra refuses to begin
    try:
        yield
    finally:
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra_before, job_before
        life = sys.modules.get("gaccum_exp.arms.life")
        if life is not None:
            life.set_process_settings(of_torch or life.BEFORE_ANY_ARM)
        for logger, handlers, level in loggers:
            for handler in set(logger.handlers) - set(handlers):
                handler.close()
            logger.handlers = handlers
            logger.setLevel(level)
        sys.argv = argv
        for key in os.environ.keys() - environment.keys():
            del os.environ[key]
        os.environ.update(environment)
        if collects:
            gc.enable()
        else:
            gc.disable()


def _run(given: list[str]) -> int:
    """Run what Hydra makes of the arguments, then compare what there is."""
    config.register(f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}")
    # Ask Hydra for its exceptions instead of its own report and exit, unless the user wants them raw.
    raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra reads `seed=0 --config-dir mine model=x` as two lists of overrides and refuses the second.
    sys.argv = [sys.argv[0], *sorted(given, key=_place)]
    command, status = Command(), OK
    token = current_command.set(command)
    try:
        task()
    except KeyboardInterrupt:
        status = INTERRUPTED
    except Exception as error:  # of Hydra, its sweeper or launcher; an arm ends by itself
        line = explain.one_line(error, given)
        if raw or line is None:
            _end(
                command.launch, command.journal, RUN_FAILED
            )  # the arms that have ended are there to be compared
            raise
        print(f"gaccum_exp: {line}", file=sys.stderr)
        status = BAD_INPUT
    finally:
        current_command.reset(token)
        config.register()  # without this command's id
    return _end(command.launch, command.journal, status)


def _place(argument: str) -> int:
    """Order arguments: `-m`, other flags with their values, overrides (`key=value`, `~key`)."""
    if argument in ("-m", "--multirun"):
        return 0
    return 2 if argument.startswith("~") or ("=" in argument and not argument.startswith("-")) else 1


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="config")
def task(cfg: DictConfig) -> float | None:
    """Run one job; what it returns is for sweepers that minimise something."""
    job = HydraConfig.get()
    context = ArmContext(
        config=cfg,
        folder=Path(job.runtime.output_dir),
        overrides=tuple(job.overrides.task),
        choices=dict(job.runtime.choices),
        swept_keys=tuple(job.callbacks.get("sweep", {}).get("swept_keys", ())),
        multirun=job.mode == RunMode.MULTIRUN,
        owns_terminal=in_command_process(),
    )
    try:
        settings = config.validate(cfg)
    except BadInputError as error:
        if not context.multirun:  # answered at once, without waiting for torch and MLflow
            print(f"gaccum_exp: {error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from None
        from gaccum_exp.arms.seeds import refuse_seeds

        refuse_seeds(context, error)
        return None
    if settings.sweep.seeds is not None:
        from gaccum_exp.arms.seeds import run_seeds

        run_seeds(context)
        return None
    from gaccum_exp.arms.life import run_arm

    # None and not NaN for an arm that failed: Optuna's sweeper goes on after the one alone.
    return run_arm(context, settings).objective


def _end(launch: Launch | None, journal: Journal | None, status: int) -> int:
    """Compare what the arms have left, and let their outcomes decide the status."""
    outcomes = {} if launch is None else read_outcomes(launch.folder, launch.sweep_id)
    if launch is None or not outcomes:
        return status
    earned = exit_status(list(outcomes.values()), multirun=launch.multirun)
    audited = {folder: outcome for folder, outcome in outcomes.items() if outcome.task == "audit"}
    if audited and launch.multirun:
        from gaccum_exp.arms.audits import print_audits

        print_audits(audited)
    if any(outcome.task == "train" for outcome in outcomes.values()):
        from gaccum_exp.arms.report import Runs, report_sweep, show_run
        from gaccum_exp.arms.settle import record_report, say_where

        runs = Runs(launch.tracking_uri, launch.experiment_name, launch.folder)
        try:
            if launch.multirun:
                files = report_sweep(runs, launch.sweep_id, launch.folder)
                if journal is not None:
                    record_report(journal, launch.sweep_id, files)
            elif status == OK and earned not in (RUN_FAILED, BAD_INPUT):
                show_run(runs, launch.sweep_id)
        except (BadInputError, TrackingError) as error:
            print(f"gaccum_exp: nothing is compared: {error}", file=sys.stderr)
            status = status or RUN_FAILED
        shown = launch.sweep_id if launch.multirun else None
        say_where([launch.folder], launch.tracking_uri, shown)
    return status or earned
