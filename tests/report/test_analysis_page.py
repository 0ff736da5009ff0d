"""The page of an analysis: its numbers, its words, and that nothing in it comes from elsewhere."""

from __future__ import annotations

import dataclasses
import math

import pytest

from eightfold.errors import ConfigError
from eightfold.quant.analysis import Analysis, Choice, InputRange
from eightfold.report.analysis_page import render
from eightfold.report.charts import step_of, steps
from eightfold.report.page import number, percent, require_place, rounded, visible, write_page
from tests.report.parsing import Page
from tests.report.samples import small_model

HEADINGS = [
    "Where the loss is",
    "What hurts most",
    "How each linear is stored, and why",
    "What the linears read",
    "Sizes",
]


@pytest.fixture(scope="module")
def full() -> Page:
    return Page(render(small_model()))


def test_a_page_stands_alone(full):
    full.require_alone()
    assert full.tags.count("h1") == 1
    policy = [value for _, name, value in full.attributes if name == "content" and value and "default-src" in value]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    assert full.inside("h2") == HEADINGS


def test_what_was_found_is_the_heading(full):
    found = small_model()
    total = sum(each.loss["W8A8"] for each in found.groups)
    down = sum(each.loss["W8A8"] for each in found.groups if each.group == "down")
    worst = max(each.loss["W8A8"] for each in found.groups)
    assert full.inside("h1") == [
        f"With W8A8 everywhere, SmolLM2-135M-Instruct would lose about {number(total)} nats, "
        f"{percent(down / total)} of it in down_proj (layer 11 alone: {percent(worst / total)})".replace("\xa0", " ")
    ]
    counts = [sum(each.type == kind for each in found.choices) for kind in ("FLOAT", "W8A16")]
    text = " ".join(full.inside("header"))
    assert f"So {counts[0]} linears are kept float and {counts[1]} linear is W8A16." in text
    assert "Measured on 8,176 tokens it was not calibrated on" in text
    for figure in ("0.00632", "95.4 %", "221.9 MB", "82 % of 269.0 MB in float", "18,734 tokens"):
        assert figure in full.inside("dd")


def test_every_loss_is_in_a_picture_and_in_a_table_with_all_its_digits(full):
    found = small_model()
    titles = full.inside("title")
    table = next(rows for rows in full.tables if rows[0][2:5] == ["W8A8", "W8A8_DYNAMIC", "W8A16"])
    assert len(table) == 1 + 120
    for each, row in zip(found.groups, table[1:], strict=True):
        assert int(row[0]) == each.layer
        assert row[2:5] == [number(each.loss[kind]) for kind in table[0][2:5]]
        assert row[5:9] == [f"{each.bytes[kind]:,}" for kind in ("FLOAT", *table[0][2:5])]
        for kind in table[0][2:5]:
            start = f"layer {each.layer}, {row[1]}, {kind}: {number(each.loss[kind])} nats, "
            assert sum(title.startswith(start) for title in titles) == 1
    values = [each.loss[kind] for each in found.groups for kind in table[0][2:5]]
    assert {*values} <= {*full.exact}


def test_the_worst_groups_come_first_with_what_others_would_cost(full):
    each = max(small_model().groups, key=lambda group: group.loss["W8A8"])
    labels = [text for path, text in full.texts if path[-3:] == ("li", "div", "b")]
    assert labels[0] == "layer 11, down_proj"
    more = each.bytes["FLOAT"] - each.bytes["W8A8"]
    assert full.inside("small")[0] == (
        f"Instead: W8A8_DYNAMIC {number(each.loss['W8A8_DYNAMIC'])}, same size; W8A16 {number(each.loss['W8A16'])}, "
        f"same size; float {more / 1e3:.1f} kB more. Chosen: W8A16."
    )


def test_inputs_have_their_outlier_channels_and_tokens(full):
    table = next(rows for rows in full.tables if "Tokens" in rows[0])
    assert table[1][:5] == ["11", "down_proj", "3,512", number(small_model().ranges[47].ordinary), table[1][4]]
    assert table[1][4].startswith("1149 (3,512), 37 (1,254)")
    assert table[1][5].startswith("<|im_start|> (3,512, text 0, position 0), \\n (")
    assert any(title.startswith("layer 11, down_proj: -2,107 to 3,512; ordinary") for title in full.inside("title"))
    ranges = next(rows for rows in full.tables if "Ordinary tokens up to" in rows[0])
    assert [row[2:5] for row in ranges[1:]] == [
        [number(each.lo), number(each.hi), number(each.ordinary)] for each in small_model().ranges
    ]


