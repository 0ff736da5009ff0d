"""Text from tokens as they come: whole characters, stop strings wherever tokens are cut, and a bounded cost."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eightfold.engine.outputs import Detokenizer
from eightfold.engine.sampling_params import SamplingParams
from eightfold.tokenizer import MAX_WAITING, Tokenizer
from tests.conftest import write_tokenizer
from tests.texts import TEXTS

KINDS = ("byte level", "byte fallback")
PIECES = ("a", "b", "ab", "ba", "aab", "bab", "abab", "aabbab", "é", "c🙂", "🙂ab")


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


def pieces_tokenizer(directory: Path) -> Tokenizer:
    """A vocabulary of whole pieces: any sequence of ids is their texts one after the other."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models

    fast = FastTokenizer(models.WordLevel({piece: i for i, piece in enumerate(PIECES)}, unk_token="a"))
    fast.decoder = decoders.Fuse()
    fast.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    byte_level = tmp_path_factory.mktemp("level")
    write_tokenizer(byte_level)
    return {
        "byte level": Tokenizer(byte_level),
        "byte fallback": sentencepiece_like(tmp_path_factory.mktemp("fallback")),
        "pieces": pieces_tokenizer(tmp_path_factory.mktemp("pieces")),
    }


def detokenizer(tokenizer: Tokenizer, **fields: Any) -> Detokenizer:
    return Detokenizer(tokenizer, SamplingParams(max_tokens=None, **fields))


def pieces_of(stream: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(stream.push([token]) for token in ids), stream.finish()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_pieces_joined_are_the_text(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    stream = detokenizer(tokenizer)
    pieces = pieces_of(stream, ids)
    assert "".join(pieces) == stream.text == tokenizer.decode(ids)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert (stream.token_count, stream.stop_reason) == (len(ids), None)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_of_any_text_joined_are_the_text(kinds, kind, text):
    tokenizer = kinds[kind]
    ids = tokenizer.encode(text)
    assert "".join(pieces_of(detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 262), max_size=40))
def test_pieces_of_any_token_ids_joined_are_their_text(kinds, ids):
    # Also of bytes that are no UTF-8, of special tokens between them, and of ids without a token.
    tokenizer = kinds["byte level"]
    assert "".join(pieces_of(detokenizer(tokenizer), ids)) == tokenizer.decode(ids)


def test_characters_that_overlap_in_tokens_do_not_wait_for_each_other(tmp_path):
    """Each token ends one character and begins the next: all but the last can be shown."""
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import decoders, models

    symbol_of = byte_level_symbols()
    spelled = ["".join(symbol_of[byte] for byte in part) for part in (b"\xe4\xb8", b"\xad\xe4\xb8", b"\xad")]
    fast = FastTokenizer(models.WordLevel({symbols: i for i, symbols in enumerate(spelled)}, unk_token=spelled[0]))
    fast.decoder = decoders.ByteLevel()
    fast.save(str(tmp_path / "tokenizer.json"))
    stream = detokenizer(Tokenizer(tmp_path))
    assert pieces_of(stream, [0, *[1] * 300, 2]) == ["", *["中"] * 301, ""]


def byte_level_symbols() -> dict[int, str]:
    """Return the symbols of bytes in byte-level vocabularies: printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def test_a_character_of_several_tokens_comes_whole_with_its_last_one(kinds):
    tokenizer = kinds["byte level"]
    assert pieces_of(detokenizer(tokenizer), tokenizer.encode("a🙂b")) == ["a", "", "", "", "🙂", "b", ""]


def test_words_keep_the_space_before_them(kinds):
    tokenizer = kinds["byte fallback"]
    assert pieces_of(detokenizer(tokenizer), tokenizer.encode("a a a")) == ["a", " a", " a", ""]
    space = tokenizer.encode("  a")  # of two spaces, which decoding alone would strip, one is the text's
    assert "".join(pieces_of(detokenizer(tokenizer), space)) == tokenizer.decode(space) == "  a"


def test_words_keep_their_space_behind_a_special_token(tmp_path):
    from tokenizers import AddedToken

    tokenizer = sentencepiece_like(tmp_path)
    end = tokenizer._fast.get_vocab_size()
    tokenizer._fast.add_special_tokens([AddedToken("</s>")])
    word = tokenizer.encode("a")
    assert tokenizer.decode([*word, end, *word]) == "a a"
    assert pieces_of(detokenizer(tokenizer), [*word, *[end] * 200, *word]) == ["a", *[""] * 200, " a", ""]


def test_an_unfinished_character_comes_at_the_end_as_it_is(kinds):
    tokenizer = kinds["byte level"]
    ids = tokenizer.encode("a🙂")[:-1]
    pieces = pieces_of(detokenizer(tokenizer), ids)
    assert pieces[:-1] == ["a", "", "", ""]
    assert pieces[-1] == tokenizer.decode(ids)[1:] != ""


def test_special_tokens_are_silent_or_not(kinds):
    tokenizer = kinds["byte level"]
    (a,) = tokenizer.encode("a")
    ids = [256, a, 257, a, 257]
    assert pieces_of(detokenizer(tokenizer), ids) == ["", "a", "", "a", "", ""]
    shown = detokenizer(tokenizer, skip_special_tokens=False)
    assert pieces_of(shown, ids) == ["<s>", "a", "</s>", "a", "</s>", ""]
    kept = detokenizer(tokenizer, kept_special_ids=[257])
    assert pieces_of(kept, ids) == ["", "a", "</s>", "a", "</s>", ""]
    assert tokenizer.decode(ids, keep_special=[257]) == "a</s>a</s>"
    stopped = detokenizer(tokenizer, skip_special_tokens=False, stop="</s>a")
    assert pieces_of(stopped, ids) == ["<s>", "a", "", "", "", ""]
    assert (stopped.text, stopped.token_count) == ("<s>a", 4)


class Watched:
    """A tokenizer that notes how many tokens it was asked to decode."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.calls, self.longest = tokenizer, 0, 0

    def decode(self, ids: Sequence[int], *, keep_special: bool = False) -> str:
        self.calls += 1
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids, keep_special=keep_special)


