"""The page of `bench`: what this machine can do, and how much of it a model reaches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median
from typing import Any

from markupsafe import Markup

from eightfold.model.native.measure import Measurement
from eightfold.report.charts import Bar, bars, columns, stack
from eightfold.report.page import Section, count_of, data, folded, legend, number, page, pair, paragraph, percent, table
from eightfold.report.page import tiles as tiles_of
from eightfold.values import size_text

_SERIES = {
    "decode_tok_s": ("decoding", "tokens a second"),
    "prefill_tok_s": ("prompts", "tokens a second"),
    "read_gb_s": ("limit of reading", "GB/s"),
    "int8_tops": ("limit of int8 products", "TOPS"),
}


def render(result: Mapping[str, Any], found: Measurement, model: str, scheme: str) -> str:
    """Return the page of a benchmark.

    Args:
        result: what `eightfold bench --json` prints.
        found: each repetition.
        model: what the model is called.
        scheme: its type.
    """
    finding = (
        f"{model} decodes {number(result['decode_tok_s'])} tokens a second: "
        f"{percent(result['bandwidth_fraction'])} of what this machine's memory can read"
    )
    lead = paragraph(
        f"Prompts pass at {number(result['prefill_tok_s'])} tokens a second, {percent(result['int8_fraction'])} of its "
        "int8 products.",
        "lead",
    )
    sections = [_limits(result), _bytes(result), *_repetitions(result, found), _facts(result)]
    return page(f"{model}, {scheme}, on {result['isa']}", finding, lead + _tiles(result), sections)


def _tiles(result: Mapping[str, Any]) -> Markup:
    memory, peak = result["weights_bytes"], result["peak_rss_mib"]
    facts = [
        ("Decoding", number(result["decode_tok_s"]), "tokens a second"),
        ("Prompts", number(result["prefill_tok_s"]), "tokens a second"),
        ("Output", number(result["output_tok_s"]), "tokens a second, prompts included"),
        ("Loaded in", f"{result['load_s']:.2f} s", f"{size_text(memory)} of weights"),
    ]
    return tiles_of([*facts, *([] if peak is None else [("Peak memory", f"{peak:,.0f} MiB", "of the first process")])])


def _limits(result: Mapping[str, Any]) -> Section:
    reading, limit = result["read_gb_s"], result["measured_bandwidth_gb_s"]
    products, most = result["int8_fraction"] * result["measured_int8_tops"], result["measured_int8_tops"]
    about = (
        "A bar is what the model reached, its track what this machine did at most at the same time. Decoding reads "
        "every weight once a step, so memory is its limit; prompts multiply, so arithmetic is theirs."
    )
    read = Bar("decoding: memory read", reading, f"{number(reading)} of {number(limit)} GB/s, "
               f"{percent(result['bandwidth_fraction'])}", most=limit)  # fmt: skip
    multiplied = Bar("prompts: int8 products", products, f"{number(products)} of {number(most)} TOPS, "
                     f"{percent(result['int8_fraction'])}", most=most)  # fmt: skip
    note = "W8A16 takes two passes, so it reaches half at most. Float layers and attention take time and do not count."
    return Section(
        "Reached, and the limits of this machine",
        about,
        bars([read], "Memory") + bars([multiplied], "Arithmetic") + paragraph(note, "soft"),
    )


def _bytes(result: Mapping[str, Any]) -> Section:
    whole = result["bytes_per_token"]
    cache = max(whole - result["weights_bytes"], 0)
    parts = {"weights": ("accent", whole - cache), "keys and values": ("outlier", cache)}
    sizes = {name: f"{name}: {size_text(nbytes)}" for name, (_, nbytes) in parts.items()}
    picture = stack(
        [(style, nbytes, sizes[name]) for name, (style, nbytes) in parts.items()], whole, "Bytes that a step reads"
    )
    about = (
        f"{size_text(whole)} for {count_of(result['batch'], 'sequence')}, at the mean context of a sequence. "
        "The fewer bytes, the faster."
    )
    entries = [(style, sizes[name]) for name, (style, _) in parts.items()]
    return Section("What a step of decoding reads", about, picture + legend(entries))


def _repetitions(result: Mapping[str, Any], found: Measurement) -> Iterator[Section]:
    if result["repeat"] < 2:
        return
    figures, names = [], [str(at) for at in range(1, result["repeat"] + 1)]
    for name, (title, unit) in _SERIES.items():
        values = found.of(name)
        titles = [f"{at}: {number(value)} {unit}" for at, value in zip(names, values, strict=True)]
        figures.append(
            Markup("<figure>\n<h3>{} <span>{} {}, {} to {}</span></h3>\n{}\n</figure>").format(
                title, data(median(values)), unit, data(min(values)), data(max(values)),
                columns(values, titles, names, f"{title} in each repetition", "run"),
            )
        )  # fmt: skip
    header = ("Run", *(f"{title}, {unit}" for title, unit in _SERIES.values()))
    rows = [[at, *(data(found.of(name)[i]) for name in _SERIES)] for i, at in enumerate(names)]
    about = "Limits and model are measured in turn, as the speed of a shared machine drifts. Figures above are medians."
    body = pair(figures) + folded("As a table", table(header, rows, range(1, 5)))
    yield Section("Each repetition", about, body)


def _facts(result: Mapping[str, Any]) -> Section:
    processes = f"{result['world_size']} processes of " if result["world_size"] > 1 else ""
    rows = [
        ["Instruction set", result["isa"]],
        ["Threads", f"{processes}{result['threads']}"],
        ["Sequences at a time", f"{result['batch']}"],
        ["Tokens in, each", f"{result['prompt_len']:,}"],
        ["Tokens out, each", f"{result['new_tokens']:,}"],
        ["Repetitions", f"{result['repeat']}, after one to warm up"],
        ["Keys and values of a position", size_text(result["kv_bytes_per_token"])],
    ]
    return Section("The run", "", table(("What", "Value"), rows))
