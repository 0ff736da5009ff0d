"""8-bit LLM checkpoints in the Ascend / MindIE format: quantize, inspect, run, serve, evaluate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from eightfold.engine.async_llm import AsyncLLM
    from eightfold.engine.llm import LLM
    from eightfold.engine.sampling_params import SamplingParams

try:
    from eightfold._version import __version__  # written when eightfold is installed, from the last tag
except ImportError:
    __version__ = "0.2.0.dev0"

__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]

_HOMES = {"LLM": "llm", "AsyncLLM": "async_llm", "SamplingParams": "sampling_params"}


def __getattr__(name: str) -> Any:
    """Load what is exported when it is first asked for: the command line starts without it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'eightfold' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"eightfold.engine.{_HOMES[name]}"), name)
