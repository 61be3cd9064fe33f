"""Controls say how far rounding alone drives curves apart, and are nothing else."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest

from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.compare.rounding_envelope import MARGIN, envelope_of, stand
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]


def away(reference: RunRecord, gaps: list[float], run_id: str = "candidate", **tags: str) -> RunRecord:
    """Return a run whose loss is so far above the reference's at its first steps."""
    curve = reference.curves["train/loss"]
    values = tuple(value + gap for value, gap in zip(curve.values, gaps, strict=False))
    moved = {"train/loss": Curve(curve.global_steps[: len(values)], values)}
    return dataclasses.replace(reference, run_id=run_id, curves=moved, tags={**reference.tags, **tags})


def flat(arm: Arm, n: int) -> RunRecord:
    """Return a reference whose loss is 2 throughout, a number that any precision holds."""
    return arm(1, losses=[2.0] * n)


def test_the_envelope_is_the_naive_maximum(arm: Arm) -> None:
    """Over all controls and all steps up to twice the present one."""
    reference = flat(arm, 40)
    generator = np.random.default_rng(5)
    controls = [away(reference, list(generator.normal(size=40)), f"c{i}") for i in range(3)]
    envelope = envelope_of(reference, controls)
    assert envelope is not None
    curves = [run.curves["train/loss"].values for run in controls]
    for k in range(1, 41):
        seen = [abs(values[j - 1] - 2.0) for values in curves for j in range(1, min(2 * k, 40) + 1)]
        assert envelope.values[k - 1] == max(seen)
    assert envelope.values[-1] == max(abs(v - 2.0) for values in curves for v in values)
    assert envelope.limits == pytest.approx([MARGIN * value for value in envelope.values])


@pytest.mark.parametrize(("draw", "controls"), [("normal", 1), ("normal", 2), ("standard_cauchy", 3)])
def test_the_margin_keeps_its_false_alarms(draw: str, controls: int) -> None:
    """Of draws of one kind, at most one in a hundred exceeds the margin times the others' largest."""
    generator = np.random.default_rng(controls)
    draws = np.abs(getattr(generator, draw)(size=(200_000, controls + 1)))
    beyond = draws[:, 0] > MARGIN * draws[:, 1:].max(axis=1)
    assert beyond.mean() < 0.0109  # four standard deviations of so many draws above 0.01


