"""The page of an analysis: which linears lose how much with which type, what their inputs look like, what was chosen.

All numbers are those of quant/analysis.py. Parts that an analysis does not have are left out, so `quantize`
shows in the same form what it knows without one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise

from markupsafe import Markup

from eightfold.families import layer_of
from eightfold.quant.analysis import Analysis, InputRange
from eightfold.report.analysis_view import FLOAT, View, meaning_of, style_of
from eightfold.report.charts import Bar, Cell, Reach, Row, bars, grid, reaches, stack, step_of, steps
from eightfold.report.page import (
    Section,
    code,
    count_of,
    data,
    folded,
    joined,
    legend,
    number,
    page,
    pair,
    paragraph,
    percent,
    rounded,
    table,
    tiles,
)
from eightfold.values import size_text

_WORST = 8  # bars of the groups that lose most
_LOUDEST = 8  # rows of tokens with the largest inputs
_SINK = 20.0  # so many times what is usual make an outlier that a text names

KL_MEANS = (
    "KL is how far the next token's probabilities move from the float model's, averaged, in nats: 0 is the same model, "
    "0.01 is hard to notice, 0.1 changes answers."
)


def render(found: Analysis, smoothing: Mapping[str, str] | None = None, notes: tuple[str, ...] = ()) -> str:
    """Return the page of an analysis.

    Args:
        found: the analysis.
        smoothing: what outlier suppression chose, by layer and group.
        notes: what else a reader should know, a sentence each.
    """
    view = View(found)
    sections = [
        *_loss(view),
        *_worst(view),
        *_choices(view),
        *_inputs(view),
        *_smoothing(smoothing or {}),
        *_sizes(view),
        *_notes(notes),
    ]
    basis = f"Calibrated on {found.tokens:,} tokens of {found.samples:,} texts." if found.samples else ""
    kind = f"{found.model}, {found.scheme}" + (f" for {found.target}" if found.target else "")
    lead = _lead(view) + _tiles(view)
    return page(kind, _finding(view), lead, sections, basis)


# --- what was found, in words


def _finding(view: View) -> str:
    found = view.found
    if view.total > 0:
        return _where_it_is_lost(view)
    quantized = sum(choice.type != FLOAT for choice in found.choices)
    if found.choices:
        size = f", at {percent(found.out_bytes / found.float_bytes)} of its size" if found.out_bytes else ""
        return f"{quantized} of {len(found.choices)} linears of {found.model} are stored in 8 bits{size}"
    return f"What the linears of {found.model} read"


def _where_it_is_lost(view: View) -> str:
    by_title = dict.fromkeys(view.titles, 0.0)
    for each in view.found.groups:
        by_title[each.group] += each.loss.get(view.scheme, 0.0)
    title, most = max(by_title.items(), key=lambda item: item[1])
    first, share = view.worst[0], view.worst[0].loss[view.scheme] / view.total
    what = f"With {view.scheme} everywhere, {view.found.model} would lose about {number(view.total)} nats"
    if most >= 0.5 * view.total:
        what += f", {percent(most / view.total)} of it in {view.label(title)}"
        if share >= 0.3 and first.group == title:
            what += f" (layer {first.layer} alone: {percent(share)})"
    elif share >= 0.2:
        what += f", {percent(share)} of it in {view.label(first.group)} of layer {first.layer}"
    else:
        what += ", spread over many layers"
    return what


def _lead(view: View) -> Markup:
    found, parts = view.found, []
    if view.total > 0 and found.choices:
        kept = Counter(choice.type for choice in found.choices if choice.type != view.scheme)
        parts.append(
            "So "
            + " and ".join(
                f"{count_of(count, 'linear')} {'is' if count == 1 else 'are'} {_kept(kind)}"
                for kind, count in kept.most_common()
            )
            + "."
            if kept
            else f"All linears are {view.scheme}."
        )
    if found.kl is not None:
        held_out = f" on {found.held_out_tokens:,} tokens it was not calibrated on" if found.held_out_tokens else ""
        parts.append(f"Measured{held_out}, the result differs from the float model by {number(found.kl)} nats.")
    return paragraph(" ".join(parts), "lead") if parts else Markup("")


def _kept(kind: str) -> str:
    return "kept float" if kind == FLOAT else kind


def _tiles(view: View) -> Markup:
    found = view.found
    facts: list[tuple[str, str, str]] = []
    if found.kl is not None:
        facts.append(("KL to the float model", number(found.kl), "nats, measured"))
    elif view.total > 0:
        facts.append((f"All in {view.scheme}", number(view.total), "nats, estimates added up"))
    if found.top1 is not None:
        facts.append(("Same likeliest token", percent(found.top1, 1), "of all positions"))
    if found.out_bytes is None:
        facts.append(("Size in float", size_text(found.float_bytes), "all tensors"))
    else:
        share = percent(found.out_bytes / found.float_bytes)
        facts.append(("Size", size_text(found.out_bytes), f"{share} of {size_text(found.float_bytes)} in float"))
    if view.token_bytes is not None:
        before, after = view.token_bytes
        facts.append(
            ("Layers, read for a token", size_text(after), f"{percent(after / before)} of {size_text(before)}")
        )
    if found.samples:
        facts.append(("Calibration", f"{found.tokens:,} tokens", f"{found.samples:,} texts"))
    return tiles(facts)


# --- loss


def _loss(view: View) -> Iterator[Section]:
    if not view.types:
        return
    thresholds = steps([each.loss.get(kind, 0.0) for each in view.found.groups for kind in view.types])
    figures = [_heat_map(view, kind, thresholds) for kind in view.types]
    about = (
        "Each square is the loss when this one group of linears has the type and all others stay float. The stronger "
        "the colour, the worse. Linears that read the same input share a type."
    )
    if view.found.choices:
        about += f" A dot marks what did not stay {view.scheme} in the end."
    body = pair(figures) + _heat_legend(thresholds, has_dots=bool(view.found.choices)) + paragraph(KL_MEANS, "soft")
    yield Section("Where the loss is", about, body + folded("All losses as a table", _loss_table(view)))


def _heat_map(view: View, kind: str, thresholds: list[float]) -> Markup:
    rows = []
    for title in view.titles:
        cells: list[Cell | None] = []
        for layer in view.layers:
            each = view.losses.get((layer, title))
            if each is None or kind not in each.loss:
                cells.append(None)
                continue
            got = view.type_of(each)
            text = f"layer {layer}, {view.label(title)}, {kind}: {number(each.loss[kind])} nats"
            text += f", {size_text(each.bytes[kind])}" if kind in each.bytes else ""
            text += "" if got is None else " (chosen)" if got == kind else f" (chosen: {_as_float(got)})"
            is_moved = got is not None and kind == view.scheme != got
            cells.append(Cell(f"s{step_of(each.loss[kind], thresholds)}", text, is_moved))
        rows.append(Row(view.label(title), cells))
    total = sum(each.loss.get(kind, 0.0) for each in view.found.groups)
    return Markup("<figure>\n<h3>{} <span>all together {} nats</span></h3>\n{}\n</figure>").format(
        kind, data(total), grid(rows, view.names, f"Loss of each group of linears with {kind}, by layer", "layer")
    )


def _heat_legend(thresholds: list[float], *, has_dots: bool) -> Markup:
    names = [f"below {rounded(thresholds[0])}"]
    names += [f"{rounded(low)} to {rounded(high)}" for low, high in pairwise(thresholds)]
    entries = [(f"s{at}", name) for at, name in enumerate([*names, f"{rounded(thresholds[-1])} nats and more"])]
    return legend([*entries, *([("dot", "got another type")] if has_dots else [])])


def _loss_table(view: View) -> Markup:
    header = ["Layer", "Linears", *view.types, "Bytes in float", *view.types, *(["Chosen"] if view.chosen else [])]
    header = [f"{name}, bytes" if at > len(view.types) + 2 and name in view.types else name
              for at, name in enumerate(header)]  # fmt: skip
    rows = [
        [
            data(each.layer, str(each.layer)),
            view.label(each.group),
            *(data(each.loss.get(kind)) for kind in view.types),
            *(data(nbytes, "–" if nbytes is None else f"{nbytes:,}")
              for nbytes in map(each.bytes.get, [FLOAT, *view.types])),
            *([view.type_of(each) or "–"] if view.chosen else []),
        ]
        for each in view.found.groups
    ]  # fmt: skip
    return table(header, rows, range(2, 3 + 2 * len(view.types)))


def _worst(view: View) -> Iterator[Section]:
    entries = []
    for each in [group for group in view.worst if group.loss[view.scheme] > 0][:_WORST]:
        others = [kind for kind in (*view.types[1:], FLOAT) if kind in each.loss and kind in each.bytes]
        costs = []
        for kind in others:
            lost = "" if kind == FLOAT else f" {number(each.loss[kind])},"
            costs.append(f"{_as_float(kind)}{lost} {_more(each.bytes[kind] - each.bytes.get(view.scheme, 0))}")
        loss, got = each.loss[view.scheme], view.type_of(each)
        share = f"{number(loss)} nats, {percent(loss / view.total)}"
        end = "" if got is None else f" Chosen: {_kept(got)}."
        costs_text = f"Instead: {'; '.join(costs)}.{end}" if costs else end
        entries.append(Bar(f"layer {each.layer}, {view.label(each.group)}", loss, share, costs_text, "outlier"))
    if entries:
        about = f"The groups that lose most as {view.scheme}, and what they would lose as another type, at which size."
        yield Section("What hurts most", about, bars(entries, f"The largest losses as {view.scheme}"))


def _as_float(kind: str) -> str:
    return "float" if kind == FLOAT else kind


def _more(nbytes: int) -> str:
    return "same size" if nbytes == 0 else f"{size_text(abs(nbytes))} {'more' if nbytes > 0 else 'less'}"


# --- what was chosen


def _choices(view: View) -> Iterator[Section]:
    if not view.found.choices:
        return
    cells: dict[str, dict[int, Cell]] = defaultdict(dict)
    outside = []
    for choice in view.found.choices:
        layer, name = layer_of(choice.linear), re.sub(r"\.\d+\.", ".#.", _inside(choice.linear))
        if layer is None:
            outside.append(choice)
        else:
            title = f"layer {layer}, {name}: {_kept(choice.type)}. {choice.reason}"
            cells[name].setdefault(layer, Cell(style_of(choice.type), title))
    rows = [Row(_row_name(name), [found.get(layer) for layer in view.layers]) for name, found in cells.items()]
    kinds = list(dict.fromkeys(choice.type for choice in view.found.choices))
    reasons = Counter((choice.type, choice.reason) for choice in view.found.choices)
    named: dict[tuple[str, str], str] = {}
    for choice in view.found.choices:
        named.setdefault((choice.type, choice.reason), choice.linear)
    summary = table(
        ("Stored as", "Linears", "Why", "Such as"),
        [
            [_swatch(kind), data(count, f"{count:,}"), why, code(named[kind, why])]
            for (kind, why), count in reasons.most_common()
        ],
        (1,),
    )
    room = "left-m" if all(len(row.label) <= 10 for row in rows) else "left-l"
    picture = grid(rows, view.names, "The type of each linear, by layer", "layer", room) if rows else Markup("")
    body = Markup("<figure>{}</figure>").format(picture) + legend((style_of(kind), meaning_of(kind)) for kind in kinds)
    full = table(
        ("Linear", "Stored as", "Why"),
        [[code(choice.linear), _swatch(choice.type), choice.reason] for choice in view.found.choices],
    )
    yield Section(
        "How each linear is stored, and why",
        "Each square is a linear; its colour is its type.",
        body + summary + folded("All linears as a table", full),
    )


def _inside(linear: str) -> str:
    """Return a linear's name inside its layer."""
    found = re.search(r"\.\d+\.(.+)", linear)
    return found[1] if found else linear


