"""Pieces of a stream: joined they are the text, and no character comes in halves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.tokenizer import StreamDecoder, Tokenizer
from tests.conftest import write_tokenizer
from tests.texts import TEXTS


def pieces_of(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    stream = StreamDecoder(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def sentencepiece_like(directory: Path) -> Tokenizer:
    """Llama 2's way: words begin with ▁, unknown characters are bytes, and the first space is dropped."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models, normalizers

    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁th"]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    merges = [("▁", "a")]
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(parts)
    directory.mkdir(exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


KINDS = ("byte level", "byte fallback")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    byte_level = tmp_path_factory.mktemp("level")
    write_tokenizer(byte_level)
    return {
        "byte level": Tokenizer(byte_level),
        "byte fallback": sentencepiece_like(tmp_path_factory.mktemp("fallback")),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_joined_are_the_text(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_of_any_text_joined_are_the_text(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 262), max_size=20))
def test_pieces_of_any_token_ids_joined_are_their_text(kinds, ids):
    # Also of bytes that are no UTF-8, of special tokens between them, and of ids without a token.
    tokenizer = kinds["byte level"]
    assert "".join(pieces_of(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_character_of_several_tokens_comes_whole_with_its_last_one(kinds):
    tokenizer = kinds["byte level"]
    ids = tokenizer.encode("a🙂b")
    assert len(ids) == 6
    assert pieces_of(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_words_keep_the_space_before_them(kinds):
    tokenizer = kinds["byte fallback"]
    ids = tokenizer.encode("x a é a")
    assert "".join(pieces_of(tokenizer, ids)) == "x a é a"
    assert pieces_of(tokenizer, tokenizer.encode("a a a")) == ["a", " a", " a", ""]


def test_an_unfinished_character_comes_at_the_end_as_it_is(kinds):
    tokenizer = kinds["byte level"]
    ids = tokenizer.encode("a🙂")[:-1]
    pieces = pieces_of(tokenizer, ids)
    assert pieces[:-1] == ["a", "", "", ""]
    assert pieces[-1] == tokenizer.decode(ids)[1:] != ""


def test_a_stream_that_ends_well_has_nothing_left(kinds):
    for tokenizer in kinds.values():
        assert pieces_of(tokenizer, tokenizer.encode("abc"))[-1] == ""
        assert pieces_of(tokenizer, []) == [""]


def test_special_tokens_are_silent(kinds):
    tokenizer = kinds["byte level"]
    (a,) = tokenizer.encode("a")
    assert pieces_of(tokenizer, [256, a, 257, a, 257]) == ["", "a", "", "a", "", ""]


@pytest.mark.golden
def test_pieces_of_a_real_vocabulary_joined_are_the_text(smol):
    tokenizer = Tokenizer(smol / "smol-bf16")
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        pieces = pieces_of(tokenizer, ids)
        assert "".join(pieces) == tokenizer.decode(ids)
        if name != "special":
            assert "".join(pieces) == text
