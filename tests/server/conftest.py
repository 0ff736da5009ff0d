"""A real engine on a small random model, a fake one, and servers of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette")

from eightfold.engine.async_llm import AsyncLLM
from eightfold.engine.reasoning import Thinking
from eightfold.engine.settings import EngineConfig
from eightfold.tokenizer import Tokenizer
from tests.conftest import tiny_config, write_model
from tests.server.fake_engine import FakeEngine
from tests.server.running import Running, eventually, running

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


@pytest.fixture(scope="session")
def shared(model: Path) -> Iterator[Running]:
    """A server of a fake engine; tests get at it by `serve`."""
    with running(FakeEngine(Tokenizer(model))) as found:
        yield found


@pytest.fixture
def serve(shared: Running, model: Path) -> Iterator[Callable[..., Running]]:
    """Serve a fake engine: its attributes by name. With settings the server is the test's own, else as good as new."""
    service = shared.server.service
    usual = service.tokenizer, service.template, service.thinking
    stack = ExitStack()

    def start(settings: dict[str, Any] | None = None, template: str | None = None, **engine: Any) -> Running:
        found = shared
        if settings is not None:
            found = stack.enter_context(running(FakeEngine(Tokenizer(model), **engine), **settings))
        for name, value in engine.items():
            setattr(found.engine, name, value)
        found.server.service.max_model_len = found.engine.max_model_len
        if template is not None:
            found.engine.tokenizer = found.server.service.tokenizer = Tokenizer(model, template)
            found.server.service.template = template
            found.server.service.thinking = Thinking(found.server.service.tokenizer)
        return found

    with stack:
        yield start
    assert eventually(lambda: not (shared.engine.open or service.limiter.inside or service.limiter.held_bytes))
    service.tokenizer, service.template, service.thinking = usual
    service.__dict__.pop("fingerprint", None)  # which may be that of the test's template
    shared.engine.__init__(service.tokenizer)
    assert shared.http.get("/health").json() == {"status": "ok"}  # and what ended before has been logged


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open the page of a server; at the end, nothing may have been complained about in the console."""
    opened = []

    def open_(running: Running, *, expects: str | None = None, beside: Any = None, **options: Any) -> Any:
        """Args: the server; a complaint that is right; a page in whose browser this is a tab; options of a browser."""
        context = beside.context if beside else browser.new_context(**options)
        page = context.new_page()
        page.set_default_timeout(10_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(running.url)
        page.get_by_text(running.server.service.settings.model_names[0], exact=True).first.wait_for(state="attached")
        opened.append((page, complaints, expects))
        return page

    yield open_
    for page, complaints, expects in opened:
        page.context.close()
        assert [text for text in complaints if expects is None or expects not in text] == []
