"""Every arm is compared with the run that it should be compared with, or with none."""

import random
from collections.abc import Callable

import pytest

from gaccum_exp.report.compare.comparison import Comparison, compare
from gaccum_exp.report.compare.pairing import shared_config
from gaccum_exp.report.compare.swept_keys import Setting
from gaccum_exp.tracking.records import RunRecord

Arm = Callable[..., RunRecord]


def references(comparison: Comparison) -> dict[str, str | None]:
    """Return run id -> id of the run it is compared with."""
    return {row.run_id: row.reference_run_id for row in comparison.rows}


def roles(comparison: Comparison) -> dict[str, str]:
    """Return run id -> role."""
    return {row.run_id: row.role for row in comparison.rows}


def test_each_seed_and_reduction_has_its_own_reference(arm: Arm) -> None:
    """A candidate is compared with N = 1 of the same seed and reduction, never of another."""
    runs = [
        arm(steps, seed=seed, reduction=reduction)
        for steps in (1, 2, 4)
        for seed in (0, 1)
        for reduction in ("mean", "sum")
    ]
    for run_id, reference in references(compare(runs)).items():
        assert reference == run_id.rpartition("-n")[0] + "-n1"


def test_bookkeeping_and_splitting_do_not_separate_arms(arm: Arm) -> None:
    """Tracking, Hydra's own keys, the sweep's id and the micro-batch may differ within a group."""
    noise = {"tracking.uri": "elsewhere", "hydra.job.num": "7", "sweep_id": "x"}
    comparison = compare([arm(1), arm(4, params=noise)])
    assert references(comparison) == {
        "mean-256-s0-n1": "mean-256-s0-n1",
        "mean-256-s0-n4": "mean-256-s0-n1",
    }


@pytest.mark.parametrize("key", ["optimizer.lr", "model.norm", "seed", "accum.partial_window"])
def test_any_other_config_key_separates_arms(arm: Arm, key: str) -> None:
    """An arm that was trained otherwise is not compared, even if it is the only one."""
    comparison = compare([arm(1), arm(4, params={key: "7"})])
    (four,) = (row for row in comparison.rows if row.accum_steps == 4)
    assert (four.reference_run_id, four.max_loss_gap) == (None, None)


@pytest.mark.parametrize(("own", "other"), [("mean", "global_mean"), ("global_mean", "mean")])
def test_the_two_means_share_a_one_pass_arm(arm: Arm, own: str, other: str) -> None:
    """At N = 1 both means are one gradient, so a candidate without its own takes the other's."""
    comparison = compare([arm(1, reduction=other), arm(4, reduction=own)])
    assert references(comparison)[f"{own}-256-s0-n4"] == f"{other}-256-s0-n1"
    assert any(f"one-pass arm of {other}" in note for note in comparison.reference_notes)


def test_own_reduction_is_preferred_to_the_other_mean(arm: Arm) -> None:
    """Where both means have a one-pass arm, each candidate takes its own."""
    runs = [arm(n, reduction=r) for n in (1, 4) for r in ("mean", "global_mean")]
    assert references(compare(runs))["mean-256-s0-n4"] == "mean-256-s0-n1"


@pytest.mark.parametrize("other", ["mean", "global_mean"])
def test_sum_never_takes_a_mean_as_reference(arm: Arm, other: str) -> None:
    """One pass under a mean is another gradient than one pass under sum, and the reverse."""
    comparison = compare([arm(1, reduction=other), arm(4, reduction="sum")])
    assert references(comparison)["sum-256-s0-n4"] is None
    reverse = compare([arm(1, reduction="sum"), arm(4, reduction=other)])
    assert references(reverse)[f"{other}-256-s0-n4"] is None


def test_most_recent_stored_run_on_the_same_device_is_used_and_said(arm: Arm) -> None:
    """Without N = 1 in the sweep the store's latest finished one with this config serves."""
    stored = [
        arm(1, run_id="old", start=1_000),
        arm(1, run_id="new", start=1_700_000_000_000),
        arm(1, run_id="failed", start=1_800_000_000_000, status="FAILED"),
        arm(1, run_id="on-gpu", start=1_800_000_000_000, tags={"device": "NVIDIA H200"}),
        arm(1, run_id="other-lr", start=1_800_000_000_000, params={"optimizer.lr": "1"}),
        arm(2, run_id="two-passes", start=1_800_000_000_000),
    ]
    comparison = compare([arm(2), arm(4)], stored)
    assert set(references(comparison).values()) == {"new"}
    assert [row.role for row in comparison.stored] == ["stored reference"]
    assert len(comparison.rows) == 2
    (note,) = comparison.reference_notes
    assert "'N=1 · micro 256 · mean'" in note
    assert "2023-11-14" in note


def test_sweeps_own_reference_is_preferred_to_a_stored_one(arm: Arm) -> None:
    """A stored run, however recent, does not displace the sweep's own N = 1 arm."""
    comparison = compare([arm(1), arm(4)], [arm(1, run_id="stored", start=2_000_000_000_000)])
    assert set(references(comparison).values()) == {"mean-256-s0-n1"}
    assert comparison.stored == ()
    assert comparison.notes == ()


