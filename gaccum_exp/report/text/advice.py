"""Advice on how to get a global batch: the ways there are, what each takes, and which one to take."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from gaccum_exp.memory.plan import size
from gaccum_exp.report.text.terminal import LOOK, console
from gaccum_exp.report.text.wording import MISSING, say_list, say_loss, say_scaled, time_unit

SOUND = ("identical", "equivalent")
TIE = 0.05
"""Ways within this of the least objective are as good, and the simplest of them is recommended."""
INEXACT = "its loss is not the large batch's by arithmetic, and no run shows it"


@dataclass(frozen=True, slots=True)
class NoiseKnown:
    """A noise scale that a run has told at its end."""

    scale: float
    low: float
    high: float
    in_adam_metric: bool
    run: str


@dataclass(frozen=True, slots=True)
class Way:
    """A way to get the batch, or to do with a smaller one."""

    overrides: tuple[str, ...]
    """What it adds to the command."""
    changes: tuple[str, ...]
    """What it changes beside N and the batch, in words."""
    global_batch_size: int
    accum_steps: int
    micro_batch_size: int
    exact: bool
    """Whether its gradient is the asked batch's by arithmetic: same batch, same precision."""
    peak_bytes: int | None = None
    """Predicted; None: it could not be."""
    fits: bool = True
    """In the memory that there is, as far as that is known."""
    sample_s: float | None = None
    """Measured seconds per sample; None: it was not tried."""
    verdict: str | None = None
    """Of the audit of one window; None: one pass, or not tried."""
    loss: float | None = None
    """The best held-out loss of runs like it, after as many samples."""
    runs: int = 0
    """How many there are."""
    failure: str | None = None
    """Why it cannot be taken."""

    def objective_s(self, noise: NoiseKnown | None) -> float | None:
        """Return seconds per sample × (1 + B/B_noise): a model of the time to a given loss."""
        if self.sample_s is None or noise is None:
            return None
        return self.sample_s * (1 + self.global_batch_size / noise.scale)

    @property
    def effort(self) -> tuple[int, int]:
        """How much it asks for: changes, and micro-batches."""
        return len(self.changes), self.accum_steps

    @property
    def usable(self) -> bool:
        """Whether it may be recommended at all."""
        sound = self.verdict in (None, *SOUND, "stochastic")
        return self.failure is None and self.fits and self.sample_s is not None and sound


