"""Answers of a given form: what random logits say under a grammar keeps to it, and bad forms are refused."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import pytest

from eightfold.engine import forms, structured
from eightfold.engine.forms import MAX_REASON, Trial, build
from eightfold.engine.outputs import Detokenizer
from eightfold.engine.sampler import Sampler, choose_all
from eightfold.engine.sampling_params import SamplingParams, StructuredOutput
from eightfold.engine.structured import KEPT, Grammar, GrammarCompiler, fill_masks, mask_words
from eightfold.errors import BusyError, DependencyError, InputError, UnsupportedError
from eightfold.machine import anonymous_bytes
from eightfold.tokenizer import Tokenizer
from tests.conftest import write_tokenizer
from tests.engine.models import choose
from tests.engine.test_detokenizer import sentencepiece_like
from tests.native.sample_oracle import unpacked

VOCAB, EOS = 320, 257  # of write_tokenizer; ids from 261 on have no token


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("level")
    write_tokenizer(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))


def write(
    tokenizer: Tokenizer, grammar: Grammar, vocab: int, stop: int, seed: int, most: int = 3000, **fields: Any
) -> tuple[str, str]:
    """Return the text that random logits choose under a grammar, and why it ended."""
    rng = np.random.default_rng(seed)
    params = SamplingParams(seed=seed, max_tokens=None, **fields)
    one = Sampler(params, [1], vocab, frozenset({stop}), 0, grammar)
    text = Detokenizer(tokenizer, params)
    for _ in range(most):
        token = choose(one, rng.normal(0, 2, vocab).astype(np.float32), 0).token_id
        if token == stop:
            text.finish()
            return text.text, "stop"
        text.push([token])
    return text.text, "length"


POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": -99, "maximum": 99}, "y": {"type": "number", "multipleOf": 1}},
    "required": ["x"],
    "additionalProperties": False,
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog", None, 5]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "at": {"$ref": "#/$defs/spot"},
    },
    "required": ["name", "kind", "tags", "at"],
    "additionalProperties": False,
    "$defs": {"spot": {"type": "string", "pattern": "^[0-9]{2}:[0-9]{2}$"}},
}


def is_point(value: Any) -> bool:
    return set(value) <= {"x", "y"} and isinstance(value["x"], int) and -99 <= value["x"] <= 99


def is_person(value: Any) -> bool:
    return (
        list(value) == ["name", "kind", "tags", "at"]
        and isinstance(value["name"], str)
        and len(value["name"]) <= 8
        and value["kind"] in ("cat", "dog", None, 5)
        and all(isinstance(tag, bool) for tag in value["tags"])
        and 1 <= len(value["tags"]) <= 3
        and re.fullmatch("[0-9]{2}:[0-9]{2}", value["at"]) is not None
    )


FORMS = {
    "a point": (StructuredOutput(json_schema=json.dumps(POINT)), lambda text: is_point(json.loads(text))),
    "a person": (StructuredOutput(json_schema=json.dumps(PERSON)), lambda text: is_person(json.loads(text))),
    "an expression": (
        StructuredOutput(regex=r"(\+\d{2} )?\d{3}-[a-fé]{2,4}"),
        lambda text: re.fullmatch(r"(\+\d{2} )?\d{3}-[a-fé]{2,4}", text) is not None,
    ),
    "a grammar": (
        StructuredOutput(grammar='start: sum\nsum: NUMBER ("+" NUMBER){1,4} "="\nNUMBER: /[1-9][0-9]{0,3}/'),
        lambda text: re.fullmatch(r"[1-9][0-9]{0,3}(\+[1-9][0-9]{0,3}){1,4}=", text) is not None,
    ),
    "choices": (
        StructuredOutput(choices=('say "no"', "yes", "yes, é\n🙂", "a\\b", "%json {}", "/x/")),
        lambda text: text in ('say "no"', "yes", "yes, é\n🙂", "a\\b", "%json {}", "/x/"),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_random_logits_keep_to_the_form(tokenizer, compiler, form):
    structured, holds = FORMS[form]
    for seed in range(12):
        text, end = write(tokenizer, compiler.compile(structured), VOCAB, EOS, seed)
        assert end == "stop"
        assert holds(text), text


def test_any_json_object(tokenizer, compiler):
    """Closing is made likely: random logits would nest for ever."""
    ends = {tokenizer.encode(character)[0]: 6.0 for character in '}]"'}
    for seed in range(8):
        grammar = compiler.compile(StructuredOutput(json_object=True))
        text, end = write(tokenizer, grammar, VOCAB, EOS, seed, logit_bias=ends)
        assert end == "stop"
        assert isinstance(json.loads(text), dict)


def test_a_form_holds_whatever_else_is_asked(tokenizer, compiler):
    """Also against a bias, and where no stop token may come yet but nothing else can."""
    structured, holds = FORMS["an expression"]
    bias = {EOS: 100.0, tokenizer.encode("x")[0]: 100.0, tokenizer.encode("1")[0]: -100.0}
    for fields in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}, {"logit_bias": bias}, {"min_tokens": 2000}):
        text, end = write(tokenizer, compiler.compile(structured), VOCAB, EOS, 3, **fields)
        assert end == "stop"
        assert holds(text), text


def test_every_choice_can_be_made(tokenizer, compiler):
    structured = FORMS["choices"][0]
    for choice in structured.choices:
        grammar = compiler.compile(structured)
        assert all(grammar.accept(token) for token in tokenizer.encode(choice))
        assert EOS in allowed(grammar)
        assert grammar.is_finished == (choice != "yes")


def test_byte_fallback_vocabularies(tmp_path):
    tokenizer = sentencepiece_like(tmp_path)
    vocab = tokenizer._fast.get_vocab_size() + 5
    compiler = GrammarCompiler(tokenizer, vocab, frozenset({0}))
    structured, holds = FORMS["a person"]
    text, end = write(tokenizer, compiler.compile(structured), vocab, 0, 1)
    assert end == "stop"
    assert holds(text.strip()), text


@pytest.mark.golden
def test_random_logits_over_a_real_vocabulary(smol):
    tokenizer = Tokenizer(smol / "smol-bf16")
    compiler = GrammarCompiler(tokenizer, 49152, frozenset({0, 2}))
    for form, holds in FORMS.values():
        for seed in range(3):
            text, end = write(tokenizer, compiler.compile(form), 49152, 2, seed, logit_bias={0: -100})
            assert end == "stop"
            assert holds(text), text


DEAD_END = 'start: "x" a\na: a'


def allowed(grammar: Grammar) -> set[int]:
    return set(np.flatnonzero(unpacked(fill_masks([grammar], VOCAB)[0], VOCAB)).tolist())


def ids_of(tokenizer: Tokenizer, text: str) -> set[int]:
    return {tokenizer.encode(character)[0] for character in text}


def test_a_format_that_nobody_knows_is_a_remark(tokenizer, compiler):
    """What pydantic writes for SecretStr, Path and the like; the rest of the schema holds."""
    fields = {
        "secret": {"type": "string", "format": "password", "maxLength": 3},
        "format": {"type": "string", "format": "path", "maxLength": 2},
        "day": {"type": "string", "format": "date"},
        "same": {"const": {"format": "path"}},
        "any": {"anyOf": [{"type": "string", "format": "json-string", "maxLength": 1}, {"type": "null"}]},
    }
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    structured = StructuredOutput(json_schema=json.dumps(schema))
    for seed in range(4):
        text, end = write(tokenizer, compiler.compile(structured), VOCAB, EOS, seed)
        found = json.loads(text)
        assert end == "stop"
        assert (list(found), found["same"]) == (list(fields), {"format": "path"})
        assert len(found["secret"]) <= 3 and len(found["format"]) <= 2 and len(found["any"] or "") <= 1
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["day"])


def test_masks_are_what_may_come_next(tokenizer, compiler):
    grammar = compiler.compile(StructuredOutput(regex="a?b"))
    a, b = (tokenizer.encode(character)[0] for character in "ab")
    assert allowed(grammar) == {a, b}
    assert not grammar.is_finished
    assert grammar.accept(a)
    assert allowed(grammar) == {b}
    assert grammar.accept(b)
    assert allowed(grammar) == {EOS}
    assert grammar.is_finished
    assert grammar.accept(EOS)


def test_complete_is_not_finished(tokenizer, compiler):
    grammar = compiler.compile(StructuredOutput(regex="a+"))
    (a,) = tokenizer.encode("a")
    assert allowed(grammar) == {a}
    grammar.accept(a)
    assert not grammar.is_finished
    assert allowed(grammar) == {a, EOS}


def test_ids_without_a_token_and_special_tokens_never_come(compiler):
    grammar = compiler.compile(StructuredOutput(regex="(.|\n){5,}"))
    assert max(allowed(grammar)) < 256


def test_every_stop_token_may_end_a_form(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB, frozenset({256, EOS}))
    grammar = compiler.compile(StructuredOutput(choices=["a"]))  # type: ignore[arg-type]
    grammar.accept(tokenizer.encode("a")[0])
    assert allowed(grammar) == {256, EOS}


def test_a_token_against_the_form_is_its_failure_and_not_its_end(tokenizer, compiler):
    grammar = compiler.compile(StructuredOutput(regex="ab"))
    assert grammar.failure is None
    assert not grammar.accept(tokenizer.encode("x")[0])
    assert not grammar.is_finished
    assert re.match(r"structured regex: got .*, expected one that can be kept to until it ends$", grammar.failure)


def test_a_form_without_a_way_on_has_failed(tokenizer, compiler):
    grammar = compiler.compile(StructuredOutput(grammar=DEAD_END))
    grammar.accept(tokenizer.encode("x")[0])
    allowed(grammar)
    assert not grammar.is_finished
    assert grammar.failure == (
        "structured grammar: got a form in which no token can come next, expected one that can be kept to until it ends"
    )


def test_json_has_only_so_much_space(tokenizer, compiler):
    """Or a model that likes spaces goes on for ever."""
    (space, brace) = tokenizer.encode(" {")
    grammar = compiler.compile(StructuredOutput(json_object=True))
    assert space not in allowed(grammar)
    grammar.accept(brace)
    for _ in range(40):
        assert space in allowed(grammar)
        assert grammar.accept(space)
    assert space not in allowed(grammar)
    assert allowed(grammar) >= ids_of(tokenizer, '"}')


USER = 259  # <|user|>


def opened(compiler: GrammarCompiler, text: str, *stop_token_ids: int) -> Grammar:
    return compiler.compile(StructuredOutput(regex="ab", begins_after=text), stop_token_ids)


def test_before_a_form_all_but_stop_tokens_may_come(tokenizer, compiler):
    grammar = opened(compiler, "<|user|>", 0, 31)
    for token in (*tokenizer.encode("é <|system|>"), USER):
        assert allowed(grammar) == set(range(VOCAB)) - {EOS, 0, 31}
        assert not grammar.is_finished
        assert grammar.accept(token)
    assert allowed(grammar) == ids_of(tokenizer, "a")
    assert grammar.accept(tokenizer.encode("a")[0]) and grammar.accept(tokenizer.encode("b")[0])
    assert (grammar.is_finished, allowed(grammar)) == (True, {EOS})


@pytest.mark.parametrize("spelled", [False, True])
@pytest.mark.parametrize("text", ["<|user|>", "</think>", "aab", "é🙂", "<|user|>\n"])
def test_what_a_form_begins_after_may_be_one_token_or_several(tokenizer, compiler, text, spelled):
    """Spelled by ordinary tokens it counts as well."""
    ids = [token for character in text for token in tokenizer.encode(character)] if spelled else tokenizer.encode(text)
    assert (USER in ids) == ("<|user|>" in text and not spelled)
    grammar = opened(compiler, text)
    for token in [*tokenizer.encode("a<|u"), *ids[:-1], *tokenizer.encode("x"), *ids[:-1]]:
        grammar.accept(token)
        assert allowed(grammar) == set(range(VOCAB)) - {EOS}
    grammar.accept(ids[-1])
    assert allowed(grammar) == ids_of(tokenizer, "a")


SYSTEM = 258  # <|system|>


@pytest.mark.parametrize("ignores_eos", [False, True])
def test_the_first_token_decides_whether_anything_stands_before_a_form(tokenizer, compiler, ignores_eos):
    (a, b) = tokenizer.encode("ab")
    form = StructuredOutput(regex="[ab]{2}", begins_after="<|user|>", opened_by="<|system|>")
    for first, then in ((a, {a, b}), (SYSTEM, set(range(VOCAB)) - {EOS})):
        grammar = compiler.compile(form, ignores_eos=ignores_eos)
        assert allowed(grammar) == allowed(grammar) == {a, b, SYSTEM}
        assert not grammar.is_finished
        assert grammar.accept(first)
        assert allowed(grammar) == then
    for token in (SYSTEM, USER, a, b):
        assert not grammar.is_finished
        assert grammar.accept(token)
    assert grammar.is_finished


@pytest.mark.parametrize("opened_by", ["", "ab"])
def test_what_no_single_token_opens_stands_before_a_form_anyway(tokenizer, compiler, opened_by):
    grammar = compiler.compile(StructuredOutput(regex="a", begins_after="<|user|>", opened_by=opened_by))
    assert allowed(grammar) == set(range(VOCAB)) - {EOS}


def test_the_token_that_completes_the_text_may_go_on(tokenizer, compiler):
    """Here the text ends inside a token; the form begins with the next one."""
    grammar = opened(compiler, "x<|us")
    for token in (*tokenizer.encode("x"), USER):
        grammar.accept(token)
    assert allowed(grammar) == ids_of(tokenizer, "a")


def test_masks_of_several_answers(tokenizer, compiler):
    grammars = [compiler.compile(StructuredOutput(regex=regex)) for regex in ("a", "b", "[ab]")]
    masks = fill_masks(grammars, VOCAB)
    assert masks.shape == (3, mask_words(VOCAB))
    for grammar, mask in zip(grammars, masks, strict=True):
        np.testing.assert_array_equal(mask, fill_masks([grammar], VOCAB)[0])


def test_answers_with_and_without_a_form_in_one_step(tokenizer, compiler):
    regexes: list[str | None] = [None, "b", None, "a", "c"]
    samplers = [
        Sampler(
            SamplingParams(temperature=0, logprobs=0),
            [1],
            VOCAB,
            frozenset({EOS}),
            0,
            None if regex is None else compiler.compile(StructuredOutput(regex=regex)),
        )
        for regex in regexes
    ]
    rows = np.random.default_rng(0).normal(0, 1, (5, VOCAB)).astype(np.float32)
    tokens = [each.token_id for each in choose_all(samplers, rows, [0] * 5)]
    expected = [
        int(row.argmax()) if regex is None else tokenizer.encode(regex)[0]
        for row, regex in zip(rows, regexes, strict=True)
    ]
    assert tokens == expected
    assert [one.is_finished for one in samplers] == [False, True, False, True, True]


def test_grammars_of_one_form_do_not_share_how_far_they_are(tokenizer, compiler):
    structured = StructuredOutput(regex="ab")
    first, second = compiler.compile(structured), compiler.compile(structured)
    first.accept(tokenizer.encode("a")[0])
    assert allowed(first) == ids_of(tokenizer, "b")
    assert allowed(second) == allowed(compiler.compile(structured)) == ids_of(tokenizer, "a")


def test_only_so_many_forms_are_kept(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))
    made: list[str] = []
    compile_one = compiler._compile
    compiler._compile = lambda name, value: made.append(value) or compile_one(name, value)  # type: ignore[method-assign, func-returns-value]
    forms = [f"x{i}" for i in range(KEPT + 1)]
    ask = lambda form, **more: compiler.compile(StructuredOutput(regex=form, **more))  # noqa: E731
    ask(forms[0])
    for form in forms[1:KEPT]:
        ask(form)
        ask(forms[0], begins_after="x")  # used all the time, behind a text or not: it stays
    assert made == forms[:KEPT]
    ask(forms[KEPT])
    ask(forms[0])
    assert made == forms
    ask(forms[1])  # the one that was not used for the longest time
    assert made == [*forms, forms[1]]


def test_threads_may_share_a_compiler(tokenizer, compiler):
    texts: list[str] = []

    def ask(seed: int) -> None:
        for form in ("a person", "a grammar"):
            text, _ = write(tokenizer, compiler.compile(FORMS[form][0]), VOCAB, EOS, seed)
            texts.append(text if FORMS[form][1](text) else "")

    askers = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(texts) == 8
    assert all(texts)


BAD: Sequence[tuple[dict[str, Any], str]] = [
    ({"regex": "a("}, "structured regex: got .*unclosed group.*, expected one that llguidance understands"),
    ({"regex": "(?=a)b"}, "structured regex: got .*look-around.* not supported"),
    ({"grammar": "start: nothing"}, 'structured grammar: got .*unknown name: "nothing"'),
    ({"grammar": "begin: /a/"}, "structured grammar: got .*start"),
    ({"grammar": "start: ("}, "structured grammar: got "),
    ({"json_schema": '{"type": "nope"}'}, "structured json_schema: got Invalid type: nope, expected"),
    ({"json_schema": '{"$ref": "#/nope"}'}, "structured json_schema: got Pointer '/nope' does not exist"),
    ({"json_schema": '{"not": {}}'}, "structured json_schema: got Unimplemented keys"),
    ({"json_schema": '{"minimum": "x"}'}, "structured json_schema: got Expected f64 for 'minimum'"),
    ({"json_schema": '{"$ref": "http://localhost/a.json"}'}, "structured json_schema: got .*does not fetch resources"),
    ({"json_schema": json.dumps({"type": "x" * 1000})}, "structured json_schema: got Invalid type: x+"),
]


IMPOSSIBLE: Sequence[dict[str, Any]] = [
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"enum": []},
    {"type": []},
    {"anyOf": [False]},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "string", "pattern": "^a$", "minLength": 2},
    {"type": "string", "format": "date", "maxLength": 3},
    {"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "^b"}]},
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1},
    {"type": "integer", "multipleOf": 10, "minimum": 1, "maximum": 9},
    {"const": "a", "type": "integer"},
    {"enum": [1, 2], "type": "string"},
    {"type": "array", "minItems": 3, "maxItems": 2},
    {"type": "array", "items": False, "minItems": 1},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"type": "object", "required": ["a"], "properties": {"a": {"enum": []}}},
    {"$ref": "#"},
    {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
]


@pytest.mark.parametrize(
    "form",
    [
        *({"json_schema": json.dumps(schema)} for schema in (*IMPOSSIBLE, False)),
        {"regex": r"[^\s\S]"},
        {"regex": r"ab[^\s\S]c"},
        {"grammar": "start: a\na: a"},
        {"grammar": "start: A\nA: /a/ & /b/"},
    ],
)
def test_a_form_that_no_text_has_is_refused_when_it_is_compiled(compiler, form):
    expected = (
        r"^structured \w+: got (Unsatisfiable schema: .*|a form in which no token can come next), expected a form"
    )
    with pytest.raises(InputError, match=expected + " that some text has$"):
        compiler.compile(StructuredOutput(**form))


def test_of_schemas_that_are_not_known_to_differ_any_may_apply(tokenizer, compiler):
    parts = [
        {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name], "additionalProperties": False}
        for name in ("a", "b")
    ]
    schema = {"oneOf": [*parts, {"type": "object", "maxProperties": 0}, {"type": "array", "maxItems": 0}]}
    grammar = compiler.compile(StructuredOutput(json_schema=json.dumps(schema)))
    text, end = write(tokenizer, grammar, VOCAB, EOS, 3)
    assert end == "stop"
    assert json.loads(text) in ({}, []) or json.loads(text).keys() <= {"a", "b"}


def test_a_schema_that_is_true_is_any_json(tokenizer, compiler):
    ends = {tokenizer.encode(character)[0]: 6.0 for character in '}]"'}
    grammar = compiler.compile(StructuredOutput(json_schema="true"))
    text, end = write(tokenizer, grammar, VOCAB, EOS, 3, logit_bias=ends)
    assert end == "stop"
    json.loads(text)


@pytest.mark.parametrize(("form", "pattern"), BAD)
def test_bad_forms_are_refused_in_one_line(compiler, form, pattern):
    with pytest.raises(InputError) as caught:
        compiler.compile(StructuredOutput(**form))
    message = str(caught.value)
    assert re.match(pattern, message), message
    assert "\n" not in message and len(message) < MAX_REASON + 100


def test_a_form_too_complex_is_refused_or_ends(tokenizer, compiler):
    """Whatever it is, it neither hangs nor kills."""
    for form in (
        StructuredOutput(regex="(a{1,1000}){1,1000}"),
        StructuredOutput(regex="(a|b)*a" + "(a|b)" * 200),
        StructuredOutput(grammar="start: start start | start start start | /a/"),
        StructuredOutput(json_schema=json.dumps({"$ref": "#"})),
    ):
        try:
            grammar = compiler.compile(form)
        except InputError:
            continue
        write(tokenizer, grammar, VOCAB, EOS, 1, most=50)


def doubled(count: int, body: str) -> str:
    """Return a grammar whose start is 2 ** count times `body`."""
    rules = "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(count))
    return f"start: A0\n{rules}\nA{count}: {body}"


def chain(count: int) -> dict[str, Any]:
    """Return definitions of which each refers to the next one."""
    return {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(count)} | {f"d{count}": {"type": "integer"}}


RULES = "\n".join(f"a{i}: a{i + 1}" for i in range(9999))
PATTERNS = [{"type": "string", "pattern": f"^.*[a-z]{{{i}0}}.*$"} for i in range(1, 30)]

# Compiled in the server these would compute for minutes, or end it: its stack overflows, or there is no more memory.
EXPLOSIVE: Mapping[str, dict[str, Any]] = {
    "a long chain of rules": {"grammar": f"start: a0\n{RULES}\na9999: /x/"},
    "a long chain of references": {"json_schema": json.dumps({"$ref": "#/$defs/d0", "$defs": chain(5000)})},
    "terminals twice as large each": {"grammar": doubled(22, '"x"')},
    "an intersection": {"grammar": "start: A\nA: " + " & ".join(f"/.*x.{{{i}}}y.*/" for i in range(2, 40))},
    "patterns of one text": {"json_schema": json.dumps({"allOf": PATTERNS})},
}


@pytest.mark.parametrize("name", EXPLOSIVE)
def test_a_form_that_explodes_is_refused_and_nothing_else_happens(compiler, name):
    started = time.monotonic()
    with pytest.raises(InputError) as caught:
        compiler.compile(StructuredOutput(**EXPLOSIVE[name]))
    expected = r"structured \w+: got one that takes more than 2 s or 32 MiB to compile, expected a simpler one"
    assert re.fullmatch(expected, str(caught.value))
    assert time.monotonic() - started < 20
    assert compiler.compile(StructuredOutput(choices=("a", "b")))


def test_what_was_refused_is_refused_at_once_for_a_while(tokenizer, compiler, monkeypatch):
    asked: list[str] = []
    require = Trial.require
    monkeypatch.setattr(Trial, "require", lambda self, name, value: asked.append(value) or require(self, name, value))
    said = set()
    for _ in range(3):
        with pytest.raises(InputError) as caught:
            compiler.compile(StructuredOutput(regex="never(before"))
        said.add(str(caught.value))
    assert (len(said), asked) == (1, ["never(before"])
    monkeypatch.setattr(structured, "IDLE_SECONDS", 0)
    with pytest.raises(InputError, match="unclosed group"):
        compiler.compile(StructuredOutput(regex="never(before"))
    assert len(asked) == 2
    for at in range(KEPT):
        with pytest.raises(InputError):
            compiler.compile(StructuredOutput(regex=f"{at}("))
    assert len(compiler._refused) == KEPT
    assert ("regex", "never(before") not in compiler._refused


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_nested_repetitions_are_refused(compiler, depth):
    """llguidance would take them, with 150 MiB, and give up after one token."""
    before = anonymous_bytes() or 0
    for letter in "abcdef":
        with pytest.raises(InputError, match=r"^structured regex: got one that takes more than 2 s or 32 MiB"):
            compiler.compile(StructuredOutput(regex="(" * depth + letter + "{1000})" * depth))
    assert (anonymous_bytes() or 0) - before < 50 * 2**20


def test_a_form_that_ends_after_one_token_is_refused(compiler):
    with pytest.raises(ValueError, match=r"^lexer error: too many expressions constructed$"):
        build(compiler._library, compiler._tokenizer, "regex", "((a{1000}){1000}){1000}")


def test_large_forms_that_are_fair_are_taken(tokenizer, compiler):
    """A list of 1,500 choices, and an object of hundreds of fields with patterns."""
    choices = tuple(f"value {i} of {i * i}" for i in range(1500))
    text, end = write(tokenizer, compiler.compile(StructuredOutput(choices=choices)), VOCAB, EOS, 1)
    assert (text in choices, end) == (True, "stop")
    fields = {f"k{i}": {"type": "string", "pattern": "^[a-z]{1,50}$"} for i in range(300)}
    schema = {"type": "object", "properties": fields, "additionalProperties": False}
    compiler.compile(StructuredOutput(json_schema=json.dumps(schema)))


def test_a_slow_form_delays_no_other(compiler):
    def ask() -> None:
        with pytest.raises(InputError):
            compiler.compile(StructuredOutput(grammar=EXPLOSIVE["an intersection"]["grammar"] + "\n# not seen yet"))

    slow = threading.Thread(target=ask)
    compiler.compile(StructuredOutput(choices=("z",)))
    slow.start()
    compiler.compile(StructuredOutput(choices=("y",)))
    assert slow.is_alive()
    slow.join()


def test_the_helper_may_end_at_any_time(compiler):
    compiler.compile(StructuredOutput(regex="first"))
    process = compiler._trial._process
    process.kill()
    process.wait()
    compiler.compile(StructuredOutput(regex="second"))
    assert compiler._trial._process is not process


def test_without_a_helper_there_is_one_line(compiler, monkeypatch):
    compiler._trial.end()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(UnsupportedError, match=r"^structured output: got a helper process that ended\. Look at"):
        compiler.compile(StructuredOutput(regex="third"))


def fake_sizes(monkeypatch: pytest.MonkeyPatch, sizes: Iterator[int]) -> None:
    """Let forms take so many bytes, one after the other."""
    monkeypatch.setattr(Trial, "require", lambda *_: next(sizes))
    monkeypatch.setattr(forms, "build", lambda *_: mock.MagicMock())


def test_forms_are_kept_up_to_a_number_of_bytes(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))
    fake_sizes(monkeypatch, itertools.repeat(30 * 2**20))
    grammars = [compiler.compile(StructuredOutput(regex=f"x{i}")) for i in range(4)]
    assert list(compiler._kept) == [("regex", "x2"), ("regex", "x3")]
    grammars[3]._form.mask_seconds = 1.0  # whose masks have made it larger
    compiler.compile(StructuredOutput(regex="x3"))
    assert list(compiler._kept) == []


def test_forms_in_use_are_bounded_too(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))
    fake_sizes(monkeypatch, iter([30 * 2**20] * 9 + [2**20, 30 * 2**20, 30 * 2**20]))
    held = [compiler.compile(StructuredOutput(regex=f"x{i}")) for i in range(10)]  # the last one is small
    with pytest.raises(BusyError) as caught:
        compiler.compile(StructuredOutput(regex="x10"))
    assert str(caught.value) == (
        "structured regex: got 30 MiB beside 271 MiB of forms in use, expected at most 256 MiB. "
        "Try again when other answers are complete."
    )
    del held
    compiler.compile(StructuredOutput(regex="x11"))


def test_idle_forms_go(tokenizer, monkeypatch):
    monkeypatch.setattr(structured, "IDLE_SECONDS", 0.05)
    compiler = GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))
    compiler.compile(StructuredOutput(regex="x"))
    assert len(compiler._kept) == 1
    ends = time.monotonic() + 5
    while compiler._kept and time.monotonic() < ends:
        time.sleep(0.02)
    assert not compiler._kept


def test_a_tokenizer_that_llguidance_cannot_read(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer for structured output in .*tokenizer\.json: got "):
        GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))


def test_without_llguidance_the_extra_is_named(monkeypatch, tokenizer):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(DependencyError) as caught:
        GrammarCompiler(tokenizer, VOCAB, frozenset({EOS}))
    assert str(caught.value) == (
        "structured output needs llguidance: got none installed. Install it: pip install 'eightfold[serve]'"
    )


def test_sampling_does_not_load_llguidance():
    code = "import sys, eightfold.engine.sampler; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")
