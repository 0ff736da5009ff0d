"""Which tokens may spell a form's text: never those that are no text, whatever the form says."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from eightfold.engine.form_tokens import FormTokens, Vocabulary, _without_added
from eightfold.engine.outputs import Detokenizer
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.engine.structured import Grammar, GrammarCompiler, fill_masks
from eightfold.errors import InputError
from eightfold.tokenizer import Tokenizer

SPECIAL = ("<s>", "</s>", "<|im_end|>", "[INST]", "<ende>")
ADDED = ("<tool_call>", "</think>", "PLAIN", "éé")
MERGES = [("a", "b"), ("t", "h"), ("th", "e"), ("<", "/"), ("Ġ", "a"), ("Ġ", "the"), ("e", "Ìģ"), ("Ì", "ģ")]


def byte_level(*, inside: bool, normalizer: Any = None) -> FastTokenizer:
    """Qwen's way, with added tokens behind the vocabulary; `inside` it as SmolLM has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*(SPECIAL if inside else ()), *alphabet, *("".join(pair) for pair in MERGES)]
    vocab = {word: at for at, word in enumerate(words)}
    merges = [pair for pair in MERGES if all(part in vocab for part in pair)]
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=merges))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=inside)
    fast.decoder = decoders.ByteLevel()
    fast.normalizer = normalizer
    return fast


def sentencepiece(metaspace: bool) -> FastTokenizer:
    """Llama 2's way: bytes for what has no token, and a space in front; `metaspace` as newer files say it."""
    words = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abehnst<>/", "▁a", "th", "the", "▁the"]
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the")]
    vocab = {word: at for at, word in enumerate(words)}
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<s>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    fast.decoder = decoders.Sequence(parts)
    return fast


KINDS: dict[str, Callable[[], FastTokenizer]] = {
    "byte level": lambda: byte_level(inside=False),
    "added tokens in the vocabulary": lambda: byte_level(inside=True),
    "a normalizer that rewrites": lambda: byte_level(inside=False, normalizer=normalizers.NFC()),
    "lower case": lambda: byte_level(inside=False, normalizer=normalizers.Lowercase()),
    "byte fallback": lambda: sentencepiece(metaspace=False),
    "metaspace": lambda: sentencepiece(metaspace=True),
}


def save(directory: Path, fast: FastTokenizer, blanks: bool = True) -> Tokenizer:
    fast.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    fast.add_tokens([AddedToken(name, normalized=False) for name in ADDED])
    if blanks:
        fast.add_tokens([AddedToken("    ", normalized=False)])
    fast.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return save(tmp_path_factory.mktemp("kind"), KINDS[request.param]())


def id_of(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer._fast.token_to_id(name)
    assert found is not None
    return int(found)


@pytest.fixture(scope="module")
def vocab(tokenizer: Tokenizer) -> int:
    return tokenizer._fast.get_vocab_size() + 7  # of the model, which has ids without tokens


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer, vocab: int) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, vocab, frozenset({id_of(tokenizer, "</s>"), id_of(tokenizer, "<|im_end|>")}))


def allowed(grammar: Grammar, vocab: int) -> list[int]:
    bits = fill_masks([grammar], vocab)[0].view(np.uint8)
    return list(map(int, np.flatnonzero(np.unpackbits(bits, bitorder="little")[:vocab])))


def written(grammar: Grammar, vocab: int, seed: int) -> list[int]:
    """Return the tokens that chance chooses of those that may come next."""
    rng, found = random.Random(seed), list[int]()
    while not grammar.is_finished:
        found.append(rng.choice(allowed(grammar, vocab)))
        assert grammar.accept(found[-1]), grammar.failure
    return found


def text_of(tokenizer: Tokenizer, ids: list[int], form: StructuredOutput) -> str:
    text = Detokenizer(tokenizer, SamplingParams(structured=form))
    text.push(ids)
    text.finish()
    return text.text


TEXTS = [
    *(f"a {name} b" for name in (*SPECIAL, *ADDED)),
    *SPECIAL,
    *ADDED,
    "</s></s>",
    "the</s>the <|im_end|",
    " the a",
    "    x",
    "\\n\\t",
    "e\u0301 A\u030a \u212b",  # a normalizer would write these in other characters
    "ABC Éé",
    "🙂<0x41>",
    "\u2028\x7f\x00",
]


