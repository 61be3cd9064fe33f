"""Which windows of a training have their memory measured, and with what; and what is recorded of it."""

from dataclasses import dataclass, field

from gaccum_exp.memory.meter import (
    AllocatedWindow,
    Meter,
    Peak,
    TrackedWindow,
    has_counters,
    resident_set_bytes,
)
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.state import Experiment

MEASURED_WINDOW = 2
"""Windows before the one whose memory is measured: the optimizer's state is made in the first."""


@dataclass(slots=True)
class RunMeters:
    """The meters of one training run, by the global step whose window they are for.

    The device's own counters come first where it has them. Windows are full ones in the steady state,
    where there are such, of the stage with the largest micro-batches. A control is there for its loss
    curve alone.
    """

    experiment: Experiment
    due: dict[int, type[Meter]] = field(init=False)
    _peaks: list[Peak] = field(default_factory=list, init=False)
    _resident: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        kinds: list[type[Meter]] = [TrackedWindow]
        if has_counters(self.experiment.device):
            kinds.insert(0, AllocatedWindow)
        if self.experiment.settings.audit.control_seed is not None:
            kinds = []
        full = self.experiment.is_full
        early = self._windows()[: 2 * (MEASURED_WINDOW + len(kinds))]
        best = sorted(early, key=lambda k: (not full(k), max(0, MEASURED_WINDOW - k), k))
        self.due = dict(zip(sorted(best[: len(kinds)]), kinds, strict=False))

    def postpone(self, global_step: int) -> None:
        """Measure a later window in place of this one, if it was to be measured and there is one."""
        if global_step not in self.due:
            return
        windows = (k for k in self._windows() if k > global_step and k not in self.due)
        later = next((k for k in windows if self.experiment.is_full(k)), None)
        if later is not None:
            self.due[later] = self.due.pop(global_step)

    def take(self, peak: Peak) -> None:
        """Keep what was measured; on a CPU, beside it, what the process holds in all."""
        self._peaks.append(peak)
        if self.experiment.device.type == "cpu":
            self._resident = resident_set_bytes()

    def record(self, sink: Sink) -> None:
        """The device's own peak is the one to compare; the tracker's split is recorded beside it."""
        if not self._peaks:
            return
        tracked = next((peak for peak in self._peaks if peak.parts), None)
        compared = next((peak for peak in self._peaks if not peak.parts), self._peaks[0])
        values: dict[str, float] = {metrics.PEAK_BYTES: compared.bytes}
        if tracked is not None:
            values[metrics.TRACKED_PEAK_BYTES] = tracked.bytes
            values |= {f"memory/{part}_bytes": size for part, size in tracked.parts.items()}
        values |= {f"memory/{name}_bytes": size for name, size in compared.counters.items()}
        if self._resident is not None:
            values[metrics.RESIDENT_SET_BYTES] = self._resident
        sink.record(self.experiment.total_steps, values)
        source = "tracker" if compared.parts else "allocator"
        sink.describe({"memory.peak_phase": compared.phase, "memory.source": source})

    def _windows(self) -> range:
        """Return those of the stage with the largest micro-batches, of such stages the one with most.

        From the second micro-batch on the gradients are there beside the activations.
        """

        def size(windows: range) -> tuple[int, int]:
            stage = self.experiment.settings.stages[self.experiment.plan.stage_of(windows[0])]
            return -(-stage.global_batch_size // stage.accum_steps), stage.accum_steps

        return max(self.experiment.stage_windows, key=size)
