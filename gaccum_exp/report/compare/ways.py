"""Judge the ways to a global batch: which takes the least time to a loss, of those that may be taken."""

from dataclasses import asdict, dataclass
from typing import Any

from gaccum_exp.core.step_times import StepTime, times_differ

SOUND = ("identical", "equivalent", "stochastic")
TIE = 0.05
"""Ways within this of the least objective are as good, as are those that do not differ measurably from
it; the simplest of them is recommended."""


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
    sample: StepTime | None = None
    """Measured: seconds per sample of full windows; None: it was not tried."""
    verdict: str | None = None
    """Of the audit of one window; None: one pass, or not tried."""
    loss: float | None = None
    """The held-out loss of runs like it, after as many samples: the mean over those of the best rate."""
    runs: int = 0
    """How many these are."""
    failure: str | None = None
    """Why it cannot be taken."""
    held: int | None = None
    """Samples of a full window, where the data have fewer than the batch."""

    @property
    def effort(self) -> tuple[int, int]:
        """How much it asks for: changes, and micro-batches."""
        return len(self.changes), self.accum_steps

    @property
    def usable(self) -> bool:
        """Whether it may be recommended at all."""
        sound = self.verdict is None or self.verdict in SOUND
        return self.failure is None and self.fits and self.sample is not None and sound

    def cost(self, noise: NoiseKnown | None) -> StepTime | None:
        """Return seconds per sample × (1 + B/B_noise), a model of the time to a given loss.

        Without a noise scale they are seconds per sample alone. None: it was not tried.
        """
        if self.sample is None or noise is None:
            return self.sample
        factor = 1 + (self.held or self.global_batch_size) / noise.scale
        median_s, low_s, high_s, windows = self.sample
        return StepTime(factor * median_s, factor * low_s, factor * high_s, windows)

    def as_dict(self, noise: NoiseKnown | None) -> dict[str, Any]:
        """Return it flat, with its objective where that is known."""
        own = asdict(self)
        del own["sample"]
        median_s, low_s, high_s, windows = self.sample or (None, None, None, 0)
        cost = self.cost(noise)
        own |= {"sample_s": median_s, "sample_low_s": low_s, "sample_high_s": high_s}
        objective_s = cost.median_s if cost and noise else None
        return own | {"timed_windows": windows, "objective_s": objective_s}


@dataclass(frozen=True, slots=True)
class Advice:
    """All ways, and what they were judged by."""

    global_batch_size: int
    device: str
    budget_bytes: int | None
    ways: tuple[Way, ...]
    noise: NoiseKnown | None

    def as_dict(self) -> dict[str, Any]:
        """Return what `advice.json` holds, but for the reason in words."""
        best = self.recommended()
        return {
            "global_batch_size": self.global_batch_size,
            "device": self.device,
            "budget_bytes": self.budget_bytes,
            "noise": None if self.noise is None else asdict(self.noise),
            "ways": [way.as_dict(self.noise) for way in self.ways],
            "recommended": None if best is None else list(best.overrides),
        }

    def recommended(self) -> Way | None:
        """Return the simplest of the ways as good as that of least objective, whose loss is known.

        It is known by arithmetic (same batch, same precision), by the model, or by runs. Without a noise
        scale smaller batches cannot be weighed against the one that was asked for.
        """
        known = [way for way in self.ways if way.usable and (way.exact or self._is_shown(way))]
        if self.noise is None:
            known = [way for way in known if way.global_batch_size == self.global_batch_size]
        if not known:
            return None
        least = min(known, key=self.cost_s)
        as_good = [way for way in known if self._is_as_good(way, least)]
        return min(as_good, key=lambda way: (*way.effort, self.cost_s(way)))

    def fastest_unknown(self) -> Way | None:
        """Return the best of the ways of unknown loss that are better than the recommended one."""
        best = self.recommended()
        ways = [way for way in self.ways if way.usable and not way.exact and not self._is_shown(way)]
        if best is not None:
            ways = [way for way in ways if not self._is_as_good(best, way)]
        return min(ways, key=self.cost_s, default=None)

    def cost_s(self, way: Way) -> float:
        """Return the seconds of a way that was tried, by which ways are ranked."""
        cost = way.cost(self.noise)
        assert cost is not None
        return cost.median_s

    def _is_shown(self, way: Way) -> bool:
        """Whether a smaller batch may be taken for as good by the model, or runs show that it is."""
        if way.global_batch_size != self.global_batch_size:
            return "bf16" not in way.changes
        own = [w.loss for w in self.ways if w.exact and w.loss is not None]
        return way.loss is not None and bool(own) and way.loss <= min(own)

    def _is_as_good(self, way: Way, other: Way) -> bool:
        within = self.cost_s(way) <= (1 + TIE) * self.cost_s(other)
        return within or times_differ(way.cost(self.noise), other.cost(self.noise)) is False
