"""Fields of several dialects: obeyed, refused by name, or named in the log."""

from __future__ import annotations

import json
from typing import Any

import pytest

from eightfold.errors import BusyError, CapacityError
from eightfold.server.field_table import CHAT, COMPLETIONS, DETOKENIZE, FIELDS, RESPONSES, TOKENIZE
from eightfold.server.fields import ApiError, Fields, refused
from eightfold.server.requests import read_chat, read_completion
from eightfold.server.served import Served
from eightfold.tokenizer import Tokenizer
from tests.server.running import eventually

SCHEMA = {"type": "object", "properties": {"team": {"type": "string"}}}


def params_of(serve, **fields):
    """Return how the engine was asked to choose the tokens of a chat's answer."""
    running = serve()
    raw = running.chat(**fields)
    assert raw.status_code == 200, raw.text
    return running.engine.last[1]


def error_of(serve, **fields):
    """Return the error of a chat that never comes to the engine."""
    running = serve()
    raw = running.chat(**fields)
    assert (raw.status_code, running.engine.last) == (400, None), raw.text
    return raw.json()["error"]


# ---- The table.


def test_names_are_unique_at_each_endpoint():
    for path in (CHAT, COMPLETIONS, RESPONSES, TOKENIZE, DETOKENIZE):
        names = [name for field in FIELDS if path in field.paths for name in (field.name, *field.also)]
        assert len(names) == len(set(names)) > 1


def test_every_default_is_of_its_fields_kind_and_changes_nothing():
    for field in FIELDS:
        assert field.help.endswith(".") or (field.is_refused and not field.help), field.name
        assert field.changes_nothing(field.default)
        if field.default is not None:
            assert field.kind.fits(field.default), field.name


@pytest.mark.parametrize("field", [each for each in FIELDS if each.is_refused], ids=lambda field: field.name)
def test_what_is_refused_passes_with_the_values_that_change_nothing(field):
    path = CHAT if CHAT in field.paths else RESPONSES
    for value in (None, *field.neutral):
        Fields({field.name: value}, path).refuse_unsupported()
    beside = {"repetition_penalty": 1.5} if field.beside else {}
    with pytest.raises(ApiError) as caught:
        within, _, name = field.name.rpartition(".")
        Fields({name: "strange", **beside}, path, within=within and f"{within}.").refuse_unsupported()
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, field.name, "unsupported_parameter")
    assert caught.value.message.startswith(f"{field.name} is not supported.")


STRANGE = (
    0, -1, 1, 2, 10**30, 1.5, True, False, "", "x", "none", "\ud800", [], ["a"], [[5, 1]], [[]], [None], {}, {"a": 1},
    {"type": "json_schema"}, {"type": None}, {"type": ["text"]}, {"type": "grammar", "grammar": []},
)  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_whatever_a_field_is_it_is_read_or_refused_by_name(model, path):
    served = Served(Tokenizer(model), 256, ("tiny",))
    read = read_chat if path == CHAT else read_completion
    base: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]} if path == CHAT else {"prompt": "x"}
    for field in FIELDS:
        for name in (field.name, *field.also):
            for value in STRANGE:
                head, _, last = name.rpartition(".")
                asked = {**base, head.partition(".")[0]: nested(head, last, value)} if head else {**base, name: value}
                try:
                    fields = served.fields(asked, path)
                    read(fields, served)
                except ApiError as error:
                    assert error.status in (400, 404) and error.param, (name, value, error.message)


def nested(head, last, value):
    """Return the object in which a field stands, from the outermost on."""
    found = {last: value}
    for name in reversed(head.split(".")[1:]):
        found = {name: found}
    return found


# ---- Other names.

