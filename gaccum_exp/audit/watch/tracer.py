"""Eyes on a loop: hooks on the model, the criterion, the optimizer and the parameters, and on functions.

Nothing here changes a number of the loop's: hooks return nothing, operations are passed on as they are.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.overrides import TorchFunctionMode

from gaccum_exp.audit.rerun.samples import tensors_in
from gaccum_exp.audit.watch.function_calls import Seen, arguments_of, bound_to, code_of, frames_seen
from gaccum_exp.audit.watch.observations import Clip, Sight
from gaccum_exp.audit.watch.playback import itself
from gaccum_exp.audit.watch.tape import Call, Tape, loss_in
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.seeding import random_states

LOSSES = frozenset(
    function
    for name in dir(F)
    if name.endswith(("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div"))
    and callable(function := getattr(F, name))
)
READS = frozenset({"item", "tolist", "numpy", "__float__", "__format__", "detach", "cpu", "__int__"})


class _Hook:
    """A hook that stays behind where its module is copied or stored."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Hook":
        return _Hook(_nothing)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


class Observer:
    """Watches a loop and hands over each window when its gradient reaches the optimizer.

    Args:
        model: called by the loop, or by its loss function.
        criterion: a module; a function of the model's outputs, or of raw data; None: any loss of
            `torch.nn.functional`, or the model's own.
        optimizer: whose steps end windows.
        parameters: by name, those whose gradients are judged.
        reached: gets what was seen of a window, and the gradient that reached the optimizer.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Any,
        optimizer: torch.optim.Optimizer,
        parameters: dict[str, nn.Parameter],
        reached: Callable[[Sight, Gradient], None],
    ) -> None:
        self._model, self._criterion, self._optimizer = model, criterion, optimizer
        self._parameters, self._reached = parameters, reached
        self._loss_code = None if isinstance(criterion, nn.Module) else code_of(criterion)
        self._device = next((p.device for p in parameters.values()), torch.device("cpu"))
        self.sight = Sight()
        """The window in progress."""
        self._order = 0
        self._inside: list[Call] = []
        self._frames: list[tuple[FrameType, Call]] = []
        self._paused = False
        self._stepping = False
        self._counting = False
        self._steps = self._steps_before = 0
        self.past = Tape()
        """Of the window before: its losses may be looked at after its step."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Watch for the length of the block."""
        with ExitStack() as stack:
            for handle in self._hooks():
                stack.callback(handle.remove)
            stack.enter_context(_Operations(self))
            stack.enter_context(frames_seen(self._codes(), {"step": self._saw_step}))
            yield

    @property
    def idle(self) -> bool:
        """Whether operations are to be passed on unseen: inside model or loss, or while judging."""
        return self._paused or self._stepping or bool(self._inside)

    def _hooks(self) -> Iterator[Any]:
        model, criterion = self._model, self._criterion
        yield model.register_forward_pre_hook(_Hook(self._before_model), with_kwargs=True)
        yield model.register_forward_hook(_Hook(self._after_model), with_kwargs=True)
        if isinstance(criterion, nn.Module):
            yield criterion.register_forward_pre_hook(_Hook(self._before_criterion), with_kwargs=True)
            yield criterion.register_forward_hook(_Hook(self._after_criterion), with_kwargs=True)
        for name, parameter in self._parameters.items():
            if parameter.requires_grad and parameter.is_leaf:
                register: Any = parameter.register_post_accumulate_grad_hook
                yield register(self._accumulated(name))
        yield self._optimizer.register_step_pre_hook(_Hook(self._before_step))
        yield self._optimizer.register_step_post_hook(_Hook(self._after_step))

    def _codes(self) -> dict[CodeType, Seen]:
        clipping = {
            inspect.unwrap(f).__code__: self._saw_clipping
            for f in (nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_)
        }
        scaling = {
            GradScaler.scale.__code__: self._saw_scale,
            GradScaler.unscale_.__code__: self._saw_unscale,
        }
        scaling[GradScaler.step.__code__] = self._saw_scaler_step
        for function in (torch.autograd.backward, torch.autograd.grad):
            scaling[function.__code__] = self._saw_backward
        loss = {self._loss_code: self._saw_loss} if self._loss_code is not None else {}
        return clipping | scaling | loss

    # Calls of model and loss.

    def _begun(self, kind: str, function: Any, args: Any, kwargs: Any) -> Call:
        self._look_at_gradients()
        self._order += 1
        tape = self.sight.tape
        call = Call(
            kind, function, tape.noted(list(args)), tape.noted(dict(kwargs)), self._order,
            autocast=self._autocast(), start=random_states(),
            attributes=_plain_attributes(kind, function),
        )  # fmt: skip
        self._inside.append(call)
        return call

    def _ended(self, call: Call, output: Any) -> None:
        self._inside.remove(call)
        self.sight.tape.add(call, output)
        if call.kind == "loss":
            self._follow_loss(call, loss_in(output))
        elif self._criterion is None and (own := loss_in(output)) is not None and own.ndim == 0:
            # The model computes its loss itself: an output of it is the loss.
            place = next(i for i, t in enumerate(tensors_in(output)) if t is own)
            self._order += 1
            loss = Call("loss", itself, [self.sight.tape.origin(own)], {"place": place}, self._order)
            self.sight.tape.calls.append(loss)
            self._follow_loss(loss, own)

    def _follow_loss(self, call: Call, loss: Tensor | None) -> None:
        if loss is None:
            return
        sight = self.sight

        def back_propagated(cotangent: Tensor) -> None:
            if self._counting and not self._paused and not self._stepping:
                before = call.cotangent
                call.cotangent = cotangent.detach().clone() + (0 if before is None else before)
                call.backward = sight.tape.backwards

        loss.register_hook(back_propagated)  # type: ignore[no-untyped-call]  # torch's own

    def _autocast(self) -> tuple[bool, torch.dtype]:
        kind = self._device.type
        return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def _before_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.idle and torch.is_grad_enabled():
            self._begun("model", module, args, kwargs)

    def _after_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._inside and self._inside[-1].kind == "model" and not self._paused:
            self._ended(self._inside[-1], output)

    def _before_criterion(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self.idle and torch.is_grad_enabled():
            self._begun("loss", module, args, kwargs)

    def _after_criterion(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self._inside and self._inside[-1].function is module and not self._paused:
            self._ended(self._inside[-1], output)

    def _saw_loss(self, event: str, frame: FrameType, value: Any) -> None:
        if self._paused:
            return
        if event == "return":
            if self._frames and self._frames[-1][0] is frame:
                call = self._frames.pop()[1]
                self._ended(call, value)
            return
        owner = bound_to(self._criterion)
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else None
        if self.idle or not torch.is_grad_enabled():
            return
        if owner is not None and first is not None and frame.f_locals[first] is not owner:
            return  # the same method of another object
        args, kwargs = arguments_of(frame, bound=owner is not None)
        function = self._criterion
        while hasattr(function, "func"):
            function = function.func  # a partial's own arguments are among those seen
        self._frames.append((frame, self._begun("loss", function, args, kwargs)))

    def operation(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of the loop's own, outside of model and loss."""
        tensors = tensors_in([args, kwargs])
        name = getattr(function, "__name__", "")
        if name in READS:
            self._note_reading([ref for t in tensors if (ref := self.past.origin(t)) is not None])
        origins = [self.sight.tape.origin(t) for t in tensors]
        if not any(origins):
            return function(*args, **kwargs)
        if function in LOSSES and self._criterion in (None, function) and torch.is_grad_enabled():
            return self._functional_loss(function, args, kwargs)
        if name in READS:
            self._note_reading([o for o in origins if o is not None])
        kept = self.sight.tape.noted([list(args), dict(kwargs)])
        output = function(*args, **kwargs)
        if any(t.requires_grad or name in READS for t in tensors_in(output)):
            self._order += 1
            between = Call("between", function, kept[0], kept[1], self._order, autocast=self._autocast())
            self.sight.tape.add(between, output)
        return output

    def _functional_loss(self, function: Any, args: Any, kwargs: Any) -> Any:
        call = self._begun("loss", function, args, kwargs)
        try:
            output = function(*args, **kwargs)
        except BaseException:
            self._inside.remove(call)
            raise
        self._ended(call, output)
        return output

    def _note_reading(self, origins: list[Any]) -> None:
        for ref in origins:
            call = ref.call
            if call.kind == "loss":
                call.read = True
            elif call.kind == "between":
                self._note_reading(call.refs())

    # Gradients and the step.

    def _accumulated(self, name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if not self._paused and not self._stepping and parameter.grad is not None:
                kept = self.sight.accumulated.setdefault(self.sight.tape.backwards, {})
                kept[name] = parameter.grad.detach().clone()

        return hook

    def _saw_backward(self, event: str, frame: FrameType, value: Any) -> None:
        """Count backward passes; of the gradients, those after the last one matter."""
        if self._paused or self._stepping:
            return
        sight = self.sight
        if event == "call":
            # Of an attack on the inputs, or a penalty, no parameter gets anything.
            inputs = frame.f_locals.get("inputs")
            asked = [inputs] if isinstance(inputs, Tensor) else list(inputs or ())
            judged = {id(p) for p in self._parameters.values()}
            self._counting = inputs is None or any(id(t) in judged for t in asked)
            if self._counting:
                sight.retained.append(bool(frame.f_locals.get("retain_graph")))
            return
        counted, self._counting = self._counting, False
        if not counted:
            return
        sight.tape.backwards += 1
        last = sight.accumulated.get(sight.tape.backwards - 1)
        sight.accumulated = {} if last is None else {sight.tape.backwards: last}

    def _look_at_gradients(self) -> None:
        """Before a pass: are the gradients what the pass before left?"""
        sight = self.sight
        now = self._gradients()
        if not sight.tape.calls:
            sight.at_start = {k: g.clone() for k, g in now.items() if bool(g.any())}
            return
        last = sight.accumulated.get(sight.tape.backwards)
        if last is None or not any(bool(g.any()) for g in last.values()):
            return
        found = None
        if not any(bool(g.any()) for g in now.values()):
            found = sight.tape.backwards, "zeroed"
        elif any(k not in now or not torch.equal(now[k], g) for k, g in last.items()):
            found = sight.tape.backwards, "changed"
        if found is not None and found not in sight.between:
            sight.between.append(found)

    def _gradients(self) -> Gradient:
        return {
            name: p.grad.detach().to_dense() if p.grad.layout != torch.strided else p.grad.detach()
            for name, p in self._parameters.items()
            if p.grad is not None
        }

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        if self._paused:
            return None
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)  # args[0]: the optimizer
        if closure is None:
            self._step_begins()
            return None
        first = True

        def watched(*a: Any, **k: Any) -> Any:
            nonlocal first
            value = closure(*a, **k)
            if first:
                self._step_begins()
            first = False
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """What a closure runs again within the step is no window of its own."""
        if self._stepping:
            self.past, self.sight, self._stepping = self.sight.tape, Sight(), False

    def _step_begins(self) -> None:
        sight = self.sight
        self._steps += 1
        self._stepping = self._paused = True
        try:
            # Fused optimizers unscale by themselves, in their step.
            scale = getattr(self._optimizer, "grad_scale", None)
            by = float(scale) if isinstance(scale, Tensor) else 1.0
            self._reached(
                sight,
                {k: g.clone() / by if by != 1 else g.clone() for k, g in self._gradients().items()},
            )
        finally:
            self._paused = False

    # Functions that the loop calls between passes.

    def _saw_clipping(self, event: str, frame: FrameType, value: Any) -> None:
        if self._paused:
            return
        now = {k: g.clone() for k, g in self._gradients().items()}
        if event == "call":
            self.sight.clips.append(Clip(self.sight.tape.backwards, now))
        elif self.sight.clips:
            self.sight.clips[-1].after = now

    def _saw_step(self, event: str, frame: FrameType, value: Any) -> None:
        if event == "call" and not self._paused and isinstance(frame.f_locals.get("self"), LRScheduler):
            self.sight.scheduler_steps.append(self.sight.tape.backwards)

    def _saw_scaler_step(self, event: str, frame: FrameType, value: Any) -> None:
        """A scaler skips the step where a gradient overflowed: that window is given up."""
        if event == "call":
            self._steps_before = self._steps
        elif self._steps == self._steps_before and not self._paused:
            self.past, self.sight = self.sight.tape, Sight()

    def _saw_scale(self, event: str, frame: FrameType, value: Any) -> None:
        if event == "return" and not self._paused:
            self.sight.loss_scale = float(frame.f_locals["self"].get_scale())

    def _saw_unscale(self, event: str, frame: FrameType, value: Any) -> None:
        if event == "call" and not self._paused:
            self.sight.unscaled.append(self.sight.tape.backwards)


def _plain_attributes(kind: str, function: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """A criterion may be told before each call how to reduce."""
    if kind != "loss" or not isinstance(function, nn.Module):
        return []
    plain = (str, int, float, bool, type(None))
    every = [vars(module) for module in function.modules()]
    return [(of, {k: v for k, v in of.items() if isinstance(v, plain)}) for of in every]


class _Operations(TorchFunctionMode):
    """Sees every operation on tensors that the loop asks for."""

    def __init__(self, observer: Observer) -> None:
        super().__init__()
        self._observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._observer.idle:
            return func(*args, **kwargs)
        return self._observer.operation(func, args, kwargs)
