"""Both steps of a recipe against the large batch, by plain autograd in float64."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.recipes.recipe import Recipe, micro_batches
from gaccum_exp import watch

FOLDER = Path(__file__).parent
NAMES = sorted({p.stem for p in FOLDER.glob("*.py")} - {"recipe", "comparison", "__main__"})
"""The files that are recipes."""


def recipes_of(name: str) -> dict[str, Recipe]:
    """Return the recipes of a file by their titles."""
    return importlib.import_module(f"experiments.recipes.{name}").RECIPES


def samples_of(recipe: Recipe) -> int:
    """Return the samples of its window."""
    return len(tree_leaves(recipe.batch())[0])


def cut(samples: int, accum_steps: int, equal: bool) -> list[int]:
    """Return sizes of micro-batches: equal, or no two alike where there are samples enough."""
    if equal:
        return [samples // accum_steps] * accum_steps
    sizes = [1 + k % 3 for k in range(accum_steps - 1)]
    return [*sizes, samples - sum(sizes)]


def made(recipe: Recipe, sizes: Sequence[int], dtype: torch.dtype = torch.float64) -> Any:
    """Return (model, optimizer, window), always with the same weights."""
    torch.manual_seed(0)
    model = recipe.build().to(dtype)
    return model, recipe.optimizer(model), micro_batches(recipe.batch(), sizes)


def each(optimizer: Any) -> list[torch.optim.Optimizer]:
    """Return the optimizers of a recipe, the one that is judged last."""
    return list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]


def stepped(recipe: Recipe, step: Any, sizes: Sequence[int]) -> dict[str, Tensor]:
    """Run a step at weights that do not move; return the gradients that reached its optimizers."""
    model, optimizer, window = made(recipe, sizes)
    reached: dict[str, Tensor] = {}
    names = {id(p): name for name, p in model.named_parameters()}

    def note(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for p in (p for group in stepping.param_groups for p in group["params"]):
            if p.grad is not None:
                reached[names[id(p)]] = p.grad.clone()

    for one in each(optimizer):
        one.param_groups[0]["lr"] = 0.0
        one.register_step_pre_hook(note)
    step(model, optimizer, window)
    return reached


def large_batch(recipe: Recipe) -> dict[str, Tensor]:
    """Return the gradient of all samples in one pass."""
    model, _, (batch,) = made(recipe, [samples_of(recipe)])
    recipe.large_batch(model, batch).backward()
    recipe.before_step([p for p in model.parameters() if p.grad is not None])
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gradient by its parameter's name."""
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return ‖found − expected‖ / ‖expected‖ over all parameters; of steps that draw nothing."""
    assert found.keys() == expected.keys()
    a, b = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    return float((a - b).norm() / b.norm())


def audited(recipe: Recipe, step: Any, sizes: Sequence[int]) -> Any:
    """Return what `watch` says of a step; of the sound one it is given no criterion."""
    model, optimizer, window = made(recipe, sizes)
    criterion = recipe.watched if step is recipe.first_written else None
    with watch(model, criterion, each(optimizer)[-1]) as audit:
        step(model, optimizer, window)
    return audit
