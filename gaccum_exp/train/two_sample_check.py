"""A first pass on two samples, so that a model and a loss that do not fit are refused at once."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torch.utils.data import Dataset

from gaccum_exp.core.feed import windows
from gaccum_exp.core.losses.criterion import CriterionLoss
from gaccum_exp.core.losses.micro_batch import outputs_in, run_model
from gaccum_exp.core.losses.placement import Placement
from gaccum_exp.core.losses.protocol import LossFn
from gaccum_exp.core.losses.terms import TermsLoss
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.core.window_loss import LossTotal
from gaccum_exp.errors import BadInputError


def first_samples(train_data: Dataset[Any], plan: WindowPlan) -> Any:
    """Return a micro-batch of the first window's first two samples."""
    two = replace(plan, global_batch_size=min(2, plan.samples), partial_window="exact", lengths=None)
    ((micro_batch,),) = windows(train_data, two, accum_steps=1, global_steps=range(1))
    return micro_batch


def try_first_samples(
    model: nn.Module,
    criterion: CriterionLoss | TermsLoss | None,
    loss_fn: LossFn,
    micro_batch: Any,
    placement: Placement,
) -> None:
    """Run model and loss on two samples.

    It also materialises a model's lazy parameters, and inspects an unknown loss.

    Raises:
        BadInputError: they fail, with the shapes.
    """
    outputs: Any = None
    targets: Any = None
    try:
        with torch.no_grad(), evaluation_mode(model), placement.passes():
            here = placement.place(micro_batch)
            if criterion is None:
                LossTotal(loss_fn).add(loss_fn(model, here))  # which it has to be
                return
            inputs, targets = criterion.split(here)
            outputs = run_model(model, inputs)
            criterion.of_outputs(outputs, targets)
    except BadInputError:
        raise
    except Exception as error:  # the user's model or criterion fails in its own way
        shapes = tree_map(
            lambda x: tuple(x.shape) if isinstance(x, Tensor) else x, (micro_batch, outputs)
        )
        first = (str(error).splitlines() or [""])[0]
        given = f"the first samples {shapes[0]}" + (
            "" if outputs is None else f", the output {shapes[1]}"
        )
        of_model = "model" if criterion is not None else "model or loss function"
        raise BadInputError(
            f"{of_model if outputs is None else 'criterion'}: fails on {given}: "
            f"{type(error).__name__}: {first}{_hint(outputs, targets)}"
        ) from error


def _hint(outputs: Any, targets: Any) -> str:
    """Name the criterion for logits that have their classes in the last dimension."""
    if outputs is None or not isinstance(targets, list):
        return ""
    logits = outputs_in(outputs)[0]
    if not (isinstance(logits, Tensor) and targets and isinstance(targets[0], Tensor)):
        return ""
    if logits.ndim < 3 or logits.shape[:-1] != targets[0].shape:
        return ""
    return "; for logits (batch, length, vocabulary) use criterion=token_cross_entropy"
