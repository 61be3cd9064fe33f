"""Trace a loop: by hooks on optimizers and parameters, and by the functions and modules that it calls.

Nothing here changes a number of the loop's: hooks return nothing, operations are passed on as they are.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.overrides import TorchFunctionMode, _push_mode
from torch.utils.hooks import unserializable_hook

from gaccum_exp.audit.rerun.sandbox import NamedModules, nothing
from gaccum_exp.audit.watch.between_passes import BetweenPasses
from gaccum_exp.audit.watch.compiled import WRAPPER, ModesOff, compiled_function, uncompiled
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.audit.watch.scalars import call_site, linear
from gaccum_exp.audit.watch.tape import (
    Observations,
    ParameterRef,
    Tape,
    TapedCall,
    loss_in,
    losses_in,
    models_own_loss,
)
from gaccum_exp.audit.watch.user_functions import (
    OnCall,
    arguments_of,
    bound_to,
    calls_reported,
    calls_unreported,
    code_of,
)
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.joined_samples import tensors_in
from gaccum_exp.core.seeding import random_states

LOSSES = frozenset(
    function
    for name in dir(F)
    if name.endswith(("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div"))
    and callable(function := getattr(F, name))
)
READS = frozenset({"item", "tolist", "numpy", "__float__", "__format__", "detach", "cpu", "__int__"})
"""Operations by which a loop reads a value."""
PLAIN = (str, int, float, bool, type(None))
OPTIMIZER_STEP = Optimizer.profile_hook_step(nothing).__code__
"""The code around the `step` of every optimizer, which calls its hooks."""


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
        self._moving = moving
        self._model, self._criterion, self._optimizers = model, criterion, optimizers
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
        self._parts = {id(module) for module in model.modules()}
        self._own = {id(module) for module in modules}
        self._loss_function = criterion
        while isinstance(self._loss_function, functools.partial):
            self._loss_function = self._loss_function.func  # its own arguments are seen in each call
        self._device_type = next((p.device.type for p in named.values()), "cpu")
        self.seen = self._nothing_seen()
        """Of the window in progress."""
        self.past = Tape()
        """Of the window before: its losses may be read after its step."""
        self._order = itertools.count()
        self._inside: list[TapedCall] = []
        """The call of model or loss that is running, if any."""
        self._frames: list[tuple[FrameType, TapedCall]] = []
        self._frames_beside: list[tuple[FrameType, nn.Module, list[Any] | None]] = []
        """Of modules beside model and loss, with the random states before; None: inside a loss."""
        self._frames_compiled: list[tuple[FrameType, ModesOff]] = []
        self.judging = False
        self._stepping: Optimizer | None = None
        """The outermost optimizer whose step is running; what steps inside it is a part of it."""
        self._taken: Gradient = {}
        """What has reached optimizers since the window's passes."""
        self._stepped_before: set[str] | None = None
        """The parameters of the window before."""
        self._backward: FrameType | None = None
        """The outermost call that is running: checkpoints and own functions have more inside."""
        self._counting = False
        """Whether the backward pass that is running reaches the parameters."""
        self._loss_hooks: list[Any] = []
        """Handles of those on the window's losses, which a loop may keep for longer."""
        self.steps_taken = 0
        self._norms: tuple[int, list[float]] = (-1, [])
        """Of the weights, after so many backward passes."""
        self._between = BetweenPasses(self)
        self._operations = _Operations(self)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Trace for the length of the block."""
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            _push_mode(self._operations)  # type: ignore[no-untyped-call]  # torch's own
            stack.callback(ModesOff, lambda mode: mode is self._operations)
            named = self._between.named | {WRAPPER: self._on_compiled}
            stack.enter_context(calls_reported(self._functions(), named))
            try:
                yield
                self._close()  # not after an error: it may be an interrupt
            finally:
                self._forget()

    @property
    def idle(self) -> bool:
        """Whether operations are passed on unseen: inside model, loss or step, or while judging."""
        return self.judging or self._stepping is not None or bool(self._inside)

    def _hooks(self) -> Iterator[Any]:
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                register: Any = parameter.register_post_accumulate_grad_hook
                yield register(uncompiled(functools.partial(self._on_accumulation, name)))
        yield register_optimizer_step_pre_hook(uncompiled(self._before_step))
        yield register_optimizer_step_post_hook(uncompiled(self._after_step))

    def _functions(self) -> dict[CodeType, OnCall]:
        found: dict[CodeType, OnCall] = {
            **self._between.functions(),
            nn.Module._call_impl.__code__: self._on_module,
            torch.autograd.backward.__code__: self._on_backward,
            torch.autograd.grad.__code__: self._on_backward,
            OPTIMIZER_STEP: self._on_optimizer_step,
        }
        code = code_of(self._loss_function)
        if code is not None and not isinstance(self._criterion, nn.Module):
            found[code] = self._on_loss
        return found

    # Calls of model and loss.

    def _on_module(self, event: str, frame: FrameType, value: Any) -> None:
        """Tape a call of model or criterion, or of a part of the model that the loop itself calls.

        By the function that runs every module, since a hook would be a part of what is compiled.
        """
        if self.judging:
            return
        if event == "return":
            self._returned(frame, value)
            return
        module = frame.f_locals["self"]
        kind = self._kind_of(module)
        if kind is not None and not self.idle and torch.is_grad_enabled():
            call = self._begin(kind, module, frame.f_locals["args"], frame.f_locals["kwargs"])
            self._frames.append((frame, call))
            return
        inside = bool(self._inside)
        own = id(module) in self._own
        if self._stepping is not None or (own and inside):
            return
        if not own and any(id(part) in self._own for part in module.modules()):
            return  # it holds the model, so what it does is the loop's
        if self._moving.before_module(module, inside=inside):  # as the model does without gradient
            start = None if inside else random_states()
            self._frames_beside.append((frame, module, start))

    def _kind_of(self, module: Any) -> str | None:
        if module is self._criterion:
            return "loss"
        if id(module) not in self._parts:
            return None
        return "loss" if self._criterion is None and isinstance(module, _Loss) else "model"

    def _returned(self, frame: FrameType, value: Any) -> None:
        """End the call of this frame; one that raised has returned None."""
        if self._frames and self._frames[-1][0] is frame:
            self._end(self._frames.pop()[1], value)
        elif self._frames_beside and self._frames_beside[-1][0] is frame:
            _, module, start = self._frames_beside.pop()
            args, kwargs = frame.f_locals["args"], frame.f_locals["kwargs"]
            tape = self.seen.tape
            self._moving.after_module(module, args, kwargs, value, start, tape.origin, tape.number)

    def _on_compiled(self, event: str, frame: FrameType, value: Any) -> None:
        """Keep out of what is compiled, and tape it where model or loss is compiled as a whole."""
        function = None if self.judging else compiled_function(frame)
        if function is None:
            return
        if event == "return":
            self._returned(frame, value)
            if self._frames_compiled and self._frames_compiled[-1][0] is frame:
                self._frames_compiled.pop()[1].restore()
            return
        owner = getattr(function, "__self__", function)
        kind = self._kind_of(owner) if isinstance(owner, nn.Module) else None
        if function == self._loss_function:
            kind, owner = "loss", function
        if not self.idle and torch.is_grad_enabled():
            if kind is not None:
                call = self._begin(kind, owner, frame.f_locals["args"], frame.f_locals["kwargs"])
                self._frames.append((frame, call))
            else:
                self.seen.hidden.append(getattr(function, "__name__", type(function).__name__))
        self._frames_compiled.append((frame, ModesOff(_is_tracers)))

    def _taped(self, kind: str, function: Any, args: Any, kwargs: Any) -> TapedCall:
        device = self._device_type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        tape = self.seen.tape
        arguments = tape.recorded({**dict(enumerate(args)), **kwargs})
        given = tensors_in([args, kwargs]) if kind == "model" else []
        fed = any(t.grad_fn is not None and tape.origin(t) is None for t in given)
        order = next(self._order)
        return TapedCall(kind, function, arguments, order, call_site(), fed, autocast=autocast)

    def _begin(self, kind: str, function: Any, args: Any, kwargs: Any) -> TapedCall:
        self._look_at_gradients()
        call = self._taped(kind, function, args, kwargs)
        call.start = random_states()
        call.states = self._moving.before_call()
        if kind == "loss" and isinstance(function, nn.Module):  # a loop may set these before each call
            for of in (vars(module) for module in function.modules()):
                call.attributes.append((of, {k: v for k, v in of.items() if isinstance(v, PLAIN)}))
        self._inside.append(call)
        return call

    def _end(self, call: TapedCall, output: Any) -> None:
        self._inside.remove(call)
        self._moving.after_call()
        tape = self.seen.tape
        tape.add(call, output)
        if call.kind == "loss":
            loss = loss_in(output)
            if loss is not None and loss.numel() == 1:
                self._follow_loss(call, loss)
            else:  # of single losses, which the loop itself reduces
                call.kind = "between"
        elif self._criterion is None:
            # The model computes its losses itself: some of its outputs.
            for own in losses_in(output):
                origin: dict[int | str, Any] = {0: tape.origin(own)}
                loss_call = TapedCall("loss", models_own_loss, origin, next(self._order), call.site)
                tape.calls.append(loss_call)
                self._follow_loss(loss_call, own)

    def _follow_loss(self, call: TapedCall, loss: Tensor | None) -> None:
        """Record with what cotangent the loss is back-propagated."""
        tape = self.seen.tape

        def back_propagated(cotangent: Tensor) -> None:
            if self._counting and not self.judging and self._stepping is None:
                before = call.cotangent
                call.cotangent = cotangent.detach().clone() + (0 if before is None else before)
                call.backward = tape.backwards

        if loss is not None:
            # The mark: torch warns of any other where the loss is saved.
            hook = unserializable_hook(uncompiled(back_propagated))  # type: ignore[no-untyped-call]
            self._loss_hooks.append(loss.register_hook(hook))  # type: ignore[no-untyped-call]

    def _on_loss(self, event: str, frame: FrameType, value: Any) -> None:
        if self.judging:
            return
        if event == "return":
            self._returned(frame, value)
            return
        if self.idle or not torch.is_grad_enabled():
            return
        owner = bound_to(self._loss_function)
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else None
        if owner is not None and first is not None and frame.f_locals[first] is not owner:
            return  # the same method of another object
        args, kwargs = arguments_of(frame, bound=owner is not None)
        self._frames.append((frame, self._begin("loss", self._loss_function, args, kwargs)))

    def operation(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of the loop's own, outside of model and loss."""
        tensors = tensors_in([args, kwargs])
        name = getattr(function, "__name__", "")
        if name in READS:
            self._note_reading([ref for t in tensors if (ref := self.past.origin(t)) is not None])
        tape, graphs = self.seen.tape, torch.is_grad_enabled()
        origins = [ref for t in tensors if (ref := tape.origin(t)) is not None]
        with_parameters = graphs and name not in READS and self._computes_with_parameters(tensors)
        run = functools.partial(self._moving.run, from_model=tape.origin, number=tape.number)
        if not origins and not with_parameters:
            self._between.look(name, tensors)
            return run(function, args, kwargs)
        if function in LOSSES and self._criterion in (None, function) and graphs:
            call = self._begin("loss", function, args, kwargs)
            try:
                output = function(*args, **kwargs)
            except BaseException:
                self._inside.remove(call)
                raise
            self._end(call, output)
            return output
        if name in READS:
            self._note_reading(origins)
        between = self._taped("between", function, args, kwargs)
        form = linear(function, args, kwargs) if graphs else None
        output = run(function, args, kwargs)
        if any(t.requires_grad or name in READS for t in tensors_in(output)):
            tape.add(between, output)
        if isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad:
            if form is not None:  # a loop divides by a literal N; what it multiplies by is a weight
                factors = [factor for _, factor in form.operands if factor is not None]
                weights = [f.value for f in factors if f.weight]
                between.literal = math.prod(weights) if "div" not in name else 1.0
                between.counted = math.prod(f.value for f in factors if f.counted)
                plain = (f.value for f in factors if not (f.counted or f.literal or f.weight))
                between.numbers = tuple(plain)
            elif output.ndim == 0:  # a loss that the loop itself computes
                between.kind = "loss"
                self._follow_loss(between, output)
        return output

    def _computes_with_parameters(self, tensors: list[Tensor]) -> bool:
        return any(id(t) in self._refs for t in tensors)

    def _note_reading(self, origins: list[Any]) -> None:
        for ref in origins:
            if ref.call.kind == "loss":
                ref.call.read = True
            elif ref.call.kind == "between":
                self._note_reading(ref.call.refs())

    # Gradients, and the optimizer's step.

    def _on_accumulation(self, name: str, parameter: Tensor) -> None:
        if not self.judging and self._stepping is None and parameter.grad is not None:
            kept = self.seen.accumulated.setdefault(self.seen.tape.backwards, {})
            kept[name] = parameter.grad.detach().clone()
            self.seen.tape.reached.setdefault(self.seen.tape.backwards, set()).add(name)

    def _on_backward(self, event: str, frame: FrameType, value: Any) -> None:
        """Count backward passes, and keep the gradients after the last one."""
        seen = self.seen
        if self.judging or self._stepping is not None:
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
            self._counting = inputs is None or bool(names)
            if names:
                seen.tape.reached.setdefault(seen.tape.backwards, set()).update(names)
            if self._counting:
                seen.retained.append(bool(frame.f_locals.get("retain_graph")))
            return
        if self._counting:
            last = seen.accumulated.get(seen.tape.backwards)
            seen.tape.backwards += 1
            seen.accumulated = {} if last is None else {seen.tape.backwards: last}
            if seen.stepped:  # an optimizer that steps inside the backward pass
                self._close_if_complete()
        self._counting = False

    def _look_at_gradients(self) -> None:
        """Compare the gradients, before a pass, with those that the pass before left."""
        self._close()
        seen, now, backwards = self.seen, self.gradients(), self.seen.tape.backwards
        moved = self._weights_moved()
        if not seen.tape.calls:
            seen.at_start = {k: g.clone() for k, g in now.items() if bool(g.any())}
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
            self._moving.may_begin(backwards)
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
        return [float(group.get("lr", 0)) for o in self._optimizers for group in o.param_groups]

    def judges(self, optimizer: Any) -> set[str]:
        """Return the judged parameters of an optimizer."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {name for name, p in self._parameters.items() if id(p) in held}

    def gradients(self) -> Gradient:
        """Return the gradients that are there, dense, by parameter name."""
        return {
            name: p.grad.detach().to_dense() if p.grad.layout != torch.strided else p.grad.detach()
            for name, p in self._parameters.items()
            if p.grad is not None
        }

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if self.judging or self._stepping is not None:
            return None
        if not self.judges(optimizer):
            self.seen.other_steps.append(self.seen.tape.backwards)
            self._moving.may_begin(self.seen.tape.backwards)
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: the optimizer
        if closure is None:
            self._hand_over(optimizer)
            return None

        def traced(*a: Any, **k: Any) -> Any:
            value = closure(*a, **k)
            if self._stepping is None:  # what it runs again within the step is no window of its own
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
        self._stepping = optimizer
        # A fused optimizer unscales by itself, in its step.
        scale = getattr(optimizer, "grad_scale", None)
        by = float(scale) if isinstance(scale, Tensor) else 1.0
        now = {k: g / by if by != 1 else g.clone() for k, g in self.gradients().items() if k in names}
        if self.seen.tape.calls:
            self._weights_moved()
        self._taken |= now
        self.seen.stepped |= names
        self.seen.stepped_in_backward |= self._counting
        if self._counting:  # it takes the gradient away before the accumulation is seen
            tape = self.seen.tape
            tape.reached.setdefault(tape.backwards, set()).update(names)
        if not self._close_if_complete():
            self.seen.weights = self._weights_of(names) | self.seen.weights

    def _close_if_complete(self) -> bool:
        """Judge the window once all have stepped; inside a backward pass, when that has ended."""
        complete = self.seen.stepped == self._parameters.keys() and not self._counting
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
        seen.carried = left - before
        self._between.note_clipping_by_hand(taken)
        self.judging, others = True, ModesOff(_is_tracers)
        try:
            with calls_unreported():  # to other tracers neither
                self._reached(seen, taken)
        finally:
            others.restore()
            self.judging = False
            self._stepped_before = seen.stepped
            self._begin_window()

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._stepping is optimizer:
            self._stepping = None

    def _on_optimizer_step(self, event: str, frame: FrameType, value: Any) -> None:
        """Let a window go whose step has raised, for then no hook is called after it."""
        if event == "return" and self._stepping is not None:
            args = frame.f_locals.get("args")
            if args and args[0] is self._stepping:
                self._stepping = None
                self._begin_window()

    def give_up(self, optimizer: Any) -> None:
        """Let the gradients go whose step a scaler has skipped."""
        names = self.judges(optimizer)
        if names:
            self.seen.stepped |= names
            if not self._taken and self.seen.stepped == self._parameters.keys():
                self._begin_window()

    def _begin_window(self) -> None:
        self._moving.begin()
        self.past, self.seen, self._taken = self.seen.tape, self._nothing_seen(), {}
        self._norms = -1, []
        while self._loss_hooks:
            self._loss_hooks.pop().remove()

    def _forget(self) -> None:
        """Let go of the loop's tensors; how many passes were left over is still to be read."""
        left_over = self.seen.tape.backwards
        self._begin_window()
        self._moving.forget()
        self.past, self.seen.tape.backwards = Tape(), left_over

    def _nothing_seen(self) -> Observations:
        return Observations(Tape(parameters=self._refs, moving=self._moving))


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


class _Operations(TorchFunctionMode):
    """Shows the tracer every operation on tensors that the loop asks for."""

    def __init__(self, tracer: LoopTracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._tracer.idle:
            return func(*args, **kwargs)
        return self._tracer.operation(func, args, kwargs)


def _is_tracers(mode: TorchFunctionMode) -> bool:
    return isinstance(mode, _Operations)


# In a process that is forked from the loop's, as a DataLoader's workers are, nothing is traced.
os.register_at_fork(after_in_child=lambda: ModesOff(_is_tracers))