ALIASES = [
    ({"max_completion_tokens": 3}, {"max_tokens": 3}),
    ({"max_new_tokens": 3}, {"max_tokens": 3}),
    ({"n_predict": 3}, {"max_tokens": 3}),
    ({"num_predict": 3}, {"max_tokens": 3}),
    ({"max_tokens": 3, "n_predict": 3}, {"max_tokens": 3}),
    ({"max_tokens": -1}, {"max_tokens": None}),
    ({"n_predict": -1}, {"max_tokens": None}),
    ({"min_new_tokens": 2}, {"min_tokens": 2}),
    ({"repeat_penalty": 1.8}, {"repetition_penalty": 1.8}),
    ({"seed": -1}, {"seed": None}),
    ({"seed": 5}, {"seed": 5}),
    ({"stop_sequences": ["a"]}, {"stop": ("a",)}),
    ({"stop_strings": "a"}, {"stop": ("a",)}),
    ({"random_seed": 5}, {"seed": 5}),
    ({"stop": None}, {"stop": ()}),
    ({"no_stop_trim": True}, {"include_stop_str_in_output": True}),
    ({"n_cmpl": 2}, {"n": 2}),
    ({"logit_bias": [[5, 1.5], [6, False]]}, {"logit_bias": {5: 1.5, 6: -100.0}}),
    ({"logit_bias": {"5": 1.5}}, {"logit_bias": {5: 1.5}}),
    ({"repeat_last_n": 64}, {"repetition_penalty": 1.0}),
    ({"repeat_last_n": -1, "repeat_penalty": 2}, {"repetition_penalty": 2}),
]


@pytest.mark.parametrize(("asked", "expected"), ALIASES)
def test_fields_have_other_names_in_other_dialects(serve, asked, expected):
    params = params_of(serve, **asked)
    assert {name: getattr(params, name) for name in expected} == expected


def test_in_completions_minus_one_is_no_limit_where_no_limit_is_sixteen(serve):
    running = serve()
    for asked, expected in (({}, 16), ({"max_tokens": -1}, None), ({"n_predict": 7}, 7)):
        assert running.post("/v1/completions", {"prompt": "x", **asked}).status_code == 200
        assert running.engine.last[1].max_tokens == expected


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"max_tokens": 12, "n_predict": 2}, "n_predict", "max_tokens and n_predict: got different values. Give one."),
        ({"seed": 1, "sampling_seed": True}, "sampling_seed", "seed and sampling_seed: got different values."),
        ({"n_predict": 0}, "n_predict", "n_predict: got 0, expected 1 to 2147483648"),
        ({"max_new_tokens": "x"}, "max_new_tokens", "max_new_tokens: got 'x', expected a whole number"),
        ({"repeat_penalty": -1}, "repeat_penalty", "repeat_penalty: got -1, expected a number above 0"),
        ({"max_tokens": 3, "min_new_tokens": 5}, "min_new_tokens", "min_new_tokens: got 5, expected a whole number"),
        ({"logit_bias": [["Hello", 1]]}, "logit_bias", "logit_bias: expected token ids"),
        ({"logit_bias": [[5, 1], [5, 2]]}, "logit_bias", "logit_bias: expected token ids"),
        ({"logit_bias": [[5, True]]}, "logit_bias", "logit_bias: got True, expected a number"),
        ({"repeat_last_n": 64, "repeat_penalty": 2}, "repeat_last_n", "repeat_last_n is not supported."),
        ({"options": {"num_predict": 2}}, "options", "options is not supported. Put its fields beside the others."),
        ({"sampling_params": {"max_new_tokens": 2}}, "sampling_params", "sampling_params is not supported. Put its"),
        ({"penalize_nl": False, "repeat_penalty": 2}, "penalize_nl", "penalize_nl is not supported."),
        ({"suppress_tokens": [5]}, "suppress_tokens", "suppress_tokens is not supported. Use logit_bias."),
        ({"format": "json"}, "format", "format is not supported. Use response_format."),
        ({"mirostat": 2}, "mirostat", "mirostat is not supported."),
        ({"samplers": ["top_k"]}, "samplers", "samplers is not supported."),
        ({"add_special_tokens": True}, "add_special_tokens", "add_special_tokens is not supported. The chat template"),
        ({"prompt": "x"}, "prompt", "prompt is a field of /v1/completions."),
    ],
)  # fmt: skip
def test_what_cannot_be_obeyed_is_refused_by_the_name_that_was_given(serve, fields, param, message):
    error = error_of(serve, **fields)
    assert error["message"].startswith(message)
    assert error["param"] == param


