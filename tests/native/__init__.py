"""Tests of the compiled core. EIGHTFOLD_TEST_CORE names another build of it to test, such as one with sanitizers."""

from __future__ import annotations

import importlib.util
import os
import sys

NAME = "eightfold.model.native._core"
OTHER_BUILD = os.environ.get("EIGHTFOLD_TEST_CORE")

if OTHER_BUILD and NAME not in sys.modules:
    spec = importlib.util.spec_from_file_location(NAME, OTHER_BUILD)
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[NAME])