@pytest.mark.parametrize("text", TEXTS)
def test_the_exact_text_is_spelled_by_ordinary_tokens(tokenizer, compiler, vocab, text):
    no_text = {id_of(tokenizer, name) for name in (*SPECIAL, *ADDED)}
    pattern = "".join(f"\\x{{{ord(each):x}}}" for each in text)
    for form, expected in (
        (StructuredOutput(choices=(text, "and another one")), {text, "and another one"}),
        (StructuredOutput(choices=(text,)), {text}),
        (StructuredOutput(regex=pattern), {text}),
        (StructuredOutput(json_schema=json.dumps({"const": text})), None),
    ):
        ids = written(compiler.compile(form), vocab, seed=len(text))
        found = text_of(tokenizer, ids, form)
        assert (found in expected) if expected else (json.loads(found) == text), form
        assert not no_text.intersection(ids)


def test_free_text_in_a_form_is_spelled_by_ordinary_tokens_too(tokenizer, compiler, vocab):
    no_text = {id_of(tokenizer, name) for name in (*SPECIAL, *ADDED)}
    grammar = compiler.compile(StructuredOutput(regex="(?s).{4,}"))
    ends = {id_of(tokenizer, "</s>"), id_of(tokenizer, "<|im_end|>")}
    for token in tokenizer.encode("a</t", special_tokens=False):
        assert not no_text.intersection(allowed(grammar, vocab)) - ends
        grammar.accept(token)
    assert ends == no_text.intersection(allowed(grammar, vocab))
    assert id_of(tokenizer, "    ") in allowed(grammar, vocab)


def test_every_token_stands_for_what_it_is_decoded_to(tokenizer, vocab):
    """Where that is text at all: a part of a character is none."""
    ends = [id_of(tokenizer, "</s>")]
    tokens = FormTokens(Vocabulary(tokenizer.content.decode(), vocab, ends)).tokens
    context = tokenizer.encode("b", special_tokens=False)
    before, compared = tokenizer.decode(context), 0
    for token, content in enumerate(tokens):
        if content[:1] != b"\xff" and content and content.isascii():
            assert tokenizer.decode([*context, token], keep_special=True) == before + content.decode()
            compared += 1
    assert compared > 120
    assert {tokens[id_of(tokenizer, name)] for name in (*SPECIAL, *ADDED)} == {
        b"\xff" + name.encode() for name in (*SPECIAL, *ADDED)
    }
    assert tokens[-7:] == [b""] * 7


def test_what_leaves_no_choice_is_cut_as_the_model_knows_it(tmp_path):
    tokenizer = save(tmp_path, byte_level(inside=False))
    vocab = tokenizer._fast.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, vocab, frozenset({id_of(tokenizer, "</s>")}))
    ids = written(compiler.compile(StructuredOutput(choices=("the a</think> the",))), vocab, 0)
    assert [tokenizer.piece(token) for token in ids] == ["the", "Ġa", "</", "th", *"ink>", "Ġthe"]


def test_a_long_text_is_cut_like_a_short_one(tmp_path, monkeypatch):
    """Only its beginning is looked at for each token, or every token of 20,000 would cost as much as all of them."""
    tokenizer = save(tmp_path, byte_level(inside=False))
    vocab = tokenizer._fast.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, vocab, frozenset({id_of(tokenizer, "</s>")}))
    text = "the ab</think> the a" * 400
    sizes: list[int] = []
    plain = compiler._tokens._plain
    noted = mock.Mock(encode=lambda text, **how: sizes.append(len(text)) or plain.encode(text, **how))
    monkeypatch.setattr(compiler._tokens, "_plain", noted)
    ids = written(compiler.compile(StructuredOutput(choices=(text,))), vocab, 0)
    assert ids == FastTokenizer.from_str(json.dumps(_without_added(json.loads(tokenizer.content)))).encode(text).ids
    assert max(sizes) == 1024


