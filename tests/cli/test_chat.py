"""`eightfold chat`: through a pipe, and at a terminal that a test types on."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightfold.cli import screen
from eightfold.tokenizer import Tokenizer
from tests.conftest import Result, remove_template
from tests.engine.models import EOS
from tests.refusal import error_line

GREEDY = ("--temperature", 0, "--threads", 1)


@pytest.fixture
def chat(cli, small, monkeypatch):
    """Send text through a pipe."""

    def run(text: str | bytes, *words: object, model: Path | None = None) -> Result:
        raw = text if isinstance(text, bytes) else text.encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))
        return cli("chat", model or small.directory, *GREEDY, *words)

    return run


def answer(small, messages: list[dict], count: int) -> str:
    tokenizer = Tokenizer(small.directory)
    prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)
    return tokenizer.decode(small.answer(prompt, count, frozenset({EOS})))


def replies(small, count: int, *questions: str) -> str:
    """Return what is written in a conversation: each prompt is the tokens before it, and what is new."""
    tokenizer = Tokenizer(small.directory)
    known, texts = [], []
    for question in questions:
        new = f"{'</s>' if known else ''}<|user|>{question}</s><|assistant|>"
        known += tokenizer.encode(new, special_tokens=False)
        known += small.answer(known, count, frozenset({EOS}))
        texts.append(tokenizer.decode(known[-count:]) + "\n")
        assert EOS not in known[-count:], "choose another question, whose answer is not shorter"
    return "".join(texts)


def said(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


SUMMARY = r"\[(\d+)(?: \((\d+) from the cache\))? \+ (\d+) tokens, first after \d+\.\d\d s(, \d+\.\d tok/s)?(.*)\]"


def summaries(result: Result) -> list[tuple[str, ...]]:
    return [match.groups() for match in map(re.compile(SUMMARY).fullmatch, result.err.splitlines()) if match]


# --- a pipe


def test_each_line_is_a_turn_and_only_answers_are_on_stdout(chat, small):
    result = chat("hello\n\nand you?", "--max-new-tokens", 12)
    assert (result.code, result.out) == (0, replies(small, 12, "hello", "and you?"))
    assert len(summaries(result)) == 2
    assert "\x1b" not in result.out + result.err


def test_each_turn_computes_only_what_is_new(chat):
    result = chat("a" * 150 + "\nb\nc\n", "--max-new-tokens", 100, "--speculate", 2)
    # A turn's blocks of 128 tokens are found again; what is less than a block is computed.
    for (prompt, _, new, *_), (_, cached, *_) in zip(summaries(result), summaries(result)[1:], strict=False):
        assert int(cached) == (int(prompt) + int(new)) // 128 * 128 > 0


def test_mindie_computes_every_turn_anew_and_says_so(cli, chat, small, tmp_path, monkeypatch):
    source = small.directory.parent / "float"
    words = ("--scheme", "w8a16", "--kv-int8", "--calib-limit", 2)
    assert cli("quantize", source, tmp_path / "kv", *words).code == 0
    result = chat("a" * 150 + "\nb\n", "--max-new-tokens", 8, "--attention-mode", "mindie", model=tmp_path / "kv")
    assert "note: Attention mode mindie runs every prompt whole" in result.err
    assert [cached for _, cached, *_ in summaries(result)] == [None, None]


def test_a_backslash_joins_lines(chat, small):
    result = chat("one\\\ntwo\\\nthree\nlast\\", "--max-new-tokens", 5)
    assert result.out == replies(small, 5, "one\ntwo\nthree", "last")


def test_reset_and_system(chat, small):
    result = chat(
        "/system\na\n/system be \\\n brief\n/system\na\n/reset\na\n/system -\n/system\n", "--max-new-tokens", 5
    )
    system = [{"role": "system", "content": "be \n brief"}]
    first = answer(small, said("a"), 5)
    second = answer(small, system + said("a", first, "a"), 5)
    assert result.out == f"{first}\n{second}\n{answer(small, system + said('a'), 5)}\n"
    notes = [line for line in result.err.splitlines() if not line.startswith("[")]
    assert notes == [
        "There is none.",
        "Set; what was said is kept, /reset forgets it.", "be ", " brief",
        "Forgotten.",
        "Set; what was said is kept, /reset forgets it.", "There is none.",
    ]  # fmt: skip
    assert chat("a\n", "--system", "be \n brief", "--max-new-tokens", 5).out == result.out.splitlines()[2] + "\n"


def test_a_message_is_answered_again_or_taken_back(chat, small):
    result = chat("/retry\n/undo\na\n/retry\nb\n/undo\n/tokens\n/undo\n/tokens\n", "--max-new-tokens", 5)
    first = answer(small, said("a"), 5)
    assert result.out == f"{first}\n{first}\n{replies(small, 5, 'a', 'b').splitlines()[1]}\n"
    notes = [line for line in result.err.splitlines() if not line.startswith("[")]
    assert notes == [
        "There is no message yet.",
        "There is no message yet.",
        "The likeliest token is taken each time, so the answer is the same.",
        "Taken back: b",
        f"2 messages, {len(small_tokens(small, said('a', first)))} of 1024 tokens",
        "Taken back: a",
        "0 messages, 0 of 1024 tokens",
    ]


def small_tokens(small, messages: list[dict]) -> list[int]:
    return Tokenizer(small.directory).encode_chat(messages, add_generation_prompt=False)


def test_an_answer_that_is_given_again_is_another_one(chat):
    words = ("--temperature", 1.5, "--max-new-tokens", 20, "--seed", 1)
    first, both = chat("a\n", *words).out, chat("a\n/retry\n", *words).out
    assert both.startswith(first) and both.removeprefix(first) != first
    assert chat("a\n/retry\n", *words).out == both


def test_a_saved_conversation_goes_on(chat, small, tmp_path):
    path = tmp_path / "talk"
    whole = chat("a\nb\n", "--max-new-tokens", 5, "--system", "short").out.splitlines()
    chat(f"a\n/save {path}\n", "--max-new-tokens", 5, "--system", "short")
    loaded = chat(f"x\n/load {path}\n/system\nb\n", "--max-new-tokens", 5)
    assert loaded.out.splitlines()[1] == answer(
        small, [{"role": "system", "content": "short"}, *said("a", whole[0], "b")], 5
    )
    assert [line for line in loaded.err.splitlines() if not line.startswith("[")] == [f"2 messages of {path}.", "short"]
    path.write_text(json.dumps(said("a", "no", "b")))
    asked = chat(f"/load {path}\n", "--max-new-tokens", 5)
    assert asked.out == answer(small, said("a", "no", "b"), 5) + "\n"
    assert f"2 messages of {path} before the last, which is answered now.\n" in asked.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "eightfold: conversation in {path}: got Expecting property name"),
        ('{"prompt": "x"}', "eightfold: conversation in {path}: messages: got null, expected a list"),
        ("[]", "eightfold: conversation in {path}: messages: expected at least one"),
        ('[{"role": "user"}]', "eightfold: conversation in {path}: messages[0].content: got null, expected a text"),
        (None, "eightfold: cannot read {path}: No such file or directory. Check the path."),
    ],
)
def test_what_is_no_conversation_is_refused_and_nothing_is_forgotten(chat, small, tmp_path, content, message):
    path = tmp_path / "talk"
    if content is not None:
        path.write_text(content)
    result = chat(f"a\n/load {path}\n/load\n/tokens\n", "--max-new-tokens", 5)
    notes = [line for line in result.err.splitlines() if not line.startswith("[")]
    assert notes[0].startswith(message.replace("{path}", str(path)))
    assert notes[1] == "/load FILE" and notes[2].startswith("2 messages, ")


def test_thoughts_are_no_answer(chat, small, tmp_path):
    """The prompt opens a thought, which the small model never ends."""
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}<|user|>{{ m.content }}</s>{% endfor %}<|assistant|><think>\n")
    result = chat(f"a\n/save {tmp_path}/talk\n", "--chat-template", template, "--max-new-tokens", 5)
    assert result.out == "\n"
    (_, answered) = json.loads((tmp_path / "talk").read_text())["messages"]
    assert answered["content"] == "" and answered["reasoning_content"]
    assert result.err.startswith(answered["reasoning_content"])


def test_sampling_depends_on_the_seed(chat):
    words = ("--temperature", 1.5, "--top-k", 50, "--top-p", 0.9, "--min-p", 0.01, "--max-new-tokens", 20, "--seed")
    outs = [chat("a\n", *words, seed).out for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


def test_commands_and_messages_that_begin_with_a_slash(chat, small):
    result = chat("/help\n/what is this\n /what is this\n/exit\nnever\n", "--max-new-tokens", 3)
    assert result.out == answer(small, said("/what is this"), 3) + "\n"
    assert "/reset " in result.err
    assert "/what is no command: /help shows them. To say it, put a blank before it.\n" in result.err


def test_a_conversation_is_saved_for_run_and_nothing_is_overwritten(chat, cli, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my talk.jsonl"
    script = f"a\n/save {path}\nb\n/save ~/my talk.jsonl\n/save\n/save {tmp_path}\n/save {tmp_path}/no/where\n"
    result = chat(script, "--max-new-tokens", 3, "--system", "é")
    notes = [line for line in result.err.splitlines() if not line.startswith("[")]
    assert notes == [
        f"2 messages are in {path}.",
        f"{path} is there already: /save --overwrite {path} replaces it.",
        "/save FILE",
        f"{tmp_path} is there already: /save --overwrite {tmp_path} replaces it.",
        f"eightfold: {tmp_path}/no/where: No such file or directory",
    ]
    first = result.out.splitlines()[0]
    assert json.loads(path.read_text()) == {"messages": [{"role": "system", "content": "é"}, *said("a", first)]}
    again = chat(f"b\nc\n/save --overwrite {path}\n/save --overwrite {tmp_path}\n", "--max-new-tokens", 3)
    assert f"4 messages are in {path}." in again.err
    assert f"eightfold: cannot write {tmp_path}: got a directory, expected a file, or nothing yet" in again.err
    assert [message["content"] for message in json.loads(path.read_text())["messages"]][::2] == ["b", "c"]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_what_was_not_said_is_not_saved(chat, tmp_path):
    result = chat(f"/save {tmp_path}/talk\n")
    assert result.err == "There is no message yet.\n"
    assert not (tmp_path / "talk").exists()


def test_the_oldest_turns_are_forgotten_when_the_context_is_full(chat):
    lines = "".join(f"{letter * 60}\n" for letter in "abcdef")
    result = chat(lines, "--max-model-len", 300, "--max-new-tokens", 60)
    assert result.code == 0
    assert "The conversation has outgrown 300 tokens: the oldest " in result.err
    # Never more than the context without the quarter that an answer may have.
    assert all(int(prompt) <= 300 - 60 for prompt, *_ in summaries(result))
    assert len(summaries(result)) == 6


def test_a_cache_smaller_than_the_context_is_the_context(chat, small):
    words = ("--kv-memory", f"{2 * small.page_bytes}", "--max-new-tokens", 60)
    result = chat("".join(f"{letter * 60}\n" for letter in "abcdef"), *words)
    assert "The conversation has outgrown 257 tokens: the oldest " in result.err
    assert len(summaries(result)) == 6


def test_a_message_that_cannot_be_answered_is_said_and_the_chat_goes_on(chat, small):
    result = chat("x" * 200 + "\nhi\n", "--max-model-len", 100, "--max-new-tokens", 10)
    assert result.code == 0
    assert result.err.startswith("eightfold: message: got 203 tokens, expected at most 90, which leaves room for an ")
    assert result.out == answer(small, said("hi"), 10) + "\n"


def test_a_line_that_is_no_text_ends_a_pipe(chat):
    result = chat(b"a\n\xff\nb\n", "--max-new-tokens", 3)
    assert result.code == 2
    assert result.err.splitlines()[-1] == (
        "eightfold: line 2 of stdin: got byte 0 that is not UTF-8, expected UTF-8 text"
    )


def test_an_answer_that_is_cut_off_says_so(chat, small):
    assert summaries(chat("hello\n", "--max-new-tokens", 1))[0][2:] == ("1", None, ", cut off")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-p", "0"], "--top-p: got 0, expected a number above 0 and up to 1. Try: eightfold chat --help"),
        (["--kv-memory", "x"], "--kv-memory: got x, expected a size such as 2GiB or 500MB"),
        (["--max-model-len", "9999"], "--max-model-len: got 9999, expected at most 1024, which is all this model can"),
        (["--chat-template", "/no"], "cannot read /no: No such file or directory. Check the path."),
    ],
)
def test_options_that_make_no_sense(chat, words, message):
    result = chat("a\n", *words)
    assert (result.code, result.out) == (2, "")
    assert error_line(result).startswith(message)


def test_options_that_change_nothing_are_noted(chat):
    result = chat("", "--seed", 1, "--top-p", 0.5)
    assert result.err == (
        "note: --top-p and --seed change nothing while --temperature is 0: the likeliest token is taken.\n"
    )


def test_a_model_without_a_template_is_refused_with_two_ways_out(chat, small, tmp_path):
    model = tmp_path / "base"
    shutil.copytree(small.directory, model)
    remove_template(model)
    assert error_line(chat("a\n", model=model)) == (
        f"chat template in {model}: got none, expected chat_template.jinja or tokenizer_config.json's. "
        "Give one with --chat-template FILE, or let the model continue a text: eightfold run DIR --prompt."
    )
    (tmp_path / "t.jinja").write_text("{{ messages[-1].content }}")
    assert chat("a\n", "--chat-template", tmp_path / "t.jinja", "--max-new-tokens", 2, model=model).code == 0
    (tmp_path / "t.jinja").write_text("{% if %}")
    message = error_line(chat("a\n", "--chat-template", tmp_path / "t.jinja", model=model))
    assert message.startswith("chat template: got ")


def test_ctrl_c_ends_a_pipe(small):
    command = [sys.executable, "-m", "eightfold", "chat", small.directory, *GREEDY, "--max-new-tokens", "2"]
    process = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdin.write(b"a\n")
    process.stdin.flush()
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2
    assert errors.splitlines()[-1].startswith(b"eightfold: interrupted: ")


# --- a terminal

# The command, with 10 ms for each step: an answer can be seen on its way.
SLOWLY = """
import sys, time
from eightfold.engine.engine import Engine
step = Engine.step
Engine.step = lambda engine: (time.sleep(0.01), step(engine))[1]
from eightfold.cli.main import main
sys.exit(main())
"""
READY = "> \x1b[2D"  # a prompt at which nothing is typed yet
HINT = "(Ctrl-C again ends the chat, and so do Ctrl-D and /exit)"


class Typist:
    """A person at a terminal of their own."""

    def __init__(
        self, model: Path, *words: object, stdout: Path | None = None, columns: int = 1000, **environment: str
    ) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        variables = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        with contextlib.ExitStack() as files:
            output = slave if stdout is None else files.enter_context(stdout.open("wb"))
            self.process = subprocess.Popen(
                [sys.executable, "-c", SLOWLY, "chat", *map(str, (model, *GREEDY, *words))],
                stdin=slave, stdout=output, stderr=slave,
                env={**variables, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
                start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            )  # fmt: skip
        os.close(slave)
        self.seen = b""

    def until(self, text: str, seconds: float = 60) -> str:
        """Return what is shown up to a text, this included; <end> stands for the program's end."""
        wanted, end = text.encode(), time.monotonic() + seconds
        while wanted not in self.seen:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise TimeoutError(f"waited for {text!r}, saw {self.seen!r}")
            try:
                self.seen += os.read(self.master, 4096)
            except OSError:
                if self.seen.endswith(b"<end>"):
                    raise EOFError(f"waited for {text!r}, saw {self.seen!r}") from None
                self.seen += b"<end>"
        shown, _, self.seen = self.seen.partition(wanted)
        return (shown + wanted).decode()

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def ask(self, text: str) -> str:
        """Type a line and return what is shown up to the next prompt."""
        self.type(text + "\r")
        return self.until(READY)

    def interrupt(self, then: str) -> None:
        """Press Ctrl-C until it is heard: Python does not hear it in the instant in which it begins to wait."""
        for _ in range(60):
            self.type("\x03")
            with contextlib.suppress(TimeoutError):
                self.until(then, 1)
                return
        raise TimeoutError(self.seen)


