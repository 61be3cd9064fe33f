"""What a row says is what a naive computation over the runs says."""

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gaccum_exp.report.compare.comparison import CSV_COLUMNS, compare, write_csv
from gaccum_exp.report.compare.distances import loss_gaps, weight_distance
from gaccum_exp.tracking.records import Curve, RunRecord

Arm = Callable[..., RunRecord]

CONTRACT = [
    *("run_id", "role", "accum_steps", "micro_batch_size", "global_batch_size", "reduction"),
    *("train_loss", "eval_loss", "eval_accuracy", "max_loss_gap", "weight_distance"),
    *("peak_bytes", "peak_ratio", "step_s", "step_ratio"),
    *("name", "status", "failure", "differs", "reference_run_id", "reference_source"),
    *("common_steps", "peak_phase", "memory_source", "device", "threads"),
    *("verdict", "cause", "culprit", "e64", "e", "floor", "control", "envelope"),
    *("eval_perplexity", "tokens_per_s", "skipped_windows", "predicted_peak_bytes"),
    *("command_id", "optimizer_steps", "noise_windows"),
    *("noise_scale", "noise_scale_low", "noise_scale_high"),
    *("adam_noise_scale", "adam_noise_scale_low", "adam_noise_scale_high"),
    *("step_low_s", "step_high_s", "step_windows", "step_differs", "adam_noise_windows"),
    "waiting_share",
]


def read_csv(path: Path) -> list[dict[str, str]]:
    """Read the file back as a script of a user's would."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_loss_gap_is_the_largest_over_common_steps(arm: Arm) -> None:
    """A step that only one run has does not count, wherever it lies."""
    reference = arm(1, losses=[2.0, 1.0, 0.5, 0.25])
    other = arm(2, losses=[2.0, 1.125, 0.5625])
    row = compare([reference, other]).rows[1]
    assert row.max_loss_gap == max(abs(a - b) for a, b in [(2.0, 2.0), (1.125, 1.0), (0.5625, 0.5)])
    assert row.common_steps == 3


def test_loss_gap_matches_curves_by_step_and_not_by_position(arm: Arm) -> None:
    """Curves recorded at different steps are compared where the steps agree."""
    reference, other = arm(1), arm(2)
    object.__setattr__(reference, "curves", {"train/loss": Curve((1, 2, 3), (9.0, 5.0, 1.0))})
    object.__setattr__(other, "curves", {"train/loss": Curve((2, 3, 4), (5.5, 1.25, 100.0))})
    assert compare([reference, other]).rows[1].max_loss_gap == 0.5


def test_gaps_are_those_of_the_shared_steps(arm: Arm) -> None:
    """Whatever the order; of a step that was recorded twice the last value counts."""
    ours = Curve((1, 2, 2, 5, 7), (1.0, 9.0, 2.0, 3.0, 4.0))
    theirs = Curve((2, 3, 5, 8), (2.5, 0.0, 3.25, 1.0))
    one, other = (dataclasses.replace(arm(2), curves={"train/loss": c}) for c in (ours, theirs))
    steps, gaps = loss_gaps(one, other)
    assert steps.tolist() == [2, 5]
    assert gaps.tolist() == [0.5, 0.25]
    empty = dataclasses.replace(one, curves={})
    assert [part.size for part in loss_gaps(one, empty)] == [0, 0]


def test_weight_distance_is_the_naive_float64_norm(arm: Arm) -> None:
    """‖w − w_ref‖ / ‖w_ref‖ over all parameters of all shapes, not of float32 differences."""
    generator = torch.Generator().manual_seed(3)
    reference = {
        "weight": torch.randn(7, 5, generator=generator),
        "bias": 1e3 * torch.randn(7, generator=generator),
        "scale": torch.tensor(2.0),
    }
    moved = {
        name: tensor + 1e-3 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in reference.items()
    }
    moved["scale"] = torch.tensor(1e-9)  # 2 − 1e-9 is 2 in float32
    squares = [
        (float(a) - float(b)) ** 2
        for name in reference
        for a, b in zip(moved[name].flatten(), reference[name].flatten(), strict=True)
    ]
    norm = math.sqrt(sum(float(b) ** 2 for t in reference.values() for b in t.flatten()))
    weights = {"mean-256-s0-n1": reference, "mean-256-s0-n4": moved}
    rows = compare([arm(1), arm(4)], weights=weights.get).rows
    assert rows[1].weight_distance == pytest.approx(math.sqrt(sum(squares)) / norm, rel=1e-13, abs=0)
    assert rows[0].weight_distance == 0


def test_weight_distance_counts_imaginary_parts(arm: Arm) -> None:
    """Weights (3+4i) moved by 1i lie a fifth of their size apart."""
    weights = {
        "mean-256-s0-n1": {"filter": torch.full((6,), 3 + 4j)},
        "mean-256-s0-n4": {"filter": torch.full((6,), 3 + 5j)},
    }
    rows = compare([arm(1), arm(4)], weights=weights.get).rows
    assert rows[1].weight_distance == pytest.approx(0.2, rel=1e-6)


def test_weights_of_another_model_have_no_distance() -> None:
    """Names or shapes that differ give None, not a number over what happens to match."""
    ours = {"w": torch.ones(2, 3)}
    assert weight_distance(ours, {"v": torch.ones(2, 3)}) is None
    assert weight_distance(ours, {"w": torch.ones(3, 2)}) is None
    assert weight_distance(ours, {"w": torch.zeros(2, 3)}) == math.inf


def test_missing_weights_leave_the_distance_blank(arm: Arm) -> None:
    """Neither a missing reference's nor a missing candidate's weights make a number."""
    for kept in ({}, {"mean-256-s0-n1": {"w": torch.ones(1)}}, {"mean-256-s0-n4": {"w": torch.ones(1)}}):
        assert compare([arm(1), arm(4)], weights=kept.get).rows[1].weight_distance is None


def test_an_interrupted_arm_has_no_weight_distance(arm: Arm) -> None:
    """Weights from the middle of training are not the end that the reference reached."""
    weights = {"mean-256-s0-n1": {"w": torch.ones(1)}, "mean-256-s0-n4": {"w": torch.ones(1)}}
    row = compare([arm(1), arm(4, status="KILLED")], weights=weights.get).rows[1]
    assert row.weight_distance is None
    assert row.max_loss_gap is not None


def test_ratios_are_the_quotients_to_the_reference(arm: Arm) -> None:
    """Peak and step time are divided by the reference's own, whose ratios are 1."""
    one, four = arm(1), arm(4)
    rows = compare([one, four]).rows
    assert (rows[0].peak_ratio, rows[0].step_ratio) == (1, 1)
    peaks, times = "memory/peak_bytes", "time/step_s"
    assert rows[1].peak_ratio == four.metrics[peaks] / one.metrics[peaks]
    assert rows[1].step_ratio == four.metrics[times] / one.metrics[times]


