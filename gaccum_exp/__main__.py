"""`python -m gaccum_exp`."""

import sys

from gaccum_exp.cli import main

if __name__ == "__main__":
    sys.exit(main())