@pytest.fixture(scope="module")
def talker(small, tmp_path_factory) -> Path:
    """A model that never comes to an end."""
    model = tmp_path_factory.mktemp("talker") / "talker"
    shutil.copytree(small.directory, model)
    (model / "generation_config.json").write_text('{"eos_token_id": []}')
    return model


@pytest.fixture
def typist(talker):
    started = []

    def start(*words: object, **how: Any) -> Typist:
        started.append(Typist(talker, *words, **how))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        os.close(each.master)


def test_a_person_stops_an_answer_and_goes_on(typist, tmp_path):
    person = typist("--max-new-tokens", 600)
    assert "talker, 1024 tokens of context. /help shows the commands." in person.until(READY)
    person.type("hello\r")
    person.until("hello\x1b")
    time.sleep(0.5)
    with pytest.raises(TimeoutError):
        person.until("tok/s", 0)
    streamed = person.seen
    assert len(streamed) > 10, "the answer is shown as it comes"
    person.type("\x03")
    shown = person.until(READY)
    assert re.search(r"\x1b\[2m\[.* \+ \d+ tokens, .*, stopped\]\x1b\[0m\r\n", shown)
    assert 10 < int(re.search(r"\+ (\d+) tokens", shown)[1]) < 600
    assert "2 messages are in" in person.ask(f"/save {tmp_path}/talk")
    messages = json.loads((tmp_path / "talk").read_text())["messages"]
    assert messages[0] == {"role": "user", "content": "hello"}
    assert messages[1]["content"], "what was said until then is remembered"
    person.type("more\r")
    person.until("\x1b[?2004l")  # no message is asked for any more
    person.type("\x03")
    person.until(READY)
    person.type("/exit\r")
    person.until("<end>")
    assert person.process.wait(timeout=30) == 0


