"""`python -m my_project`: gaccum_exp on this project's study, unless another one is asked for."""

import sys

from gaccum_exp import cli


def main() -> int:
    """Run the command line; return its exit status."""
    given = sys.argv[1:]
    chosen = any(argument.startswith("experiment=") for argument in given)
    return cli.main(given if chosen else ["experiment=denoising", *given])


if __name__ == "__main__":
    sys.exit(main())
