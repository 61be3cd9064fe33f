"""One window, run again: what describes a pass over it, and the runs that such a description gives."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gaccum_exp.audit.rerun.random_replay import Draws, DrawsAre, Replay
from gaccum_exp.audit.rerun.sandbox import NamedModules, sandbox
from gaccum_exp.core.dtypes import in_precision
from gaccum_exp.core.gradient import Gradient, add, gradient_of
from gaccum_exp.core.modes import eagerly
from gaccum_exp.core.module_calls import ModuleCall, ModuleTracer
from gaccum_exp.core.module_state import ObjectState
from gaccum_exp.core.nesting import mapped
from gaccum_exp.core.seeding import random_state_kept, random_states, same_host_state, set_random_states
from gaccum_exp.memory.available import SavedForBackward, announce, needed_bytes, require_memory

T = TypeVar("T")
ForwardContext = Callable[[int | None], AbstractContextManager[None]]
"""Returns what is entered for the forward pass of the micro-batch of this number, which may come twice;
None: for the loss alone, over the outputs of all micro-batches."""
Cast = Callable[[Any], Any]
"""Brings a batch into the precision and onto the device of a pass."""


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """A way to take a window's samples forward and backward."""

    float64: bool = False
    """In float64 throughout; else in the window's own precision."""
    at_once: bool = False
    """All samples in one pass; else in the window's micro-batches."""
    order: Tensor | None = None
    """Of the samples of one pass; None: as they come."""
    draws: DrawsAre = "replayed"
    """The random numbers: recorded, replayed from the recording, or each replaced by a constant."""
    state_held_of: Sequence[nn.Module] = ()
    """Modules whose state is set back before the forward pass of each micro-batch."""
    weights_moved: int = 0
    """Seed of what is added to the weights, to see the same samples at other weights; 0: nothing."""
    summed_in_float64: bool = False
    """Each micro gradient is taken off and added in float64, whatever the passes run in."""


RECORDING = Pass(draws="recorded")
ACCUMULATED, ACCUMULATED64 = Pass(), Pass(float64=True)
ONE_PASS, ONE_PASS64 = Pass(at_once=True), Pass(at_once=True, float64=True)


class RerunnableWindow(Protocol):
    """A window that can be run again. What it runs finds its tensors exchanged for copies."""

    sizes: list[int]
    """Samples of each micro-batch."""
    modules: NamedModules
    """Everything with parameters or buffers that it uses."""
    moves: dict[str, int]
    """How often the state of a module of this type was seen to move in the window."""
    moved_beside: list[tuple[Any, list[Any]]]
    """What moved beside model and loss, a module or the name of a type, or what mixes samples there
    (`Mixing`), and what to hold for it."""

    def accumulate(self, context: ForwardContext, cast: Cast) -> None:
        """Run all micro-batches forward and backward."""

    def one_pass(self, context: AbstractContextManager[None], cast: Cast, order: Tensor | None) -> None:
        """Run all samples at once forward and backward, in this order."""

    def forward(self, index: int | None, cast: Cast) -> tuple[Tensor, Any]:
        """Run one micro-batch, or all samples (None), forward: loss sum and denominator."""

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the micro-batches' losses and gradients make those of all samples."""

    def recounted(self, counts: Sequence[float]) -> "RerunnableWindow | None":
        """Return the window with its micro-batches weighed by these counts; None: they are already."""

    def holding(self, owners: Sequence[Any] | None) -> "RerunnableWindow":
        """Return the window with the state of these owners (None: all) held still between passes."""

    def padded_alone(self) -> "RerunnableWindow | None":
        """Return the window with each micro-batch padded as in the one pass; None: it pads none."""

    def with_first_values(self) -> "RerunnableWindow | None":
        """Return the window with the first micro-batch's value of all that differs; None: none does.

        One pass has one value only: a number that goes up (`batch_idx`) does not matter where the
        gradient is the same with the first.
        """

    @property
    def differing(self) -> Sequence[str]:
        """Names of values that belong to no sample, and differ between micro-batches."""


