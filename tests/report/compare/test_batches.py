"""Arms of different global batches are compared at equal samples, equal steps and equal seconds."""

import ast
import csv
import math
import re
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gaccum_exp.core.window import WindowPlan
from gaccum_exp.report.compare.batch_curves import curves_of, samples_after
from gaccum_exp.report.compare.batches import (
    BatchComparison,
    BatchRow,
    Loss,
    compare_batches,
    critical_batch,
    write_batches,
)
from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.tracking.records import Curve, RunRecord
from tests.support import ROOT

Arm = Callable[..., RunRecord]
D = 1000
"""Samples of the data set that the arms say they were trained on."""


def trained(
    arm: Arm,
    batch: int,
    *,
    rate: float = 0.1,
    seed: int = 0,
    samples: int = 2 * D,
    final: float = 0.2,
    evaluations: int = 4,
    step_s: float | None = None,
    params: dict[str, str] | None = None,
    **changes: Any,
) -> RunRecord:
    """Return an arm of one global batch whose evaluation's loss falls to `final`, linearly in steps."""
    steps = round(samples / D) * math.ceil(D / batch)
    every = max(1, steps // max(1, evaluations))
    at = tuple(k for k in range(1, steps + 1) if k % every == 0 or k == steps) if evaluations else ()
    changes.setdefault("run_id", f"b{batch}-lr{rate}-s{seed}-{params}")
    run = arm(
        max(1, batch // 32), global_batch=batch, seed=seed, n_losses=steps,
        params={"optimizer.lr": str(rate), **(params or {})},
        tags={"training_samples": str(D), "command_id": "c1", **changes.pop("tags", {})}, **changes,
    )  # fmt: skip
    curves = dict(run.curves)
    if at:
        curves["eval/loss"] = Curve(at, tuple(final + 1 - k / steps for k in at))
    metrics = {**run.metrics, "time/step_s": 0.001 * batch if step_s is None else step_s}
    return replace(run, curves=curves, metrics=metrics)


def compared(*runs: RunRecord) -> BatchComparison:
    """Return the one comparison of global batches that there is."""
    (found,) = compare_batches(compare(runs), runs)
    return found


def seeds_of(arm: Arm, batch: int, finals: tuple[float, ...], **changes: Any) -> list[RunRecord]:
    """Return an arm per seed, with these losses, and one of a higher and of a lower rate each."""
    return [
        trained(arm, batch, rate=rate, seed=seed, final=final + (rate != 0.1), **changes)
        for seed, final in enumerate(finals)
        for rate in (0.05, 0.1, 0.2)
    ]


@pytest.mark.parametrize("rule", ["exact", "drop", "carry"])
@pytest.mark.parametrize("batch", [7, 64, 250, 999, 1000, 1500])
def test_samples_are_those_of_the_plan(arm: Arm, rule: str, batch: int) -> None:
    """After every step as many as the windows before it hold, whatever the epoch leaves over."""
    if rule == "drop" and batch > D:
        pytest.skip("no window")
    plan = WindowPlan(D, batch, seed=0, partial_window=rule)  # type: ignore[arg-type]
    steps = np.arange(1, 3 * math.ceil(D / batch) + 2)
    held = np.cumsum([plan.size(k) for k in range(len(steps))])
    run = trained(arm, batch, params={"accum.partial_window": rule})
    assert samples_after(run, steps).tolist() == held.tolist()


def test_a_train_loss_is_the_mean_over_the_last_samples(arm: Arm) -> None:
    """Over the windows that end in the last 5 % of the samples so far, each by its size."""
    losses = [math.sin(k) ** 2 + 1 / k for k in range(1, 81)]
    run = trained(arm, 48, losses=losses)
    found = curves_of(run)["train/loss"]
    plan = WindowPlan(D, 48, seed=0)
    sizes = [plan.size(k) for k in range(80)]
    for k in range(80):
        so_far = sum(sizes[: k + 1])
        last = [j for j in range(k + 1) if sum(sizes[: j + 1]) > 0.95 * so_far]
        expected = sum(sizes[j] * losses[j] for j in last) / sum(sizes[j] for j in last)
        assert found.values[k] == pytest.approx(expected, rel=1e-12)
        assert found.samples[k] == so_far


def test_losses_are_compared_at_what_all_have_had(arm: Arm) -> None:
    """The most samples, steps and seconds of all arms, each loss linear between two evaluations."""
    runs = [trained(arm, 32, step_s=0.01), trained(arm, 128, step_s=0.02, final=0.3)]
    found = compared(*runs)
    # 64 steps of 0.01 s, and 16 steps of 0.02 s.
    at = {axis: point.at for axis, point in found.points.items()}
    assert at == {"samples": 2000, "steps": 16, "seconds": 16 * 0.02}
    assert {point.metric for point in found.points.values()} == {"eval/loss"}
    small, large = (
        {axis: loss.mean for axis, loss in row.losses.items()} for row in found.rows
    )  # fmt: skip
    assert large == pytest.approx(dict.fromkeys(("samples", "steps", "seconds"), 0.3))
    assert small["samples"] == pytest.approx(0.2)
    assert small["steps"] == pytest.approx(0.2 + 1 - 16 / 64)
    assert small["seconds"] == pytest.approx(0.2 + 1 - 32 / 64)
    assert found.best.global_batch_size == 32
    assert [row.step_s for row in found.rows] == [0.01, 0.02]


def test_a_longer_arm_is_taken_where_the_shorter_one_ends(arm: Arm) -> None:
    """At equal samples inside an epoch, between two evaluations."""
    found = compared(trained(arm, 32, samples=4 * D), trained(arm, 128))
    assert found.points["samples"].at == 2000
    assert found.rows[0].losses["samples"].mean == pytest.approx(0.2 + 1 - 64 / 128)


def test_without_evaluations_around_the_point_the_train_loss_is_taken(arm: Arm) -> None:
    """For all arms alike, column by column; one evaluation is no curve."""
    # Steps 32 and 64, and steps 8 and 16: at 16 steps the small batch has not been evaluated.
    found = compared(trained(arm, 32, evaluations=2), trained(arm, 128, evaluations=2))
    assert found.points["samples"].metric == "eval/loss"
    assert found.points["steps"].metric == "train/loss"
    assert found.rows[0].losses["steps"].mean == pytest.approx(2.3 / math.sqrt(16), abs=0.01)
    found = compared(trained(arm, 32, evaluations=1), trained(arm, 128))
    assert {point.metric for point in found.points.values()} == {"train/loss"}


def test_the_rate_with_the_lowest_mean_over_seeds_stands_for_its_batch(arm: Arm) -> None:
    """And not the one with the luckiest seed; mean and spread are of its seeds."""
    finals = {
        (0.1, 0): 0.30,
        (0.1, 1): 0.32,
        (0.2, 0): 0.20,
        (0.2, 1): 0.50,
        (0.05, 0): 0.4,
        (0.05, 1): 0.4,
    }
    runs = [trained(arm, 32, rate=rate, seed=seed, final=of) for (rate, seed), of in finals.items()]
    found = compared(*runs, trained(arm, 128, seed=0), trained(arm, 128, seed=1))
    row = found.rows[0]
    assert (row.rate, row.rate_place, row.rates) == ("0.1", "inside", ("0.05", "0.1", "0.2"))
    assert row.seeds == ("0", "1")
    assert row.losses["samples"] == pytest.approx((0.31, statistics.stdev([0.30, 0.32])))


@pytest.mark.parametrize(
    ("finals", "place"),
    [
        ({0.1: 0.2}, "only one"),
        ({0.1: 0.2, 0.2: 0.3}, "lowest"),
        ({0.05: 0.3, 0.1: 0.2}, "highest"),
        ({0.05: 0.3, 0.1: 0.2, 0.2: 0.3}, "inside"),
        ({0.05: 0.3, 0.1: 0.2, 1.0: 0.3, 10.0: 0.3}, "inside"),
    ],
)
def test_a_best_rate_at_an_end_of_those_tried_is_said(
    arm: Arm, finals: dict[float, float], place: str
) -> None:
    """Rates are ordered as numbers."""
    runs = [trained(arm, 32, rate=rate, final=final) for rate, final in finals.items()]
    row = compared(*runs, trained(arm, 128)).rows[0]
    assert (row.rate, row.rate_place) == ("0.1", place)


def test_a_rate_that_diverged_was_tried(arm: Arm) -> None:
    """It bounds the best one from above, is never the best, and another failure tells nothing."""
    lower, best = trained(arm, 32, rate=0.05, final=0.3), trained(arm, 32, rate=0.1)
    other = trained(arm, 128)
    beyond = trained(arm, 32, rate=0.2, status="FAILED", losses=[2.3, math.nan], evaluations=0)
    assert compared(lower, best, beyond, other).rows[0].rate_place == "inside"
    as_stored = trained(arm, 32, rate=0.2, status="FAILED", losses=[2.3, 1.8e308], evaluations=0)
    assert compared(lower, best, as_stored, other).rows[0].rate_place == "inside"
    failed = trained(arm, 32, rate=0.2, status="FAILED", losses=[2.3, 2.2], evaluations=0)
    assert compared(lower, best, failed, other).rows[0].rate_place == "highest"
    # Under one of two seeds.
    runs = [
        trained(arm, 32, rate=rate, seed=s, final=0.2 + (rate < 0.2))
        for rate in (0.1, 0.2)
        for s in (0, 1)
    ]
    runs[3] = replace(runs[3], status="FAILED", curves={"train/loss": Curve((1, 2), (2.3, math.inf))})
    assert compared(*runs, other).rows[0].rate == "0.1"


def test_of_rates_that_all_lost_a_seed_the_one_that_lost_the_fewest_stands(arm: Arm) -> None:
    """Then the lowest mean of the others; its losses are held against no batch's."""
    died = {"status": "FAILED", "losses": [2.3, math.nan], "evaluations": 0}
    finals = {
        0.1: (0.3, None, None),
        0.2: (0.3, 0.32, None),
        0.4: (0.2, None, 0.3),
        0.8: (9, None, None),
    }
    runs = [
        trained(arm, 32, rate=rate, seed=seed, **(died if final is None else {"final": final}))
        for rate, of in finals.items()
        for seed, final in enumerate(of)
    ]
    found = compared(*runs, *seeds_of(arm, 128, (0.5, 0.5, 0.5)), *seeds_of(arm, 512, (0.9, 0.9, 0.9)))
    row = found.rows[0]
    assert (row.rate, row.rate_place, row.seeds, row.diverged) == ("0.4", "inside", ("0", "2"), ("1",))
    assert row.losses["samples"].mean == pytest.approx(0.25)
    assert found.best.global_batch_size == 128
    assert found.critical.open_because == "the global batch of 32 lost a seed at its best rate"
    assert not any(of.diverged for of in found.rows[1:])


def test_rates_with_fewer_seeds_do_not_win_but_contest(arm: Arm) -> None:
    """As where all rates are tried once and the best again: the others are seen on that one seed."""
    runs = [trained(arm, 32, rate=rate, final=0.3) for rate in (0.025, 0.05, 0.2)]
    runs += [trained(arm, 32, rate=0.1, seed=s, final=0.25 + 0.1 * s) for s in range(3)]
    others = [trained(arm, 128, seed=s) for s in range(3)]
    row = compared(*runs, *others).rows[0]
    assert (row.rate, row.rate_place) == ("0.1", "inside")  # its mean is 0.35, on seed 0 it has 0.25
    runs[1] = trained(arm, 32, rate=0.05, final=0.2)
    found = compared(*runs, *others)
    assert (found.rows[0].rate, found.rows[0].rate_place) == ("0.1", "contested")
    assert found.critical.open_because


def row_of(batch: int, mean: float, spread: float | None, **changes: Any) -> BatchRow:
    """Return a row with this loss at equal samples."""
    seeds = ("0",) if spread is None else ("0", "1", "2")
    row = BatchRow(
        batch, 1, batch, "0.1", "inside", ("0.05", "0.1", "0.2"), seeds, 0.1,
        {"samples": Loss(mean, spread)}, None, (),
    )  # fmt: skip
    return replace(row, **changes)


@pytest.mark.parametrize(
    ("losses", "size", "at_least"),
    [
        ({32: (0.200, 0.01), 64: (0.219, 0.01), 128: (0.221, 0.05)}, 64, False),
        ({32: (0.300, 0.50), 64: (0.200, 0.01), 128: (0.221, 0.05)}, 64, False),
        ({32: (0.200, 0.01), 64: (0.300, 0.01), 128: (0.210, 0.01), 256: (0.3, 0.01)}, 128, False),
        ({32: (0.200, 0.01), 64: (0.205, 0.01)}, 64, True),
        ({32: (0.200, 0.00), 64: (0.200001, 0.0)}, 32, False),
    ],
)
def test_the_critical_batch_is_the_largest_within_twice_the_bests_spread(
    losses: dict[int, tuple[float, float]], size: int, at_least: bool
) -> None:
    """Of the batch with the lowest loss; where the largest tried is within, it is a lower bound."""
    found = critical_batch([row_of(batch, *of) for batch, of in losses.items()])
    assert (found.size, found.at_least, found.open_because) == (size, at_least, "")


def test_the_critical_batch_is_not_resolved_without_seeds_or_settled_rates() -> None:
    """And it is said for which batches."""
    sound = [row_of(32, 0.2, 0.01), row_of(64, 0.3, 0.01)]
    assert critical_batch(sound).size == 32
    alone = critical_batch([sound[0], row_of(64, 0.3, None)])
    assert (alone.size, alone.open_because) == (None, "the global batch of 64 had fewer than two seeds")
    at_end = critical_batch([replace(row, rate_place="highest") for row in sound])
    assert at_end.size is None
    assert (
        at_end.open_because
        == "the best rate for the global batches of 32 and 64 is at an end of those tried"
    )


def test_a_schedule_is_known_of_the_arms(arm: Arm) -> None:
    """An arm of the small batch that is cut short at equal steps is not at the end of one."""
    for target, is_scheduled in ((None, False), ("None", False), ("gaccum_exp.optim.cosine", True)):
        params = {"scheduler._target_": target} if target else None
        found = compared(trained(arm, 32, params=params), trained(arm, 128, params=params))
        assert found.is_scheduled == is_scheduled


def test_a_sweep_resolves_its_critical_batch(arm: Arm) -> None:
    """From the arms to the batch."""
    finals = {32: (0.20, 0.21, 0.22), 64: (0.21, 0.22, 0.23), 128: (0.3, 0.3, 0.3)}
    found = compared(*(run for batch, of in finals.items() for run in seeds_of(arm, batch, of)))
    assert (found.critical.size, found.critical.at_least) == (64, False)
    assert found.critical.limit == pytest.approx(0.21 + 2 * 0.01)


def test_only_what_can_be_compared_takes_part(arm: Arm, control: Arm) -> None:
    """No control, no batch that changes, no arm that is not over; one batch alone is no comparison."""
    small, large = trained(arm, 32), trained(arm, 128)
    changing = trained(arm, 256, tags={"global_batches": "32 from epoch 0, 256 from epoch 1"})
    killed = trained(arm, 512, status="KILLED")
    refused = trained(arm, 1024, status="FAILED", drop=("train/loss",), evaluations=0)
    found = compared(small, large, control(small, 1, -0.1), changing, killed, refused)
    assert [row.global_batch_size for row in found.rows] == [32, 128]
    for alone in ([small], [small, changing], [small, trained(arm, 32, seed=1)]):
        assert compare_batches(compare(alone), alone) == ()


def test_other_settings_are_compared_apart(arm: Arm) -> None:
    """A table each; how often was evaluated, and what follows the seed, sets nothing apart."""
    rule, every, of_data = "train.beta2_rule", "train.eval_every_steps", "data.eval.seed"
    runs = [
        trained(
            arm, batch, seed=seed, tags={"data_digest": f"d{seed}"},
            params={rule: beta, every: str(2048 // batch), of_data: str(seed)},
        )
        for batch in (32, 128)
        for seed in (0, 1)
        for beta in ("fixed", "half_life")
    ]  # fmt: skip
    found = compare_batches(compare(runs), runs)
    assert [of.setting.text for of in found] == ["beta2_rule=fixed", "beta2_rule=half_life"]
    assert all(row.seeds == ("0", "1") for of in found for row in of.rows)
    # The same seed with other data is another training.
    runs = [trained(arm, batch, tags={"data_digest": f"d{batch}"}) for batch in (32, 128)]
    assert compare_batches(compare(runs), runs) == ()


def test_several_splits_of_a_batch_are_one_training(arm: Arm) -> None:
    """The one that most arms have stands for it, of equally many that of the smallest N."""
    runs = [trained(arm, 128, seed=s) for s in (0, 1)]
    finer = [
        replace(run, run_id=f"{run.run_id}-8", params={**run.params, "accum.steps": "8"}) for run in runs
    ]
    small = [trained(arm, 32, seed=s) for s in (0, 1)]
    assert [row.accum_steps for row in compared(*small, *runs, *finer).rows] == [1, 4]
    assert [row.accum_steps for row in compared(*small, runs[0], *finer).rows] == [1, 8]
    assert compared(*small, *runs, *finer).rows[1].seeds == ("0", "1")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tags": {"device": "cuda"}}, "the arms ran under several devices"),
        ({"tags": {"threads": "8", "command_id": "c2"}}, "several numbers of threads and commands"),
        ({"step_s": math.nan}, "the time of a step was not measured over 10 windows in every arm"),
    ],
)
def test_times_that_are_not_alike_are_not_compared(arm: Arm, change: dict[str, Any], why: str) -> None:
    """Samples and steps are all the same, and the reason is kept."""
    found = compared(trained(arm, 32), trained(arm, 128, **change))
    assert found.points["seconds"].at is None
    assert why in found.points["seconds"].reason
    assert all(row.losses.keys() == {"samples", "steps"} for row in found.rows)


def test_the_file_has_a_row_per_setting_and_batch_in_full_precision(arm: Arm, tmp_path: Path) -> None:
    """What is not known is blank."""
    finals = {32: (0.20, 0.21, 1 / 3), 128: (0.4, 0.4, 0.4)}
    runs = [run for batch, of in finals.items() for run in seeds_of(arm, batch, of, step_s=math.nan)]
    found = compare_batches(compare(runs), runs)
    path = write_batches(found, tmp_path / "batches.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["global_batch_size"] for row in rows] == ["32", "128"]
    first = rows[0]
    axes = {"samples", "steps", "seconds"}
    described = [name.replace("<axis>", axis) for name in described_columns() for axis in sorted(axes)]
    assert {*first} == {*described}
    assert float(first["loss_at_equal_samples"]) == found[0].rows[0].losses["samples"].mean
    assert float(first["spread_at_equal_samples"]) == found[0].rows[0].losses["samples"].spread
    assert (first["equal_samples"], first["samples_metric"]) == ("2000.0", "eval/loss")
    assert (first["rates_tried"], first["seeds"]) == ("0.05 0.1 0.2", "0 1 2")
    assert (first["rate"], first["rate_place"], first["accum_steps"]) == ("0.1", "inside", "1")
    assert first["equal_seconds"] == first["loss_at_equal_seconds"] == first["noise_scale"] == ""
    assert (first["critical_batch"], first["critical_at_least"]) == ("32", "False")


def described_columns() -> list[str]:
    """Return the columns that the reference describes."""
    source = (ROOT / "docs/_ext/reference.py").read_text(encoding="utf-8")
    (table,) = re.findall(r"(?ms)^BATCH_COLUMNS = (\{.*?^\})", source)
    return list(ast.literal_eval(table))
