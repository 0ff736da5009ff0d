"""The pages of `eval` and `bench`: their numbers are those that the commands print."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from eightfold.evaluate import Evaluation, Positions
from eightfold.model.native.measure import Measurement, Rates
from eightfold.report import bench_page, evaluation_page
from eightfold.report.evaluation_page import Measured
from eightfold.report.page import number
from tests.refusal import refused
from tests.report.parsing import Page

CHUNKS = [list(range(300)), list(range(300, 600)), list(range(600, 900))]


def measured(chunks=CHUNKS, against: str | None = "float <b>model</b>", model="judged", seed=0):
    """Return positions whose KL is known: large at position 0, largest at position 7 of the second chunk."""
    draw, positions = np.random.default_rng(seed), Positions()
    for at, chunk in enumerate(chunks):
        count = len(chunk) - 1
        positions.nll.append(draw.uniform(1, 4, count))
        positions.top.append(np.array(chunk[1:]))
        if against is not None:
            positions.nll_against.append(draw.uniform(1, 4, count))
            positions.top_against.append(np.array(chunk[1:]) + (np.arange(count) % 10 == 0))
            kl = draw.lognormal(-6, 1, count)
            kl[0] = 0.5
            if at == 1:
                kl[7] = 0.75
            positions.kl.append(kl)
    result = positions.average(len(chunks))
    decode = lambda ids: "".join(f"<{each}>" for each in ids)  # noqa: E731
    return Measured(result, positions, chunks, decode, model, against, "a & b.txt")


def test_the_page_of_an_evaluation_has_its_averages():
    found = measured()
    page = Page(evaluation_page.render(found))
    page.require_alone()
    result = found.result
    assert page.inside("h1") == [
        f"judged is {number(result.kl_mean)} nats away from float <b>model</b>: "
        f"{100 * result.top1_agreement:.1f} % of its likeliest tokens are the same"
    ]
    figures = page.inside("dd")
    assert figures[0::2][:2] == [number(result.kl_mean), number(result.kl_p99)]
    assert f"{result.ppl:.4f}" in figures
    change = 100 * (result.ppl / result.ppl_against - 1)
    assert f"{change:+.2f} % to {result.ppl_against:.4f} of float <b>model</b>" in figures
    assert page.inside("h2") == [
        "KL by position in a chunk", "KL by chunk", "How KL spreads", "Where it is worst",
    ]  # fmt: skip


def test_averages_by_place_are_those_of_the_positions():
    found = measured()
    page = Page(evaluation_page.render(found))
    by_chunk = [float(each.mean()) for each in found.positions.kl]
    chunks = next(rows for rows in page.tables if rows[0][0] == "Chunks")
    assert chunks[1:] == [[str(at), number(value)] for at, value in enumerate(by_chunk)]
    assert {*by_chunk} <= {*page.exact}
    places = next(rows for rows in page.tables if rows[0][0] == "Positions")
    kl = np.stack(found.positions.kl)  # (3, 299)
    assert places[1] == ["0", "0.500"]
    assert places[2] == ["1 to 5", number(float(kl[:, 1:6].mean()))]
    assert places[-1] == ["296 to 298", number(float(kl[:, 296:].mean()))]
    assert f"position 1 to 5: {places[2][1]} nats" in page.inside("title")


def test_every_position_is_in_the_histogram_once_and_quantiles_are_right():
    found = measured()
    page = Page(evaluation_page.render(found))
    counts = [int(text.split(" positions")[0].split(": ")[1].replace(",", ""))
              for text in page.inside("title") if " positions, " in text]  # fmt: skip
    assert sum(counts) == 3 * 299
    spread = next(rows for rows in page.tables if rows[0][0] == "Share of positions")
    assert spread[1] == ["50.0 %", number(float(np.quantile(found.values, 0.5)))]
    assert spread[-1] == ["100.0 %", "0.750"]


def test_the_worst_positions_have_their_context_and_both_opinions():
    page = Page(evaluation_page.render(measured()))
    worst = next(rows for rows in page.tables if "Float says" in rows[0])
    assert worst[1] == [
        "0.750", "".join(f"<{at}>" for at in range(300, 308)), "<308>", "<308>", "<308>", "1, 7",
    ]  # fmt: skip
    assert [row[0] for row in worst[2:5]] == ["0.500"] * 3
    assert worst[2][1:] == ["<0>", "<1>", "<2>", "<1>", "0, 0"]
    assert len(worst) == 16


def test_without_another_model_the_page_is_about_the_loss():
    found = measured(CHUNKS[:1], against=None)
    page = Page(evaluation_page.render(found))
    assert page.inside("h1") == [f"judged has a perplexity of {number(found.result.ppl)} on 299 tokens"]
    assert page.inside("h2") == ["Loss by position in a chunk", "How loss spreads", "Where it is worst"]
    worst = next(rows for rows in page.tables if "The model says" in rows[0])
    assert worst[1][0] == number(float(found.positions.nll[0].max()))
    assert "Float says" not in worst[0]


def test_chunks_of_two_tokens_and_models_that_are_the_same_are_drawn():
    found = measured([[1, 2]])
    found.positions.kl[:] = [np.zeros(1)]
    same = replace(found, result=Evaluation(1.0, 2.7, 1, 1, 2.7, 0.0, 0.0, 1.0))
    page = Page(evaluation_page.render(same))
    assert "judged is 0 nats away" in page.inside("h1")[0]


RESULT = {
    "prefill_tok_s": 812.5,
    "decode_tok_s": 51.25,
    "output_tok_s": 44.0,
    "bytes_per_token": 164_000_000,
    "read_gb_s": 8.4,
    "measured_bandwidth_gb_s": 12.0,
    "bandwidth_fraction": 0.7,
    "measured_int8_tops": 0.5,
    "int8_fraction": 0.38,
    "peak_rss_mib": 245.0,
    "isa": "avx512",
    "threads": 2,
    "batch": 1,
    "prompt_len": 512,
    "new_tokens": 128,
    "repeat": 3,
    "weights_bytes": 161_000_000,
    "kv_bytes_per_token": 23_040,
    "world_size": 1,
    "resident_weights_mib": [],
    "load_s": 0.5,
}

RATES = [Rates(800.0, 50.0, 43.0), Rates(812.5, 51.25, 44.0), Rates(900.0, 52.0, 45.0)]
BENCHED = Measurement(RATES, [11.0, 12.0, 13.0], [0.4, 0.5, 0.6])


def test_the_page_of_a_benchmark_has_what_was_reached_and_the_limits():
    page = Page(bench_page.render(RESULT, BENCHED, "m <i>", "W8A8"))
    page.require_alone()
    assert page.inside("h1") == ["m <i> decodes 51.2 tokens a second: 70 % of what this machine's memory can read"]
    values = [text for path, text in page.texts if path[-3:] == ("li", "div", "span")]
    assert values == ["8.40 of 12.0 GB/s, 70 %", "0.190 of 0.500 TOPS, 38 %"]
    assert {"weights: 161.0 MB", "keys and values: 3.0 MB"} <= {*page.inside("li")}
    table = next(rows for rows in page.tables if rows[0][0] == "Run")
    assert table[1:] == [
        ["1", "50.0", "800", "11.0", "0.400"],
        ["2", "51.2", "812", "12.0", "0.500"],
        ["3", "52.0", "900", "13.0", "0.600"],
    ]
    once = Page(bench_page.render({**RESULT, "repeat": 1, "peak_rss_mib": None}, BENCHED, "m", "W8A8"))
    assert "Each repetition" not in once.inside("h2")
    assert "Peak memory" not in once.inside("dt")


def test_eval_and_bench_write_what_they_print(cli, tmp_path, float_model):
    out = tmp_path / "out"
    assert cli("quantize", float_model, out, "--scheme", "w8a16").code == 0
    words = ("--against", float_model, "--chunks", 2, "--chunk-len", 24, "--json", "--html", tmp_path / "eval.html")
    printed = cli("eval", out, *words).json()
    page = Page((tmp_path / "eval.html").read_text("utf-8"))
    assert f"out is {number(printed['kl_mean'])} nats away from float" in page.inside("h1")[0]
    assert [f"{printed['ppl']:.4f}", f"{printed['tokens']:,}"] == [
        text for text in page.inside("dd") if text in (f"{printed['ppl']:.4f}", f"{printed['tokens']:,}")
    ]
    words = ("--prompt-len", 8, "--new-tokens", 4, "--repeat", 1, "--json", "--html", tmp_path / "bench.html")
    printed = cli("bench", out, *words).json()
    page = Page((tmp_path / "bench.html").read_text("utf-8"))
    assert number(printed["decode_tok_s"]) in page.inside("dd")


@pytest.mark.parametrize("command", ["eval", "bench"])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_measured(cli, tmp_path, float_model, command):
    message = refused(cli, command, float_model, "--html", tmp_path / "no" / "x.html", within=tmp_path)
    assert message.replace(str(tmp_path), "T") == (
        "--html: got T/no/x.html, whose folder does not exist, expected a file in a folder that exists"
    )
