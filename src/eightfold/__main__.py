"""`python -m eightfold` is the `eightfold` command."""

import sys

from eightfold.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
