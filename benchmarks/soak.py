"""Many clients at once, for minutes, who do all that clients do. Nobody may get a wrong answer.

    python benchmarks/soak.py DIR --clients 200 --minutes 5 [-- options of `eightfold serve`]

The mixture: continuations and chats, greedy and sampled with a seed, several answers to a prompt, log-probabilities,
answers of a given form, whole and streamed; clients that leave midway or send nonsense; and beside them connections
that say nothing, that send a head or a body byte by byte, or that never read their answer.

Every complete answer is compared with the one that the native core gives to the same request alone. At the end the
server has to be idle and healthy, no block of its cache may be held, and its memory, descriptors and threads may not
have grown. Prints one JSON document with what was done and the verdict; exits with 1 if anything was wrong. Talks to
127.0.0.1 only, and to the server that it starts itself.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from eightfold import LLM, SamplingParams
from eightfold.engine.sampling_params import StructuredOutput
from eightfold.tokenizer import Tokenizer

# Growth from the second third to the last: allocators take a while to have seen every size, and clients come and go.
GROWTH = {"rss_mib": 32.0, "descriptors": 40.0, "threads": 2.0}
REST_GROWTH = {"descriptors": 8.0, "threads": 8.0}  # from before the load to after it: thread pools have filled
SAMPLES = 30  # seconds from which on thirds are compared
IDLE_SECONDS = 25.0  # in which the server has to have closed a connection that sends no head

# A cache that the load fills soon, so that memory can settle, and that is too small for it, so that it is preempted.
DEFAULTS = ["--kv-memory", "96MiB"]


Answer = tuple[str, str]  # text and finish reason


@dataclass(frozen=True)
class Task:
    """A request and its right answers.

    Attributes:
        kind: what the report calls it.
        path: where it is sent.
        fields: of its body.
        answers: one for each choice.
        longest: the tokens of a greedy answer, which a client may cut at any length; None: it is asked as it is.
    """

    kind: str
    path: str
    fields: dict[str, Any]
    answers: list[Answer]
    longest: list[int] | None = None

    def cut(self, most: int, tokenizer: Tokenizer) -> tuple[dict[str, Any], list[Answer]]:
        """Return the body that asks for so many tokens at most, and the answers to it."""
        if self.longest is None:
            return self.fields, self.answers
        ends = self.answers[0][1] == "stop" and most > len(self.longest)
        answer = tokenizer.decode(self.longest[:most]), "stop" if ends else "length"
        return {**self.fields, "max_tokens": most}, [answer]


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    usage: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in GROWTH})
    health_s: list[float] = field(default_factory=list)


class Server:
    """`eightfold serve` in a process of its own."""

    def __init__(self, model: Path, options: list[str], log: Path) -> None:
        words = [sys.executable, "-m", "eightfold", "serve", str(model), "--port", "0", *options]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            found = re.search(r"ready at http://127\.0\.0\.1:(\d+)", line)
            if found:
                self.port = int(found[1])
                return
        raise SystemExit(f"the server did not start: {log.read_text()}")

    def usage(self) -> dict[str, float]:
        """Return its resident memory without mapped files, its open descriptors and its threads."""
        process = Path(f"/proc/{self.process.pid}")
        status = dict(re.findall(r"^(\w+):\s+(\d+)", (process / "status").read_text(), re.MULTILINE))
        return {
            "rss_mib": int(status["RssAnon"]) / 1024,
            "descriptors": len(list((process / "fd").iterdir())),
            "threads": int(status["Threads"]),
        }

    async def ask(self, request: bytes) -> AsyncGenerator[bytes, None]:
        """Send bytes; yield the answer's head, then its body as it comes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**22)
        try:
            writer.write(request)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            yield head
            if b"chunked" in head.lower():
                while size := int(await reader.readline(), 16):
                    yield (await reader.readexactly(size + 2))[:-2]
            else:
                found = re.search(rb"content-length: (\d+)", head.lower())
                if found:
                    yield await reader.readexactly(int(found[1]))
        finally:
            writer.close()

    async def fetch(self, path: str, content: Any = None) -> tuple[int, bytes]:
        """Return status and body of a GET, or of a POST of JSON."""
        parts = [
            part async for part in self.ask(_request(path, None if content is None else json.dumps(content).encode()))
        ]
        return int(parts[0].split()[1]), b"".join(parts[1:])

    async def metric(self, name: str) -> float:
        """Return one sample."""
        _, text = await self.fetch("/metrics")
        found = re.search(rf"^eightfold_{name}(?:{{.*}})? (\S+)$", text.decode(), re.MULTILINE)
        assert found, name
        return float(found[1])


