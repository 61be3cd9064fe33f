"""One arm of a sweep as measured against its reference."""

from dataclasses import dataclass, replace
from typing import Self

from gaccum_exp.report.compare.swept_keys import Swept


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One arm; None stands for what was not measured or cannot be compared."""

    run_id: str
    role: str
    """`reference`, `stand-in`, `stored reference` (the run that the group is compared with) or
    `candidate`; an N = 1 arm that failed is no reference."""
    steps: int | None
    """N, micro-batches per window."""
    micro_batch_size: int | None
    """Samples in the largest micro-batch of a full window."""
    global_batch_size: int | None
    reduction: str | None
    train_loss: float | None
    """The last one recorded, as are the evaluation's."""
    eval_loss: float | None
    eval_accuracy: float | None
    max_loss_gap: float | None
    """Largest |train loss − reference's| over the steps that both have."""
    weight_distance: float | None
    """‖w − w_ref‖₂ / ‖w_ref‖₂ at the end of training; None unless both finished."""
    peak_bytes: int | None
    peak_ratio: float | None
    step_s: float | None
    """Median seconds of an optimizer step."""
    step_ratio: float | None
    name: str
    status: str
    failure: str | None
    setting: Swept
    """What else was swept, with this arm's values."""
    reference_run_id: str | None
    reference_source: str
    """`own`, `other reduction`, `stored`, `stand-in` or `none`."""
    common_steps: int
    """Optimizer steps that `max_loss_gap` was taken over."""
    micro_batch_sizes: tuple[int, ...]
    """The micro-batches of a full window, largest first."""
    peak_phase: str | None
    memory_source: str | None
    device: str | None
    threads: str | None
    verdict: str | None
    """The worst audit's: `identical`, `equivalent`, `stochastic`, `biased` or `inconclusive`; None
    where the arm was not audited."""
    cause: str | None
    culprit: str | None
    """A module's dotted name."""
    e64: float | None
    """‖g_N − g_1‖ / ‖g_1‖ in float64, as last audited; `e` in the run's own precision."""
    e: float | None
    floor: float | None
    """What summation order alone makes of `e`."""
    control: str | None
    """Whether the loss curve is `inside` or `outside` the envelope of controls; None: not judged."""
    left_at: int | None
    """The first optimizer step at which it is outside."""
    envelope: float | None
    """The largest gap that the controls' envelope reaches."""
    controls: int
    """How many controls the envelope is of."""
    eval_perplexity: float | None
    """exp(eval loss), where the loss counts tokens."""
    tokens_per_s: float | None
    """Median over windows, where the loss counts tokens."""
    skipped_windows: float | None
    """Windows whose float16 gradient was not finite, so that no step was taken; None: none."""
    predicted_peak_bytes: int | None
    """What was predicted before the run, for the N that it ended with."""

    @property
    def differs(self) -> str:
        """Other swept keys with this arm's values: `norm=batch, seed=1`; empty if there are none."""
        return self.setting.text

    @property
    def finished(self) -> bool:
        """Whether the arm trained to its end."""
        return self.status == "FINISHED"

    @property
    def is_reference(self) -> bool:
        """Whether the other arms of its group are compared with this one."""
        return self.role != "candidate"

    def at_distance(self, distance: float | None) -> Self:
        """Return the same row with its weight distance."""
        return replace(self, weight_distance=distance)
