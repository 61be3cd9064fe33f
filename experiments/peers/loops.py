"""The same windows through six ways to accumulate, each under `watch`, in float64.

Every function trains `model` one epoch on a case's loader with N = 4 and returns what `watch` found. The
optimizer is made before; nothing shuffles, clips or schedules.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any

from accelerate import Accelerator
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import Trainer as HuggingFaceTrainer
from transformers import TrainingArguments

from gaccum_exp import accumulate_gradients, watch

N = 4


class MeanLoss(nn.CrossEntropyLoss):
    """Cross entropy of logits (batch, classes) or (batch, tokens, classes); -100 does not count."""

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean over what counts."""
        return super().forward(logits.movedim(-1, 1), labels)


def seeds_loop(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    """The project's note: each mean divided by N, a step at every N-th micro-batch."""
    criterion = MeanLoss()
    with watch(model, criterion, optimizer) as audit:
        for i, batch in enumerate(loader):
            loss = criterion(model(batch["inputs"]), batch["labels"]) / N
            loss.backward()
            if (i + 1) % N == 0:
                optimizer.step()
                optimizer.zero_grad()
    return audit


def accelerate(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    """`accelerator.accumulate`, as its guide has it."""
    accelerator = Accelerator(gradient_accumulation_steps=N, cpu=True)
    criterion = MeanLoss()
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with watch(model, criterion, optimizer) as audit:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = criterion(model(batch["inputs"]), batch["labels"])
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    return audit


class Lit(LightningModule):
    """A LightningModule around the model."""

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        super().__init__()
        self.model, self.optimizer, self.criterion = model, optimizer, MeanLoss()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the mean over the micro-batch."""
        return self.criterion(self.model(batch["inputs"]), batch["labels"])

    def configure_optimizers(self) -> Any:
        """Return the optimizer that was made before."""
        return self.optimizer


def lightning(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    """`Trainer(accumulate_grad_batches=N)`."""
    lit = Lit(model, optimizer)
    with silent() as folder:
        trainer = Trainer(
            accumulate_grad_batches=N,
            precision="64-true",
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with watch(lit, lit.training_step, optimizer) as audit:
            trainer.fit(lit, loader)
    return audit


class TakesCount(nn.Module):
    """Divides by the window's count, as the models of transformers do when the Trainer hands it over."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, inputs: Tensor, labels: Tensor, num_items_in_batch: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return the loss sum over the window's count, and the logits."""
        logits = self.model(inputs)
        total = F.cross_entropy(logits.movedim(-1, 1), labels, reduction="sum")
        return {"loss": total / num_items_in_batch, "logits": logits}


class Plain(nn.Module):
    """Returns the mean over its micro-batch, and takes no count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the micro-batch's mean, and the logits."""
        logits = self.model(inputs)
        return {"loss": F.cross_entropy(logits.movedim(-1, 1), labels), "logits": logits}


def transformers_count(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    """The transformers Trainer, and a model that takes `num_items_in_batch`."""
    return _transformers(TakesCount(model), optimizer, loader)


def transformers_plain(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    """The transformers Trainer, and a model that does not."""
    return _transformers(Plain(model), optimizer, loader)


def _transformers(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    class InOrder(HuggingFaceTrainer):
        def get_train_dataloader(self) -> "DataLoader[Any]":
            return loader

    with silent() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            gradient_accumulation_steps=N,
            num_train_epochs=1,
            max_grad_norm=0,
            lr_scheduler_type="constant",
            use_cpu=True,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = InOrder(model, arguments, train_dataset=loader.dataset, optimizers=(optimizer, None))
        with watch(model, None, optimizer) as audit:
            trainer.train()
    return audit


def gaccum_exp(model: nn.Module, optimizer: Any, loader: "DataLoader[Any]") -> Any:
    """`accumulate_gradients`, which counts the window before its first backward pass."""
    criterion = MeanLoss()
    with watch(model, criterion, optimizer) as audit:
        batches = iter(loader)
        while window := [(b["inputs"], b["labels"]) for b in islice(batches, N)]:
            accumulate_gradients(model, criterion, window, reduction="global_mean")
            optimizer.step()
            optimizer.zero_grad()
    return audit


@contextlib.contextmanager
def silent() -> Iterator[str]:
    """Keep trainers from talking about themselves; yield a folder for what they write."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield folder


PEERS = {
    "the seed's loop": seeds_loop,
    "accelerate": accelerate,
    "Lightning": lightning,
    "transformers Trainer, model takes `num_items_in_batch`": transformers_count,
    "transformers Trainer, plain model": transformers_plain,
    "gaccum_exp": gaccum_exp,
}