@pytest.mark.parametrize("few", [{"time/step_windows": 9.0}, {"time/step_windows": math.nan}])
def test_of_too_few_timed_windows_no_ratio_is_stated(arm: Arm, few: dict[str, float]) -> None:
    """Neither over nor under them; so of an older version's, which were not counted."""
    for hasty in (0, 1):
        runs = [arm(1), arm(4)]
        runs[hasty].metrics.update(few)  # type: ignore[attr-defined]
        row = compare(runs).rows[1]
        assert (row.step_ratio, row.step_differs) == (None, None)
        assert row.step_s == runs[1].metrics["time/step_s"]


@pytest.mark.parametrize(
    ("shares", "stated"),
    [((0.5, 0.5), True), ((0.0, 0.15), True), ((0.0, 0.5), False), ((0.9, 0.2), False)],
)
def test_under_another_load_than_the_reference_a_time_has_no_ratio(
    arm: Arm, shares: tuple[float, float], stated: bool
) -> None:
    """Under the same it has one: what other processes took is in both times alike."""
    runs = [arm(1), arm(4)]
    for run, share in zip(runs, shares, strict=True):
        run.metrics["time/waiting_share"] = share  # type: ignore[index]
    row = compare(runs).rows[1]
    assert (row.step_ratio is not None, row.step_differs is not None) == (stated, stated)
    assert row.other_load is not stated


def test_times_differ_where_the_quartiles_do_not_overlap(arm: Arm) -> None:
    """The reference differs from nothing; the ratio is there in either case."""
    one, two, four = compare([arm(1), arm(2), arm(4)]).rows
    assert (one.step_differs, two.step_differs, four.step_differs) == (None, True, True)
    assert one.step_high_s is not None
    wide = arm(4)
    wide.metrics["time/step_low_s"] = one.step_high_s  # type: ignore[index]
    row = compare([arm(1), wide]).rows[1]
    assert (row.step_differs, row.step_ratio) == (False, four.step_ratio)


def test_peaks_from_different_sources_have_no_ratio(arm: Arm) -> None:
    """A tracker's peak over an allocator's is no ratio, and a note says so."""
    comparison = compare([arm(1), arm(4, tags={"memory.source": "allocator"})])
    assert comparison.rows[1].peak_ratio is None
    assert comparison.rows[1].step_ratio is not None
    assert any("allocator" in note and "tracker" in note for note in comparison.notes)


@pytest.mark.parametrize("tags", [{"device": "NVIDIA H200"}, {"threads": "8"}])
def test_times_on_different_machines_have_no_ratio(arm: Arm, tags: dict[str, str]) -> None:
    """Another device or number of threads makes step times incomparable, and a note says so."""
    comparison = compare([arm(1), arm(4, tags=tags)])
    assert comparison.rows[1].step_ratio is None
    assert comparison.rows[1].peak_ratio is not None
    assert any("step times have no ratio" in note for note in comparison.notes)


def test_uneven_split_is_spelt_out(arm: Arm) -> None:
    """N that does not divide the global batch is named with the sizes that it makes."""
    notes = compare([arm(1), arm(7)]).notes
    assert "N = 7 splits 256 samples into 37, 37, 37, 37, 36, 36, 36." in notes
    assert any("mean weighs" in note for note in notes)
    exact = compare([arm(1, reduction="global_mean"), arm(7, reduction="global_mean")]).notes
    assert not any("mean weighs" in note for note in exact)
    assert compare([arm(1), arm(8)]).notes == ()


def test_unfinished_arms_keep_a_row_with_what_they_have(arm: Arm) -> None:
    """A failed arm's reason is in its row and in a note; what it did not measure is None."""
    failed = arm(
        4,
        status="FAILED",
        losses=[2.3, math.nan],
        tags={"failure": "loss is NaN at step 2"},
        drop=("memory/peak_bytes", "time/step_s", "eval/loss", "eval/accuracy"),
    )
    comparison = compare([arm(1), failed])
    row = comparison.rows[1]
    assert (row.status, row.failure) == ("FAILED", "loss is NaN at step 2")
    assert math.isnan(row.train_loss or 0.0)
    assert math.isnan(row.max_loss_gap or 0.0)
    assert (row.peak_bytes, row.step_s, row.eval_loss) == (None, None, None)
    assert any("loss is NaN at step 2" in note for note in comparison.notes)


def test_a_run_without_anything_recorded_keeps_a_row() -> None:
    """A run that died before its config was recorded is a row with its status and nothing else."""
    empty = RunRecord("r", "1", "dead", "FAILED", 0, {}, {}, {})
    (row,) = compare([empty]).rows
    assert (row.run_id, row.status, row.accum_steps, row.train_loss) == ("r", "FAILED", None, None)


def test_infinite_losses_and_times_do_not_crash(arm: Arm) -> None:
    """inf − inf is NaN and is shown as such; a time or peak that is not finite counts as missing."""
    one = arm(1, losses=[math.inf, 1.0])
    four = arm(4, losses=[math.inf, 1.0])
    four.metrics.update({"time/step_s": math.nan, "memory/peak_bytes": math.inf})  # type: ignore[attr-defined]
    row = compare([one, four]).rows[1]
    assert math.isnan(row.max_loss_gap or 0.0)
    assert (row.step_s, row.step_ratio, row.peak_bytes, row.peak_ratio) == (None,) * 4


def test_csv_has_the_contracts_columns_in_their_order(arm: Arm, tmp_path: Path) -> None:
    """Scripts rely on these names in this order; a row per arm follows."""
    comparison = compare([arm(1), arm(2)], [])
    path = write_csv(comparison, tmp_path / "comparison.csv")
    header = path.read_text(encoding="utf-8").splitlines()[0].split(",")
    assert header == CONTRACT == list(CSV_COLUMNS)
    assert [line["run_id"] for line in read_csv(path)] == ["mean-256-s0-n1", "mean-256-s0-n2"]


def test_csv_keeps_full_precision_and_blanks(arm: Arm, tmp_path: Path) -> None:
    """Floats read back are the same bits, whole numbers are whole, what is missing is empty."""
    comparison = compare([arm(1), arm(4, drop=("eval/loss",), tags={"failure": 'a, "b"\nc'})])
    line = read_csv(write_csv(comparison, tmp_path / "c.csv"))[1]
    row = comparison.rows[1]
    assert float(line["max_loss_gap"]) == row.max_loss_gap
    assert float(line["step_ratio"]) == row.step_ratio
    assert line["peak_bytes"] == str(row.peak_bytes)
    assert line["peak_bytes"].isdigit()
    assert line["eval_loss"] == ""
    assert line["weight_distance"] == ""
    assert line["failure"] == 'a, "b"\nc'


