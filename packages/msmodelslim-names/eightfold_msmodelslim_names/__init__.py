"""The command `msmodelslim`: Huawei's tool where it is installed, else eightfold."""

import sys
from importlib.metadata import PackageNotFoundError, distribution


def main() -> int:
    """Run the command line; return the exit code."""
    try:
        distribution("msmodelslim")
    except PackageNotFoundError:
        from eightfold.msmodelslim.__main__ import main as run

        return run()
    from msmodelslim.cli.__main__ import main as real

    print(
        "note: msmodelslim itself is installed and runs; eightfold's is python -m eightfold.msmodelslim",
        file=sys.stderr,
    )
    return real() or 0
