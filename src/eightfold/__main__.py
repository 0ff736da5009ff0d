"""`python -m eightfold` is the `eightfold` command."""

import gc
import os
import sys

# Objects made while starting stay; looking through them again and again takes a tenth of the time to an answer.
_ALLOCATIONS_BEFORE_COLLECTION = 50_000


def main() -> int:
    """Run the command line as a process of its own; see cli.main."""
    gc.set_threshold(_ALLOCATIONS_BEFORE_COLLECTION)
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")  # looking for some takes longer than using pydantic
    from eightfold.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