def _row_name(name: str) -> str:
    short = name.partition(".")[2] or name
    return short if len(short) <= 16 else f"…{short[-15:]}"


def _swatch(kind: str) -> Markup:
    return Markup('<span class="type"><i class="{}"></i>{}</span>').format(style_of(kind), kind)


# --- inputs


def _inputs(view: View) -> Iterator[Section]:
    if not view.found.ranges:
        return
    ends = _powers(view.found.ranges)
    figures = []
    for title in view.titles:
        found = {each.layer: each for each in view.found.ranges if each.group == title}
        if found:
            columns = [_reach(view, found[layer]) if layer in found else None for layer in view.layers]
            label = f"Inputs of {view.label(title)}, by layer"
            figures.append(
                Markup("<figure>\n<h3>{} <span>{}</span></h3>\n{}\n</figure>").format(
                    view.label(title), _most_unusual(list(found.values())), reaches(columns, view.names, ends, label)
                )
            )
    about = (
        "What the linears read in the float model, by magnitude. A fixed range of 256 levels has to reach the dot; "
        "where it stands far above its bar, a few values take the levels from all others. Each line of the scale is a "
        "power of ten."
    )
    body = pair(figures)
    body += legend([("ordinary", "largest of ordinary tokens"), ("outlier", "largest of all tokens")])
    body += _loudest(view)
    yield Section("What the linears read", about, body + folded("All ranges as a table", _range_table(view)))


