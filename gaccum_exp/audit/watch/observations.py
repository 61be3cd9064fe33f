"""What is seen of one window of a loop, beside its tape."""

from dataclasses import dataclass, field

from gaccum_exp.audit.watch.tape import Tape
from gaccum_exp.core.gradient import Gradient


@dataclass(slots=True)
class Clip:
    """A call of `clip_grad_norm_` or `clip_grad_value_`."""

    after_backward: int
    """Backward passes of the window before it."""
    before: Gradient
    """The gradients that it was given."""
    after: Gradient = field(default_factory=dict)


@dataclass(slots=True)
class Sight:
    """What was seen of one window beside its tape."""

    tape: Tape = field(default_factory=Tape)
    at_start: Gradient = field(default_factory=dict)
    """Gradients that were there before its first pass."""
    accumulated: dict[int, Gradient] = field(default_factory=dict)
    """Gradients right after the last backward pass (one entry, by its number)."""
    between: list[tuple[int, str]] = field(default_factory=list)
    """(backward passes before, `zeroed` | `changed`) at the beginning of a later pass."""
    clips: list[Clip] = field(default_factory=list)
    scheduler_steps: list[int] = field(default_factory=list)
    """Backward passes of the window before each."""
    unscaled: list[int] = field(default_factory=list)
    retained: list[bool] = field(default_factory=list)
    """Whether each backward pass was told to keep its graph."""
    loss_scale: float = 1.0
    """The GradScaler's."""
