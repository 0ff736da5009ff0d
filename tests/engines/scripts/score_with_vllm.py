"""Scores token chunks with models in vLLM, one after the other in this process.

score_with_vllm.py CHUNKS.json OPTIONS.json DIR RESULT.json [DIR RESULT.json ...]

CHUNKS.json: lists of token ids. RESULT.json: {"nll": [...], "top": [...]}, for each token but the first of its chunk.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")


def score(model: str, chunks: list[list[int]], options: dict) -> dict:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    length = max(map(len, chunks))
    sizes = {"max_model_len": length + 8, "max_num_batched_tokens": 128, "max_num_seqs": 2}  # 128: logits take memory
    llm = LLM(model=model, **{"enable_prefix_caching": False, "enforce_eager": True, **sizes, **options})
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    answers = llm.generate([{"prompt_token_ids": chunk} for chunk in chunks], sampling, use_tqdm=False)
    nll, top = [], []
    for chunk, answer in zip(chunks, answers, strict=True):
        for token, found in zip(chunk[1:], answer.prompt_logprobs[1:], strict=True):
            nll.append(-found[token].logprob)
            top.append(next(each for each, value in found.items() if value.rank == 1))
    del llm, answers
    gc.collect()
    if options.get("tensor_parallel_size", 1) == options.get("pipeline_parallel_size", 1) == 1:
        cleanup_dist_env_and_memory()
    return {"nll": nll, "top": top}


def main() -> None:
    chunks, options = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    if not options:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    pairs = sys.argv[3:]
    for model, result in zip(pairs[::2], pairs[1::2], strict=True):
        Path(result).write_text(json.dumps(score(model, chunks, options)))


if __name__ == "__main__":
    main()
