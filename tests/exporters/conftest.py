"""Fixtures of quantizing, for what is exported."""

from tests.quant.conftest import one_thread as one_thread
