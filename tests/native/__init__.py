"""Tests of the compiled core.

EIGHTFOLD_TEST_CORE names a directory with another build of it to test, such as one with sanitizers.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

PACKAGE = "eightfold.model.native"
NAME = f"{PACKAGE}._core"


def _load_other_build(directory: Path) -> None:
    for name in ("_core", "_core_test"):
        spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", next(directory.glob(f"{name}.*.so")))
        assert spec is not None and spec.loader is not None
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])


def _test_module() -> ModuleType:
    try:
        return importlib.import_module(f"{PACKAGE}._core_test")
    except ImportError as error:
        raise ImportError("install with EIGHTFOLD_TESTS=ON, as make env does, to test single kernels") from error


if (other_build := os.environ.get("EIGHTFOLD_TEST_CORE")) and NAME not in sys.modules:
    _load_other_build(Path(other_build))

KERNELS = _test_module()  # single kernels and the pool, which only tests call
