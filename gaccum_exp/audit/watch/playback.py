"""Play calls of a tape back, with other arguments and in another precision."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.audit.rerun.passes import Cast
from gaccum_exp.audit.rerun.samples import NotJoinableError, mapped, tensors_in
from gaccum_exp.audit.watch.tape import OutputRef, TapedCall, loss_in
from gaccum_exp.core.losses.criterion import CriterionLoss

Outputs = dict[TapedCall, list[Tensor]]
"""What calls have put out in this run."""


def models_own_loss(loss: Tensor) -> Tensor:
    """Return the loss that the model itself has put out."""
    return loss


def run(call: TapedCall, arguments: Mapping[int | str, Any]) -> Any:
    """Call the function again with these arguments, under the same autocast."""
    device = next((t.device.type for t in tensors_in(arguments)), "cpu")
    args = [value for key, value in arguments.items() if isinstance(key, int)]
    kwargs = {key: value for key, value in arguments.items() if isinstance(key, str)}
    autocast = torch.autocast(device, dtype=call.autocast[1], enabled=call.autocast[0])
    before = [(attributes, dict(attributes)) for attributes, _ in call.attributes]
    try:
        for attributes, then in call.attributes:
            attributes.update(then)
        with autocast:
            return call.function(*args, **kwargs)
    finally:
        for (attributes, then), (_, now) in zip(call.attributes, before, strict=True):
            attributes.update({key: now[key] for key in then if key in now})


def loss_of(output: Any) -> Tensor:
    """Return the loss in what a call has put out."""
    loss = loss_in(output)
    if loss is None:
        raise NotJoinableError("run again, the loss has no gradient")
    return loss


def resolved(value: Any, outputs: Outputs, cast: Cast = lambda value: value) -> Any:
    """Return arguments with every reference replaced by its tensor, and all others cast."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, OutputRef):
            return cast(x)
        if x.call not in outputs:
            arguments = resolved(x.call.arguments, outputs, cast)
            outputs[x.call] = tensors_in(run(x.call, arguments))
        return outputs[x.call][x.place]

    return mapped(leaf, value)


def count_of(loss: TapedCall) -> float | None:
    """Return the denominator of one call of a criterion, if that is one of torch's."""
    criterion = loss.function
    if criterion is nn.functional.cross_entropy:
        names = ("weight", "ignore_index")
        criterion = nn.CrossEntropyLoss(**{k: v for k, v in loss.arguments.items() if k in names})
    target = loss.arguments.get("target", loss.arguments.get(1))
    if not isinstance(criterion, nn.Module) or not hasattr(criterion, "reduction"):
        return None
    if not isinstance(target, Tensor):
        return None
    try:
        counted = CriterionLoss(criterion, "sum").count((None, target))
    except ValueError:
        return None
    return None if counted is None else float(counted)
