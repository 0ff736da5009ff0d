"""How fast are prompts and answers far into a long context? Beside llama.cpp with keys and values in Q8_0, in turn.

    python benchmarks/contexts.py --ours DIR --gguf model-q8_0.gguf --peer-python VENV/bin/python
        [--depth 4096 --depth 32768] [--rounds 5] [--steps 8] [--threads 2]

At each depth, a round has `--steps` steps of an answer of each program, one after the other; the first also 512 tokens
of a prompt that end there, which take llama.cpp minutes. The other program is stopped meanwhile. Neither computes the
context before: times do not depend on what is in a cache. Ours holds zeros, llama.cpp copies of its first 512 tokens,
moved to their places. What counts is the ratio within a round; shown are medians, and the least and most of the ratios.
The figures go to benchmarks/results/contexts.json.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

PIECE = 512  # tokens of a prompt that run at once, in both programs
ROOM = 64  # positions for the answer


class Ours:
    """The native model, with a cache as FAQuant has it where the checkpoint says so."""

    def __init__(self, path: str, depth: int, threads: int) -> None:
        import numpy as np

        from eightfold.format.checkpoint import Checkpoint
        from eightfold.model.native.load import load_model
        from eightfold.model.native.model import PAGE, Chunk

        self.random, self.page, self.chunk, self.depth = np.random.default_rng(0), PAGE, Chunk, depth
        self.model = load_model(Checkpoint.open(Path(path)), threads=threads)
        self.model.allocate_cache(depth + ROOM)

    def feed(self, count: int, at: int) -> None:
        """Feed random tokens from this position on."""
        tokens = self.random.integers(10, 40000, count).tolist()
        pages = range(-(-(at + count) // self.page))
        prompt = at + count if count > 1 else self.depth
        self.model.forward([self.chunk(tokens, at, pages, prompt, wants=True, logits=False)])


class LlamaCpp:
    """llama.cpp with flash attention, keys and values in Q8_0."""

    def __init__(self, path: str, depth: int, threads: int) -> None:
        import numpy as np

        from peer import llama_model

        llama_cpp, model = llama_model(path)
        self.lib, self.random = llama_cpp, np.random.default_rng(0)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = depth + PIECE, PIECE, PIECE
        params.n_seq_max, params.kv_unified = 2, True
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = llama_cpp.GGML_TYPE_Q8_0
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(model, params)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(PIECE, 0, 1)
        self._fill(depth)

    def feed(self, count: int, at: int) -> None:
        """Feed random tokens from this position on, in place of what was there."""
        self.lib.llama_memory_seq_rm(self.memory, 0, at, -1)
        self.batch.n_tokens = count
        for i, token in enumerate(self.random.integers(10, 40000, count).tolist()):
            self.batch.token[i], self.batch.pos[i], self.batch.logits[i] = token, at + i, i == count - 1
            self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
        if code := self.lib.llama_decode(self.context, self.batch):
            sys.exit(f"llama_decode: {code}")
        self.lib.llama_synchronize(self.context)

    def _fill(self, depth: int) -> None:
        """Copy the first piece to all later places; sequence 1 holds a copy until it has moved."""
        self.feed(PIECE, 0)
        size = self.lib.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        self.lib.llama_state_seq_get_data(self.context, state, size, 0)
        for at in range(PIECE, depth, PIECE):
            if not self.lib.llama_state_seq_set_data(self.context, state, size, 1):
                sys.exit("llama.cpp does not take its own state back")
            self.lib.llama_memory_seq_add(self.memory, 1, 0, -1, at)
            self.lib.llama_memory_seq_cp(self.memory, 1, 0, -1, -1)
            self.lib.llama_memory_seq_rm(self.memory, 1, -1, -1)
        last = self.lib.llama_memory_seq_pos_max(self.memory, 0)
        if last != depth - 1:
            sys.exit(f"llama.cpp's context ends at {last}, expected {depth - 1}")
        self.feed(1, depth)  # moves the keys


PROGRAMS: dict[str, Any] = {"eightfold": Ours, "llama.cpp": LlamaCpp}


def serve(name: str, path: str, depth: int, threads: int) -> None:
    """Be one of the programs: do what each line of stdin asks for, "COUNT POSITION TIMES", and answer with seconds."""
    program = PROGRAMS[name](path, depth, threads)
    program.feed(1, depth)  # warms up
    print("ready", flush=True)
    for line in sys.stdin:
        count, at, times = map(int, line.split())
        started = time.perf_counter()
        for step in range(times):
            program.feed(count, at + step)
        print(time.perf_counter() - started, flush=True)


class Child:
    """A program in a process of its own."""

    def __init__(self, python: str, name: str, path: Path, depth: int, threads: int) -> None:
        command = [python, __file__, "--serve", name, str(path), str(depth), str(threads)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()
        self.process.send_signal(signal.SIGSTOP)

    def feed(self, count: int, at: int, times: int = 1) -> float:
        """Return the seconds that so many tokens took, at this position, the next and so on."""
        assert self.process.stdin
        self.process.send_signal(signal.SIGCONT)
        self.process.stdin.write(f"{count} {at} {times}\n")
        self.process.stdin.flush()
        seconds = float(self._answer())
        self.process.send_signal(signal.SIGSTOP)  # threads that wait for work may spin
        return seconds

    def _answer(self) -> str:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} has ended")
        return answer


@contextlib.contextmanager
def both(args: argparse.Namespace, depth: int) -> Iterator[list[Child]]:
    """Start the programs, and end them."""
    children: list[Child] = []
    try:
        children.append(Child(sys.executable, "eightfold", args.ours, depth, args.threads))
        children.append(Child(str(args.peer_python), "llama.cpp", args.gguf, depth, args.threads))
        yield children
    finally:
        for child in children:
            child.process.kill()


def rows_at(args: argparse.Namespace, depth: int) -> Iterator[dict[str, Any]]:
    """Measure at one depth; rates in tokens a second, and ratios of each round."""
    answers: list[list[float]] = []
    prompts: list[list[float]] = []
    with both(args, depth) as children:
        prompts.append([child.feed(PIECE, depth - PIECE) for child in children])
        for _ in range(args.rounds):
            answers.append([child.feed(1, depth, args.steps) for child in children])
    for at, child in enumerate(children):
        row = {
            "depth": depth,
            "program": child.name,
            "prefill_tok_s": PIECE / median(seconds[at] for seconds in prompts),
            "decode_tok_s": args.steps / median(seconds[at] for seconds in answers),
        }
        if not at:
            row["ratios"] = {
                "prefill_tok_s": [theirs / ours for ours, theirs in prompts],
                "decode_tok_s": [theirs / ours for ours, theirs in answers],
            }
        yield row


def main() -> None:
    """Measure at each depth, print and save."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
        return
    from measure import save_results

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True, help="for our native model")
    parser.add_argument("--gguf", type=Path, required=True, help="the same model as Q8_0")
    parser.add_argument("--peer-python", type=Path, required=True, help="has llama_cpp")
    parser.add_argument("--name", default="", help="of the model")
    parser.add_argument("--depth", type=int, action="append", metavar="N", help="default: 4096, 8192, 16384, 32768")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of an answer in a round, at most 64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", default="contexts", metavar="NAME", help="of the file in benchmarks/results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for depth in args.depth or (4096, 8192, 16384, 32768):
        for row in rows_at(args, depth):
            rows.append({"model": args.name or args.ours.name, **row})
            shown = "".join(
                f"   {key[:-6]} {median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
                for key, found in row.get("ratios", {}).items()
            )
            rates = f"{row['prefill_tok_s']:8.1f} {row['decode_tok_s']:7.1f}"
            print(f"{depth:6} {row['program']:10} {rates}{shown}", flush=True)
        save_results(args.results, [{"rounds": args.rounds, "steps": args.steps, "threads": args.threads}, *rows])


if __name__ == "__main__":
    main()
