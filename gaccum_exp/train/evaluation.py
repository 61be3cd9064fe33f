"""Loss and accuracy on held-out data."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gaccum_exp.core.feed import windows
from gaccum_exp.core.losses.micro_batch import outputs_in, run_model
from gaccum_exp.core.losses.protocol import LossResult
from gaccum_exp.core.modes import evaluation_mode
from gaccum_exp.core.seeding import derive_seed, seed_model
from gaccum_exp.core.window import WindowPlan
from gaccum_exp.core.window_loss import LossTotal
from gaccum_exp.tracking import metrics
from gaccum_exp.tracking.sink import Sink
from gaccum_exp.train.hooks import Hook, Values
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.stopping import NEVER, Stop

Sums = tuple[LossResult, Any, Any]
"""Of a batch: its loss, right answers and labels asked for."""
Over = Callable[[Callable[[nn.Module], Sums]], Sums]
"""Calls a function of a model with a model."""


class Evaluation(Hook):
    """Evaluates a training at intervals, and at its end.

    Args:
        sink: takes loss and accuracy.
        of: whose settings and data; of models trained as one, the first's.
        over: as `evaluate` has it.
        stop: ends it, before a batch.
    """

    def __init__(self, sink: Sink, of: TrainState, over: Over | None = None, stop: Stop = NEVER) -> None:
        self._sink, self._of, self._over, self._stop = sink, of, over, stop
        self._begun = False
        """One that was interrupted is to be had again."""

    def state_dict(self) -> dict[str, bool]:
        """Return whether it is in an evaluation."""
        return {"begun": self._begun}

    def load_state_dict(self, state: dict[str, bool]) -> None:
        """Go on from there."""
        self._begun = state["begun"]

    def begin(self, state: Any) -> None:
        """Evaluate where that was interrupted."""
        if self._begun:
            self._evaluate(state.global_step)

    def after(self, state: Any, window: Any, values: Values) -> None:
        """Evaluate if it is time."""
        of, global_step = self._of, state.global_step
        if of.eval_data is not None and (_due(of, global_step) or state.done):
            self._evaluate(global_step)

    def _evaluate(self, global_step: int) -> None:
        self._begun = True
        self._sink.record(global_step, evaluate(self._of, self._over, self._before_batch))
        self._begun = False

    def _before_batch(self) -> None:
        self._stop.look()
        if self._sink.due:  # what was trained is not to wait for the end of a long evaluation
            self._sink.flush()


def _due(state: TrainState, global_step: int) -> bool:
    """Whether it is time to evaluate after so many optimizer steps."""
    train, plan = state.settings.train, state.plan
    if train.eval_every_samples is not None:
        before, now = (
            plan.position(k) // train.eval_every_samples for k in (global_step - 1, global_step)
        )
        return now > before
    if train.eval_every_steps is not None:
        return global_step % train.eval_every_steps == 0
    return plan.ends_epoch(global_step - 1)


def evaluate(
    state: TrainState, over: Over | None = None, before_batch: Callable[[], None] = lambda: None
) -> dict[str, float | Tensor]:
    """Return loss and, for class labels, accuracy over the whole evaluation set.

    Batches of `data.eval_batch_size`, the same for every N; the model's modes are left as they were.

    Args:
        state: its model and its data.
        over: calls the function that it is given with a model; None: with the state's.
        before_batch: called before each batch.
    """
    data, workers = state.eval_data, state.settings.data.workers
    assert data is not None
    seed = derive_seed(state.settings.seed, "evaluation")
    samples = len(data)  # type: ignore[arg-type]  # checked to be map-style
    plan = WindowPlan(samples, state.settings.data.eval_batch_size, seed, shuffle=False)
    total = LossTotal(state.loss_fn)
    right: Any = 0
    labels: Any = 0
    seed_model(seed, state.device)
    with torch.no_grad(), evaluation_mode(state.model):
        batches = windows(
            data, plan, accum_steps=1, global_steps=range(plan.steps_in(epochs=1)), workers=workers
        )
        for (batch,) in batches:
            before_batch()
            of_model = partial(_sums, state, batch)
            result, hits, counted = over(of_model) if over else of_model(state.model)
            right, labels = right + hits, labels + counted
            if over and not isinstance(result, Mapping):  # of several models at once, none is 0-dim
                total.add_pair(*result)
            else:
                total.add(result)
    loss = total.loss()
    values: dict[str, float | Tensor] = {metrics.EVAL_LOSS: torch.as_tensor(loss.mean)}
    for name, term in loss.terms.items():
        values[metrics.of_term(metrics.EVAL_LOSS, name)] = term.mean
    if state.counts_tokens and not loss.terms:
        values[metrics.EVAL_PERPLEXITY] = torch.as_tensor(loss.mean).exp()
    if isinstance(labels, Tensor):
        values[metrics.EVAL_ACCURACY] = right / labels
    return values


def _sums(state: TrainState, batch: Any, model: nn.Module) -> Sums:
    if state.criterion_loss is None:
        return state.loss_fn(model, batch), 0, 0
    inputs, targets = state.criterion_loss.split(state.placement.place(batch))
    with state.placement.passes():
        outputs = run_model(model, inputs)
        result = state.criterion_loss.of_outputs(outputs, targets)
    if isinstance(result, Mapping):  # which of the terms would be the one?
        return result, 0, 0
    return result, *_hits(outputs, targets, state.criterion_loss.criterion)


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