def test_fields_of_chats_are_none_of_completions(serve):
    running = serve()
    neutral = {"messages": None, "tools": [], "tool_choice": "auto", "parallel_tool_calls": False, "top_logprobs": 0}
    assert running.post("/v1/completions", {"prompt": "x", **neutral}).status_code == 200
    for name, value in {"messages": [{}], "top_logprobs": 2, "tools": [{}], "chat_template_kwargs": {"a": 1}}.items():
        raw = running.post("/v1/completions", {"prompt": "x", name: value})
        error = raw.json()["error"]
        assert error["message"].startswith(f"{name} is a field of /v1/chat/completions")
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")


def test_a_dialects_numbers_beside_a_refused_field_mean_nothing_alone(serve, caplog):
    running = serve()
    asked = {"mirostat": 0, "mirostat_tau": 5.0, "dry_multiplier": 0, "dry_base": 1.75, "cache_prompt": True}
    with caplog.at_level("INFO", "eightfold.server"):
        assert running.chat(**asked).status_code == 200
        assert eventually(lambda: caplog.records)
    assert caplog.records[-1].record.ignored == ["cache_prompt", "dry_base", "mirostat_tau"]


def test_names_in_objects_are_in_the_log_too(serve, caplog):
    running = serve()
    form = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": SCHEMA, "x": 1}, "y": 2}
    asked = {"stream": True, "stream_options": {"include_usage": True, "include_obfuscation": False}}
    with caplog.at_level("INFO", "eightfold.server"):
        assert running.chat(response_format=form, **asked).status_code == 200
        assert eventually(lambda: caplog.records)
    ignored = ["response_format.json_schema.x", "response_format.y", "stream_options.include_obfuscation"]
    assert caplog.records[-1].record.ignored == ignored


def test_names_in_messages_that_nobody_reads_are_in_the_log_once(serve, caplog):
    running = serve()
    cached = {"cache_control": {"type": "ephemeral"}}
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b", "name": "x", **cached},
        {"role": "assistant", "content": "c", "refusal": None, "annotations": [], "reasoning": "d"},
        {"role": "user", "content": "e", **cached},
    ]
    with caplog.at_level("INFO", "eightfold.server"):
        assert running.post("/v1/chat/completions", {"messages": messages}).status_code == 200
        assert eventually(lambda: caplog.records)
    assert caplog.records[-1].record.ignored == ["messages[1].cache_control"]


# ---- Thinking.

THINKS = "{{ messages[0].content }}{% if enable_thinking is defined and not enable_thinking %}(no){% endif %}"
DEEPSEEK = "{{ messages[0].content }}{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{thinking}}"
EFFORTS = "{{ messages[0].content }}{{ reasoning_effort | default('medium') }} {{ 'enable_thinking' }}"


def prompt_of(serve, template, **fields):
    """Return the prompt that the engine is asked to continue."""
    running = serve(template=template)
    raw = running.chat(**fields)
    assert raw.status_code == 200, raw.text
    return running.engine.tokenizer.decode(running.engine.last[0])


