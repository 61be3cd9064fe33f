"""The table and the sentences show the numbers of the comparison and the audits' verdicts."""

import io
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console

from gaccum_exp.report.compare.comparison import Comparison, compare
from gaccum_exp.report.text.summary import summary
from gaccum_exp.report.text.table import render
from gaccum_exp.tracking.records import RunRecord

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
    for name in ("N", "train", "eval", "acc.", "gap", "weight", "MiB", "ms", "×", "mean"):
        assert name in header
    (line,) = (line for line in shown.splitlines() if line.split()[:1] == ["4"])
    assert words(line) == "4 64 0.1944 0.2100 0.9472 3.0e-07 – 25.7 0.47 13.4 1.09"


@pytest.mark.parametrize("verdict", ["equivalent", "inconclusive", None])
@pytest.mark.parametrize("controls", [0, 3])
def test_a_plain_sweep_fits_a_terminal_of_eighty_columns(
    arm: Arm, audited: Arm, control: Arm, verdict: str | None, controls: int
) -> None:
    """Nothing is cut and no line wraps, with verdicts, controls, weights and an N of two digits."""
    runs = [arm(n, reduction="global_mean") for n in (1, 2, 16)]
    kept = {run.run_id: {"w": torch.tensor([1.0 + i * 1e-3])} for i, run in enumerate(runs)}
    others = [audited(run, verdict) if verdict else run for run in runs[1:]]
    runs = [runs[0], *others, *(control(runs[0], seed, 1e-7) for seed in range(1, controls + 1))]
    shown = show(compare(runs, weights=kept.get), width=80)
    assert max(map(len, shown.splitlines())) <= 80
    assert "global_mean" in shown.splitlines()[0]
    rows = [line for line in shown.splitlines() if "0.2100" in line]
    assert [len(row.split()) for row in rows] == [11 if verdict is None else 12] * 3
    assert shown.count(" 54.4 ") == 1
    assert all((verdict or "") in row for row in rows[1:])
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
    assert shown.count("global_mean") == (6 if len(reductions) > 1 else 1)
    assert shown.count(" 54.4 ") == 2 * len(reductions)


def test_verdicts_of_several_settings_fit_a_hundred_columns(
    arm: Arm, audited: Arm, control: Arm
) -> None:
    """Whole words beside whole numbers, controls and seeds; the micro-batch makes room for them."""
    settings = [(r, s) for r in ("mean", "global_mean") for s in (0, 1)]
    ones = [arm(1, reduction=r, seed=s) for r, s in settings]
    others = [audited(arm(16, reduction=r, seed=s), "inconclusive") for r, s in settings]
    kept = {run.run_id: {"w": torch.tensor([1.0 + i * 1e-3])} for i, run in enumerate(ones + others)}
    comparison = compare([*ones, *others, *(control(one, 1, 1e-7) for one in ones)], weights=kept.get)
    shown = show(comparison)
    assert max(map(len, shown.splitlines())) <= 100
    lines = [line.split() for line in shown.splitlines() if line.split()[:1] == ["16"]]
    assert [line[1:4] for line in lines] == [
        ["inconclusive", reduction, f"seed={seed}"] for reduction, seed in sorted(settings)
    ]
    assert "micro" not in shown.split("───")[0]


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
    gaps = {row.accum_steps: row.max_loss_gap or 0.0 for row in comparison.rows}
    assert f"N = 2, 4 and 8 differs by up to {max(gaps.values()):.1e}" in said
    assert "over 140 steps, N = 8 being the furthest" in said
    assert f"up to {0.07 / 1.01:.1e} from its" in said
    assert "falls to 0.39 × at N = 8" in said
    assert "a step there takes 1.21 × as long" in said
    assert "equivalent" not in said.lower()


