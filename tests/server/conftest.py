"""A real engine on a small random model, a fake one, and servers of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from eightfold.engine.async_llm import AsyncLLM
from eightfold.engine.settings import EngineConfig
from eightfold.tokenizer import Tokenizer
from tests.conftest import tiny_config, write_model
from tests.server.fake_engine import FakeEngine
from tests.server.running import Running, running

CONTEXT = 384


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a byte tokenizer and a chat template."""
    directory = tmp_path_factory.mktemp("served") / "tiny"
    return write_model(directory, tiny_config(torch_dtype="float32", max_position_embeddings=CONTEXT))


@pytest.fixture(scope="session")
def config() -> EngineConfig:
    return EngineConfig(max_num_seqs=8, threads=1, max_batched_tokens=64)


@pytest.fixture(scope="session")
def real(model: Path, config: EngineConfig) -> Iterator[Running]:
    """A server of a real engine, for tests that leave it as it was."""
    with running(AsyncLLM.load(model, config), max_num_seqs=8, max_waiting=120) as found:
        yield found


@pytest.fixture
def tokenizer(model: Path) -> Tokenizer:
    return Tokenizer(model)


@pytest.fixture
def serve(tokenizer: Tokenizer) -> Iterator[Callable[..., Running]]:
    """Serve a fake engine: its attributes, and the server's settings, by name."""
    stack = ExitStack()

    def start(settings: dict[str, Any] | None = None, **engine: Any) -> Running:
        context: AbstractContextManager[Running] = running(FakeEngine(tokenizer, **engine), **(settings or {}))
        return stack.enter_context(context)

    with stack:
        yield start