@pytest.mark.parametrize("kind", ["letters", "special tokens", "no UTF-8", "ids without a token"])
def test_a_token_costs_the_same_however_long_the_answer_is(kinds, kind):
    tokenizer = kinds["byte level"]
    invalid = next(i for i in range(256) if "\N{REPLACEMENT CHARACTER}" in tokenizer.decode([i]))
    token = {
        "letters": tokenizer.encode("a")[0],
        "special tokens": 256,
        "no UTF-8": invalid,
        "ids without a token": 300,
    }
    watched: Any = Watched(tokenizer)
    stream = Detokenizer(watched, SamplingParams(stop=["zz", "aaaab", "\N{REPLACEMENT CHARACTER}" * 9 + "b"]))  # type: ignore[arg-type]
    ids = [token[kind]] * 1000
    pieces = pieces_of(stream, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    # At most what waits, as much context, and the new one; decoded twice.
    assert watched.longest <= 2 * (MAX_WAITING + 1)
    assert watched.calls <= 2 * (len(ids) + 1)


def expected_stop(text: str, stops: Sequence[str], *, include: bool, blind: int = 0) -> tuple[str, str | None]:
    """Read a text character by character: the first stop string to be complete counts, the longest that is."""
    for end in range(blind + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


def could_begin(text: str, stops: Sequence[str]) -> int:
    """Return how many of the last characters some stop string begins with."""
    return max(length for stop in stops for length in range(len(stop)) if text.endswith(stop[:length]))


STOPS = st.lists(st.text("ab", min_size=1, max_size=6) | st.sampled_from(["é", "🙂a", "b🙂"]), min_size=1, max_size=4)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=20), stops=STOPS, include=st.booleans())
@example(ids=[0, 0, 0, 1], stops=["aab"], include=False)  # the beginning begins again inside itself
@example(ids=[6, 0], stops=["ababa", "bab"], include=False)  # one ends inside the other
@example(ids=[2], stops=["b", "ab"], include=True)  # two end together
def test_stop_strings_are_found_where_they_end(kinds, ids, stops, include):
    stops = list(dict.fromkeys(stops))
    stream = detokenizer(kinds["pieces"], stop=stops, include_stop_str_in_output=include)
    shown, whole = "", ""
    for count, token in enumerate(ids, 1):
        shown += stream.push([token])
        whole += PIECES[token]
        text, stop = expected_stop(whole, stops, include=include)
        assert (stream.stop_reason, stream.token_count) == (stop, count)
        if stop is not None:
            assert shown == stream.text == text
            assert stream.push(ids) == stream.finish() == ""
            break
        # Nothing is shown that may have to go, and nothing held back that may not.
        assert shown == stream.text == whole[: len(whole) - could_begin(whole, stops)]


