"""Trace a loop's windows: their passes by what is called, their gradients by hooks, up to the step.

Nothing here changes a number of the loop's: hooks return nothing, operations are passed on as they are.
"""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.optim import Optimizer
from torch.utils.data import default_collate
from torch.utils.data.dataloader import _BaseDataLoaderIter

from gaccum_exp.audit.rerun.sandbox import NamedModules, nothing
from gaccum_exp.audit.watch.between_passes import BetweenPasses
from gaccum_exp.audit.watch.calls import TracedCalls, operations_unseen
from gaccum_exp.audit.watch.compiled import uncompiled
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.audit.watch.tape import Observations, ParameterRef, Tape
from gaccum_exp.audit.watch.user_functions import OnCall, calls_reported, calls_unreported
from gaccum_exp.audit.watch.weight_averages import WeightAverages
from gaccum_exp.core.gradient import Gradient, dense
from gaccum_exp.core.seeding import random_states

OPTIMIZER_STEP = Optimizer.profile_hook_step(nothing).__code__
"""The code around the `step` of every optimizer, which calls its hooks."""
LOADING = (
    _BaseDataLoaderIter.__next__.__code__,
    *(
        f.__code__
        for f in (rnn.pack_sequence, rnn.pack_padded_sequence, rnn.pad_sequence, default_collate)
    ),
)
"""The code by which every data loader gets its next batch, and samples are put into one."""


