"""The same training by hand, by other frameworks, and by gaccum_exp: model, samples, optimizer, split.

Every contender takes the windows of a `Block` in order, and computes the gradient's norm before each
step. The optimizer notes when each step was taken, whoever calls it.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import accelerate
import lightning
import mlflow
import torch
import transformers
from lightning.pytorch.loggers import MLFlowLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler

from experiments.notebook import Quiet
from gaccum_exp.config.schema import Settings
from gaccum_exp.core.losses.micro_batch import split_micro_batch
from gaccum_exp.tracking.journal import Journal
from gaccum_exp.tracking.shipper import finish
from gaccum_exp.tracking.sink import JournalSink, Sink
from gaccum_exp.train.build import build
from gaccum_exp.train.loop import hooks_of, train
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step

for _chatty in ("lightning", "lightning.pytorch", "lightning.fabric", "accelerate", "mlflow"):
    logging.getLogger(_chatty).setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()
warnings.filterwarnings("ignore", module="lightning")
NO_LIMIT = 1e9
"""To which a gradient is clipped where a framework gives its norm only so."""


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The samples of all windows in the order in which they are trained on."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.inputs[row], self.targets[row]


@dataclass
class Block:
    """A fresh training of some windows."""

    settings: Settings
    uri: str
    """Of the contender's own store, which is there already."""
    experiment: TrainState = field(init=False)
    stamps: list[float] = field(default_factory=list)
    """When each optimizer step was done, in seconds."""

    def __post_init__(self) -> None:
        self.experiment = build(self.settings)
        self.optimizer.register_step_post_hook(lambda *_: self.stamps.append(time.perf_counter()))

    @property
    def model(self) -> nn.Module:
        """With its initial weights."""
        return self.experiment.model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Of these weights."""
        return self.experiment.optimizer

    @property
    def criterion(self) -> nn.Module:
        """As the user gave it: it takes the mean."""
        return self.experiment.criterion_loss.criterion

    @property
    def n(self) -> int:
        """Micro-batches of a window."""
        return self.settings.accum_steps

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the norm is of."""
        return self.experiment.parameters

    def windows(self) -> list[list[tuple[Tensor, Tensor]]]:
        """Return all windows, in memory and split."""
        return [[self.pair(m) for m in window] for window in self.experiment.windows_from(0)]

    def pair(self, micro_batch: Any) -> tuple[Tensor, Tensor]:
        """Return inputs and targets as the model gets them."""
        inputs, (targets,) = split_micro_batch(self.experiment.placement.place(micro_batch))
        return inputs["input_ids"] if isinstance(inputs, dict) else inputs, targets

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss of a micro-batch."""
        return self.criterion(self.model(inputs), targets)

    def loader(self) -> DataLoader[Any]:
        """Return the loader that a user writes: micro-batches collated from samples."""
        flat = [m for window in self.windows() for m in window]
        inputs, targets = (torch.cat(parts) for parts in zip(*flat, strict=True))
        return DataLoader(Rows(inputs, targets), batch_size=len(flat[0][0]), shuffle=False)

    def norm(self) -> Tensor:
        """Return the gradient's norm."""
        return nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])


def bare(block: Block) -> Callable[[], None]:
    """The limit: a loop over micro-batches that lie in memory, split."""
    windows, model, optimizer = block.windows(), block.model, block.optimizer
    criterion = block.criterion
    parameters, n = block.parameters, block.n

    def run() -> None:
        for window in windows:
            optimizer.zero_grad()
            for inputs, targets in window:
                (criterion(model(inputs), targets) / n).backward()
            nn.utils.get_total_norm([p.grad for p in parameters])
            optimizer.step()

    return run


def seed_loop(block: Block) -> Callable[[], None]:
    """The note's loop, with a DataLoader, and the norm."""
    loader, optimizer = block.loader(), block.optimizer

    def run() -> None:
        for i, (inputs, targets) in enumerate(loader):
            loss = block.loss(inputs, targets) / block.n
            loss.backward()
            if (i + 1) % block.n == 0:
                block.norm()
                optimizer.step()
                optimizer.zero_grad()

    return run


def of_accelerate(block: Block, log: bool = False) -> Callable[[], None]:
    """`accelerator.accumulate`, and its MLflow tracker."""
    loader = block.loader()

    def run() -> None:
        os.environ["MLFLOW_TRACKING_URI"] = block.uri
        mlflow.set_tracking_uri(block.uri)
        accelerator = accelerate.Accelerator(
            cpu=True, gradient_accumulation_steps=block.n, log_with="mlflow" if log else None
        )
        if log:
            accelerator.init_trackers("accelerate")
        model, optimizer, batches = accelerator.prepare(block.model, block.optimizer, loader)
        criterion = block.criterion
        steps, total = 0, torch.zeros(())
        for inputs, targets in batches:
            with accelerator.accumulate(model):
                loss = criterion(model(inputs), targets)
                accelerator.backward(loss)
                total = total + loss.detach()
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(block.parameters, NO_LIMIT)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                steps += 1
                if log:
                    values = {"loss": total.item() / block.n, "lr": 0.1, "norm": norm.item()}
                    accelerator.log(values, step=steps)
                total = torch.zeros(())
        if log:
            accelerator.end_training()

    return run


class Lit(lightning.LightningModule):
    """The model as Lightning wants it."""

    def __init__(self, block: Block, log: bool) -> None:
        super().__init__()
        self.model, self._block, self._log = block.model, [block], log

    def training_step(self, batch: Any, number: int) -> Tensor:
        """Return a micro-batch's mean loss."""
        loss = self._block[0].loss(*batch)
        if self._log:
            self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Compute the norm."""
        norm = self._block[0].norm()
        if self._log:
            self.log_dict({"norm": norm, "lr": optimizer.param_groups[0]["lr"]})

    def configure_optimizers(self) -> Any:
        """Return the block's own."""
        return self._block[0].optimizer