def test_no_ratio_is_said_of_step_times_that_do_not_differ_measurably(arm: Arm) -> None:
    """The table marks it; of too few windows, or of an older version, nothing is said but the median."""

    def compared(of_four: dict[str, float]) -> tuple[str, str]:
        runs = [arm(1), arm(2), arm(4)]
        runs[2].metrics.update(of_four)  # type: ignore[attr-defined]
        comparison = compare(runs)
        return words(show(comparison)), summary(comparison)

    shown, said = compared({})
    assert "step: median of 100 windows after warm-up, their quartiles up to 1% off" in shown
    assert said.endswith("at N = 4; a step there takes 1.09 × as long.")
    shown, said = compared({"time/step_low_s": 0.0121})
    assert "up to 10% off (N = 4); ≈ no measurable difference: quartiles overlap" in shown
    assert " 13.4 ≈1.09 " in shown
    assert said.endswith("at N = 4, with no measurable difference in step time.")
    shown, said = compared({"time/step_windows": 3.0})
    assert "step: median of 3 to 100 windows" in shown
    assert "a ratio takes 10" in shown
    assert "as long" not in said
    hasty = [arm(1), arm(4)]
    for run in hasty:
        run.metrics["time/step_windows"] = 0.0  # type: ignore[index]
    shown = words(show(compare(hasty)))
    assert "step: no window was timed after warm-up; a ratio takes 10" in shown
    assert "25.7 0.47 13.4 *" in shown  # without a column of ratios
    assert said.endswith("at N = 4.")


def test_a_load_that_step_times_include_is_said(arm: Arm) -> None:
    """With the share of the training that waited, from a twentieth on, and where it took ratios away."""
    runs = [arm(1), arm(2), arm(4)]
    for run, share in zip(runs, (0.01, 0.07, 0.6), strict=True):
        run.metrics["time/waiting_share"] = share  # type: ignore[index]
    said = words(show(compare(runs)))
    assert "other processes had the processor for up to 60% of a training (N = 4)" in said
    assert said.count("; no ratio where that differs much") == 1
    assert "as long" not in summary(compare(runs)).rpartition("at N = 4")[2]
    assert "other processes" not in words(show(compare(runs[:1])))
    assert "no ratio where" not in words(show(compare(runs[:2])))


def test_a_time_of_another_command_is_said_to_be_one(arm: Arm) -> None:
    """Marked in the table, named in the sentence."""
    comparison = compare([arm(1, tags={"command_id": "a"}), arm(4, tags={"command_id": "b"})])
    assert " 13.4~ 1.09~\n" in show(comparison)
    assert "1.09 × as long, as another command has measured it" in summary(comparison)


def test_repetitions_have_to_differ_all_and_in_one_direction(arm: Arm) -> None:
    """One seed that is faster, or does not differ, leaves no claim."""
    runs = [arm(n, seed=s) for n in (1, 4) for s in (0, 1)]
    assert "a step there takes 1.09 × as long" in summary(compare(runs))
    for time in (0.006, runs[1].metrics["time/step_s"]):
        runs[3].metrics.update(
            {f"time/{name}": time for name in ("step_s", "step_low_s", "step_high_s")}
        )
        assert "no measurable difference in step time" in summary(compare(runs))


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
    assert f"up to {worst:.1e} from" in sum_line
    assert "e-07" in mean_line


def test_summary_says_when_memory_does_not_fall(arm: Arm) -> None:
    """A ratio of one is not called a saving."""
    same = [arm(1), arm(2)]
    same[1].metrics["memory/peak_bytes"] = same[0].metrics["memory/peak_bytes"]  # type: ignore[index]
    assert "Peak memory does not fall: it is 1.00 × at N = 2" in summary(compare(same))
    same[1].metrics["memory/peak_bytes"] *= 1.26  # type: ignore[index]
    assert "Peak memory rises to 1.26 × at N = 2" in summary(compare(same))


def test_summary_leaves_unfinished_arms_out_and_counts_them(arm: Arm) -> None:
    """A diverged, failed arm does not set the gap of those that finished."""
    failed = arm(8, status="FAILED", losses=[2.3, math.nan])
    said = summary(compare([arm(1), arm(2), failed]))
    assert "N = 2 differs by up to 1.0e-07" in said
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


BATCHNORM = {
    "cause": "batch statistics",
    "culprit": "body.bn1",
    "remedy": "replace BatchNorm2d by GroupNorm, or freeze its statistics",
}


