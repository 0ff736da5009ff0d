"""`python -m eightfold.lm_eval`: lm-eval's command line, which knows `--model eightfold`."""

from __future__ import annotations

import sys

from eightfold.errors import EightfoldError

_EXIT_USER = 2


def main() -> int:
    """Run lm-eval's command line; return the exit code."""
    try:
        import lm_eval.models  # noqa: F401 - fills the table
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError:
        print("eightfold: lm-eval is not installed. Install it: pip install 'eightfold[lm-eval]'", file=sys.stderr)
        return _EXIT_USER
    model_registry.register("eightfold", target="eightfold.lm_eval.model:EightfoldLM")
    try:
        cli_evaluate()
    except EightfoldError as error:
        print(f"eightfold: {error}", file=sys.stderr)
        return _EXIT_USER
    return 0


if __name__ == "__main__":
    sys.exit(main())
