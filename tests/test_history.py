"""The history of ratios: what counts as better, and that pages and pictures are made of all its lines."""

from __future__ import annotations

from typing import Any

import pytest

import history
from history_picture import WORDS, picture

NATIVE: dict[str, Any] = {
    "commit": "abc1234",
    "date": "2026-01-02",
    "cpu": "A",
    "threads": 2,
    "rows": [
        {"rounds": 3},
        {
            "model": "M",
            "shape": "1x2x3",
            "program": "eightfold W8A8",
            "peak_rss_mib": 50,
            "ratios": {"vllm": {"prefill_tok_s": [3.0, 1.0, 2.0], "decode_tok_s": [4.0], "output_tok_s": [5.0]}},
        },
        {"model": "M", "shape": "1x2x3", "program": "vllm", "peak_rss_mib": 200},
    ],
}


def test_a_line_holds_medians_and_ends_of_the_rounds() -> None:
    line = history.line_of("1.2.0", {"native-m": NATIVE})
    assert (line["version"], line["date"]) == ("1.2.0", "2026-01-02")
    assert line["ratios"] == [
        ["M, 1x2x3, W8A8", "prompts", "vllm", 2.0, 1.0, 3.0, "abc1234"],
        ["M, 1x2x3, W8A8", "answers", "vllm", 4.0, 4.0, 4.0, "abc1234"],
        ["M, 1x2x3, W8A8", "memory", "vllm", 0.25, 0.25, 0.25, "abc1234"],
    ]


@pytest.mark.parametrize(
    ("kind", "before", "after", "said"),
    [
        ("answers", [2.0, 1.9, 2.1, "a"], [2.5, 2.4, 2.6, "b"], "better"),
        ("answers", [2.5, 2.4, 2.6, "a"], [2.0, 1.9, 2.1, "b"], "worse"),
        ("time", [2.0, 1.9, 2.1, "a"], [2.5, 2.4, 2.6, "b"], "worse"),
        ("KL", [0.01, 0.01, 0.01, "a"], [0.005, 0.005, 0.005, "b"], "better"),
        ("answers", [2.0, 1.9, 2.1, "a"], [2.15, 2.12, 2.2, "b"], "as before"),  # less than 10 %
        ("answers", [2.0, 1.0, 2.45, "a"], [2.5, 2.4, 2.6, "b"], "as before"),  # rounds that meet
        ("answers", [2.0, 1.9, 2.1, "a"], [2.5, 2.4, 2.6, "a"], "not measured since"),
    ],
)
def test_better_is_what_no_noise_explains(kind: str, before: list[Any], after: list[Any], said: str) -> None:
    assert history.verdict(kind, before, after) == said


def test_table_and_picture_show_what_two_releases_have() -> None:
    old = history.line_of("1.9.0", {"native": NATIVE})
    new = history.line_of("1.10.0", {"native": {**NATIVE, "commit": "def"}})
    new["ratios"][1][3:6] = [8.0, 8.0, 8.0]
    new["ratios"].append(["only new", "answers", "vllm", 1.0, 1.0, 1.0, "def"])
    found = history.table(old, new)
    assert "| M, 1x2x3, W8A8 | answers / vllm | 4.00 | 8.00 | better |" in found
    assert "only new" not in found
    drawn = picture([old, new], "zh")
    assert drawn.count("<circle") == 2 + 2 * 2  # of the key, and of two ratios of speed
    assert "M, 1x2x3, W8A8, decode / vllm, 1.10.0: 8" in drawn
    assert set(WORDS["en"]) == set(WORDS["zh"])
    assert [line.split('"')[3] for line in history.written([new, old]).splitlines()] == ["1.9.0", "1.10.0"]
