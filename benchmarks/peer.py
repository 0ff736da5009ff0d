"""Time another engine as `eightfold bench` times ours; runs under that engine's own interpreter.

    PEER_PYTHON benchmarks/peer.py llama.cpp model-q8_0.gguf --prompt-len 512 --new-tokens 128 --batch 1 --repeat 3
    PEER_PYTHON benchmarks/peer.py openvino  model-q8_0.gguf ...
    PEER_PYTHON benchmarks/peer.py to-q8_0   model.gguf model-q8_0.gguf

Prints one JSON line with the keys of `eightfold bench --json` that have a meaning here: medians after one warm-up,
fresh random prompts each time. Needs numpy, and llama-cpp-python or openvino-genai; nothing of eightfold.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

PREFILL_TOKENS = 512  # llama.cpp's own n_ubatch
FIRST_ID, LAST_ID = 10, 40000  # random tokens: no control tokens, and in every vocabulary that we measure


class Work(NamedTuple):
    """B sequences of so many tokens in and out."""

    prompt_len: int
    new_tokens: int
    batch: int


class Times(NamedTuple):
    """Seconds of one repetition; prefill and decode are None where the engine does not tell them apart."""

    prefill: float | None
    decode: float | None
    whole: float


def peak_rss_mib() -> float:
    """Return the largest resident size of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class LlamaCpp:
    """llama.cpp by its C functions. Decoding is fed random tokens, so that no sampling is in the times."""

    package = "llama-cpp-python"

    def __init__(self, path: str, work: Work, threads: int) -> None:
        import llama_cpp

        self.lib, self.work, self.random = llama_cpp, work, np.random.default_rng(0)
        silence(llama_cpp)
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not model:
            sys.exit(f"llama.cpp cannot load {path}")
        params = llama_cpp.llama_context_default_params()
        # Each sequence has its share of n_ctx, rounded up as llama.cpp wants it.
        params.n_ctx = work.batch * (-(-(work.prompt_len + work.new_tokens) // 256) * 256)
        params.n_batch = max(2048, work.batch)
        params.n_ubatch, params.n_seq_max = PREFILL_TOKENS, work.batch
        params.n_threads = params.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def once(self) -> Times:
        """Run one repetition."""
        self.lib.llama_memory_clear(self.memory, True)
        length, sequences = self.work.prompt_len, range(self.work.batch)
        prompt = [(s, p, p == length - 1) for s in sequences for p in range(length)]
        started = time.perf_counter()
        for at in range(0, len(prompt), PREFILL_TOKENS):
            self.step(prompt[at : at + PREFILL_TOKENS])
        first = time.perf_counter()
        for i in range(1, self.work.new_tokens):
            self.step([(s, length + i - 1, True) for s in sequences])
        ended = time.perf_counter()
        return Times(first - started, ended - first, ended - started)

    def step(self, tokens: list[tuple[int, int, bool]]) -> None:
        """Feed random tokens as (sequence, position, whether logits are wanted)."""
        ids = self.random.integers(FIRST_ID, LAST_ID, len(tokens)).tolist()
        self.batch.n_tokens = len(tokens)
        for i, ((sequence, position, wants), token) in enumerate(zip(tokens, ids, strict=True)):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, position, wants
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, sequence
        if code := self.lib.llama_decode(self.context, self.batch):
            sys.exit(f"llama_decode: {code}")
        self.lib.llama_synchronize(self.context)


class OpenVino:
    """OpenVINO GenAI, which reads GGUF files itself; several sequences by continuous batching."""

    package = "openvino-genai"

    def __init__(self, path: str, work: Work, threads: int) -> None:
        import openvino
        import openvino_genai

        self.tensor, self.work, self.random = openvino.Tensor, work, np.random.default_rng(0)
        self.config = openvino_genai.GenerationConfig()
        self.config.max_new_tokens, self.config.ignore_eos, self.config.do_sample = work.new_tokens, True, False
        options = {"INFERENCE_NUM_THREADS": threads}
        if work.batch == 1:
            self.pipeline: Any = openvino_genai.LLMPipeline(path, "CPU", **options)
            return
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_batched_tokens = 4, 2048
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(path, scheduler, "CPU", options)

    def once(self) -> Times:
        """Run one repetition; its own counters tell prefill from decoding when there is one sequence."""
        shape = (1, self.work.prompt_len)
        ids = [self.tensor(self.random.integers(FIRST_ID, LAST_ID, shape)) for _ in range(self.work.batch)]
        started = time.perf_counter()
        if self.work.batch > 1:
            self.pipeline.generate(ids, [self.config] * self.work.batch)
            return Times(None, None, time.perf_counter() - started)
        metrics = self.pipeline.generate(ids[0], self.config).perf_metrics
        whole = time.perf_counter() - started
        milliseconds = metrics.get_ttft().mean, metrics.get_tpot().mean * (self.work.new_tokens - 1)
        return Times(milliseconds[0] / 1e3, milliseconds[1] / 1e3, whole)


def silence(llama_cpp: Any) -> None:
    """Drop llama.cpp's log; the callback has to live as long as the library."""
    llama_cpp.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(llama_cpp.quiet, ctypes.c_void_p(0))


def to_q8_0(source: str, target: str) -> None:
    """Write a GGUF file again with Q8_0 weights."""
    import llama_cpp

    silence(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    if code := llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params)):
        sys.exit(f"llama_model_quantize: {code}")


def rate(tokens: int, seconds: list[float | None]) -> float | None:
    """Return the median of tokens a second."""
    return median(tokens / s for s in seconds if s) if all(seconds) else None


def main() -> None:
    """Measure one engine, or convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=["llama.cpp", "openvino", "to-q8_0"])
    parser.add_argument("model")
    parser.add_argument("target", nargs="?", help="of to-q8_0")
    for name, default in (("--prompt-len", 512), ("--new-tokens", 128), ("--batch", 1), ("--repeat", 5)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--threads", type=int, required=False, default=2)
    args = parser.parse_args()
    if args.engine == "to-q8_0":
        to_q8_0(args.model, args.target)
        return
    work = Work(args.prompt_len, args.new_tokens, args.batch)
    started = time.perf_counter()
    engine: Any = {"llama.cpp": LlamaCpp, "openvino": OpenVino}[args.engine](args.model, work, args.threads)
    load_s = time.perf_counter() - started
    times = [engine.once() for _ in range(1 + args.repeat)][1:]
    result = {
        "engine": f"{engine.package} {version(engine.package)}",
        "prefill_tok_s": rate(work.batch * work.prompt_len, [t.prefill for t in times]),
        "decode_tok_s": rate(work.batch * (work.new_tokens - 1), [t.decode for t in times]),
        "output_tok_s": rate(work.batch * work.new_tokens, [t.whole for t in times]),
        "load_s": load_s,
        "peak_rss_mib": peak_rss_mib(),
        "threads": args.threads,
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
