"""The table and the sentences show the numbers of the comparison, and no verdict."""

import io
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from gaccum_exp.records import RunRecord
from gaccum_exp.report.compare import Comparison, compare
from gaccum_exp.report.table import render, summary

Arm = Callable[..., RunRecord]


def show(comparison: Comparison, width: int = 100) -> str:
    """Print the table as a terminal of this width would show it."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(render(comparison))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def words(text: str) -> str:
    """Undo line breaks."""
    return " ".join(text.split())


def test_table_shows_the_columns_and_units(arm: Arm) -> None:
    """All that the user is promised stands in a line per arm."""
    shown = show(compare([arm(1), arm(4)]))
    header = words("".join(shown.splitlines(keepends=True)[:4]))
    for name in ("N", "reduction", "train", "eval", "acc.", "gap", "weight", "MiB", "ms", "ratio"):
        assert name in header
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["4"])
    assert words(line) == "4 64 mean 0.1944 0.2100 0.9472 3.0e-07 – 25.7 0.47 13.4 1.09"


def test_a_plain_sweep_fits_a_terminal_of_eighty_columns(arm: Arm) -> None:
    """Nothing is cut and no line wraps."""
    shown = show(compare([arm(n, reduction="global_mean") for n in (1, 2, 16)]), width=80)
    rows = [line for line in shown.splitlines() if "global_mean" in line]
    assert [len(row.split()) for row in rows] == [12, 12, 12]
    assert "…" not in shown


@pytest.mark.parametrize("reductions", [("global_mean",), ("mean", "sum", "global_mean")])
def test_numbers_are_never_cut_at_a_hundred_columns(arm: Arm, reductions: tuple[str, ...]) -> None:
    """With seeds and learning rates beside it, the table fits and no number loses a digit."""
    runs = [
        arm(n, reduction=r, seed=s, params={"optimizer.exponential_average_decay": f"0.000{s + 1}"})
        for n in (1, 2, 128)
        for r in reductions
        for s in (0, 1)
    ]
    comparison = compare(runs)
    shown = show(comparison)
    assert max(map(len, shown.splitlines())) <= 100
    assert "…" not in shown
    assert shown.count("global_mean") == 6
    assert shown.count(" 54.4 ") == 2 * len(reductions)


def test_unfinished_arms_are_marked_and_missing_numbers_dashed(arm: Arm) -> None:
    """A failed arm keeps its line, with a mark that the legend explains and its reason below."""
    failed = arm(
        8, status="FAILED", losses=[], tags={"failure": "out of memory"}, drop=("memory/peak_bytes",)
    )
    shown = show(compare([arm(1), arm(2), failed]))
    (line,) = (line for line in shown.splitlines() if line.strip().startswith("8!"))
    assert "–" in line
    assert "! not finished" in shown
    assert "N = 8 failed (out of memory)." in shown


def test_stand_in_and_stored_references_are_named_in_table_and_summary(arm: Arm) -> None:
    """Neither is passed off as the sweep's own one-pass arm."""
    stand_in = compare([arm(2), arm(4)])
    assert "2†" in show(stand_in)
    assert "because the sweep has no N = 1 arm" in words(show(stand_in))
    assert "stands in for a missing one-pass reference" in summary(stand_in)
    stored = compare([arm(2), arm(4)], [arm(1, run_id="stored")])
    assert "1‡" in show(stored)
    assert "stored one-pass run" in summary(stored)
    own = compare([arm(1), arm(4)])
    assert "1*" in show(own)
    assert "stored" not in show(own) + summary(own)


def test_summary_gives_the_numbers_and_the_furthest_arm(arm: Arm) -> None:
    """Largest gap, distance, saving and its price are those of the rows."""
    weights = {f"mean-256-s0-n{n}": {"w": torch.tensor([1.0 + n / 100])} for n in (1, 2, 4, 8)}
    comparison = compare([arm(n) for n in (1, 2, 4, 8)], weights=weights.get)
    said = summary(comparison)
    gaps = {row.steps: row.max_loss_gap or 0.0 for row in comparison.rows}
    assert f"N = 2, 4 and 8 stays within {max(gaps.values()):.1e}" in said
    assert "each of 140 steps, N = 8 being the furthest" in said
    assert f"within {0.07 / 1.01:.1e} of its" in said
    assert "falls to 0.39 × at N = 8" in said
    assert "a step there takes 1.21 × as long" in said
    assert "equivalent" not in said.lower()


def test_summary_takes_the_largest_over_seeds_per_reduction(arm: Arm) -> None:
    """A line per reduction; within it the worst seed counts."""
    runs = [
        arm(n, seed=s, reduction=r, noise=1e-3 if (s, r) == (1, "sum") else 1e-7)
        for n in (1, 2)
        for s in (0, 1)
        for r in ("mean", "sum")
    ]
    comparison = compare(runs)
    mean_line, sum_line = summary(comparison).splitlines()
    worst = max(row.max_loss_gap or 0.0 for row in comparison.rows if row.reduction == "sum")
    assert sum_line.startswith("sum: ")
    assert f"within {worst:.1e} of" in sum_line
    assert "e-07" in mean_line


def test_summary_says_when_memory_does_not_fall(arm: Arm) -> None:
    """A ratio of one is not called a saving."""
    same = [arm(1), arm(2)]
    same[1].metrics["memory/peak_bytes"] = same[0].metrics["memory/peak_bytes"]  # type: ignore[index]
    assert "Peak memory does not fall: it is 1.00 × at N = 2" in summary(compare(same))


def test_summary_leaves_unfinished_arms_out_and_counts_them(arm: Arm) -> None:
    """A diverged, failed arm does not set the gap of those that finished."""
    failed = arm(8, status="FAILED", losses=[2.3, math.nan])
    said = summary(compare([arm(1), arm(2), failed]))
    assert "N = 2 stays within 1.0e-07" in said
    assert "1 of 3 arms did not finish." in said


@pytest.mark.parametrize("runs", [[], [1], [4], [None]])
def test_any_sweep_can_be_shown(arm: Arm, runs: list[int | None]) -> None:
    """No runs, one run, and a run without a config have a table and a sentence."""
    dead = RunRecord("r", "1", "dead", "RUNNING", 0, {}, {}, {})
    comparison = compare([dead if n is None else arm(n) for n in runs])
    assert "Every arm" in show(comparison)
    assert summary(comparison).endswith(".")


def test_a_finished_loss_of_nan_is_said(arm: Arm) -> None:
    """An arm that trained to its end on NaN is not reported as being within anything."""
    said = summary(compare([arm(1), arm(2, losses=[2.3, math.nan])]))
    assert "is not finite" in said
    assert "within nan" not in said