@pytest.mark.parametrize(
    ("template", "fields", "expected"),
    [
        (THINKS, {}, "Hi"),
        (THINKS, {"chat_template_kwargs": {"enable_thinking": False}}, "Hi(no)"),
        (THINKS, {"enable_thinking": False}, "Hi(no)"),
        (THINKS, {"think": False}, "Hi(no)"),
        (THINKS, {"enable_thinking": True}, "Hi"),
        (THINKS, {"reasoning_effort": "none"}, "Hi(no)"),
        (THINKS, {"reasoning_effort": "high"}, "Hi"),
        (THINKS, {"reasoning": {"effort": "none"}}, "Hi(no)"),
        (THINKS, {"reasoning": {"enabled": False}}, "Hi(no)"),
        (THINKS, {"thinking": {"type": "disabled"}}, "Hi(no)"),
        (THINKS, {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": False}}, "Hi(no)"),
        (DEEPSEEK, {"enable_thinking": True}, "HiTrue"),
        (DEEPSEEK, {"reasoning_effort": "low"}, "HiTrue"),
        (DEEPSEEK, {"chat_template_kwargs": {"thinking": True}}, "HiTrue"),
        (EFFORTS, {"reasoning_effort": "low"}, "Hilow enable_thinking"),
        (EFFORTS, {"reasoning": {"effort": "high"}}, "Hihigh enable_thinking"),
        (EFFORTS, {"enable_thinking": False}, "Himedium enable_thinking"),
        (None, {"enable_thinking": False, "thinking": {"type": "disabled"}}, None),
    ],
)
def test_thinking_is_turned_on_and_off_in_every_dialect(serve, template, fields, expected):
    found = prompt_of(serve, template, **fields)
    assert found == expected or expected is None


@pytest.mark.parametrize(
    ("template", "fields", "param", "message"),
    [
        (EFFORTS, {"enable_thinking": True}, "enable_thinking", "enable_thinking: this model's chat template has no"),
        (EFFORTS, {"think": True}, "think", "think: this model's chat template has no variable for it"),
        (EFFORTS, {"thinking": {"type": "enabled"}}, "thinking.type", "thinking.type: this model's"),
        (EFFORTS, {"enable_thinking": "no"}, "enable_thinking", "enable_thinking: got 'no', expected true or false"),
        (THINKS, {"enable_thinking": False, "chat_template_kwargs": {"enable_thinking": True}}, "enable_thinking",
         "enable_thinking and chat_template_kwargs.enable_thinking: got different values. Give one."),
        (THINKS, {"enable_thinking": False, "reasoning": {"enabled": True}}, "reasoning.enabled",
         "reasoning.enabled and chat_template_kwargs.enable_thinking: got different values. Give one."),
        (THINKS, {"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "reasoning.effort",
         "reasoning_effort and reasoning.effort: got different values. Give one."),
        (THINKS, {"thinking": {"type": "maybe"}}, "thinking.type", "thinking.type: got 'maybe', expected enabled or"),
        (THINKS, {"thinking": {"type": "enabled", "budget_tokens": 5}}, "thinking.budget_tokens",
         "thinking.budget_tokens is not supported."),
        (THINKS, {"chat_template_kwargs": []}, "chat_template_kwargs", "chat_template_kwargs: got a list, expected an"),
    ],
)  # fmt: skip
def test_what_the_template_cannot_be_told_is_refused(serve, template, fields, param, message):
    serve(template=template)
    error = error_of(serve, **fields)
    assert error["message"].startswith(message)
    assert error["param"] == param


def test_variables_that_the_template_does_not_know_are_in_the_log(serve, caplog):
    running = serve(template=THINKS)
    with caplog.at_level("INFO", "eightfold.server"):
        assert running.chat(chat_template_kwargs={"enable_thinking": False, "tone": "kind"}).status_code == 200
        assert eventually(lambda: caplog.records)
    assert caplog.records[-1].record.ignored == ["chat_template_kwargs.tone"]


# ---- Forms.

GBNF = 'root ::= "yes" | no\nno ::= "no" [0-9]{2}'
LARK = 'start: "yes ::=" | "no" /[0-9]{2}/'


def form(**form):
    ((name, value),) = form.items()
    return name, json.dumps(value) if name == "json_schema" else value


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, form(json_object=True)),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, form(json_schema=SCHEMA)),
        ({"response_format": {"type": "json_object", "schema": {}}}, form(json_object=True)),
        ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, form(json_schema=SCHEMA)),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}, form(json_schema=SCHEMA)),
        ({"response_format": {"type": "json_schema", "value": {"name": "a", "schema": SCHEMA}}},
         form(json_schema=SCHEMA)),
        ({"response_format": {"type": "json", "value": SCHEMA}}, form(json_schema=SCHEMA)),
        ({"response_format": {"type": "regex", "value": "a+"}}, form(regex="a+")),
        ({"response_format": {"type": "regex", "pattern": "a+"}}, form(regex="a+")),
        ({"response_format": {"type": "grammar", "grammar": LARK}}, form(grammar=LARK)),
        ({"json_schema": {"const": "42"}}, form(json_schema={"const": "42"})),
        ({"json_schema": '{"const": "42"}'}, ("json_schema", '{"const": "42"}')),
        ({"json_schema": {}}, form(json_schema={})),
        ({"regex": "[0-9]{3}"}, form(regex="[0-9]{3}")),
        ({"grammar": LARK}, form(grammar=LARK)),
        ({"guided_grammar": LARK}, form(grammar=LARK)),
        ({"grammar": {"type": "regex", "value": "a+"}}, form(regex="a+")),
        ({"grammar": {"type": "json", "value": SCHEMA}}, form(json_schema=SCHEMA)),
        ({"guided_choice": ["a", "b"]}, form(choices=("a", "b"))),
        ({"structured_outputs": {"choice": ["a", "b"]}}, form(choices=("a", "b"))),
        ({"structured_outputs": {"json": SCHEMA, "json_object": False}}, form(json_schema=SCHEMA)),
        ({"structured_outputs": {"json": {}}}, form(json_schema={})),
        ({"structured_outputs": {"json_object": True, "disable_any_whitespace": False}}, form(json_object=True)),
        ({"grammar": "", "json_schema": None}, None),
    ],
)  # fmt: skip
def test_forms_of_every_dialect(serve, asked, expected):
    structured = params_of(serve, **asked).structured
    assert (None if structured is None else structured.given) == expected


