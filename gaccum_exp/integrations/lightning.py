"""The audit as a callback of Lightning's Trainer."""

import inspect
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gaccum_exp.integrations.due import DueWindows


class AuditCallback(DueWindows, Callback):  # type: ignore[misc]  # Lightning is not followed by mypy
    """Judge the window of every so many optimizer steps; the training ends as it would have without.

        audit = AuditCallback(every_n_steps=1000)
        Trainer(accumulate_grad_batches=4, callbacks=[audit]).fit(model)
        print(audit.audits[0][1])

    `audits` holds (optimizer steps taken before the window, its audit). A window that is biased is
    warned about, once per cause; a line at the end of the training counts the verdicts; nothing is
    logged. On several processes it says so once and judges nothing: a window would be all ranks'
    micro-batches.

    Args:
        every_n_steps: how often; the first window is always judged, and the last of each epoch where it
            has fewer micro-batches. A window that is judged takes about a dozen times as long.
        criterion: as in `watch`; None: what `training_step` returns. With manual optimization, or where
            `training_step` takes `dataloader_iter`, give the loss function that it calls; None is then a
            loss of `torch.nn.functional`. Of several optimizers see `watch`.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of a window of an earlier training."""
        self.close()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch, if a window begins that is due."""
        criterion = self._criterion
        automatic = pl_module.automatic_optimization
        # A step that takes the iterator fetches its samples itself, and cannot be run again.
        fetching = "dataloader_iter" in inspect.signature(pl_module.training_step).parameters
        if criterion is None and automatic and not fetching:
            criterion = pl_module.training_step
        step, ranks, n = trainer.global_step, trainer.world_size, trainer.accumulate_grad_batches
        # Lightning counts micro-batches from each epoch's beginning, and steps at its end.
        ends_short = batch_idx % n == 0 and trainer.num_training_batches - batch_idx < n
        self._begin(step, ranks, pl_module, criterion, trainer.optimizers, ends_short)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep the audit, if the window's step was taken."""
        self._end(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of a window that has no step, and sum up."""
        self.close()
        print(self.summary())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Let go of the training, whatever ended it."""
        self.close()
