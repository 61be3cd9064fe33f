"""One window, run again and again: accumulated and in one pass, in its own precision and in float64."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from gaccum_exp.audit.causes.batch_mixing import Call, Follower, Mixing
from gaccum_exp.audit.rerun.random_replay import Draws, Replay
from gaccum_exp.audit.rerun.samples import mapped
from gaccum_exp.audit.rerun.sandbox import Parts, on_bench
from gaccum_exp.core.gradient import Gradient, add, gradient_of
from gaccum_exp.core.modes import eagerly
from gaccum_exp.core.seeding import (
    random_state_kept,
    random_states,
    same_host_state,
    set_random_states,
)
from gaccum_exp.memory.available import Saved, needed_bytes, require

T = TypeVar("T")
Around = Callable[[int], AbstractContextManager[None]]
"""Entered around the forward pass of one micro-batch."""


class Window(Protocol):
    """A window that can be run again. What it runs finds its tensors on the bench."""

    sizes: list[int]
    """Samples of each micro-batch."""
    parts: Parts
    """Everything with parameters or buffers that it uses."""

    def accumulate(self, around: Around, lift: Callable[[Any], Any]) -> None:
        """Run all micro-batches forward and backward; `lift` brings a batch into the precision asked."""

    def one_pass(
        self, around: AbstractContextManager[None], lift: Callable[[Any], Any], order: Tensor | None
    ) -> None:
        """Run all samples at once forward and backward, in this order."""

    def forward(self, index: int | None, lift: Callable[[Any], Any]) -> tuple[Tensor, Any]:
        """Run one micro-batch, or all samples (None), forward: loss sum and denominator."""

    def additive(self, parts: Sequence[tuple[float, Any]], whole: tuple[float, Any]) -> bool:
        """Whether the micro-batches' losses and gradients make those of all samples."""

    def recounted(self, counts: Sequence[float]) -> "Window | None":
        """Return the window with each micro-batch weighed by what it counts; None: it is so already."""


