"""How fast does the engine serve? Beside vLLM, OpenVINO GenAI and llama.cpp, in turn on one machine.

    python benchmarks/serving.py --ours DIR [--part batch] [--part http] [--part prefix] [--part speculation] \\
        [--work DIR --peer-python VENV/bin/python --gguf smol.gguf] [--peer-python VLLM_VENV/bin/python --vllm DIR]

Parts; without --part, all of them:

batch        32 requests of 128 random tokens, 128 out, greedy, end tokens ignored: output tokens a second of each
             program's own batching, prompts included. Ours is LLM.generate. A program is a process of its own, one at
             a time, and a round runs each once.
http         one client of `eightfold serve`, streaming, beside what `eightfold bench` runs: speed after the first
             token, and how much later than a prompt takes the first token arrives, for 512 tokens and for 16. The two
             alternate, one repetition each, because what is looked for is less than the machine drifts within
             seconds; so bench's repetitions run in this process, beside the waiting server.
prefix       16 chats that begin with the same 1,500 tokens: time to the first token of the later ones, one after the
             other and 15 at once, over that of the first.
speculation  `eightfold serve --speculate` beside the same server without: a text to be copied (greedy) and prose
             (sampled with a seed). Answers have to be equal.

Peers are optional and as in native.py. The parts without them run twice as many rounds. What counts is the ratio within
a round; shown is the ratio of the medians over rounds, and the least and most of the rounds. The figures go to
benchmarks/results/serving.json, or to --results NAME: each call writes the parts that it ran and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from eightfold.evaluate import default_text
from eightfold.format.checkpoint import Checkpoint
from eightfold.model.native import choose_threads
from eightfold.model.native.load import load_model
from eightfold.model.native.measure import Runner, Workload
from eightfold.model.native.model import NativeModel
from eightfold.tokenizer import Tokenizer
from measure import run, save_results
from native import PEER_SCRIPT, PEERS, Shape, found_peers, q8_0_of
from peer import FIRST_ID, LAST_ID

Row = dict[str, Any]

BATCH = Shape(32, 128, 128)
SINGLE = (Shape(1, 512, 128), Shape(1, 16, 128))
FIRST_TOKENS = 10  # repetitions that only look for when a first token comes
SYSTEM_TOKENS, CHATS = 1500, 16
PASSAGE_TOKENS, ANSWER_TOKENS = 250, 200  # of speculation's tasks
SHORT_PARTS_ROUNDS = 2  # times --rounds, in the parts without peers


@dataclass
class Setup:
    """What is measured, and what came up on the way.

    Attributes:
        peers: the interpreter and the model of each peer that is there.
        commands: each that was run, once, with the last part of every path.
        versions: of each program.
    """

    ours: Path
    peers: dict[str, tuple[Path, Path]]
    rounds: int
    repeat: int
    threads: int
    speculate: int
    commands: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: {"eightfold": version("eightfold")})

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of our model."""
        return Tokenizer(self.ours)

    @cached_property
    def text_ids(self) -> list[int]:
        """Tokens of the essays that come with the package."""
        return self.tokenizer.encode(default_text(), special_tokens=False)

    @cached_property
    def starts(self) -> Iterator[int]:
        """Places in the text, none twice, so that no prompt begins as another and is found in the cache."""
        return iter(range(0, len(self.text_ids) // 2, 7))

    @cached_property
    def random(self) -> np.random.Generator:
        """For prompts; all different."""
        return np.random.default_rng(0)

    def piece(self, length: int) -> list[int]:
        """Return so many tokens of the text that begin where no other piece did."""
        start = next(self.starts)
        return self.text_ids[start : start + length]

    @property
    def more_rounds(self) -> int:
        """Rounds of a part that takes little time."""
        return SHORT_PARTS_ROUNDS * self.rounds

    def noted(self, command: list[str]) -> list[str]:
        """Return a command; keep it for the record."""
        text = shlex.join(word.rsplit("/", 1)[-1] for word in command)
        if text not in self.commands:
            self.commands.append(text)
        return command

    def call(self, *command: object) -> Row:
        """Run a command; return the JSON of its last line."""
        done = run(self.noted([str(word) for word in command]))
        found: Row = json.loads(done.stdout.splitlines()[-1])
        return found


@dataclass(frozen=True)
class Answer:
    """A streamed answer as its client saw it; seconds since the client began to connect."""

    first_s: float
    last_s: float
    tokens: int
    prompt_tokens: int
    cached_tokens: int
    text: str

    @property
    def decode_tok_s(self) -> float:
        """Tokens a second after the first."""
        return (self.tokens - 1) / (self.last_s - self.first_s)


@contextlib.contextmanager
def serving(setup: Setup, *options: object) -> Iterator[int]:
    """Run `eightfold serve` and yield its port once it answers."""
    words = [sys.executable, "-m", "eightfold", "serve", setup.ours, "--port", 0, "--threads", setup.threads, *options]
    command = setup.noted([str(word) for word in words])
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert process.stdout is not None
            found = re.search(r"ready at http://127\.0\.0\.1:(\d+)", "".join(_until_ready(process.stdout)))
            if found is None:
                log.seek(0)
                sys.exit(f"{shlex.join(command)}: did not start\n{log.read()}")
            yield int(found[1])
        finally:
            process.terminate()
            process.wait(60)


def _until_ready(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if "ready at" in line:
            return


def ask(port: int, path: str, content: Row) -> Answer:
    """Send a request and read its stream; what takes time is done after the last piece.

    A bare socket, because the client runs on the same processor: the time that a larger one takes would be counted.
    """
    asked = {"ignore_eos": True, "temperature": 0, **content, "stream": True, "stream_options": {"include_usage": True}}
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    pieces: list[tuple[float, bytes]] = []
    started = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rb") as stream:
        connection.sendall(f"{head}\r\nConnection: close\r\n\r\n".encode() + body)
        answer_head = b"".join(iter(stream.readline, b"\r\n"))
        if not answer_head.startswith(b"HTTP/1.1 200"):
            sys.exit(f"{path}: {answer_head.decode()}\n{stream.read().decode(errors='replace')}")
        while size := int(stream.readline(), 16):
            at = time.perf_counter() - started
            pieces.append((at, stream.read(size + 2)[:-2]))
    return _answer(pieces)


def _answer(pieces: list[tuple[float, bytes]]) -> Answer:
    usage: Row = {}
    texts, seen = [], []
    for at, piece in pieces:
        for line in piece.decode().splitlines():
            found = json.loads(line[6:]) if line.startswith("data: {") else {}
            if "error" in found:
                sys.exit(f"the stream broke off: {found['error']}")
            usage = found.get("usage") or usage
            for choice in found.get("choices", []):
                seen.append(at)
                texts.append(choice["text"] if "text" in choice else choice["delta"].get("content", ""))
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    counts = usage["completion_tokens"], usage["prompt_tokens"], cached
    return Answer(seen[0], seen[-1], *counts, "".join(texts))


def complete(port: int, prompt: list[int], max_tokens: int, **more: object) -> Answer:
    """Continue a prompt."""
    answer = ask(port, "/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, **more})
    if answer.tokens != max_tokens:
        sys.exit(f"an answer has {answer.tokens} tokens, expected {max_tokens}")
    return answer


def say(text: str) -> None:
    """Tell how it goes."""
    print(f"  {text}", file=sys.stderr, flush=True)


def compared(ours: list[float], theirs: list[float], digits: int = 3) -> Row:
    """Return the ratio of two medians, and the ratio within each round."""
    return {
        "ratio": round(median(ours) / median(theirs), digits),
        "ratios": [round(a / b, digits) for a, b in zip(ours, theirs, strict=True)],
    }


def summed(name: str, values: list[float], digits: int = 2) -> Row:
    """Return the median of what rounds gave, and all of them."""
    return {name: round(median(values), digits), f"{name}_rounds": [round(value, digits) for value in values]}


def batch(setup: Setup) -> list[Row]:
    """Measure 32 requests at a time."""
    programs = {"eightfold": (Path(sys.executable), setup.ours), **setup.peers}
    rates: dict[str, list[float]] = {name: [] for name in programs}
    peaks: dict[str, list[float]] = {name: [] for name in programs}
    options = (*BATCH.options(), "--repeat", setup.repeat, "--threads", setup.threads)
    for _, (name, (python, model)) in itertools.product(range(setup.rounds), programs.items()):
        found = setup.call(python, PEER_SCRIPT, name, model, *options)
        setup.versions[name] = found["engine"]
        rates[name].append(found["output_tok_s"])
        peaks[name].append(found["peak_rss_mib"])
        say(f"batch {BATCH}  {name:10} output {found['output_tok_s']:8.1f} tok/s")
    rows = [
        {"program": name, **summed("output_tok_s", rates[name]), **summed("peak_rss_mib", peaks[name], 0)}
        for name in programs
    ]
    rows[0]["against"] = {name: compared(rates["eightfold"], rates[name]) for name in setup.peers}
    return [{"shape": str(BATCH), **row} for row in rows]


def http(setup: Setup) -> list[Row]:
    """Measure one client beside `eightfold bench`."""
    with serving(setup) as port:
        return [_single(setup, port, shape) for shape in SINGLE]


def _single(setup: Setup, port: int, shape: Shape) -> Row:
    """Measure one shape; the first token in repetitions of its own, because they are short and there can be many."""
    native = load_model(Checkpoint.open(setup.ours), threads=setup.threads)
    rates: dict[str, list[float]] = {"serve": [], "bench": []}
    firsts: dict[str, list[float]] = {"serve": [], "bench": []}
    overheads = []
    for _ in range(setup.more_rounds):
        whole = _alternate(setup, native, port, shape, 1 + setup.repeat)
        short = _alternate(setup, native, port, shape._replace(new_tokens=2), FIRST_TOKENS)
        for name in rates:
            rates[name].append(median(answer.decode_tok_s for answer in whole[name][1:]))
            firsts[name].append(1e3 * median(answer.first_s for answer in short[name][1:]))
            say(f"http {shape}  {name:6} decode {rates[name][-1]:6.1f} tok/s  first token {firsts[name][-1]:6.1f} ms")
        pairs = zip(short["serve"][1:], short["bench"][1:], strict=True)
        overheads.append(1e3 * median(served.first_s - bench.first_s for served, bench in pairs))
    return {
        "shape": str(shape),
        **{key: value for name in rates for key, value in summed(f"{name}_decode_tok_s", rates[name]).items()},
        "decode": compared(rates["serve"], rates["bench"]),
        **{key: value for name in firsts for key, value in summed(f"{name}_ttft_ms", firsts[name]).items()},
        **summed("ttft_overhead_ms", overheads),
    }


def _alternate(setup: Setup, native: NativeModel, port: int, shape: Shape, count: int) -> dict[str, list[Answer]]:
    """Answer random prompts as the server does and as `eightfold bench` does, in turn."""
    bench = Runner(native, Workload(shape.prompt_len, shape.new_tokens, shape.batch))
    found: dict[str, list[Answer]] = {"serve": [], "bench": []}
    for _ in range(count):
        prompt = setup.random.integers(FIRST_ID, LAST_ID, shape.prompt_len).tolist()
        found["serve"].append(complete(port, prompt, shape.new_tokens))
        rates = bench.once()
        first = shape.batch * shape.prompt_len / rates.prefill_tok_s
        seconds = first, first + shape.batch * (shape.new_tokens - 1) / rates.decode_tok_s
        found["bench"].append(Answer(*seconds, shape.new_tokens, shape.prompt_len, 0, ""))
    return found


def prefix(setup: Setup) -> list[Row]:
    """Measure chats that begin alike."""
    firsts: list[float] = []
    later: dict[str, list[float]] = {"in turn": [], "at once": []}
    counts: tuple[int, int] = (0, 0)
    with serving(setup) as port:
        complete(port, setup.piece(64), 2)
        for _ in range(setup.more_rounds):
            system = setup.tokenizer.decode(setup.piece(SYSTEM_TOKENS))
            chats = [_chat(system, number) for number in range(2 * CHATS - 1)]
            firsts.append(1e3 * _chatted(port, chats[0]).first_s)
            answers = [_chatted(port, chat) for chat in chats[1:CHATS]]
            with ThreadPoolExecutor(CHATS - 1) as pool:
                crowd = list(pool.map(lambda chat: _chatted(port, chat), chats[CHATS:]))
            counts = (answers[-1].prompt_tokens, answers[-1].cached_tokens)
            for name, found in (("in turn", answers), ("at once", crowd)):
                later[name].append(1e3 * median(answer.first_s for answer in found))
            say(f"prefix  first {firsts[-1]:.0f} ms, " + ", ".join(f"{k} {v[-1]:.1f} ms" for k, v in later.items()))
    rows = [
        {"later": name, **summed("first_ttft_ms", firsts), **summed("later_ttft_ms", times), **compared(times, firsts)}
        for name, times in later.items()
    ]
    return [{**row, "prompt_tokens": counts[0], "cached_tokens": counts[1]} for row in rows]


def _chat(system: str, number: int) -> list[Row]:
    question = f"Question {number}: what does the text above say about number {number * 17 % 31}?"
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]


def _chatted(port: int, chat: list[Row]) -> Answer:
    return ask(port, "/v1/chat/completions", {"messages": chat, "max_tokens": 8})


def speculation(setup: Setup) -> list[Row]:
    """Measure prompt lookup; both servers stand ready, and one at a time is asked."""
    with serving(setup) as plain, serving(setup, "--speculate", setup.speculate) as guessing:
        ports = {"plain": plain, "speculate": guessing}
        return [_task(setup, ports, name, task) for name, task in _tasks(setup).items()]


def _tasks(setup: Setup) -> dict[str, Callable[[int], Row]]:
    """Return what is asked in each round: a text to go on copying, or the beginning of an essay to go on with.

    Prose is sampled at temperature 1: what a small model takes for the likeliest is soon the same sentence again.
    """
    line_end = setup.tokenizer.encode("\n\n", special_tokens=False)

    def copying(number: int) -> Row:
        passage = setup.text_ids[300 * number :][:PASSAGE_TOKENS]
        return {"prompt": [*passage, *line_end, *passage, *line_end, *passage[:20]], "temperature": 0}

    def prose(number: int) -> Row:
        return {"prompt": setup.text_ids[300 * number :][:100], "temperature": 1.0, "top_p": 0.9, "seed": number}

    return {"copying": copying, "prose": prose}


def _guesses(port: int) -> tuple[int, int]:
    """Return how many tokens a server has guessed so far, and how many of those were right."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        text = answer.read().decode()
    names = ("draft_tokens_total", "draft_tokens_accepted_total")
    guessed, right = (re.search(rf"^eightfold_{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE) for name in names)
    assert guessed is not None and right is not None
    return int(float(guessed[1])), int(float(right[1]))


def _task(setup: Setup, ports: dict[str, int], name: str, task: Callable[[int], Row]) -> Row:
    rates: dict[str, list[float]] = {kind: [] for kind in ports}
    same, before = True, _guesses(ports["speculate"])
    for number in range(setup.more_rounds):
        content = {"max_tokens": ANSWER_TOKENS, **task(number)}
        answers = [{kind: complete(port, **content) for kind, port in ports.items()} for _ in range(1 + setup.repeat)]
        same &= len({answer.text for pair in answers for answer in pair.values()}) == 1
        for kind, found in rates.items():
            found.append(median(pair[kind].decode_tok_s for pair in answers[1:]))
        say(f"speculation  {name:8} " + "  ".join(f"{kind} {found[-1]:.1f} tok/s" for kind, found in rates.items()))
    guessed, right = (after - b for after, b in zip(_guesses(ports["speculate"]), before, strict=True))
    return {
        "task": name,
        "draft_tokens": setup.speculate,
        "same_answers": same,
        "guessed": guessed,
        "guessed_right": right,
        **{key: value for kind in rates for key, value in summed(f"{kind}_decode_tok_s", rates[kind]).items()},
        **compared(rates["speculate"], rates["plain"]),
    }


PARTS: dict[str, Callable[[Setup], list[Row]]] = {
    "batch": batch,
    "http": http,
    "prefix": prefix,
    "speculation": speculation,
}


def print_rows(rows: list[Row]) -> None:
    """Print what counts of each row."""
    for row in rows:
        part, what = row["part"], row.get("program") or row.get("shape") or row.get("later") or row.get("task")
        medians = "  ".join(f"{k} {v}" for k, v in row.items() if isinstance(v, float) and k != "ratio")
        print(f"{part:12} {what:12} {medians}")
        pairs = {**row.get("against", {}), "bench": row.get("decode"), "": row if "ratios" in row else None}
        for name, pair in pairs.items():
            if pair:
                spread = f"{min(pair['ratios'])} to {max(pair['ratios'])}"
                print(f"{'':25} ratio{' to ' + name if name else ''} {pair['ratio']} ({spread})")


def peers_of(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Return the interpreter and the model of each peer that is there; say which is missing."""
    pythons = found_peers(args.peer_python)
    q8_0 = q8_0_of(args.gguf, pythons, args.work) if args.gguf else None
    models = {"llama.cpp": q8_0, "openvino": q8_0, "vllm": args.vllm}
    found = {}
    for name in PEERS:
        python, model = pythons.get(name), models[name]
        if python and model:
            found[name] = (python, model)
        else:
            say(f"{name} is left out: no {'--peer-python that has it' if model else 'model for it'}")
    return found


def main() -> None:
    """Measure the parts, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ours", type=Path, required=True, help="a directory for `eightfold serve`")
    parser.add_argument("--name", default="SmolLM2-135M W8A8+FAQuant", help="of the model of --ours")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated; default: all")
    parser.add_argument("--peer-python", type=Path, action="append", default=[], help="has a peer; may be repeated")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp and OpenVINO; written again as Q8_0")
    parser.add_argument("--work", type=Path, help="a folder where that is kept")
    parser.add_argument("--vllm", type=Path, help="the same model for vLLM, as compressed-tensors")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--repeat", type=int, default=3, help="repetitions in a round, after one to warm up")
    parser.add_argument("--threads", type=int, default=choose_threads())
    parser.add_argument("--speculate", type=int, default=8, metavar="K")
    parser.add_argument("--results", default="serving", metavar="NAME", help="of the file in benchmarks/results")
    args = parser.parse_args()
    if args.gguf and not args.work:
        parser.error("--gguf needs --work, where it is written again as Q8_0")
    parts = args.part or list(PARTS)
    peers = peers_of(args) if "batch" in parts else {}
    setup = Setup(args.ours, peers, args.rounds, args.repeat, args.threads, args.speculate)
    rows = [{"part": part, **row} for part in parts for row in PARTS[part](setup)]
    print_rows(rows)
    about = {
        "model": args.name,
        "rounds": args.rounds,
        "rounds_without_peers": setup.more_rounds,
        "repeat": args.repeat,
        "threads": args.threads,
        "missing": [name for name in PEERS if name not in peers] if "batch" in parts else [],
        "versions": setup.versions,
        "commands": setup.commands,
    }
    save_results(args.results, [about, *rows])


if __name__ == "__main__":
    main()
