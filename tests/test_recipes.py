"""Every recipe does what its page says: the sound step, and the one that is first written."""

import importlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from experiments.recipes.recipe import Recipe, micro_batches
from gaccum_exp import watch
from tests.support import ROOT

ROUNDING = 1e-12
FOLDER = ROOT / "experiments" / "recipes"
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "recipe")
RECIPES: dict[str, Recipe] = {
    name: recipe
    for file in FILES
    for name, recipe in importlib.import_module(f"experiments.recipes.{file}").RECIPES.items()
}
NAMED_BY_WATCH = sorted(RECIPES.keys() - {"gan", "student and teacher"})
"""All but those whose cause lies in another optimizer's passes, or in state beside the model."""


def cut(samples: int, accum_steps: int, equal: bool) -> list[int]:
    """Return sizes of micro-batches: equal, or no two alike where there are samples enough."""
    if equal:
        return [samples // accum_steps] * accum_steps
    sizes = [1 + k % 3 for k in range(accum_steps - 1)]
    return [*sizes, samples - sum(sizes)]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def stepped(recipe: Recipe, step: Any, sizes: Sequence[int], dtype: torch.dtype) -> Any:
    """Run a step at weights that do not move; return the gradients that reached its optimizers."""
    model, optimizer, window = made(recipe, sizes, dtype)
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


def made(recipe: Recipe, sizes: Sequence[int], dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = recipe.build().to(dtype)
    return model, recipe.optimizer(model), micro_batches(recipe.batch(), sizes)


def each(optimizer: Any) -> list[torch.optim.Optimizer]:
    return list(optimizer.values()) if isinstance(optimizer, dict) else [optimizer]


def large_batch(recipe: Recipe) -> dict[str, Tensor]:
    model, _, (batch,) = made(recipe, [samples_of(recipe)], torch.float64)
    recipe.large_batch(model, batch).backward()
    recipe.before_step([p for p in model.parameters() if p.grad is not None])
    return gradients(model)


def samples_of(recipe: Recipe) -> int:
    return len(tree_leaves(recipe.batch())[0])


def error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    a, b = (torch.cat([g[name].flatten() for name in expected]) for g in (found, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("accum_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_steps_with_the_large_batchs_gradient(name: str, accum_steps: int) -> None:
    """In float64, by plain autograd over all samples, in micro-batches of unequal sizes."""
    recipe = RECIPES[name]
    sizes = cut(samples_of(recipe), accum_steps, equal=False)
    found = stepped(recipe, recipe.train_step, sizes, torch.float64)
    assert error(found, large_batch(recipe)) <= ROUNDING


@pytest.mark.parametrize("name", RECIPES)
def test_the_way_it_is_first_written_is_wrong(name: str) -> None:
    """By more than a thousandth, at N = 3; with equal micro-batches where the recipe says so."""
    recipe = RECIPES[name]
    sizes = cut(samples_of(recipe), 3, recipe.equal)
    found = stepped(recipe, recipe.first_written, sizes, torch.float64)
    assert error(found, large_batch(recipe)) > 1e-3


@pytest.mark.parametrize("name", NAMED_BY_WATCH)
def test_watch_names_what_is_wrong_with_the_way_it_is_first_written(name: str) -> None:
    """By the cause that stands in the recipe."""
    recipe = RECIPES[name]
    sizes = cut(samples_of(recipe), 3, recipe.equal)
    model, optimizer, window = made(recipe, sizes, torch.float64)
    with watch(model, recipe.watched, each(optimizer)[-1]) as audit:
        recipe.first_written(model, optimizer, window)
    assert (audit.verdict, audit.cause) == ("biased", recipe.cause), str(audit)


@pytest.mark.parametrize("file", FILES)
def test_a_recipe_is_short_and_on_the_page(file: str) -> None:
    """So that it is read before it is copied."""
    assert len((FOLDER / f"{file}.py").read_text(encoding="utf-8").splitlines()) <= 110
    assert f"({file}.py)" in (FOLDER / "README.md").read_text(encoding="utf-8")