def test_ctrl_c_while_llguidance_asks_for_tokens_is_not_a_fault_of_the_form(tmp_path, monkeypatch):
    tokenizer = save(tmp_path, byte_level(inside=False))
    vocab = tokenizer._fast.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, vocab, frozenset({id_of(tokenizer, "</s>")}))
    grammar = compiler.compile(StructuredOutput(regex="[ax]the end"))
    grammar.accept(id_of(tokenizer, "x"))
    cut = FormTokens._cut
    stops = iter([KeyboardInterrupt, None])
    monkeypatch.setattr(FormTokens, "_cut", lambda self, text: interrupted(next(stops, None)) or cut(self, text))
    with pytest.raises(KeyboardInterrupt):
        allowed(grammar, vocab)
    assert allowed(grammar, vocab) == [id_of(tokenizer, "the")]
    assert grammar.failure is None
    broken = compiler.compile(StructuredOutput(regex="[ax]the end"))
    broken.accept(id_of(tokenizer, "x"))
    monkeypatch.setattr(FormTokens, "_cut", lambda self, text: interrupted(RuntimeError))
    allowed(broken, vocab)
    assert broken.failure is not None


def interrupted(stop: type[BaseException] | None) -> None:
    if stop is not None:
        raise stop


def test_a_stop_token_is_no_text_even_if_it_is_an_ordinary_one(tmp_path):
    tokenizer = save(tmp_path, byte_level(inside=False))
    vocab, stop = tokenizer._fast.get_vocab_size(), id_of(tokenizer, "the")
    compiler = GrammarCompiler(tokenizer, vocab, frozenset({stop}))
    grammar = compiler.compile(StructuredOutput(regex="(the|x){2,3}"))
    ids = written(grammar, vocab, 4)
    assert stop not in ids[:-1] and len(ids) > 4


def test_a_grammar_may_name_what_is_no_text(tmp_path):
    tokenizer = save(tmp_path, byte_level(inside=True))
    vocab = tokenizer._fast.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, vocab, frozenset({id_of(tokenizer, "</s>")}))
    grammar = compiler.compile(StructuredOutput(grammar='start: "a" <tool_call> "b"'))
    ids = written(grammar, vocab, 1)
    assert [tokenizer.piece(token) for token in ids] == ["a", "<tool_call>", "b"]


def test_without_stop_tokens_a_form_ends_all_the_same(tmp_path):
    tokenizer = save(tmp_path, byte_level(inside=False))
    vocab = tokenizer._fast.get_vocab_size()
    compiler = GrammarCompiler(tokenizer, vocab, frozenset())
    form = StructuredOutput(choices=("a", "ab"))
    for seed in range(6):
        assert text_of(tokenizer, written(compiler.compile(form), vocab, seed), form) in ("a", "ab")


def test_a_vocabulary_smaller_than_the_tokenizer(tmp_path):
    tokenizer = save(tmp_path, byte_level(inside=False))
    compiler = GrammarCompiler(tokenizer, 256, frozenset({id_of(tokenizer, "</s>"), 255}))
    ids = written(compiler.compile(StructuredOutput(choices=("a the",))), 256, 1)
    assert [tokenizer.piece(token) for token in ids] == ["a", "Ġ", *"the"]


def test_a_text_that_no_token_has_a_part_of(tmp_path):
    """Without byte fallback some characters cannot be spelled: that is an error, at once or when they come."""
    vocab = {word: at for at, word in enumerate(["</s>", "▁", "a", "b", "▁a"])}
    fast = FastTokenizer(models.BPE(vocab, [("▁", "a")], unk_token="</s>"))
    fast.decoder = decoders.Metaspace()
    fast.save(str(tmp_path / "tokenizer.json"))
    compiler = GrammarCompiler(Tokenizer(tmp_path), 5, frozenset({0}))
    with pytest.raises(InputError, match=r"^structured choices: got a form in which no token can come next, expected"):
        compiler.compile(StructuredOutput(choices=("é",)))
    grammar = compiler.compile(StructuredOutput(choices=("b é",)))
    while grammar.failure is None:
        for token in allowed(grammar, 5)[:1]:
            grammar.accept(token)
        assert not grammar.is_finished
    assert grammar.failure.startswith("structured choices: got a form in which no token can come next, ")


def test_a_decoder_that_joins_words_is_refused(tmp_path):
    fast = FastTokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    fast.decoder = decoders.WordPiece()
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="got a decoder of WordPiece, expected ByteLevel or ByteFallback"):
        GrammarCompiler(Tokenizer(tmp_path), 2, frozenset({1}))
