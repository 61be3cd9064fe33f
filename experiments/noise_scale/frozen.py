"""The noise scale at frozen weights: what micro gradients tell, beside what every sample tells."""

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.notebook import composed
from gaccum_exp.core.feed import windows
from gaccum_exp.core.noise_scale import Noise, noise_scale, quotient_of_means
from gaccum_exp.train.build import build
from gaccum_exp.train.state import TrainState
from gaccum_exp.train.step import take_step

WINDOWS, BATCH, MICRO_BATCHES = 64, 64, 8
SAMPLES = 4096
"""At most so many of the training set stand for it: of the GPT's 16,099."""


@dataclass(frozen=True)
class Case:
    """A model with its data, and the optimizer steps after which its weights are looked at."""

    overrides: tuple[str, ...]
    global_steps: tuple[int, ...]
    chunk: int
    """Samples whose gradients are in memory at a time."""


CASES = {
    "CNN": Case(("model=cnn", "data=digits", "optimizer.lr=0.05"), (0, 10, 40, 120, 300), 256),
    "GPT": Case(
        (
            "model=gpt", "model.layers=2", "model.heads=2", "model.width=64", "data=text",
            "data.context=26", "criterion=token_cross_entropy", "optimizer=adamw", "optimizer.lr=0.004",
        ),
        (0, 15, 60, 120, 250),
        64,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What one checkpoint showed."""

    model: str
    seed: int
    global_step: int
    loss: float
    exact_trace: float
    exact_squared_norm: float
    trace: float
    squared_norm: float
    scale: float
    low: float
    high: float | None
    """None: not bounded."""

    @property
    def exact(self) -> float:
        """The noise scale that the samples tell one by one."""
        return self.exact_trace / self.exact_squared_norm

    @property
    def covered(self) -> bool:
        """Whether the interval holds it."""
        return self.low <= self.exact <= (math.inf if self.high is None else self.high)


def checkpoints(name: str, seed: int, steps: int | None = None) -> Iterator[Found]:
    """Train a model, and look at its weights after each of its case's steps.

    Args:
        name: of the case.
        seed: of weights, samples and windows.
        steps: look no further than this; None: at all.
    """
    case = CASES[name]
    state = build(
        composed(
            *case.overrides, f"seed={seed}", f"data.global_batch_size={BATCH}", "runtime.device=cpu",
            "train.steps=100000", "runtime.threads=1",
        )
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    size = len(state.train_data)  # type: ignore[arg-type]  # it has a length
    chosen = torch.randperm(size, generator=generator)[:SAMPLES]
    inputs, labels = batch_of(state, chosen)
    wanted = [k for k in case.global_steps if steps is None or k <= steps]
    feed = windows(state.train_data, state.plan, accum_steps=1, global_steps=range(wanted[-1]))
    for window in (*feed, None):
        if state.global_step in wanted:
            yield looked_at(name, seed, state, inputs, labels, case.chunk, generator)
        if window is not None:
            take_step(state, window)
            state.global_step += 1


def batch_of(state: TrainState, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return these samples as one batch of inputs and labels."""
    batch = default_collate([state.train_data[int(i)] for i in indices])
    return (batch["input_ids"], batch["labels"]) if isinstance(batch, dict) else tuple(batch)


def looked_at(
    name: str,
    seed: int,
    state: TrainState,
    inputs: Tensor,
    labels: Tensor,
    chunk: int,
    generator: torch.Generator,
) -> Found:
    """Measure at the weights of now, which stay."""
    loss, trace, squared_norm = sample_by_sample(state, inputs, labels, chunk)
    told = by_micro_gradients(state, inputs, labels, generator)
    scale = quotient_of_means(told)
    mean = [sum(of) / len(told) for of in zip(*told, strict=True)]
    return Found(
        name, seed, state.global_step, loss, trace, squared_norm, mean[0], mean[1],
        scale.value, scale.low, scale.high if math.isfinite(scale.high) else None,
    )  # fmt: skip


def sample_by_sample(
    state: TrainState, inputs: Tensor, labels: Tensor, chunk: int
) -> tuple[float, float, float]:
    """Return mean loss, tr(Σ) and ‖G‖² over these samples, from the gradient of each (torch.func)."""
    model = state.model
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        outputs = torch.func.functional_call(model, parameters, (x[None],))
        loss = F.cross_entropy(outputs.flatten(0, -2), y.reshape(-1))
        return loss, loss.detach()

    each = torch.func.vmap(torch.func.grad(loss_of, has_aux=True), in_dims=(None, 0, 0))
    total = torch.zeros(sum(p.numel() for p in weights.values()), dtype=torch.float64)
    squares = losses = 0.0
    for x, y in zip(inputs.split(chunk), labels.split(chunk), strict=True):
        with sdpa_kernel(SDPBackend.MATH):  # the others have no rule for a batch of gradients
            gradients, of_samples = each(weights, x, y)
        flat = torch.cat([g.flatten(1) for g in gradients.values()], 1).double()
        total += flat.sum(0)
        squares += float(flat.square().sum())
        losses += float(of_samples.sum())
    n = len(inputs)
    squared_norm = float((total / n).square().sum())
    return losses / n, (squares - n * squared_norm) / (n - 1), squared_norm


def by_micro_gradients(
    state: TrainState, inputs: Tensor, labels: Tensor, generator: torch.Generator
) -> list[Noise]:
    """Return what 64 windows of 8 micro-batches tell, drawn from these samples."""
    told = []
    for _ in range(WINDOWS):
        chosen = torch.randperm(len(inputs), generator=generator)[:BATCH]
        window: list[Any] = [(inputs[i], labels[i]) for i in chosen.chunk(MICRO_BATCHES)]
        for parameter in state.parameters:
            parameter.grad = None
        measured = noise_scale(state.model, state.loss_fn, window, training_samples=len(inputs))
        told.append(measured.window)
    for parameter in state.parameters:
        parameter.grad = None
    return told


def main(arguments: list[str]) -> None:
    """Print what the checkpoints of a model and a seed show, a line of JSON each."""
    parser = argparse.ArgumentParser(prog="frozen.py")
    parser.add_argument("model", choices=CASES)
    parser.add_argument("seed", type=int)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for found in checkpoints(given.model, given.seed):
        print(json.dumps(asdict(found)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
