"""Small random models, written as the field writes them, and the command line in this process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: test machines are shared

import pytest
import torch
from safetensors.torch import save_file

from eightfold.architectures import FAMILIES as ROWS
from eightfold.config import parse_config
from eightfold.families import all_linears, all_norms

# A shell that starts tests in the background lets them ignore Ctrl-C, and their children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")

# Those with experts.
SPARSE = ("Qwen3MoeForCausalLM", "Qwen2MoeForCausalLM", "MixtralForCausalLM")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


def tiny_config(architecture: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """Return a config.json object of a two-layer model; head_dim is not hidden / heads."""
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": ROWS[architecture].model_type,
        "torch_dtype": "bfloat16",
        "vocab_size": 320,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 256,
        "eos_token_id": 257,
    }
    if architecture in SPARSE:
        config.update(_EXPERTS)
    return {**config, **changes}


_EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 24,
    "norm_topk_prob": True,
}


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Return all float tensors of a config, in its dtype, with ranges like a real model's."""
    parsed = parse_config(config, Path("config.json"))
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, config.get("torch_dtype") or config.get("dtype") or "float32")

    def normal(*shape: int, std: float) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * std).to(dtype)

    tensors = {f"{parsed.names.embedding}.weight": normal(parsed.vocab_size, parsed.hidden_size, std=1.0)}
    for name, linear in all_linears(parsed).items():
        if name == parsed.names.head and parsed.tie_word_embeddings:
            continue
        tensors[f"{name}.weight"] = normal(linear.n, linear.k, std=linear.k**-0.5)
        if linear.has_bias:
            tensors[f"{name}.bias"] = normal(linear.n, std=0.5)
    for name, size in all_norms(parsed).items():
        tensors[f"{name}.weight"] = (1 + normal(size, std=0.2).float()).to(dtype)
    return tensors


def write_tokenizer(directory: Path) -> None:
    """Write a byte-level tokenizer with a few special tokens and a chat template: 320 ids and no training data."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t) for t in ("<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, "bos_token_id": 256}))


def remove_template(directory: Path) -> None:
    """Take the chat template out of a model directory: transformers 5 and 4 look for it in two places."""
    (directory / "chat_template.jinja").unlink()
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


def write_model(
    directory: Path, config: dict[str, Any] | None = None, *, seed: int = 0, tokenizer: bool = True
) -> Path:
    """Write a random float model directory as transformers would."""
    config = config or tiny_config()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(random_tensors(config, seed), str(directory / "model.safetensors"), metadata={"format": "pt"})
    if tokenizer:
        write_tokenizer(directory)
    return directory


def token_samples(count: int = 6, vocab: int = 256, seed: int = 1) -> list[list[int]]:
    """Return random token sequences of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 24, (count,), generator=generator)
    return [torch.randint(0, vocab, (int(length),), generator=generator).tolist() for length in lengths]


@pytest.fixture
def float_model(tmp_path: Path) -> Path:
    """An untied bfloat16 Llama with a tokenizer, the test's own."""
    return write_model(tmp_path / "float")


# quantize says this of every Llama that tiny_config() makes.
HEAD_DIM_NOTE = (
    "note: head_dim is 16 and not hidden_size / heads, which MindIE takes for Llama: it would misread OUT.\n"
)


@dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def json(self) -> dict[str, Any]:
        """Return the last line of stdout as JSON."""
        document: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return document


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `eightfold ARGS` in this process."""
    from eightfold.cli.main import main

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["eightfold", *map(str, args)])
        capsys.readouterr()
        code = main()
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set")
    return Path(value)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder with the reference tool's tensors, digests and descriptions."""
    return _folder("EIGHTFOLD_GOLDEN")


@pytest.fixture(scope="session")
def smol() -> Path:
    """The folder that holds smol-bf16, smol-fp16 and smol.gguf."""
    return _folder("EIGHTFOLD_SMOL")


@pytest.fixture(scope="module")  # its event loop runs as long, and nobody else's can
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next((path for path in map(shutil.which, BROWSERS) if path), None)
    if executable is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
