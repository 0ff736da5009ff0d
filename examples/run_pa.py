"""MindIE's run_pa on a CPU: the same flags, the same order of events, the same lines.

    python -m examples.run_pa --model_path MODEL --input_texts "What's deep learning?" --max_output_length 20

The model is loaded, warmed up with prompts of --max_input_length tokens, and asked; `Answer[i]: ...` is what it said.
With ATB_LLM_BENCHMARK_ENABLE=1 in the environment, times go into a CSV file; see server/benchmark.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from examples.arguments import exit_code
from examples.server import benchmark
from examples.server.arguments import MAX_BLOCK_SIZE, build_parser, refuse
from examples.server.generate import AdmissionError, Request, Sizes, Timing, leave_to_first, load, pages_for
from examples.server.prompts import Prompt, encode, read_prompts, text_or_file

from eightfold.errors import CapacityError
from eightfold.format.checkpoint import Checkpoint
from eightfold.machine import total_bytes
from eightfold.tokenizer import Tokenizer, stop_token_ids

LOG = logging.getLogger("run_pa")
GIB = 2**30

DEFAULT_BLOCK_SIZE = 128
# Token id of the warm-up's prompts.
WARM_UP_TOKEN = 1
# Switches of the original that do nothing here.
IDLE_SWITCHES = ("ATB_PROFILING_ENABLE", "ATB_LLM_LOGITS_SAVE_ENABLE", "ATB_LLM_TOKEN_IDS_SAVE_ENABLE")

# An answer and how many tokens the answers up to it have together.
TokenNum = tuple[int, int]


class PARunner:
    """A loaded model with the sizes of its batches and of its cache."""

    def __init__(
        self,
        model_path: str,
        *,
        max_batch_size: int = 1,
        max_prefill_batch_size: int | None = None,
        max_input_length: int = 1024,
        max_output_length: int = 20,
        max_position_embeddings: int | None = None,
        max_prefill_tokens: int = -1,
        block_size: int = DEFAULT_BLOCK_SIZE,
        chat_template: str | None = None,
        load_tokenizer: bool = True,
    ) -> None:
        """Load the model.

        Args:
            model_path: a float or quantized model directory.
            max_batch_size: requests that are decoded together, and copies of a single prompt.
            max_prefill_batch_size: requests that are prefilled together; None for max_batch_size.
            max_input_length: tokens of a warm-up prompt.
            max_output_length: new tokens for which the cache has room.
            max_position_embeddings: another context than config.json's.
            max_prefill_tokens: tokens that are prefilled together; -1 for all that a prefill batch can need.
            block_size: positions of a cache block.
            chat_template: another template than the model's.
            load_tokenizer: False where prompts and answers are token ids.
        """
        self.model_path = model_path
        self.max_batch_size = max_batch_size
        self.max_prefill_batch_size = max_prefill_batch_size or max_batch_size
        self.max_input_length, self.max_output_length = max_input_length, max_output_length
        self.block_size = _usable_block_size(block_size)
        longest = max_input_length + max_output_length
        self.max_prefill_tokens = (
            self.max_prefill_batch_size * longest if max_prefill_tokens < 0 else max_prefill_tokens
        )
        self.num_blocks = math.ceil(longest / self.block_size) * max_batch_size
        checkpoint = Checkpoint.open(Path(model_path))
        if max_position_embeddings is not None:
            checkpoint.config = replace(checkpoint.config, max_position_embeddings=max_position_embeddings)
        self.tokenizer = Tokenizer(checkpoint.directory, chat_template) if load_tokenizer else None
        self.stop_ids = stop_token_ids(checkpoint.directory, checkpoint.config_raw)
        self.config = checkpoint.config
        pages = pages_for(self.num_blocks, self.block_size, max_batch_size)
        self.generate = load(checkpoint, self.tokenizer, pages, max_batch_size)
        LOG.info("hbm_capacity(GB): %.2f, init_memory(GB): %.2f", (total_bytes() or 0) / GIB, peak_bytes() / GIB)

    def __repr__(self) -> str:
        names = ("model_path", "max_batch_size", "max_prefill_batch_size", "max_input_length", "max_output_length")
        more = ("max_prefill_tokens", "block_size", "num_blocks")
        return f"PARunner({', '.join(f'{name}={getattr(self, name)!r}' for name in names + more)})"

    def warm_up(self) -> None:
        """Answer prompts of the largest size, one token each, and say what memory that took at its peak."""
        LOG.info("---------------begin warm_up---------------")
        context = self.config.max_position_embeddings
        length = min(self.max_input_length, context - 1)
        if length < self.max_input_length:
            LOG.info("warm-up prompts have %d tokens, as the context has %d", length, context)
        requests = [Request(i, [WARM_UP_TOKEN] * length) for i in range(self.max_prefill_batch_size)]
        self._generate(requests, 1, frozenset())
        LOG.info("warmup_memory(GB): %.2f", peak_bytes() / GIB)
        LOG.info("---------------end warm_up---------------")

    def requests(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Request]:
        """Return prompts as requests; a single one as many times as the batch is large.

        Raises:
            CapacityError: a prompt has no tokens, or does not fit the context together with its answer.
        """
        copies = self.max_batch_size if len(prompts) == 1 else 1
        requests = [Request(i, ids) for i, ids in enumerate([encode(prompt, self.tokenizer) for prompt in prompts])]
        for request in requests:
            self._require_room(request, max_new_tokens)
        return requests if copies == 1 else [Request(i, requests[0].input_ids) for i in range(copies)]

    def _require_room(self, request: Request, max_new_tokens: int) -> None:
        length, context = len(request.input_ids), self.config.max_position_embeddings
        if not length:
            raise CapacityError(f"input {request.req_id}", got="no tokens", expected="at least one")
        if length + max_new_tokens > context:
            raise CapacityError(
                f"input {request.req_id}",
                got=f"{length} tokens and {max_new_tokens} new ones",
                expected=f"at most {context} together",
                action="Shorten it, or lower --max_output_length.",
            )
        self.config.require_ids(request.input_ids)

    def infer(
        self, prompts: Sequence[Prompt], max_output_length: int | None = None, ignore_eos: bool = False
    ) -> tuple[list[Any], list[TokenNum], float]:
        """Answer prompts.

        Args:
            prompts: texts, chats or token ids.
            max_output_length: new tokens of each answer; None for the runner's.
            ignore_eos: go on after a stop token.

        Returns:
            The answers with their special tokens (without a tokenizer, int64 tensors of token ids, numpy's if there
            is no torch); for each one its index and the number of tokens of all answers up to it; and the seconds of
            all of them.

        Raises:
            AdmissionError: a prompt does not fit the batch or the cache.
            CapacityError: a prompt does not fit the model.
        """
        new_tokens = max_output_length or self.max_output_length
        stop_ids = frozenset[int]() if ignore_eos else self.stop_ids
        LOG.info("---------------begin inference---------------")
        requests = self.requests(prompts, new_tokens)
        for request in requests:
            if len(request.input_ids) > self.max_input_length:
                LOG.warning("input %d is longer than max_input_length %d", request.req_id, self.max_input_length)
        if benchmark.enabled():
            self._generate([Request(r.req_id, r.input_ids) for r in requests], 2, stop_ids)
        started = time.perf_counter()
        timing = self._generate(requests, new_tokens, stop_ids)
        seconds = time.perf_counter() - started
        LOG.info("---------------end inference---------------")
        if benchmark.enabled():
            self._report(requests, new_tokens, seconds, timing)
        answers = [self._decode(request.out_tokens) for request in requests]
        return answers, _cumulative(requests), seconds

    def _generate(self, requests: Sequence[Request], new_tokens: int, stop_ids: frozenset[int]) -> Timing:
        LOG.info("------total req num: %d, infer start--------", len(requests))
        sizes = Sizes(
            max_batch_size=self.max_batch_size,
            max_prefill_batch_size=self.max_prefill_batch_size,
            max_prefill_tokens=self.max_prefill_tokens,
            max_new_tokens=new_tokens,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            stop_ids=stop_ids,
        )
        return self.generate(requests, sizes)

    def _decode(self, token_ids: list[int]) -> Any:
        if self.tokenizer is not None:
            return self.tokenizer.decode(token_ids, keep_special=True)
        if importlib.util.find_spec("torch") is None:
            return np.array(token_ids, np.int64)
        import torch

        return torch.tensor(token_ids, dtype=torch.int64)

    def _report(self, requests: Sequence[Request], new_tokens: int, seconds: float, timing: Timing) -> None:
        columns = benchmark.row(self.max_batch_size, len(requests[0].input_ids), new_tokens, seconds, timing)
        LOG.info("%s", benchmark.summary(columns))
        benchmark.write_csv(benchmark.report_file(), columns)
        LOG.info("-------------------performance dumped------------------------")
        print(benchmark.markdown(columns), flush=True)


def peak_bytes() -> int:
    """Return the largest amount of memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cumulative(requests: Sequence[Request]) -> list[TokenNum]:
    totals, total = [], 0
    for request in requests:
        total += len(request.out_tokens)
        totals.append((request.req_id, total))
    return totals