def test_a_person_edits_pastes_and_leaves(typist, tmp_path):
    person = typist("--max-new-tokens", 2)
    person.until(READY)
    person.ask("hello")
    person.ask("\x1b[A")  # the line before, again
    person.ask("\x1b[200~one\rtwo\x1b[201~ three")
    person.type("four \\\r")
    person.until("\x1b[0m.")
    person.ask("five")
    person.type("half a li")
    person.until("li")
    person.interrupt(HINT)
    person.until(READY)
    assert "8 messages are in" in person.ask(f"/save {tmp_path}/talk")
    asked = [message["content"] for message in json.loads((tmp_path / "talk").read_text())["messages"]][::2]
    assert asked == ["hello", "hello", "one\ntwo three", "four \nfive"]
    person.interrupt(HINT)  # the first in a row: there was a line since the last one
    person.until(READY)
    person.interrupt("<end>")
    assert person.process.wait(timeout=30) == 0


def test_ctrl_d_ends_it_and_a_plain_terminal_gets_no_escapes(typist):
    person = typist("--max-new-tokens", 2, TERM="dumb")
    shown = person.until("> ")
    person.type("hello\r")
    shown += person.until("]\r\n> ")
    person.type("\x04")
    shown += person.until("<end>")
    assert person.process.wait(timeout=30) == 0
    assert "\x1b" not in shown