def test_the_summary_leads_with_the_verdicts_the_worst_first(arm: Arm, audited: Arm) -> None:
    """What is biased is said before what is equivalent, and the numbers follow."""
    sound = [audited(arm(n), "equivalent") for n in (2, 4, 8)]
    said = summary(compare([arm(1), *sound]))
    assert said.startswith(
        "N = 2, 4 and 8 are equivalent to the large batch: the train loss of N = 2, 4 and 8 stays "
    )
    assert "Peak memory falls to" in said
    biased = audited(arm(4), "biased", **BATCHNORM)
    said = summary(compare([arm(1), sound[0], biased, audited(arm(8), "identical")]))
    assert said.startswith(
        "N = 4 is biased by batch statistics; N = 2 is equivalent to the large batch; N = 8 is "
        "identical to the large batch: the train loss of "
    )


def test_the_worst_verdict_of_repetitions_counts(arm: Arm, audited: Arm) -> None:
    """One biased seed of three makes that N biased, and an arm without audit makes none sound."""
    verdicts = {2: ("equivalent", "biased", "equivalent"), 4: ("equivalent", None, "equivalent")}
    runs = [arm(1, seed=s) for s in range(3)]
    for n, each in verdicts.items():
        for s, verdict in enumerate(each):
            runs.append(audited(arm(n, seed=s), verdict) if verdict else arm(n, seed=s))
    assert summary(compare(runs)).startswith("N = 2 is biased; N = 4 is not audited: ")


def test_an_arm_without_audit_is_said_to_be_not_audited(arm: Arm, audited: Arm) -> None:
    """Beside audited arms in the table, and in the sentence; alone it needs no column."""
    mixed = compare([arm(1), arm(2), audited(arm(4), "equivalent")])
    (line,) = (line for line in show(mixed).splitlines() if line.split()[:1] == ["2"])
    assert line.split()[1:3] == ["not", "audited"]
    old = compare([arm(1), arm(2)])
    assert "verdict" not in show(old)
    assert summary(old).startswith("N = 2 is not audited: the train loss of N = 2 differs by up to ")
    cleared = audited(arm(2), "", cause="")  # MLflow keeps a tag that was taken back as an empty one
    assert compare([arm(1), cleared]).rows[1].verdict is None


def test_the_verdict_is_in_the_table_and_what_is_to_blame_below(arm: Arm, audited: Arm) -> None:
    """A line for each distinct finding, with every N that it concerns; none for sound arms."""
    runs = [
        audited(arm(1), "identical"),
        audited(arm(2), "equivalent"),
        *(audited(arm(n), "biased", **BATCHNORM) for n in (4, 8)),
        audited(arm(16), "stochastic", cause="randomness", remedy="switch it off."),
    ]
    comparison = compare(runs)
    assert comparison.verdict_notes == (
        "N = 4 and 8: biased by batch statistics at body.bn1: replace BatchNorm2d by GroupNorm, or "
        "freeze its statistics.",
        "N = 16: stochastic because of randomness: switch it off.",
    )
    shown = show(comparison)
    assert "- N = 4 and 8: biased by batch statistics at body.bn1" in words(shown)
    firsts = [line.split()[:2] for line in shown.splitlines() if "0.2100" in line]
    assert firsts == [
        ["1*", "identical"], ["2", "equivalent"], ["4", "biased"], ["8", "biased"], ["16", "stochastic"]
    ]  # fmt: skip


def test_a_finding_says_on_which_window_it_was_made(arm: Arm, audited: Arm) -> None:
    """Where that is another one than a reader thinks of: the remedy alone does not tell."""
    words = {"cause": "unequal denominators", "remedy": "use global_mean."}
    on = audited(arm(4), "biased", detail="on the partial window that ends an epoch", **words)
    assert compare([arm(1), on]).verdict_notes == (
        "N = 4: biased by unequal denominators (on the partial window that ends an epoch): use "
        "global_mean.",
    )


