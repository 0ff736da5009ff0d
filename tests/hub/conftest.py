"""A hub on localhost with a few models, and the command line in processes that know no other hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import Result, tiny_config, write_model
from tests.hub.fake_hub import FakeHub

Run = Callable[..., Result]

# What a repository holds beside a model, and nobody fetches.
STRANGE = {
    "README.md": b"# A model",
    "consolidated.safetensors": b"Mistral's own layout",
    "modeling_own.py": b"raise SystemExit('executed')",
    "onnx/model.onnx": b"another format",
    "pytorch_model.bin": b"a pickle",
    "tokenization_own.py": b"raise SystemExit('executed')",
    "adapter_model.safetensors": b"an adapter",
}


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="session")
def model_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return files_of(write_model(tmp_path_factory.mktemp("hub") / "model", tiny_config()))


@pytest.fixture
def hub(model_files: dict[str, bytes]) -> Iterator[FakeHub]:
    hub = FakeHub()
    hub.add("Org/Tiny", {**model_files, **STRANGE, "LICENSE": b"the licence"})
    yield hub
    hub.close()


@pytest.fixture
def online(hub: FakeHub, cli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command, in this process, that finds this hub; keyword arguments are environment variables."""
    constants = pytest.importorskip("huggingface_hub.constants")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "EIGHTFOLD_HUB", "HF_HUB_OFFLINE", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    # The client has read its variables when it was imported, by whichever test was the first.
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 512)

    def run(*words: object, at: str = "", **variables: str) -> Result:
        address = at or hub.address
        with monkeypatch.context() as patched:
            for name, value in {"MODELSCOPE_ENDPOINT": address, **variables}.items():
                patched.setenv(name, value)
            patched.setattr(constants, "ENDPOINT", address)
            template = address + "/{repo_id}/resolve/{revision}/{filename}"
            patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
            return cli(*words)

    return run
