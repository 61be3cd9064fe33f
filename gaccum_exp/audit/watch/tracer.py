"""Trace a loop: by hooks on model, criterion, optimizer and parameters, and by the functions it calls.

Nothing here changes a number of the loop's: hooks return nothing, operations are passed on as they are.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode

from gaccum_exp.audit.rerun.sandbox import NamedModules, nothing
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.audit.watch.tape import (
    Clipping,
    Observations,
    Tape,
    TapedCall,
    loss_in,
    models_own_loss,
)
from gaccum_exp.audit.watch.user_functions import (
    OnCall,
    arguments_of,
    bound_to,
    calls_reported,
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


class LoopTracer:
    """Traces a loop, and hands each window over when its gradient reaches the optimizer.

    Args:
        model, criterion, optimizer: as in `watch`, without wrappers.
        modules: of model and loss.
        parameters: by name, those whose gradients are judged.
        reached: gets what was observed of a window, and the gradient that reached the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        optimizer: torch.optim.Optimizer,
        modules: NamedModules,
        parameters: dict[str, nn.Parameter],
        reached: Callable[[Observations, Gradient], None],
        moving: MovingState,
    ) -> None:
        self._model, self._criterion, self._optimizer = model, criterion, optimizer
        self._modules = modules
        self._parameters, self._reached = parameters, reached
        self._loss_function = criterion
        while isinstance(self._loss_function, functools.partial):
            self._loss_function = self._loss_function.func  # its own arguments are seen in each call
        self._device_type = next((p.device.type for p in parameters.values()), "cpu")
        self._moving = moving
        self.seen = Observations(Tape(moving=moving))
        """Of the window in progress."""
        self.past = Tape()
        """Of the window before: its losses may be read after its step."""
        self._order = itertools.count()
        self._inside: list[TapedCall] = []
        """The call of model or loss that is running, if any."""
        self._frames: list[tuple[FrameType, TapedCall]] = []
        self._judging = self._stepping = False
        self._counting = False
        """Whether the backward pass that is running reaches the parameters."""
        self._global_step = self._step_before_scaler = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Trace for the length of the block."""
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            for handle in self._beside_hooks():
                stack.callback(handle.remove)
            stack.enter_context(_Operations(self))
            stack.enter_context(calls_reported(self._functions(), {"step": self._on_step}))
            yield

    @property
    def idle(self) -> bool:
        """Whether operations are passed on unseen: inside model, loss or step, or while judging."""
        return self._judging or self._stepping or bool(self._inside)

    def _hooks(self) -> Iterator[Any]:
        called = [("model", self._model)]
        if isinstance(self._criterion, nn.Module):
            called.append(("loss", self._criterion))
        for kind, module in called:
            before = functools.partial(self._before_module, kind)
            yield module.register_forward_pre_hook(_Hook(before), with_kwargs=True)
            yield module.register_forward_hook(_Hook(self._after_module), with_kwargs=True)
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                register: Any = parameter.register_post_accumulate_grad_hook
                yield register(functools.partial(self._on_accumulation, name))
        yield self._optimizer.register_step_pre_hook(_Hook(self._before_step))
        yield self._optimizer.register_step_post_hook(_Hook(self._after_step))

    def _beside_hooks(self) -> Iterator[Any]:
        """See modules beside model and loss run, and the model where it gets no gradient."""
        own = {id(module) for module in self._modules}
        starts: list[list[Any] | None] = []

        def taped(module: nn.Module) -> bool:
            called = module is self._model or module is self._criterion
            within = bool(self._inside) and id(module) in own
            if called and torch.is_grad_enabled():
                return True
            return self._judging or self._stepping or within or torch.compiler.is_compiling()

        def before(module: nn.Module, args: Any) -> None:
            if not taped(module) and self._moving.before_module(module, inside=bool(self._inside)):
                starts.append(None if self._inside else random_states())

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if not taped(module) and self._moving.runs(module):
                origin = self.seen.tape.origin
                number = self.seen.tape.number
                self._moving.after_module(module, args, kwargs, output, starts.pop(), origin, number)

        yield register_module_forward_pre_hook(before)
        yield register_module_forward_hook(after, with_kwargs=True, always_call=True)

    def _functions(self) -> dict[CodeType, OnCall]:
        found: dict[CodeType, OnCall] = {
            GradScaler.scale.__code__: self._on_scale,
            GradScaler.unscale_.__code__: self._on_unscale,
            GradScaler.step.__code__: self._on_scaler_step,
            torch.autograd.backward.__code__: self._on_backward,
            torch.autograd.grad.__code__: self._on_backward,
        }
        for clip in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_):
            found[inspect.unwrap(clip).__code__] = self._on_clipping
        code = code_of(self._loss_function)
        if code is not None and not isinstance(self._criterion, nn.Module):
            found[code] = self._on_loss
        return found

    # Calls of model and loss.

    def _before_module(self, kind: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.idle and torch.is_grad_enabled():
            self._begin(kind, module, args, kwargs)

    def _after_module(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._inside and self._inside[-1].function is module and not self._judging:
            self._end(self._inside[-1], output)

    def _taped(self, kind: str, function: Any, args: Any, kwargs: Any) -> TapedCall:
        device = self._device_type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        arguments = self.seen.tape.recorded({**dict(enumerate(args)), **kwargs})
        return TapedCall(kind, function, arguments, next(self._order), autocast=autocast)

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
        self.seen.tape.add(call, output)
        if call.kind == "loss":
            self._follow_loss(call, loss_in(output))
        elif self._criterion is None and (own := loss_in(output)) is not None and own.ndim == 0:
            # The model computes its loss itself: one of its outputs.
            origin = self.seen.tape.origin(own)
            loss = TapedCall("loss", models_own_loss, {0: origin}, next(self._order))
            self.seen.tape.calls.append(loss)
            self._follow_loss(loss, own)

    def _follow_loss(self, call: TapedCall, loss: Tensor | None) -> None:
        """Record with what cotangent the loss is back-propagated."""
        tape = self.seen.tape

        def back_propagated(cotangent: Tensor) -> None:
            if self._counting and not self._judging and not self._stepping:
                before = call.cotangent
                call.cotangent = cotangent.detach().clone() + (0 if before is None else before)
                call.backward = tape.backwards

        if loss is not None:
            loss.register_hook(back_propagated)  # type: ignore[no-untyped-call]  # torch's own

    def _on_loss(self, event: str, frame: FrameType, value: Any) -> None:
        if self._judging:
            return
        if event == "return":
            if self._frames and self._frames[-1][0] is frame:
                self._end(self._frames.pop()[1], value)
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
        tape = self.seen.tape
        origins = [ref for t in tensors if (ref := tape.origin(t)) is not None]
        run = functools.partial(self._moving.run, from_model=tape.origin, number=tape.number)
        if not origins:
            return run(function, args, kwargs)
        if function in LOSSES and self._criterion in (None, function) and torch.is_grad_enabled():
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
        output = run(function, args, kwargs)
        if any(t.requires_grad or name in READS for t in tensors_in(output)):
            tape.add(between, output)
        return output

    def _note_reading(self, origins: list[Any]) -> None:
        for ref in origins:
            if ref.call.kind == "loss":
                ref.call.read = True
            elif ref.call.kind == "between":
                self._note_reading(ref.call.refs())

    # Gradients, and the optimizer's step.

    def _on_accumulation(self, name: str, parameter: Tensor) -> None:
        if not self._judging and not self._stepping and parameter.grad is not None:
            kept = self.seen.accumulated.setdefault(self.seen.tape.backwards, {})
            kept[name] = parameter.grad.detach().clone()

    def _on_backward(self, event: str, frame: FrameType, value: Any) -> None:
        """Count backward passes, and keep the gradients after the last one."""
        seen = self.seen
        if self._judging or self._stepping:
            return
        if event == "call":
            # The gradient of an attack on the inputs, or of a penalty, reaches no parameter.
            inputs = frame.f_locals.get("inputs")
            asked = [inputs] if isinstance(inputs, Tensor) else list(inputs or ())
            judged = {id(p) for p in self._parameters.values()}
            self._counting = inputs is None or any(id(t) in judged for t in asked)
            if self._counting:
                seen.retained.append(bool(frame.f_locals.get("retain_graph")))
            return
        if self._counting:
            last = seen.accumulated.get(seen.tape.backwards)
            seen.tape.backwards += 1
            seen.accumulated = {} if last is None else {seen.tape.backwards: last}
        self._counting = False

    def _look_at_gradients(self) -> None:
        """Compare the gradients, before a pass, with those that the pass before left."""
        seen, now, backwards = self.seen, self._gradients(), self.seen.tape.backwards
        if not seen.tape.calls:
            seen.at_start = {k: g.clone() for k, g in now.items() if bool(g.any())}
            return
        last = seen.accumulated.get(backwards)
        if last is None or not any(bool(g.any()) for g in last.values()):
            return
        if not any(bool(g.any()) for g in now.values()):
            seen.zeroed.add(backwards)
        elif any(k not in now or not torch.equal(now[k], g) for k, g in last.items()):
            seen.changed.add(backwards)

    def _gradients(self) -> Gradient:
        return {
            name: p.grad.detach().to_dense() if p.grad.layout != torch.strided else p.grad.detach()
            for name, p in self._parameters.items()
            if p.grad is not None
        }

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if self._judging:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: the optimizer
        if closure is None:
            self._hand_over()
            return None

        def traced(*a: Any, **k: Any) -> Any:
            value = closure(*a, **k)
            if not self._stepping:  # what it runs again within the step is no window of its own
                self._hand_over()
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": traced}
        return (args[0], traced, *args[2:]), kwargs

    def _hand_over(self) -> None:
        self._global_step += 1
        self._stepping = self._judging = True
        try:
            # A fused optimizer unscales by itself, in its step.
            scale = getattr(self._optimizer, "grad_scale", None)
            by = float(scale) if isinstance(scale, Tensor) else 1.0
            now = {k: g / by if by != 1 else g.clone() for k, g in self._gradients().items()}
            self._reached(self.seen, now)
        finally:
            self._judging = False

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._stepping:
            self._begin_window()
            self._stepping = False

    def _begin_window(self) -> None:
        self._moving.begin()
        self.past, self.seen = self.seen.tape, Observations(Tape(moving=self._moving))

    # Functions that the loop calls between passes.

    def _on_clipping(self, event: str, frame: FrameType, value: Any) -> None:
        if self._judging:
            return
        now = {k: g.clone() for k, g in self._gradients().items()}
        if event == "call":
            self.seen.clippings.append(Clipping(self.seen.tape.backwards, now))
        elif self.seen.clippings:
            self.seen.clippings[-1].after = now

    def _on_step(self, event: str, frame: FrameType, value: Any) -> None:
        scheduler = isinstance(frame.f_locals.get("self"), LRScheduler)
        if event == "call" and scheduler and not self._judging:
            self.seen.scheduler_steps.append(self.seen.tape.backwards)

    def _on_scaler_step(self, event: str, frame: FrameType, value: Any) -> None:
        """Give a window up where a gradient overflowed: the scaler skips its step."""
        if event == "call":
            self._step_before_scaler = self._global_step
        elif self._global_step == self._step_before_scaler and not self._judging:
            self._begin_window()

    def _on_scale(self, event: str, frame: FrameType, value: Any) -> None:
        if event == "return" and not self._judging:
            self.seen.loss_scale = float(frame.f_locals["self"].get_scale())

    def _on_unscale(self, event: str, frame: FrameType, value: Any) -> None:
        if event == "call" and not self._judging:
            self.seen.unscaled.append(self.seen.tape.backwards)


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


class _Hook:
    """A hook that does nothing on a copy of its module, or once that is stored and loaded."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook(nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (nothing,)
