"""Calls in the answers of every family, whole and in pieces of any size."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eightfold.engine.sampling_params import StructuredOutput
from eightfold.server.tool_parsers import FAMILIES, ToolParser, ToolUse, family_name

NAMES = frozenset(("f", "now", "ns.g"))
CALL = '{"name": "f", "arguments": {"a": 1}}'
TAG = f"<tool_call>\n{CALL}\n</tool_call>"
F1 = ("f", {"a": 1})
NOW: tuple[str, dict[str, Any]] = ("now", {})

# Of Qwen3-Coder's values, which have no types of their own.
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "parameters": {
            "type": "object",
            "properties": {
                "a": {"type": "integer"},
                "text": {"type": "string"},
                "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "either": {"type": ["integer", "string"]},
                "items": {"type": "array", "items": {"type": "number"}},
                "on": {"type": "boolean"},
                "colour": {"enum": ["red", "1"]},
                "x": {"type": "number"},
            },
        },
    },
}

Seen = tuple[str, list[tuple[str, Any]]]


def parse(text: str, form: str, cuts: list[int] | None = None, **use: Any) -> Seen:
    """Return the content and the calls of an answer that comes in pieces."""
    parser = ToolParser(ToolUse([TOOL], NAMES, form, **use))
    content, calls = "", []
    bounds = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts or [])})
    for begin, end in zip(bounds, [*bounds[1:], len(text)], strict=True):
        more, found = parser.push(text[begin:end])
        content, calls = content + more, calls + found
        assert parser.calls == len(calls)
    more, found = parser.finish()
    calls += found
    assert parser.calls == len(calls)
    assert len({call.id for call in calls}) == len(calls)
    return content + more, [(call.name, json.loads(call.arguments)) for call in calls]


def xml(*parameters: tuple[str, str], name: str = "f") -> str:
    values = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{values}</function>\n</tool_call>"


def v3(name: str = "f", arguments: str = '{"a": 1}') -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def v31(name: str = "f", arguments: str = '{"a": 1}') -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def all_of(*calls: str) -> str:
    return f"<｜tool▁calls▁begin｜>{''.join(calls)}<｜tool▁calls▁end｜>"


Case = tuple[str, str, str, list[tuple[str, Any]]]

# Family, answer, content and calls.
CALLS: list[Case] = [
    ("hermes", TAG, "", [F1]),
    ("hermes", f"\n\n{TAG}\n", "", [F1]),
    ("hermes", f"Let me see.\n{TAG}", "Let me see.", [F1]),
    ("hermes", f"{TAG}\n\nDone.\n", "Done.", [F1]),
    ("hermes", f"One, {TAG} two\n{TAG}\n", "One, two", [F1, F1]),
    ("hermes", f"<tool_call>{CALL}\n{CALL}</tool_call>", "", [F1, F1]),
    ("hermes", f"<tool_call>[{CALL}, {CALL}]</tool_call>", "", [F1, F1]),
    ("hermes", f"<tool_call>{CALL}", "", [F1]),
    ("hermes", f"<tool_call>{CALL}\n<tool_call>{CALL}</tool_call>", "", [F1, F1]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":"x</tool_call>y"}}</tool_call>', "",
     [("f", {"a": "x</tool_call>y"})]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":"{\\"b\\": \\"}]\\\\"}}</tool_call>', "",
     [("f", {"a": '{"b": "}]\\'})]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":"two\nlines"}}</tool_call>', "", [("f", {"a": "two\nlines"})]),
    ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\": 1}"}</tool_call>', "", [F1]),
    ("hermes", '<tool_call>{"name":"now","arguments":""}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name":"now"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name":"now","arguments":null}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name":"f","parameters":{"a":1}}</tool_call>', "", [F1]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":2,"a":1}}</tool_call>', "", [F1]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":1},"why":"?"}</tool_call>', "", [F1]),
    ("hermes", f'<tool_call>{{"type":"function","function":{CALL}}}</tool_call>', "", [F1]),
    ("hermes", xml(("a", "1")), "", [F1]),
    ("hermes", f"<tools>\n{CALL}\n</tools>", "", [F1]),
    ("hermes", f"<tool_call>nonsense {TAG}", "<tool_call>nonsense", [F1]),
    ("hermes", CALL, "", [F1]),
    ("hermes", f" {CALL}\n{CALL} ", "", [F1, F1]),
    ("hermes", f"[{CALL}]", "", [F1]),
    ("hermes", f"```json\n{CALL}\n```", "", [F1]),
    ("hermes", f"```\n{CALL}\n```\n", "", [F1]),
    ("hermes", f"```json\n{CALL}", "", [F1]),
    ("hermes", "[f(a=1)]", "", [F1]),
    ("qwen2.5-coder", TAG, "", [F1]),
    ("qwen2.5-coder", f"<tools>{CALL}</tools>", "", [F1]),
    ("qwen2.5-coder", f"<tools>{CALL}\n{CALL}</tools>", "", [F1, F1]),
    ("qwen2.5-coder", CALL, "", [F1]),
    ("qwen2.5-coder", f"To find out:\n```json\n{CALL}\n```\nand wait.", "To find out:\nand wait.", [F1]),
    ("qwen3_coder", xml(("a", "1")), "", [F1]),
    ("qwen3_coder", f"Well.\n{xml(name='now')}", "Well.", [NOW]),
    ("qwen3_coder", xml(("text", "1")) + "\n" + xml(("text", "a\nb")), "",
     [("f", {"text": "1"}), ("f", {"text": "a\nb"})]),
    ("qwen3_coder", xml(("text", "</parameter> and </function>")), "",
     [("f", {"text": "</parameter> and </function>"})]),
    ("qwen3_coder", xml(("text", " x ")), "", [("f", {"text": " x "})]),
    ("qwen3_coder", xml(("maybe", "null"), ("either", "5")), "", [("f", {"maybe": None, "either": 5})]),
    ("qwen3_coder", xml(("maybe", "5"), ("either", "[5]")), "", [("f", {"maybe": "5", "either": "[5]"})]),
    ("qwen3_coder", xml(("items", "[1, 2.5]"), ("on", "True")), "", [("f", {"items": [1, 2.5], "on": True})]),
    ("qwen3_coder", xml(("a", "many"), ("new", "1")), "", [("f", {"a": "many", "new": "1"})]),
    ("qwen3_coder", xml(("colour", "1"), ("x", "2")), "", [("f", {"colour": "1", "x": 2})]),
    ("qwen3_coder", '<function=f>{"a": 1}</function>', "", [F1]),
    ("qwen3_coder", TAG, "", [F1]),
    ("mistral", f"[TOOL_CALLS] [{CALL}]", "", [F1]),
    ("mistral", f"[TOOL_CALLS][{CALL}, {CALL}]", "", [F1, F1]),
    ("mistral", '[TOOL_CALLS]f{"a": 1}', "", [F1]),
    ("mistral", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]now[ARGS]{}', "", [F1, NOW]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{"a": 1}', "", [F1]),
    ("mistral", f"I look.[TOOL_CALLS] [{CALL}]\nSo.", "I look.\nSo.", [F1]),
    ("mistral", f"[{CALL}]", "", [F1]),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abc123XYZ"}]', "", [F1]),
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', "", [F1]),
    ("llama3_json", '{"type": "function", "name": "f", "parameters": {"a": 1}}', "", [F1]),
    ("llama3_json", '{"function": "f", "parameters": {"a": 1}}', "", [F1]),
    ("llama3_json", '{"type": "function", "function": "f", "parameters": {"a": 1}}', "", [F1]),
    ("llama3_json", '{"type": "function", "function": {"name": "f", "parameters": {"a": 1}}}', "", [F1]),
    ("llama3_json", f"{CALL}; {CALL}", "", [F1, F1]),
    ("llama3_json", f"<|python_tag|>{CALL}; {CALL}", "", [F1, F1]),
    ("llama3_json", "<|python_tag|>ns.g.call(a=1)", "", [("ns.g", {"a": 1})]),
    ("llama3_json", '{"name": "now"}', "", [NOW]),
    ("llama3_json", '<function=f>{"a": 1}</function>', "", [F1]),
    ("pythonic", "[f(a=1)]", "", [F1]),
    ("pythonic", " [f(a=1), now(), ns.g(b='x')]\n", "", [F1, NOW, ("ns.g", {"b": "x"})]),
    ("pythonic", "<|python_start|>[f(a=1)]<|python_end|>", "", [F1]),
    ("pythonic", "[f(a=-1.5, b=[1, (2,)], c={'d': None}, d=True, e=false, f=null)]", "",
     [("f", {"a": -1.5, "b": [1, [2]], "c": {"d": None}, "d": True, "e": False, "f": None})]),
    ("pythonic", "[f(a='it\\'s ]', b=\"(\\\"\")]", "", [("f", {"a": "it's ]", "b": '("'})]),
    ("pythonic", "[f(a='\\d')]", "", [("f", {"a": "\\d"})]),
    ("pythonic", CALL, "", [F1]),
    ("deepseek_v3", all_of(v3()), "", [F1]),
    ("deepseek_v3", "I look.\n" + all_of(v3(), "\n", v3("now", "{}")) + "\n", "I look.", [F1, NOW]),
    ("deepseek_v3", all_of(v31(), v31("now", "{}")), "", [F1, NOW]),
    ("deepseek_v3", v3(), "", [F1]),
    ("deepseek_v3", all_of(v3()).removesuffix("<｜tool▁calls▁end｜>"), "", [F1]),
    ("deepseek_v3", all_of(v3("f", '{"a": "```"}')), "", [("f", {"a": "```"})]),
    ("deepseek_v31", all_of(v31()), "", [F1]),
    ("deepseek_v3", all_of(v3()).replace("▁calls▁begin", "_calls_begin"), "", [F1]),
    ("deepseek_v3", all_of(v3(), v3("now", "{}")).replace("<｜tool▁call▁begin｜>", "", 1), "", [F1, NOW]),
    ("qwen3_coder", f"So.\n{xml(('a', '1')).removeprefix('<tool_call>')}\nDone.", "So.\nDone.", [F1]),
    ("qwen3_coder", '<function=f>{"a": 1}</function>\n\nDone.', "Done.", [F1]),
    ("xlam", f"[{CALL}, {CALL}]", "", [F1, F1]),
    ("nemotron_json", f"<TOOLCALL>[{CALL}, {CALL}]</TOOLCALL>", "", [F1, F1]),
    ("hermes", f"```xml\n{TAG}\n```", "", [F1]),
    ("hermes", f"So: <function_call>{CALL}</function_call>", "So:", [F1]),
    ("hermes", f"<tool>{CALL}</tool>", "", [F1]),
    ("hermes", f"<json>\n{CALL}\n</json>", "", [F1]),
    ("hermes", f"```xml\n<response>\n{CALL}\n</response>\n```", "", [F1]),
    ("hermes", '<function=f>{"a": 1}</function>', "", [F1]),
    ("hermes", '<function name="f">\n{"a": 1}\n</function>', "", [F1]),
    ("hermes", '<tool_call>{"name":"now","arguments":"null"}</tool_call>', "", [NOW]),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":"\\ud83d"}}</tool_call>', "", [("f", {"a": "\ud83d"})]),
    ("hermes", f"<tool_call>{TAG}", "", [F1]),
    ("hermes", f"So.\n<tool_call>\n{TAG}\n</tool_call>\n", "So.", [F1]),
    ("hermes", f"{TAG}</tool_call>\n</tool_call>{TAG} Done.", "Done.", [F1, F1]),
    ("hermes", f"{TAG} So </tool_call>", "So </tool_call>", [F1]),
    ("qwen3_coder", f"<tool_call>\n{xml(('a', '1'))}\n</tool_call>", "", [F1]),
    ("xlam", f"<tool_call>{TAG}", "", [F1]),
    ("mistral", f"[TOOL_CALLS][TOOL_CALLS] [{CALL}]", "", [F1]),
    ("llama3_json", f"<|python_tag|>\n<|python_tag|>{CALL}", "", [F1]),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>" + all_of(v3()) + "<｜tool▁calls▁end｜>", "", [F1]),
    ("hermes", f"So.<tool_call>{CALL}<tool_call>", "So.", [F1]),
    ("hermes", TAG.removesuffix("_call>"), "", [F1]),
    ("hermes", f"```json\n{CALL}\n`", "", [F1]),
    ("qwen3_coder", '<function=f>{"a": 1}</func', "", [F1]),
    ("qwen3_coder", "<function=f>\n<parameter=a>\n1\n</parameter>\n<", "", [F1]),
]  # fmt: skip

# Family and answer: all of it is text.
TEXTS: list[tuple[str, str]] = [
    ("hermes", ""),
    ("hermes", " \n"),
    ("hermes", "\n\nHello. \n"),
    ("hermes", "a < b and <tool> is no call <tool_cal"),
    ("hermes", "<tool_call>nonsense</tool_call> so"),
    ("hermes", '<tool_call>{"name": "rm", "arguments": {}}</tool_call>'),
    ("hermes", f'<tool_call>{{"name": "rm", "arguments": {{}}}}\n{CALL}</tool_call>'),
    ("hermes", f'<tool_call>{{"name": "rm", "arguments": {{"a": "{TAG}"}}}}</tool_call>'.replace('"f"', "'f'")),
    ("hermes", f"<tool_call>{CALL} and more</tool_call>"),
    ("hermes", '<tool_call>{"name": "f", "argum'),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":-1e999}}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":Infinity}}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":"{\\"a\\": 1e999}"}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":"a"}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":[1]}</tool_call>'),
    ("hermes", '<tool_call>{"name":["f"],"arguments":{}}</tool_call>'),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":' + "[" * 80 + "]" * 80 + "}}</tool_call>"),
    ("hermes", '<tool_call>{"name":"f","arguments":{"a":' + "1" * 5000 + "}}</tool_call>"),
    ("hermes", "<tool_call></tool_call>"),
    ("hermes", "</tool_call>"),
    ("hermes", "It writes </tool_call>\n"),
    ("hermes", "It writes <tool_call>\n"),
    ("hermes", f"<tool_call>{CALL}</tull"),
    ("hermes", "<tool_call><tool_call></tool_call>"),
    ("hermes", "<tool_call><tool_call>nonsense</tool_call></tool_call>"),
    ("hermes", "<tools>" + json.dumps(TOOL) + "</tools>"),
    ("hermes", "<tools>" + json.dumps({"type": "function", "function": {"name": "now"}}) + "</tools>"),
    ("hermes", "<tool_call>" + json.dumps(TOOL["function"]) + "</tool_call>"),
    ("hermes", json.dumps(TOOL["function"])),
    ("hermes", f"{CALL} is JSON"),
    ("hermes", f"I say {CALL}"),
    ("hermes", f"```json\n{CALL}\n```\nis JSON"),
    ("hermes", f"```python\n{CALL}\n```"),
    ("hermes", '{"name": "f"}'),
    ("hermes", '{"name": "f", "arguments": "null"}'),
    ("hermes", 'The <function name="f"> of <json>{"a": 1}</json> and <xml>'),
    ("hermes", '{"name": "f", "arguments": {}, "why": 1}'),
    ("hermes", '{"name": "rm", "arguments": {}}'),
    ("hermes", '{"answer": {"name": "f", "arguments": {}}}'),
    ("hermes", "[1, 2]"),
    ("hermes", "{}"),
    ("hermes", "[TOOL_CALLS] [f]"),
    ("qwen2.5-coder", "```python\nf(a=1)\n```\nSo."),
    ("qwen2.5-coder", '```json\n{"a": 1}\n```\nSo.'),
    ("qwen3_coder", xml(("a", "1"), name="rm")),
    ("qwen3_coder", "<function=f>\n<parameter=a>\n1\n"),
    ("qwen3_coder", "<function=>x</function>"),
    ("qwen3_coder", xml(("x", "1e999")).replace("<tool_call>", "<tool call>").replace("f", "g")),
    ("mistral", "[TOOL_CALLS] calls follow"),
    ("mistral", '[TOOL_CALLS]rm{"a": 1}'),
    ("mistral", '[TOOL_CALLS]f{"a": '),
    ("mistral", "[1] as Smith says"),
    ("llama3_json", '{"a": 1} is JSON'),
    ("llama3_json", '{"name": "f", "parameters": {"at": NaN}}'),
    ("llama3_json", f"I say {CALL}"),
    ("llama3_json", "<|python_tag|>print(1)"),
    ("llama3_json", "<|python_tag|>import os"),
    ("pythonic", "[f(1)]"),
    ("pythonic", "[f(a=g())]"),
    ("pythonic", "[f(a=1), rm()]"),
    ("pythonic", "[f(a=1, a=2)]"),
    ("pythonic", "[f(**{'a': 1})]"),
    ("pythonic", "[f(a=1e999)]"),
    ("pythonic", "[f(a=1j)]"),
    ("pythonic", "[f(a={1: 2})]"),
    ("pythonic", "[f(a=1), g]"),
    ("pythonic", "[f(a=0x" + "f" * 5000 + ")]"),
    ("pythonic", "[f(a=" + "-" * 100_000 + "1)]"),
    ("pythonic", "[f(a=1" + "+1" * 50_000 + ")]"),
    ("pythonic", "[f" + ".f" * 50_000 + "(a=1)]"),
    ("pythonic", "[f(a=1)] is a list"),
    ("pythonic", "[Note] that"),
    ("pythonic", "f(a=1)"),
    ("deepseek_v3", all_of(v3("rm"))),
    ("deepseek_v3", all_of(v3("f", '{"a": 1'))),
    ("deepseek_v3", "<｜tool▁calls▁begin｜>none"),
]


@pytest.mark.parametrize(("form", "answer", "content", "calls"), CALLS)
def test_every_family_writes_calls_in_its_own_way(form, answer, content, calls):
    assert parse(answer, form) == (content, calls)
    assert parse(answer, form, list(range(len(answer)))) == (content, calls)


@pytest.mark.parametrize(("form", "answer"), TEXTS)
def test_what_is_no_call_stays_text(form, answer):
    assert parse(answer, form) == (answer, [])
    if len(answer) < 10_000:
        assert parse(answer, form, list(range(len(answer)))) == (answer, [])


PIECES = [answer for _, answer, *_ in CALLS if len(answer) < 500]
PIECES += [answer for _, answer in TEXTS if len(answer) < 500]
PIECES += [part for family in FAMILIES.values() for part in family.markers]


@given(
    form=st.sampled_from(sorted(FAMILIES)),
    answer=st.lists(st.sampled_from([*PIECES, "Well, ", "\n", " ", "{", "[", '"', "```"]), max_size=4).map("".join),
    cuts=st.lists(st.integers(0, 1000), max_size=12),
    one_only=st.booleans(),
)
def test_the_pieces_make_no_difference(form, answer, cuts, one_only):
    assert parse(answer, form, cuts, one_only=one_only) == parse(answer, form, one_only=one_only)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("hermes", '<tool_call>{\\"'),
        ("hermes", "<tool_call>x"),
        ("hermes", "<tool_call>"),
        ("hermes", '<tool_call>{"a": "'),
        ("qwen3_coder", "<function=f><parameter=a>"),
        ("qwen3_coder", "</parameter>"),
        ("qwen2.5-coder", "```"),
        ("mistral", "[TOOL_CALLS]f{"),
        ("pythonic", "[f('"),
        ("deepseek_v3", "<｜tool▁calls▁begin｜>"),
    ],
)
def test_a_long_answer_of_markers_takes_a_time_of_its_length(form, text):
    """By steps of the readers, which do not depend on the machine."""
    steps = []
    for count in (1000, 4000):
        seen = 0

        def count_calls(frame, event, arg):
            nonlocal seen
            seen += event == "call"

        sys.setprofile(count_calls)
        try:
            found = parse(text * count, form, list(range(0, len(text) * count, 50)))
        finally:
            sys.setprofile(None)
        assert found == (text * count, [])
        steps.append(seen)
    assert steps[1] < 6 * steps[0]


@pytest.mark.parametrize(
    ("form", "answer", "content"),
    [
        ("hermes", f"{TAG}\n{TAG}", ""),
        ("hermes", f"One. {TAG} Two. {TAG} Three.", "One. Two. Three."),
        ("hermes", f"<tool_call>[{CALL}, {CALL}]</tool_call>", ""),
        ("hermes", f"{CALL}\n{CALL}", ""),
        ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]now{}', ""),
        ("pythonic", "[f(a=1), now()]", ""),
        ("deepseek_v3", all_of(v3(), v3("now", "{}")), ""),
    ],
)
def test_of_several_calls_only_the_first_counts_if_asked_so(form, answer, content):
    assert parse(answer, form, one_only=True) == (content, [F1])


def test_text_is_not_held_back_longer_than_it_may_be_a_call():
    parser = ToolParser(ToolUse([TOOL], NAMES, "hermes"))
    assert [parser.push(text)[0] for text in ("Well", " <", "b> ", "c\n")] == ["Well", "", " <b>", " c"]
    for begin in ('{"answer": ', "```python\n", "[1, ", "[TOOL] "):
        assert ToolParser(ToolUse([TOOL], NAMES, "hermes")).push(begin)[0] == begin.rstrip()


def test_a_call_is_told_as_soon_as_it_is_complete():
    parser = ToolParser(ToolUse([TOOL], NAMES, "hermes"))
    assert len(parser.push(TAG)[1]) == 1


def test_arguments_can_be_sent_whatever_a_model_escapes():
    (call,) = ToolParser(ToolUse([], NAMES, "hermes")).push(TAG.replace("1", '"\\ud83d é"'))[1]
    assert json.dumps(call.as_json(), ensure_ascii=False).encode()


def test_mistral_has_ids_that_its_templates_take():
    for form, size in (("mistral", 9), ("hermes", 29)):
        (call,) = ToolParser(ToolUse([], NAMES, form)).push(f"[TOOL_CALLS][{CALL}]{TAG}")[1]
        assert len(call.id) == size
        assert call.id.removeprefix("call_").isalnum()


FORM = StructuredOutput(json_object=True)


@pytest.mark.parametrize("form", ["hermes", "mistral", None])
def test_a_forced_call_is_all_or_nothing(form):
    assert parse(CALL, form, [5, 9], forced=FORM, one_only=True) == ("", [F1])
    assert parse(f"[{CALL}, {CALL}]", form, [5, 9], forced=FORM) == ("", [F1, F1])
    for size in range(len(CALL)):
        assert parse(CALL[:size], form, [5, 9], forced=FORM, one_only=True) == ("", [])


def test_how_answers_with_calls_end():
    auto, forced = ToolUse([], NAMES, "hermes"), ToolUse([], NAMES, "hermes", FORM)
    named = ToolUse([], NAMES, "hermes", FORM, is_named=True)
    assert [use.ends("stop", 1) for use in (auto, forced, named)] == ["tool_calls", "tool_calls", "stop"]
    assert [use.ends("length", 1) for use in (auto, forced, named)] == ["tool_calls", "length", "length"]
    assert [use.ends("length", 0) for use in (auto, forced, named)] == ["length"] * 3


@pytest.mark.parametrize(
    ("template", "family"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("<tool_call><function=f><parameter=p>", "qwen3_coder"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>", "deepseek_v3"),
        ('tools {"name": function name, "parameters": dictionary} <|python_tag|>', "llama3_json"),
        ('{% if tools %}{"name": x, "parameters": y}', "llama3_json"),
        ("tools <TOOLCALL>[...]</TOOLCALL>", "nemotron_json"),
        ("tools [func_name1(params_name1=params_value1)]", "pythonic"),
        ("{{ messages }}", None),
        ('"parameters"', None),
    ],
)
def test_the_template_shows_the_family(template, family):
    assert family_name("auto", template) == family
    assert family_name("none", template) is None
    assert family_name("mistral", template) == "mistral"


def test_the_parser_can_be_had_where_tools_are_read():
    from eightfold.server import tools

    assert tools.ToolParser is ToolParser
    assert tools.ToolUse([], frozenset({"f"}), "tagged", None, one_only=True).family is FAMILIES["hermes"]
