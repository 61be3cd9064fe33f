"""One window split in many random ways: what its micro gradients tell, beside what its samples tell."""

import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from experiments.noise_scale.frozen import CASES, batch_of, sample_by_sample
from experiments.notebook import composed
from gaccum_exp.core.noise_scale import noise_scale
from gaccum_exp.train.build import build

SPLITS, BATCH = 200, 64
MODELS = {"MLP": ("model=mlp", "data=digits"), **{name: case.overrides for name, case in CASES.items()}}


def standard_errors(model: str, splits: int = SPLITS, batch: int = BATCH) -> tuple[float, float]:
    """Return how many standard errors the means over splits are from the samples' own values.

    In float64, of tr(Σ) and ‖G‖², equal micro-batches and unequal ones in turn.
    """
    state = build(composed(*MODELS[model], "runtime.device=cpu", "runtime.precision=fp64"))
    inputs, labels = batch_of(state, torch.arange(batch))
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    _, trace, squared_norm = sample_by_sample(state, inputs, labels, 16)
    generator, found = torch.Generator().manual_seed(0), []
    for number in range(splits):
        order = torch.randperm(batch, generator=generator)
        sizes = [batch // 8] * 8 if number % 2 else [1, 3, 9, 20, batch - 33]
        window = list(zip(inputs[order].split(sizes), labels[order].split(sizes), strict=True))
        for parameter in state.parameters:
            parameter.grad = None
        found.append(noise_scale(state.model, state.loss_fn, window, samples=sizes).window)
    numbers = torch.tensor(found, dtype=torch.float64)
    truth = torch.tensor([trace, squared_norm - trace / batch], dtype=torch.float64)
    errors = numbers.std(0) / math.sqrt(splits)
    of_trace, of_norm = ((numbers.mean(0) - truth) / errors).tolist()
    return of_trace, of_norm


def table() -> str:
    """Return a row per model."""
    lines = [
        f"| one window of {BATCH}, {SPLITS} random splits | tr(Σ) − its samples' own | ‖G‖² likewise |",
        "|---|---|---|",
    ]
    for model in MODELS:
        of_trace, of_norm = standard_errors(model)
        lines.append(f"| {model} | {of_trace:+.2f} standard errors | {of_norm:+.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
