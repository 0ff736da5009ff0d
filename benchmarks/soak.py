"""Many clients at once, for minutes: some leave midway, some send nonsense. Nobody may get a wrong answer.

    python benchmarks/soak.py DIR --clients 200 --minutes 5 [-- options of `eightfold serve`]

Every complete answer is compared with the greedy answer of the native core to the same prompt alone. At the end the
server has to be idle and healthy, no block of its cache may be held, and its memory may not have grown. Prints one JSON
document; exits with 1 if anything was wrong. Talks to 127.0.0.1 only, and to the server that it starts itself.
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
from eightfold.tokenizer import Tokenizer

GROWTH_MIB = 32  # of memory from the second third to the last: allocators take a while to have seen every size

# A cache that the load fills soon, so that memory can settle, and that is too small for it, so that it is preempted.
DEFAULTS = ["--kv-memory", "96MiB"]


@dataclass(frozen=True)
class Known:
    """A prompt and its greedy answer."""

    prompt_ids: list[int]
    answer_ids: list[int]
    stops: bool  # it ends by itself behind these tokens

    def expected(self, max_tokens: int, tokenizer: Tokenizer) -> tuple[str, str]:
        """Return text and finish reason of an answer of so many tokens at most."""
        ends = self.stops and max_tokens > len(self.answer_ids)
        return tokenizer.decode(self.answer_ids[:max_tokens]), "stop" if ends else "length"


@dataclass
class Tally:
    """What happened."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    rss_mib: list[float] = field(default_factory=list)
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

    def rss_mib(self) -> float:
        """Return its resident memory without mapped files."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]

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


def learn(model: Path, count: int, longest_prompt: int, longest_answer: int, draw: random.Random) -> list[Known]:
    """Return random prompts, some of which begin alike, and their greedy answers one by one."""
    llm = LLM(model, max_num_seqs=1, prefix_caching=False)
    params = SamplingParams(temperature=0.0, max_tokens=longest_answer)
    vocab = llm.engine.model_config.vocab_size
    shared = [draw.randrange(vocab) for _ in range(longest_prompt)]
    known = []
    for at in range(count):
        length = draw.randint(1, longest_prompt)
        own = [draw.randrange(vocab) for _ in range(length)]
        prompt = shared[: length // 2] + own[length // 2 :] if at % 3 == 0 else own
        (found,) = llm.generate(prompt, params, progress=False)[0].outputs
        known.append(Known(prompt, found.token_ids, found.finish_reason == "stop"))
    return known


class Clients:
    """All of them."""

    def __init__(self, server: Server, known: list[Known], tokenizer: Tokenizer, longest: int) -> None:
        self._server, self._known, self._tokenizer, self._longest = server, known, tokenizer, longest
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
                    await self._question(draw, leaves=kind < 0.1 + 0.3)
            except (OSError, asyncio.IncompleteReadError) as error:
                self._fault(f"a connection broke: {type(error).__name__} {error}")
            await asyncio.sleep(draw.random() * 0.2)

    def _fault(self, text: str) -> None:
        self.tally.wrong.append(text[:300])

    async def _question(self, draw: random.Random, leaves: bool) -> None:
        known, most, streams = draw.choice(self._known), draw.randint(1, self._longest), draw.random() < 0.7
        asked = {"prompt": known.prompt_ids, "max_tokens": most, "temperature": 0, "stream": streams}
        begin, body = time.monotonic(), b""
        answer = self._server.ask(_request("/v1/completions", json.dumps(asked).encode()))
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
        await self._judge(head, body, known, most, streams)

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

    async def _judge(self, head: bytes, body: bytes, known: Known, most: int, streams: bool) -> None:
        status = int(head.split()[1])
        if status == 429:
            self.tally.counts["429"] += 1
            await asyncio.sleep(min(int(re.search(rb"retry-after: (\d+)", head.lower())[1]), 2))  # type: ignore[index]
        elif status != 200:
            self._fault(f"status {status}: {body[:200]!r}")
        else:
            found, expected = _streamed(body) if streams else _whole(body), known.expected(most, self._tokenizer)
            self.tally.counts["right"] += found == expected
            if found != expected:
                self._fault(f"got {found!r}, expected {expected!r}")

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


def _whole(body: bytes) -> tuple[str, str]:
    choice = json.loads(body)["choices"][0]
    return choice["text"], choice["finish_reason"]


def _streamed(body: bytes) -> tuple[str, str]:
    events = [event.removeprefix(b"data: ") for event in body.split(b"\n\n") if event.startswith(b"data: ")]
    if not events or events[-1] != b"[DONE]":
        return "no [DONE]", body[-200:].decode("utf-8", "replace")
    choices = [json.loads(event)["choices"][0] for event in events[:-1]]
    return "".join(choice["text"] for choice in choices), choices[-1]["finish_reason"]


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
    """Note the server's memory every second, and that it answers."""
    while time.monotonic() < ends:
        tally.rss_mib.append(server.rss_mib())
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
        await clients._question(random.Random(seed), leaves=False)
    if clients.tally.counts["right"] != before + 3:
        clients.tally.wrong.append("afterwards it does not answer rightly")
    return left