def of_lightning(block: Block, log: bool = False) -> Callable[[], None]:
    """Lightning's Trainer, and its MLFlowLogger at every step."""
    loader, module = block.loader(), Lit(block, log)

    def run() -> None:
        logger = MLFlowLogger("lightning", tracking_uri=block.uri) if log else False
        trainer = lightning.Trainer(
            accelerator="cpu", accumulate_grad_batches=block.n, max_epochs=1, logger=logger,
            log_every_n_steps=1, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)

    return run


def of_fabric(block: Block) -> Callable[[], None]:
    """Lightning Fabric: the loop is one's own."""
    loader = block.loader()

    def run() -> None:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        model, optimizer = fabric.setup(block.model, block.optimizer)
        batches = fabric.setup_dataloaders(loader)
        criterion = block.criterion
        for i, (inputs, targets) in enumerate(batches):
            last = (i + 1) % block.n == 0
            with fabric.no_backward_sync(model, enabled=not last):
                fabric.backward(criterion(model(inputs), targets) / block.n)
            if last:
                block.norm()
                optimizer.step()
                optimizer.zero_grad()

    return run


class WithLoss(nn.Module):
    """The model as the transformers Trainer wants it."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.model, self._block = block.model, [block]

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the loss."""
        return {"loss": self._block[0].loss(inputs, labels)}


class InOrder(transformers.Trainer):
    """Takes the samples in their order."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def of_transformers(block: Block, log: bool = False) -> Callable[[], None]:
    """The transformers Trainer, and its MLflow callback at every step."""
    rows: Any = block.loader().dataset

    def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        inputs, labels = (torch.stack(parts) for parts in zip(*samples, strict=True))
        return {"inputs": inputs, "labels": labels}

    def run() -> None:
        os.environ["MLFLOW_TRACKING_URI"] = block.uri
        mlflow.set_tracking_uri(block.uri)
        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder, num_train_epochs=1, use_cpu=True, disable_tqdm=True,
                per_device_train_batch_size=len(rows) // (block.n * block.settings.train.steps),
                gradient_accumulation_steps=block.n, max_grad_norm=NO_LIMIT, save_strategy="no",
                logging_strategy="steps" if log else "no", logging_steps=1,
                report_to="mlflow" if log else "none", remove_unused_columns=False,
            )  # fmt: skip
            constant = torch.optim.lr_scheduler.LambdaLR(block.optimizer, lambda _: 1.0)
            trainer = InOrder(
                WithLoss(block), arguments, collate, train_dataset=rows,
                optimizers=(block.optimizer, constant),
            )  # fmt: skip
            with _silence():
                trainer.train()
        if log:
            mlflow.end_run()

    return run


def ours(block: Block, log: bool = False) -> Callable[[], None]:
    """gaccum_exp's own training, and MLflow at every step."""

    def run() -> None:
        sink = Sink()
        if log:
            sink = journal_sink(block.uri, "gaccum_exp")
        hooks, _ = hooks_of(block.experiment, sink, Quiet())
        train(block.experiment, hooks)
        sink.close("FINISHED")
        finish()

    return run


def journal_sink(uri: str, experiment_name: str) -> JournalSink:
    """Begin a run in a folder of its own."""
    journal = Journal.create(Path(tempfile.mkdtemp()), uri, experiment_name)
    journal.begin("run", params={}, tags={}, texts={})
    return JournalSink(journal)


def gathered(block: Block) -> Callable[[], None]:
    """The bare loop on windows that are fetched as gaccum_exp fetches them."""
    model, optimizer = block.model, block.optimizer
    criterion = block.criterion
    parameters, n = block.parameters, block.n

    def run() -> None:
        for window in block.experiment.windows_from(0):
            optimizer.zero_grad()
            for inputs, targets in window:  # of digits
                (criterion(model(inputs), targets) / n).backward()
            nn.utils.get_total_norm([p.grad for p in parameters])
            optimizer.step()

    return run


def steps(block: Block) -> Callable[[], None]:
    """gaccum_exp's optimizer steps on windows that lie in memory."""
    windows = list(block.experiment.windows_from(0))

    def run() -> None:
        for block.experiment.global_step, window in enumerate(windows):
            take_step(block.experiment, window)

    return run


Contender = Callable[[Block], Callable[[], None]]

CONTENDERS: dict[str, Contender] = {
    "bare loop, micro-batches in memory": bare,
    "the seed's loop, DataLoader": seed_loop,
    "accelerate": of_accelerate,
    "accelerate, MLflow tracker": lambda block: of_accelerate(block, log=True),
    "Lightning Trainer": of_lightning,
    "Lightning Trainer, MLFlowLogger": lambda block: of_lightning(block, log=True),
    "Lightning Fabric": of_fabric,
    "transformers Trainer": of_transformers,
    "transformers Trainer, MLflow callback": lambda block: of_transformers(block, log=True),
    "gaccum_exp": ours,
    "gaccum_exp, MLflow": lambda block: ours(block, log=True),
}

PIECES: dict[str, Contender] = {
    "bare loop, micro-batches in memory": bare,
    "bare loop, windows fetched as gaccum_exp does": gathered,
    "gaccum_exp's `take_step`, windows in memory": steps,
    "gaccum_exp's whole training": ours,
    "the same, MLflow": lambda block: ours(block, log=True),
}
"""What lies between the limit and the whole training, of which each line has more."""


@contextmanager
def _silence() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield
