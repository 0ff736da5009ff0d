"""The page of `eval`: how far a model is from its float original, by place, by size, and where most."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from eightfold.evaluate import Evaluation, Positions
from eightfold.report.analysis_page import KL_MEANS
from eightfold.report.charts import columns
from eightfold.report.page import (
    Section,
    code,
    data,
    folded,
    number,
    page,
    paragraph,
    percent,
    power_text,
    table,
    tiles,
)

_COLUMNS = 64  # of a picture, at most
_WORST = 15
_CONTEXT = 12  # tokens that are shown before one
_NLL_MEANS = (
    "The loss of a position is -log p of the token that follows, in nats; perplexity is e to its mean. It says how "
    "well the model knows the text, not what 8 bits cost: give the float model with --against for that."
)


@dataclass(frozen=True)
class Measured:
    """What was measured, and on what.

    Attributes:
        result: averages.
        positions: what they are averages of.
        chunks: token ids.
        decode: tokens to text.
        model: what the model is called.
        against: what the other is called; None without one.
        text: what the text is called.
        ppl_mindie: perplexity of mode mindie, where both modes are measured.
    """

    result: Evaluation
    positions: Positions
    chunks: Sequence[Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    model: str
    against: str | None
    text: str
    ppl_mindie: float | None = None

    @cached_property
    def values(self) -> NDArray[Any]:
        """Return KL of each position, or without another model the loss, (T,) float64."""
        return np.concatenate(self.positions.nll if self.against is None else self.positions.kl)

    @property
    def what(self) -> str:
        return "loss" if self.against is None else "KL"

    @property
    def title(self) -> str:
        return self.what[0].upper() + self.what[1:]

    @cached_property
    def places(self) -> list[tuple[int, int]]:
        """Return chunk and position of each value."""
        return [(at, place) for at, chunk in enumerate(self.chunks) for place in range(len(chunk) - 1)]


def render(found: Measured) -> str:
    """Return the page of an evaluation."""
    sections = [*_by_place(found), _by_size(found), _worst(found)]
    kind = f"{found.model} on {found.text}"
    means = paragraph(_NLL_MEANS if found.against is None else KL_MEANS, "soft")
    chunks = f"{found.result.chunks} chunks of {len(found.chunks[0])} tokens, each by itself."
    return page(kind, _finding(found), means + _tiles(found), sections, chunks)


def _finding(found: Measured) -> str:
    result = found.result
    if result.kl_mean is None or result.top1_agreement is None:
        return f"{found.model} has a perplexity of {number(result.ppl)} on {result.tokens:,} tokens"
    return (
        f"{found.model} is {number(result.kl_mean)} nats away from {found.against}: "
        f"{percent(result.top1_agreement, 1)} of its likeliest tokens are the same"
    )


def _tiles(found: Measured) -> Markup:
    result, facts = found.result, []
    if result.kl_mean is not None and result.kl_p99 is not None and result.top1_agreement is not None:
        facts += [
            ("KL, mean", number(result.kl_mean), "nats"),
            ("KL, 99th percentile", number(result.kl_p99), "1 position in 100 is worse"),
            ("Same likeliest token", percent(result.top1_agreement, 1), "of all positions"),
        ]
    note = ""
    if result.ppl_against is not None:
        change = 100 * (result.ppl / result.ppl_against - 1)
        note = f"{change:+.2f} % to {result.ppl_against:.4f} of {found.against}"
    facts.append(("Perplexity", f"{result.ppl:.4f}", note))
    if found.ppl_mindie is not None:
        facts.append(("Perplexity, mode mindie", f"{found.ppl_mindie:.4f}", "attention of prompts in float"))
    facts.append(("Measured on", f"{result.tokens:,}", "predictions"))
    return tiles(facts)


# --- by place


def _by_place(found: Measured) -> Iterator[Section]:
    places = np.array([place for _, place in found.places])
    in_chunk = np.array([chunk for chunk, _ in found.places])
    yield Section(
        f"{found.title} by position in a chunk",
        "Early positions have little context; a first token that stands out is a sink that was cut off."
        if found.against is not None
        else "Early positions have little context.",
        _averages(found, places, "position") + folded("As a table", _average_table(found, places, "Positions")),
    )
    if len(found.chunks) > 1:
        yield Section(
            f"{found.title} by chunk",
            "Texts differ; one that is far worse than all others is worth a look.",
            _averages(found, in_chunk, "chunk") + folded("As a table", _average_table(found, in_chunk, "Chunks")),
        )


def _bins(places: NDArray[Any]) -> list[tuple[int, int]]:
    """Return first and last of the places that a column stands for: the first by itself, as sinks are there."""
    count = int(places.max()) + 1
    if count <= _COLUMNS:
        return [(at, at) for at in range(count)]
    width = -(-(count - 1) // (_COLUMNS - 1))
    return [(0, 0), *((at, min(at + width, count) - 1) for at in range(1, count, width))]


def _means(found: Measured, places: NDArray[Any]) -> list[tuple[str, float]]:
    """Return the average of each column, and the places it stands for."""
    return [
        (str(first) if first == last else f"{first} to {last}", float(found.values[of_bin].mean()))
        for first, last in _bins(places)
        if (of_bin := (places >= first) & (places <= last)).any()
    ]


def _averages(found: Measured, places: NDArray[Any], unit: str) -> Markup:
    means = _means(found, places)
    return columns(
        [value for _, value in means],
        [f"{unit} {name}: {number(value)} nats" for name, value in means],
        [name.partition(" ")[0] for name, _ in means],
        f"Mean {found.what} by {unit}",
        unit,
    )


def _average_table(found: Measured, places: NDArray[Any], title: str) -> Markup:
    rows = [[name, data(value)] for name, value in _means(found, places)]
    return table((title, f"Mean {found.what}, nats"), rows, (1,))


# --- by size


def _by_size(found: Measured) -> Section:
    sizes = np.maximum(found.values, 1e-12)
    powers = np.floor(2 * np.log10(sizes)).astype(int)
    low, high = int(max(powers.min(), np.floor(2 * np.log10(max(np.quantile(sizes, 0.001), 1e-12))))), int(powers.max())
    powers = np.maximum(powers, low)
    counts = [int((powers == power).sum()) for power in range(low, high + 1)]
    names = [_plain(10.0 ** (power / 2)) for power in range(low, high + 1)]
    total = len(sizes)
    titles = [
        f"{'below' if at == 0 else name + ' to'} {_plain(10.0 ** ((low + at + 1) / 2))} nats: "
        f"{count:,} positions, {percent(count / total, 1)}"
        for at, (name, count) in enumerate(zip(names, counts, strict=True))
    ]
    picture = columns(
        [100 * count / total for count in counts], titles, names, f"Positions by {found.what}, in per cent", "nats"
    )
    quantiles = [(share, float(np.quantile(found.values, share))) for share in (0.5, 0.9, 0.99, 0.999)]
    rows = [[percent(share, 1), data(value)] for share, value in [*quantiles, (1.0, float(found.values.max()))]]
    about = (
        f"How many per cent of the positions have which {found.what}. Half of them lie below "
        f"{number(quantiles[0][1])} nats, one in a thousand above {number(quantiles[3][1])}."
    )
    full = table(("Share of positions", "At most, nats"), rows, (1,))
    return Section(f"How {found.what} spreads", about, picture + folded("As a table", full))


def _plain(value: float) -> str:
    return power_text(value) if value < 1e-4 else f"{float(f'{value:.1g}'):.4f}".rstrip("0").rstrip(".")


# --- where most


def _worst(found: Measured) -> Section:
    order = np.argsort(-found.values, kind="stable")[:_WORST]
    top = np.concatenate(found.positions.top)
    theirs = None if found.against is None else np.concatenate(found.positions.top_against)
    rows = []
    for at in order.tolist():
        chunk, place = found.places[at]
        ids = found.chunks[chunk]
        context = found.decode(ids[max(0, place + 1 - _CONTEXT) : place + 1])
        expected = [] if theirs is None else [_token(found, theirs[at])]
        said = [_token(found, ids[place + 1]), *expected, _token(found, top[at])]
        rows.append([data(float(found.values[at])), code(context, 120), *said, f"{chunk}, {place}"])
    header = [f"{found.title}, nats", "Text before", "In the text", *([] if theirs is None else ["Float says"]),
              "The model says", "Chunk, position"]  # fmt: skip
    about = "The positions where the two differ most: what the text says next, and what each takes for likeliest."
    if theirs is None:
        about = "The positions that the model expected least: what the text says next, and what it took for likeliest."
    return Section("Where it is worst", about, table(header, rows, (0,)))


def _token(found: Measured, token: int) -> Markup:
    return code(found.decode([int(token)]), 40)
