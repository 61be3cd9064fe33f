"""The audit as a callback of the transformers Trainer."""

from contextlib import suppress
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from gaccum_exp.integrations.due import DueWindows


class AuditCallback(DueWindows, TrainerCallback):  # type: ignore[misc]  # which mypy does not follow
    """Judge the window of every so many optimizer steps; the training ends as it would have without.

        audit = AuditCallback(every_n_steps=1000)
        Trainer(model, args, train_dataset=data, callbacks=[audit]).train()
        print(audit.audits[0][1])

    `audits` holds (optimizer steps taken before the window, its audit). A window that is biased is
    warned about, once per cause; a line at the end of the training counts the verdicts; nothing is
    logged. On several processes it says so once and judges nothing: a window would be all ranks'
    micro-batches.
    The Trainer does not report exceptions to its callbacks: after one inside a window, call `close`.

    Args:
        every_n_steps: how often; the first window is always judged, and the last of each epoch where it
            has fewer micro-batches. A window that is judged takes about a dozen times as long.
        criterion: as in `watch`; None: the loss that the model returns, as the Trainer's default. With
            `compute_loss_func` or label smoothing give that function (`trainer.label_smoother`).
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of a window of an earlier training."""
        self.close()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch, if a window begins that is due."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        step, n = state.global_step, args.gradient_accumulation_steps
        micro_batches = 0
        with suppress(TypeError):  # of an iterable data set the number is not known
            micro_batches = len(kwargs["train_dataloader"])
        windows = -(-micro_batches // n)
        ends_short = micro_batches % n > 0 and step % windows == windows - 1
        self._begin(step, args.world_size, model, self._criterion, optimizer, ends_short)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the audit of the step that was taken."""
        self._end(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of a window that has no step, and sum up."""
        self.close()
        print(self.summary())
