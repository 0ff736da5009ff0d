"""Fail if a page of the built site links to a page, file or anchor that is not there, or loads anything from elsewhere.

python docs/check_site.py build/site
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors = {"", "__top"}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            elif name == "href" and value and tag == "a":
                self.links.append(value)
            elif (name == "src" or (name == "href" and tag == "link")) and value:
                self.loaded.append(value)


def faults(site: Path) -> list[str]:
    """Return a line for each dead link of a built site, and for each thing that a page loads from another one."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    found = []
    for path, page in pages.items():
        shown = path.relative_to(site.resolve())
        for link in [*page.links, *page.loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page.loaded and parts.scheme != "data":
                    found.append(f"{shown}: loads {link}")
                continue
            target = path
            if parts.path:
                base = site.resolve() if parts.path.startswith("/") else path.parent
                target = (base / unquote(parts.path).lstrip("/")).resolve()
                target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{shown}: {link}: no such file")
            elif target in pages and link in page.links and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{shown}: {link}: no such anchor")
    return sorted(set(found)) or ([] if pages else [f"{site}: no pages"])


def main() -> int:
    """Print what is wrong."""
    found = faults(Path(sys.argv[1]))
    print("\n".join(found) or "every link of the site leads somewhere")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