def _powers(ranges: tuple[InputRange, ...]) -> tuple[int, int]:
    """Return the powers of ten between which all magnitudes lie."""
    sizes = [size for each in ranges for size in (each.ordinary, _most(each)) if size > 0] or [1.0]
    high = next(power for power in range(-12, 40) if 10.0**power >= max(sizes))
    low = next(power for power in range(high, -14, -1) if 10.0**power < min(sizes) or power == high - 6)
    return low, high


def _most(each: InputRange) -> float:
    return max(-each.lo, each.hi)


def _ratio(each: InputRange) -> float:
    return _most(each) / each.ordinary if each.ordinary > 0 else 1.0


def _reach(view: View, each: InputRange) -> Reach:
    text = (
        f"layer {each.layer}, {view.label(each.group)}: {number(each.lo)} to {number(each.hi)}; ordinary tokens up to "
        f"{number(each.ordinary)}"
    )
    if each.channels:
        text += "; channels " + ", ".join(f"{channel} ({number(size)})" for channel, size in each.channels[:3])
    return Reach(each.ordinary, _most(each), text)


def _most_unusual(found: list[InputRange]) -> str:
    each = max(found, key=_ratio)
    if _ratio(each) < _SINK:
        return f"up to {number(max(map(_most, found)))}"
    return f"layer {each.layer}: {number(_most(each))}, where {number(each.ordinary)} is usual"


