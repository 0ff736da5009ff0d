"""What a model thinks, told from what it answers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eightfold.engine.reasoning import STYLES, ReasoningParser, Style

OPENS, SILENT = STYLES["qwen3"], STYLES["deepseek_r1"]


def split(pieces, style=OPENS, *, begins_inside=False):
    parser = ReasoningParser(style, begins_inside=begins_inside)
    found = [*map(parser.push, pieces), parser.finish()]
    return "".join(reasoning for reasoning, _ in found), "".join(content for _, content in found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>\nOkay.\nSo\n</think>\n\n    Hi\n", ("Okay.\nSo", "    Hi\n")),
        ("\n <think>Okay</think>Hi", ("Okay", "Hi")),
        ("<think>\n\n</think>\n\nHi", ("", "Hi")),
        ("<think>Okay\n", ("Okay", "")),
        ("<think>Okay\n</thin", ("Okay\n</thin", "")),
        ("<think>\nOkay</think>\n\n", ("Okay", "")),
        ("<think>a</think>b<think>c</think>", ("a", "b<think>c</think>")),
        # No thought at the beginning: nothing changes.
        ("\n\n Hi\n", ("", "\n\n Hi\n")),
        ("Hi <think>a</think>b", ("", "Hi <think>a</think>b")),
        ("a</think>b", ("", "a</think>b")),
        ("<thi", ("", "<thi")),
        (" \n", ("", " \n")),
    ],
)
def test_a_thought_that_the_model_opens(text, expected):
    assert split([text]) == split(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Okay\n</think>\n\nHi", ("Okay", "Hi")),
        ("<think>\nOkay\n</think>\n\nHi", ("Okay", "Hi")),  # opened twice
        ("\nOkay, <th", ("Okay, <th", "")),
        ("</think>Hi", ("", "Hi")),
        ("<think", ("<think", "")),
    ],
)
@pytest.mark.parametrize(("style", "begins_inside"), [(OPENS, True), (SILENT, True), (SILENT, False)])
def test_a_thought_that_is_open_already(text, expected, style, begins_inside):
    assert split([text], style, begins_inside=begins_inside) == expected
    assert split(text, style, begins_inside=begins_inside) == expected


def test_without_a_style_all_is_content():
    text = "\n<think>\nOkay</think>\n\nHi\n"
    assert split([text], None) == split(text, None, begins_inside=True) == ("", text)


STYLE = st.sampled_from([*STYLES.values(), Style("<<", "<<<>"), Style("\n#", "\n\n#")])
TEXT = st.lists(st.sampled_from(["begin", "end", "half", "\n", " ", "<", "a", "\u00e9"]), max_size=12)


@settings(max_examples=400, deadline=None)
@given(style=STYLE, parts=TEXT, begins_inside=st.booleans(), data=st.data())
def test_streamed_is_whole_for_every_cut(style, parts, begins_inside, data):
    known = {"begin": style.begin, "end": style.end, "half": style.end[: len(style.end) // 2]}
    text = "".join(known.get(part, part) for part in parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = split([text], style, begins_inside=begins_inside)
    assert split(pieces, style, begins_inside=begins_inside) == split(text, style, begins_inside=begins_inside) == whole
