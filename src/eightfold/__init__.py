"""8-bit LLM checkpoints in the Ascend / MindIE format: quantize, inspect, run, evaluate."""

__version__ = "0.1.0"