def test_every_linear_and_why_it_is_stored_so(full):
    found = small_model()
    table = next(rows for rows in full.tables if rows[0] == ["Linear", "Stored as", "Why"])
    assert table[1:] == [[each.linear, each.type, each.reason] for each in found.choices]
    summary = next(rows for rows in full.tables if "Such as" in rows[0])
    assert sum(int(row[1]) for row in summary[1:]) == len(found.choices)
    assert full.inside("title")[0].startswith("SmolLM2-135M-Instruct, W8A8 for vllm-ascend")


def test_what_a_token_reads_adds_up(full):
    found = small_model()
    kinds = {each.linear: each.type for each in found.choices}
    total = sum(each.bytes[kinds[each.linears[0]]] for each in found.groups)
    assert f"As chosen: {total / 1e6:.1f} MB " in full.inside("h3")


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "a&b\"c'd</title>", "\x1b[2J\x00\u202e"])
def test_names_and_tokens_are_text(name):
    found = small_model(name, 2)
    strange = InputRange(0, "down", -9.0, 9.0, 1.0, ((3, 9.0),), ((0, 0, name, 9.0),))
    choice = Choice(f"model.layers.0.{name}", name, name)
    html = render(
        dataclasses.replace(found, ranges=(strange, *found.ranges), choices=(*found.choices, choice), target=name),
        {name: name},
        (name,),
    )
    page = Page(html)
    page.require_alone()
    assert visible(name) in "".join(page.inside("h1"))
    assert not set(html) & {"\x00", "\x1b", "\u202e"}


def test_only_what_is_known_is_shown():
    found = small_model(is_chosen=False)
    page = Page(render(found))
    assert page.inside("h2") == [*HEADINGS[:2], *HEADINGS[3:]]
    assert "A dot marks" not in " ".join(page.inside("p"))
    assert "So " not in " ".join(page.inside("header"))
    bare = dataclasses.replace(small_model(), groups=(), kl=None, top1=None, held_out_tokens=None)
    page = Page(render(bare, {"layer 0 qkv": "alpha 0.9, beta 0.1"}, ("A note.",)))
    assert page.inside("h2") == [HEADINGS[2], HEADINGS[3], "How inputs were smoothed", HEADINGS[4], "Notes"]
    quantized = sum(each.type != "FLOAT" for each in bare.choices)
    assert page.inside("h1") == [
        f"{quantized} of {len(bare.choices)} linears of SmolLM2-135M-Instruct are stored in 8 bits, at 82 % of its size"
    ]
    empty = Page(render(Analysis("m", "W8A8", None, 0, 0, 0)))
    assert (empty.inside("h2"), empty.inside("h1")) == ([], ["What the linears of m read"])


def test_a_model_of_one_layer_and_one_without_losses_are_drawn():
    one = Page(render(small_model(layers=1)))
    assert "layer 0 alone" in one.inside("h1")[0]
    groups = tuple(
        dataclasses.replace(each, loss=dict.fromkeys(each.loss, 0.0)) for each in small_model(layers=2).groups
    )
    flat = Page(render(dataclasses.replace(small_model(layers=2), groups=groups)))
    assert "What hurts most" not in flat.inside("h2")
    assert "in 8 bits" in flat.inside("h1")[0]


def test_numbers_are_short_and_say_something():
    values = [0, 3512.4, 99.95, 0.0063211, -2.5, 2.14e-6, 1234567.0, None, math.inf]
    assert [number(value) for value in values] == [
        "0", "3,512", "100.0", "0.00632", "-2.50", "2.1·10⁻⁶", "1,234,567", "–", "inf",
    ]  # fmt: skip
    assert [percent(share).replace("\xa0", " ") for share in (0, 0.001, 0.5, 0.999, 1)] == [
        "0 %", "less than 1 %", "50 %", "more than 99 %", "100 %",
    ]  # fmt: skip
    assert percent(0.9541, 1) == "95.4\xa0%"
    assert [rounded(value) for value in (1.0, 0.3, 0.00001, 1e-6, 30.0)] == ["1", "0.3", "0.00001", "0.000001", "30"]


def test_colours_go_by_thirds_of_a_power_of_ten_and_by_powers_where_losses_lie_far_apart():
    assert steps([0.02, 0.001, 0.004]) == [3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
    assert steps([0.4, 1e-5, 1e-6, 1e-4]) == [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1]
    assert len(steps([])) == len(steps([0.0, 0.0])) == 6
    thresholds = steps([0.02])
    assert [step_of(value, thresholds) for value in (0, 3e-5, 0.00299, 0.02)] == [0, 1, 4, 6]


def test_a_page_is_written_whole_and_a_place_that_cannot_be_is_refused(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("before")
    require_place(path, "html")
    write_page(path, "<p>ä</p>")
    assert path.read_text("utf-8") == "<p>ä</p>"
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]
    for place, got in ((tmp_path / "no" / "page.html", "whose folder does not exist"), (tmp_path, "a directory")):
        with pytest.raises(ConfigError, match=f"^html: got .*{got}"):
            require_place(place, "html")
