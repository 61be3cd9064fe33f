"""What `watch` says of a loop, and whether that is what it should say."""

import contextlib
import io
from typing import Any

import gaccum_exp
from experiments.negative_controls.control import Control, Ground, Loop, run


def watched(loop: Loop, ground: Ground) -> Any:
    """Run the loop under `watch`, silently; return the audit."""
    built = ground.build()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        gaccum_exp.watch(built.model, built.criterion, built.optimizer) as audit,
    ):
        run(loop, built)
    return audit


def caught(control: Control, audit: Any) -> bool:
    """Say whether the planted fault was found, and named as expected."""
    if audit.sound:
        return False
    if control.wrong == "gradient":
        said = {audit.cause: audit.remedy or ""}
    else:
        said = {check.name: check.finding for check in audit.checks}
    return control.expected in said and control.remedy.lower() in said[control.expected].lower()


def accused(control: Control, audit: Any) -> bool:
    """Say whether a sound loop was found faulty, in its gradient or in anything else."""
    return audit.verdict not in control.allowed or bool(audit.checks)
