"""`run --input-file` with OpenAI's batch file, and through standard input and output."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_batch import write
from tests.conftest import Result
from tests.refusal import error_line, refused

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
HI = [{"role": "user", "content": "hi"}]


def line(name: str, url: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    usual = {"max_tokens": 5, "temperature": 0}
    return {"custom_id": name, "method": "POST", "url": url, "body": {**usual, **body}}


class Runner:
    def __init__(self, cli, model: Path, folder: Path) -> None:
        self.cli, self.model, self.folder = cli, model, folder
        self.output = folder / "answers.jsonl"

    def __call__(self, *lines: object, words=()) -> Result:
        files = ("--input-file", write(self.folder / "batch.jsonl", *lines), "--output-file", self.output)
        return self.cli("run", self.model, *files, "--threads", 1, "--max-num-seqs", 2, *words)

    def answers(self, *lines: object, code: int = 0, words=()) -> dict[str, dict]:
        result = self(*lines, words=words)
        assert (result.code, result.out) == (code, ""), result.err
        return self.read()

    def read(self) -> dict[str, dict]:
        found = [json.loads(raw) for raw in self.output.read_bytes().splitlines()]
        assert len({each["custom_id"] for each in found}) == len(found)
        return {each["custom_id"]: each for each in found}


@pytest.fixture
def batch(cli, small, tmp_path) -> Runner:
    return Runner(cli, small.directory, tmp_path)


REQUESTS = [
    line("chat", CHAT, messages=HI),
    line("chat of parts", CHAT, messages=[{"role": "developer", "content": [{"type": "text", "text": "a"}]}, *HI], n=2),
    line("logprobs", CHAT, messages=HI, logprobs=True, top_logprobs=2),
    line("form", CHAT, messages=HI, response_format={"type": "json_object"}, max_completion_tokens=20, max_tokens=None),
    line("text", prompt="hello"),
    line("texts", prompt=["hello", "a", "b"], n=2, stop=["x"]),
    line("tokens", prompt=[[1, 2], [3]], logprobs=1, echo=True),
    line("only the prompt", prompt="hello", max_tokens=0, echo=True),
    line("response", RESPONSES, input="hi", store=False, max_output_tokens=5, max_tokens=None),
    line("image", CHAT, messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
    line("no messages", CHAT),
    line("too long", prompt=[1] * 5000),
    line("not done", prompt="a", suffix="b"),
    line("another model", prompt="a", model="gpt-4o"),
    line("its own name", prompt="a", model="tiny"),
]


def test_every_request_is_answered_as_the_server_does(batch):
    pytest.importorskip("starlette")
    from eightfold.engine.async_llm import AsyncLLM
    from eightfold.engine.settings import EngineConfig
    from tests.server.running import running

    found = batch.answers(*REQUESTS, code=1, words=("--served-model-name", "tiny"))
    assert found.keys() == {each["custom_id"] for each in REQUESTS}
    with running(AsyncLLM.load(batch.model, EngineConfig(threads=1, max_num_seqs=4))) as server:
        for request in REQUESTS:
            answer = found[request["custom_id"]]
            theirs = server.post(request["url"], request["body"])
            ours = answer["response"]
            assert ours["status_code"] == theirs.status_code, request
            assert answer["error"] is None
            assert ours["request_id"].startswith("req_")
            assert answer["id"].startswith("batch_req_")
            assert stable(ours["body"]) == stable(theirs.json()), request


ONCE = ("id", "created", "created_at", "completed_at")  # of every answer its own


def stable(value: Any) -> Any:
    """Return a body without what differs from one answer to the next."""
    if isinstance(value, list):
        return [stable(each) for each in value]
    return {key: stable(each) for key, each in value.items() if key not in ONCE} if isinstance(value, dict) else value


def test_a_response_to_build_on_is_refused(batch):
    (answer,) = batch.answers(line("a", RESPONSES, input="hi", previous_response_id="x"), code=1).values()
    assert answer["response"]["body"]["error"]["param"] == "previous_response_id"


def test_the_errors_of_requests_name_their_fields(batch):
    found = batch.answers(*REQUESTS, code=1)
    errors = {name: each["response"]["body"]["error"] for name, each in found.items() if name in ("image", "not done")}
    assert (errors["image"]["param"], errors["image"]["code"]) == ("messages", "unsupported_content")
    assert errors["not done"]["param"] == "suffix"
    assert found["its own name"]["response"]["status_code"] == 404, "the model's name is that of its directory"


def test_a_stream_is_refused(batch):
    (answer,) = batch.answers(line("a", prompt="a", stream=True), code=1).values()
    assert answer["response"]["status_code"] == 400
    assert answer["response"]["body"]["error"]["param"] == "stream"


def test_a_run_resumes_and_tries_errors_again(batch, monkeypatch):
    lines = [line("a", prompt="a"), line("b", prompt=["b", "c"]), line("c", prompt="a", suffix="x")]
    first = batch.answers(*lines, code=1)
    kept = {name: batch.output.read_bytes().splitlines()[at] for at, name in enumerate(first)}
    lines[2] = line("c", prompt="a")
    second = batch.answers(*lines)
    assert second["c"]["response"]["status_code"] == 200
    raw = batch.output.read_bytes().splitlines()
    assert kept["a"] in raw
    assert kept["b"] in raw
    monkeypatch.setattr("eightfold.engine.engine.Engine.load", None)  # there is nothing to load it for
    assert batch.answers(*reversed(lines)) == second, "the order of the lines does not matter"


def test_a_torn_line_is_done_again(batch):
    lines = [line("a", prompt="a"), line("b", prompt="b")]
    first = batch.answers(*lines)
    raw = batch.output.read_bytes()
    for torn in (raw[:-30], raw + b'{"id": "batch_r', raw + b"\0" * 99):
        batch.output.write_bytes(torn)
        texts = {name: each["response"]["body"]["choices"][0]["text"] for name, each in batch.answers(*lines).items()}
        assert texts == {name: each["response"]["body"]["choices"][0]["text"] for name, each in first.items()}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([line("a", prompt="b")], 'got an answer to custom_id "a" when it had another text, id or parameters'),
        ([line("b", prompt="a")], 'got an answer to custom_id "a", which is not asked for, expected one of this run'),
        ([{"prompt": "a"}], 'got \'{"id": "batch_req_'),
    ],
)
def test_an_output_of_something_else_is_refused(batch, lines, message):
    batch.answers(line("a", prompt="a"))
    before = batch.output.read_bytes()
    assert message in error_line(batch(*lines))
    assert batch.output.read_bytes() == before


def test_an_output_of_our_own_form_is_refused(batch):
    batch({"prompt": "a"})
    assert "expected an answer that this command wrote" in error_line(batch(line("a", prompt="a")))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("{", "got no JSON ("),
        ({"prompt": "a"}, "got the field prompt, expected only custom_id, method, url, body"),
        ({**line("b"), "custom_id": None}, "got custom_id null, expected a text that is not empty"),
        ({**line("b"), "custom_id": ""}, 'got custom_id "", expected a text that is not empty'),
        (line("a", prompt="x"), 'got custom_id "a", as in line 1, expected one of its own'),
        ({**line("b"), "method": "GET"}, 'got method "GET", expected POST'),
        ({**line("b"), "url": "/v1/embeddings"}, 'got url "/v1/embeddings", expected /v1/chat/completions'),
        ({**line("b"), "url": 5}, "got url 5, expected /v1/chat/completions"),
        ({**line("b"), "body": [1]}, "got body [1], expected an object"),
        ({"custom_id": "b", "method": "POST", "url": COMPLETIONS}, "got body null, expected an object"),
    ],
)
def test_a_line_that_is_no_request_is_named_before_anything_runs(cli, small, tmp_path, second, message):
    path = write(tmp_path / "b.jsonl", line("a", prompt="a"), "", second)
    files = ("--input-file", path, "--output-file", tmp_path / "out.jsonl")
    assert refused(cli, "run", small.directory, *files, within=tmp_path).startswith(f"line 3 in {path}: {message}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--temperature", 1), "--temperature: got OpenAI's batch file, expected it in the body of a line"),
        (("--chat",), "--chat: got OpenAI's batch file, expected it in the body of a line"),
        (("--max-new-tokens", 5), "--max-new-tokens: got OpenAI's batch file, expected it in the body of a line"),
    ],
)
def test_options_that_lines_say_themselves_are_refused(batch, words, message):
    assert error_line(batch(line("a", prompt="a"), words=words)) == message


def test_a_name_of_the_model_is_only_for_openais_form(batch):
    found = error_line(batch({"prompt": "a"}, words=("--served-model-name", "x")))
    assert found == "--served-model-name: got prompts of our own form, expected OpenAI's batch file"


def test_chats_need_a_template(batch, tmp_path):
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = batch.answers(line("a", CHAT, messages=HI), words=("--chat-template", tmp_path / "t.jinja"))
    assert found["a"]["response"]["body"]["usage"]["prompt_tokens"] == 2


# --- standard input and output


def stdin_of(monkeypatch, *lines: object) -> None:
    text = "".join(f"{each if isinstance(each, str) else json.dumps(each)}\n" for each in lines)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))


FEW = ("--threads", 1, "--max-num-seqs", 1)


def test_from_stdin_to_stdout(cli, small, monkeypatch, tmp_path):
    stdin_of(monkeypatch, {"prompt": "hello", "id": "é", "max_tokens": 3}, "", {"prompt": "a", "max_tokens": 3})
    result = cli("run", small.directory, "--input-file", "-", "--output-file", "-", *FEW)
    assert result.code == 0
    found = [json.loads(each) for each in result.out.splitlines()]
    assert [(each["index"], each["id"]) for each in found] == [(0, "é"), (1, None)]
    assert result.err.startswith("[2 answers, ")


def test_openais_form_from_stdin(cli, small, monkeypatch):
    stdin_of(monkeypatch, line("a", prompt="a"), line("b", CHAT))
    result = cli("run", small.directory, "--input-file", "-", "--output-file", "-", *FEW)
    assert result.code == 1
    assert {
        each["custom_id"]: each["response"]["status_code"] for each in map(json.loads, result.out.splitlines())
    } == {
        "a": 200,
        "b": 400,
    }
    assert result.err.endswith("1 of 2 prompts have an error in the output.\n")


def test_stdin_to_a_file_resumes(cli, small, monkeypatch, tmp_path):
    files = ("--input-file", "-", "--output-file", tmp_path / "out.jsonl")
    for note in ("", "note: 1 of 1 prompts are answered"):
        stdin_of(monkeypatch, {"prompt": "a", "max_tokens": 3})
        result = cli("run", small.directory, *files, *FEW)
        assert result.code == 0
        assert result.err.startswith(note)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--overwrite",), "--overwrite: got --output-file -, expected a file: stdout is not resumed"),
        (("--json",), "--json: got --output-file -, expected a file: the answers are on stdout"),
    ],
)
def test_what_makes_no_sense_on_stdout_is_refused(cli, small, monkeypatch, words, message):
    stdin_of(monkeypatch, {"prompt": "a"})
    assert error_line(cli("run", small.directory, "--input-file", "-", "--output-file", "-", *words)) == message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["", ""], "prompt file in standard input: got no prompts, expected one a line"),
        (["{"], "line 1 in standard input: got no JSON ("),
        ([{"prompt": "a"}, {"prompt": 1}], "line 2 in standard input: got prompt 1, expected a text"),
    ],
)
def test_what_is_wrong_on_stdin_is_named(cli, small, monkeypatch, given, message):
    stdin_of(monkeypatch, *given)
    assert error_line(cli("run", small.directory, "--input-file", "-", "--output-file", "-")).startswith(message)


def test_a_reader_of_stdout_that_leaves_is_no_fault(small):
    lines = "".join(json.dumps({"prompt": "a", "max_tokens": 200, "ignore_eos": True}) + "\n" for _ in range(50))
    command = [sys.executable, "-m", "eightfold", "run", small.directory, "--input-file", "-", "--output-file", "-"]
    process = subprocess.Popen(
        [*map(str, [*command, *FEW])], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process:
        process.stdin.write(lines.encode())
        process.stdin.close()
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait() == 2
