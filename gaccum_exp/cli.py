"""The command line: the only hydra.main.

Exit status: 0; 1 a run failed; 2 bad input; 3 biased; 4 stochastic; 5 inconclusive; 130 interrupted.
3 to 5 only where an audit was asked for: `task=audit`, or `audit.every_steps` is set. Under `-m` it is
decided at the end, from what the arms have left: the first of 1, 3, 5, 4 that any arm earned.
"""

import gc
import os
import sys
import uuid
from datetime import datetime

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gaccum_exp.arms import callback as sweep
from gaccum_exp.config import explain
from gaccum_exp.config import schema as config
from gaccum_exp.errors import BadInputError, TrackingError

SWEEP_ID = "GACCUM_EXP_SWEEP_ID"
OK, RUN_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main() -> int:
    """Run the command line and return its exit status."""
    if sys.argv[1:2] == ["report"]:
        from gaccum_exp.arms.report import main as report

        return report(sys.argv[2:])
    gc.disable()  # importing leaves next to no garbage, and the search for it takes a sixth of the time
    os.environ[SWEEP_ID] = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    # Ask Hydra for its exceptions instead of its own report and exit, unless the user wants them raw.
    raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    config.register()
    # Hydra reads `accum.steps=1,2 -m seed=0` as two lists of overrides and refuses the second.
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    try:
        return _end(_run(raw))
    except KeyboardInterrupt:  # while comparing
        return INTERRUPTED


def _run(raw: bool) -> int:
    """Run what Hydra makes of the command line; what an arm fails of is not seen here."""
    try:
        task()
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        line = explain.one_line(error, sys.argv[1:])
        if raw or line is None:
            _end(RUN_FAILED)  # a sweeper or launcher gave up; its arms are there to be compared
            raise
        print(f"gaccum_exp: {line}", file=sys.stderr)
        return BAD_INPUT
    return OK


@hydra.main(version_base="1.3", config_path=config.conf_dir(), config_name="config")
def task(cfg: DictConfig) -> float | None:
    """Run one arm; what it returns is for sweepers that minimise something."""
    multirun = HydraConfig.get().mode == RunMode.MULTIRUN
    try:
        settings = config.validate(cfg)
    except BadInputError as error:
        if not multirun:  # answered at once, without waiting for torch and MLflow
            print(f"gaccum_exp: {error}", file=sys.stderr)
            raise SystemExit(BAD_INPUT) from None
        from gaccum_exp.arms.seeds import refuse_seeds

        refuse_seeds(cfg, error)
        return None
    if settings.sweep.seeds is not None:
        from gaccum_exp.arms.seeds import run_seeds

        run_seeds(cfg)
        return None
    from gaccum_exp.arms.life import run_arm

    # None and not NaN for an arm that failed: Optuna's sweeper goes on after the one alone.
    return run_arm(settings, cfg).objective


def _end(status: int) -> int:
    """Compare what there is, and let the arms' outcomes decide the status."""
    if not sweep.begun:
        return status
    current = sweep.begun[-1]
    ended = sweep.outcomes(current)
    if not ended:
        return status
    audited = [outcome for outcome in ended if outcome["task"] == "audit"]
    if audited and current.multirun:
        from gaccum_exp.arms.audits import show_sweep

        show_sweep(audited)
    if any(outcome["task"] == "train" for outcome in ended) and not _compared(current, status):
        status = status or RUN_FAILED
    return status or sweep.exit_status(current)


def _compared(current: sweep.Begun, status: int) -> bool:
    """Compare the arms that trained, or one run with what the store holds; False where it cannot be."""
    from gaccum_exp.arms.report import report_sweep, show_run
    from gaccum_exp.tracking.shipper import connect

    store = connect(current.tracking_uri, current.experiment_name)
    try:
        if current.multirun:
            report_sweep(store, current.sweep_id, current.folder)
        elif status == OK and sweep.exit_status(current) not in (RUN_FAILED, BAD_INPUT):
            show_run(store, current.sweep_id)
    except (BadInputError, TrackingError) as error:
        print(f"gaccum_exp: nothing is compared: {error}", file=sys.stderr)
        return False
    return True
