"""strategy=cached on the command line: a sweep, its audits, and its plan."""

import json

import pytest

from tests.contrastive import CONTRASTIVE
from tests.program import Program

pytestmark = pytest.mark.usefixtures("undrawn")


def test_a_contrastive_sweep_is_equivalent_to_the_large_batch(program: Program) -> None:
    """Every arm, by its audit and its curve; and at its peak each holds what the plan predicts."""
    ended = program(
        "-m", *CONTRASTIVE, "runtime.precision=fp64", "accum.steps=1,2,4", "audit.every_steps=3"
    )
    assert ended.status == 0
    assert "N = 2 and 4 are equivalent to the large batch" in ended.plain
    arms = program.arms()
    assert [arm.tags["verdict"] for arm in arms] == ["identical", "equivalent", "equivalent"]
    planned = program(*CONTRASTIVE, "runtime.precision=fp64", "task=plan")
    assert (
        "The outputs of the whole window, and the loss over them, are there at every N." in planned.plain
    )
    written = json.loads((program.sweep_folder / "plan.json").read_text())
    rows = {row["accum_steps"]: row["peak_bytes"] for row in written["rows"]}
    for arm, accum_steps in zip(arms, (1, 2, 4), strict=True):
        assert arm.metrics["memory/peak_bytes"] == pytest.approx(rows[accum_steps], rel=0.02)


def test_without_the_strategy_such_a_criterion_is_refused(program: Program) -> None:
    """It has no sum over samples; and a misspelt strategy is answered with the nearest."""
    assert "no attribute `reduction`" in program(*CONTRASTIVE, "strategy=in_place").err
    assert "in_place" in program(*CONTRASTIVE, "strategy=inplace").err
