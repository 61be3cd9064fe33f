"""Advice on how to get a global batch: the ways there are, what each takes, and which one to take."""

from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from gaccum_exp.core.step_times import FEWEST_WINDOWS, StepTime
from gaccum_exp.memory.plan import size
from gaccum_exp.report.compare.ways import Advice, Way
from gaccum_exp.report.text.terminal import LOOK, console
from gaccum_exp.report.text.wording import MISSING, say_list, say_loss, say_scaled, time_unit

INEXACT = "its loss is not the large batch's by arithmetic, and no run shows it"


def say_why(advice: Advice) -> str:
    """Say which way is recommended and why, or what is missing to recommend one."""
    best, unknown = advice.recommended(), advice.fastest_unknown()
    lines = [f"Nothing is recommended: {_missing(advice)}."] if best is None else [_reason(advice, best)]
    if advice.noise is None and (best is not None or any(way.usable for way in advice.ways)):
        lines.append(
            "Whether a smaller batch would do is not known: no run like this one, of as many samples, "
            "has told its noise scale (noise.every_steps=8)."
        )
    if best is not None and unknown is not None:
        ratio = advice.cost_s(unknown) / advice.cost_s(best)
        lines.append(f"With {named(unknown)} it would be {ratio:.2f} × of that, but {INEXACT}.")
    return " ".join(lines)


def _reason(advice: Advice, best: Way) -> str:
    way = f"Recommended: {named(best)} ({' '.join(best.overrides) or 'as it is'})"
    if advice.noise is None:
        of = f"the ways to a batch of {advice.global_batch_size} that fit"
        return f"{way}: the least seconds per sample of {of}."
    return (
        f"{way}: the least seconds per sample × (1 + B / noise scale) of the ways that fit, by the "
        "model samples ∝ 1 + B / noise scale."
    )


def _missing(advice: Advice) -> str:
    """Say why no way is recommended."""
    if not any(way.fits and way.peak_bytes is not None for way in advice.ways):
        return "no way fits the memory that there is"
    tried = [way for way in advice.ways if way.sample is not None]
    if not tried:
        return "no way that fits could be tried"
    if not any(way.usable for way in tried):
        return "no way that was tried has a sound gradient"
    fastest = advice.fastest_unknown()
    if fastest is None:  # smaller batches, and no noise scale to weigh them by
        return f"no way to a batch of {advice.global_batch_size} that could be tried is sound"
    to_add = " ".join(fastest.overrides) or "as it is"
    return f"the fastest way that fits is {named(fastest)} ({to_add}), but {INEXACT}"


def named(way: Way) -> str:
    """`one pass`, `N = 4, checkpointing`, `half the batch`."""
    first = [f"N = {way.accum_steps}"] * (way.accum_steps > 1)
    return ", ".join([*first, *way.changes]) or "one pass"


def print_advice(advice: Advice) -> None:
    """Print the table of all ways, and what is recommended."""
    out = console()
    out.print(render(advice))
    out.print(say_why(advice), highlight=False)


def render(advice: Advice) -> Table:
    """Return a row per way: predicted, measured, from runs and modelled are marked apart."""
    ways = advice.ways
    scale, unit = time_unit(max((way.sample.median_s for way in ways if way.sample), default=1.0))
    objectives = [advice.cost_s(way) if way.sample and advice.noise else None for way in ways]
    worst = max((o for o in objectives if o is not None), default=1.0)
    modelled, modelled_unit = time_unit(worst)
    best = advice.recommended()
    rows: list[tuple[str, ...]] = [
        (
            f"{'*' if way is best else ''}{named(way)}",
            str(way.global_batch_size),
            f"{way.accum_steps} × {-(-(way.held or way.global_batch_size) // way.accum_steps)}",
            MISSING if way.peak_bytes is None else f"{size(way.peak_bytes)}{'' if way.fits else ' !'}",
            _say_time(way.sample, scale),
            way.verdict or MISSING,
            MISSING if way.loss is None else f"{say_loss(way.loss)} ({way.runs})",
            MISSING if objective is None else say_scaled(objective, modelled),
        )
        for way, objective in zip(ways, objectives, strict=True)
    ]
    head = (
        "way", "\nbatch", "N ×\nmicro", "peak,\npredicted", f"{unit}/sample\n(quartiles),\nmeasured",
        "gradient,\naudited", "loss,\nof runs", f"objective\n{modelled_unit}, modelled",
    )  # fmt: skip
    table = Table(
        title=f"Ways to a global batch of {advice.global_batch_size} on {advice.device}",
        caption=Text("\n".join(_legend(advice))), **LOOK,
    )  # fmt: skip
    shown = [i for i in range(len(head)) if i < 5 or any(row[i] != MISSING for row in rows)]
    for i in shown:
        table.add_column(
            Text(head[i]), justify="left" if i == 0 else "right", no_wrap=i > 0, overflow="fold"
        )
    for row in rows:
        table.add_row(*(Text(row[i]) for i in shown))
    return table


def _say_time(time: StepTime | None, unit_size: float) -> str:
    """`6.84 (6.70-7.02)`: the median and the quartiles."""
    if time is None:
        return MISSING
    median, low, high = (say_scaled(seconds, unit_size) for seconds in time[:3])
    return f"{median} ({low}-{high})"


def _legend(advice: Advice) -> Iterator[str]:
    if advice.recommended() is not None:
        yield "*: recommended"
    if advice.budget_bytes is None:
        yield "there is no memory budget (runtime.memory_budget_gib)"
    elif any(not way.fits for way in advice.ways):
        yield f"!: beyond the {size(advice.budget_bytes)} that there are, and not tried"
    if advice.noise is not None:
        noise = advice.noise
        metric = ", in Adam's metric" if noise.in_adam_metric else ""
        yield (
            f"objective: seconds per sample × (1 + B / {noise.scale:.3g}), the noise scale that run "
            f"{noise.run!r} has told ({noise.low:.3g} to {noise.high:.3g}{metric}); a model"
        )
    if any(way.runs for way in advice.ways):
        yield (
            "loss: of the finished runs like it, after as many samples: the mean over those of the best "
            "rate (how many)"
        )
    tried = [way for way in advice.ways if way.sample is not None]
    if any(way.sample.windows < FEWEST_WINDOWS for way in tried if way.sample):
        yield f"- Fewer than {FEWEST_WINDOWS} windows of a way were timed: its time is uncertain."
    held = {way.global_batch_size: way.held for way in advice.ways if way.held}
    if held:
        yield (
            f"- data.train holds {max(held.values()):,} samples, fewer than a batch of "
            f"{say_list(held)}: windows of as many were tried, peaks are of whole batches."
        )
    for reason, labels in _failures(advice.ways).items():
        yield f"- {say_list(labels)}: {reason}"


def _failures(ways: Sequence[Way]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for way in ways:
        if way.failure is not None:
            found.setdefault(way.failure, []).append(named(way))
    return found
