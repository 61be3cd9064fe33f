"""The calls of a loop, written on the tape of its window: of model, loss, and operations between.

Nothing here changes a number of the loop's: hooks return nothing, operations are passed on as they are.
"""

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.nn.modules.loss import _Loss
from torch.overrides import TorchFunctionMode, _push_mode
from torch.utils.checkpoint import checkpoint
from torch.utils.hooks import unserializable_hook

from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.watch.compiled import WRAPPER, ModesOff, compiled_function, uncompiled
from gaccum_exp.audit.watch.moving_state import MovingState, writes
from gaccum_exp.audit.watch.places import place_of_call
from gaccum_exp.audit.watch.scalars import Factor, call_site, calling_functions, linear
from gaccum_exp.audit.watch.tape import (
    OutputRef,
    TapedCall,
    gradient_asked_for,
    gradient_by_weights,
    leaves,
    loss_in,
    losses_in,
    models_own_loss,
    of_the_loop,
    surrogate,
    tensors_out,
)
from gaccum_exp.audit.watch.user_functions import OnCall, arguments_of, bound_to, code_of
from gaccum_exp.core.nesting import tensors_in
from gaccum_exp.core.seeding import random_states

if TYPE_CHECKING:
    from gaccum_exp.audit.watch.tracer import LoopTracer

LOSSES = frozenset(
    function
    for name in dir(F)
    if name.endswith(("_loss", "cross_entropy", "cross_entropy_with_logits", "kl_div"))
    and callable(function := getattr(F, name))
)
READS = frozenset({"item", "tolist", "numpy", "__float__", "__format__", "detach", "cpu", "__int__"})
"""Operations by which a loop reads a value."""
STACKING = frozenset({"stack", "cat", "concat", "concatenate", "hstack", "vstack"})
ADDING_UP = frozenset({"sum", "mean", "nansum", "nanmean", "dot", "matmul", "__matmul__", "inner"})
ELEMENTWISE = frozenset(
    {"mul", "__mul__", "__rmul__", "multiply", "div", "__truediv__", "true_divide", "divide", "neg"}
    | {"reshape", "view", "flatten", "squeeze", "float", "double", "to", "contiguous", "clone"}
)
"""Operations that collect losses in a tensor, add up what is in one, and weigh it."""
PLAIN = (str, int, float, bool, type(None))


