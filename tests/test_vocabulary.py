"""Tokenizers that are broken, malicious, or there in an older form only: each is refused in one line, or converted."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from eightfold import vocabulary
from eightfold.errors import CheckpointError, DependencyError
from eightfold.format.tokenizer_files import write_for_both
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_tokenizer
from tests.texts import TEXTS


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """The tiny tokenizer's directory."""
    write_tokenizer(tmp_path)
    return tmp_path


def change(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(directory: Path, capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(directory)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 700
    assert capfd.readouterr().err == ""  # where the library says that it panics
    return text


def added(content: str, id: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": id, "content": content, "special": True, **flags}


@pytest.mark.parametrize(
    ("content", "id", "expected"),
    [
        ("<far>", 5000, "got id 5000, expected 261, the next free one. Save the tokenizer again."),
        ("<far>", 2**31, "got id 2147483648, expected 261, the next free one. Save the tokenizer again."),
        ("<twice>", 5, "got id 5, expected 261, the next free one. Save the tokenizer again."),
        ("</s>", 261, "got id 261, expected 257, the next free one. Save the tokenizer again."),
        ("a],}", 300, "got id 300, expected 261, the next free one. Save the tokenizer again."),
    ],
)
def test_an_added_token_that_the_library_would_renumber_is_refused(directory, capfd, content, id, expected):
    tokens = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    change(directory, added_tokens=[*tokens, added(content, id)])
    where = directory / "tokenizer.json"
    assert refusal(directory, capfd) == f"added token {content!r} in {where}: {expected}"


def replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "grows": (
        {"normalizer": {"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 100)] * 6}},
        "normalizer in {}: got text that grows 1e+04 times, expected at most 1000 times",
    ),
    "grows when decoded": (
        {"decoder": {"type": "Sequence", "decoders": [replace({"Regex": ".+"}, "x" * 2000)]}},
        "decoder in {}: got text that grows 2e+03 times",
    ),
    "replaces nothing": (
        {"normalizer": replace({"String": ""}, "x")},
        "normalizer in {}: got a replacement of nothing",
    ),
    "nested": ({"pre_tokenizer": split("(a+)+$")}, "pattern of the pre_tokenizer in {}: got '(a+)+$', expected no rep"),
    "nested deeply": ({"pre_tokenizer": split(r"(?:x|(\p{L}[*]|b*)c){2,}")}, "pattern of the pre_tokenizer in {}: got"),
    "polynomial": ({"pre_tokenizer": split(r"a*a*a*a*a*a*(?=!\d)")}, "tokenizer in {}: got Onig: Regex search error"),
    "no expression": ({"pre_tokenizer": split("(")}, "tokenizer in {}: got Cannot instantiate"),
    "chunks of nothing": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "tokenizer in {}: got "),
    "no character": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}},
        "tokenizer in {}: got index out of bounds",
    ),
    "no special token": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {},
            }
        },
        "tokenizer in {}: got no entry found for key",
    ),
    "special id of no token": (
        {
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<x>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
                "special_tokens": {"<x>": {"id": "<x>", "ids": [77777], "tokens": ["<x>"]}},
            }
        },
        "post-processor in {}: got token id 77777, expected a token of the vocabulary",
    ),
    "prefix longer than its token": (
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1, "ab": 2},
                "merges": [["a", "b"]],
                "continuing_subword_prefix": "#" * 20,
            }
        },
        "tokenizer in {}: got range",
    ),
    "no unknown": (
        {"added_tokens": [], "model": {"type": "WordLevel", "unk_token": "nope", "vocab": {"b": 0}}},
        "tokenizer in {}: got WordLevel error",
    ),
}


@pytest.mark.parametrize(("changes", "expected"), BROKEN.values(), ids=BROKEN)
def test_what_panics_never_ends_or_fills_the_memory_is_refused(directory, capfd, changes, expected):
    change(directory, **changes)
    started = time.monotonic()
    assert refusal(directory, capfd).startswith(expected.format(directory / "tokenizer.json"))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b'{"added_tokens": [' + b"[" * 100_000, b"{}", b"\0" * 100])
def test_nesting_and_rubbish_are_refused(directory, capfd, content):
    (directory / "tokenizer.json").write_bytes(content)
    assert refusal(directory, capfd).startswith(f"tokenizer in {directory / 'tokenizer.json'}: got ")