def test_findings_name_their_settings_and_many_remedies_are_one_line(arm: Arm, audited: Arm) -> None:
    """The settings stand in front; advice that differs in numbers for each N is given once."""
    runs = [arm(n, reduction=r) for n in (1, 3) for r in ("mean", "global_mean")]
    runs[2] = audited(runs[2], "biased", cause="unequal denominators", remedy="use global_mean")
    assert compare(runs).verdict_notes == (
        "mean: N = 3: biased by unequal denominators: use global_mean.",
    )
    many = [
        audited(arm(n), "biased", cause="unequal denominators", remedy=f"micro-batches hold {n}")
        for n in range(2, 12)
    ]
    (note,) = compare([arm(1), *many]).verdict_notes
    assert note.startswith("N = 2, 3, 4, 5, 6, 7, 8, 9, 10 and 11: biased by unequal denominators: ")
    assert note.endswith(": micro-batches hold 2.")


def test_verdicts_are_shown_without_a_loss_curve(arm: Arm, audited: Arm) -> None:
    """Arms that failed after their audit, or that were nothing but audited, keep their verdict."""
    failed = audited(arm(4, status="FAILED", drop=("train/loss",)), "biased", **BATCHNORM)
    comparison = compare([arm(1), failed])
    assert "biased" in show(comparison)
    said = "N = 4 is biased by batch statistics, by the audit alone. No finished arm"
    assert summary(comparison).startswith(said)


def test_standing_is_marked_in_the_table_and_said(arm: Arm, audited: Arm, control: Arm) -> None:
    """Inside and outside have their mark, their legend, a note and a place in the sentence."""
    reference = arm(1)
    controls = [control(reference, seed, 1e-6) for seed in (1, 2, 3)]
    comparison = compare([reference, arm(2), arm(4), arm(8, noise=1e-2), *controls])
    shown = show(comparison)
    assert [line.split()[5][-1] for line in shown.splitlines() if "0.2100" in line][1:] == list("✓✓✗")
    assert "✓ inside, ✗ outside the envelope of 3 controls" in words(shown)
    assert "- Outside the envelope of 3 controls: N = 8 from step 1." in words(shown)
    assert ", N = 2 and 4 inside and N = 8 outside the envelope of 3 controls" in summary(comparison)
    assert "N = 2, 4 and 8 differs by up to" in summary(comparison)  # "stays within" not: one left
    assert ", inside the envelope of 3 controls" in summary(compare([reference, arm(2), *controls]))
    assert "N = 2 stays within" in summary(compare([reference, arm(2), *controls]))
    assert "more controls tell" not in words(shown)
    leapt = audited(arm(8, noise=1e-2), "equivalent")
    assert "more controls tell" in words(show(compare([reference, leapt, *controls])))
    without = compare([reference, arm(2)])
    assert "envelope" not in show(without) + summary(without)


def test_only_what_is_known_to_be_near_stays_within(arm: Arm, audited: Arm) -> None:
    """By an audit, or an envelope; of what neither has judged the numbers stand alone."""
    reference = arm(1)
    sound = audited(arm(2), "equivalent")
    assert "stays within 1.0e-07 of that of the one-pass arm at each of 140 steps" in summary(
        compare([reference, sound])
    )
    for others in ([arm(2, noise=2.0)], [sound, arm(4)]):  # whatever the gap, and beside another one
        assert "stays within" not in summary(compare([reference, *others]))
    same = arm(2, noise=0.0)
    said = summary(compare([reference, same]))
    assert "N = 2 is that of the one-pass arm at each of 140 steps" in said


def test_what_is_said_of_many_settings_is_said_once(arm: Arm) -> None:
    """Of rates that were tried at one pass there is nothing to be compared."""
    rates = [arm(1, run_id=f"{k}", params={"optimizer.lr": f"0.{k}"}) for k in range(1, 5)]
    alone = "There is only the reference, and no other arm to compare with it."
    assert summary(compare(rates)) == f"In all 4 settings: {alone}"
    paired = arm(2, run_id="paired", params={"optimizer.lr": "0.1"})
    first, rest = summary(compare([*rates, paired])).splitlines()
    assert "lr=0.1" in first
    assert rest.endswith(f"and 2 more settings: {alone}")
