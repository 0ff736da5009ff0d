"""`eightfold serve`: from the shell to the first answer, and to the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from eightfold.values import parse_size
from tests.conftest import remove_template


class Process:
    """The command in a process of its own, once it says that it is ready."""

    def __init__(self, *words, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "eightfold", "serve", *map(str, words), "--port", "0", "--threads", "1"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
        )  # fmt: skip
        watchdog = threading.Timer(60, self.process.kill)
        watchdog.start()
        self.lines = [""]
        while "ready at" not in self.lines[-1]:
            self.lines.append(self.process.stdout.readline())
            assert self.lines[-1], self.process.communicate()[1]
        watchdog.cancel()
        self.url = re.search(r"ready at (http://\S+)", self.lines[-1])[1]

    def end(self, number=signal.SIGTERM):
        """Send a signal; return the exit code and the log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=30)
        return self.process.returncode, [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@pytest.fixture
def start(model):
    started = []

    def start_(*words, **environment):
        started.append(Process(model, *words, **environment))
        return started[-1]

    yield start_
    for each in started:
        if each.process.poll() is None:
            each.process.kill()
        each.process.communicate()


def test_it_serves_until_it_is_told_to_stop_and_lets_answers_finish(start):
    server = start(
        "--served-model-name", "mine", "--max-num-seqs", 4, "--max-batched-tokens", 32, EIGHTFOLD_API_KEY="k"
    )
    assert server.lines[1] == "mine: 384 tokens of context, 12 blocks of 128 tokens for keys and values\n"
    with httpx.Client(base_url=server.url, headers={"authorization": "Bearer k"}, timeout=30) as http:
        assert http.get("/v1/models").json()["data"][0]["id"] == "mine"
        assert http.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 401
        asked = {"prompt": "x", "max_tokens": 300, "ignore_eos": True, "stream": True, "temperature": 0}
        with http.stream("POST", "/v1/completions", json=asked) as raw:
            lines = raw.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    code, log = server.end()
    assert code == 0
    assert [line["message"] for line in log][-1] == "stopped"
    assert any(line.get("generated_tokens") == 300 for line in log)


def test_a_template_of_ones_own_and_limits_until_ctrl_c(start, tmp_path):
    (tmp_path / "t.jinja").write_text("Q: {{ messages[-1].content }} A:")
    options = ("--speculate", 3, "--no-prefix-caching", "--kv-memory", "1MiB")
    server = start("--chat-template", tmp_path / "t.jinja", "--max-model-len", 64, *options)
    with httpx.Client(base_url=server.url, timeout=30) as http:
        tokens = http.post("/tokenize", json={"messages": [{"role": "user", "content": "why"}]}).json()
        assert http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": "Q: why A:"}
        assert tokens["max_model_len"] == 64
        too_long = {"prompt": "x", "stream": False, "max_tokens": 9}
        assert http.post("/v1/completions", json={**too_long, "prompt": "x" * 64}).status_code == 400
    assert server.end(signal.SIGINT)[0] == 0


def test_a_model_without_a_template_continues_texts_only(model, tmp_path):
    shutil.copytree(model, tmp_path / "base")
    remove_template(tmp_path / "base")
    server = Process(tmp_path / "base")
    with httpx.Client(base_url=server.url, timeout=30) as http:
        assert http.get("/v1/models").json()["data"][0]["has_chat_template"] is False
        raw = http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}]})
        assert (raw.status_code, raw.json()["error"]["param"]) == (400, "messages")
        assert http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1}).status_code == 200
    server.process.send_signal(signal.SIGTERM)
    note = "note: this model has no chat template: /v1/chat/completions is not served. Give --chat-template.\n"
    assert server.process.communicate(timeout=30)[1].startswith(note)