def test_a_huge_file_is_refused_unread(directory, capfd):
    with (directory / "tokenizer.json").open("r+b") as file:
        file.truncate(100 << 20)
    expected = f"size in {directory / 'tokenizer.json'}: got 100 MiB, expected at most 64 MiB"
    assert refusal(directory, capfd) == expected


# Of models in use: Llama 3, Qwen 2, GPT-4o's, DeepSeek-V3, BLOOM.
SOUND = [
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    " ?[^(\\s|[.,!?…。，、।۔،])]+",
]


@pytest.mark.parametrize("regex", SOUND)
def test_patterns_in_use_are_taken(directory, regex):
    change(directory, pre_tokenizer=split(regex), normalizer=replace({"String": " "}, "▁"))
    Tokenizer(directory)


def test_dropout_is_for_training(directory):
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    vocab = {**model["vocab"], "he": 300, "hel": 301}
    change(directory, model={**model, "vocab": vocab, "merges": ["h e", "he l"], "dropout": 0.9}, added_tokens=[])
    assert {tuple(Tokenizer(directory).encode("hel")) for _ in range(20)} == {(301,)}


def test_what_others_write_to_stderr_meanwhile_is_not_lost(directory, capfd, monkeypatch):
    bounds = vocabulary._require_bounds

    def tell(*args: Any) -> None:
        print("a note of another thread", file=sys.__stderr__, flush=True)
        bounds(*args)

    monkeypatch.setattr(vocabulary, "_require_bounds", tell)
    Tokenizer(directory)
    assert capfd.readouterr().err == "a note of another thread\n"


def test_an_encoding_that_takes_too_long_is_given_up(tmp_path):
    with pytest.raises(CheckpointError, match=r"got more than 0 s for 3 characters, expected one that is ready"):
        vocabulary.within_time(lambda: time.sleep(5), tmp_path, 3, 0.05)


# --- older files


def bpe_files(directory: Path) -> None:
    model = json.loads((directory / "tokenizer.json").read_text())["model"]
    (directory / "vocab.json").write_text(json.dumps({**model["vocab"], "<|endoftext|>": 256, "he": 257}))
    (directory / "merges.txt").write_text("#version: 0.2\nh e\n")
    (directory / "tokenizer.json").unlink()
    (directory / "special_tokens_map.json").unlink()
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def test_gpt_2s_files_are_converted_and_saved(directory):
    pytest.importorskip("transformers")
    bpe_files(directory)
    tokenizer = Tokenizer(directory)
    ids = [tokenizer.encode(text) for text in TEXTS.values()]
    assert tokenizer.encode("he") == [257]
    note = write_for_both(directory)
    assert note == "transformers has made a tokenizer.json of the model's older files, with 258 tokens."
    assert [Tokenizer(directory).encode(text) for text in TEXTS.values()] == ids
    assert json.loads((directory / "tokenizer.json").read_text())["model"]["merges"] == ["h e"]


def test_a_conversion_that_takes_too_long_is_given_up(directory, monkeypatch):
    bpe_files(directory)
    monkeypatch.setattr(vocabulary, "_MOST_CONVERSION", 0.05)
    monkeypatch.setattr(vocabulary, "_converted", lambda older: time.sleep(5))
    with pytest.raises(CheckpointError, match=r"vocab.json: got more than 0 s to convert it, expected one that is"):
        Tokenizer(directory)


def lacks(package: str) -> bool:
    return importlib.util.find_spec(package) is None


@pytest.mark.parametrize(("name", "needed"), [("tokenizer.model", "sentencepiece"), ("qwen.tiktoken", "tiktoken")])
def test_what_is_missing_for_a_conversion_is_named(directory, capfd, name, needed):
    (directory / "tokenizer.json").unlink()
    (directory / name).write_bytes(b"no vocabulary \xff\n")
    with pytest.raises((DependencyError, CheckpointError)) as caught:
        Tokenizer(directory)
    assert capfd.readouterr().err == ""
    if lacks("transformers") or lacks(needed):
        assert str(caught.value).startswith(f"a tokenizer of {directory / name}: got no package ")
        assert str(caught.value).endswith("Install them: pip install 'eightfold[tokenizer]'")


def test_no_tokenizer_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"tokenizer\.json in .*got no such file.*Copy it from the float model"):
        Tokenizer(tmp_path)