def _loudest(view: View) -> Markup:
    """Return the inputs that stand out most, with the channels and tokens that make them."""
    first = sorted((each for each in view.found.ranges if each.channels or each.tokens), key=lambda each: -_ratio(each))
    rows = [
        [
            str(each.layer),
            view.label(each.group),
            data(_most(each)),
            data(each.ordinary),
            joined((Markup("{} ({})").format(channel, data(size)) for channel, size in each.channels[:3]), ", "),
            joined(
                (
                    Markup("{} ({}, text {}, position {})").format(code(text, 40), data(size), sample, position)
                    for sample, position, text, size in each.tokens[:2]
                ),
                ", ",
            ),
        ]
        for each in first[:_LOUDEST]
    ]
    if not rows:
        return Markup("")
    header = ["Layer", "Linears", "Largest", "Ordinary", "Channels", "Tokens"]
    if not any(each.tokens for each in first):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Markup("<h3>Where outliers are largest</h3>") + table(header, rows, (2, 3))


def _range_table(view: View) -> Markup:
    rows = [
        [
            str(each.layer),
            view.label(each.group),
            *map(data, (each.lo, each.hi, each.ordinary)),
            ", ".join(f"{channel} ({number(size)})" for channel, size in each.channels),
        ]
        for each in view.found.ranges
    ]
    return table(("Layer", "Linears", "Least", "Most", "Ordinary tokens up to", "Largest channels"), rows, (2, 3, 4))


# --- the rest


def _smoothing(choices: Mapping[str, str]) -> Iterator[Section]:
    if not choices:
        return
    about = (
        "Outliers move from inputs into weights: each input channel is divided by a scale, and the weights that read "
        "it are multiplied by it, so the float model stays the same."
    )
    kinds = Counter(choices.values())
    summary = table(
        ("Scale", "Groups"), [[what, data(count, f"{count:,}")] for what, count in kinds.most_common(8)], (1,)
    )
    full = table(("Group", "Scale"), [[where, what] for where, what in choices.items()])
    yield Section("How inputs were smoothed", about, summary + folded("All groups as a table", full))


def _sizes(view: View) -> Iterator[Section]:
    found = view.found
    entries = [Bar("float", found.float_bytes, size_text(found.float_bytes), style="t-other")]
    if found.out_bytes is not None:
        text = f"{size_text(found.out_bytes)}, {percent(found.out_bytes / found.float_bytes)}"
        entries.append(Bar("in 8 bits, as stored", found.out_bytes, text))
    elif not view.types:
        return
    body = bars(entries, "Bytes of all tensors")
    if view.types:
        body += _token_sizes(view)
    yield Section("Sizes", "All tensors, with embedding and head.", body)


def _token_sizes(view: View) -> Markup:
    """Return what a token reads of the layers, for each type and for what was chosen."""
    groups = view.found.groups
    everywhere = [
        Bar(
            f"all in {_as_float(kind)}",
            sum(each.bytes[kind] for each in groups),
            size_text(sum(each.bytes[kind] for each in groups)),
            "" if kind == FLOAT else f"{number(sum(each.loss.get(kind, 0.0) for each in groups))} nats, added up",
            style_of(kind),
        )
        for kind in (FLOAT, *view.types)
        if all(kind in each.bytes for each in groups)
    ]
    content = Markup("<h3>What a token reads of the layers</h3>") + bars(everywhere, "Bytes a token by type")
    if view.token_bytes is not None:
        before, after = view.token_bytes
        parts: Counter[str] = Counter()
        for each in groups:
            kind = view.type_of(each)
            assert kind is not None
            parts[kind] += each.bytes[kind]
        pieces = [(style_of(kind), size, f"{_as_float(kind)}: {size_text(size)}") for kind, size in parts.items()]
        heading = Markup("<h3>As chosen: {} <span>of {}</span></h3>").format(size_text(after), size_text(before))
        content += heading + stack(pieces, before, "Bytes a token reads, by the types chosen")
        content += legend((style_of(kind), f"{_as_float(kind)}: {size_text(size)}") for kind, size in parts.items())
    return content


def _notes(notes: tuple[str, ...]) -> Iterator[Section]:
    if notes:
        yield Section("Notes", "", joined(map(paragraph, notes)))
