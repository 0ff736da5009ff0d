"""Calibration files of every accepted form."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import eightfold.files
from eightfold.errors import ConfigError, InputError
from eightfold.quant import dataset
from eightfold.quant.dataset import default_rows, plain_text, read_rows, read_token_ids, tokenize, truncate
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_tokenizer


@pytest.mark.parametrize("key", ["inputs_pretokenized", "text", "prompt"])
def test_text_keys(tmp_path, key):
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": 7, key: "some words"}) + "\n")
    assert read_rows(tmp_path / "c.jsonl") == ["some words"]


TEXTS = ["alpha beta", "gamma"]
CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "rows",
    [
        TEXTS,
        [TEXTS],
        [[text] for text in TEXTS],
        [{"text": text, "id": 7} for text in TEXTS],
        [{"prompt": text, "ans": "left out"} for text in TEXTS],
        [{"inputs_pretokenized": text} for text in TEXTS],
        {"text": TEXTS},
        ["alpha beta", {"instruction": "gamma", "input": "", "output": None}],
        ["alpha beta", {"prompt": ["gamma"]}],
    ],
)
def test_json_as_a_whole_whatever_the_file_is_called(tmp_path, rows, indent):
    for name in ("c.json", "c.jsonl", "c.txt", "c"):
        (tmp_path / name).write_text(json.dumps(rows, indent=indent))
        assert read_rows(tmp_path / name) == TEXTS
        assert read_rows(tmp_path / name, 1) == TEXTS[:1]


@pytest.mark.parametrize(
    "line", [str, lambda text: [text], lambda text: {"text": text}, lambda text: {"prompt": [text]}]
)
def test_lines_of_json(tmp_path, line):
    (tmp_path / "c.txt").write_text("\n\n".join(json.dumps(line(text)) for text in TEXTS) + "\r\n \r\n")
    assert read_rows(tmp_path / "c.txt") == TEXTS


@pytest.mark.parametrize(
    "row", [{"messages": CHAT}, {"conversations": SHARED}, {"conversations": CHAT}, CHAT, SHARED, {"prompt": CHAT}]
)
def test_chats(tmp_path, row):
    for content in (row, [row], [row, "more"]):
        (tmp_path / "c.json").write_text(json.dumps(content))
        assert read_rows(tmp_path / "c.json")[0] == CHAT


def test_sharegpts_names_of_those_who_speak(tmp_path):
    names = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool", "x": "x"}
    (tmp_path / "c.json").write_text(json.dumps([[{"from": name, "value": "a"} for name in names]]))
    (found,) = read_rows(tmp_path / "c.json")
    assert isinstance(found, list)
    assert [message["role"] for message in found] == list(names.values())


def test_parts_of_text_and_a_system_prompt_beside_the_chat(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"system": "be kind", "conversations": [{"from": "human", "value": parts}]}
    (tmp_path / "c.json").write_text(json.dumps(row))
    (found,) = read_rows(tmp_path / "c.json")
    assert found == [{"role": "system", "content": "be kind"}, {"role": "user", "content": parts}]
    assert plain_text(found) == "system: be kind\nuser: a\nb"


def test_an_instruction_stands_above_its_input_and_output(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"instruction": "add", "input": "1 1", "output": "2"}))
    assert read_rows(tmp_path / "c.jsonl") == ["add\n1 1\n2"]


def test_plain_lines(tmp_path):
    (tmp_path / "c.txt").write_text('first line\n\n  \n"second," she said\r\nthird: {x}\n[INST] four [/INST]\n{x}\n')
    expected = ["first line", '"second," she said', "third: {x}", "[INST] four [/INST]", "{x}"]
    assert read_rows(tmp_path / "c.txt") == expected


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(tmp_path, encoding):
    (tmp_path / "c.txt").write_text("grün\nблау", encoding=encoding)
    assert read_rows(tmp_path / "c.txt") == ["grün", "блау"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\nplain', r"line 2 .*got plain text, expected JSON, as in line 1"),
        ("plain\n42\n", r"line 1 .*got plain text, expected JSON, as in line 2"),
        ('{"text": "a"}\n{"text": "b"', r"line 2 .*got no JSON"),
        ('plain\n{"text": "b"', r"line 2 .*got no JSON"),
        ('[\n "a",\n "b"\n', r"line [34] .*got no JSON \(Expecting"),
        ("[{'text': 'a'}]", r"line 1 .*got no JSON"),
        ('[["a"]\n', r"got no JSON"),
        ('["a", {"id": 1, "label": "x"}]', r"row 2 .*got an object with id, label, expected a text, or an object with"),
        ("42", r"row 1 .*got 42, expected a text"),
        ("[[1, 2], [3]]", r"row 1 .*got numbers, .*token ids as `calib_ids`"),
        ('{"input_ids": [1]}', r"row 1 .*got an object with input_ids.*token ids as `calib_ids`"),
        ('["a", " "]', r"row 2 .*got an empty text, expected some words\. Remove it"),
        ('{"text": ""}', r"row 1 .*got an empty text"),
        ('["a", []]', r"row 2 .*got \[\]"),
        ("[" * 20 + '"a"' + "]" * 20, r"row 1 .*got lists nested more than 8 deep"),
        ("[" * 100_000, r"got no JSON|nested too deep"),
        (
            '[{"messages": [{"role": "user"}]}]',
            r"row 1 in .*: messages\[0\]\.content: got null, expected a text$",
        ),
        (
            '{"messages": [{"role": 3, "content": "a"}]}',
            r"row 1 .*: messages\[0\]\.role: got 3, expected system, user, assistant or tool$",
        ),
        (
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            r"row 1 .*: messages\[0\]\.content\[0\]: this model reads text only, not image_url$",
        ),
        ('{"messages": []}', r"row 1 .*got an object with messages"),
        ("[]", r"calibration file in .*got no rows"),
        (" \n", r"calibration file in .*got no rows"),
        ("a\0b", r"got a NUL character at 1, expected UTF-8 text"),
        (b"\xff\xff", r"got byte 0 that is not UTF-8"),
        ("a\nb".encode("utf-16-le"), r"got a NUL character at 1"),
        (b"\x1f\x8b\x08\x00", r"got a gzip file, expected text\. Unpack or convert it"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, content, message):
    (tmp_path / "c.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        read_rows(tmp_path / "c.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(tmp_path))


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (tmp_path, "got a directory, expected a file with text"),
        (tmp_path / "pipe", "got a FIFO"),
        (Path("/dev/zero"), "got a device"),
        (tmp_path / "absent", "No such file"),
    ):
        with pytest.raises(InputError, match=message):
            read_rows(path)
    (tmp_path / "c.csv").write_text("id,text\n1,a\n")
    with pytest.raises(InputError, match="got a table, expected JSON, or one text a line"):
        read_rows(tmp_path / "c.csv")


@pytest.mark.parametrize("content", ["a\n" * 30, json.dumps(["a"] * 30), json.dumps([["a"] * 30]), '["a"]\n' * 30])
def test_more_rows_than_anybody_calibrates_on(tmp_path, monkeypatch, content):
    monkeypatch.setattr(dataset, "MAX_ROWS", 20)
    (tmp_path / "c.txt").write_text(content)
    assert read_rows(tmp_path / "c.txt", 3) == ["a"] * 3
    for limit in (None, 25):
        with pytest.raises(InputError, match="got more than 20 rows, expected fewer"):
            read_rows(tmp_path / "c.txt", limit)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" + "[]," * 30 + "[]]", "more than 20 values"),
        ('{"a":' * 30, "more than 20 values"),
        ('{"text": "a", "text": "b"}', 'the key "text" twice'),
    ],
)
def test_json_that_is_refused_is_no_plain_text(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(eightfold.files, "MAX_MARKS", 20)
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError, match=f"got no JSON .*{message}"):
        read_rows(tmp_path / "c.json")


def test_of_a_large_file_the_first_rows_can_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "MAX_BYTES", 1 << 20)
    (tmp_path / "c.txt").write_text("some words\n" * 200_000)
    assert read_rows(tmp_path / "c.txt", 3) == ["some words"] * 3
    with pytest.raises(InputError, match="got more than 1 MiB, expected less"):
        read_rows(tmp_path / "c.txt")
    (tmp_path / "c.txt").write_text("w" * 2_000_000)
    with pytest.raises(InputError, match="got a row or JSON of more than 1 MiB, expected less, or one row a line"):
        read_rows(tmp_path / "c.txt", 3)


def test_unicode_line_separators_do_not_cut_a_row(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert read_rows(tmp_path / "c.jsonl") == ["a\u2028b\x85c"]


def test_limit_takes_the_first_rows(tmp_path):
    (tmp_path / "c.txt").write_text("a\nb\nc\n")
    assert read_rows(tmp_path / "c.txt", 2) == ["a", "b"]
    with pytest.raises(ConfigError, match="limit: got 0, expected at least 1"):
        read_rows(tmp_path / "c.txt", 0)


def test_messages_go_through_the_chat_template(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}))
    (ids,) = tokenize(read_rows(tmp_path / "c.jsonl"), tokenizer)
    assert ids == tokenizer.encode("<|user|>hi</s><|assistant|>yo</s>", special_tokens=False)


@pytest.mark.parametrize("template", [None, b"{% if %}", b"\xff"])
def test_messages_work_without_a_readable_template_and_a_note_says_so(tmp_path, template):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    if template is not None:
        (tmp_path / "chat_template.jinja").write_bytes(template)
    tokenizer, notes = Tokenizer(tmp_path), list[str]()
    _, ids, _ = tokenize(["text", [{"role": "user", "content": "hi"}], CHAT], tokenizer, notes.append)
    assert tokenizer.decode(ids) == "user: hi"
    (note,) = notes
    assert note.startswith("calibration row 2 and 1 more have messages, and ")
    assert note.endswith("; they become lines such as `user: Hello`.")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["a", "\ud800"], "calibration row 2: text: got character 0 that is not Unicode"),
        (
            ["a", [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]],
            "calibration row 2: messages: got no",
        ),
    ],
)
def test_rows_that_the_tokenizer_refuses_are_named(tmp_path, rows, message):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    with pytest.raises(InputError, match=message):
        tokenize(rows, Tokenizer(tmp_path))


def test_token_ids_as_json_as_a_whole(tmp_path):
    for content, expected in (([[1, 2], [3]], [[1, 2], [3]]), ([{"input_ids": [4]}], [[4]]), ([1, 2], [[1, 2]])):
        (tmp_path / "ids.json").write_text(json.dumps(content, indent=1))
        assert read_token_ids(tmp_path / "ids.json") == expected


def test_token_ids_as_lists_and_objects(tmp_path):
    (tmp_path / "ids.jsonl").write_text('[1, 2, 3]\n{"input_ids": [4]}\n')
    assert read_token_ids(tmp_path / "ids.jsonl") == [[1, 2, 3], [4]]


@pytest.mark.parametrize("line", ["[]", "[1.5]", "[true]", '{"ids": [1]}', "5"])
def test_lines_that_are_no_token_ids_are_named(tmp_path, line):
    (tmp_path / "ids.jsonl").write_text(f"[1]\n{line}\n")
    with pytest.raises(InputError, match=r"line 2 in .*ids\.jsonl: got .*, expected a JSON list of token ids"):
        read_token_ids(tmp_path / "ids.jsonl")


def test_truncate_counts_what_it_cuts():
    assert truncate([[1, 2, 3], [4]], 2) == ([[1, 2], [4]], 1)


def test_default_set_is_mixed_and_has_64_rows():
    rows = default_rows()
    assert len(rows) == 64
    chats = [row for row in rows if not isinstance(row, str)]
    chinese = [row for row in rows if isinstance(row, str) and sum("\u4e00" <= c <= "\u9fff" for c in row) > 50]
    assert len(chats) >= 8
    assert len(chinese) >= 8
    assert any("def " in row or "#include" in row for row in rows if isinstance(row, str))
    # A prefix, as --calib-limit takes it, is mixed too.
    assert any(not isinstance(row, str) for row in rows[:16])


def test_a_token_that_the_model_lacks_is_named_with_its_row_and_file(float_model, tmp_path):
    tokenizer = Tokenizer(float_model)
    assert len(tokenize(["a", "bz"], tokenizer, vocab_size=90)) == 2
    message = "calibration row 2 in f.jsonl: got token id 89, expected 0 to 79. The model's tokenizer has a token that"
    with pytest.raises(InputError, match=message):
        tokenize(["a", "bz"], tokenizer, where=Path("f.jsonl"), vocab_size=80)


def test_of_a_text_no_more_is_tokenized_than_a_sample_can_have(tmp_path, monkeypatch):
    write_tokenizer(tmp_path)
    tokenizer, text = Tokenizer(tmp_path), "some words " * 1000
    whole = tokenize([text], tokenizer, context=16)[0]
    monkeypatch.setattr(dataset, "_LEAST_CHARS", 100)
    for row in (text, [{"role": "user", "content": text}]):
        cut = tokenize([row], tokenizer, context=16)[0]
        assert 16 <= len(cut) < len(whole)
    assert tokenize([text], tokenizer, context=16)[0][:16] == whole[:16]