class TracedCalls:
    """Calls of model and loss, and operations on what they put out, as they happen in the loop.

    Args:
        tracer: has the window in progress.
        model, criterion: as in `watch`, without wrappers.
        modules: of both.
    """

    def __init__(
        self, tracer: "LoopTracer", model: nn.Module, criterion: Any, modules: NamedModules
    ) -> None:
        self._tracer, self._criterion = tracer, criterion
        self._parts = {id(module) for module in model.modules()}
        self._own = {id(module) for module in modules}
        self._losses = set[int]()
        """Modules that turned out to be the loss, where none was named."""
        self._loss_function = criterion
        while isinstance(self._loss_function, functools.partial):
            self._loss_function = self._loss_function.func  # its own arguments are seen in each call
        named = modules.parameters().values()
        self._device_type = next((p.device.type for p in named), "cpu")
        self._order = itertools.count()
        self._inside: list[TapedCall] = []
        """The call of model or loss that is running, if any."""
        self._frames: list[tuple[FrameType, TapedCall]] = []
        self._frames_beside: list[tuple[FrameType, nn.Module, list[Any] | None]] = []
        """Of modules beside model and loss, with the random states before; None: inside a loss."""
        self._checkpoint: FrameType | None = None
        """The outermost checkpoint that runs: of a reentrant one the graph comes later."""
        self._frames_compiled: list[tuple[FrameType, ModesOff]] = []
        self._loss_hooks: list[Any] = []
        """Handles of those on the window's losses, which a loop may keep for longer."""

    def begin(self) -> None:
        """Let go of the losses of the window before."""
        while self._loss_hooks:
            self._loss_hooks.pop().remove()

    @property
    def inside(self) -> bool:
        """Whether a call of model or loss is running."""
        return bool(self._inside)

    @contextmanager
    def operations_shown(self) -> Iterator[None]:
        """See the loop's operations for the length of the block, which may end in any order."""
        mode = _Operations(lambda: self._tracer.idle, self._operation)
        _push_mode(mode)  # type: ignore[no-untyped-call]  # torch's own
        try:
            yield
        finally:
            ModesOff(lambda each: each is mode)

    def functions(self) -> dict[CodeType, OnCall]:
        """Return what to do at each function's call and return."""
        found: dict[CodeType, OnCall] = {
            nn.Module._call_impl.__code__: self.on_module,
            inspect.unwrap(checkpoint).__code__: self._on_checkpoint,
        }
        code = code_of(self._loss_function)
        if code is not None and not isinstance(self._criterion, nn.Module):
            found[code] = self._on_loss
        return found

    @property
    def named(self) -> dict[str, OnCall]:
        """The same for functions that are known by their names."""
        return {
            WRAPPER: self._on_compiled,
            "forward": self._on_own_function,
            "setup_context": self._on_own_function,
        }

    def on_module(self, event: str, frame: FrameType, value: Any) -> None:
        """Tape a call of model or criterion, or of a part of the model that the loop itself calls.

        By the function that runs every module, since a hook would be a part of what is compiled.
        """
        if self._tracer.judging or self._tracer.counting:  # a checkpoint runs it again, for its graph
            return
        if event == "return":
            self._returned(frame, value)
            return
        module = frame.f_locals["self"]
        kind = self._kind_of(module)
        if kind is None and self._is_loss(module, frame):
            kind = "loss"
        if kind is not None and not self._tracer.idle and self._graphs:
            call = self._begin(kind, module, frame.f_locals["args"], frame.f_locals["kwargs"])
            self._frames.append((frame, call))
            return
        inside = bool(self._inside)
        own = id(module) in self._own
        if self._tracer.stepping is not None or (own and inside):
            return
        if not own and any(id(part) in self._own for part in module.modules()):
            return  # it holds the model, so what it does is the loop's
        # As the model does without gradient, too.
        if self._tracer.moving.before_module(module, inside=inside):
            start = None if inside else random_states()
            self._frames_beside.append((frame, module, start))

    def _on_checkpoint(self, event: str, frame: FrameType, value: Any) -> None:
        if event == "call" and self._checkpoint is None and torch.is_grad_enabled():
            self._checkpoint = frame
        elif event == "return" and self._checkpoint is frame:
            self._checkpoint = None

    @property
    def _graphs(self) -> bool:
        """Whether what runs now has a graph, or will have one."""
        return torch.is_grad_enabled() or self._checkpoint is not None

    def _kind_of(self, module: Any) -> str | None:
        if module is self._criterion:
            return "loss"
        if id(module) not in self._parts:
            return None
        return "loss" if self._criterion is None and isinstance(module, _Loss) else "model"

    def _is_loss(self, module: nn.Module, frame: FrameType) -> bool:
        """Whether a module is a loss that nobody has named: without weights, on the model's outputs."""
        if self._criterion is not None or self._tracer.idle or not self._graphs:
            return False
        if id(module) in self._losses:
            return True
        # Of torch's own, all others are layers.
        layer = type(module).__module__.startswith("torch.nn.") and not isinstance(module, _Loss)
        if layer or next(module.parameters(), None) is not None or self._frames_beside:
            return False
        given = tensors_in([frame.f_locals["args"], frame.f_locals["kwargs"]])
        if not any(t.requires_grad and self._tracer.seen.tape.origin(t) is not None for t in given):
            return False
        self._losses.add(id(module))
        self._tracer.moving.include(module)
        self._own |= {id(part) for part in module.modules()}
        return True

    def _returned(self, frame: FrameType, value: Any) -> None:
        """End the call of this frame; one that raised has returned None."""
        if self._frames and self._frames[-1][0] is frame:
            self._end(self._frames.pop()[1], value)
        elif self._frames_beside and self._frames_beside[-1][0] is frame:
            _, module, start = self._frames_beside.pop()
            args, kwargs = frame.f_locals["args"], frame.f_locals["kwargs"]
            tape, moving = self._tracer.seen.tape, self._tracer.moving
            moving.after_module(module, args, kwargs, value, start, tape.origin, tape.number)

    def _on_compiled(self, event: str, frame: FrameType, value: Any) -> None:
        """Keep out of what is compiled, and tape it where model or loss is compiled as a whole."""
        function = None if self._tracer.judging else compiled_function(frame)
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
        if not self._tracer.idle and torch.is_grad_enabled():
            if kind is not None:
                call = self._begin(kind, owner, frame.f_locals["args"], frame.f_locals["kwargs"])
                self._frames.append((frame, call))
            else:
                self._tracer.seen.hidden.append(getattr(function, "__name__", type(function).__name__))
        self._frames_compiled.append((frame, operations_unseen()))

    def _taped(self, kind: str, function: Any, args: Any, kwargs: Any) -> TapedCall:
        device = self._device_type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        tape = self._tracer.seen.tape
        if kind == "loss":
            self._note_leaves(tensors_in([args, kwargs]))
        site, by_key = call_site(), {**dict(enumerate(args)), **kwargs}
        arguments = tape.recorded(by_key, to_model=kind == "model", site=site)
        given = tensors_in([args, kwargs]) if kind == "model" else []
        fed = any(t.grad_fn is not None and tape.origin(t) is None for t in given)
        call = TapedCall(kind, function, arguments, next(self._order), site, fed, autocast=autocast)
        call.place = place_of_call() if kind != "model" else None
        since = (ref.call.since for ref in call.refs()) if kind != "model" else ()
        call.since = min([tape.backwards, *since])
        call.functions = calling_functions()
        return call

    def _begin(self, kind: str, function: Any, args: Any, kwargs: Any) -> TapedCall:
        self._tracer.look_at_gradients()
        call = self._taped(kind, function, args, kwargs)
        call.start = random_states()
        call.states = self._tracer.moving.before_call()
        if kind == "loss" and isinstance(function, nn.Module):  # a loop may set these before each call
            for of in (vars(module) for module in function.modules()):
                call.attributes.append((of, {k: v for k, v in of.items() if isinstance(v, PLAIN)}))
        self._inside.append(call)
        return call

    def _end(self, call: TapedCall, output: Any) -> None:
        tape = self._tracer.seen.tape
        several = sum(t.requires_grad for t in tensors_out(output)) > 1
        if call.kind == "loss" and several and len(losses_in(output)) != 1:
            call.kind = "model"  # for what it puts out is the loop's to weigh and to add up
        tape.add(call, output)
        self._inside.remove(call)
        self._tracer.moving.after_call()
        if call.kind == "loss":
            loss = loss_in(output)
            if loss is not None and loss.numel() == 1:
                self._follow_loss(call, loss)
            else:  # of single losses, which the loop itself reduces
                graphs = [t for t in tensors_out(output) if t.requires_grad]
                call.kind = "between" if _by_sample(call, graphs) else "model"
        else:
            self._follow_own_losses(call, output)

    def _follow_own_losses(self, call: TapedCall, output: Any) -> None:
        """Follow the losses that a model computes itself: some of its outputs, or of its attributes."""
        tape, returned = self._tracer.seen.tape, losses_in(output)
        modules = call.function.modules() if isinstance(call.function, nn.Module) else ()
        left = [tensor for module in modules for tensor in tape.add_left(call, module)]
        scalars = [*returned, *(tensor for tensor in left if tensor.ndim == 0)]
        others = [t for t in (*tensors_out(output), *left) if t.ndim and t.requires_grad]
        # What enters the other outputs, as a temperature does, gets a gradient by these, too.
        entering = _made_of(others, scalars) if left or len(scalars) > 1 else set()
        followed = [(n, scalar) for n, scalar in enumerate(scalars) if n not in entering]
        calls = dict[int, TapedCall]()
        for n, scalar in followed:
            origin: dict[int | str, Any] = {0: tape.origin(scalar)}
            calls[n] = TapedCall("loss", models_own_loss, origin, next(self._order), call.site)
            calls[n].place = place_of_call()
            calls[n].since = call.since
            tape.calls.append(calls[n])
        for n, scalar in followed:
            for k in _made_of([scalar], scalars) & calls.keys() - {n} if len(followed) > 1 else ():
                by = torch.autograd.grad(scalar, scalars[k], retain_graph=True)[0]
                calls[k].within.append((calls[n], float(by)))
        for n, scalar in followed:
            self._follow_loss(calls[n], scalar)

    def _follow_loss(self, call: TapedCall, loss: Tensor | None) -> None:
        """Record with what cotangent the loss is back-propagated."""
        tape = self._tracer.seen.tape

        def back_propagated(cotangent: Tensor) -> None:
            if self._tracer.counting and not self._tracer.judging and self._tracer.stepping is None:
                before = call.cotangent
                call.cotangent = cotangent.detach().clone() + (0 if before is None else before)
                call.backward = tape.backwards

        if loss is not None:
            # The mark: torch warns of any other where the loss is saved.
            hook = unserializable_hook(uncompiled(back_propagated))  # type: ignore[no-untyped-call]
            self._loss_hooks.append(loss.register_hook(hook))  # type: ignore[no-untyped-call]

    def _on_loss(self, event: str, frame: FrameType, value: Any) -> None:
        if self._tracer.judging:
            return
        if event == "return":
            self._returned(frame, value)
            return
        if self._tracer.idle or not torch.is_grad_enabled():
            return
        owner = bound_to(self._loss_function)
        first = frame.f_code.co_varnames[0] if frame.f_code.co_argcount else None
        if owner is not None and first is not None and frame.f_locals[first] is not owner:
            return  # the same method of another object
        args, kwargs = arguments_of(frame, bound=owner is not None)
        self._frames.append((frame, self._begin("loss", self._loss_function, args, kwargs)))

    def _on_own_function(self, event: str, frame: FrameType, value: Any) -> None:
        """Tape an operation whose gradient the user has written, which torch shows to no mode.

        By its context, which becomes the node of the graph that its outputs have.
        """
        code, values = frame.f_code, frame.f_locals
        names = code.co_varnames[: code.co_argcount]
        node = values.get(names[0]) if names else None
        if self._tracer.judging or not isinstance(node, FunctionCtx):
            return
        if event == "call" and not self._tracer.idle:
            args = [values[name] for name in names[1:]]
            if code.co_name == "setup_context":
                args = list(args[0])
            elif code.co_flags & inspect.CO_VARARGS:
                args += values[code.co_varnames[code.co_argcount + code.co_kwonlyargcount]]
            if any(callable(given) for given in args):  # a checkpoint: what it runs is seen by itself
                return
            tensors, tape = tensors_in(args), self._tracer.seen.tape
            if any(tape.origin(t) is not None or id(t) in tape.parameters for t in tensors):
                function = type(node)._forward_cls.apply  # type: ignore[attr-defined]  # torch's own
                call = self._taped("between", function, args, {})
                self._inside.append(call)
                self._frames.append((frame, call))
        elif event == "return" and self._frames and self._frames[-1][0] is frame:
            call = self._frames.pop()[1]
            self._inside.remove(call)
            output = values[names[2]] if code.co_name == "setup_context" else value
            self._tracer.seen.tape.add_node(call, node, output, self._follow_scalar)

    def _follow_scalar(self, call: TapedCall, tensor: Tensor) -> None:
        """Take a scalar that an operation of the loop's has put out for a loss."""
        if tensor.ndim == 0:
            call.kind = "loss"
            self._follow_loss(call, tensor)

    def _operation(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation of the loop's own, outside of model and loss."""
        tensors = tensors_in([args, kwargs])
        name = getattr(function, "__name__", "")
        if name in READS:
            past = self._tracer.past
            self._note_reading([ref for t in tensors if (ref := past.origin(t)) is not None])
        tape, graphs = self._tracer.seen.tape, self._graphs
        asked = function is torch.autograd.grad
        by = tensors_in(kwargs.get("inputs", args[1] if len(args) > 1 else ())) if asked else []
        for leaf in by:
            tape.add_asked(leaf, next(self._order))
        if graphs:
            self._note_leaves(tensors)
        origins = [ref for t in tensors if (ref := tape.origin(t)) is not None]
        with_parameters = graphs and name not in READS and any(id(t) in tape.parameters for t in tensors)
        run = functools.partial(self._tracer.moving.run, from_model=tape.origin, number=tape.number)
        if not origins and not with_parameters:
            self._tracer.between.look(name, tensors)
            output = run(function, args, kwargs)
            if self._tracer.stepping is None:
                self._tracer.averages.note(name, args, output, self._tracer.seen)
            return output
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
        if asked and any(t.requires_grad for t in tensors_in(output)):
            shared = any(id(t) in tape.parameters for t in by)
            between.function = gradient_by_weights if shared else gradient_asked_for
        if writes(name) and isinstance(args[0], Tensor):  # what it wrote to is what it has put out
            between.function = on_copy(function)
            if output is None:  # of an assignment to rows
                tape.add(between, [args[0]] if args[0].requires_grad else [])
        checkpointed = self._checkpoint is not None
        if any(t.requires_grad or checkpointed or name in READS for t in tensors_in(output)):
            tape.add(between, output)
        if isinstance(output, Tensor) and output.requires_grad:
            between.of_scalars = form is None and _of_scalars(name, tensors, tape.origin)
        if isinstance(output, Tensor) and output.numel() == 1 and output.requires_grad:
            if form is not None:
                factors = (factor for _, factor in form.operands if factor is not None)
                between.factors, between.of_scalars = tuple(factors), True
                if output.ndim == 0 and any(operand.ndim for operand, _ in form.operands):
                    self._follow_loss(between, output)  # it may have reduced the loss of one sample
            elif name in ADDING_UP and len(origins) == 1 and origins[0].call.of_scalars:
                between.of_scalars = True
                parts = tensors[0].numel()
                between.factors = (Factor(1 / parts, divides=True),) if name == "mean" else ()
            elif output.ndim == 0:  # a loss that the loop itself computes
                between.kind = "loss"
                self._follow_loss(between, output)
        return output

    def _note_leaves(self, tensors: list[Tensor]) -> None:
        """Tape tensors that a loop made to get a gradient, as of features without a graph."""
        tape = self._tracer.seen.tape
        for tensor in tensors:
            leaf = tensor.requires_grad and tensor.is_leaf and tensor.ndim > 1
            known = isinstance(tensor, nn.Parameter) or id(tensor) in tape.parameters
            if leaf and not known and tape.origin(tensor) is None:
                own: dict[int | str, Any] = {0: tensor.detach().clone()}
                tape.add(TapedCall("between", of_the_loop, own, next(self._order)), tensor)

    def note_surrogates(self, given: dict[str, Any]) -> None:
        """Tape outputs that are back-propagated with a gradient of their own: surrogates of a loss."""
        tape = self._tracer.seen.tape
        pairs = [given.get("tensors", given.get("outputs")), given.get("grad_tensors")]
        if pairs[1] is None:
            pairs[1] = given.get("grad_outputs")
        tensors, gradients = ([x] if isinstance(x, Tensor) else list(x or ()) for x in pairs)
        tape.roots += [ref for t in tensors if (ref := tape.origin(t)) is not None]
        for tensor, gradient in zip(tensors, gradients, strict=False):
            if tensor.ndim and gradient is not None and tape.origin(tensor) is not None:
                call = self._taped("loss", surrogate, (tensor, gradient), {})
                call.cotangent, call.backward = torch.ones((), dtype=tensor.dtype), tape.backwards
                tape.add(call, ())

    def _note_reading(self, origins: list[Any]) -> None:
        for ref in origins:
            if ref.call.kind == "loss":
                ref.call.read = True
            elif ref.call.kind == "between":
                self._note_reading(ref.call.refs())


def on_copy(function: Any) -> Any:
    """Return an operation that leaves its first operand as it is, and writes to a copy."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copied = first.clone()
        function(copied, *args, **kwargs)
        return copied

    return run


def _of_scalars(name: str, tensors: list[Tensor], origin: Callable[[Tensor], Any]) -> bool:
    """Whether an operation collects losses in one tensor, or weighs what one holds."""
    alive = [(t, origin(t)) for t in tensors if t.requires_grad]
    if name in STACKING:
        return all(t.numel() == 1 and ref is not None and _a_scalar(ref) for t, ref in alive)
    one = alive[0][1] if len(alive) == 1 else None
    return name in ELEMENTWISE and one is not None and bool(one.call.of_scalars)


def _a_scalar(ref: OutputRef) -> bool:
    of_model = ref.call.kind == "model" and ref.call.outputs[ref.place][0] == ()
    return ref.call.kind == "loss" or ref.call.of_scalars or of_model


def _by_sample(call: TapedCall, losses: list[Tensor]) -> bool:
    """Whether there may be a loss for each sample, and not one for each of several terms."""
    given = [x for x in leaves(call.arguments) if isinstance(x, (Tensor, OutputRef))]
    shapes = [tuple(x.shape) if isinstance(x, Tensor) else x.call.outputs[x.place][0] for x in given]
    return not losses or any(shape[:1] == losses[0].shape[:1] for shape in shapes)


def _made_of(tensors: list[Tensor], scalars: list[Tensor]) -> set[int]:
    """Return the numbers of the scalars that these tensors are made of."""
    wanted = {scalar.grad_fn: n for n, scalar in enumerate(scalars)}
    waiting, seen = [t.grad_fn for t in tensors], set[Any]()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {n for node, n in wanted.items() if node in seen}


class _Operations(TorchFunctionMode):
    """Mode that shows every operation on tensors that the loop asks for."""

    def __init__(self, idle: Callable[[], bool], run: Callable[..., Any]) -> None:
        super().__init__()
        self._idle, self._run = idle, run

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._idle():
            return func(*args, **kwargs)
        return self._run(func, args, kwargs)


PASSING_ON = frozenset(
    function.__code__
    for function in (
        *(_Operations.__torch_function__, TracedCalls._operation),
        *(MovingState.run, MovingState._run_writing),
    )
)
"""The code by which the loop's operations are passed on, with the errors that they raise."""


def operations_unseen() -> ModesOff:
    """Show no operation to any tracer, until the modes are restored."""
    return ModesOff(lambda mode: isinstance(mode, _Operations))


# In a process that is forked from the loop's, as a DataLoader's workers are, nothing is traced.
os.register_at_fork(after_in_child=operations_unseen)
