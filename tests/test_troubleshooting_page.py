"""How docs/troubleshooting.md is made of the errors in the code; `make lint` tells whether it is up to date."""

from __future__ import annotations

import ast
import re

import pytest
from make_troubleshooting import CHINESE, KNOWN_LATER, PAGES, TOPICS, errors_by_topic, fill, said, spelt, topic_of


def test_a_message_is_spelt_with_words_for_what_a_run_knows() -> None:
    def shown(text: str) -> str:
        return spelt(ast.parse(text, mode="eval").body, {"_MERGE": ast.Constant("Merge it.")})

    assert shown('f"tensor {name} of {config.dtype}"') == "tensor NAME of DTYPE"
    assert shown('"a link" if x else f"{len(files)} files"') == "a link | FILES files"
    assert shown('"Do. " + _MERGE') == "Do. Merge it."
    assert shown("None") == ""


def test_every_module_has_a_topic_and_every_topic_a_message() -> None:
    assert topic_of("quant/dataset") == "calibration"
    assert topic_of("quant/smooth") == "weights"
    assert topic_of("cli/main") == "other"
    assert all(errors_by_topic()[topic] for topic in TOPICS)
    assert sum(map(len, errors_by_topic().values())) > 300


def test_a_page_without_a_topic_is_refused() -> None:
    text = next(iter(PAGES)).read_text("utf-8").replace("<!-- errors: hubs -->", "")
    with pytest.raises(ValueError, match="topics of the page"):
        fill(text, "en")


def test_every_next_step_is_translated_and_every_translation_used() -> None:
    steps = {action for rows in errors_by_topic().values() for _, _, action in rows if action}
    assert {step for step in steps if not KNOWN_LATER.fullmatch(step)} == set(CHINESE), "see docs/next_steps.zh.json"
    assert all(re.search(r"[\u4e00-\u9fff]", said(step, "zh")) for step in steps)
    for step, chinese in CHINESE.items():  # what is typed is the same in both languages
        assert set(re.findall(r"`[^`]+`|--[a-z]+[a-z-]*", step)) <= set(
            re.findall(r"`[^`]+`|--[a-z]+[a-z-]*", chinese)
        ), step
