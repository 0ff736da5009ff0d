"""A server of a real model, and one of the same model that thinks first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

KEY, NAME = "secret", "qwen"
CONTEXT = "8192"


@pytest.fixture(scope="session")
def home() -> Path:
    """Where `make clients` has put the environments and the model."""
    if "EIGHTFOLD_CLIENTS" not in os.environ:
        pytest.skip("EIGHTFOLD_CLIENTS is not set: run `make clients`")
    return Path(os.environ["EIGHTFOLD_CLIENTS"]).absolute()


@contextmanager
def serving(model: Path, template: Path) -> Iterator[str]:
    """Serve a model with a chat template; give the address of its API."""
    command = ["serve", str(model), "--port", "0", "--served-model-name", NAME, "--chat-template", str(template)]
    process = subprocess.Popen(
        [sys.executable, "-m", "eightfold", *command, "--max-model-len", CONTEXT, "--kv-memory", "300MB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "EIGHTFOLD_API_KEY": KEY},
    )
    try:
        ready = next((line for line in process.stdout if line.startswith("ready at ")), None)
        assert ready is not None, "the server did not start"
        yield f"{ready.split()[2]}/v1"
    finally:
        process.terminate()
        process.stdout.close()
        process.wait(60)


@pytest.fixture(scope="session")
def environment(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What the scripts are told of both servers."""
    folder, model = tmp_path_factory.mktemp("templates"), home / "qwen"
    own = (model / "chat_template.jinja").read_text()
    # As small a model as this one calls its tools for ever unless they are gone when it has a result.
    answering = own.replace("{%- if tools %}", "{%- if tools and messages[-1].role != 'tool' %}")
    thinking = answering.replace("<|im_start|>assistant\\n' }}", "<|im_start|>assistant\\n<think>\\n' }}")
    assert len({own, answering, thinking}) == 3
    urls = {}
    with ExitStack() as stack:
        for name, template in (("EIGHTFOLD_URL", answering), ("EIGHTFOLD_THINKING_URL", thinking)):
            path = folder / f"{name}.jinja"
            path.write_text(template)
            urls[name] = stack.enter_context(serving(model, path))
        about = {"EIGHTFOLD_API_KEY": KEY, "EIGHTFOLD_MODEL": NAME, "EIGHTFOLD_TOKENIZER": str(model)}
        yield {**os.environ, **urls, **about}