class Trial:
    """The runs of one window, from one random state.

    Args:
        window: what is run.
        starts: the random state in which each micro-batch began; None: each where the one before ended,
            the first where the generators stand now.
        device: where to run it; None: where its tensors are.

    Every method may raise TooLargeError, before it begins.
    """

    def __init__(
        self,
        window: Window,
        starts: Sequence[list[Any]] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.window = window
        self._device = device
        self._saved = Saved()
        self._starts = starts
        self._begin = starts[0] if starts else random_states()
        self.draws = Draws(window.sizes)

    def record(self) -> Gradient:
        """Accumulate in the window's own precision, recording what is drawn."""
        return self._accumulated(record=True, float64=False)

    def accumulated(self, *, float64: bool, apart: bool = False) -> Gradient:
        """Accumulate with the recorded draws.

        Args:
            float64: in float64 throughout.
            apart: take each micro gradient off and add them up in float64, whatever the passes run in.
        """
        return self._accumulated(record=False, float64=float64, apart=apart)

    def one_pass(self, *, float64: bool, order: Tensor | None = None, beside: int = 0) -> Gradient:
        """Take all samples at once, with each one's recorded draws.

        Args:
            float64: in float64 throughout.
            order: of the samples; None: as they come.
            beside: gradients in the same precision that will be held beside it: there must be room.
        """
        self._require_room(float64, beside)
        with self._running(record=False, float64=float64) as (replay, follower, parameters):
            follower.begin()
            self.window.one_pass(replay.whole(order), self._lift(float64), order)
            return self._gradient(parameters)

    def forgetting(self, modules: Sequence[nn.Module]) -> Gradient:
        """Accumulate in float64 with the buffers of some modules set back before every pass."""
        return self._accumulated(record=False, float64=True, forgetting=modules)

    def micro_gradients(self, keep: Callable[[Gradient], T]) -> list[T]:
        """Return what `keep` makes of each micro-batch's own gradient, one by one, in float64."""
        return self._each(keep, record=False, float64=True, apart=True)

    def of(self, window: Window) -> Gradient:
        """Accumulate another window of the same samples in float64, with the same draws."""
        mine, self.window = self.window, window
        try:
            return self.accumulated(float64=True)
        finally:
            self.window = mine

    def loss_of_all(self) -> tuple[float, float]:
        """Return loss sum and denominator of all samples, in float64."""
        return self._forward(None, None)

    def losses(self) -> tuple[list[tuple[float, float]], tuple[float, float], list[str]]:
        """Run forward in float64, comparing every module's output.

        Returns:
            Loss sum and denominator of each micro-batch; those of all samples at once; the names of the
            modules that mix samples.
        """
        mixing = Mixing(self.window.sizes)
        self._forward(0, mixing.see_shapes)
        whole = self._forward(None, mixing.see_whole)
        parts = []
        for index in range(len(self.window.sizes)):
            mixing.begin_part(index)
            parts.append(self._forward(index, mixing.see_part))
        return parts, whole, mixing.culprits()

    def _forward(self, index: int | None, see: Callable[[Call], None] | None) -> tuple[float, float]:
        running = self._running(record=False, float64=True, see=see)
        with running as (replay, follower, _), torch.no_grad():
            follower.begin()
            with replay.whole(None) if index is None else replay.micro_batch(index):
                loss, denominator = self.window.forward(index, self._lift(True))
        return float(loss), float(denominator)

    def _accumulated(
        self,
        *,
        record: bool,
        float64: bool,
        apart: bool = False,
        forgetting: Sequence[nn.Module] = (),
    ) -> Gradient:
        if not apart:
            return self._each(
                lambda whole: whole, record=record, float64=float64, forgetting=forgetting
            )[0]
        total: Gradient = {}
        self._each(
            lambda micro: add(total, micro),
            record=record,
            float64=float64,
            forgetting=forgetting,
            apart=True,
        )
        return total

    def _each(
        self,
        keep: Callable[[Gradient], T],
        *,
        record: bool,
        float64: bool,
        apart: bool = False,
        forgetting: Sequence[nn.Module] = (),
    ) -> list[T]:
        """Accumulate; hand the gradient to `keep`, or each micro-batch's apart."""
        running = self._running(record=record, float64=float64)
        taken: list[T] = []
        with running as (replay, follower, parameters):
            buffers = [b for m in forgetting for b in m._buffers.values() if b is not None]
            states = [(buffer, buffer.clone()) for buffer in buffers]

            @contextmanager
            def around(index: int) -> Iterator[None]:
                if apart and index > 0:
                    taken.append(keep(self._gradient(parameters)))
                for buffer, state in states:
                    buffer.copy_(state)
                follower.begin()
                # Held numbers do not come from a generator; Python's and NumPy's begin anew each pass.
                if self._starts is not None and record:
                    set_random_states(self._starts[index])
                elif not record:
                    set_random_states(self._begin)
                before = random_states() if record else None
                saved = self._saved.counted(parameters.values()) if record else nullcontext()
                with replay.micro_batch(index), saved:
                    yield
                if before is not None and not same_host_state(before, random_states()):
                    why = "numbers come from Python's or NumPy's generator"
                    self.draws.refuse(why, None, foreign=True)

            self.window.accumulate(around, self._lift(float64))
            taken.append(keep(self._gradient(parameters)))
        return taken

    def _kind(self) -> str:
        parameters = self.window.parts.parameters().values()
        return (self._device or next((p.device for p in parameters), torch.device("cpu"))).type

    def _require_room(self, float64: bool, beside: int) -> None:
        parameters: list[Tensor] = list(self.window.parts.parameters().values())
        device = self._device or torch.device(self._kind())
        what = f"one pass over {sum(self.window.sizes)} samples{' in float64' if float64 else ''}"
        needed = needed_bytes(parameters, self._saved.bytes, float64=float64, beside=beside)
        require(needed, device, what)

    def _lift(self, float64: bool) -> Callable[[Any], Any]:
        def leaf(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            dtype = torch.float64 if float64 and value.is_floating_point() else value.dtype
            return value.to(self._device or value.device, dtype)

        moves = float64 or self._device is not None
        return (lambda batch: mapped(leaf, batch)) if moves else (lambda batch: batch)

    def _gradient(self, parameters: dict[str, nn.Parameter]) -> Gradient:
        judged = self.window.parts.judged
        return {k: g for k, g in gradient_of(parameters).items() if judged is None or k in judged}

    @contextmanager
    def _running(
        self, *, record: bool, float64: bool, see: Callable[[Call], None] | None = None
    ) -> Iterator[tuple[Replay, Follower, dict[str, nn.Parameter]]]:
        replay = Replay(self.draws, record=record, float64=float64)

        def enter(name: str | None) -> None:
            replay.module = name

        follower = Follower(self.window.parts, see, enter)
        dtype = torch.float64 if float64 else None
        default = torch.get_default_dtype()
        outermost = not torch.is_autocast_enabled(self._kind())

        def moved() -> None:
            self.draws.refuse("numbers come from a generator of the model's own", None, foreign=True)

        bench = on_bench(self.window.parts, dtype=dtype, device=self._device, moved=moved)
        with random_state_kept(), bench as parameters:
            set_random_states(self._begin)
            torch.set_default_dtype(torch.float64 if float64 else default)
            try:
                with torch.enable_grad(), eagerly(), follower(), replay, _math_attention():
                    yield replay, follower, parameters
            finally:
                torch.set_default_dtype(default)
                if outermost:  # else the loop's own cache is in it, which is the loop's affair
                    torch.clear_autocast_cache()


def _math_attention() -> AbstractContextManager[Any]:
    """Fused attention draws inside itself; written out, its dropout is an operator like any other."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if torch.accelerator.is_available() else nullcontext()