@dataclass(frozen=True, slots=True, eq=False)
class Rerun:
    """The runs of one window, all from one random state.

    Every run that takes the samples at once may raise TooLargeError, before it begins.
    """

    window: RerunnableWindow
    device: torch.device | None = None
    """Where to run it; None: where its tensors are."""
    starts: Sequence[list[Any]] = field(default_factory=lambda: [random_states()])
    """The random states in which its first micro-batches began, one at least."""
    draws: Draws = field(default_factory=Draws)
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered for every run: puts the state in place that the window began with."""
    hooks: bool = True
    """Whether the hooks on parameters, which change gradients, are a part of the model."""
    frozen: Sequence[nn.Module] = ()
    """Modules that run as in evaluation: batch statistics are those that were collected."""
    held: Sequence[nn.Module] = ()
    """Modules whose state is set back before each micro-batch, in every run."""
    saved: SavedForBackward = field(default_factory=SavedForBackward)
    """Of the forward passes of all micro-batches, in the window's own precision."""
    ends: dict[int, list[Any]] = field(default_factory=dict)
    """The random states after each micro-batch's pass, where its draws were recorded."""

    def gradient(self, how: Pass, *, held: int = 0) -> Gradient:
        """Return the window's gradient; RECORDING has to come before any other.

        Beside it, `held` gradients in the same precision need memory too.
        """
        if how.at_once:
            tensors: list[Tensor] = list(self.window.modules.parameters().values())
            needed = needed_bytes(tensors, self.saved.bytes, float64=how.float64, held=held)
            precision = " in float64" if how.float64 else ""
            what = f"one pass over {sum(self.window.sizes)} samples{precision}"
            require_memory(needed, self._device, what)
            with self._running(how) as (replay, parameters):
                self.window.one_pass(replay.whole(how.order), self._cast(how), how.order)
                return self._taken(parameters)
        if not how.summed_in_float64:
            taken = self._accumulated(how, lambda gradient: gradient, apart=False)[0]
            if how is RECORDING:  # what it has saved tells what the passes after it will need
                tensors = list(self.window.modules.parameters().values())
                needed = needed_bytes(tensors, self.saved.bytes, float64=True, held=2)
                announce(needed, self._device, f"an audit of {sum(self.window.sizes)} samples")
            return taken
        total: Gradient = {}
        self._accumulated(how, lambda micro: add(total, micro), apart=True)
        return total

    def micro_gradients(self, how: Pass, keep: Callable[[Gradient], T]) -> list[T]:
        """Return what `keep` makes of each micro-batch's own gradient, one by one."""
        return self._accumulated(how, keep, apart=True)

    def forward(
        self, how: Pass, index: int | None, see: Callable[[ModuleCall], None] | None = None
    ) -> tuple[float, float]:
        """Run one micro-batch, or all samples (None), forward; return loss sum and denominator.

        `see` gets each call of a module. Whether a graph is made is the caller's mode.
        """
        graph = torch.is_grad_enabled()
        with self._running(how, see) as (replay, _), torch.set_grad_enabled(graph):
            context = replay.whole(None) if index is None else replay.micro_batch(index)
            with context:
                loss, denominator = self.window.forward(index, self._cast(how))
        return float(loss.detach()), float(denominator)

    def _accumulated(self, how: Pass, keep: Callable[[Gradient], T], *, apart: bool) -> list[T]:
        """Accumulate; give `keep` the window's gradient, or each micro-batch's own (`apart`)."""
        recording, taken = how.draws == "recorded", dict[int, T]()
        with self._running(how) as (replay, parameters):
            stepped = {id(parameters[name]) for name in self.window.modules.compared}
            states = [ObjectState(module, stepped) for module in (*self.held, *how.state_held_of)]

            @contextmanager
            def context(index: int | None) -> Iterator[None]:
                if index is None:
                    with replay.loss_of_outputs():
                        yield
                    return
                if apart and index > 0:  # of one that comes twice, the second time's is kept
                    taken[index - 1] = keep(self._taken(parameters))
                for state in states:
                    state.put_back()
                if not recording:
                    # torch's draws are replayed; Python's and NumPy's begin anew in each pass.
                    set_random_states(self.starts[0])
                elif index < len(self.starts):
                    set_random_states(self.starts[index])
                before = random_states() if recording else None
                saved = self.saved.counted(parameters.values()) if recording else nullcontext()
                with replay.micro_batch(index), saved:
                    yield
                if before is None:
                    return
                self.ends[index] = random_states()
                if not same_host_state(before, self.ends[index]):
                    self.draws.refuse("numbers come from Python's or NumPy's generator", foreign=True)

            self.window.accumulate(context, self._cast(how))
            taken[len(self.window.sizes) - 1] = keep(self._taken(parameters))
        return list(taken.values())

    @property
    def _device(self) -> torch.device:
        parameters = self.window.modules.parameters().values()
        return self.device or next((p.device for p in parameters), torch.device("cpu"))

    def _cast(self, how: Pass) -> Cast:
        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dtype = in_precision(value.dtype, torch.float64 if how.float64 else None)
            # A copy each time, for a model may write to its inputs.
            copied = value.detach().to(self.device or value.device, dtype, copy=True)
            return copied.requires_grad_(value.requires_grad)

        return partial(mapped, leaf)

    def _taken(self, parameters: dict[str, nn.Parameter]) -> Gradient:
        compared = self.window.modules.compared
        return {name: g for name, g in gradient_of(parameters).items() if name in compared}

    @contextmanager
    def _running(
        self, how: Pass, see: Callable[[ModuleCall], None] | None = None
    ) -> Iterator[tuple[Replay, dict[str, nn.Parameter]]]:
        modules, dtype = self.window.modules, torch.float64 if how.float64 else None
        tracer = ModuleTracer(modules.by_name, see)
        replay = Replay(self.draws, self.window.sizes, tracer, how.draws, float64=how.float64)
        default = torch.get_default_dtype()
        # Written out, so that its dropout is an operator; the fused kernel draws inside itself.
        attention = sdpa_kernel(SDPBackend.MATH) if torch.accelerator.is_available() else nullcontext()
        outermost = not torch.is_autocast_enabled(self._device.type)
        why = "numbers come from a generator of the model's own"
        drawn = partial(self.draws.refuse, why, foreign=True)
        copies = sandbox(modules, dtype=dtype, device=self.device, drawn=drawn, hooks=self.hooks)
        with random_state_kept(), self.around(), copies as parameters:
            for module in self.frozen:  # which the sandbox puts back
                module.training = False
            set_random_states(self.starts[0])
            if how.weights_moved:
                _move(parameters.values(), how.weights_moved)
            torch.set_default_dtype(dtype or default)
            try:
                with torch.enable_grad(), eagerly(), tracer(), replay, attention:
                    yield replay, parameters
            finally:
                torch.set_default_dtype(default)
                if outermost:  # inside the loop's own autocast the cache is the loop's
                    torch.clear_autocast_cache()


def _move(parameters: Iterable[nn.Parameter], seed: int) -> None:
    """Add random numbers to weights, a tenth of their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            size = float(parameter.abs().mean()) if parameter.numel() else 0.0
            parameter.add_(drawn.to(parameter.device) * (0.1 * size + 1e-3))
