"""A tokenizer that transformers 5 has saved, in terms that MindIE's transformers 4 reads too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eightfold.format.tokenizer_files import TokenizerFiles, write_for_both
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_tokenizer
from tests.texts import TEXTS


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A tokenizer with merges, in the older form."""
    write_tokenizer(tmp_path)
    change(tmp_path, "tokenizer.json", added_tokens=[])
    vocab = {**read(tmp_path, "tokenizer.json")["model"]["vocab"], "he": 300, "hel": 301, "<s>": 256, "</s>": 257}
    change(tmp_path, "tokenizer.json", model={"type": "BPE", "vocab": vocab, "merges": ["h e", "he l"]})
    (tmp_path / "chat_template.jinja").unlink()
    return tmp_path


def read(directory: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / name).read_text())
    return content


def change(directory: Path, name: str, **changes: Any) -> None:
    (directory / name).write_text(json.dumps({**read(directory, name), **changes}))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_what_both_read_stays_as_it_is_to_the_last_byte(directory):
    before = contents(directory)
    assert write_for_both(directory) is None
    assert contents(directory) == before


def test_what_transformers_5_writes_gets_the_words_of_4(directory):
    model = read(directory, "tokenizer.json")["model"]
    expected = [Tokenizer(directory).encode(text) for text in TEXTS.values()]
    change(directory, "tokenizer.json", model={**model, "merges": [["h", "e"], ["he", "l"]]})
    change(
        directory,
        "tokenizer_config.json",
        tokenizer_class="TokenizersBackend",
        backend="tokenizers",
        additional_special_tokens=["<a>"],
        extra_special_tokens=["<b>"],
    )
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    assert write_for_both(directory) is None
    settings = read(directory, "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["<a>", "<b>"]
    assert "extra_special_tokens" not in settings
    assert settings["chat_template"] == "{{ messages }}"
    assert read(directory, "tokenizer.json")["model"]["merges"] == ["h e", "he l"]
    assert [Tokenizer(directory).encode(text) for text in TEXTS.values()] == expected
    written = contents(directory)
    assert write_for_both(directory) is None
    assert contents(directory) == written


def test_templates_in_files_of_their_own_are_said_in_the_settings_too(directory):
    (directory / "chat_template.json").write_text('{"chat_template": "a"}')
    assert write_for_both(directory) is None
    assert read(directory, "tokenizer_config.json")["chat_template"] == "a"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("b")
    assert write_for_both(directory) is None
    expected = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    assert read(directory, "tokenizer_config.json")["chat_template"] == expected


BOS = {"SpecialToken": {"id": "<s>", "type_id": 0}}
EOS = {"SpecialToken": {"id": "</s>", "type_id": 0}}
TEXT = {"Sequence": {"id": "A", "type_id": 0}}
TOKENS = {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in (("<s>", 256), ("</s>", 257))}


@pytest.mark.parametrize("single", [[TEXT], [BOS, TEXT], [TEXT, EOS], [BOS, TEXT, EOS]])
@pytest.mark.parametrize("nested", [False, True])
def test_bos_and_eos_that_5_keeps_in_tokenizer_json_become_the_switches_of_4(directory, single, nested):
    template = {"type": "TemplateProcessing", "single": single, "pair": [TEXT], "special_tokens": TOKENS}
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    processor = {"type": "Sequence", "processors": [byte_level, template]} if nested else template
    change(directory, "tokenizer.json", post_processor=processor)
    change(directory, "tokenizer_config.json", tokenizer_class="LlamaTokenizer", backend="tokenizers")
    expected = Tokenizer(directory).encode("a")
    assert write_for_both(directory) is None
    settings = read(directory, "tokenizer_config.json")
    assert (settings["add_bos_token"], settings["add_eos_token"]) == (BOS in single, EOS in single)
    assert Tokenizer(directory).encode("a") == expected == [256] * (BOS in single) + [64] + [257] * (EOS in single)


@pytest.mark.parametrize(
    ("fast", "named"),
    [
        ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "ByteLevel"}]}}, "normalizer ByteLevel"),
        ({"pre_tokenizer": {"type": "FixedLength", "length": 5}}, "pre_tokenizer FixedLength"),
        (
            {
                "model": {"type": "BPE", "vocab": {"a b": 0, "c": 1, "a bc": 2}, "merges": [["a b", "c"]]},
                "added_tokens": [],
            },
            "['a b', 'c']",
        ),
    ],
)
def test_what_4_has_no_words_for_is_named_in_a_note(directory, fast, named):
    change(directory, "tokenizer.json", **fast)
    before = contents(directory)
    note = write_for_both(directory)
    assert note == f"the tokenizer has what MindIE's transformers 4.43 cannot read: {named}."
    assert contents(directory) == before


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff", b'{"model": 3, "model": 4}'])
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_is_left_as_it_is(directory, name, content):
    (directory / name).write_bytes(content)
    before = contents(directory)
    note = write_for_both(directory)
    assert note is not None
    assert note.startswith("the tokenizer is copied as it is, and loaders may refuse it: ")
    assert contents(directory) == before


@pytest.mark.parametrize(
    "fast",
    [{"model": 3}, {"model": {"merges": 5}}, {"model": {"merges": [[1, "a"]]}}, {"normalizer": [], "decoder": 3}],
)
def test_parts_that_make_no_sense_are_left_as_they_are(directory, fast):
    change(directory, "tokenizer.json", **fast)
    before = contents(directory)
    note = write_for_both(directory)
    assert note is not None
    assert "expected a tokenizers file" in note
    assert contents(directory) == before


@pytest.mark.parametrize("name", ["TokenizersBackend", "PythonBackend", "Qwen3_5Tokenizer", "FooTokenizerFast", "", 5])
def test_a_class_that_4_does_not_have_becomes_the_one_for_all_files(directory, name):
    change(directory, "tokenizer_config.json", tokenizer_class=name)
    assert write_for_both(directory) is None
    assert read(directory, "tokenizer_config.json")["tokenizer_class"] == ("PreTrainedTokenizerFast" if name else "")


@pytest.mark.parametrize("name", ["LlamaTokenizer", "Qwen2TokenizerFast", "GPT2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_class_that_4_has_stays(directory, name):
    change(directory, "tokenizer_config.json", tokenizer_class=name)
    assert write_for_both(directory) is None
    assert read(directory, "tokenizer_config.json")["tokenizer_class"] == name


def test_a_class_in_a_file_of_its_own_stays(directory):
    settings = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    change(directory, "tokenizer_config.json", **settings)
    assert write_for_both(directory) is None
    assert read(directory, "tokenizer_config.json")["tokenizer_class"] == "OwnTokenizer"


@pytest.mark.parametrize("merges", [[["a"]], [[1, 2]], [5], 5, ["a b", ["a", "b"]], [["a", "b"], {}]])
def test_merges_that_are_none_are_passed_over(merges):
    files = TokenizerFiles({"additional_special_tokens": 5, "extra_special_tokens": ["x"]}, {}, {})
    files.fast = {"model": {"merges": merges}, "normalizer": [3], "post_processor": {"single": 3}}
    files.close_gaps()
    assert files.fast["model"]["merges"] == merges
    assert files.settings == {"additional_special_tokens": ["x"]}


def test_a_directory_without_a_tokenizer(tmp_path):
    note = write_for_both(tmp_path)
    assert note == "the model has no tokenizer, and so OUT has none: MindIE and vllm-ascend need one."
