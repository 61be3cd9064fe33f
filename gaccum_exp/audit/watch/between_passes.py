"""The functions that a loop calls between its passes: clipping, clearing, scaling, a schedule's step."""

import inspect
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gaccum_exp.audit.watch.clipping import clipped_by_hand
from gaccum_exp.audit.watch.places import place_of
from gaccum_exp.audit.watch.tape import Clipping
from gaccum_exp.audit.watch.user_functions import OnCall
from gaccum_exp.audit.watch.weight_averages import address_of
from gaccum_exp.core.gradient import Gradient, identical

if TYPE_CHECKING:
    from gaccum_exp.audit.watch.tracer import LoopTracer

CLIPPING = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_")
"""In torch.nn.utils; frameworks clip by these."""
LOOKING = frozenset(
    (
        *("norm", "vector_norm", "linalg_vector_norm", "_foreach_norm", "_foreach_pow", "square", "pow"),
        *("__pow__", "sum", "dot", "vdot", "abs", "flatten", "reshape", "view", "cat", "stack"),
    )
)
"""Operations by which a loop that clips by hand looks at its gradients."""


class BetweenPasses:
    """Record of the calls of these functions in the window that a tracer follows."""

    def __init__(self, tracer: "LoopTracer") -> None:
        self._tracer = tracer
        self._clipping: FrameType | None = None
        self._schedule: FrameType | None = None
        """The outermost call that is running: what it calls in turn is a part of it."""
        self._own_steps: list[tuple[FrameType, tuple[Any, ...]]] = []
        self._steps_before_scaler = 0
        self._storages: tuple[int, set[int]] = (-1, set())
        """Of the gradients after so many backward passes."""

    def functions(self) -> dict[CodeType, OnCall]:
        """Return what to do at each function's call and return."""
        found: dict[CodeType, OnCall] = {
            GradScaler.scale.__code__: self._on_scale,
            GradScaler.unscale_.__code__: self._on_scale,
            GradScaler.step.__code__: self._on_scaler_step,
            inspect.unwrap(Optimizer.zero_grad).__code__: self._on_zeroing,
            nn.Module.zero_grad.__code__: self._on_zeroing,
        }
        for clip in (getattr(nn.utils, name) for name in CLIPPING):
            found[inspect.unwrap(clip).__code__] = self._on_clipping
        return {code: self._unless_judging(report) for code, report in found.items()}

    @property
    def named(self) -> dict[str, OnCall]:
        """The same for functions that are known by their names."""
        return {"step": self._unless_judging(self._on_step)}

    def _unless_judging(self, report: OnCall) -> OnCall:
        def reported(event: str, frame: FrameType, value: Any) -> None:
            if not self._tracer.judging:
                report(event, frame, value)

        return reported

    def look(self, name: str, tensors: list[Tensor]) -> None:
        """Note whether an operation looks at gradients after a backward pass."""
        seen = self._tracer.seen
        if name not in LOOKING or not seen.tape.backwards:
            return
        if self._storages[0] != seen.tape.backwards:
            self._storages = (
                seen.tape.backwards,
                {address_of(g) for g in self._tracer.gradients().values()},
            )
        if any(address_of(tensor) in self._storages[1] for tensor in tensors):
            seen.looked_at = seen.tape.backwards

    def note_clipping_by_hand(self, reached: Gradient) -> None:
        """Take what was done after the last backward pass for clipping, if it is that."""
        seen = self._tracer.seen
        backwards = seen.tape.backwards
        if seen.clippings and seen.clippings[-1].after_backward == backwards:
            return
        before = {k: g for k, g in seen.accumulated.get(backwards, {}).items() if k in reached}
        if backwards in seen.unscaled:
            before = {k: g * (1 / seen.loss_scale) for k, g in before.items()}
        norm = clipped_by_hand(before, reached, looked_at=seen.looked_at == backwards)
        if norm is not None:
            seen.clippings.append(Clipping(backwards, before, after=reached))
            seen.clipped_by_hand = norm

    def _on_clipping(self, event: str, frame: FrameType, value: Any) -> None:
        seen = self._tracer.seen
        if event == "return" and frame is self._clipping:
            self._clipping = None
            if seen.clippings:
                seen.clippings[-1].after = self._now()
        if event == "return" or self._clipping is not None:
            return
        self._clipping, now, last = frame, self._now(), seen.clippings[-1:]
        # Group by group, or parameter by parameter, it is one clipping.
        goes_on = bool(last) and last[0].after_backward == seen.tape.backwards
        if not (goes_on and identical(last[0].after, now)):
            at_loss_scale = seen.loss_scale != 1 and seen.tape.backwards not in seen.unscaled
            seen.clippings.append(Clipping(seen.tape.backwards, now, at_loss_scale))
            seen.places.note("clip" if seen.tape.backwards else "clip before")
        given = frame.f_locals.get("max_norm", frame.f_locals.get("clip_value", 0.0))
        seen.clippings[-1].bound = max(seen.clippings[-1].bound, float(given))

    def _now(self) -> Gradient:
        return {name: g.clone() for name, g in self._tracer.gradients().items()}

    def _on_step(self, event: str, frame: FrameType, value: Any) -> None:
        """Count steps of a schedule: torch's, or an object whose `step()` sets learning rates."""
        code, seen = frame.f_code, self._tracer.seen
        if not code.co_argcount:
            return
        owner, *given = (frame.f_locals.get(name) for name in code.co_varnames[: code.co_argcount])
        if isinstance(owner, LRScheduler):
            if event == "call" and self._schedule is None:
                self._schedule = frame
                self._note_schedule(owner, frame)
            elif event == "return" and frame is self._schedule:
                self._schedule = None
        elif self._schedule is None and not isinstance(owner, (Optimizer, GradScaler)):
            now = (self._tracer.learning_rates(), seen.tape.backwards, len(seen.scheduler_steps))
            if event == "call" and all(value is None for value in given):
                self._own_steps.append((frame, (*now, self._tracer.steps_taken)))
            elif event == "return" and self._own_steps and self._own_steps[-1][0] is frame:
                rates, *others = self._own_steps.pop()[1]
                moved = now[0] != rates and [*now[1:], self._tracer.steps_taken] == others
                if moved:
                    self._note_schedule(owner, frame)

    def _note_schedule(self, owner: Any, step: FrameType) -> None:
        seen = self._tracer.seen
        seen.scheduler_steps.append((id(owner), seen.tape.backwards))
        if seen.tape.backwards > 0:
            seen.places.note("schedule", place_of(step.f_back))

    def _on_zeroing(self, event: str, frame: FrameType, value: Any) -> None:
        """Note from where gradients are cleared after the window's first pass."""
        if event == "call" and self._tracer.seen.tape.backwards:
            self._tracer.seen.places.note("zero_grad")

    def _on_scaler_step(self, event: str, frame: FrameType, value: Any) -> None:
        """Give a step up where a gradient overflowed: the scaler skips it."""
        tracer = self._tracer
        optimizer = frame.f_locals["optimizer"]
        if event == "call":
            self._steps_before_scaler = tracer.steps_taken
        elif tracer.steps_taken == self._steps_before_scaler:
            tracer.give_up(optimizer)

    def _on_scale(self, event: str, frame: FrameType, value: Any) -> None:
        """Note the scale by which losses are multiplied, and gradients divided."""
        seen, scaler = self._tracer.seen, frame.f_locals["self"]
        unscaled = frame.f_locals.get("optimizer")
        # A scaler is handed lists of outputs too, which call it again.
        if unscaled is None and event == "return" and torch.is_grad_enabled():
            seen.loss_scale = float(scaler.get_scale())
        elif unscaled is not None and event == "call" and self._tracer.judges(unscaled):
            seen.unscaled.append(seen.tape.backwards)
            seen.places.note("unscale_")
        else:
            return
        scale = id(scaler), float(scaler.get_scale())
        if scale not in seen.loss_scales:
            seen.loss_scales.append(scale)
