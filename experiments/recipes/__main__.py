"""Show both steps of a recipe: how far each is from the large batch, and what `watch` says of it.

python -m experiments.recipes NAME [N]
"""

import argparse
from textwrap import indent

from experiments.recipes.comparison import (
    NAMES,
    audited,
    cut,
    error,
    large_batch,
    recipes_of,
    samples_of,
    stepped,
)


def main() -> None:
    """Print, of every recipe in a file, two distances and two reports."""
    parser = argparse.ArgumentParser(prog="python -m experiments.recipes")
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("accum_steps", metavar="N", type=int, nargs="?", default=3, help="default: 3")
    given = parser.parse_args()
    for title, recipe in recipes_of(given.name).items():
        sizes = cut(samples_of(recipe), given.accum_steps, recipe.equal)
        print(f"{title}: micro-batches of {', '.join(map(str, sizes))} samples, in float64")
        reference = large_batch(recipe)
        for step in (recipe.train_step, recipe.first_written):
            gap = error(stepped(recipe, step, sizes), reference)
            name = getattr(step, "func", step).__name__
            print(f"\n  {name}: {gap:.1e} from the large batch's gradient; watch says")
            print(indent(str(audited(recipe, step, sizes)), "    "))
        print()


if __name__ == "__main__":
    main()