async def soak(server: Server, known: list[Known], tokenizer: Tokenizer, words: argparse.Namespace) -> dict[str, Any]:
    """Let the clients live; return what came out."""
    clients = Clients(server, known, tokenizer, words.longest_answer)
    tally, begin = clients.tally, time.monotonic()
    ends = begin + 60 * words.minutes
    lives = [clients.live(words.seed * 100_000 + at, ends) for at in range(words.clients)]
    await asyncio.gather(watch(server, tally, ends), *lives)
    seconds = time.monotonic() - begin
    left = await at_rest(server, clients)
    third = len(tally.rss_mib) // 3
    settled, last = max(tally.rss_mib[third : 2 * third + 1]), max(tally.rss_mib[-third - 1 :])
    if any(left.values()):
        tally.wrong.append(f"something is still held: {left}")
    if last > settled + GROWTH_MIB:
        tally.wrong.append(f"memory grew: {settled:.0f} to {last:.0f} MiB")
    cuts = quantiles(tally.first_token_s, n=100) if len(tally.first_token_s) > 1 else [0.0] * 99
    return {
        "clients": words.clients,
        "seconds": round(seconds, 1),
        **{name.replace(" ", "_"): count for name, count in sorted(tally.counts.items())},
        "wrong": len(tally.wrong),
        "generated_tokens": await server.metric("engine_generated_tokens_total"),
        "tokens_per_s": round(await server.metric("engine_generated_tokens_total") / seconds, 1),
        "preemptions": await server.metric("preemptions_total"),
        "prefix_hit_tokens": await server.metric("prefix_cache_hit_tokens_total"),
        "ttft_p50_s": round(cuts[49], 3),
        "ttft_p99_s": round(cuts[98], 3),
        "health_p50_max_s": [round(median(tally.health_s), 4), round(max(tally.health_s), 3)],
        "rss_mib_middle_last": [round(settled, 1), round(last, 1)],
        "held_at_the_end": left,
        "what_was_wrong": tally.wrong[:10],
    }


def main() -> int:
    """Run from the shell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, metavar="DIR")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--prompts", type=int, default=48, help="different ones")
    parser.add_argument("--longest-prompt", type=int, default=400, metavar="TOKENS")
    parser.add_argument("--longest-answer", type=int, default=128, metavar="TOKENS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, default=Path("soak.log"), help="of the server")
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    words, options = parser.parse_args(given[:cut]), given[cut + 1 :]
    draw = random.Random(words.seed)
    known = learn(words.model, words.prompts, words.longest_prompt, words.longest_answer, draw)
    server = Server(words.model, [*DEFAULTS, *options], words.log)
    try:
        result = asyncio.run(soak(server, known, Tokenizer(words.model), words))
    finally:
        server.process.terminate()
        code = server.process.wait(60)
    result["server_exit_code"] = code
    print(json.dumps(result))
    return 1 if result["wrong"] or code else 0


if __name__ == "__main__":
    sys.exit(main())
