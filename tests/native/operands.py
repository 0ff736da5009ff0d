"""Operands of kernels that are tested alone: random, and up to the end of what may be read."""

from __future__ import annotations

import ctypes
import functools
import inspect
import mmap
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from eightfold.model import native as core
from tests.native import KERNELS

ISAS = core.extension.available_isas()
ISA = pytest.mark.parametrize("isa", ISAS)

INPUTS = (1, 3, 63, 64, 65, 576, 8193)  # K
NOTHING = np.zeros(0, np.float32)


def rng(*seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def at_page_end(array: np.ndarray) -> np.ndarray:
    """Return a copy whose last byte is the last that may be read: behind it lies a page without access."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(address + size), page, 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def seen(isa: str, stored: np.ndarray) -> np.ndarray:
    """Return the numbers that bytes of activations are: int8 + zero, signed where zero is 0."""
    return stored.view(np.int8) if KERNELS.zero(isa) == 0 else stored


def exact_product(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    # Below 2**53 sums of float64 are exact.
    return (x.astype(np.float64) @ weight.astype(np.float64).T).astype(np.int64)


def sums_of(size: int, seed: int, most: int = 2**31 - 1) -> np.ndarray:
    values = rng(size, seed).integers(-most, most, size, np.int64, endpoint=True)
    values[: size // 3] //= 2**16  # and small ones, whose roundings differ
    return values.astype(np.int32)


def reals(size: int, seed: int) -> np.ndarray:
    return rng(size, seed).normal(0, 1, size).astype(np.float32)


def each(names: str | tuple[str, ...], values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for each value, as pytest.mark.parametrize does, but in one step; a failure names the value."""
    of = (names,) if isinstance(names, str) else names

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**others: Any) -> None:
            for value in values:
                case = dict(zip(of, (value,) if isinstance(names, str) else value, strict=True))
                try:
                    test(**others, **case)
                except AssertionError as error:
                    raise AssertionError(f"{case}: {error}") from error

        signature = inspect.signature(test)
        others = [p for name, p in signature.parameters.items() if name not in of]
        run.__signature__ = signature.replace(parameters=others)  # type: ignore[attr-defined]
        return run

    return decorate
