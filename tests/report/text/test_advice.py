"""Which way to a global batch is recommended, on ways that are made up."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from gaccum_exp.core.step_times import StepTime
from gaccum_exp.report.compare.ways import Advice, NoiseKnown, Way
from gaccum_exp.report.text.advice import render, say_why


def took(median_s: float, spread: float = 0.01, windows: int = 12) -> StepTime:
    """Seconds per sample, and quartiles so far apart."""
    return StepTime(median_s, (1 - spread) * median_s, (1 + spread) * median_s, windows)


NOISE = NoiseKnown(100.0, 80.0, 130.0, False, "N=8")
ONE = Way((), (), 256, 1, 256, True, 8 << 20, True, took(1e-4))
FOUR = Way(("accum.steps=4",), (), 256, 4, 64, True, 2 << 20, True, took(1.5e-4), "equivalent")
KEPT = replace(
    FOUR, changes=("checkpointing",), overrides=("checkpoint", "accum.steps=4"), sample=took(2e-4)
)
BF16 = replace(ONE, overrides=("bf16",), changes=("bf16",), exact=False, sample=took(0.5e-4))
HALF = replace(
    ONE, overrides=("half",), changes=("half the batch",), global_batch_size=128, exact=False,
    sample=took(1.1e-4),
)  # fmt: skip


def advice(*ways: Way, noise: NoiseKnown | None = NOISE, budget: int | None = None) -> Advice:
    return Advice(256, "cpu", budget, ways, noise)


def chosen(*ways: Way, noise: NoiseKnown | None = NOISE) -> tuple[str, ...] | None:
    best = advice(*ways, noise=noise).recommended()
    return None if best is None else best.overrides


def test_the_least_time_to_a_loss_is_recommended_of_what_is_known_to_be_as_good() -> None:
    """By the model a smaller batch needs fewer samples; without a noise scale that is not known."""
    assert chosen(ONE, FOUR, KEPT) == ()
    assert chosen(ONE, FOUR, HALF) == ("half",)  # 1.1 × (1 + 1.28) < 1 × (1 + 2.56)
    assert chosen(ONE, FOUR, HALF, noise=replace(NOISE, scale=1e4)) == ()
    assert chosen(ONE, FOUR, HALF, noise=None) == ()
    assert "noise.every_steps=8" in say_why(advice(ONE, HALF, noise=None))


def test_what_does_not_fit_is_biased_or_has_failed_is_not_recommended() -> None:
    """And where nothing is left, it is said what is missing."""
    beyond = replace(ONE, fits=False, sample=None)
    assert chosen(beyond, FOUR, KEPT) == ("accum.steps=4",)
    assert chosen(beyond, replace(FOUR, verdict="biased"), KEPT) == KEPT.overrides
    assert chosen(beyond, replace(FOUR, failure="no blocks"), KEPT) == KEPT.overrides
    assert chosen(beyond) is None
    assert "no way fits" in say_why(advice(beyond))


def test_another_precision_is_recommended_only_where_runs_show_its_loss() -> None:
    """Else it is said what it would take."""
    assert chosen(ONE, BF16) == ()
    assert "bf16 it would be 0.50 × of that" in say_why(advice(ONE, BF16))
    shown = replace(BF16, loss=0.5, runs=2)
    assert chosen(replace(ONE, loss=0.5), shown) == ("bf16",)
    assert chosen(replace(ONE, loss=0.4), shown) == ()


def test_of_ways_as_good_the_simplest_is_recommended() -> None:
    """Times of a few windows do not tell five percent apart."""
    assert chosen(ONE, replace(FOUR, sample=took(0.97e-4))) == ()
    assert chosen(ONE, replace(KEPT, sample=took(0.97e-4))) == ()
    assert chosen(ONE, replace(FOUR, sample=took(0.9e-4))) == ("accum.steps=4",)


def test_ways_whose_times_do_not_differ_measurably_are_as_good() -> None:
    """Their quartiles overlap; of fewer than ten windows nothing is known of that."""
    assert chosen(ONE, replace(FOUR, sample=took(0.8e-4))) == FOUR.overrides
    assert chosen(replace(ONE, sample=took(1e-4, 0.4)), replace(FOUR, sample=took(0.8e-4))) == ()
    few = replace(ONE, sample=took(1e-4, 0.4, windows=9))
    assert chosen(few, replace(FOUR, sample=took(0.8e-4))) == FOUR.overrides
    assert "it would be" not in say_why(advice(replace(ONE, sample=took(1e-4, 0.6)), BF16))


def test_a_smaller_batch_may_be_accumulated_too() -> None:
    """Its passes add up to its own gradient, which the model says something of."""
    halves = replace(HALF, accum_steps=2, verdict="equivalent", overrides=("half", "accum.steps=2"))
    assert chosen(FOUR, halves) == halves.overrides
    assert chosen(FOUR, replace(halves, verdict="biased")) == FOUR.overrides


def test_why_nothing_is_recommended_is_said_as_it_is() -> None:
    """Nothing fits; nothing could be tried; nothing was sound; or of nothing the loss is known."""
    beyond = replace(ONE, fits=False, sample=None)
    failed = replace(FOUR, failure="it ran out of memory", sample=None)
    assert "no way fits the memory that there is." in say_why(advice(beyond))
    assert "no way that fits could be tried." in say_why(advice(beyond, failed))
    assert "no way that was tried has a sound" in say_why(
        advice(beyond, replace(FOUR, verdict="biased"))
    )
    said = say_why(advice(beyond, BF16, noise=None))
    assert "the fastest way that fits is bf16 (bf16), but its loss is not the large batch's" in said


def test_a_window_counts_with_what_it_holds() -> None:
    """The objective is of its own samples where the data hold fewer than the batch, which is said."""
    held = replace(ONE, held=100)
    assert advice(held).cost_s(held) == 2 * 1e-4
    out = StringIO()
    Console(file=out, width=200).print(render(advice(held)))
    assert "1 × 100 " in out.getvalue()
    assert "data.train holds 100 samples, fewer than a batch of 256" in out.getvalue()


def test_the_table_marks_what_is_predicted_measured_and_modelled() -> None:
    """What nothing is known of has no column; what is beyond the memory has a mark."""
    out = StringIO()
    console = Console(file=out, width=100)
    beyond = replace(ONE, fits=False, sample=None)
    console.print(render(advice(beyond, FOUR, budget=4 << 20)))
    said = out.getvalue()
    for word in (
        "predicted",
        "measured",
        "audited",
        "modelled",
        "8 MiB !",
        "*N = 4",
        "a model",
        "150 (148-152)",
    ):
        assert word in said
    assert "of runs" not in said
    console.print(render(advice(beyond, replace(FOUR, loss=0.25, runs=3), noise=None)))
    assert "0.2500 (3)" in out.getvalue().replace(said, "")
    assert "modelled" not in out.getvalue().replace(said, "")
