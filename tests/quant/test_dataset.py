"""Calibration files of every accepted form."""

from __future__ import annotations

import json

import pytest

from eightfold.errors import ConfigError, InputError
from eightfold.quant.dataset import default_rows, read_rows, read_token_ids, tokenize, truncate
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_tokenizer


@pytest.mark.parametrize("key", ["inputs_pretokenized", "text", "prompt"])
def test_text_keys(tmp_path, key):
    (tmp_path / "c.jsonl").write_text(json.dumps({"id": 7, key: "some words"}) + "\n")
    assert read_rows(tmp_path / "c.jsonl") == ["some words"]


def test_plain_lines_json_strings_and_blank_lines(tmp_path):
    (tmp_path / "c.txt").write_text('first line\n\n  \n"second\\nline"\r\nthird: {x}\n')
    assert read_rows(tmp_path / "c.txt") == ["first line", "second\nline", "third: {x}"]


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


def test_messages_work_without_a_template(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer = Tokenizer(tmp_path)
    (ids,) = tokenize([[{"role": "user", "content": "hi"}]], tokenizer)
    assert tokenizer.decode(ids) == "user: hi"


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
