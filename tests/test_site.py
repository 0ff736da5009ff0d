"""The site has the same pages in both languages, and its checker finds what is dead."""

from __future__ import annotations

import re
from pathlib import Path

from check_site import faults

DOCS = Path(__file__).parent.parent / "docs"
NO_PAGES = {"log.md"}  # a log of experiments, which the site leaves out in both languages


def test_both_languages_have_the_same_pages() -> None:
    names = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} - NO_PAGES
    chinese = {name.replace(".zh.md", ".md") for name in names if name.endswith(".zh.md")}
    assert chinese == {name for name in names if not name.endswith(".zh.md")}


def test_both_pages_of_the_server_name_the_same_refused_fields() -> None:
    def refused(page: str) -> list[str]:
        listed = (DOCS / page).read_text(encoding="utf-8").partition("<!-- refused fields")[2].partition("-->\n")[2]
        return re.findall(r"`([\w.]+)`", listed.partition("\n\n")[0])

    assert refused("serving.md") == refused("serving.zh.md") != []


def test_dead_links_anchors_and_what_comes_from_elsewhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a href="b.html#there">x</a><a href="https://example.org">x</a><h1 id="top"></h1>'
    )
    (tmp_path / "b.html").write_text('<h1 id="there"></h1><a href="a.html#top"></a><a href="#there"></a>')
    assert faults(tmp_path) == []
    (tmp_path / "a.html").write_text(
        '<a href="b.html#gone">x</a><a href="c.html">x</a><a href="#no">x</a><script src="https://example.org/x.js">'
    )
    assert faults(tmp_path) == [
        "a.html: #no: no such anchor",
        "a.html: b.html#gone: no such anchor",
        "a.html: c.html: no such file",
        "a.html: loads https://example.org/x.js",
        "b.html: a.html#top: no such anchor",
    ]
    assert faults(tmp_path / "empty") != []
