"""The comparison of global batches as it is printed: tables of 80 columns, a sentence or two."""

import io
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from rich.console import Console

from gaccum_exp.report.compare.batch_curves import Point
from gaccum_exp.report.compare.batches import (
    BatchComparison,
    BatchRow,
    CriticalBatch,
    Loss,
    Place,
    compare_batches,
)
from gaccum_exp.report.compare.columns import ComparisonRow, Measured
from gaccum_exp.report.compare.comparison import compare
from gaccum_exp.report.compare.pairing import group_runs
from gaccum_exp.report.compare.swept_keys import Setting
from gaccum_exp.report.text.batch_table import print_batches, say_batches, say_interval
from gaccum_exp.report.text.noise_notes import NoiseTold
from gaccum_exp.report.text.table import print_comparison
from gaccum_exp.tracking.records import RunRecord
from tests.report.text.test_noise_notes import measured

Arm = Callable[..., RunRecord]


def told(arm: Arm, scale: float | None, low: float, high: float) -> NoiseTold:
    """Return a noise scale as an arm tells it."""
    run = arm(4)
    (group,) = group_runs([run])
    return NoiseTold(ComparisonRow.of(Measured(run, group)), scale, low, high, True)


def row(batch: int, n: int, *losses: Loss, place: Place = "inside", noise: NoiseTold | None) -> BatchRow:
    """Return a batch with losses at equal samples, steps and seconds, as many as given."""
    of = dict(zip(("samples", "steps", "seconds"), losses, strict=False))
    return BatchRow(
        batch, n, batch // n, "0.00014", place, ("0.00014",), ("0", "1", "2"), 0.1, of, noise, ()
    )  # type: ignore[arg-type]  # the keys are axes


def comparison(
    *rows: BatchRow, critical: CriticalBatch, seconds: float | None = 1.67
) -> BatchComparison:
    """Return a comparison of these rows."""
    points = {
        "samples": Point("samples", 163840.0, "eval/loss"),
        "steps": Point("steps", 160.0, "train/loss"),
        "seconds": Point("seconds", seconds, "eval/loss" if seconds else "", "" if seconds else "so"),
    }
    setting = Setting("global_mean", (("beta2_rule", "half_life"),))
    return BatchComparison(setting, rows, points, critical, "sqrt from 64", True, False)  # type: ignore[arg-type]


def printed(*comparisons: BatchComparison, width: int = 80) -> str:
    """Print comparisons as a terminal of this width shows them."""
    out = Console(file=io.StringIO(), width=width, color_system=None)
    print_batches(out, comparisons)
    assert isinstance(out.file, io.StringIO)
    return out.file.getvalue()


def words(text: str) -> str:
    """Undo line breaks."""
    return " ".join(text.split())


def three(arm: Arm, place: Place = "inside") -> tuple[BatchRow, ...]:
    """Return three batches of which the smallest has the lowest loss, but not at equal steps."""
    return (
        row(32, 1, Loss(1.7, 0.0036), Loss(2.9, 0.05), Loss(1.9, 0.01), noise=None, place=place),
        row(256, 8, Loss(1.8, 1e-5), Loss(2.1, 0.05), Loss(1.95, 0.01), noise=told(arm, 90, 70, 120)),
        row(
            2048, 64, Loss(2.0, None), Loss(2.0, 0.05), Loss(2.0, 0.01), noise=told(arm, 1234, 900, 4e3)
        ),
    )


def test_a_table_of_everything_fits_a_terminal_of_eighty_columns(arm: Arm) -> None:
    """Nothing is cut; each column says at how much of what, and by which loss."""
    shown = printed(comparison(*three(arm), critical=CriticalBatch(256)))
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    head = words("".join(shown.splitlines(keepends=True)[:5]))
    for word in ("eval loss at", "train loss at", "163,840", "160", "1.67 s", "opt. steps", "noise"):
        assert word in head
    lines = {line.split()[0]: words(line) for line in shown.splitlines() if " × " in line}
    assert lines["32"] == "32 1 × 32 0.00014 3 1.7000±0.0036 2.9000±0.0500 1.9000±0.0100 –"
    assert "1.8000±1e-05" in lines["256"]
    assert "2048 64 × 32 0.00014 3 2.0000 2.0000±0.0500" in lines["2048"]
    assert lines["2048"].endswith(" 1,230")
    legend = words(shown)
    assert "optimizer.lr, which follows the batch by train.lr_rule=sqrt from 64" in legend
    assert "noise scale: in samples, in Adam’s metric" in legend
    assert "train loss: mean over the last 5 % of the samples before the point, where not all" in legend
    assert "eval loss: between two evaluations linear" in legend
    assert "- The rate follows a schedule over each whole training: arms that go on" in legend


