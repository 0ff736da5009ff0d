"""Pages for people: one HTML file with its style and pictures inside, which asks nothing of anywhere.

Whatever comes from a model, a file or a tokenizer goes through visible() and is escaped: fragments are put together
with Markup.format, which escapes all that is not Markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from markupsafe import Markup

from eightfold import __version__
from eightfold.errors import ConfigError, OutputError
from eightfold.files import write_whole
from eightfold.values import shorten

_NO_BREAK = "\N{NO-BREAK SPACE}"
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_PAGE = Markup("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<p class="kind"><b>Eightfold</b> · {kind}</p>
<h1>{finding}</h1>
{lead}
</header>
<main>
{sections}
</main>
<footer>{foot} Written by eightfold {version}.</footer>
</body>
</html>
""")


@dataclass(frozen=True)
class Section:
    """A part of a page: a heading, one or two plain sentences, and what they are about."""

    title: str
    about: str
    body: Markup


def page(kind: str, finding: str, lead: Markup, sections: Iterable[Section], foot: str = "") -> str:
    """Return a page.

    Args:
        kind: what it is about, in a few words.
        finding: what was found, in a sentence: the heading.
        lead: what stands below it.
        sections: in order.
        foot: a sentence for the foot of the page.
    """
    body = [
        Markup("<section>\n<h2>{}</h2>\n{}{}\n</section>").format(
            each.title, paragraph(each.about, "soft") if each.about else "", each.body
        )
        for each in sections
    ]
    html = str(
        _PAGE.format(
            title=visible(f"{kind}: {finding}"),
            style=Markup(files("eightfold.report").joinpath("page.css").read_text("utf-8")),
            kind=visible(kind),
            finding=visible(finding),
            lead=lead,
            sections=joined(body, "\n"),
            foot=visible(foot),
            version=__version__,
        )
    )
    return "\n".join(map(_seen, html.split("\n")))


def require_place(path: Path, name: str) -> None:
    """Refuse a file for a page that could not be written, before anything is measured.

    Raises:
        ConfigError: its folder does not exist, or something that is no file has its name. `name` is the option's.
    """
    if not path.parent.is_dir():
        expected = "a file in a folder that exists"
        raise ConfigError(name, got=f"{path}, whose folder does not exist", expected=expected)
    if path.exists() and not path.is_file():
        got = f"{path}, a directory" if path.is_dir() else f"{path}, no file"
        raise ConfigError(name, got=got, expected="a file, or nothing yet")


def write_page(path: Path, html: str) -> None:
    """Write a page; it appears whole.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        write_whole(path, html.encode("utf-8"))
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}", action="Check the path.") from None


def visible(text: str, most: int = 300) -> str:
    """Return a text in which what cannot be seen is written out, as Python does it; cut where it is long."""
    return shorten(_seen(text), most)


def _seen(text: str) -> str:
    if text.isprintable():
        return text
    seen = (
        each if each.isprintable() or each == _NO_BREAK else each.encode("unicode_escape").decode() for each in text
    )
    return "".join(seen)


def joined(parts: Iterable[Markup], by: str = "") -> Markup:
    """Return fragments one after the other."""
    return Markup(by).join(parts)


def paragraph(text: str | Markup, style: str = "") -> Markup:
    """Return a paragraph; a plain text is made visible and escaped."""
    content = text if isinstance(text, Markup) else visible(text, 2000)
    return Markup('<p class="{}">{}</p>').format(style, content) if style else Markup("<p>{}</p>").format(content)


def number(value: float | None) -> str:
    """Return a number with three digits that say something: 3,512, 0.0063, 2.1·10⁻⁶."""
    if value is None:
        return "–"
    if not math.isfinite(value) or value == 0:
        return "0" if value == 0 else str(value)
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    if size < 1e-5:
        return power_text(value, 1)
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f}"


def power_text(value: float, digits: int = 0) -> str:
    """Return a number with its power of ten: 3·10⁻⁶."""
    factor, power = f"{value:.{digits}e}".split("e")
    return f"{factor}·10{str(int(power)).translate(_POWERS)}"


def rounded(value: float) -> str:
    """Return a round number without the zeros that number() gives it."""
    return number(value) if 0 < value < 1e-9 else f"{value:.9f}".rstrip("0").rstrip(".")


def count_of(count: int, what: str) -> str:
    """Return how many of something there are: 1 linear, 24 linears."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def percent(share: float, digits: int = 0) -> str:
    """Return a share as per cent; what is neither none nor all does not look like it."""
    text = f"{100 * share:.{digits}f}"
    if 0 < share < 1 and float(text) in (0, 100):
        least = 10**-digits
        text = f"less than {least:g}" if share < 0.5 else f"more than {100 - least:g}"
    return f"{text}{_NO_BREAK}%"


def data(value: float | None, text: str | None = None) -> Markup:
    """Return a number as people read it, which still holds all of its digits."""
    shown = number(value) if text is None else text
    return Markup("{}").format(shown) if value is None else Markup('<data value="{!r}">{}</data>').format(value, shown)


def code(text: str, most: int = 300) -> Markup:
    """Return a text of a model or a file, as it is."""
    return Markup("<bdi><code>{}</code></bdi>").format(visible(text, most))


def tiles(facts: Iterable[tuple[str, str, str]]) -> Markup:
    """Return the few figures that matter: (what, the figure, what it means), the last may be empty."""
    return Markup('<dl class="tiles">\n{}\n</dl>').format(
        joined(
            (
                Markup("<div><dt>{}</dt><dd>{}</dd>{}</div>").format(
                    visible(what), visible(figure), Markup("<dd>{}</dd>").format(visible(note)) if note else ""
                )
                for what, figure, note in facts
            ),
            "\n",
        )
    )


def legend(entries: Iterable[tuple[str, str]]) -> Markup:
    """Return what colours mean: (style, meaning)."""
    found = (Markup('<li><i class="{}"></i>{}</li>').format(style, visible(text)) for style, text in entries)
    return Markup('<ul class="legend">{}</ul>').format(joined(found))


def pair(figures: Iterable[Markup]) -> Markup:
    """Return figures side by side where there is room."""
    return Markup('<div class="pair">\n{}\n</div>').format(joined(figures, "\n"))


def table(header: Sequence[str], rows: Iterable[Sequence[str | Markup]], numbers: Iterable[int] = ()) -> Markup:
    """Return a table; the columns of `numbers` are flush right, and plain texts are made visible."""
    right = frozenset(numbers)

    def line(cells: Sequence[str | Markup], tag: str) -> Markup:
        found = []
        for at, cell in enumerate(cells):
            content = cell if isinstance(cell, Markup) else visible(cell)
            style = Markup(' class="n"') if at in right else ""
            found.append(Markup("<{0}{1}>{2}</{0}>").format(Markup(tag), style, content))
        return Markup("<tr>{}</tr>").format(joined(found))

    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}">'
        "<table>\n<thead>{}</thead>\n<tbody>\n{}\n</tbody>\n</table></div>"
    ).format(f"Table: {', '.join(header)}", line(header, "th"), joined((line(row, "td") for row in rows), "\n"))


def folded(summary: str, body: Markup) -> Markup:
    """Return something that is shown when it is asked for."""
    return Markup("<details>\n<summary>{}</summary>\n{}\n</details>").format(visible(summary), body)
