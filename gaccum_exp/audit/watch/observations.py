"""What is observed of one window of a loop: its tape, and what happens to its gradients."""

from dataclasses import dataclass, field

from gaccum_exp.audit.watch.tape import Tape
from gaccum_exp.core.gradient import Gradient


@dataclass(slots=True)
class Clipping:
    """A call of `clip_grad_norm_` or `clip_grad_value_`."""

    after_backward: int
    """Backward passes of the window before it."""
    before: Gradient
    """The gradients that it was given."""
    after: Gradient = field(default_factory=dict)


@dataclass(slots=True)
class Observations:
    """What was observed of one window."""

    tape: Tape = field(default_factory=Tape)
    at_start: Gradient = field(default_factory=dict)
    """Gradients that were there before its first pass."""
    accumulated: dict[int, Gradient] = field(default_factory=dict)
    """Gradients right after the last backward pass: one entry, by the number of backward passes."""
    between: list[tuple[int, str]] = field(default_factory=list)
    """(backward passes so far, `zeroed` | `changed`), as found at the beginning of a later pass."""
    clippings: list[Clipping] = field(default_factory=list)
    scheduler_steps: list[int] = field(default_factory=list)
    """Backward passes of the window before each step of the learning-rate schedule."""
    unscaled: list[int] = field(default_factory=list)
    """The same before each `unscale_` of a GradScaler."""
    retained: list[bool] = field(default_factory=list)
    """Whether each backward pass was told to keep its graph."""
    loss_scale: float = 1.0
    """The GradScaler's."""
