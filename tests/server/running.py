"""A server in a thread of the test's process, and a client of one connection for each request."""

from __future__ import annotations

import faulthandler
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai

from eightfold.server.serve import Server, bind
from eightfold.server.service import ServerSettings


@dataclass
class Running:
    """A server that accepts requests.

    Attributes:
        server: itself.
        engine: that it serves.
        url: without a path.
        http: a client that keeps its connections.
    """

    server: Server
    engine: Any
    url: str
    http: httpx.Client

    def openai(self, key: str = "none") -> openai.OpenAI:
        """Return the official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=120)

    def post(self, path: str, content: Any = None, **options: Any) -> httpx.Response:
        """Send JSON, or bytes as if they were."""
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"content-type": "application/json", **options.pop("headers", {})}
        return self.http.post(path, content=raw, headers=headers, **options)

    def chat(self, text: str = "Hi", **fields: Any) -> httpx.Response:
        """Send one message."""
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def events(self, path: str, content: Any) -> list[dict[str, Any]]:
        """Return the events of a stream, up to its [DONE] or its error."""
        raw = self.post(path, {**content, "stream": True})
        assert raw.headers["content-type"] == "text/event-stream; charset=utf-8", raw.text
        lines = [line for line in raw.text.split("\n\n") if line and not line.startswith(":")]
        found = [line.removeprefix("data: ") for line in lines]
        return [json.loads(line) for line in found if line != "[DONE]"]

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of a metric's samples with these labels."""
        total, wanted = 0.0, [f'{key}="{value}"' for key, value in labels.items()]
        for line in self.http.get("/metrics").text.splitlines():
            sample, _, value = line.rpartition(" ")
            if sample.partition("{")[0] == f"eightfold_{name}" and all(label in sample for label in wanted):
                total += float(value)
        return total

    def stop_soon(self) -> None:
        """Do what SIGTERM does."""
        self.server.servers[0].get_loop().call_soon_threadsafe(self.server.stop)


@contextmanager
def running(engine: Any, **settings: Any) -> Iterator[Running]:
    """Serve an engine."""
    ready = threading.Event()
    sock = bind("127.0.0.1", 0)
    server = Server(engine, ServerSettings(**{"model_names": ("tiny",), **settings}), ready.set)
    thread = threading.Thread(target=lambda: server.run(sockets=[sock]), daemon=True)
    thread.start()
    assert ready.wait(10)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=120) as http:
        yield Running(server, engine, url, http)
    server.should_exit = True
    thread.join(20)
    if thread.is_alive():
        faulthandler.dump_traceback()
    assert not thread.is_alive()


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Return whether something becomes true in time."""
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            return False
        time.sleep(0.005)
    return True
