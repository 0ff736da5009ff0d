"""What is told of losses: tables of groups and types, what was chosen and why, and commands worth trying."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from eightfold.cli import console
from eightfold.quant.analysis import Analysis, GroupLoss, InputRange
from eightfold.scheme import SCHEMES
from eightfold.values import Kind, size_text

MAX_KL = Kind((int, float), "a number of nats above 0, such as 0.01", above=0.0, outside="a number of nats above 0")

_FLOAT = "FLOAT"
_NAMES = {kind.value: name for name, kind in SCHEMES.items()} | {_FLOAT: "float"}

# So many of the worst groups, and of the widest inputs, are told.
_WORST = 12

# Sinks are told of inputs whose largest value is so many times that of ordinary tokens.
_SINK_RATIO = 8.0


def found_lines(analysis: Analysis, limit: float) -> Iterator[str]:
    """Yield what --max-kl has chosen: types, bytes, the sum of losses, and the KL divergence that was proved."""
    chosen = {choice.linear: choice for choice in analysis.choices}
    counts = Counter((group.group, chosen[group.linears[0]].type) for group in analysis.groups)
    kinds = list(dict.fromkeys(kind for group in analysis.groups for kind in group.loss))
    titles = list(dict.fromkeys(group.group for group in analysis.groups))
    rows = [[title, *(str(counts[title, kind] or "-") for kind in kinds)] for title in titles]
    yield from console.table(["layers of", *(_NAMES[kind] for kind in kinds)], rows, right_from=1)
    kept = [group for group in analysis.groups if chosen[group.linears[0]].type == _FLOAT]
    for group in sorted(kept, key=_least, reverse=True)[:_WORST]:
        yield f"kept float: layer {group.layer} {group.group}: {chosen[group.linears[0]].reason}"
    if len(kept) > _WORST:
        yield f"kept float: {len(kept) - _WORST} more groups"
    types = [chosen[group.linears[0]].type for group in analysis.groups]
    nbytes = sum(group.bytes[kind] for group, kind in zip(analysis.groups, types, strict=True))
    predicted = sum(group.loss[kind] for group, kind in zip(analysis.groups, types, strict=True))
    yield (
        f"KL {analysis.kl:.4f} on {analysis.held_out_tokens:,} held-out tokens (limit {limit:g}; losses add up to "
        f"{predicted:.4f}), top-1 {analysis.top1:.1%}; linears read {size_text(nbytes)} a token"
    )


def analysis_lines(source: str, analysis: Analysis) -> Iterator[str]:
    """Yield a table of losses by kind of group, the worst groups, the widest inputs, and what to do about them."""
    kinds = list(dict.fromkeys(kind for group in analysis.groups for kind in group.loss if kind != _FLOAT))
    size = size_text(analysis.float_bytes)
    yield f"{analysis.model}: {size}, {analysis.samples} calibration samples, {analysis.tokens:,} tokens"
    yield ""
    yield "KL divergence at the model's end (nats, estimated) when all layers' linears of a kind have a type:"
    yield from _summary(analysis.groups, kinds)
    yield ""
    yield "The groups that lose most with the scheme's own type, and what it costs to keep them float:"
    yield from _worst(analysis.groups, kinds)
    if sinks := list(_sinks(analysis.ranges)):
        yield ""
        yield "Inputs of which a few tokens (sinks) are far larger than all others:"
        yield from console.table(
            ["layer", "input of", "largest", "others", "channels", "token (sample, position)"], sinks, right_from=9
        )
    yield ""
    yield from _advice(source, analysis, kinds)


def _summary(groups: Sequence[GroupLoss], kinds: Sequence[str]) -> list[str]:
    sums: defaultdict[tuple[str, str], float] = defaultdict(float)
    sizes: defaultdict[tuple[str, str], int] = defaultdict(int)
    for group in groups:
        for kind, loss in group.loss.items():
            for title in (group.group, "all"):
                sums[title, kind] += loss
                sizes[title, kind] += group.bytes[kind]
    titles = [*dict.fromkeys(group.group for group in groups), "all"]
    rows = [
        [
            title,
            *(f"{sums[title, kind]:.5f}" if (title, kind) in sums else "-" for kind in kinds),
            size_text(sizes[title, kinds[0]]),
            size_text(sizes[title, _FLOAT]),
        ]
        for title in titles
    ]
    return console.table(["linears", *(_NAMES[kind] for kind in kinds), "int8", "float"], rows, right_from=1)


def _worst(groups: Sequence[GroupLoss], kinds: Sequence[str]) -> list[str]:
    asked = [group for group in groups if kinds[0] in group.loss]
    rows = [
        [
            str(group.layer),
            group.group,
            *(f"{group.loss[kind]:.5f}" for kind in kinds),
            "+" + size_text(group.bytes[_FLOAT] - group.bytes[kinds[0]]),
        ]
        for group in sorted(asked, key=lambda group: group.loss[kinds[0]], reverse=True)[:_WORST]
    ]
    return console.table(["layer", "linears", *(_NAMES[kind] for kind in kinds), "float"], rows, right_from=2)


def _sinks(ranges: Sequence[InputRange]) -> Iterator[list[str]]:
    wide = [each for each in ranges if _largest(each) > _SINK_RATIO * each.ordinary > 0]
    for each in sorted(wide, key=lambda each: _largest(each) / each.ordinary, reverse=True)[:_WORST]:
        sample, position, text, _ = each.tokens[0]
        channels = ", ".join(str(channel) for channel, size in each.channels[:3] if size > each.ordinary)
        yield [
            str(each.layer),
            each.group,
            f"{_largest(each):.4g}",
            f"{each.ordinary:.4g}",
            channels,
            f"{text!r} ({sample}, {position})",
        ]


def _largest(found: InputRange) -> float:
    return max(-found.lo, found.hi)


def _least(group: GroupLoss) -> float:
    return min((loss for kind, loss in group.loss.items() if kind != _FLOAT), default=0.0)


def _advice(source: str, analysis: Analysis, kinds: Sequence[str]) -> Iterator[str]:
    """Yield commands that would help."""
    scheme, model = _NAMES[analysis.scheme], source
    target = f" --target {analysis.target}" if analysis.target else ""
    # A static down_proj is what no scheme has unless it is asked for.
    usual = [group for group in analysis.groups if len(kinds) > 1 or group.group != "down"]
    least = sum(map(_least, analysis.groups))
    reached = max(least, sum(group.loss.get(kinds[0], 0.0) for group in analysis.groups if group.group != "down"))
    yield "Try:"
    yield f"  eightfold quantize {model} OUT --scheme {scheme}{target} --max-kl {_rounded_up(reached)}"
    kept = " ".join(f"--keep-float {name}" for name in max(usual, key=_least).linears)
    yield f"  eightfold quantize {model} OUT --scheme {scheme}{target} {kept}"


def _rounded_up(kl: float) -> str:
    """Return the next of 0.001, 0.002, 0.005, 0.01 ..., at least."""
    steps = (digit * 10.0**power for power in range(-5, 1) for digit in (1, 2, 5))
    return f"{next((step for step in steps if step >= kl), 1.0):g}"