def test_largest_micro_batch_stands_in_when_one_pass_failed(arm: Arm) -> None:
    """If N = 1 failed, the finished arm with the smallest N is the reference and is called so."""
    failed = arm(1, status="FAILED", tags={"failure": "out of memory"})
    comparison = compare([failed, arm(8), arm(4), arm(2, status="KILLED")])
    assert roles(comparison)["mean-256-s0-n4"] == "stand-in"
    assert roles(comparison)["mean-256-s0-n1"] == "candidate"
    assert set(references(comparison).values()) == {"mean-256-s0-n4"}
    (note,) = comparison.reference_notes
    assert "N = 4" in note
    assert "stands in" in note
    assert "out of memory" in note


def test_a_lone_finished_arm_is_not_its_own_stand_in(arm: Arm) -> None:
    """One finished arm without N = 1 has nothing to be compared with, and the note says why."""
    comparison = compare([arm(4), arm(8, status="FAILED")])
    assert set(references(comparison).values()) == {None}
    assert "nothing is compared" in " ".join(comparison.reference_notes).lower()


def test_fixed_micro_batch_leaves_comparison_blank_and_explains(arm: Arm) -> None:
    """Where N multiplies the global batch, N = 1 is a small batch and nobody's reference."""
    runs = [arm(n, global_batch=32 * n, micro_batch=32) for n in (1, 2, 4)]
    comparison = compare(runs)
    for row in comparison.rows:
        assert row.role == "candidate"
        blank = (row.max_loss_gap, row.weight_distance, row.peak_ratio, row.step_ratio)
        assert blank == (None, None, None, None)
        assert row.train_loss is not None
    (note,) = comparison.reference_notes
    assert "32, 64, 128" in note
    assert "small batch" in note


def test_global_batch_is_derived_where_it_was_left_null(arm: Arm) -> None:
    """N × micro-batch stands for a global batch recorded as None."""
    null = {"data.global_batch_size": "None"}
    rows = compare([arm(2, global_batch=64, params=null)]).rows
    assert rows[0].global_batch_size == 64


def test_stored_reference_serves_a_fixed_micro_batch(arm: Arm) -> None:
    """A stored one-pass run with the multiplied batch is a true reference for that arm."""
    runs = [arm(n, global_batch=32 * n, micro_batch=32) for n in (1, 2)]
    comparison = compare(runs, [arm(1, run_id="stored", global_batch=64)])
    assert references(comparison) == {"mean-32-s0-n1": None, "mean-64-s0-n2": "stored"}


def test_order_of_runs_does_not_matter(arm: Arm) -> None:
    """Shuffled runs give the same rows in the same order, and the same notes."""
    runs = [
        arm(steps, seed=seed, reduction=reduction, status="FAILED" if steps == 7 else "FINISHED")
        for steps in (1, 2, 7)
        for seed in (0, 10, 2)
        for reduction in ("mean", "sum", "global_mean")
    ]
    runs += [
        arm(1, run_id="again", start=1_763_900_000_001),
        arm(3, params={"model.norm": "x"}, run_id="z"),
    ]
    expected = compare(runs)
    for attempt in range(5):
        shuffled = list(runs)
        random.Random(attempt).shuffle(shuffled)
        assert compare(shuffled) == expected


def test_rows_come_by_group_then_reference_then_steps(arm: Arm) -> None:
    """Seeds are ordered as numbers, the reference opens its group, N ascends."""
    runs = [arm(n, seed=s) for n in (16, 1, 2) for s in (10, 2)]
    found = [(row.differs, row.accum_steps) for row in compare(runs).rows]
    assert found == [(f"seed={s}", n) for s in (2, 10) for n in (1, 2, 16)]
    stand_in = [arm(1, status="FAILED"), arm(2), arm(4)]
    assert [row.accum_steps for row in compare(stand_in).rows] == [2, 1, 4]


def test_what_a_store_is_asked_for_is_what_all_arms_share(arm: Arm) -> None:
    """Neither the reduction, which another mean's reference may differ in, nor what cannot be quoted."""
    runs = [
        arm(n, reduction=r, params={"data.name": "it's", "model.depth": "3", "optimizer.lr": rate})
        for n, r, rate in ((2, "mean", "0.1"), (4, "sum", "0.2"))
    ]
    asked = shared_config(runs)
    assert asked["seed"] == "0"
    assert asked["model.depth"] == "3"
    assert not {"accum.reduction", "accum.steps", "data.name", "optimizer.lr"} & asked.keys()


def test_settings_stand_in_the_order_of_their_numbers() -> None:
    """However a number is written."""
    rates = ["0.1", "1e-05", "0.05", "10", "2", "0.0001"]
    found = sorted((Setting(None, (("lr", rate),)) for rate in rates), key=lambda of: of.order)
    assert [value for of in found for _, value in of.values] == sorted(rates, key=float)
