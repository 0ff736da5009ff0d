"""`run --input-file`: what is answered, what is refused, and that a run goes on where it was stopped."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eightfold.cli import batch_input, batch_output
from eightfold.cli.batch_input import OwnBatch, read_batch
from eightfold.cli.batch_output import AnswerFile
from eightfold.engine.engine import Engine
from eightfold.engine.sampler import Sampled
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.errors import OutputError
from eightfold.tokenizer import Tokenizer
from tests.conftest import Result, remove_template
from tests.engine.models import EOS
from tests.engine.test_structured import DEAD_END, EXPLOSIVE
from tests.refusal import error_line, refused


class Runner:
    """Answers lines with a command in this process."""

    def __init__(self, cli, model: Path, folder: Path) -> None:
        self.cli, self.model, self.folder = cli, model, folder
        self.output = folder / "answers.jsonl"

    def __call__(self, *lines: object, words=(), name: str = "prompts.jsonl", model: Path | None = None) -> Result:
        write(self.folder / name, *lines)
        files = ("--input-file", self.folder / name, "--output-file", self.output)
        common = ("--threads", 1, "--max-new-tokens", 5, "--max-num-seqs", 1)
        return self.cli("run", model or self.model, *files, *common, *words)

    def answers(self, *lines: object, **how: Any) -> dict[int, dict]:
        """Answer lines into a new file; return the answers by index."""
        self.output.unlink(missing_ok=True)
        result = self(*lines, **how)
        assert (result.code, result.out) == (0, ""), result.err
        return read(self.output)


@pytest.fixture
def batch(cli, small, tmp_path) -> Runner:
    return Runner(cli, small.directory, tmp_path)


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def read(path: Path) -> dict[int, dict]:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert len({line["index"] for line in lines}) == len(lines)
    return {line["index"]: line for line in lines}


# --- answers


def test_texts_chats_and_tokens_are_answered_as_alone(batch, small):
    tokenizer = Tokenizer(small.directory)
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
    lines = [{"prompt": "hello", "id": "first"}, "", {"messages": messages, "id": 7}, {"prompt_token_ids": [1, 2, 3]}]
    result = batch(*lines, words=["--max-num-seqs", 8])
    assert (result.code, result.out) == (0, "")
    assert result.err.startswith("[3 answers, ")
    found = read(batch.output)
    prompts = [tokenizer.encode("hello"), tokenizer.encode_chat(messages, add_generation_prompt=True), [1, 2, 3]]
    assert [found[i]["id"] for i in range(3)] == ["first", 7, None]
    for i, prompt in enumerate(prompts):
        ids = small.answer(prompt, 5, frozenset({EOS}))
        reason = "length" if len(ids) == 5 else "stop"
        answer = {"text": tokenizer.decode(ids), "token_ids": ids, "finish_reason": reason, "stop_reason": None}
        assert found[i]["outputs"] == [answer]
        assert found[i]["prompt_tokens"] == len(prompt)


def outputs(answers: dict[int, dict]) -> list[list[dict]]:
    return [answers[i]["outputs"] for i in range(len(answers))]


def test_a_text_file_has_a_prompt_a_line(batch):
    plain = batch.answers("\ufeff a ", "", "{}", name="p.txt")
    assert outputs(plain) == outputs(batch.answers({"prompt": " a "}, {"prompt": "{}"}))


def test_chat_puts_texts_into_the_template(batch):
    chats = batch.answers({"prompt": "hi"}, {"prompt_token_ids": [5]}, words=["--chat"])
    same = batch.answers({"messages": [{"role": "user", "content": "hi"}]}, {"prompt_token_ids": [5]})
    assert outputs(chats) == outputs(same)


def test_a_template_of_ones_own(batch, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }}")
    own = batch.answers({"prompt": "hi"}, words=["--chat", "--chat-template", tmp_path / "t.jinja"])
    before = batch.output.read_bytes()
    (tmp_path / "t.jinja").write_text("{{ messages[0].content }} ")
    result = batch({"prompt": "hi"}, words=["--chat", "--chat-template", tmp_path / "t.jinja"])
    assert "got an answer of another model, chat template" in error_line(result)
    assert batch.output.read_bytes() == before
    assert outputs(own) == outputs(batch.answers({"prompt": "hi"}))


def test_an_id_may_be_any_text(batch):
    names = ["\ud800", "", 'é"\n\u2028', -(10**30)]
    found = batch.answers(*({"prompt": "a", "id": name} for name in names))
    assert [found[i]["id"] for i in range(4)] == names


def test_lines_have_parameters_of_their_own(tmp_path):
    form = {"json_schema": {"type": "object"}, "begins_after": "</think>"}
    path = write(
        tmp_path / "p",
        {"prompt": "a", "max_tokens": 9, "temperature": 0.5, "stop": ["x"], "logit_bias": {"7": -1}, "top_p": None},
        {"prompt": "a", "max_tokens": None, "seed": 3, "structured": form},
        {"prompt": "a"},
    )
    batch = read_batch(path, {"max_tokens": 5, "seed": 10, "top_p": 0.9}, ())
    assert isinstance(batch, OwnBatch)
    found = [each.params for each in batch.requests]
    assert found[0] == SamplingParams(
        top_p=0.9, temperature=0.5, max_tokens=9, stop=("x",), logit_bias={7: -1.0}, seed=10
    )
    assert (found[1].max_tokens, found[1].seed) == (None, 3)
    assert found[1].structured == StructuredOutput(json_schema='{"type": "object"}', begins_after="</think>")
    assert found[2] == SamplingParams(top_p=0.9, temperature=0.0, max_tokens=5, seed=12)


def test_what_is_asked_for_besides_is_in_the_line(batch):
    asked = {"prompt": "abc", "n": 2, "temperature": 1, "seed": 4, "logprobs": 1, "prompt_logprobs": 0}
    (found,) = batch.answers(asked).values()
    assert len({json.dumps(each["token_ids"]) for each in found["outputs"]}) == 2
    first = found["outputs"][0]
    assert [each["token_id"] for each in first["logprobs"]] == first["token_ids"]
    assert [len(each["top"]) for each in first["logprobs"]] == [1] * len(first["token_ids"])
    assert found["prompt_logprobs"][0] is None
    assert [each["logprob"] < 0 for each in found["prompt_logprobs"][1:]] == [True, True]


def test_a_number_that_json_does_not_know_is_null():
    found = batch_input._logprob(Sampled(3, -math.inf, ((4, -0.5), (3, -math.inf))))
    assert found == {"token_id": 3, "logprob": None, "top": [[4, -0.5], [3, None]]}


def test_any_number_of_sequences_can_run(batch):
    assert batch({"prompt": "a"}, words=["--max-num-seqs", 600, "--kv-memory", "1MiB"]).code == 0


def test_json_for_programs(batch):
    found = batch({"prompt": "a"}, {"prompt": "b"}, words=["--json", "--ignore-eos"]).json()
    assert found.pop("seconds") > 0
    assert len(found.pop("resident_weights_mib")) == 1
    assert found == {
        "answered": 2, "answered_before": 0, "failed": 0, "prompt_tokens": 2, "generated_tokens": 10, "world_size": 1,
    }  # fmt: skip


# --- what cannot be answered


def test_a_form_that_cannot_be_used_is_an_error_of_its_line(batch):
    forms = (EXPLOSIVE["an intersection"], {"json_schema": {"enum": []}}, {"grammar": DEAD_END}, {"choices": ["</s>"]})
    assert batch(*({"prompt": "a", "structured": form} for form in forms)).code == 1
    found = read(batch.output)
    assert found[0]["error"].startswith("structured grammar: got one that takes more than 2 s or 32 MiB to compile, ")
    assert found[1]["error"].startswith("structured json_schema: got Unsatisfiable schema: anyOf is empty, expected ")
    assert found[2]["error"].startswith("structured grammar: got a form in which no token can come next, expected ")
    assert found[3]["outputs"][0]["text"] == "</s>"


def test_a_request_that_fails_is_a_line_with_an_error_and_the_run_goes_on(batch):
    lines = [{"prompt": "x" * 64, "id": "long"}, {"prompt": "good"}, {"prompt_token_ids": [999]}, {"prompt": "\ud800"}]
    result = batch(*lines, words=["--max-model-len", 64])
    found = read(batch.output)
    assert result.code == 1
    assert result.err.splitlines()[-1] == f"eightfold: 3 of 4 prompts have an error in {batch.output}."
    assert (found[0]["id"], found[0]["error"]) == (
        "long",
        "prompt: got 64 tokens, expected at most 63, and room for an answer. Shorten it or raise --max-model-len.",
    )
    assert found[1]["outputs"][0]["finish_reason"]
    assert found[2]["error"] == "token id: got 999, expected 0 to 319"
    assert found[3]["error"].startswith("text: got character 0 that is not Unicode")
    # With more room one error is gone. What was answered stands as it was, the others fail again.
    result = batch(*lines, words=["--max-model-len", 128, "--json"])
    again = read(batch.output)
    assert (result.code, result.json()["answered"], result.json()["failed"]) == (1, 1, 2)
    assert again == {**found, 0: again[0]}
    assert "outputs" in again[0]
    assert [path.name for path in batch.folder.iterdir() if path.name.startswith(".")] == []


def test_a_refusing_template_fails_one_request(batch, tmp_path):
    template = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}x"
    (tmp_path / "t.jinja").write_text(template)
    words = ["--chat", "--chat-template", tmp_path / "t.jinja"]
    assert batch({"prompt": "no"}, {"prompt": "yes"}, words=words).code == 1
    found = read(batch.output)
    assert found[0]["error"].startswith("messages: got not this, expected roles")
    assert found[1]["outputs"]


OBJECT = 'an object such as {"prompt": "Hello"}'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "got no JSON ("),
        ("[1]", f"got [1], expected {OBJECT}"),
        ("[" * 100_000, f"got no JSON (values more than 64 deep), expected {OBJECT}"),
        ({}, "got no prompt, expected exactly one of prompt, messages or prompt_token_ids"),
        ({"prompt": "a", "messages": []},
         "got prompt and messages, expected exactly one of prompt, messages or prompt_token_ids"),
        ({"prompt": 1}, "got prompt 1, expected a text"),
        ({"messages": []}, "messages: expected at least one"),
        ({"messages": "a"}, "messages: got 'a', expected a list"),
        ({"messages": [{"content": "a"}]}, "messages[0].role: got null, expected system, user, assistant or tool"),
        ({"prompt_token_ids": []}, "got prompt_token_ids [], expected a list of token ids such as [1, 42]"),
        ({"prompt_token_ids": [1, True]}, "got prompt_token_ids [1, true], expected a list of token ids such as"),
        ({"prompt": "a", "id": [1]}, "got id [1], expected a text or a whole number"),
        ({"prompt": "a", "id": True}, "got id true, expected a text or a whole number"),
        ({"prompt": "a", "max_token": 1}, "got the field max_token, expected max_tokens"),
        ({"prompt": "a", "zzz": 1},
         "got the field zzz, expected prompt, messages, prompt_token_ids, id or a sampling parameter"),
        ({"prompt": "a", "logit_bias": [1]}, "got logit_bias [1], expected token ids, as texts, and what is added"),
        ({"prompt": "a", "structured": {"x": 1}}, 'got structured {"x": 1}, expected an object with one of json_sch'),
    ],
)  # fmt: skip
def test_a_line_that_is_none_is_named_before_anything_runs(cli, small, tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "good"}, "", line)
    files = ("--input-file", path, "--output-file", tmp_path / "out.jsonl")
    found = refused(cli, "run", small.directory, *files, within=tmp_path)
    assert found.startswith(f"line 3 in {path}: {message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "temperature": -1}, "temperature: got -1, expected a number of at least 0"),
        ({"prompt": "a", "structured": {}}, "structured output: got nothing, expected exactly one of"),
        ({"prompt": "a", "stop": 3}, "stop: got 3, expected a list of texts"),
    ],
)
def test_a_parameter_out_of_its_range_is_named_with_its_line(cli, small, tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", line)
    files = ("--input-file", path, "--output-file", tmp_path / "out.jsonl")
    found = refused(cli, "run", small.directory, *files, within=tmp_path)
    assert found.startswith(f"line 1 in {path}: {message}")


def test_files_that_cannot_be_read(cli, small, tmp_path):
    def message(path, out="out"):
        files = ("--input-file", path, "--output-file", tmp_path / out)
        return refused(cli, "run", small.directory, *files, within=tmp_path)

    assert message(tmp_path / "gone") == f"cannot read {tmp_path}/gone: No such file or directory. Check the path."
    assert message(tmp_path) == f"prompt file in {tmp_path}: got a directory, expected a file with text"
    empty, bad, good = tmp_path / "empty", tmp_path / "bad", write(tmp_path / "good", {"prompt": "a"})
    empty.write_text("\n \n")
    bad.write_bytes(b'{"prompt": "a"}\n"\xff"\n')
    assert message(empty) == f"prompt file in {empty}: got no prompts, expected one a line"
    assert message(bad) == f"line 2 in {bad}: got byte 1 that is not UTF-8, expected UTF-8 text"
    assert message(good, "good") == "--output-file: got the input file, expected another"
    assert message(good, "no/where") == f"No such file or directory in {tmp_path}/no/where."
    assert message(good, "/dev/null") == "--output-file: got /dev/null, expected a file that can be read again"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--prompt: got none, expected it or --input-file"),
        (["--prompt", "a", "--input-file", "b"], "--prompt: got --input-file too, expected it or --input-file"),
        (["--input-file", "b"], "--output-file: got none, expected where the answers to --input-file go"),
        (["--prompt", "a", "--output-file", "b"], "--output-file: got --prompt, expected --input-file beside it"),
        (["--prompt", "a", "--max-num-seqs", "2"], "--max-num-seqs: got --prompt, expected --input-file beside it"),
        (["--prompt", "a", "--overwrite"], "--overwrite: got --prompt, expected --input-file beside it"),
        (["--prompt", "a", "--speculate", "2", "--backend", "reference"],
         "--speculate: got the reference backend, expected the native one. Leave out --backend reference."),
        (["--input-file", "b", "--output-file", "c", "--backend", "reference"],
         "--input-file: got the reference backend, expected the native one. Leave out --backend reference."),
        (["--input-file", "b", "--output-file", "c", "--kv-memory", "x"],
         "--kv-memory: got x, expected a size such as 2GiB or 500MB. Try: eightfold run --help"),
        (["--prompt", "a", "--seed", "1", "--temperature", "1", "--backend", "reference"],
         "sampling options: got the reference backend, expected the native one. Leave out --backend reference."),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(cli, small, words, message):
    assert error_line(cli("run", small.directory, *words)) == message


def test_chats_need_a_template(cli, small, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(small.directory, model)
    remove_template(model)
    path = write(tmp_path / "p", {"prompt": "hi"})
    files = ("--input-file", path, "--output-file", tmp_path / "out")
    found = refused(cli, "run", model, *files, "--chat", within=tmp_path)
    assert found == (
        f"chat template in {model}: got none, expected chat_template.jinja or tokenizer_config.json's. "
        "Give one with --chat-template FILE, or prompts as texts without --chat."
    )
    assert cli("run", model, *files, "--max-new-tokens", 1).code == 0


# --- going on


def test_what_is_answered_is_not_done_twice(batch, monkeypatch):
    lines = [{"prompt": text} for text in ("a", "b", "c")]
    batch(*lines[:2])
    before = batch.output.read_bytes()
    result = batch(*lines)
    assert result.err.startswith(f"note: 2 of 3 prompts are answered in {batch.output} already.\n[1 answers")
    assert batch.output.read_bytes().startswith(before)
    monkeypatch.setattr(Engine, "load", lambda *args: pytest.fail("the model is loaded for nothing"))
    found = batch(*lines, words=["--json"]).json()
    assert (found["answered"], found["answered_before"]) == (0, 3)


ELSEWHERE = "Choose another --output-file, or begin anew with --overwrite."


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["other", "b"], "line 1 in {}: got an answer to prompt 0 when it had another text, id or parameters"),
        ([{"prompt": "a", "id": 1}, "b"], "line 1 in {}: got an answer to prompt 0 when it had another text, id or"),
        (["a", {"prompt": "b", "top_k": 3}], "line 2 in {}: got an answer to prompt 1 when it had another text, id or"),
        (["b", "a"], "line 1 in {}: got an answer to prompt 0 when it had another text, id or parameters"),
        (["a"], "line 2 in {}: got an answer to prompt 1, and 1 prompts, counted from 0"),
    ],
)
def test_a_changed_input_is_refused(batch, lines, message):
    batch({"prompt": "a"}, {"prompt": "b"})
    before = batch.output.read_bytes()
    found = error_line(batch(*({"prompt": line} if isinstance(line, str) else line for line in lines)))
    assert found.startswith(message.format(batch.output))
    assert found.endswith(f"expected one of this run. {ELSEWHERE}")
    assert batch.output.read_bytes() == before


def test_another_model_or_mode_is_refused_and_the_same_model_elsewhere_is_not(batch, small, tmp_path):
    other = "got an answer of another model, chat template, --dynamic or --attention-mode, expected one of this run"
    batch({"prompt": "a"})
    assert other in error_line(batch({"prompt": "a"}, words=["--dynamic", "symmetric"]))
    assert other in error_line(batch({"prompt": "a"}, words=["--attention-mode", "mindie"]))
    copy = tmp_path / "copy"
    shutil.copytree(small.directory, copy)
    assert batch({"prompt": "a"}, model=copy).code == 0
    (weights,) = copy.glob("*.safetensors")
    weights.chmod(0o600)
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1  # one bit of the last tensor
    weights.write_bytes(raw)
    assert other in error_line(batch({"prompt": "a"}, model=copy))


def test_overwrite_begins_anew(batch):
    batch({"prompt": "a"}, {"prompt": "b"})
    assert batch({"prompt": "c"}, words=["--overwrite"]).code == 0
    assert list(read(batch.output)) == [0]


FOREIGN = ["text\n", '{"index": 0}\n', "[1]\n", '{"index": "0", "fingerprint": ""}\n', "no end", '{"inde_', "\0\0\n"]


@pytest.mark.parametrize("content", FOREIGN)
def test_a_file_of_somebody_else_is_left_alone(batch, content):
    batch.output.write_text(content)
    message = error_line(batch({"prompt": "a"}))
    assert message.startswith(f"line 1 in {batch.output}: got ")
    assert message.endswith(f"expected an answer that this command wrote. {ELSEWHERE}")
    assert batch.output.read_text() == content


@pytest.mark.parametrize("tail", [b"", b"{", b'{"index": 1, "id": nu', b"\0" * 5000, b'{"index": 3, "id"' + b"\0" * 99])
def test_a_line_that_a_crash_tore_is_done_again(batch, tail):
    lines = [{"prompt": text} for text in "abcd"]
    whole = batch.answers(*lines)
    raw = batch.output.read_bytes()
    second = raw.index(b"\n", raw.index(b"\n") + 1) + 1
    batch.output.write_bytes(raw[:second] + (tail or raw[second:-1]))
    assert batch(*lines).code == 0
    assert (read(batch.output), batch.output.read_bytes()) == (whole, raw)


def test_two_runs_do_not_write_one_file(batch):
    batch({"prompt": "a"})
    before = batch.output.read_bytes()
    with batch.output.open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        message = error_line(batch({"prompt": "a"}, {"prompt": "b"}))
    assert message == (
        f"--output-file in {batch.output}: got a file that another run is writing, expected one that is not in use. "
        "Wait for its end, or choose another."
    )
    assert batch.output.read_bytes() == before
    assert batch({"prompt": "a"}, {"prompt": "b"}).code == 0


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_again(tmp_path, monkeypatch):
    path, real = tmp_path / "a", fcntl.flock
    path.write_text("old")

    def replaced(*args):
        real(*args)
        monkeypatch.setattr(fcntl, "flock", real)
        (tmp_path / "b").write_text("")
        (tmp_path / "b").replace(path)

    monkeypatch.setattr(fcntl, "flock", replaced)
    with AnswerFile(path) as answers:
        answers.append({"index": 0})
    assert path.read_text() == '{"index": 0}\n'


def test_a_rewritten_file_stays_locked_and_keeps_its_mode(tmp_path):
    path = tmp_path / "a"
    path.touch(0o640)
    path.write_text('{"index": 0, "fingerprint": "f", "error": "x"}\n{"index": 1, "fingerprint": "f"}\n')
    with AnswerFile(path) as answers:
        assert answers.resume(["f", "f"]) == {1}
        with pytest.raises(OutputError, match="another run is writing"), AnswerFile(path):
            pass
        answers.append({"index": 0})
    assert path.read_text() == '{"index": 1, "fingerprint": "f"}\n{"index": 0}\n'
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    path, real = tmp_path / "a", os.pwrite

    def full(descriptor, raw, at):
        if at > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, raw[:4], at)

    with AnswerFile(path) as answers:
        answers.append({"index": 0})
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            answers.append({"index": 1})
    assert caught.value.filename == str(path)
    assert path.read_text() == '{"index": 0}\n'


def test_the_disk_is_waited_for_now_and_then(tmp_path, monkeypatch):
    waits, now = [], [0.0]
    monkeypatch.setattr(os, "fsync", lambda descriptor: waits.append(now[0]))
    monkeypatch.setattr(batch_output.time, "monotonic", lambda: now[0])  # type: ignore[attr-defined]
    with AnswerFile(tmp_path / "a") as answers:
        for now[0] in (1.0, 4.0, 6.0, 7.0, 10.0, 12.0):
            answers.append({"index": 0})
        now[0] = 13.0
    assert waits == [6.0, 12.0, 13.0]


def test_a_run_that_fails_before_its_first_answer_leaves_no_file(batch):
    message = error_line(batch({"prompt": "a"}, words=["--max-model-len", 2000]))
    assert message.startswith("--max-model-len: got 2000, expected at most 1024")
    assert not batch.output.exists()


MANY = [{"prompt": f"{i} " * (1 + i % 50), "id": i, "max_tokens": 400 + i, "ignore_eos": True} for i in range(60)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_ended_goes_on_and_comes_to_the_same_answers(batch, tmp_path, number):
    whole = batch.answers(*MANY, words=["--max-num-seqs", 4])
    batch.output.unlink()
    files = ["--input-file", tmp_path / "prompts.jsonl", "--output-file", batch.output]
    command = [sys.executable, "-m", "eightfold", "run", batch.model, *files, "--threads", 1, "--max-new-tokens", 5]
    process = subprocess.Popen([*map(str, command), "--max-num-seqs", "4"], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not batch.output.exists() or batch.output.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    before = batch.output.read_bytes()
    assert 5 <= before.count(b"\n") < len(MANY)
    if number == signal.SIGINT:
        count = before.count(b"\n")  # the last may have been written, and not yet be counted
        assert process.returncode == 2
        assert re.match(
            rf"note: ({count}|{count - 1}) prompts are answered; the same command goes on with the others.\n", said
        )
    result = batch(*MANY, words=["--json"])
    assert result.json()["answered_before"] == before.count(b"\n")
    assert read(batch.output) == whole
    assert batch.output.read_bytes().startswith(before)


# --- what is no file of prompts, whoever made it


def input_refused(cli, small, tmp_path, path: Path) -> str:
    files = ("--input-file", path, "--output-file", tmp_path / "out")
    return error_line(cli("run", small.directory, *files))


def test_a_pipe_or_device_is_not_waited_for(cli, small, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((tmp_path / "fifo", "a FIFO"), (Path("/dev/zero"), "a device")):
        message = input_refused(cli, small, tmp_path, path)
        assert message == f"prompt file in {path}: got {kind}, expected a file with text"
        message = error_line(cli("run", small.directory, "--prompt", "a", "--chat-template", path))
        assert message == f"--chat-template in {path}: got {kind}, expected a file with text"
    (tmp_path / "long").write_bytes(b"x" * (1 << 20 | 1))
    message = error_line(cli("run", small.directory, "--prompt", "a", "--chat-template", tmp_path / "long"))
    assert message == f"--chat-template in {tmp_path}/long: got more than 1 MiB, expected less. Take a part."
    assert not (tmp_path / "out").exists()


def test_a_line_of_120_mb_is_not_read(cli, small, tmp_path):
    path = tmp_path / "p"
    with path.open("wb") as file:
        file.write(b'{"prompt": "a"}\n{"prompt": "')
        file.seek(120_000_000)
        file.write(b'"}\n')
    assert (
        input_refused(cli, small, tmp_path, path)
        == f"line 2 in {path}: got 16 MiB or more, expected less. Split it: each line is one prompt."
    )


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize("depth", [100, 900, 990, 100_000])
def test_a_message_that_is_deep_is_refused_wherever_it_would_overflow(cli, small, tmp_path, depth):
    line = f'{{"messages": [{{"role": "user", "content": "a", "x": {nested(depth)}}}]}}'
    path = write(tmp_path / "p", line)
    found = input_refused(cli, small, tmp_path, path)
    assert found == f"line 1 in {path}: got no JSON (values more than 64 deep), expected {OBJECT}"


def test_a_key_that_stands_twice_or_too_many_values_are_refused(cli, small, tmp_path):
    path = write(tmp_path / "p", '{"prompt": "a", "prompt": "b"}')
    found = input_refused(cli, small, tmp_path, path)
    assert found == f'line 1 in {path}: got no JSON (the key "prompt" twice), expected {OBJECT}'
    write(path, f'{{"prompt_token_ids": [{"[]," * 4_000_000}1]}}')
    assert input_refused(cli, small, tmp_path, path).startswith(f"line 1 in {path}: got no JSON (more than 4,000,000")
    many = ",".join(f'"k{i}":0' for i in range(200_000))
    write(path, f'{{{many},"k7":1}}')
    started = time.process_time()
    assert '(the key "k7" twice)' in input_refused(cli, small, tmp_path, path)
    assert time.process_time() - started < 5


def test_there_is_a_most_of_prompts(cli, small, tmp_path, monkeypatch):
    monkeypatch.setattr("eightfold.cli.batch_input.MAX_PROMPTS", 2)
    path = write(tmp_path / "p.txt", "a", "b", "", "c")
    found = input_refused(cli, small, tmp_path, path)
    assert found == f"prompt file in {path}: got more than 2 prompts, expected fewer"


def test_an_answer_file_of_one_endless_line_is_not_read_whole(batch, monkeypatch):
    monkeypatch.setattr(batch_output, "_MOST_OF_A_LINE", 1000)
    content = b'{"index": ' + b"1" * 5000
    batch.output.write_bytes(content)
    assert error_line(batch({"prompt": "a"})).startswith(f'line 1 in {batch.output}: got \'{{"index": 111')
    assert batch.output.read_bytes() == content