@settings(max_examples=100, deadline=None)
@given(
    ids=st.lists(st.integers(0, len(PIECES) - 1), max_size=20),
    stops=STOPS,
    include=st.booleans(),
    cuts=st.sets(st.integers(0, 20)),
    least=st.integers(0, 6),
)
def test_tokens_may_come_in_any_portions(kinds, ids, stops, include, cuts, least):
    fields: dict[str, Any] = {"stop": stops, "include_stop_str_in_output": include, "min_tokens": least}
    one, many = detokenizer(kinds["pieces"], **fields), detokenizer(kinds["pieces"], **fields)
    singly = "".join(pieces_of(one, ids))
    edges = [0, *sorted(cut for cut in cuts if cut < len(ids)), len(ids)]
    portions = [ids[begin:end] for begin, end in pairwise(edges)]
    assert "".join(many.push(portion) for portion in portions) + many.finish() == singly
    assert (one.text, one.stop_reason, one.token_count) == (many.text, many.stop_reason, many.token_count)
    blind = len("".join(PIECES[token] for token in ids[:least]))
    text, stop = expected_stop(
        "".join(PIECES[token] for token in ids), list(dict.fromkeys(stops)), include=include, blind=blind
    )
    assert stop == one.stop_reason
    # What had been shown before min_tokens stays, even if it turns out to begin a stop string.
    assert singly == text or (stop is not None and not include and singly.startswith(text))


def test_min_tokens_keeps_no_text_back_for_nothing(kinds):
    stream = detokenizer(kinds["pieces"], stop="aa", min_tokens=2)
    assert [stream.push([0]), stream.push([0]), stream.push([1]), stream.push([0])] == ["", "a", "ab", ""]
    assert stream.push([0]) == ""
    assert (stream.text, stream.stop_reason, stream.token_count) == ("aab", "aa", 5)


@pytest.mark.parametrize("stop", ["🙂", "é🙂", "a🙂b", "🙂🙂"])
def test_stop_strings_of_characters_of_many_tokens(kinds, stop):
    for kind in KINDS:
        tokenizer = kinds[kind]
        ids = tokenizer.encode(f"x{stop}y")
        stream = detokenizer(tokenizer, stop=stop)
        assert "".join(pieces_of(stream, ids)) == "x"
        assert stream.stop_reason == stop
        assert stream.token_count == len(ids) - len(tokenizer.encode("ay")) + len(tokenizer.encode("a"))


def test_what_may_begin_a_stop_string_comes_at_the_end(kinds):
    tokenizer = kinds["byte level"]
    stream = detokenizer(tokenizer, stop=["abcd", "bcx"])
    assert pieces_of(stream, tokenizer.encode("zabc")) == ["z", "", "", "", "abc"]
    assert stream.stop_reason is None
    assert stream.finish() == ""


def test_an_unfinished_character_can_complete_a_stop_string(kinds):
    tokenizer = kinds["byte level"]
    half = tokenizer.encode("🙂")[:2]
    stream = detokenizer(tokenizer, stop="a" + tokenizer.decode(half))
    assert pieces_of(stream, [*tokenizer.encode("xa"), *half]) == ["x", "", "", "", ""]
    assert stream.stop_reason is not None
    assert stream.text == "x"


@pytest.mark.golden
def test_pieces_of_a_real_vocabulary_joined_are_the_text(smol):
    tokenizer = Tokenizer(smol / "smol-bf16")
    for text in TEXTS.values():
        ids = tokenizer.encode(text)
        assert "".join(pieces_of(detokenizer(tokenizer), ids)) == tokenizer.decode(ids)
    whole = "".join(TEXTS.values())
    ids = tokenizer.encode(whole)
    for stop in (whole[40:47], "机器学习的一", "👩‍👩‍👧‍👦", "\n\n\n", "o'clock"):
        text = expected_stop(tokenizer.decode(ids), [stop], include=False)[0]
        stream = detokenizer(tokenizer, stop=stop)
        assert "".join(pieces_of(stream, ids)) == text
        assert stream.stop_reason == stop
