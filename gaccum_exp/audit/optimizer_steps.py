"""Whether a strategy that takes the optimizer's step itself takes the large batch's.

It leaves no gradient that could be compared, so the steps are: from the run's present moments, that of
the strategy after the window's micro-batches, and that of the optimizer on the gradient of the one pass.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gaccum_exp.audit.agreement import IN_FLOAT64, Agreement
from gaccum_exp.audit.rerun.passes import ACCUMULATED, ACCUMULATED64, ONE_PASS, ONE_PASS64, Pass, Rerun
from gaccum_exp.audit.result import OTHER_OPTIMIZER, Audit
from gaccum_exp.audit.verdict import parameter_errors
from gaccum_exp.core.adam_a import AdamA
from gaccum_exp.core.gradient import Gradient, deviation, distance
from gaccum_exp.core.strategies import IN_PLACE, AccumulatorState, InPlace

SEEN = (
    "the micro gradients add up to the large batch's; e64, e and floor are of the optimizer's step from "
    "the present moments"
)


class Steps(InPlace):
    """Leaves in `.grad` the step of an optimizer, which is then compared as a gradient is.

    It is taken on a copy of the optimizer, from weights of zero: nothing rounds a step away there, and
    weight decay, the same for all, is nothing.

    Args:
        strategy: whose steps.
        parameters: of the model and of its criterion, in the order of their modules.
        plain: take the step that the optimizer itself takes, on the window's gradient.
    """

    buffers_gradients: ClassVar[bool] = True  # so that it is told the parameters

    def __init__(self, strategy: AdamA, parameters: Sequence[nn.Parameter], *, plain: bool) -> None:
        self._strategy, self._parameters, self._plain = strategy, parameters, plain

    @contextmanager
    def collecting(
        self, state: AccumulatorState, parameters: Sequence[nn.Parameter], *, rescaled: bool
    ) -> Iterator[None]:
        """Enter around a window's passes, of the copies that stand for the parameters."""
        copies = dict(zip(self._parameters, parameters, strict=True))
        optimizer = _copied(self._strategy.optimizer, copies)
        strategy = IN_PLACE if self._plain else self._strategy.for_optimizer(optimizer)
        with strategy.collecting(state, parameters, rescaled=rescaled):
            yield
        with torch.no_grad():
            for parameter in parameters:
                parameter.zero_()
        strategy.step_of(optimizer)()
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()


def _copied(
    optimizer: torch.optim.Optimizer, copies: Mapping[nn.Parameter, nn.Parameter]
) -> torch.optim.Optimizer:
    """Return an optimizer of the copies, with moments as precise as they are."""

    def value(of: Any, parameter: nn.Parameter) -> Any:
        if not isinstance(of, Tensor) or of.shape != parameter.shape:
            return of.clone() if isinstance(of, Tensor) else of
        return of.to(parameter.device, parameter.dtype, copy=True)

    groups = [
        {**group, "params": [copies[p] for p in group["params"] if p in copies]}
        for group in optimizer.param_groups
    ]
    made: torch.optim.Optimizer = type(optimizer)(groups)  # type: ignore[call-arg]  # Adam's
    for parameter, of in copies.items():
        if parameter in optimizer.state:
            made.state[of] = {k: value(v, of) for k, v in optimizer.state[parameter].items()}
    return made


def judged_by_steps(rerun: Rerun, audit: Audit, remedy: str) -> Audit:
    """Return the audit of a sound gradient, biased where the optimizer's step is another all the same.

    Args:
        rerun: of a window whose gradients are the steps (`Steps`).
        audit: of its gradient.
        remedy: what is said then.
    """
    constant = bool(rerun.draws.not_replayed)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(sum(rerun.window.sizes), generator=generator)

    def step(how: Pass) -> Gradient:
        return rerun.gradient(replace(how, draws="constant") if constant else how)

    of64, one64 = step(ACCUMULATED64), step(ONE_PASS64)
    floor64 = distance(step(replace(ONE_PASS64, order=order)), one64)
    apart64 = deviation(of64, one64)
    if Agreement(apart64.distance, floor64, IN_FLOAT64).agrees:
        return audit
    one = step(ONE_PASS)
    floor = max(distance(step(replace(ONE_PASS, order=order)), one), distance(one, one64))
    return replace(
        audit,
        verdict="biased",
        cause=OTHER_OPTIMIZER,
        e64=apart64.distance,
        e=distance(step(ACCUMULATED), one),
        floor=floor,
        remedy=remedy,
        parameters=parameter_errors(apart64),
    ).noting(SEEN)