@pytest.mark.parametrize("field", ["grammar", "ebnf", "guided_grammar"])
def test_a_grammar_may_be_written_as_llama_cpp_has_it(serve, field):
    name, text = params_of(serve, **{field: GBNF}).structured.given
    assert (name, "start:" in text, "::=" in text) == ("grammar", True, False)


@pytest.mark.parametrize(
    ("grammar", "answers", "others"),
    [
        (GBNF, ["yes", "no12"], ["no", "no1", "maybe"]),
        (r'root ::= "\u0041" "\x42" "\U0001F600" [\u4e00-\u9fff]', ["AB\U0001f600\u4e2d"], ["AB"]),
        (r'root ::= "\"\\" [^"\\\x7F\u0000-\u001F\u005d]+', ['"\\a/b'], ['"\\a\n', '"\\]']),
        ('# a comment\nroot ::= item+ # another\nitem ::= "- " [^\\n]+ "\\n"', ["- a\n- b\n"], ["a\n"]),
        ('root ::= start\nstart ::= "start" restart # start\nrestart ::= [start]+', ["startstars"], ["start"]),
        ("root ::= (a | b)* c?\na ::= [a-c]\nb ::= \"(\" root \")\"\nc-d ::= \"x\"\nc ::= c-d", ["a(bx)x"], ["(", ")"]),
    ],
)  # fmt: skip
def test_what_is_converted_means_the_same(grammar, answers, others):
    llguidance = pytest.importorskip("llguidance")
    from eightfold.server.forms import asked_form

    form = asked_form(Fields({"grammar": grammar}, CHAT))
    tokenizer = llguidance.LLTokenizer("byte")

    def accepts(text):
        matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(form.value))
        assert not matcher.is_error(), matcher.get_error()
        return matcher.consume_tokens(list(text.encode())) and matcher.is_accepting()

    assert all(accepts(text) for text in answers)
    assert not any(accepts(text) for text in others)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"response_format": {"schema": SCHEMA}}, "response_format", "response_format: got null, expected type text"),
        ({"response_format": {"type": "text", "schema": SCHEMA}}, "response_format.schema",
         "response_format.schema: got one, expected none beside type text"),
        ({"response_format": {"type": "json_object", "json_schema": {"schema": SCHEMA}}}, "response_format.json_schema",
         "response_format.json_schema: got one, expected none beside type json_object"),
        ({"response_format": {"type": "json_schema", "schema": {}, "json_schema": {"schema": {}}}}, "response_format",
         "response_format: got schema and json_schema. Give one."),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": 5}}},
         "response_format.json_schema.schema", "response_format.json_schema.schema: got 5, expected a JSON schema"),
        ({"response_format": {"type": "json_schema", "json_schema": "{}"}}, "response_format.json_schema",
         "response_format.json_schema: got '{}', expected an object"),
        ({"response_format": {"type": "regex"}}, "response_format", "response_format: expected pattern beside"),
        ({"response_format": {"type": "structural_tag", "format": {}}}, "response_format",
         "response_format: got 'structural_tag', expected type text"),
        ({"response_format": "json"}, "response_format", "response_format: got 'json', expected an object"),
        ({"json_schema": {"const": 1}, "regex": "1"}, "regex",
         "structured output: got more than one form: json_schema and regex. Give one."),
        ({"json_schema": {"const": 1}, "guided_json": {"const": 2}}, "guided_json",
         "json_schema and guided_json: got different values. Give one."),
        ({"grammar": LARK, "ebnf": GBNF}, "ebnf", "grammar and ebnf: got different values. Give one."),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice",
         "structured output: got more than one form: structured_outputs.regex and structured_outputs.choice."),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag",
         "structured_outputs.structural_tag is not supported."),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
         "structured_outputs.disable_any_whitespace", "structured_outputs.disable_any_whitespace is not supported."),
        ({"grammar": "root ::= ("}, "grammar", "grammar: got Expected ')' at line 1"),
        ({"ebnf": 'root ::= other'}, "ebnf", "ebnf: got Rule 'other' not found, expected a grammar in GBNF or Lark"),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar", "grammar: got maximum recursion depth"),
        ({"grammar": 'root ::= "a"\n' + 'a ::= "b"\n' * 2000}, "grammar", "grammar: got 2001 rules in 20013"),
        ({"grammar": {"type": "xml", "value": "a"}}, "grammar", "grammar: got 'xml', expected a grammar, or an object"),
        ({"grammar": {"value": "a"}}, "grammar", "grammar: got null, expected a grammar, or an object with a value"),
        ({"json_schema": "{"}, "json_schema", "structured json_schema: got Expecting property name"),
        ({"guided_choice": []}, "guided_choice", "structured output: got nothing"),
        ({"regex": "x" * 70_000}, "regex", "structured output: got a form of more than 65536 bytes."),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage",
         "stream_options.include_usage: got 1, expected true or false"),
    ],
)  # fmt: skip
def test_forms_that_cannot_be_used_are_refused_by_their_field(serve, fields, param, message):
    error = error_of(serve, **fields)
    assert error["message"].startswith(message)
    assert error["param"] == param


def test_what_may_fit_later_is_not_the_clients_fault():
    problem = refused(BusyError("structured regex", got="40 MiB", expected="less"))
    assert (problem.status, problem.code, problem.body()["error"]["type"]) == (
        429,
        "too_many_requests",
        "rate_limit_error",
    )
    assert "Retry-After" in problem.headers
    assert refused(CapacityError("prompt", got="9 tokens", expected="8")).code == "context_length_exceeded"
