"""Run compare_schemes.ipynb and keep what it prints: `make notebook`, on the model of `make demo`.

MODEL=DIRECTORY python examples/notebooks/refresh.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).with_name("compare_schemes.ipynb")


def main(target: Path = NOTEBOOK) -> None:
    """Write the notebook with its outputs; the kernel inherits MODEL, WORK and CHUNKS from the environment.

    Raises:
        CellExecutionError: a cell failed.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=1800, kernel_name="python3", record_timing=False).execute()
    notebook.metadata = {"kernelspec": notebook.metadata["kernelspec"], "language_info": {"name": "python"}}
    nbformat.write(notebook, target)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