def test_a_port_in_use(cli, model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        begin = time.monotonic()
        result = cli("serve", model, "--port", port)
    expected = f"eightfold: --port: got {port}, expected a free one. Another program uses this one: choose another.\n"
    assert (result.code, result.out, result.err) == (2, "", expected)
    assert time.monotonic() - begin < 5


def test_another_machines_address(cli, model):
    result = cli("serve", model, "--host", "192.0.2.1", "--api-key", "k")
    expected = (
        "eightfold: --host: got 192.0.2.1, expected an address of this machine. Cannot assign requested address.\n"
    )
    assert (result.code, result.err) == (2, expected)
    result = cli("serve", model, "--host", "no.such.host.invalid", "--api-key", "k")
    assert result.code == 2
    assert result.err.startswith("eightfold: --host: got no.such.host.invalid, expected an address of this machine. ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key", " "], "--api-key: got an empty text, expected a key. Leave it out to serve everybody."),
        (["--tool-call-parser", "guess"], "--tool-call-parser: got guess, expected auto, hermes, "),
        (["--log-level", "loud"], "--log-level: got loud, expected debug, info, warning or error"),
        (["--kv-memory", "2 apples"], "--kv-memory: got 2 apples, expected a size such as 2GiB or 500MB"),
        (["--kv-memory", "10"], "key/value cache: got 10 bytes, expected at least "),
        (["--max-model-len", "1000"], "--max-model-len: got 1000, expected at most 384"),
        (["--max-num-seqs", "600"], "--max-batched-tokens: got 512, expected more than --max-num-seqs, 600."),
        (["--chat-template", "nowhere.jinja"],
         "cannot read nowhere.jinja: No such file or directory. Check the path."),
        (["--api-key-file", "nowhere"], "cannot read nowhere: No such file or directory. Check the path."),
        (["--allowed-host", "http://a/"], "--allowed-host: got 'http://a/', expected a name such as llm.example"),
        (["--port", "70000"], "--port: got 70000, expected a whole number from 0 to 65535. Try: eightfold "),
    ],
)  # fmt: skip
def test_options_that_make_no_sense(cli, model, words, message):
    result = cli("serve", model, *([] if "--port" in words else ["--port", 0]), *words)
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith(f"eightfold: {message}"), result.err
    assert result.err.count("\n") == 1


def test_a_template_that_is_none(cli, model, tmp_path):
    (tmp_path / "t.jinja").write_text("{% if %}")
    result = cli("serve", model, "--port", 0, "--chat-template", tmp_path / "t.jinja")
    assert result.code == 2
    assert result.err.startswith("eightfold: chat template: got ")


def test_an_empty_key_in_the_environment_does_not_open_the_server(cli, model, monkeypatch):
    monkeypatch.setenv("EIGHTFOLD_API_KEY", "")
    result = cli("serve", model, "--port", 0)
    assert (result.code, result.err.startswith("eightfold: EIGHTFOLD_API_KEY: got an empty text")) == (2, True)


def test_keys_come_from_options_a_file_or_the_environment(tmp_path, monkeypatch):
    from eightfold.cli.serving import _api_keys

    monkeypatch.setenv("EIGHTFOLD_API_KEY", " a, b ,a")
    (tmp_path / "keys").write_text("one\n\n  two, three \r\n")
    assert _api_keys((), None) == ("a", "b")
    assert _api_keys(("c", "d,e"), None) == ("c", "d,e")
    assert _api_keys(("c",), tmp_path / "keys") == ("c", "one", "two, three")
    monkeypatch.delenv("EIGHTFOLD_API_KEY")
    assert _api_keys((), None) == ()


@pytest.mark.parametrize(
    ("text", "name"), [("a,,b", "EIGHTFOLD_API_KEY"), (",", "EIGHTFOLD_API_KEY"), ("\n \n", "keys")]
)
def test_an_empty_key_among_others_is_a_mistake_too(cli, model, monkeypatch, tmp_path, text, name):
    options = []
    if name == "keys":
        (tmp_path / "keys").write_text(text)
        options = ["--api-key-file", tmp_path / "keys"]
    else:
        monkeypatch.setenv("EIGHTFOLD_API_KEY", text)
    result = cli("serve", model, "--port", 0, *options)
    assert (result.code, result.out, "got an empty text, expected a key" in result.err) == (2, "", True)
    assert name in result.err and result.err.count("\n") == 1


def test_no_such_directory(cli, tmp_path):
    result = cli("serve", tmp_path / "nothing")
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith(f"eightfold: no directory {tmp_path}/nothing: expected a model directory.")


def test_without_the_packages_it_says_what_to_install(cli, model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "uvicorn" else object())
    result = cli("serve", model)
    expected = (
        "eightfold: eightfold serve needs starlette, uvicorn and prometheus-client: got no uvicorn. "
        "Install them: pip install 'eightfold[serve]'\n"
    )
    assert (result.code, result.err) == (2, expected)


def test_an_open_door_is_pointed_out(cli, model):
    result = cli("serve", model, "--host", "0.0.0.0", "--port", 0, "--max-model-len", 999)
    assert result.err.startswith("note: everybody who reaches 0.0.0.0 can use this server: there is no API key.\n")


def test_the_help_has_an_example(cli):
    text = " ".join(cli("serve", "--help").out.split())
    assert "Example: eightfold serve Llama-3.2-1B-w8a8 --port 8000" in text
    assert "curl localhost:8000/v1/chat/completions" in text


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2 * 2**30), ("500MB", 500_000_000), ("1.5g", 1_500_000_000), ("10 KiB", 10240), ("123", 123), ("7b", 7)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("name", ["qwen2.5-coder", "Qwen3-Coder", "llama3_json", "none"])
def test_parsers_of_calls_are_named_with_either_dash(cli, name):
    result = cli("serve", "/nowhere", "--tool-call-parser", name)
    assert result.err.startswith("eightfold: no directory /nowhere")
