"""`watch`: audit any training loop from outside."""

import inspect
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from gaccum_exp.audit import result
from gaccum_exp.audit.rerun.sandbox import NamedModules
from gaccum_exp.audit.result import Audit, Check, worst
from gaccum_exp.audit.watch.compiled import original, uncompiled
from gaccum_exp.audit.watch.discovery import (
    LoopFinder,
    is_other_optimizer,
    owner_of,
    stepped_by,
    unwrapped,
)
from gaccum_exp.audit.watch.judge import judge
from gaccum_exp.audit.watch.loop_checks import explained, reported_loss
from gaccum_exp.audit.watch.moving_state import MovingState
from gaccum_exp.audit.watch.tape import Observations, TapedMicroBatch
from gaccum_exp.audit.watch.tracer import LoopTracer
from gaccum_exp.audit.watch.user_functions import calls_reported
from gaccum_exp.audit.watch.window_noise import AskedNoise
from gaccum_exp.core.gradient import Gradient
from gaccum_exp.core.micro_gradients import AdamMetric, adam_metrics
from gaccum_exp.core.module_state import modules_of
from gaccum_exp.core.noise_scale import TRAILING, Noise, Quotient, quotient_of_means, scale_said
from gaccum_exp.core.seeding import random_state_kept

NO_STEP = (
    "no optimizer step was seen: an update that a loop writes out (p -= lr * p.grad) is none: put it "
    "into a torch.optim.Optimizer, or a class with step, zero_grad and param_groups"
)
NO_MODULE = (
    "an optimizer stepped, but no module was called before: give watch the model and the optimizer, "
    "which shows what the loop computes with its parameters (of torch.func's gradients nothing is seen: "
    "put each into .grad by loss.backward())"
)


class Watched:
    """The audits, window by window; other attributes are those of the worst."""

    def __init__(self) -> None:
        self.windows: list[Audit] = []
        """One audit per optimizer step that was judged.

        One that was seen in part is given up for the next: passes came before any call of a module, or
        the function that computes its loss was still to be found.
        """
        self.left_over = 0
        """Backward passes after the last optimizer step of the block."""
        self.nothing = NO_STEP
        """Why no window was judged, if none was."""
        self.noise: list[Noise | str] = []
        """Under `noise`: what each judged window tells of its noise, or why it tells nothing."""
        self.adam_noise: list[Noise] = []
        """The same in the metric of an Adam-like optimizer, of windows in which it had one."""
        self.noise_of: set[frozenset[str]] = set()
        """The parameters, by name, whose gradients told it; of optimizers that step in turn several
        sets, each with a loss of its own."""

    @property
    def worst(self) -> Audit:
        """The audit of the worst window."""
        if self.windows:
            return worst(self.windows)
        if not self.left_over:
            return Audit("inconclusive", 0, "mean", detail=self.nothing)
        return Audit(
            "inconclusive", self.left_over, "mean", cause=result.STALE_OR_MISSING,
            detail=f"{self.left_over} backward passes, and no optimizer step",
            remedy="step where the epoch ends, or use fewer micro-batches per window",
        )  # fmt: skip

    @property
    def noise_scale(self) -> Quotient | None:
        """The gradient noise scale in samples, with its 95 % interval, over the last 64 windows.

        None: no window has told any noise, or its windows are of different parameters: of several losses
        there is no common mean.
        """
        return self._quotient([noise for noise in self.noise if not isinstance(noise, str)])

    @property
    def adam_noise_scale(self) -> Quotient | None:
        """The same in the metric of an Adam-like optimizer, which its first window does not have yet.

        None besides: it is no such optimizer, or there are several.
        """
        return self._quotient(self.adam_noise)

    def _quotient(self, measured: Sequence[Noise]) -> Quotient | None:
        if not measured or len(self.noise_of) > 1:
            return None
        return quotient_of_means(measured[-TRAILING:])

    def take_noise(self, asked: AskedNoise, judged: frozenset[str], audit: Audit) -> None:
        """Add what a window tells of its noise.

        Args:
            asked: what it was asked, and has told.
            judged: the parameters, by name.
            audit: of the window.
        """
        if asked.told is None:
            self.noise.append(f"the window is {audit.verdict}: {audit.detail}")
            return
        self.noise.append(asked.told)
        self.noise_of.add(judged)
        if asked.adam is not None:
            self.adam_noise.append(asked.adam)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The faults outside the gradient, of all windows, each once."""
        return tuple({c.name: c for audit in self.windows for c in audit.checks}.values())

    @property
    def sound(self) -> bool:
        """Whether every window was the large batch's, up to rounding, and no check found a fault."""
        return bool(self.windows) and all(audit.sound for audit in self.windows)

    def __getattr__(self, name: str) -> Any:
        if hasattr(Audit, name) and not name.startswith("__"):
            return getattr(self.worst, name)
        raise AttributeError(name)

    def __str__(self) -> str:
        left, said = self.left_over, self.worst.report()
        if self.noise:
            said = f"{said}\n{self.noise_said}"
        if not left or not self.windows:
            return said
        passes = f"{left} backward pass{'es' if left > 1 else ''}"
        return f"{said}\nleft over: {passes} after the last step: step on what is left, or zero it"

    @property
    def noise_windows(self) -> int:
        """The number of windows that have told a noise scale."""
        return sum(not isinstance(noise, str) for noise in self.noise)

    @property
    def noise_said(self) -> str:
        """The noise scale in words, in the metric of an Adam-like optimizer where there is one."""
        if len(self.noise_of) > 1:
            return (
                "noise scale: not measured: the optimizers step in turn, each with a loss of its own: "
                "watch each of them alone"
            )
        scale, of_adam = self.noise_scale, self.adam_noise_scale
        if scale is None:
            reasons = [noise for noise in self.noise if isinstance(noise, str)]
            return f"noise scale: not measured: {reasons[0] if reasons else 'no window was judged'}"
        if of_adam is not None:
            return scale_said(of_adam, min(len(self.adam_noise), TRAILING), in_adam_metric=True)
        return scale_said(scale, min(self.noise_windows, TRAILING))

    def __repr__(self) -> str:
        return repr(self.worst)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


