"""vLLM, in its own environment, on directories of ours: `make engines`.

Perplexity and likeliest tokens are compared with ours on the texts of the package. vLLM computes in bfloat16 between
products, which alone moves a few percent of the likeliest tokens of models as small as these.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from eightfold import LLM, SamplingParams
from eightfold.evaluate import cut_chunks, default_text
from eightfold.tokenizer import Tokenizer

pytestmark = pytest.mark.engines

SCRIPTS = Path(__file__).parent / "scripts"
CHUNKS, LENGTH = 10, 512

# Name -> model, options of quantize.
DIRECTORIES = {
    "smol-w8a16": ("smol", "--scheme w8a16 --no-weight-symmetric"),
    "smol-w8a8": ("smol", "--scheme w8a8"),  # a mixture: down_proj stays float
    "smol-w8a8-dynamic": ("smol", "--scheme w8a8-dynamic --anti-outlier smooth"),
    "smol-w8a8-mix": ("smol", "--scheme w8a8-mix --anti-outlier smooth --kv-int8"),
    "qwen-w8a16": ("qwen", "--scheme w8a16 --quantize-lm-head"),
    "qwen-w8a8": ("qwen", "--scheme w8a8 --target vllm-ascend"),  # down_proj as W8A16
    "qwen-w8a8-dynamic": ("qwen", "--scheme w8a8-dynamic --anti-outlier smooth"),
}
SPACE = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=1800, **options)


def made(home: Path, name: str, model: str, options: str) -> Path:
    """Return a quantized directory, made once and kept."""
    out = home / "out" / name
    if not out.is_dir():
        out.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "eightfold", "quantize", home / model, out, *options.split()]
        done = run(command)
        assert done.returncode == 0, done.stderr
    return out


def chunks_of(directory: Path, count: int = CHUNKS, length: int = LENGTH) -> list[list[int]]:
    return cut_chunks(Tokenizer(directory).encode(default_text(), special_tokens=False), count, length)


def scored_by_vllm(home: Path, directory: Path, chunks: list[list[int]], scratch: Path, **options: Any) -> Any:
    (scratch / "chunks").write_text(json.dumps(chunks))
    (scratch / "options").write_text(json.dumps(options))
    files = [scratch / name for name in ("chunks", "options")]
    command = [home / "vllm/bin/python", SCRIPTS / "score_with_vllm.py", *files, directory, scratch / "result"]
    done = run(command, env={**os.environ, **SPACE})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((scratch / "result").read_text())


def scored_by_us(directory: Path, chunks: list[list[int]]) -> dict[str, list[Any]]:
    llm = LLM(str(directory), prefix_caching=False)
    outputs = llm.generate([{"prompt_token_ids": c} for c in chunks], SamplingParams(max_tokens=1, prompt_logprobs=1))
    found = [token for output in outputs for token in output.prompt_logprobs[1:]]
    return {"nll": [-token.logprob for token in found], "top": [token.top[0][0] for token in found]}


def perplexity(scores: dict[str, list[Any]]) -> float:
    return math.exp(math.fsum(scores["nll"]) / len(scores["nll"]))


@pytest.mark.parametrize("name", DIRECTORIES)
def test_perplexity_and_the_likeliest_tokens_are_ours(home: Path, tmp_path: Path, capsys: Any, name: str):
    directory = made(home, name, *DIRECTORIES[name])
    chunks = chunks_of(directory)
    theirs, ours = scored_by_vllm(home, directory, chunks, tmp_path), scored_by_us(directory, chunks)
    same = sum(a == b for a, b in zip(theirs["top"], ours["top"], strict=True)) / len(ours["top"])
    row = {"name": name, "vllm": perplexity(theirs), "eightfold": perplexity(ours), "same_top": same}
    with (home / "results.jsonl").open("a") as results:
        results.write(json.dumps(row) + "\n")
    with capsys.disabled():
        print(f"\nperplexity {row['vllm']:.2f}, ours {row['eightfold']:.2f}, same likeliest token {same:.1%}", end=" ")
    assert row["vllm"] == pytest.approx(row["eightfold"], rel=0.015)
    assert same >= 0.93


def test_a_linear_computes_what_its_tensors_say(home: Path):
    """Also without the tensors that writers leave out; and no kernel of a GPU moves a zero point."""
    done = run([home / "vllm/bin/python", SCRIPTS / "check_linear.py"], env={**os.environ, **SPACE})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.pop("no bias where there is none") is True
    assert found.pop("zero points that a GPU keeps") == 256
    assert found.pop("that it would have moved") > 0
    assert found.pop("w8a8-dynamic") < 0.02  # its inputs are rounded
    assert {title: worst for title, worst in found.items() if worst > 2e-3} == {}


def test_two_ranks_are_one(home: Path, tmp_path: Path, capsys: Any):
    name = "qwen-w8a8"
    directory = made(home, name, *DIRECTORIES[name])
    chunks = chunks_of(directory, 2)
    one, two = (scored_by_vllm(home, directory, chunks, tmp_path, tensor_parallel_size=n) for n in (1, 2))
    with capsys.disabled():
        print(f"\nperplexity {perplexity(two):.2f}, one rank {perplexity(one):.2f}", end=" ")
    assert perplexity(two) == pytest.approx(perplexity(one), rel=0.01)


def test_linears_that_are_joined_have_one_type_or_are_refused(home: Path, tmp_path: Path):
    directory = made(home, "smol-apart", "smol", "--scheme w8a16 --keep-float model.layers.3.self_attn.k_proj")
    with pytest.raises(AssertionError) as caught:
        scored_by_vllm(home, directory, [[1, 2, 3]], tmp_path)
    assert (
        f"linears that vLLM joins in {directory}: got model.layers.3.self_attn.q_proj W8A16, "
        "model.layers.3.self_attn.k_proj FLOAT, model.layers.3.self_attn.v_proj W8A16, expected one type"
    ) in str(caught.value)


@contextmanager
def served(home: Path, directory: Path, log: Path) -> Iterator[str]:
    """Serve a directory with no flag that tells what it is; give the address of its API."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", port, "--max-model-len", 512, "--enforce-eager"]
    command = [
        str(word) for word in (home / "vllm/bin/python", SCRIPTS / "vllm_command.py", "serve", directory, *options)
    ]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **SPACE})
    try:
        for _ in range(900):
            assert process.poll() is None, log.read_text()[-3000:]
            try:
                urlopen(f"http://127.0.0.1:{port}/health").close()
                break
            except URLError:
                time.sleep(1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def test_a_served_model_answers_and_streams(home: Path, tmp_path: Path):
    name = "smol-w8a8"
    directory = made(home, name, *DIRECTORIES[name])
    prompt = "The capital of France is"
    with served(home, directory, tmp_path / "log") as url:
        done = run([home / "vllm/bin/python", SCRIPTS / "ask_vllm.py", url, prompt])
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["whole"] == answer["streamed"] and answer["pieces"] > 1 and answer["chat"]
    llm = LLM(str(directory))
    (ours,) = llm.generate(prompt, SamplingParams(max_tokens=12, temperature=0))
    assert ours.outputs[0].text.split()[:2] == answer["whole"].split()[:2]
