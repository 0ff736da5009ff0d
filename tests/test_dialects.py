"""Calls, results and contents reach each family's kind of template in the form that it wants."""

from __future__ import annotations

import re
from typing import Any

import pytest

from eightfold.dialects import call_form
from eightfold.messages import MessageError, Opening, read_messages
from eightfold.template import TemplateError, render_template
from tests.conversations import USER, called, part, result

# Short templates of our own, each with the ways of one family.
QWEN = """\
{%- for m in messages %}<{{ m.role }}>{% if m.content %}{{ m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}{% set f = c.function %}
{{- '<call>{"name": "' + f.name + '", "arguments": ' }}{{ f.arguments | tojson }}}</call>
{%- endfor %}{% endfor %}"""
LLAMA = """\
{%- for m in messages %}{% if 'tool_calls' in m %}
{%- if m.tool_calls | length != 1 %}{{ raise_exception('one call at once') }}{% endif %}
{%- set f = m.tool_calls[0].function %}<assistant>{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}
{%- elif m.role == 'tool' %}<ipython>{{ m.content | tojson }}
{%- else %}<{{ m.role }}>{{ m['content'] | trim }}{% endif %}{% endfor %}"""
MISTRAL = """\
{%- for m in messages if m.role != 'tool' and not m.tool_calls %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- endfor %}
{%- for m in messages %}{% if m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{%- set f = c.function | tojson %}{{ f[:-1] }}, "id": "{{ c.id }}"}{% endfor %}
{%- elif m.role == 'tool' %}
{%- if not m.tool_call_id or m.tool_call_id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}
{%- set text = m.content | string %}[TOOL_RESULTS]{"content": {{ text }}, "call_id": "{{ m.tool_call_id }}"}
{%- else %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"""
DEEPSEEK_3 = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and m.content is none %}<A>{% for c in m.tool_calls %}
{{- '<call>' + c.type + ' ' + c.function.name + '\\n' + c.function.arguments + '</call>' }}{% endfor %}<end>
{%- elif m.role == 'assistant' %}<A>{{ m.content }}<end>
{%- else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
DEEPSEEK_R1 = """\
{%- for m in messages %}
{%- if m.role == 'assistant' and m.tool_calls %}<A>{% for c in m.tool_calls %}
{{- '<call>' + c.function.name + '\\n' + c.function.arguments + '</call>' }}{% endfor %}<end>{% endif %}
{%- if m.role == 'assistant' and m.content is not none %}<A>{{ m.content }}<end>{% endif %}
{%- if m.role != 'assistant' %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
XML = """\
{%- for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}<f={{ c.function.name }}>
{%- for k, v in c.function.arguments.items() %}<{{ k }}>{{ v }}</{{ k }}>{% endfor %}{% endfor %}{% endfor %}"""
NONE_IS_WRITTEN = """\
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}
{{- c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}{% endfor %}"""
NAMED = """\
{%- for m in messages %}<{{ m.role }}{% if m.role == 'tool' %} {{ m.name }} {{ m.tool_call_id }}{% endif %}>
{{- m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{% endfor %}"""
CHATML = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
ALTERNATES = """\
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{{- '<' + m.role + '>' }}{{ m.content | trim }}{% endfor %}"""
PARTS_ONLY = """\
{%- for m in messages %}<{{ m.role }}>
{%- for p in m.content %}{% if p.type == 'text' %}{{ p.text }};{% endif %}{% endfor %}
{%- for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}{% endfor %}"""
FIRST_PART_ONLY = "{% for m in messages %}<{{ m.role }}>{{ m.content[0]['text'] }}{% endfor %}"
TEXT_OR_PARTS = """\
{%- for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{%- for p in m.content %}{{ p['text'] }}{% endfor %}{% endif %}{% endfor %}"""

TALK = [USER, called('{"a":1}'), result()]


def rendered(template: str, messages: Any) -> str:
    read = read_messages(messages, template)
    assert read_messages(read, template) == read  # what was read can be read again
    given = {"messages": read, "tools": None, "bos_token": "", "eos_token": ""}
    return render_template(template, given)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (QWEN, '<user>w<assistant><call>{"name": "f", "arguments": {"a": 1}}</call><tool>r'),
        (LLAMA, '<user>w<assistant>{"name": "f", "parameters": {"a": 1}}<ipython>"r"'),
        (DEEPSEEK_3, '<user>w<A><call>function f\n{"a":1}</call><end><tool>r'),
        (DEEPSEEK_R1, '<user>w<A><call>f\n{"a":1}</call><end><tool>r'),
        (XML, "<user>w<assistant><f=f><a>1</a><tool>r"),
        (NONE_IS_WRITTEN, '<user>w<assistant>f({"a": 1})<tool>r'),
        (NAMED, '<user>w<assistant>{"name": "f", "arguments": {"a": 1}}<tool f c1>r'),
        (CHATML, '<user>w<assistant>{"name": "f", "arguments": {"a": 1}}<tool>r'),
        (ALTERNATES, '<user>w<assistant>{"name": "f", "arguments": {"a": 1}}<user>r'),
        (PARTS_ONLY, '<user>w;<assistant><call>{"name": "f", "arguments": {"a": 1}}<tool>r;'),
        (TEXT_OR_PARTS, '<user>w<assistant>{"name": "f", "arguments": {"a": 1}}<tool>r'),
    ],
)
@pytest.mark.parametrize("content", [None, ""])
def test_a_call_and_its_result(template, expected, content):
    user, call, answer = TALK
    assert rendered(template, [user, {**call, "content": content}, answer]) == expected


@pytest.mark.parametrize(
    ("arguments", "as_text", "as_object"),
    [
        ('{"city":"Ö","n":[1,2]}', '{"city":"Ö","n":[1,2]}', '{"city": "Ö", "n": [1, 2]}'),  # as the model wrote it
        ({"city": "Ö", "n": [1, 2]}, '{"city": "Ö", "n": [1, 2]}', '{"city": "Ö", "n": [1, 2]}'),
        ("", "{}", "{}"),
        ({}, "{}", "{}"),
        (None, "{}", "{}"),
    ],
)
def test_arguments_are_an_object_or_text_as_the_template_wants(arguments, as_text, as_object):
    assert rendered(DEEPSEEK_3, [USER, called(arguments)]) == f"<user>w<A><call>function f\n{as_text}</call><end>"
    assert f'"arguments": {as_object}}}' in rendered(QWEN, [USER, called(arguments)])


def test_a_call_without_arguments_has_none():
    call = {"id": "1", "type": "function", "function": {"name": "f"}}
    assert '"arguments": {}}' in rendered(QWEN, [USER, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(
    "arguments",
    [
        {"a": float("nan")},
        {"a": {1}},
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": 1',
        "[1]",
        "5",
        [1],
        5,
        '{"a": ' + "[" * 100_000,
    ],
)
def test_arguments_that_are_none_are_refused(arguments):
    place = r"messages\[1\]\.tool_calls\[0\]\.function\.arguments"
    for template in (QWEN, DEEPSEEK_3, None):
        with pytest.raises(MessageError, match=rf"^{place}: got .*, expected a JSON object$"):
            read_messages([USER, called(arguments)], template)


def test_words_beside_calls_are_kept_where_a_template_would_lose_the_calls():
    said = [USER, called(content="I look.", reasoning_content="Hm."), result()]
    assert rendered(QWEN, said).startswith('<user>w<assistant>I look.<call>{"name": "f"')
    assert rendered(DEEPSEEK_3, said) == '<user>w<A>I look.<end><A><call>function f\n{"a": 1}</call><end><tool>r'
    assert rendered(CHATML, said) == '<user>w<assistant>I look.\n{"name": "f", "arguments": {"a": 1}}<tool>r'
    words, calls, _ = read_messages(said, DEEPSEEK_3)[1:]
    assert (words["reasoning_content"], "reasoning_content" in calls) == ("Hm.", False)


LONG = "call_0123456789abcdef01234567"


def test_identifiers_have_nine_characters_where_a_template_asks_for_them():
    two = {"role": "assistant", "tool_calls": [*called(name="1")["tool_calls"], *called(name=LONG)["tool_calls"]]}
    talk = [USER, two, result("b", LONG), result("a", "1"), called(name="abcDEF123"), result("c", "abcDEF123")]
    found = rendered(MISTRAL, talk)
    first, second, third = re.findall(r'"id": "([A-Za-z0-9]{9})"', found)
    assert re.findall(r'"content": (.), "call_id": "(.{9})"', found) == [
        ("b", second),
        ("a", first),
        ("c", "abcDEF123"),
    ]
    assert (len({first, second, third}), third) == (3, "abcDEF123")
    assert rendered(MISTRAL, talk) == found  # the same ones in the next request
    assert f"<tool f {LONG}>b" in rendered(NAMED, talk)


def test_identifiers_are_left_alone_where_they_only_have_to_be_long():
    cut = MISTRAL.replace("!= 9", "< 9").replace('"{{ c.id }}"', '"{{ c.id[-9:] }}"')
    found = rendered(cut, [USER, called(name=LONG), called(name="1"), result(name="1")])
    ids = re.findall(r'"(?:call_)?id": "(.*?)"', found)
    assert ids[0] == LONG[-9:] and ids[1] == ids[2] and len(ids[1]) == 9


def test_results_know_their_calls():
    calls = [*called(name="x")["tool_calls"], {"function": {"arguments": {}, "name": "g"}}]
    talk = [USER, {"role": "assistant", "tool_calls": calls}, result("1", "x"), {"role": "tool", "content": "2"}]
    assert rendered(NAMED, talk).endswith('{"name": "g", "arguments": {}}<tool f x>1<tool g call_1_1>2')
    assert "<tool other x>1" in rendered(NAMED, [*talk[:2], {**result("1", "x"), "name": "other"}])


def test_results_that_a_template_would_not_show_are_said_by_the_user():
    two = {"role": "assistant", "content": "", "tool_calls": called()["tool_calls"] + called(name="c2")["tool_calls"]}
    said = '<user>w<assistant>{"name": "f", "arguments": {"a": 1}}\n{"name": "f", "arguments": {"a": 1}}'
    assert rendered(ALTERNATES, [USER, two, result("1"), result("2", "c2")]) == f"{said}<user>1\n2"
    assert rendered(CHATML, [USER, two, result("1"), result("2", "c2")]) == f"{said}<tool>1<tool>2"


def test_roles_that_a_template_refuses_are_refused_in_its_words():
    for messages in ([USER, USER], [{"role": "system", "content": "s"}, USER]):
        with pytest.raises(TemplateError, match=r"^roles must alternate$"):
            rendered(ALTERNATES, messages)


@pytest.mark.parametrize("role", ["function", "bot", "x" * 500])
def test_a_role_that_a_template_would_leave_out_is_refused(role):
    knows = "{% for m in messages if m.role in ('user', 'assistant', 'bot') %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    said = [USER, {"role": role, "content": "a"}]
    assert rendered(CHATML, said) == f"<user>w<{role}>a"
    if role == "bot":
        assert rendered(knows, said) == "<user>w<bot>a"
        return
    expected = r"^messages\[1\]\.role: got '.*', expected one that the chat template shows$"
    with pytest.raises(MessageError, match=expected):
        read_messages(said, knows)


def test_reasoning_goes_to_the_template_by_either_name():
    template = "{% for m in messages %}{{ m.reasoning_content }}|{{ m.reasoning }}{% endfor %}"
    for name in ("reasoning_content", "reasoning"):
        assert rendered(template, [{"role": "assistant", "content": "a", name: "Hm."}]) == "Hm.|Hm."


PARTS = [{"role": "user", "content": [part("a"), part("b")]}, {"role": "assistant", "content": "c"}]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<user>a\nb<assistant>c"),
        (LLAMA, "<user>a\nb<assistant>c"),
        (PARTS_ONLY, "<user>a;b;<assistant>c;"),
        (FIRST_PART_ONLY, "<user>a\nb<assistant>c"),
        (TEXT_OR_PARTS, "<user>ab<assistant>c"),
        (NONE_IS_WRITTEN + "{# text #}", "<user>a\nb<assistant>c"),  # not as Python writes a list
        ("{% for m in messages %}{{ m.content | tojson }}text{% endfor %}", '"a\\nb"text"c"text'),
    ],
)
def test_parts_are_a_list_where_the_template_reads_lists(template, expected):
    assert rendered(template, PARTS) == expected


CONTINUED = [(PARTS_ONLY, "<user>w;<assistant>a;b"), (CHATML, "<user>w<assistant>a\nb")]


@pytest.mark.parametrize(("template", "expected"), CONTINUED)
def test_a_message_of_parts_is_continued_behind_the_last(template, expected):
    said = {"role": "assistant", "content": [part("a"), part("b")]}
    opening = Opening(read_messages([USER, said], template))
    assert opening.cut(render_template(template, {"messages": opening.messages})) == expected


def test_a_message_with_calls_is_not_continued():
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    with pytest.raises(MessageError, match=r"^messages\[-1\]\.tool_calls: got .*, expected none in a message that"):
        Opening([USER, {"role": "assistant", "content": "a", "tool_calls": calls}])


def test_a_template_is_tried_only_where_that_matters():
    template = "{{ raise_exception('never rendered') }}"
    assert read_messages([USER], template) == [USER]
    assert read_messages(TALK, template)[2]["content"] == "r"
    with pytest.raises(TemplateError, match="never rendered"):
        rendered(template, [USER])


@pytest.mark.parametrize("template", ["{% if %}", "{{ messages | nothing }}"])
def test_what_is_no_template_is_for_its_renderer_to_refuse(template):
    assert call_form(template) is None
    assert read_messages(TALK, template)[0] == USER