def _usable_block_size(block_size: int) -> int:
    if 0 < block_size <= MAX_BLOCK_SIZE:
        return block_size
    LOG.warning("block_size %d is outside of 1 to %d", block_size, MAX_BLOCK_SIZE)
    return block_size if block_size > 0 else DEFAULT_BLOCK_SIZE


def _say_what_has_no_effect(args: argparse.Namespace) -> None:
    devices = os.environ.get("ASCEND_RT_VISIBLE_DEVICES")
    if devices:
        LOG.info("ASCEND_RT_VISIBLE_DEVICES=%s names NPUs; this runs on the CPU", devices)
    for name in IDLE_SWITCHES:
        if os.environ.get(name, "0") not in ("", "0"):
            LOG.warning("%s has no effect here", name)
    for name in ("enable_atb_torch", "trust_remote_code"):
        if getattr(args, name):
            LOG.info("--%s has no effect: see --help", name)


def _work(argv: Sequence[str]) -> int:
    _log_to_stdout()
    args = build_parser("python -m examples.run_pa").parse_args(argv)
    refuse(args)
    leave_to_first(Path(args.model_path))
    _say_what_has_no_effect(args)
    prompts = read_prompts(args)
    runner = PARunner(
        args.model_path,
        max_batch_size=args.max_batch_size,
        max_prefill_batch_size=args.max_prefill_batch_size,
        max_input_length=args.max_input_length,
        max_output_length=args.max_output_length,
        max_position_embeddings=args.max_position_embeddings,
        max_prefill_tokens=args.max_prefill_tokens,
        block_size=args.block_size,
        chat_template=None if args.chat_template is None else text_or_file(args.chat_template),
        load_tokenizer=args.load_tokenizer,
    )
    LOG.info("pa_runner: %s", runner)
    runner.requests(prompts, args.max_output_length)  # what cannot be answered is refused before the warm-up
    runner.warm_up()
    answers, token_nums, _ = runner.infer(prompts, ignore_eos=args.ignore_eos)
    for i, (answer, token_num) in enumerate(zip(answers, token_nums, strict=True)):
        LOG.info("Answer[%d]: %s", i, answer)
        LOG.info("Generate[%d] token num: %s", i, token_num)
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit code: 0, or 2 with one line on stderr."""
    return exit_code(lambda: _work(argv), AdmissionError)


def _log_to_stdout() -> None:
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s"))
    LOG.handlers, LOG.propagate = [handler], False
    LOG.setLevel(logging.INFO)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader of stdout has left
    sys.exit(main(sys.argv[1:]))