def test_a_gap_beyond_the_limit_is_outside_from_its_first_step(arm: Arm) -> None:
    """At the limit a curve is inside, just beyond it outside, and what comes later changes nothing."""
    reference = flat(arm, 6)
    envelope = envelope_of(reference, [away(reference, [0.5] * 6, f"c{i}") for i in range(3)])
    assert envelope is not None
    limit = envelope.limits[0]
    assert limit == pytest.approx(0.5 * MARGIN)
    assert stand(away(reference, [0.9 * limit] * 6), reference, envelope).word == "inside"
    left = stand(away(reference, [0.0, 0.0, 1.1 * limit, 0.0, 5 * limit, 0.0]), reference, envelope)
    assert (left.word, left.left_at) == ("outside", 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gap_that_is_not_finite_is_outside(arm: Arm, bad: float) -> None:
    """However wide the envelope; and a control's own bad loss does not widen it."""
    reference = flat(arm, 4)
    envelope = envelope_of(reference, [away(reference, [1.0, bad, 1.0, 1.0], "c")])
    assert envelope is not None
    assert envelope.values == (1.0,) * 4
    found = stand(away(reference, [0.0, 0.0, bad, 0.0]), reference, envelope)
    assert (found.word, found.left_at) == ("outside", 3)


def test_what_is_missing_is_never_inside(arm: Arm) -> None:
    """A curve that ends early is not judged, unless it was outside before; nor is one without a step."""
    reference = flat(arm, 6)
    envelope = envelope_of(reference, [away(reference, [1e-3] * 6, f"c{i}") for i in range(3)])
    assert envelope is not None
    assert stand(away(reference, [0.0] * 4), reference, envelope).word is None
    assert stand(away(reference, []), reference, envelope).word is None
    assert stand(away(reference, [0.0, 1.0]), reference, envelope).word == "outside"


def test_where_the_controls_never_move_the_last_bit_is_allowed_and_no_more(arm: Arm) -> None:
    """The spacing of float32 where the losses are float32 numbers, else that of float64."""
    for loss, bit in ((2.0, 2.0**-22), (2.0 + 2.0**-40, 2.0**-51)):
        reference = arm(1, losses=[loss] * 5)
        envelope = envelope_of(reference, [away(reference, [0.0] * 5, f"c{i}") for i in range(3)])
        assert envelope is not None
        assert envelope.values[-1] == 0
        assert stand(away(reference, [0.0] * 5), reference, envelope).word == "inside"
        assert stand(away(reference, [bit] * 5), reference, envelope).word == "inside"
        assert stand(away(reference, [128 * bit] * 5), reference, envelope).word == "outside"


def test_rows_say_inside_and_outside(arm: Arm, control: Arm, audited: Arm) -> None:
    """Three controls separate an arm at rounding level from a biased one; the reference is neither."""
    reference = arm(1)
    controls = [control(reference, seed, gap) for seed, gap in ((1, 1e-7), (2, -3e-7), (3, 2e-7))]
    biased = audited(arm(8, noise=0.1), "biased")
    rows = compare([reference, arm(2), biased, *controls]).rows
    assert [(row.accum_steps, row.control, row.controls) for row in rows] == [
        (1, None, 0), (2, "inside", 3), (8, "outside", 3)
    ]  # fmt: skip
    assert [row.left_at for row in rows] == [None, None, 1]
    assert rows[0].envelope is None
    assert rows[1].envelope == pytest.approx(3e-7, rel=1e-6)


def test_controls_are_no_arms_and_change_no_other_number(arm: Arm, control: Arm) -> None:
    """Without their columns the rows are the same, and nothing is said to vary."""
    runs = [arm(n) for n in (1, 2, 4)]
    controls = [control(runs[0], seed, 1e-7) for seed in (1, 2)]
    without, with_them = compare(runs).rows, compare([*controls, *runs]).rows
    blank = {"control": None, "envelope": None, "controls": 0, "left_at": None}
    assert [dataclasses.replace(row, **blank) for row in with_them] == list(without)
    assert compare(runs).envelopes == ()
    assert compare(controls).rows == ()


@pytest.mark.parametrize("mark", ["tag", "parameter"])
def test_a_control_is_never_a_reference(arm: Arm, control: Arm, mark: str) -> None:
    """Not where the reference failed, nor where there is none, nor out of the store."""
    reference = arm(1)
    controls = [control(reference, seed, 1e-7, start_time_ms=2_000_000_000_000) for seed in (1, 2)]
    if mark == "tag":
        controls = [dataclasses.replace(run, params=reference.params) for run in controls]
    else:
        controls = [dataclasses.replace(run, tags=reference.tags) for run in controls]
    ids = {run.run_id for run in controls}
    failed = arm(1, status="FAILED", tags={"failure": "out of memory"})
    for runs in (
        [failed, arm(2), arm(4)],
        [arm(2), arm(4)],
        [arm(4)],
        [failed, arm(4)],
        [reference, arm(2)],
    ):
        for stored in ([], controls):
            comparison = compare([*runs, *([] if stored else controls)], stored)
            rows = comparison.rows + comparison.stored
            assert not {row.run_id for row in rows} & ids
            assert not {row.reference_run_id for row in rows} & ids
            assert comparison.stored == ()


def test_without_a_one_pass_reference_controls_bound_nothing(arm: Arm, control: Arm) -> None:
    """Around a stand-in there is no envelope, since the stand-in may be biased itself; this is said."""
    failed = arm(1, status="FAILED")
    comparison = compare([failed, arm(2), arm(4), control(arm(1), 1, 1e-7)])
    assert {row.reference_source for row in comparison.rows} == {"stand-in"}
    assert {row.control for row in comparison.rows} == {None}
    assert comparison.envelopes == ()
    assert any("controls bound nothing" in note for note in comparison.verdict_notes)


def test_controls_that_cannot_be_used_are_counted(arm: Arm, control: Arm) -> None:
    """Failed, or made on another device: left out of the envelope, and said."""
    reference = arm(1)
    runs = [
        control(reference, 1, 1e-7),
        control(reference, 2, 1e-1, status="FAILED"),
        control(reference, 3, 1e-1, tags={**reference.tags, "role": "control", "device": "another"}),
    ]
    comparison = compare([reference, arm(2), *runs])
    assert (comparison.rows[1].controls, comparison.rows[1].control) == (1, "inside")
    assert comparison.rows[1].envelope == pytest.approx(1e-7, rel=1e-6)
    assert any(note.startswith("2 of 3 controls did not finish") for note in comparison.verdict_notes)


def test_the_same_order_counts_once(arm: Arm, control: Arm) -> None:
    """A control trained again is no second draw, and the margin must not shrink for it."""
    reference = arm(1)
    again = [control(reference, 1, 1e-7, run_id=name) for name in ("first", "second")]
    assert compare([reference, arm(2), *again]).rows[1].controls == 1


def test_each_group_has_its_own_envelope(arm: Arm, control: Arm) -> None:
    """A seed's controls say nothing about another seed's curves."""
    references = [arm(1, seed=s) for s in (0, 1)]
    controls = [control(references[0], 1, 1e-7), control(references[1], 1, 1e-2)]
    rows = compare([*references, *(arm(8, seed=s, noise=1e-3) for s in (0, 1)), *controls]).rows
    assert {(r.differs, r.control) for r in rows if r.accum_steps == 8} == {
        ("seed=0", "outside"), ("seed=1", "inside")
    }  # fmt: skip


def test_a_borrowed_one_pass_reference_brings_its_controls(arm: Arm, control: Arm) -> None:
    """The other mean's one-pass arm is the same training, and so are its controls."""
    reference = arm(1, reduction="global_mean")
    comparison = compare([reference, arm(2, reduction="mean"), control(reference, 1, 1e-7)])
    row = next(row for row in comparison.rows if row.accum_steps == 2)
    assert (row.reference_source, row.control) == ("other reduction", "inside")
    both = compare([reference, *(arm(n) for n in (1, 2)), control(reference, 1, 1e-7)]).rows
    assert [row.control for row in both if row.accum_steps == 2] == ["inside"]


def test_how_a_run_is_audited_does_not_separate_it(arm: Arm) -> None:
    """Keys that begin with audit. change nothing that is trained."""
    audits = [{}, {"audit.every_steps": "50", "audit.control_seed": "None"}]
    rows = compare([arm(n, params=audits[n - 1]) for n in (1, 2)]).rows
    assert {row.reference_run_id for row in rows} == {"mean-256-s0-n1"}
    assert {row.differs for row in rows} == {""}