class LoopTracer:
    """Traces a loop, and hands each window over when its gradient reaches the optimizer.

    Args:
        model, criterion: as in `watch`, without wrappers.
        optimizers: whose learning rates a schedule sets.
        modules: of model and criterion, with the parameters whose gradients are judged. An optimizer
            that holds some of these takes a step of the loop's.
        reached: gets what was observed of a window, and the gradient that reached its optimizers.
        moving: sees what the loop's calls meet besides, and whether it moves.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        optimizers: Sequence[Optimizer],
        modules: NamedModules,
        reached: Callable[[Observations, Gradient], None],
        moving: MovingState,
    ) -> None:
        self.moving = moving
        self.optimizers = optimizers
        named = modules.parameters()
        self._parameters = {name: p for name, p in named.items() if name in modules.compared}
        self._reached = reached
        judged = {id(p) for p in self._parameters.values()}
        self._refs = {
            id(parameter): ParameterRef(module, name)
            for module in modules
            for name, parameter in module._parameters.items()
            if id(parameter) in judged
        }
        self.seen = self._nothing_seen()
        """Of the window in progress."""
        self.past = Tape()
        """Of the window before: its losses may be read after its step."""
        self.judging = False
        self.stepping: Optimizer | None = None
        """The outermost optimizer whose step is running; what steps inside it is a part of it."""
        self._taken: Gradient = {}
        """What has reached optimizers since the window's passes."""
        self._given: Gradient = {}
        """What reached the optimizers of the last step."""
        self._kept: set[str] = set()
        """The parameters whose gradients of a step were there unchanged when the next window began."""
        self._stepped_before: set[str] | None = None
        """The parameters of the window before."""
        self._backward: FrameType | None = None
        """The outermost call that is running: checkpoints and own functions have more inside."""
        self.counting = False
        """Whether the backward pass that is running reaches the parameters."""
        self.steps_taken = 0
        self.loader: Any = None
        """The iterator over a data loader that was asked last."""
        self._norms: tuple[int, list[float]] = (-1, [])
        """Of the weights, after so many backward passes."""
        self.between = BetweenPasses(self)
        self.averages = WeightAverages(self._parameters.values())
        self._calls = TracedCalls(self, model, criterion, modules)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Trace for the length of the block; its owner tells of optimizers' steps."""
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(self._calls.operations_shown())
            named = self.between.named | self._calls.named
            stack.enter_context(calls_reported(self._functions(), named))
            try:
                yield
                self._close()  # not after an error: it may be an interrupt
            finally:
                self._forget()

    @property
    def parameters(self) -> list[Tensor]:
        """Those whose gradients are judged."""
        return list(self._parameters.values())

    def meet(self, frame: FrameType) -> None:
        """Take the call of a module that had begun before the block."""
        self._calls.on_module("call", frame, None)

    @property
    def idle(self) -> bool:
        """Whether operations are passed on unseen: inside model, loss or step, or while judging."""
        return self.judging or self.stepping is not None or self._calls.inside

    def _hooks(self) -> Iterator[Any]:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                register: Any = parameter.register_post_accumulate_grad_hook
                yield register(uncompiled(functools.partial(self._on_accumulation, name)))

    def _functions(self) -> dict[CodeType, OnCall]:
        return {
            **self.between.functions(),
            **self._calls.functions(),
            torch.autograd.backward.__code__: self._on_backward,
            torch.autograd.grad.__code__: self._on_backward,
            OPTIMIZER_STEP: self._on_optimizer_step,
            **dict.fromkeys(LOADING, self._on_loading),
        }

    def _on_loading(self, event: str, frame: FrameType, value: Any) -> None:
        """Tell while a batch is made, as a data loader does that runs in the loop's own process."""
        if not self.judging:
            self.moving.loading += 1 if event == "call" else -1
            if frame.f_code is LOADING[0]:
                self.loader = frame.f_locals["self"]

    # Gradients, and the optimizer's step.

    def _on_accumulation(self, name: str, parameter: Tensor) -> None:
        if not self.judging and self.stepping is None and parameter.grad is not None:
            kept = self.seen.accumulated.setdefault(self.seen.tape.backwards, {})
            kept[name] = dense(parameter.grad.detach()).clone()
            self.seen.tape.reached.setdefault(self.seen.tape.backwards, set()).add(name)

    def _on_backward(self, event: str, frame: FrameType, value: Any) -> None:
        """Count backward passes, and keep the gradients after the last one."""
        seen = self.seen
        if self.judging or self.stepping is not None:
            return
        if self._backward not in (None, frame):
            return
        self._backward = frame if event == "call" else None
        if event == "call":
            # The gradient of an attack on the inputs, or of a penalty, reaches no parameter.
            inputs = frame.f_locals.get("inputs")
            asked = [inputs] if isinstance(inputs, Tensor) else list(inputs or ())
            given = {id(t) for t in asked}
            names = {name for name, p in self._parameters.items() if id(p) in given}
            if frame.f_locals.get("create_graph") and frame.f_code is torch.autograd.grad.__code__:
                names = set()  # it goes into a loss
            self.counting = inputs is None or bool(names)
            if self.counting and not self.idle:
                self._calls.note_surrogates(frame.f_locals)
            if names:
                seen.tape.reached.setdefault(seen.tape.backwards, set()).update(names)
            if self.counting:
                seen.retained.append(bool(frame.f_locals.get("retain_graph")))
                seen.places.note("backward")
            return
        if self.counting:
            last = seen.accumulated.get(seen.tape.backwards)
            seen.tape.backwards += 1
            seen.accumulated = {} if last is None else {seen.tape.backwards: last}
            seen.states[0] = random_states()
            if seen.stepped:  # an optimizer that steps inside the backward pass
                self._close_if_complete()
        self.counting = False

    def look_at_gradients(self) -> None:
        """Compare the gradients, before a pass, with those that the pass before left."""
        self._close()
        seen, now, backwards = self.seen, self.gradients(), self.seen.tape.backwards
        moved = self._weights_moved()
        if not seen.tape.calls:
            seen.at_start = {k: g.clone() for k, g in now.items() if bool(g.any())}
            given, self._given = self._given, {}
            if seen.at_start.keys() & given and all(
                k in now and torch.equal(now[k], g) for k, g in given.items()
            ):
                self._kept |= given.keys()
            return
        last = seen.accumulated.get(backwards)
        if last is None or not any(bool(g.any()) for g in last.values()):
            return
        if not any(bool(g.any()) for g in now.values()):
            if moved:  # as SAM does: what follows is another gradient, at other weights
                self._begin_window()
                self.seen.weights = self._weights_of(self._parameters)
                self.seen.zeroed_at_other_weights = [*seen.zeroed_at_other_weights, seen.tape]
                return
            seen.zeroed.add(backwards)
            self.moving.may_begin(backwards)
        elif any(k not in now or not torch.equal(now[k], g) for k, g in last.items()):
            seen.changed.add(backwards)

    def _weights_moved(self) -> bool:
        """Whether the weights have changed since the backward pass before."""
        backwards = self.seen.tape.backwards
        then, before = self._norms
        if then == backwards:
            return False
        now = [float(torch.linalg.vector_norm(p.detach())) for p in self._parameters.values()]
        self._norms = backwards, now
        moved = 0 <= then < backwards and now != before
        if moved:
            self.seen.moved.add(backwards)
        return moved

    def _weights_of(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._parameters[name].detach().clone() for name in names}

    def learning_rates(self) -> list[float]:
        """Return the learning rates of all optimizers' groups."""
        return [float(group.get("lr", 0)) for o in self.optimizers for group in o.param_groups]

    def judges(self, optimizer: Any) -> set[str]:
        """Return the judged parameters of an optimizer."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name for name, p in self._parameters.items() if id(p) in held}

    def gradients(self) -> Gradient:
        """Return the gradients that are there, dense, by parameter name."""
        return {
            name: dense(p.grad.detach()) for name, p in self._parameters.items() if p.grad is not None
        }

    def before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        """Take an optimizer's step that begins; return its arguments where these are others now."""
        if self.judging or self.stepping is not None:
            return None
        if not self.judges(optimizer):
            self.seen.other_steps.append(self.seen.tape.backwards)
            self.moving.may_begin(self.seen.tape.backwards)
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: the optimizer
        if closure is None:
            self._hand_over(optimizer)
            return None

        evaluations = itertools.count()

        def traced(*a: Any, **k: Any) -> Any:
            if self.stepping not in (None, optimizer):  # a part of the outermost optimizer's step
                return closure(*a, **k)
            before, self.stepping = self.stepping, None
            try:
                value = closure(*a, **k)
            except BaseException:
                self.stepping = before
                raise
            if self.stepping is None:
                self.seen.evaluation = next(evaluations)
                self._hand_over(optimizer)
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": traced}
        return (args[0], traced, *args[2:]), kwargs

    def _hand_over(self, optimizer: Optimizer) -> None:
        self.steps_taken += 1
        names = self.judges(optimizer)
        if names & self.seen.stepped:
            self._close()
        self.seen.places.note("step")
        self.stepping = optimizer
        # A fused optimizer unscales by itself, in its step.
        scale = getattr(optimizer, "grad_scale", None)
        by = float(scale) if isinstance(scale, Tensor) else 1.0
        now = {k: g / by if by != 1 else g.clone() for k, g in self.gradients().items() if k in names}
        if self.seen.tape.calls:
            self._weights_moved()
        self._taken |= now
        if not self.seen.stepped:
            self.seen.states[1] = random_states()
        self.seen.stepped |= names
        self.seen.stepped_in_backward |= self.counting
        if self.counting:  # it takes the gradient away before the accumulation is seen
            tape = self.seen.tape
            tape.reached.setdefault(tape.backwards, set()).update(names)
        if not self._close_if_complete():
            self.seen.weights = self._weights_of(names) | self.seen.weights

    def _close_if_complete(self) -> bool:
        """Judge the window once all have stepped; inside a backward pass, when that has ended."""
        complete = self.seen.stepped == self._parameters.keys() and not self.counting
        if complete:
            self._close()
        return complete

    def _close(self) -> None:
        """Judge the window whose step was taken, if there is one."""
        seen, taken = self.seen, self._taken
        if not seen.stepped or self.judging:
            return
        if seen.stepped != self._parameters.keys():
            _leave_out_others(seen)
        left = seen.at_start.keys() & seen.stepped
        before = seen.stepped if self._stepped_before is None else self._stepped_before
        # A step takes what was taken before: of nothing that one may add up on purpose.
        seen.carried = left - before - self._kept
        self._kept -= seen.stepped
        self._given = {name: taken[name] for name in seen.stepped & taken.keys()}
        self.between.note_clipping_by_hand(taken)
        self.judging, others = True, operations_unseen()
        try:
            with calls_unreported():  # to other tracers neither
                self._reached(seen, taken)
        finally:
            others.restore()
            self.judging = False
            self._stepped_before = seen.stepped
            self._begin_window()

    def after_step(self, optimizer: Any) -> None:
        """Take the end of an optimizer's step."""
        if self.stepping is optimizer:
            self.stepping = None

    def _on_optimizer_step(self, event: str, frame: FrameType, value: Any) -> None:
        """Let a window go whose step has raised, for then no hook is called after it."""
        if event == "return" and self.stepping is not None:
            args = frame.f_locals.get("args")
            if args and args[0] is self.stepping:
                self.stepping = None
                self._begin_window()

    def give_up(self, optimizer: Any) -> None:
        """Let the gradients go whose step a scaler has skipped."""
        names = self.judges(optimizer)
        if names:
            self.seen.stepped |= names
            if not self._taken and self.seen.stepped == self._parameters.keys():
                self._begin_window()

    def _begin_window(self) -> None:
        self.moving.begin()
        self.past, self.seen, self._taken = self.seen.tape, self._nothing_seen(), {}
        self.seen.tape.go_on_from(self.past)
        self._norms = -1, []
        self.averages.begin()
        self._calls.begin()

    def _forget(self) -> None:
        """Let go of the loop's tensors; how many passes were left over is still to be read."""
        left_over = self.seen.tape.backwards
        self._begin_window()
        self.moving.forget()
        self.loader = None
        self.past, self.seen.tape.backwards = Tape(), left_over

    def _nothing_seen(self) -> Observations:
        return Observations(Tape(parameters=self._refs, moving=self.moving))


def _leave_out_others(seen: Observations) -> None:
    """Leave out what belongs to optimizers that did not step: their passes and their gradients."""

    def own(gradient: Gradient) -> Gradient:
        return {name: g for name, g in gradient.items() if name in seen.stepped}

    for call in seen.tape.calls:
        if call.backward is not None and not seen.tape.reached.get(call.backward, set()) & seen.stepped:
            call.cotangent = None
    seen.at_start = own(seen.at_start)
    for clipping in seen.clippings:
        clipping.before, clipping.after = own(clipping.before), own(clipping.after)
