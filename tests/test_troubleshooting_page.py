"""How docs/troubleshooting.md is made of the errors in the code; `make lint` tells whether it is up to date."""

from __future__ import annotations

import ast

import pytest
from make_troubleshooting import PAGES, TOPICS, errors_by_topic, fill, spelt, topic_of


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
