"""What tests read of a page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page, read strictly: what is opened is closed, in order, and nothing is asked of anywhere."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.tables: list[list[list[str]]] = []
        self.exact: list[float] = []  # of <data>, in order
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag == "data":
            self.exact.append(float(dict(attrs)["value"] or ""))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        self.texts.append((tuple(self.open), data))
        if {"td", "th"} & {*self.open}:
            self.tables[-1][-1][-1] += data

    def inside(self, tag: str) -> list[str]:
        """Return the texts that stand in an element, but for the style of the page."""
        return [text for path, text in self.texts if tag in path and "style" not in path and text.strip()]

    def require_alone(self) -> None:
        """Check that nothing is loaded and nothing runs."""
        assert not {"script", "link", "img", "iframe", "object", "embed", "form", "a", "base"} & {*self.tags}
        assert not [name for _, name, _ in self.attributes if name in ("src", "href", "srcset", "style", "xlink:href")]
        assert not [name for _, name, _ in self.attributes if name.startswith("on")]
        style = "".join(text for path, text in self.texts if "style" in path)
        assert not re.search(r"url\(|@import|expression", style)
