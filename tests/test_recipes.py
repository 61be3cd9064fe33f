"""Every recipe does what its page says: the sound step, and the one that is first written."""

import subprocess
import sys

import pytest

from experiments.recipes.comparison import (
    FOLDER,
    NAMES,
    audited,
    cut,
    error,
    large_batch,
    recipes_of,
    samples_of,
    stepped,
)
from experiments.recipes.recipe import Recipe
from tests.support import ROOT

ROUNDING = 1e-12
RECIPES: dict[str, Recipe] = {
    title: recipe for name in NAMES for title, recipe in recipes_of(name).items()
}
NAMED_BY_WATCH = sorted(RECIPES.keys() - {"gan"})
"""All but the one whose cause lies in another optimizer's passes."""


@pytest.mark.parametrize("accum_steps", [1, 2, 3, 5])
@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_steps_with_the_large_batchs_gradient(name: str, accum_steps: int) -> None:
    """In float64, by plain autograd over all samples, in micro-batches of unequal sizes."""
    recipe = RECIPES[name]
    sizes = cut(samples_of(recipe), accum_steps, equal=False)
    assert error(stepped(recipe, recipe.train_step, sizes), large_batch(recipe)) <= ROUNDING


@pytest.mark.parametrize("name", RECIPES)
def test_the_way_it_is_first_written_is_wrong(name: str) -> None:
    """By more than a thousandth, at N = 3; with equal micro-batches where the recipe says so."""
    recipe = RECIPES[name]
    sizes = cut(samples_of(recipe), 3, recipe.equal)
    assert error(stepped(recipe, recipe.first_written, sizes), large_batch(recipe)) > 1e-3


@pytest.mark.parametrize("name", NAMED_BY_WATCH)
def test_watch_names_what_is_wrong_with_the_way_it_is_first_written(name: str) -> None:
    """By the cause that stands in the recipe."""
    recipe = RECIPES[name]
    audit = audited(recipe, recipe.first_written, cut(samples_of(recipe), 3, recipe.equal))
    assert (audit.verdict, audit.cause) == ("biased", recipe.cause), str(audit)


@pytest.mark.parametrize("file", NAMES)
def test_a_recipe_is_short_and_on_the_page(file: str) -> None:
    """So that it is read before it is copied."""
    assert len((FOLDER / f"{file}.py").read_text(encoding="utf-8").splitlines()) <= 110
    assert f"({file}.py)" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_a_recipe_is_shown_by_a_command() -> None:
    """Both steps, each with its distance to the large batch and what watch says of it."""
    command = [sys.executable, "-m", "experiments.recipes", "lora", "2"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sound, first = said.split("first_written: ")
    assert "e-16 from" in sound
    assert "  equivalent (N = 2" in sound
    assert "cause: loss scale" in first
