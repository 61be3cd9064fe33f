"""The command line: the only hydra.main.

Exit status: 0; 1 a run failed; 2 bad input; 130 interrupted. Under `-m` it is decided at the end, from
what the arms have left.
"""

import logging
import os
import sys
import uuid
from datetime import datetime

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from gaccum_exp import config, explain, sweep
from gaccum_exp.errors import BadInputError

log = logging.getLogger(__name__)
SWEEP_ID = "GACCUM_EXP_SWEEP_ID"
OK, RUN_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main() -> int:
    """Run the command line and return its exit status."""
    os.environ[SWEEP_ID] = f"{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:6]}"
    # Ask Hydra for its exceptions instead of its own report and exit, unless the user wants them raw.
    raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    os.environ["HYDRA_FULL_ERROR"] = "1"
    config.register()
    try:
        task()
    except KeyboardInterrupt:
        return _end(INTERRUPTED)
    except Exception as error:
        line = explain.one_line(error, sys.argv[1:])
        if raw or line is None:
            raise
        print(f"gaccum_exp: {line}", file=sys.stderr)
        return _end(BAD_INPUT)
    return _end(OK)


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
        from gaccum_exp.arm import refuse_arm

        refuse_arm(cfg, error)
        return float("nan")
    from gaccum_exp.arm import run_arm

    outcome = run_arm(settings, cfg)
    return float("nan") if outcome.objective is None else outcome.objective


def _end(status: int) -> int:
    """Compare what there is, and let the arms' outcomes decide the status."""
    if not sweep.begun:
        return status
    current = sweep.begun[-1]
    if not sweep.outcomes(current):
        return status
    if current.multirun:
        from gaccum_exp.report.__main__ import report_sweep

        report_sweep(current.tracking_uri, current.experiment_name, current.sweep_id, current.folder)
    return status or sweep.exit_status(current)
