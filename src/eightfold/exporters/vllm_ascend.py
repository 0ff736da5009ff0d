"""A directory that vllm-ascend reads."""

from __future__ import annotations

from functools import partial

from eightfold.exporters.loaders import plan_for

plan = partial(plan_for, "vllm-ascend")