def _request(path: str, body: bytes | None) -> bytes:
    if body is None:
        return f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    )
    return f"{head}Connection: close\r\n\r\n".encode() + body


WORDS = ["river", "stone", "music", "light", "winter", "garden", "engine", "silver", "paper", "mountain", "window"]
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": WORDS[:4]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


def learn(model: Path, words: argparse.Namespace, draw: random.Random) -> list[Task]:
    """Return random requests of all kinds, some prompts of which begin alike, and the answers to each alone."""
    llm = LLM(model, max_num_seqs=1, prefix_caching=False)
    tokenizer, vocab = llm.engine.tokenizer, llm.engine.model_config.vocab_size
    shared = [draw.randrange(vocab) for _ in range(words.longest_prompt)]
    tasks = list[Task]()
    for at in range(words.prompts):
        length = draw.randint(1, words.longest_prompt)
        own = [draw.randrange(vocab) for _ in range(length)]
        prompt = shared[: length // 2] + own[length // 2 :] if at % 3 == 0 else own
        for kind, more, params in _asked(at, words.longest_answer):
            path, fields, ids = "/v1/completions", {"prompt": prompt}, prompt
            if kind.startswith("chat") or kind == "form":
                # Forms are asked of chats, because random tokens say nothing to a model.
                if not tokenizer.has_chat_template:
                    continue
                content = " ".join(draw.choices(WORDS, k=min(length // 4 + 1, 40)))
                messages = [{"role": "user", "content": content}]
                path, fields = "/v1/chat/completions", {"messages": messages}
                ids = tokenizer.encode_chat(messages, add_generation_prompt=True)
            outputs = llm.generate(ids, params, progress=False)[0].outputs
            answers = [(each.text, str(each.finish_reason)) for each in outputs]
            longest = list(outputs[0].token_ids) if kind in ("greedy", "chat") else None
            tasks.append(Task(kind, path, {**fields, "max_tokens": params.max_tokens, **more}, answers, longest))
    return tasks


def _asked(at: int, longest: int) -> list[tuple[str, dict[str, Any], SamplingParams]]:
    """Return what is asked about the prompt of a number: kind, fields of the body, and their meaning to the engine."""
    half = max(longest // 2, 1)
    sampled = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "seed": at}
    forms: list[tuple[dict[str, Any], StructuredOutput]] = [
        ({"guided_regex": "[a-z]{1,9} [0-9]{3}"}, StructuredOutput(regex="[a-z]{1,9} [0-9]{3}")),
        ({"guided_choice": WORDS}, StructuredOutput(choices=tuple(WORDS))),
        ({"guided_json": SCHEMA}, StructuredOutput(json_schema=json.dumps(SCHEMA))),
    ]
    form, structured = forms[at % len(forms)]
    chat_logprobs = {"logprobs": True, "top_logprobs": 2}
    greedy = {"temperature": 0}
    return [
        ("greedy", greedy, SamplingParams(temperature=0.0, max_tokens=longest)),
        ("chat", greedy, SamplingParams(temperature=0.0, max_tokens=longest)),
        ("sampled", sampled, SamplingParams(**sampled, max_tokens=half)),
        ("n", {**sampled, "n": 3}, SamplingParams(**sampled, n=3, max_tokens=half)),
        ("logprobs", {**greedy, "logprobs": 3}, SamplingParams(temperature=0.0, max_tokens=half)),
        ("chat logprobs", {**greedy, **chat_logprobs}, SamplingParams(temperature=0.0, max_tokens=half)),
        ("form", {**greedy, **form}, SamplingParams(temperature=0.0, max_tokens=half, structured=structured)),
    ]


class Clients:
    """All of them."""

    def __init__(self, server: Server, tasks: list[Task], tokenizer: Tokenizer, longest: int) -> None:
        self._server, self._tasks, self._tokenizer, self._longest = server, tasks, tokenizer, longest
        self.tally = Tally()

    async def live(self, seed: int, ends: float) -> None:
        """Be one client."""
        draw = random.Random(seed)
        while time.monotonic() < ends:
            kind = draw.random()
            try:
                if kind < 0.1:
                    await self._nonsense(draw)
                else:
                    await self.question(draw, leaves=kind < 0.1 + 0.3)
            except (OSError, asyncio.IncompleteReadError) as error:
                self._fault(f"a connection broke: {type(error).__name__} {error}")
            await asyncio.sleep(draw.random() * 0.2)

    async def linger(self, seed: int, ends: float) -> None:
        """Be a connection that says nothing, says it slowly, or does not read."""
        draw = random.Random(seed)
        while time.monotonic() < ends:
            kind = draw.choice(("silent", "slow head", "slow body", "deaf"))
            with contextlib.suppress(ConnectionError):
                await self._linger(kind, ends)
            self.tally.counts[kind] += 1
            await asyncio.sleep(draw.random())

    async def _linger(self, kind: str, ends: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port, limit=4096)
        begin, seconds = time.monotonic(), 3.0 if kind == "deaf" else IDLE_SECONDS
        try:
            if kind == "deaf":
                asked = {"prompt": [1], "max_tokens": self._longest, "ignore_eos": True, "stream": True, "logprobs": 5}
                writer.write(_request("/v1/completions", json.dumps(asked).encode()))
            elif kind == "slow body":
                writer.write(_request("/v1/completions", b" " * 1000)[:-1000])
            while time.monotonic() < min(begin + seconds, ends):
                if kind in ("slow head", "slow body"):
                    writer.write(b"a" if kind == "slow head" else b" ")
                    await writer.drain()
                if kind == "deaf":
                    await asyncio.sleep(0.5)
                    continue
                with contextlib.suppress(asyncio.TimeoutError):
                    if not await asyncio.wait_for(reader.read(4096), 0.5):
                        return
                    if kind == "slow body":
                        return
            if kind in ("silent", "slow head") and time.monotonic() >= begin + IDLE_SECONDS:
                self._fault(f"a connection that sent no request was open for {IDLE_SECONDS:.0f} s")
        finally:
            writer.transport.abort()

    def _fault(self, text: str) -> None:
        self.tally.wrong.append(text[:300])

    async def question(self, draw: random.Random, leaves: bool) -> None:
        """Ask, and judge the answer."""
        task, streams = draw.choice(self._tasks), draw.random() < 0.7
        asked, expected = task.cut(draw.randint(1, self._longest), self._tokenizer)
        begin, body = time.monotonic(), b""
        answer = self._server.ask(_request(task.path, json.dumps({**asked, "stream": streams}).encode()))
        try:
            if leaves:
                await self._leave(answer, draw)
                return
            head = await anext(answer)
            async for part in answer:
                if streams and not body:
                    self.tally.first_token_s.append(time.monotonic() - begin)
                body += part
        finally:
            await answer.aclose()
        await self._judge(head, body, task, expected, streams)

    async def _leave(self, answer: AsyncGenerator[bytes, None], draw: random.Random) -> None:
        """Read nothing for a while, or a few pieces, and go."""
        self.tally.counts["left"] += 1
        if draw.random() < 0.3:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(anext(answer), draw.random())
            return
        for _ in range(draw.randint(1, 20)):
            if await anext(answer, None) is None:
                return

    async def _judge(self, head: bytes, body: bytes, task: Task, expected: list[Answer], streams: bool) -> None:
        status = int(head.split()[1])
        if status == 429:
            self.tally.counts["429"] += 1
            await asyncio.sleep(min(int(re.search(rb"retry-after: (\d+)", head.lower())[1]), 2))  # type: ignore[index]
            return
        if status != 200:
            self._fault(f"{task.kind}: status {status}: {body[:200]!r}")
            return
        found, logprobs = _answers(body, streams, len(expected))
        self.tally.counts["right"] += found == expected
        self.tally.counts[f"right {task.kind}"] += found == expected
        if found != expected:
            self._fault(f"{task.kind}: got {found!r}, expected {expected!r}")
        if "logprobs" in task.kind and not (logprobs and all(each <= 0 for each in logprobs)):
            self._fault(f"{task.kind}: got log-probabilities {logprobs[:10]}")

    async def _nonsense(self, draw: random.Random) -> None:
        request, allowed = draw.choice(_NONSENSE)
        head = b""
        try:
            async for part in self._server.ask(request):
                head = head or part
        except asyncio.IncompleteReadError as error:
            head = head or error.partial
        status = int(head.split()[1]) if head else 0
        self.tally.counts[f"nonsense {status}"] += 1
        if status not in allowed:
            self._fault(f"nonsense {request[:80]!r} got {status}")


def _answers(body: bytes, streams: bool, count: int) -> tuple[list[Answer], list[float]]:
    """Return the choices of an answer, whole or as a stream, and the log-probabilities of their tokens."""
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")]
    if streams and (not events or events[-1] != b"[DONE]"):
        return [("no [DONE]", body[-200:].decode("utf-8", "replace"))], []
    texts, reasons, logprobs = [""] * count, [""] * count, list[float]()
    for document in events[:-1] if streams else [body]:
        for choice in json.loads(document)["choices"]:
            message = choice.get("delta") or choice.get("message") or choice
            texts[choice["index"]] += message.get("content") or message.get("text") or ""
            reasons[choice["index"]] = choice["finish_reason"] or reasons[choice["index"]]
            given = choice.get("logprobs") or {}
            logprobs += given.get("token_logprobs") or [each["logprob"] for each in given.get("content") or ()]
    return list(zip(texts, reasons, strict=True)), logprobs


_REFUSED = (400, 429)  # also nonsense is told to come back when the house is full
_NONSENSE: list[tuple[bytes, tuple[int, ...]]] = [
    (_request("/v1/completions", b"\xff\xfe not json"), _REFUSED),
    (_request("/v1/completions", b'{"prompt": "x", "n": 1000000}'), _REFUSED),
    (_request("/v1/completions", b'{"prompt": ' + b"[" * 5000), _REFUSED),
    (_request("/v1/completions", b'{"prompt": [-1]}'), _REFUSED),
    (_request("/v1/completions", b'{"prompt": "' + b"long " * 60_000 + b'"}'), _REFUSED),
    (_request("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}'), _REFUSED),
    (_request("/v1/chat/completions", b'{"messages": [], "temperature": "NaN"}'), _REFUSED),
    (_request("/v1/completions", b'{"prompt": "x", "guided_regex": "((("}'), _REFUSED),
    (_request("/v1/completions", b" " * 5_000_000), (413,)),
    (_request("/v1/elsewhere", None), (404,)),
    (_request("/v1/completions", None), (405,)),
    (b"\x16\x03\x01 this is no HTTP\r\n\r\n", (400,)),
]  # fmt: skip


async def watch(server: Server, tally: Tally, ends: float) -> None:
    """Note what the server takes every second, and that it answers."""
    while time.monotonic() < ends:
        for name, value in server.usage().items():
            tally.usage[name].append(value)
        begin = time.monotonic()
        status, _ = await server.fetch("/health")
        tally.health_s.append(time.monotonic() - begin)
        if status != 200 or tally.health_s[-1] > 30:
            tally.wrong.append(f"/health: {status} after {tally.health_s[-1]:.1f} s")
        await asyncio.sleep(1)


async def at_rest(server: Server, clients: Clients) -> dict[str, float]:
    """Wait until nothing runs; return the metrics that have to be zero then."""
    names = ("requests_running", "requests_waiting", "kv_cache_blocks_used")
    for _ in range(100):
        left = {name: await server.metric(name) for name in names}
        if not any(left.values()):
            break
        await asyncio.sleep(0.1)
    before = clients.tally.counts["right"]
    for seed in range(3):
        await clients.question(random.Random(seed), leaves=False)
    if clients.tally.counts["right"] != before + 3:
        clients.tally.wrong.append("afterwards it does not answer rightly")
    return left


def judge_usage(tally: Tally, before: dict[str, float], after: dict[str, float]) -> dict[str, list[float]]:
    """Note what has grown; return for each resource: before, the most in the second third, in the last, and after."""
    shown = {}
    for name, values in tally.usage.items():
        third = len(values) // 3
        settled, last = max(values[third : 2 * third + 1]), max(values[-third - 1 :])
        shown[name] = [round(each, 1) for each in (before[name], settled, last, after[name])]
        if len(values) >= SAMPLES and last > settled + GROWTH[name]:
            tally.wrong.append(f"{name} grew: {settled:.0f} to {last:.0f}")
        if name in REST_GROWTH and after[name] > before[name] + REST_GROWTH[name]:
            tally.wrong.append(f"{name} at rest grew: {before[name]:.0f} to {after[name]:.0f}")
    return shown


async def soak(server: Server, tasks: list[Task], tokenizer: Tokenizer, words: argparse.Namespace) -> dict[str, Any]:
    """Let the clients live; return what came out."""
    clients = Clients(server, tasks, tokenizer, words.longest_answer)
    tally = clients.tally
    for kind in dict.fromkeys(task.kind for task in tasks):  # each once: threads and processes are there after that
        await Clients(server, [task for task in tasks if task.kind == kind], tokenizer, 2).question(
            random.Random(0), False
        )
    before, begin = server.usage(), time.monotonic()
    ends = begin + 60 * words.minutes
    lives = [clients.live(words.seed * 100_000 + at, ends) for at in range(words.clients)]
    lives += [clients.linger(words.seed * 100_000 - 1 - at, ends) for at in range(words.idle)]
    await asyncio.gather(watch(server, tally, ends), *lives)
    seconds = time.monotonic() - begin
    left = await at_rest(server, clients)
    usage = judge_usage(tally, before, server.usage())
    if any(left.values()):
        tally.wrong.append(f"something is still held: {left}")
    cuts = quantiles(tally.first_token_s, n=100) if len(tally.first_token_s) > 1 else [0.0] * 99
    return {
        "clients": words.clients,
        "idle": words.idle,
        "seconds": round(seconds, 1),
        "mixture": dict(sorted(tally.counts.items())),
        "right": tally.counts["right"],
        "left": tally.counts["left"],
        "wrong": len(tally.wrong),
        "generated_tokens": await server.metric("engine_generated_tokens_total"),
        "tokens_per_s": round(await server.metric("engine_generated_tokens_total") / seconds, 1),
        "preemptions": await server.metric("preemptions_total"),
        "prefix_hit_tokens": await server.metric("prefix_cache_hit_tokens_total"),
        "ttft_p50_s": round(cuts[49], 3),
        "ttft_p99_s": round(cuts[98], 3),
        "health_p50_max_s": [round(median(tally.health_s), 4), round(max(tally.health_s), 3)],
        "before_middle_last_after": usage,
        "held_at_the_end": left,
        "what_was_wrong": tally.wrong[:10],
        "verdict": "wrong" if tally.wrong else "right",
    }


def main() -> int:
    """Run from the shell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, metavar="DIR")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--idle", type=int, default=50, help="connections that are silent, slow or deaf")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--prompts", type=int, default=48, help="different ones")
    parser.add_argument("--longest-prompt", type=int, default=400, metavar="TOKENS")
    parser.add_argument("--longest-answer", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="of the server")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    words, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    tasks = learn(words.model, words, random.Random(words.seed))
    server = Server(words.model, [*DEFAULTS, *options], words.log)
    try:
        result = asyncio.run(soak(server, tasks, Tokenizer(words.model), words))
    finally:
        server.process.terminate()
        code = server.process.wait(60)
    result["server_exit_code"] = code
    print(json.dumps(result))
    return 1 if result["wrong"] or code else 0


if __name__ == "__main__":
    sys.exit(main())