def test_answers_can_go_into_a_file_while_a_person_types(typist, tmp_path):
    person = typist("--max-new-tokens", 2, stdout=tmp_path / "out")
    person.until(READY)
    assert "first after" in person.ask("hello")
    person.type("\x04")
    person.until("<end>")
    written = (tmp_path / "out").read_text()
    assert written.count("\n") >= 1
    assert "\x1b" not in written and not written.startswith(screen.PROMPT)


def test_a_line_of_a_pipe_has_a_limit(chat, monkeypatch):
    monkeypatch.setattr(screen, "MAX_LINE_BYTES", 1000)
    result = chat("a\n" + "b" * 1000 + "\nc\n", "--max-new-tokens", 3)
    assert error_line_of(result) == "line 2 of stdin: got 0 MiB or more, expected less. Paste less at once."


def error_line_of(result: Result) -> str:
    return result.err.splitlines()[-1].removeprefix("eightfold: ")


def test_saving_over_a_pipe_or_device_is_refused(chat, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    result = chat(f"a\n/save --overwrite {tmp_path}/fifo\n/save --overwrite /dev/null\n", "--max-new-tokens", 3)
    refusals = [line for line in result.err.splitlines() if line.startswith("eightfold: ")]
    assert refusals == [
        f"eightfold: cannot write {path}: got {kind}, expected a file, or nothing yet"
        for path, kind in ((f"{tmp_path}/fifo", "a FIFO"), ("/dev/null", "a device"))
    ]


# --- lines of an answer


def wrapped(text: str, width: int, cuts: list[int] | None = None) -> str:
    wrapper, shown = screen.Wrapper(width), ""
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts or [])})
    for begin, end in itertools.pairwise(places):
        shown += wrapper.push(text[begin:end])
    return shown + wrapper.finish()


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("the quick brown fox", 10, ["the quick ", "brown fox"]),
        ("a  b", 10, ["a  b"]),
        ("ends\n\nhere", 10, ["ends", "", "here"]),
        ("x incomprehensibilities y", 10, ["x ", "incomprehe", "nsibilitie", "s y"]),
        ("汉字汉字汉字", 5, ["汉字", "汉字", "汉字"]),
        ("- one two three", 8, ["- one ", "two ", "three"]),
        ("```\na line of code stays\n```\nand text does not", 8,
         ["```", "a line of code stays", "```", "and text", "does not"]),
    ],
)  # fmt: skip
def test_lines_are_broken_between_words(text, width, lines):
    assert wrapped(text, width).split("\n") == lines


@given(st.text("ab c\n`汉é"), st.integers(1, 12), st.lists(st.integers(0, 100)))
def test_however_an_answer_is_cut_its_lines_are_the_same_and_its_letters_stay(text, width, cuts):
    assert wrapped(text, width, cuts) == wrapped(text, width)
    assert "".join(wrapped(text, width).split()) == "".join(text.split())
    if "`" not in text:
        assert all(
            sum(2 if c == "汉" else 1 for c in line) <= max(width, 2) for line in wrapped(text, width).split("\n")
        )


def test_a_narrow_terminal_breaks_an_answer_between_words(typist, tmp_path):
    person = typist("--max-new-tokens", 60, columns=12)
    person.until(READY)
    shown = person.ask("hello").partition("\x1b[?2004l")[2].partition("\x1b[2m[")[0]
    assert shown.count("\r\n") > 1