def test_csv_has_what_the_audit_found(arm: Arm, audited: Arm, control: Arm, tmp_path: Path) -> None:
    """Verdict, cause, culprit, the three numbers, and the standing; blank where there is none."""
    reference = arm(1)
    two = audited(arm(2), "biased", cause="batch statistics", culprit="net.bn1", remedy="r")
    comparison = compare([reference, two, arm(4), control(reference, 1, 0.25)])
    lines = read_csv(write_csv(comparison, tmp_path / "c.csv"))
    names = ("verdict", "cause", "culprit", "e64", "e", "floor", "control")
    assert [[line[name] for name in names] for line in lines] == [
        [""] * 7,
        ["biased", "batch statistics", "net.bn1", "3e-15", "1.5e-07", "2.5e-07", "inside"],
        [""] * 6 + ["inside"],
    ]
    assert lines[0]["envelope"] == ""
    assert float(lines[1]["envelope"]) == pytest.approx(0.25)


def test_empty_comparison_is_a_header(tmp_path: Path) -> None:
    """No runs make no rows, no notes, and a file with the header alone."""
    comparison = compare([])
    assert (comparison.rows, comparison.notes) == ((), ())
    assert read_csv(write_csv(comparison, tmp_path / "c.csv")) == []


def test_differs_names_the_seed_once_and_a_swapped_model_by_its_class(arm: Arm) -> None:
    """Keys interpolated from the seed, and options of one model alone, add nothing."""
    seeds = [arm(1, seed=s, params={"data.eval.seed": str(s)}) for s in (0, 1)]
    assert [row.differs for row in compare(seeds).rows] == ["seed=0", "seed=1"]
    models = [
        arm(1, run_id="a", params={"model._target_": "x.CNN", "model.width": "8"}),
        arm(1, run_id="b", params={"model._target_": "x.MLP", "model.depth": "2"}),
    ]
    assert [row.differs for row in compare(models).rows] == ["model=CNN", "model=MLP"]


def test_a_swapped_data_set_is_named_once(arm: Arm) -> None:
    """Root, sizes and the evaluation's class follow the data set and say nothing more."""
    runs = [
        arm(
            1,
            run_id=name,
            params={f"data.{part}._target_": f"x.{name}" for part in ("train", "eval")} | extra,
        )
        for name, extra in (("digits", {}), ("mnist", {"data.root": "here"}))
    ]
    assert [row.differs for row in compare(runs).rows] == ["data=digits", "data=mnist"]


def test_an_option_swept_within_one_of_the_models_is_named(arm: Arm) -> None:
    """Two norms of one model stay two settings when another model is swept beside them."""
    runs = [
        arm(1, run_id=f"{model}{norm}", params={"model._target_": f"x.{model}", "model.norm": norm})
        for model, norm in (("CNN", "batch"), ("CNN", "group"), ("MLP", "none"))
    ]
    said = {row.differs for row in compare(runs).rows}
    assert said == {"model=CNN, norm=batch", "model=CNN, norm=group", "model=MLP, norm=none"}


def test_many_uneven_splits_are_summed_up(arm: Arm) -> None:
    """Thirty values of N do not make thirty notes."""
    notes = compare([arm(n) for n in range(1, 31)]).notes
    assert len(notes) == 2
    assert "N = 3, 5, 6, 7, 9, 10" in notes[0]


def test_keys_that_happen_to_vary_together_are_both_named(arm: Arm) -> None:
    """Two seeds with two learning rates are no repetition of one experiment."""
    runs = [arm(1, seed=s, params={"optimizer.lr": f"0.{s + 1}"}) for s in (0, 1)]
    assert [row.differs for row in compare(runs).rows] == ["lr=0.1, seed=0", "lr=0.2, seed=1"]


def test_a_refused_arm_is_no_other_global_batch(arm: Arm) -> None:
    """It ended before its batch was known, and must not add a setting to those of the others."""
    refused = dataclasses.replace(arm(2, status="FAILED"), params={}, metrics={}, curves={})
    settings = {row.setting.text for row in compare([arm(1), arm(4), refused]).rows}
    assert not any("global batch" in text for text in settings)
