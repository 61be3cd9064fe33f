"""AdamA: every micro gradient goes into Adam's moments as it comes, and is dropped."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gaccum_exp.core.dtypes import reals
from gaccum_exp.core.losses.protocol import Denominator
from gaccum_exp.core.strategies import AccumulatorState, InPlace, require_dense
from gaccum_exp.errors import BadInputError

UNKNOWN = ("amsgrad", "maximize", "capturable", "differentiable", "fused")
"""Options of torch's Adam that the step here does not have."""


class AdamA(InPlace):
    """Adds micro gradients up in Adam's moments, so that no gradient of a window is ever held.

    With sᵢ what micro-batch i adds to the window's gradient s = Σsᵢ, a step of Adam and one of AdamA are

        m ← β₁m + (1 − β₁) Σsᵢ      v ← β₂v + (1 − β₂) (Σsᵢ)²       Adam, after the window
        m ← β₁m + (1 − β₁) Σsᵢ      v ← β₂v + (1 − β₂) Σsᵢ²         AdamA, micro-batch by micro-batch

    and θ ← θ − η·m̂/(√v̂ + ε) by both, with weight decay as AdamW has it. It is another optimizer, for the
    square of a sum is no sum of squares: without noise its steps are √N times as long, with nothing but
    noise as long as Adam's. With N = 1 it is Adam, bit for bit as torch takes it parameter by parameter.
    (Zhang et al. 2023, arXiv 2305.19982, who report up to 23 % less memory than accumulation.)

        strategy = AdamA().for_optimizer(optimizer)
        accumulate_gradients(model, loss_fn, window, strategy=strategy)
        strategy.step_of(optimizer)()

    What has gone into the moments cannot be taken out: no norm of the window's gradient, no clipping by
    it, no GradScaler, no second try of a window. The moments are the optimizer's own state, from which
    plain Adam goes on too.
    """

    name: ClassVar[str] = "adam_a"
    leaves_gradient: ClassVar[bool] = False
    remedy: ClassVar[str] = (
        "AdamA adds up the squares of micro gradients, and Adam squares their sum: strategy=in_place "
        "takes the large batch's step; as an optimizer of its own it needs an optimizer.lr of its own"
    )
    """What is said where its step is not the large batch's."""

    def __init__(self) -> None:
        self._optimizer: torch.optim.Optimizer | None = None
        self._groups: dict[nn.Parameter, dict[str, Any]] = {}
        self._ended: AccumulatorState | None = None
        """Of the window whose step is to be taken; None: nothing counted, or there was none."""

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer whose moments take the gradients.

        Raises:
            BadInputError: there is none yet.
        """
        if self._optimizer is None:
            raise BadInputError(
                f"strategy={self.name} adds gradients up in an optimizer's moments: give accumulation "
                f"{type(self).__name__}().for_optimizer(optimizer)"
            )
        return self._optimizer

    def for_optimizer(self, optimizer: torch.optim.Optimizer) -> "AdamA":
        """Return the same for the moments of this optimizer.

        Raises:
            BadInputError: it is not torch's Adam or AdamW, or does what the step here does not.
        """
        kind = type(optimizer)
        if kind not in (torch.optim.Adam, torch.optim.AdamW):
            raise BadInputError(
                f"strategy={self.name} needs torch.optim.Adam or AdamW, whose moments it knows, and the "
                f"optimizer is {kind.__name__}: use optimizer=adamw, or strategy=in_place"
            )
        for group in optimizer.param_groups:
            asked = next((key for key in UNKNOWN if group.get(key)), None)
            if asked is not None:
                raise BadInputError(
                    f"optimizer.{asked}=true: strategy={self.name} takes the step itself, without that"
                )
            if group["weight_decay"] and not group["decoupled_weight_decay"]:
                raise BadInputError(
                    f"optimizer.weight_decay={group['weight_decay']}: Adam adds it to a window's "
                    f"gradient, and strategy={self.name} has none: use optimizer=adamw"
                )
        bound = copy.copy(self)
        bound._optimizer, bound._ended = optimizer, None
        return bound

    def buffered(self, dtype: torch.dtype) -> InPlace:
        """Refuse: no gradients are added up.

        Raises:
            BadInputError: always.
        """
        raise BadInputError(
            f"accum.buffer_dtype=float32 has no meaning under strategy={self.name}, which holds no "
            "gradient of a window: use accum.buffer_dtype=same"
        )

    @contextmanager
    def collecting(
        self, state: AccumulatorState, parameters: Sequence[nn.Parameter], *, rescaled: bool
    ) -> Iterator[None]:
        """Enter around a window's passes, as `InPlace.collecting`."""
        # Anew for each window: loading an optimizer's state replaces its groups.
        groups: dict[nn.Parameter, dict[str, Any]] = {
            p: group for group in self.optimizer.param_groups for p in group["params"]
        }
        if None in state.counts:
            raise BadInputError(
                f"strategy={self.name}: the loss is counted only after its forward pass, and what is in "
                "the moments by then cannot be divided any more: give the loss function a "
                "count(micro_batch), or use strategy=in_place"
            )
        if any(parameter.grad is not None for parameter in groups):
            raise BadInputError(
                f"strategy={self.name}: `.grad` holds gradients already, which would go into the "
                "moments: call optimizer.zero_grad() first"
            )
        self._groups, self._ended = groups, None
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._fold, state))  # type: ignore[no-untyped-call]  # torch's
            for parameter in groups
            if parameter.requires_grad
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self._ended = state

    def step_of(self, optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
        """Return what takes the optimizer step of the window that has ended."""
        return self._step

    def base_windows(self, state: AccumulatorState) -> float:
        """Return how many steps at the given learning rate and betas this window stands for."""
        return 1.0

    def weight_of_square(self, state: AccumulatorState) -> Denominator:
        """Return by what the square of the micro-batch in hand is multiplied."""
        return 1.0

    @torch.no_grad()
    def _fold(self, state: AccumulatorState, parameter: Tensor) -> None:
        """Add a micro gradient to its parameter's moments, and drop it."""
        assert isinstance(parameter, nn.Parameter)
        given, parameter.grad = parameter.grad, None
        assert given is not None
        require_dense(given, self.name)
        last = state.folded.get(parameter)
        if last == state.passes_done:
            raise BadInputError(
                f"strategy={self.name}: a parameter of shape {tuple(parameter.shape)} gets its gradient "
                "in several parts within one micro-batch, and each would be squared by itself: use "
                "use_reentrant=False in checkpointing, and one backward pass a micro-batch"
            )
        weight = self.weight_of_square(state)
        state.folded[parameter] = state.passes_done
        windows, gradient = self.base_windows(state), reals(given)
        beta1, beta2 = (float(beta) ** windows for beta in self._groups[parameter]["betas"])
        mean, square = self._moments(parameter)
        if last is None:  # as torch's Adam does it, to the last bit
            self.optimizer.state[parameter]["step"] += windows
            mean.lerp_(gradient, 1 - beta1)
            square.mul_(beta2)
        else:
            mean.add_(gradient, alpha=1 - beta1)
        if isinstance(weight, Tensor):  # which stays on its device
            square.addcmul_(gradient * weight, gradient, value=1 - beta2)
        else:
            square.addcmul_(gradient, gradient, value=(1 - beta2) * float(weight))

    def _moments(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Return m and v of a parameter as real numbers, made as torch's Adam makes them."""
        of = self.optimizer.state[parameter]
        if not of:
            double = torch.get_default_dtype() == torch.float64
            of["step"] = torch.tensor(0.0, dtype=torch.float64 if double else torch.float32)
            of["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            of["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return reals(of["exp_avg"]), reals(of["exp_avg_sq"])

    @torch.no_grad()
    def _step(self) -> None:
        """Move the parameters whose moments the window has moved; none, where nothing in it counted."""
        ended, self._ended = self._ended or AccumulatorState([]), None
        windows = self.base_windows(ended)
        for parameter in ended.folded:
            group = self._groups[parameter]
            mean, square = self._moments(parameter)
            rate, steps = float(group["lr"]) * windows, self.optimizer.state[parameter]["step"].item()
            if group["weight_decay"]:
                parameter.mul_(1 - rate * group["weight_decay"])
            left1, left2 = (1 - float(beta) ** steps for beta in group["betas"])
            root = square.sqrt().div_(left2**0.5).add_(group["eps"])
            reals(parameter).addcdiv_(mean, root, value=-rate / left1)
        # Of no gradients it takes no step, and calls what hangs on it: schedules, hooks.
        self.optimizer.step()
