"""A directory that MindIE's ATB models read."""

from __future__ import annotations

from functools import partial

from eightfold.exporters.loaders import plan_for

plan = partial(plan_for, "mindie")
