"""Which way to a global batch is recommended, on ways that are made up."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from gaccum_exp.report.text.advice import Advice, NoiseKnown, Way, render

NOISE = NoiseKnown(100.0, 80.0, 130.0, False, "N=8")
ONE = Way((), (), 256, 1, 256, True, 8 << 20, True, 1e-4)
FOUR = Way(("accum.steps=4",), (), 256, 4, 64, True, 2 << 20, True, 1.5e-4, "equivalent")
KEPT = replace(
    FOUR, changes=("checkpointing",), overrides=("checkpoint", "accum.steps=4"), sample_s=2e-4
)
BF16 = replace(ONE, overrides=("bf16",), changes=("bf16",), exact=False, sample_s=0.5e-4)
HALF = replace(
    ONE, overrides=("half",), changes=("half the batch",), global_batch_size=128, exact=False,
    sample_s=1.1e-4,
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
    assert "noise.every_steps=8" in advice(ONE, HALF, noise=None).why()


def test_what_does_not_fit_is_biased_or_has_failed_is_not_recommended() -> None:
    """And where nothing is left, it is said what is missing."""
    beyond = replace(ONE, fits=False, sample_s=None)
    assert chosen(beyond, FOUR, KEPT) == ("accum.steps=4",)
    assert chosen(beyond, replace(FOUR, verdict="biased"), KEPT) == KEPT.overrides
    assert chosen(beyond, replace(FOUR, failure="no blocks"), KEPT) == KEPT.overrides
    assert chosen(beyond) is None
    assert "no way fits" in advice(beyond).why()


def test_another_precision_is_recommended_only_where_runs_show_its_loss() -> None:
    """Else it is said what it would take."""
    assert chosen(ONE, BF16) == ()
    assert "bf16 it would be 0.50 × of that" in advice(ONE, BF16).why()
    shown = replace(BF16, loss=0.5, runs=2)
    assert chosen(replace(ONE, loss=0.5), shown) == ("bf16",)
    assert chosen(replace(ONE, loss=0.4), shown) == ()


def test_of_ways_as_good_the_simplest_is_recommended() -> None:
    """Times of a few windows do not tell five percent apart."""
    assert chosen(ONE, replace(FOUR, sample_s=0.97e-4)) == ()
    assert chosen(ONE, replace(KEPT, sample_s=0.97e-4)) == ()
    assert chosen(ONE, replace(FOUR, sample_s=0.9e-4)) == ("accum.steps=4",)


def test_the_table_marks_what_is_predicted_measured_and_modelled() -> None:
    """What nothing is known of has no column; what is beyond the memory has a mark."""
    out = StringIO()
    console = Console(file=out, width=100)
    beyond = replace(ONE, fits=False, sample_s=None)
    console.print(render(advice(beyond, FOUR, budget=4 << 20)))
    said = out.getvalue()
    for word in ("predicted", "measured", "audited", "modelled", "8 MiB !", "*N = 4", "a model"):
        assert word in said
    assert "of runs" not in said
    console.print(render(advice(beyond, replace(FOUR, loss=0.25, runs=3), noise=None)))
    assert "0.2500 (3)" in out.getvalue().replace(said, "")
    assert "modelled" not in out.getvalue().replace(said, "")
