"""What is printed of audits."""

import io
from dataclasses import replace
from typing import Any

from rich.console import Console, RenderableType

from gaccum_exp.audit.audited_window import AuditedWindow, LayerError, MicroBatchShare
from gaccum_exp.audit.result import Audit, Check, Culprit, ParameterError
from gaccum_exp.report.text.audit_printout import block, parameter_table

BIASED = Audit(
    verdict="biased", accum_steps=4, reduction="global_mean", e64=1.1, e=1.1, floor=2e-6, scale=0.3,
    cause="batch statistics", culprit="net.bn1", culprit_type="BatchNorm2d",
    remedy="replace BatchNorm2d by GroupNorm",
    culprits=(Culprit("net.bn1", "BatchNorm2d", "batch statistics"),) * 3,
    checks=(Check("reported loss", "it is the last micro-batch's"),),
    parameters=tuple(ParameterError(f"net.layer{i}.weight", 12.5, 0.1, 3e-4) for i in range(12)),
)  # fmt: skip


def shown(what: RenderableType, width: int = 100) -> str:
    """Print as a terminal of this width would show it."""
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(what)
    return file.getvalue()


def words(text: str) -> str:
    return " ".join(text.split())


def test_the_block_says_everything_that_is_known_and_nothing_else() -> None:
    """Numbers with what they mean, cause, culprit, remedy, checks; no line for what is missing."""
    said = words(shown(block(BIASED)))
    for part in ("verdict biased", "e64 1.10 relative error", "floor 2.0e-06 how far", "scale 0.30 ×",
                 "cause batch statistics", "culprit net.bn1 (BatchNorm2d), and 2 more",
                 "remedy replace BatchNorm2d", "reported loss it is the last"):  # fmt: skip
        assert part in said
    bare = words(shown(block(Audit("identical", 1, "sum", e64=0.0))))
    assert bare == "verdict identical e64 0 relative error of the accumulated gradient, in float64"


def test_the_micro_batches_that_weigh_least_and_most_are_named() -> None:
    """With the largest part of the whole error; only where weights are what is wrong."""
    window = AuditedWindow(
        "mean", 2, 4, unit="samples",
        micro_batches=(
            MicroBatchShare(0, 0, 3, 3.0, 1 / 6, 1 / 4),
            MicroBatchShare(1, 3, 1, 1.0, 1 / 2, 1 / 4),
        ),
        layers=(
            LayerError("small", norm=0.1, by_micro_batch=(0.2, 0.9)),
            LayerError("large", norm=3.0, by_micro_batch=(0.5, 0.4)),
        ),
    )  # fmt: skip
    said = words(shown(block(replace(BIASED, window=window))))
    assert "weights a sample weighs 0.67 (micro-batch 1) to 2.00 (micro-batch 2) × what it does" in said
    assert "the largest part of the error is micro-batch 1's, at large" in said
    alike = tuple(replace(m, weight=1 / 2) for m in window.micro_batches)
    for other in (
        replace(BIASED, window=replace(window, no_shares="samples are coupled")),
        replace(BIASED, window=replace(window, micro_batches=alike)),
        replace(BIASED, window=window, verdict="equivalent"),
    ):
        assert "weights" not in words(shown(block(other)))


def test_the_worst_parameters_come_first_and_the_rest_is_counted() -> None:
    """Ten rows; no caption where all are shown."""
    said = shown(parameter_table(BIASED))
    assert [f"layer{i}.weight" in said for i in (0, 9, 10)] == [True, True, False]
    assert "and 2 more" in said
    few: dict[str, Any] = {"verdict": "biased", "accum_steps": 1, "reduction": "sum"}
    assert "more" not in shown(parameter_table(Audit(**few, parameters=BIASED.parameters[:10])))


def test_the_model_itself_may_be_the_culprit() -> None:
    """Its dotted name is empty, and a blank would say nothing."""
    audit = Audit("biased", 2, "mean", culprit="", culprit_type="Net")
    assert "the model itself (Net)" in shown(block(audit))