def test_sentences_say_which_batch_is_best_in_which_way(arm: Arm) -> None:
    """The ways of one batch together, then the critical batch with its definition."""
    said = say_batches(comparison(*three(arm), critical=CriticalBatch(256)))
    assert said == (
        "The global batch of 32 has the lowest loss at equal samples and equal seconds, that of 2048 at "
        "equal optimizer steps. Critical batch (the largest whose loss at equal samples is within twice "
        "the spread over seeds of the best batch's): 256."
    )
    at_least = say_batches(comparison(*three(arm), critical=CriticalBatch(2048, True)))
    assert at_least.endswith("): at least 2048, the largest tried.")
    unresolved = say_batches(comparison(*three(arm), critical=CriticalBatch(open_because="so it is")))
    assert unresolved.endswith("): not resolved, because so it is.")


@pytest.mark.parametrize(
    ("place", "mark"), [("highest", "↑"), ("lowest", "↓"), ("only one", "↕"), ("contested", "?")]
)
def test_a_rate_that_is_not_settled_has_its_mark_and_legend(arm: Arm, place: Place, mark: str) -> None:
    """And one that is has none."""
    shown = printed(comparison(*three(arm, place), critical=CriticalBatch(256)))
    assert f"0.00014{mark}" in shown
    assert f"; {mark} " in words(shown)
    assert mark not in printed(comparison(*three(arm), critical=CriticalBatch(256)))


def test_seeds_that_diverged_are_counted_and_named(arm: Arm) -> None:
    """In the row, and in a note; another batch has the lowest loss then."""
    first, *others = three(arm)
    lost = replace(first, seeds=("0", "2"), diverged=("1",))
    of = comparison(lost, *others, critical=CriticalBatch(open_because="so it is"))
    shown = words(printed(of))
    assert "0.00014 2/3" in shown
    assert "- Of the global batch of 32 seed 1 diverged at 0.00014, which lost the fewest" in shown
    assert say_batches(of).startswith("The global batch of 256 has the lowest loss at equal samples")


def test_what_is_not_compared_is_said_with_its_reason(arm: Arm) -> None:
    """A column of dashes, and a note."""
    rows = [
        replace(of, losses={k: v for k, v in of.losses.items() if k != "seconds"}) for of in three(arm)
    ]
    shown = words(printed(comparison(*rows, critical=CriticalBatch(256), seconds=None)))
    assert "- At equal seconds nothing is compared: so." in shown
    assert "equal seconds, that" not in shown


def test_settings_have_a_table_each_and_too_many_are_counted(arm: Arm) -> None:
    """Titles name the settings where there are several."""
    one = comparison(*three(arm), critical=CriticalBatch(256))
    assert "global_mean, beta2_rule=half_life" not in words(printed(one))
    assert words(printed(one, one)).count("global_mean, beta2_rule=half_life") == 2
    assert "2 more settings: see batches.csv." in printed(*(one for _ in range(8)))


def test_an_interval_that_nothing_bounds_is_a_bound(arm: Arm) -> None:
    """And one without any bound is not shown."""
    assert say_interval(told(arm, 90, 70.123, 120)) == "90 (70.1-120)"
    assert say_interval(told(arm, 90, 70, math.inf)) == ">70"
    assert say_interval(told(arm, None, 0.0, math.inf)) == "–"


def test_it_follows_the_comparison_with_the_large_batch(
    arm: Arm, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where there are several global batches."""
    print_comparison(compare([arm(1), arm(2)]))
    without = capsys.readouterr().out
    assert "Global batches" not in without
    print_comparison(compare([arm(1), arm(2)]), [comparison(*three(arm), critical=CriticalBatch(256))])
    after = capsys.readouterr().out
    assert after.startswith(without)
    assert "Global batches, each at its best learning rate" in after


def test_the_noise_scale_is_told_once_for_each_batch(
    arm: Arm, capsys: pytest.CaptureFixture[str]
) -> None:
    """At the best of its rates, not at every rate that was tried."""
    runs = [
        measured(
            arm(batch // 32, global_batch=batch, params={"optimizer.lr": rate}, run_id=f"{batch}-{rate}",
                losses=[1.0 + (rate != "0.1")] * 8),
            90.0, 70.0, 120.0,
        )
        for batch in (128, 256)
        for rate in ("0.05", "0.1", "0.2")
    ]  # fmt: skip
    comparison = compare(runs)
    print_comparison(comparison, compare_batches(comparison, runs))
    assert capsys.readouterr().out.count("The noise scale is 90 samples") == 2