@dataclass(frozen=True, slots=True)
class Advice:
    """All ways, and what they were judged by."""

    global_batch_size: int
    device: str
    budget_bytes: int | None
    ways: tuple[Way, ...]
    noise: NoiseKnown | None

    def as_dict(self) -> dict[str, Any]:
        """Return what `advice.json` holds."""
        best = self.recommended()
        return {
            "global_batch_size": self.global_batch_size,
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "noise": None if self.noise is None else asdict(self.noise),
            "ways": [asdict(way) | {"objective_s": way.objective_s(self.noise)} for way in self.ways],
            "recommended": None if best is None else list(best.overrides),
            "why": self.why(),
        }

    def recommended(self) -> Way | None:
        """Return the simplest way within 5 % of the least objective, of those whose loss is known.

        It is known by arithmetic (same batch, same precision), by the model, or by runs.

        Without a noise scale smaller batches cannot be weighed against the one that was asked for.
        """
        known = [way for way in self.ways if way.usable and (way.exact or self._is_shown(way))]
        if self.noise is None:
            known = [way for way in known if way.global_batch_size == self.global_batch_size]
        least = min(map(self._cost, known), default=math.inf)
        as_good = [way for way in known if self._cost(way) <= (1 + TIE) * least]
        return min(as_good, key=lambda way: (*way.effort, self._cost(way)), default=None)

    def _is_shown(self, way: Way) -> bool:
        """Whether a smaller batch may be taken for as good by the model, or runs show that it is."""
        if way.global_batch_size != self.global_batch_size and way.verdict is None:
            return "bf16" not in way.changes
        own = [w.loss for w in self.ways if w.exact and w.loss is not None]
        return way.loss is not None and bool(own) and way.loss <= min(own)

    def _cost(self, way: Way) -> float:
        return way.objective_s(self.noise) or way.sample_s or math.inf

    def why(self) -> str:
        """Say which way is recommended and why, or what is missing to recommend one."""
        best, asked = self.recommended(), self.global_batch_size
        if best is None:
            fitting = any(way.fits and way.failure is None for way in self.ways)
            missing = "no way could be tried" if fitting else "no way fits the memory that there is"
            return f"Nothing is recommended: {missing}."
        said = [f"Recommended: {named(best)} ({' '.join(best.overrides) or 'as it is'})"]
        if self.noise is not None:
            said.append(
                "the least seconds per sample × (1 + B / noise scale) of the ways that fit, by the "
                "model samples ∝ 1 + B / noise scale"
            )
        else:
            said.append(f"the least seconds per sample of the ways to a batch of {asked} that fit")
        lines = [f"{said[0]}: {said[1]}."]
        if self.noise is None:
            lines.append(
                "Whether a smaller batch would do is not known: no run like this one has told its noise "
                "scale (noise.every_steps=8)."
            )
        limit = (1 - TIE) * self._cost(best)
        faster = [way for way in self.ways if way.usable and self._cost(way) < limit]
        unshown = [way for way in faster if not way.exact and not self._is_shown(way)]
        if unshown:
            way = min(unshown, key=self._cost)
            ratio = self._cost(way) / self._cost(best)
            lines.append(f"With {named(way)} it would be {ratio:.2f} × of that, but {INEXACT}.")
        return " ".join(lines)


def named(way: Way) -> str:
    """`one pass`, `N = 4, checkpointing`, `half the batch`."""
    first = [f"N = {way.accum_steps}"] * (way.accum_steps > 1)
    return ", ".join([*first, *way.changes]) or "one pass"


def print_advice(advice: Advice) -> None:
    """Print the table of all ways, and what is recommended."""
    out = console()
    out.print(render(advice))
    out.print(advice.why(), highlight=False)


def render(advice: Advice) -> Table:
    """Return a row per way: predicted, measured, from runs and modelled are marked apart."""
    ways = advice.ways
    known = [way.sample_s for way in ways if way.sample_s is not None]
    scale, unit = time_unit(max(known, default=1.0))
    objectives = [way.objective_s(advice.noise) for way in ways]
    worst = max((o for o in objectives if o is not None), default=1.0)
    modelled, modelled_unit = time_unit(worst)
    best = advice.recommended()
    rows: list[tuple[str, ...]] = [
        (
            f"{'*' if way is best else ''}{named(way)}",
            str(way.global_batch_size),
            f"{way.accum_steps} × {way.micro_batch_size}",
            MISSING if way.peak_bytes is None else f"{size(way.peak_bytes)}{'' if way.fits else ' !'}",
            MISSING if way.sample_s is None else say_scaled(way.sample_s, scale),
            way.verdict or MISSING,
            MISSING if way.loss is None else f"{say_loss(way.loss)} ({way.runs})",
            MISSING if objective is None else say_scaled(objective, modelled),
        )
        for way, objective in zip(ways, objectives, strict=True)
    ]
    head = (
        "way", "\nbatch", "N ×\nmicro", "peak,\npredicted", f"{unit}/sample,\nmeasured",
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
        yield "loss: the lowest of the finished runs like it, after as many samples (how many runs)"
    for reason, labels in _failures(advice.ways).items():
        yield f"- {say_list(labels)}: {reason}"


def _failures(ways: Sequence[Way]) -> Mapping[str, list[str]]:
    found: dict[str, list[str]] = {}
    for way in ways:
        if way.failure is not None:
            found.setdefault(way.failure, []).append(named(way))
    return found
