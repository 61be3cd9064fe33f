"""Loss and accuracy on held-out data."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.feed import windows
from gaccum_exp.core.losses.micro_batch import outputs_in, run_model, split_micro_batch
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.core.seeding import derive_seed, seed_model
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.tracking import metrics
from gaccum_exp.train.state import Experiment

Sums = tuple[Tensor, Any, Any, Any]
"""Of a batch: loss sum, denominator, right answers and labels asked for."""


def evaluate(
    experiment: Experiment, over: Callable[[Callable[[nn.Module], Sums]], Sums] | None = None
) -> dict[str, float | Tensor]:
    """Return loss and, for class labels, accuracy over the whole evaluation set.

    Batches of `data.eval_batch_size`, the same for every N; the model's modes are left as they were.

    Args:
        experiment: its model and its data.
        over: calls the function that it is given with a model; None: with the experiment's.
    """
    loss_sum: Any = 0.0
    denominator: Any = 0.0
    right: Any = 0
    labels: Any = 0
    seed_model(derive_seed(experiment.settings.seed, "evaluation"), experiment.device)
    with torch.no_grad(), evaluation_mode(experiment.model):
        for batch in _batches(experiment):
            of_model = partial(_sums, experiment, batch)
            loss, n, hits, counted = over(of_model) if over else of_model(experiment.model)
            right, labels = right + hits, labels + counted
            # In half precision a long sum loses its last batches.
            wide = torch.promote_types(loss.dtype, torch.float32)
            loss_sum, denominator = loss_sum + loss.to(wide), denominator + n
    loss = torch.as_tensor(loss_sum / denominator)
    values: dict[str, float | Tensor] = {metrics.EVAL_LOSS: loss}
    if experiment.counts_tokens:
        values[metrics.EVAL_PERPLEXITY] = loss.exp()
    if isinstance(labels, Tensor):
        values[metrics.EVAL_ACCURACY] = right / labels
    return values


def _sums(experiment: Experiment, batch: Any, model: nn.Module) -> Sums:
    if experiment.criterion_loss is None:
        return *experiment.loss_fn(model, batch), 0, 0
    inputs, targets = split_micro_batch(experiment.placement.place(batch))
    with experiment.placement.passes():
        outputs = run_model(model, inputs)
        loss, n = experiment.criterion_loss.of_outputs(outputs, targets)
    return loss, n, *_hits(outputs, targets, experiment.criterion_loss.criterion)


def _batches(experiment: Experiment) -> Iterator[Any]:
    data, settings = experiment.eval_data, experiment.settings
    assert data is not None
    plan = WindowPlan(
        len(data),  # type: ignore[arg-type]  # checked to be map-style
        settings.data.eval_batch_size,
        derive_seed(settings.seed, "evaluation"),
        shuffle=False,
    )
    every = range(plan.steps_in(epochs=1))
    for (batch,) in windows(
        data, plan, accum_steps=1, global_steps=every, workers=settings.data.workers
    ):
        yield batch


def _hits(outputs: Any, targets: list[Any], criterion: nn.Module) -> tuple[Tensor | int, Tensor | int]:
    """Return right answers and labels asked for, (0, 0) where the task has no class labels.

    outputs: scores, (batch, classes, ...), or the classes where the criterion has its `class_dim`;
    targets[0]: labels, (batch, ...), integers.
    """
    scores, target = outputs_in(outputs)[0], targets[0] if targets else None
    if not isinstance(scores, Tensor) or not isinstance(target, Tensor):
        return 0, 0
    classes = getattr(criterion, "class_dim", 1)
    if target.is_floating_point() or scores.ndim != target.ndim + 1 or scores.shape[classes] < 2:
        return 0, 0
    ignored = getattr(criterion, "ignore_index", None)
    asked = torch.ones_like(target, dtype=torch.bool) if ignored is None else target != ignored
    return ((scores.argmax(classes) == target) & asked).sum(), asked.sum()