class watch:  # noqa: N801  # used as a function
    """Watch a training loop, and judge the gradient of every optimizer step in the block.

        with watch() as audit:
            my_training_step()
        print(audit.verdict, audit.cause, audit.remedy)

    The loop runs once, in its own precision, and ends as it would have unwatched, bit for bit.
    Judging a window costs about a dozen further passes over its samples, on copies of the weights.

    Without arguments it finds what the loop trains: the optimizers that there are or that are made in
    the block, and the module that holds what they step. Losses of `torch.nn`, of `torch.nn.functional`,
    of the model's own and of the loop's own arithmetic are seen as they are called.

    Args:
        model: the module that the loop calls, wrapped or not; None, with the optimizer: they are found.
        criterion: a module or function that the loop calls on the model's outputs; a function that
            calls the model itself (`lit.training_step`, a `compute_loss(model, batch)`); or None: a loss
            of torch's, arithmetic of the loop's, or the model's own `loss`.
        optimizer: whose `step` ends a window, wrapped or not; or several (an iterable, or a mapping's
            values). Those that step one after the other take one window; where passes lie between their
            steps (a GAN), each takes its own, and its own parameters are judged.
        steps: which optimizer steps of the block to judge, the first being 0; None: all. A loss that
            mixes samples is found in the first of them, and judged in the next: name one more
            (`range(2)` for one window), or give its function as `criterion`.
        batch_dim: the dimension of the model's inputs that counts samples; None: that on which the
            shapes of inputs, outputs and targets agree.
        also: what the loop uses and nothing shows: modules, tensors, objects that hold tensors (a
            teacher in compiled code, an average of the weights). What moves there is found, too.
        noise: whether to measure the gradient noise scale too, from the micro gradients of the windows
            that are judged, run again: `audit.noise_scale`, with an Adam-like optimizer
            `audit.adam_noise_scale`, and a line of the report. Of several optimizers only where they
            take one window.

    Raises:
        TypeError: there is a model and no optimizer, or the other way round.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        criterion: nn.Module | Callable[..., Any] | None = None,
        optimizer: Optimizer | Iterable[Optimizer] | Mapping[Any, Optimizer] | None = None,
        *,
        steps: Container[int] | None = None,
        batch_dim: int | None = None,
        also: Sequence[Any] = (),
        noise: bool = False,
    ) -> None:
        if model is None and optimizer is not None:
            raise TypeError(
                "watch needs the model too, or neither model nor optimizer: they are found then"
            )
        self._criterion, self._also = original(unwrapped(criterion)), also
        self._judged, self._dim, self._noise = steps, batch_dim, noise
        self._global_step = 0
        self._found_loss = False
        """Whether the function that computes the loss was found, and is to be followed from now on."""
        self._seen_in_part: tuple[int, frozenset[str]] | None = None
        """A window that has only shown how to follow the loop: its place among the audits, and what was
        judged. The next one of the same parameters is put there."""
        self._watched = Watched()
        self._unreported: list[TapedMicroBatch] = []
        self._stack, self._trace = ExitStack(), ExitStack()
        self._followed = set[type]()
        """Classes of optimizers that are none of torch's."""
        self._finder: LoopFinder | None = None
        self._tracer: LoopTracer | None = None
        if model is None:
            self._finder = LoopFinder(self._found, self._made)
        else:
            self._tracer = self._tracer_of(unwrapped(model), _optimizers(optimizer))

    def __enter__(self) -> Watched:
        for handle in (
            register_optimizer_step_pre_hook(uncompiled(self._before_step)),
            register_optimizer_step_post_hook(uncompiled(self._after_step)),
        ):
            self._stack.callback(handle.remove)
        if self._finder is not None:
            self._stack.enter_context(self._finder())
        self._stack.push(lambda *error: self._end_trace(*error))
        if self._tracer is not None:
            self._trace.enter_context(self._tracer())
        return self._watched

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)  # which may judge a last window
        self._close_reports()

    def _tracer_of(self, model: nn.Module, optimizers: Sequence[Any]) -> LoopTracer:
        self._model = model
        self._follow_others(optimizers)
        stepped = stepped_by(optimizers)
        self._modules = NamedModules(model, *modules_of(self._criterion), compared=stepped)
        moving = MovingState(self._modules, self._also, self._criterion)
        return LoopTracer(model, self._criterion, optimizers, self._modules, self._reached, moving)

    def _follow_others(self, optimizers: Sequence[Any]) -> None:
        """See the steps of optimizers that are none of torch's, and call no hooks."""
        for kind in {type(o) for o in optimizers if is_other_optimizer(o)} - self._followed:
            self._followed.add(kind)
            code = inspect.unwrap(kind.step).__code__
            self._stack.enter_context(calls_reported({code: self._on_step}, {}))

    def _on_step(self, event: str, frame: FrameType, value: Any) -> None:
        names = frame.f_code.co_varnames[: frame.f_code.co_argcount]
        optimizer = frame.f_locals.get(names[0]) if names else None
        if not is_other_optimizer(optimizer):
            return
        if event == "call":
            self._before_step(optimizer, (optimizer,), {})
        else:
            self._after_step(optimizer, (optimizer,), {})

    def _end_trace(self, *error: Any) -> None:
        if self._tracer is not None:
            self._trace.__exit__(*error)
            self._watched.left_over = self._tracer.seen.tape.backwards
            self._tracer = None

    def _found(
        self, called: nn.Module | None, optimizers: Sequence[Any], frame: FrameType | None = None
    ) -> None:
        """Trace what was found, from the call of a module on that has begun."""
        model = owner_of(stepped_by(optimizers), called)
        if model is None:
            self._watched.nothing = (
                "what the optimizer steps belongs to no module: hold it in one (nn.ParameterList), "
                "whose parameters the loop computes with; of copies of a model's weights (in float32, "
                "or by torch.func) give watch the model, and the optimizer whose step is to be judged"
            )
            return
        self._tracer = self._tracer_of(model, optimizers)
        if self._finder is not None and not self._global_step:
            self._tracer.seen.passes_unseen = self._finder.passes_unseen
        self._trace = ExitStack()
        self._trace.enter_context(self._tracer())
        if frame is not None:
            self._tracer.meet(frame)

    def _made(self, optimizer: Any) -> None:
        """Find anew what is trained where an optimizer has come that steps something else, too."""
        if self._finder is not None and self._tracer is not None and not self._tracer.judging:
            traced = {id(p) for p in self._tracer.parameters}
            if any(id(p) not in traced for p in stepped_by([optimizer])):
                self._end_trace(None, None, None)
                self._finder.wait()

    def _before_step(self, optimizer: Any, args: Any, kwargs: Any) -> Any:
        finder = self._finder
        if finder is not None:
            if finder.elsewhere:
                return None
            if not finder.learn(optimizer):
                self._made(optimizer)
            # The passes of a closure are still to come.
            if self._tracer is None and (len(args) > 1 or kwargs.get("closure") is not None):
                finder.wait_no_longer()
                self._found(None, finder.optimizers)
            if self._tracer is None and self._watched.nothing is NO_STEP:
                self._watched.nothing = NO_MODULE
        return None if self._tracer is None else self._tracer.before_step(optimizer, args, kwargs)

    def _after_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if self._tracer is not None:
            self._tracer.after_step(optimizer)
            if self._found_loss and self._tracer.stepping is None:
                self._trace_anew(self._tracer.optimizers)

    def _trace_anew(self, optimizers: Sequence[Any]) -> None:
        """Follow the loss function that was found, from the next window on."""
        self._found_loss = False
        self._end_trace(None, None, None)
        self._tracer = self._tracer_of(self._model, optimizers)
        self._trace = ExitStack()
        self._trace.enter_context(self._tracer())

    def _due(self, seen: Observations) -> bool:
        """Whether a window is to be judged."""
        return self._judged is None or self._global_step - 1 in self._judged

    def _reached(self, seen: Observations, gradient: Gradient) -> None:
        if not seen.evaluation:
            self._global_step += 1
        self._close_reports()
        if not self._due(seen):
            return
        judged = seen.stepped - seen.carried
        modules, windows = self._modules, self._watched.windows
        if judged != modules.compared:
            parameters = modules.parameters()
            chosen = [parameters[name] for name in judged]
            modules = NamedModules(self._model, *self._modules.others, compared=chosen)
        with random_state_kept(), _as_in_the_passes(seen.weights, gradient, modules):
            if judged:
                here = {name: g for name, g in gradient.items() if name in judged}
                # Of a closure the first evaluation: the weights move from one to the next.
                noise = AskedNoise(self._metrics()) if self._noise and not seen.evaluation else None
                audit = explained(judge(seen, here, modules, self._dim, noise), seen)
                if noise is not None:
                    self._watched.take_noise(noise, frozenset(judged), audit)
                if seen.evaluation:  # of the step's evaluations the worst stands for it
                    numbered = audit.noting(f"at evaluation {seen.evaluation + 1} of the step's closure")
                    windows.append(worst([windows.pop(), numbered]))
                else:
                    self._add(
                        audit, frozenset(judged), in_part=seen.passes_unseen or self._finds_loss(seen)
                    )
            if seen.carried:
                why = (
                    f"{len(seen.carried)} parameters hold gradients from before another optimizer's "
                    "step: if they are meant for this step, watch its optimizer alone; else call "
                    f"zero_grad before its first backward pass{seen.places.at('backward')}"
                )
                windows.append(Audit("inconclusive", len(seen.tape.micro_batches()), "mean", detail=why))
        self._unreported = seen.tape.micro_batches()
        if self._finds_loss(seen):
            self._criterion, self._found_loss = seen.loss_function, True

    def _metrics(self) -> dict[str, AdamMetric]:
        """Return the optimizer's metric before its step; of several one may have stepped already."""
        assert self._tracer is not None
        optimizers = self._tracer.optimizers
        metrics = adam_metrics(optimizers[0]) if len(optimizers) == 1 else {}
        return {name: metrics[p] for name, p in self._modules.parameters().items() if p in metrics}

    def _finds_loss(self, seen: Observations) -> bool:
        return self._criterion is None and seen.loss_function is not None

    def _add(self, audit: Audit, judged: frozenset[str], *, in_part: bool) -> None:
        """Add a window's audit, or put it in the place of one that was seen in part."""
        windows, before = self._watched.windows, self._seen_in_part
        if before is not None and before[1] == judged:
            windows[before[0]], self._seen_in_part = audit, None
        else:
            windows.append(audit)
            if in_part and audit.verdict == "inconclusive":
                self._seen_in_part = len(windows) - 1, judged

    def _close_reports(self) -> None:
        # A loop reports a window's loss after its step: until the next one, it may still be read.
        found = reported_loss(self._unreported)
        self._unreported = []
        if found is not None:
            last = self._watched.windows[-1]
            self._watched.windows[-1] = replace(last, checks=(*last.checks, found))


def _optimizers(given: Any) -> list[Any]:
    several = given.values() if isinstance(given, Mapping) else given
    one = hasattr(given, "param_groups") or not isinstance(several, Iterable)
    found = [unwrapped(optimizer) for optimizer in ([given] if one else several)]
    wrong = [type(each).__name__ for each in found if not hasattr(each, "param_groups")]
    if wrong or not found:
        raise TypeError(f"watch needs a torch optimizer, or several, not {(wrong or ['none'])[0]}")
    return found


@contextmanager
def _as_in_the_passes(
    then: Mapping[str, Tensor], gradient: Gradient, modules: NamedModules
) -> Iterator[None]:
    """Give parameters the values that they had in the passes, for the length of a block."""
    parameters = modules.parameters()
    now = {name: parameters[name].data for name in then}
    frozen = [p for name, p in parameters.items() if name in gradient and not p.requires_grad]
    for parameter in frozen:  # since the passes, as where a loop toggles its optimizers
        parameter.requires_grad_(True)
    for name, weights in then.items():
        parameters[name].data = weights
    try:
        yield
    finally:
        for name, weights in now.items():
            parameters[name].data = weights
        for parameter in frozen:
            parameter.requires_grad_(False)
